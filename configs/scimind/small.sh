#!/usr/bin/env bash
# SciMind's recipe in small, from a fresh model to a table of figures, in some minutes on a laptop's CPU:
#   bash configs/scimind/small.sh [OUT]
# DATA (configs/scimind) holds train.json and test.json as prepare.py writes them; SEED (0) is of the trainings. More words
# for the commands can be given in BASE (the first training), TRAIN (both) and GENERATE.
set -euo pipefail
out=${1:-out/scimind}
data=${DATA:-configs/scimind}
seed=${SEED:-0}
read -r -a base <<<"${BASE:-}"
read -r -a train <<<"${TRAIN:-}"
read -r -a generate <<<"${GENERATE:-}"

# Answers to what was held out, and figures: of a model, and of guessing.
figures() {
    python -m jaxlm.evaluate --task "$2" --predictions "$out/$1-$2.json" --save_file "$out/$1-$2-figures.json" >"$out/$1-$2.txt"
}
answer() {
    for task in smiles2text text2smiles; do
        python -m jaxlm.generate --model "$out/$2" --predict_data "$data/test.json" --template $task \
            --save_file "$out/$1-$task.json" --overwrite --max_new_tokens 112 --batch_size 30 "${generate[@]}"
        figures "$1" $task
    done
}

python configs/scimind/chance.py "$data/test.json" "$out"
figures chance smiles2text
figures chance text2smiles

# A dense model; with LLaMA-2 in its place, everything that follows is the same.
python -m jaxlm.train --config configs/scimind/base.yaml --output_dir "$out/base" --train.seed "$seed" --tokenizer.train_on "$data/train.json" \
    --data.train "[{path: $data/train.json, template: text, columns: {text: caption}}]" "${base[@]}" "${train[@]}"

# Tokens for molecules, and the feed-forward layers divided into experts.
python -m convert extend-vocab "$out/base" "$out/extended" --modality smiles
python -m convert moefy "$out/extended" "$out/moe" --experts 16 --router activation --top-k text=14,smiles=2 \
    --sample "$data/test.json" --sample-template smiles2text
answer before moe

# Fine-tuning, from molecule to caption and back.
python -m jaxlm.train --config configs/scimind/small.yaml --model.path "$out/moe" --output_dir "$out/tuned" --train.seed "$seed" \
    --data.train "[{path: $data/train.json, template: smiles2text}, {path: $data/train.json, template: text2smiles}]" \
    "${train[@]}"
answer after tuned

python configs/scimind/table.py "$out"
python configs/result.py "$out/result.json" --run "$out/tuned" \
    --metric "captions, F1 of facts" --chance "$out/facts.json:smiles2text.chance" \
    --before "$out/facts.json:smiles2text.before" --after "$out/facts.json:smiles2text.after"
