#!/usr/bin/env bash
# SciMind's recipe in small, from a fresh model to figures, in some ten minutes on a laptop's CPU:
#   bash configs/scimind/small.sh [DATA [OUT]]
# DATA holds train.json and test.json as prepare.py writes them. More words for the commands can be given in BASE (the
# first training), TRAIN (both) and GENERATE.
set -euo pipefail
data=${1:-configs/scimind}
out=${2:-out/scimind}
read -r -a base <<<"${BASE:-}"
read -r -a train <<<"${TRAIN:-}"
read -r -a generate <<<"${GENERATE:-}"

# A dense model; with LLaMA-2 in its place, everything that follows is the same.
python -m jaxlm.train --config configs/scimind/base.yaml --output_dir "$out/base" \
    --tokenizer.train_on "$data/train.json" \
    --data.train "[{path: $data/train.json, template: text, columns: {text: caption}}]" "${base[@]}" "${train[@]}"

# Tokens for molecules, and the feed-forward layers divided into experts.
python -m convert extend-vocab "$out/base" "$out/extended" --modality smiles
python -m convert moefy "$out/extended" "$out/moe" --experts 16 --router activation --top-k text=14,smiles=2 \
    --sample "$data/test.json" --sample-template smiles2text

# Fine-tuning, from molecule to caption and back.
python -m jaxlm.train --config configs/scimind/small.yaml --model.path "$out/moe" --output_dir "$out/tuned" \
    --data.train "[{path: $data/train.json, template: smiles2text}, {path: $data/train.json, template: text2smiles}]" \
    "${train[@]}"

# Answers to what was held out, and figures.
for task in smiles2text text2smiles; do
    python -m jaxlm.generate --model "$out/tuned" --predict_data "$data/test.json" --template $task \
        --save_file "$out/$task.json" --overwrite --max_new_tokens 160 --batch_size 32 "${generate[@]}"
    python -m jaxlm.evaluate --task $task --predictions "$out/$task.json" --save_file "$out/$task-figures.json"
done
