#!/usr/bin/env bash
# LLM4Academic's comparison in small: a fresh tiny model of each base's family learns the instructions of this folder with the base's own
# configuration, and answers a table of Z-Bench's form that asks for them in other words. Some minutes on a laptop's CPU:
#   bash configs/llm4academic/small.sh [OUT]
# SEED (0) is of the trainings. More words for the commands can be given in TRAIN and EVALUATE.
set -euo pipefail
out=${1:-out/llm4academic}
seed=${SEED:-0}
read -r -a train <<<"${TRAIN:-}"
read -r -a evaluate <<<"${EVALUATE:-}"

# Columns of answers and of ratings are added to the table, those of one model behind those of the other.
mkdir -p "$out"
cp configs/llm4academic/zbench.csv "$out/zbench.csv"
answer() {
    python -m jaxlm.evaluate --task zbench --model "$out/$1" --data "$out/zbench.csv" --options.name "$2" --options.max_new_tokens 32 \
        --batch_size 22 --output "$out/$2-evaluation" --overwrite "${evaluate[@]}"
    python configs/llm4academic/table.py --rate "$out/$2-evaluation/zbench/zbench.csv" "$2" "$out/zbench.csv"
}
train() {
    python -m jaxlm.train --config configs/llm4academic/mix.yaml --config "configs/llm4academic/$1.yaml" --config configs/llm4academic/small.yaml \
        --model.shape "configs/llm4academic/small/$1.json" --train.seed "$seed" "${@:2}" "${train[@]}"
}

# The model before it has learned anything: behind one step.
train llama-7b --output_dir "$out/before" --train.steps 1
answer before before

for shape in configs/llm4academic/small/*.json; do
    base=$(basename "$shape" .json)
    # A family that jaxlm does not have is left out, by name.
    python configs/llm4academic/table.py --left-out "$shape" && continue
    train "$base" --output_dir "$out/$base"
    answer "$base" "$base"
done
python configs/llm4academic/table.py "$out"

python configs/result.py "$out/result.json" --run "$out/llama-7b" --metric "right answers, llama-7b" --chance "$out/figures.json:guessing" \
    --before "$out/figures.json:bases.before.share" --after "$out/figures.json:bases.llama-7b.share"
