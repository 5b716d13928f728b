#!/usr/bin/env bash
# QLoRA in small, from a fresh model to figures, in some minutes on a laptop's CPU:
#   bash configs/qlora/small.sh [OUT]
# SEED (0) is of the trainings. More words for the commands can be given in TRAIN (both) and EVALUATE.
set -euo pipefail
out=${1:-out/qlora}
seed=${SEED:-0}
read -r -a train <<<"${TRAIN:-}"
read -r -a evaluate <<<"${EVALUATE:-}"

# Answers to what no record says, in the prompts of the records, and the share of them that is right to the word.
ask() {
    python -m jaxlm.evaluate --task qa --model "$out/$1" --data "$out/questions.json" --output "$out/$1-evaluation" --overwrite \
        --template alpaca_short --options "{chat: true, question: '', cue: '', max_new_tokens: 32}" --batch_size 40 "${evaluate[@]}"
}

python configs/qlora/questions.py "$out"

# The model to begin with, and the same in four bits; with LLaMA-2 in its place, everything that follows is the same.
python -m jaxlm.train --config configs/qlora/base.yaml --output_dir "$out/base" --train.seed "$seed" "${train[@]}"
python -m convert quantize "$out/base" "$out/nf4" --kind nf4
ask nf4

# An adapter on the four bits.
python -m jaxlm.train --config configs/qlora/small.yaml --model.path "$out/nf4" --output_dir "$out/tuned" --train.seed "$seed" "${train[@]}"
ask tuned

# The adapter goes into the original weights, not into the rounded ones.
python -m convert merge "$out/nf4" "$out/tuned" "$out/merged"
ask merged
python -m jaxlm.generate --model "$out/merged" --template alpaca_short --prompt "What colour is hematite?" --max_new_tokens 32

python configs/result.py "$out/result.json" --run "$out/tuned" \
    --metric "exact answers, four bits" --chance "$out/chance.json:exact" \
    --before "$out/nf4-evaluation/qa/scores.json:figures.exact.value" --after "$out/tuned-evaluation/qa/scores.json:figures.exact.value" \
    --metric "exact answers, merged" --chance "$out/chance.json:exact" \
    --before "$out/nf4-evaluation/qa/scores.json:figures.exact.value" --after "$out/merged-evaluation/qa/scores.json:figures.exact.value"
