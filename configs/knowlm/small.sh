#!/usr/bin/env bash
# KnowLM's recipe in small, from documents to a served model, in some minutes on a laptop's CPU:
#   bash configs/knowlm/small.sh [OUT]
# SEED is that of both trainings (default: 0). More words for the commands can be given in TRAIN and EVALUATE.
set -euo pipefail
out=${1:-out/knowlm}
seed=${SEED:-0}
read -r -a train <<<"${TRAIN:-}"
read -r -a evaluate <<<"${EVALUATE:-}"
data=$out/data
mkdir -p "$out"

# Documents, a knowledge graph and plain texts, invented for this recipe.
python configs/knowlm/prepare.py "$data"

# Instructions for extraction: texts annotated by the graph, relations asked for in JSON, in English and in Chinese.
for language in en zh; do
    for part in train test; do
        python -m jaxlm.prepare ie align "$data/$part-$language.jsonl" "$data/$part-$language.records.jsonl" \
            --graph "$data/graph-$language.jsonl" --keep_empty --overwrite
        python -m jaxlm.prepare ie make "$data/$part-$language.records.jsonl" "$data/$part-$language.ie.jsonl" \
            --task RE --language $language --split $part --overwrite
    done
    python -m jaxlm.prepare ie make "$data/test-$language.records.jsonl" "$data/right-$language.ie.jsonl" \
        --task RE --language $language --overwrite
done
for part in test right; do
    cat "$data/$part-en.ie.jsonl" "$data/$part-zh.ie.jsonl" >"$data/$part.ie.jsonl"
done
instructions="{path: $data/train-en.ie.jsonl, template: oneke}, {path: $data/train-zh.ie.jsonl, template: oneke}"

# What stands for LLaMA: a fresh model that has read a little English.
python -m jaxlm.train --config configs/knowlm/base.yaml --output_dir "$out/base" --train.seed "$seed" \
    --tokenizer.train_on "$data"/{zh,en,code}.jsonl "$data"/train-{en,zh}.ie.jsonl \
    --data.train "[{path: $data/en.jsonl, template: text}]" "${train[@]}"

# Whole sentences up to the length of a row, as KnowLM packs them; a store of each kind.
for kind in "zh content chinese" "en text english" "code {input}{output} code"; do
    read -r name text language <<<"$kind"
    python -m jaxlm.prepare --config configs/prepare/knowlm.yaml --tokenizer "$out/base" --output_dir "$out/stores/$name" \
        --sources "[{path: $data/$name.jsonl, name: $name, text: '$text', language: $language}]" \
        --split.length 192 --build.knowlm false
done

# Further pretraining, with fixed shares of every batch.
python -m jaxlm.train --config configs/knowlm/small-pretrain.yaml --output_dir "$out/pretrain" --model.path "$out/base" \
    --train.seed "$seed" "${train[@]}" --data.mixing.per_batch "[2, 2, 4]" --data.mixing.epoch longest \
    --data.mixing.last_rows fill --data.train \
    "[{path: $out/stores/zh/build/store}, {path: $out/stores/en/build/store}, {path: $out/stores/code/build/store}]"

# LoRA with the instructions.
python -m jaxlm.train --config configs/knowlm/lora.yaml --config configs/knowlm/small.yaml --output_dir "$out/tuned" \
    --model.path "$out/pretrain" --train.seed "$seed" --data.train "[$instructions]" "${train[@]}"

# F1 over triples of texts whose pairs of names the training has not seen, before and after; by chance: the right
# answers to other texts.
figures=(python -m jaxlm.evaluate --task ie --data "$data/test.ie.jsonl" --options.extract RE --overwrite)
for stage in pretrain tuned; do
    "${figures[@]}" --model "$out/$stage" --template oneke --options.max_new_tokens 112 --batch_size 25 \
        --output "$out/evaluation/$stage" "${evaluate[@]}"
done
python configs/knowlm/prepare.py --others "$data/right.ie.jsonl" "$out/others.json"
"${figures[@]}" --predictions "$out/others.json" --output "$out/evaluation/others"
python -m jaxlm.prepare ie back "$out/evaluation/tuned/ie/predictions.jsonl" "$out/found.jsonl" --overwrite

# The page answers.
python configs/knowlm/ask.py "$out/tuned" "$data/test.ie.jsonl"

python configs/result.py "$out/result.json" --run "$out/tuned" --metric "F1 of triples" \
    --chance "$out/evaluation/others/ie/scores.json:figures.f1.value" \
    --before "$out/evaluation/pretrain/ie/scores.json:figures.f1.value" \
    --after "$out/evaluation/tuned/ie/scores.json:figures.f1.value"
