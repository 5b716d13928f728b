#!/usr/bin/env bash
# Alpaca's way in small, some minutes on a laptop's CPU: a base model writes instructions after seed tasks (Self-Instruct), is
# tuned on them, and is published as a delta, from which it is recovered number by number.
#   SEED=0 bash configs/alpaca/small.sh [OUT]
# More words for the trainings can be given in TRAIN.
set -euo pipefail
out=${1:-out/alpaca}
seed=${SEED:-0}
read -r -a train <<<"${TRAIN:-}"

# A base model: it has read lists of tasks, and nothing of prompts and responses. (With LLaMA in its place, everything that follows
# is the same.)
python configs/alpaca/prepare.py "$out/data" "$seed"
python -m jaxlm.train --config configs/alpaca/small-base.yaml --output_dir "$out/base" --train.seed "$seed" \
    --tokenizer.train_on "$out/data/words.txt" --data.train "[{path: $out/data/base.jsonl, template: text}]" "${train[@]}"
ask() { # MODEL NAME: exact answers to the questions
    python -m jaxlm.evaluate --task qa --model "$1" --data "$out/data/questions.json" --output "$out/$2" --batch_size 32 \
        --template alpaca_legacy --options.chat true --options.max_new_tokens 12
}
ask "$out/base" before

# It is served, and writes instructions after the seed tasks. The threshold is 0.85 in place of Alpaca's 0.7: fourteen animals and twelve
# ways to ask have few words, and most questions share two thirds of theirs with another.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
python -m jaxlm.serve --model "$out/base" --port "$port" --rows 8 >"$out/serve.log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
until curl -sf "http://127.0.0.1:$port/health" >/dev/null; do
    kill -0 $server || { cat "$out/serve.log"; exit 1; }
    sleep 0.5
done
python -m jaxlm.prepare instructions --url "http://127.0.0.1:$port/v1" --seed_tasks "$out/data/seeds.json" \
    --prompt "$out/data/prompt.txt" --output_dir "$out/written" --count 120 --tasks 6 --max_tokens 130 --max_similarity 0.85 \
    --fields.add_special_tokens true --temperature 0.8 --patience 30 --seed "$seed" || test $? = 1 # fewer will do
kill $server
wait $server || true
trap - EXIT

# Fine-tuning, without what is asked for below.
python configs/alpaca/prepare.py --without "$out/data/questions.json" "$out/written/instructions.json" "$out/data/train.json"
python -m jaxlm.train --config configs/alpaca/small.yaml --model.path "$out/base" --output_dir "$out/tuned" --train.seed "$seed" \
    --data.train "[{path: $out/data/train.json, template: alpaca_legacy}]" \
    --data.validation "[{path: $out/data/validation.json, template: alpaca_legacy}]" "${train[@]}"
ask "$out/tuned" after

# The delta, and the tuned model from it and the base. Both models are published in float16: the difference of two such numbers is exact in the
# delta's float32 (as long as it is below 1), and so is the sum. (Alpaca's own delta is of float32 models, whose sum is exact to a rounding.)
for model in base tuned; do
    python -m convert jax-to-hf "$out/$model" "$out/hf-$model" --dtype float16
done
python -m convert make-delta "$out/hf-base" "$out/hf-tuned" "$out/delta" --dtype float32
python -m convert apply-delta "$out/hf-base" "$out/delta" "$out/recovered" --dtype float32
python configs/alpaca/prepare.py --same "$out/hf-tuned" "$out/recovered"

python configs/result.py "$out/result.json" --run "$out/tuned" --metric "exact answers to held-out instructions" \
    --chance "$out/data/chance.json:exact" --before "$out/before/qa/scores.json:figures.exact.value" \
    --after "$out/after/qa/scores.json:figures.exact.value"
