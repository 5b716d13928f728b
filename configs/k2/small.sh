#!/usr/bin/env bash
# K2's way in small, some minutes on a laptop's CPU: clean text, further pretraining, a delta and the model from it, LoRA on q, k and v in
# two stages, GeoBench, and a server.
#   SEED=0 bash configs/k2/small.sh [OUT]
# More words for the trainings can be given in TRAIN.
set -euo pipefail
out=${1:-out/k2}
seed=${SEED:-0}
read -r -a train <<<"${TRAIN:-}"

python configs/k2/prepare.py "$out/data" "$seed"

# Cleaning: what is too short, what repeats itself, what stands twice.
python -m jaxlm.prepare --config configs/prepare/k2-small.yaml --sources "[{path: $out/data/raw.jsonl}]" --output_dir "$out/clean"

# A base model that knows nothing of minerals. (With LLaMA in its place, everything that follows is the same.)
python -m jaxlm.train --config configs/k2/small-base.yaml --output_dir "$out/base" --train.seed "$seed" \
    --tokenizer.train_on "$out/data/words.txt" --data.train "[{path: $out/data/general.jsonl, template: text}]" "${train[@]}"

# Further pretraining.
python -m jaxlm.train --config configs/k2/small-pretrain.yaml --model.path "$out/base" --output_dir "$out/pretrained" --train.seed "$seed" \
    --data.train "[{path: '$out/clean/dedup/part-*.jsonl', template: text}]" "${train[@]}"

# The delta in K2's form (float16), and the model from it: what others have who may not be given the base.
for model in base pretrained; do
    python -m convert jax-to-hf "$out/$model" "$out/hf-$model" --dtype float16
done
python -m convert make-delta "$out/hf-base" "$out/hf-pretrained" "$out/delta" --family k2
python -m convert apply-delta --base "$out/hf-base" --target "$out/geo" --delta "$out/delta" --family k2

# Two stages of LoRA: general instructions, then GeoSignal's; the second goes on with the adapter of the first.
tune() { # NAME EPOCHS, more words
    python -m jaxlm.train --config configs/k2/small.yaml --model.path "$out/geo" --output_dir "$out/tuned/$1" --train.seed "$seed" \
        --train.epochs "$2" --data.train "[{path: $out/data/$1.json, template: alpaca_short}]" "${@:3}" "${train[@]}"
}
tune general 8
tune geosignal 6 --lora.init_from "$out/tuned/general" --data.validation 40

# GeoBench: the base, the model that has read geoscience and no instruction, and the tuned one.
for model in hf-base geo tuned/geosignal; do
    python -m jaxlm.evaluate --task geobench --model "$out/$model" --data "$out/data/geobench_npee.json" \
        --output "$out/bench-$(basename $model)" --batch_size 16
done

# The tuned model, served: one question by KnowLM's and K2's way of asking, then it stops.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
python -m jaxlm.serve --model "$out/tuned/geosignal" --port "$port" --rows 4 >"$out/serve.log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
until curl -sf "http://127.0.0.1:$port/health" >/dev/null; do
    kill -0 $server || { cat "$out/serve.log"; exit 1; }
    sleep 0.5
done
curl -sf "http://127.0.0.1:$port/generate" -H 'Content-Type: application/json' -d @"$out/data/ask.json" | tee "$out/served.json"
echo
kill $server
wait $server || true
trap - EXIT

figures() { echo "$out/bench-$1/geobench/scores.json:figures.choice_wa_plain_$2.value"; }
python configs/result.py "$out/result.json" --run "$out/tuned/geosignal" --metric "GeoBench's choices, right" \
    --chance "$out/bench-geosignal/geobench/scores.json:figures.choice_random.value" --before "$(figures hf-base accuracy)" --after "$(figures geosignal accuracy)"
