#!/usr/bin/env bash
# Darwin's recipe in small, from a fresh model to figures and plots, in some minutes on a laptop's CPU:
#   bash configs/darwin/small.sh [OUT]
# SEED is that of both trainings (default: 0). More words for the commands can be given in TRAIN and EVALUATE.
set -euo pipefail
out=${1:-out/darwin}
seed=${SEED:-0}
read -r -a train <<<"${TRAIN:-}"
read -r -a evaluate <<<"${EVALUATE:-}"
data=$out/data
mkdir -p "$out"

# Paragraphs about solar cells with their 31 values, and parameters of cells with numbers by a toy formula.
python configs/darwin/prepare.py "$data"

# What stands for LLaMA: a fresh model that has read the paragraphs, and no values.
python -m jaxlm.train --config configs/darwin/base.yaml --output_dir "$out/base" --train.seed "$seed" \
    --tokenizer.train_on "$data"/{sii,mdp}-train.json \
    --data.train "[{path: $data/sii-train.json, template: text, columns: {text: input}}]" "${train[@]}"

# One training for both tasks, all parameters.
python -m jaxlm.train --config configs/darwin/sft.yaml --config configs/darwin/small.yaml --output_dir "$out/tuned" \
    --model.path "$out/base" --train.seed "$seed" --data.train \
    "[{path: $data/sii-train.json, template: alpaca_legacy}, {path: $data/mdp-train.json, template: alpaca_legacy}]" \
    "${train[@]}"

# Both of Darwin's tests, before and after; by chance: the right answers to other questions.
for task in sii mdp; do
    figures=(python -m jaxlm.evaluate --task $task --data "$data/$task-test.json" --overwrite)
    for model in base tuned; do
        "${figures[@]}" --model "$out/$model" --template alpaca_legacy --batch_size 30 --output "$out/evaluation/$model" \
            --options.max_new_tokens 448 "${evaluate[@]}"
    done
    "${figures[@]}" --predictions "$data/$task-others.json" --output "$out/evaluation/others"
done
for model in base tuned others; do
    python configs/darwin/prepare.py --close "$out/evaluation/$model/mdp/predictions.jsonl" "$out/evaluation/$model/close.json"
done

python configs/result.py "$out/result.json" --run "$out/tuned" \
    --metric "31 values of a cell (sii, F1)" --chance "$out/evaluation/others/sii/scores.json:figures.ie_f1.value" \
    --before "$out/evaluation/base/sii/scores.json:figures.ie_f1.value" \
    --after "$out/evaluation/tuned/sii/scores.json:figures.ie_f1.value" \
    --metric "PCE within 5 % (mdp)" --chance "$out/evaluation/others/close.json:share" \
    --before "$out/evaluation/base/close.json:share" --after "$out/evaluation/tuned/close.json:share"
