#!/usr/bin/env bash
# Valid molecules by preferences and rewards, in small, from a fresh model to a curve, in some minutes on a laptop's CPU:
#   bash configs/molecules/small.sh [OUT]
# SEED (0) is of the pairs, the trainings and the answers. More words for the commands can be given in TRAIN (all three),
# GRPO (the last) and GENERATE.
set -euo pipefail
out=${1:-out/molecules}
seed=${SEED:-0}
read -r -a train <<<"${TRAIN:-}"
read -r -a grpo <<<"${GRPO:-}"
read -r -a generate <<<"${GENERATE:-}"

# Answers to captions, drawn at temperature 1: four to each.
draw() {
    python -m jaxlm.generate --model "$out/$1" --predict_data "$2" --template alpaca_short --columns '{instruction: caption}' \
        --save_file "$out/$3" --overwrite --temperature 1 --samples 4 --seed "$seed" --max_new_tokens 48 --batch_size 60 "${generate[@]}"
}

python -m jaxlm.train --config configs/molecules/sft.yaml --output_dir "$out/sft" --train.seed "$seed" "${train[@]}"
draw sft configs/scimind/test.json sft.json

# Pairs of its own answers to 300 of the captions that it was trained on (the file has a record a line).
sed -n '2,301s/,$//p' configs/scimind/train.json >"$out/asked.jsonl"
draw sft "$out/asked.jsonl" drawn.jsonl
python configs/molecules/pairs.py "$out/drawn.jsonl" "$out/pairs.jsonl" --seed "$seed"
python -m jaxlm.train --config configs/molecules/dpo.yaml --model.path "$out/sft" --output_dir "$out/dpo" --train.seed "$seed" \
    --data.train "[{path: $out/pairs.jsonl, template: alpaca_short}]" "${train[@]}"
draw dpo configs/scimind/test.json dpo.json

python -m jaxlm.train --config configs/molecules/grpo.yaml --model.path "$out/dpo" --output_dir "$out/grpo" --train.seed "$seed" \
    "${train[@]}" "${grpo[@]}"
draw grpo configs/scimind/test.json grpo.json

python configs/molecules/figures.py "$out"
python configs/result.py "$out/result.json" --run "$out/sft" --metric "valid SMILES" --chance "$out/figures.json:chance" \
    --before "$out/figures.json:sft.valid" --after "$out/figures.json:grpo.valid"
