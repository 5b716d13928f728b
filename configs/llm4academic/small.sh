#!/usr/bin/env bash
# LLM4Academic's comparison in small: a fresh tiny model of each base's family learns the instructions of this folder with the base's own
# configuration, and is asked them in other words. Some minutes on a laptop's CPU:
#   bash configs/llm4academic/small.sh [OUT]
# More words for the commands can be given in TRAIN and GENERATE.
set -euo pipefail
out=${1:-out/llm4academic}
read -r -a train <<<"${TRAIN:-}"
read -r -a generate <<<"${GENERATE:-}"

for shape in configs/llm4academic/small/*.json; do
    base=$(basename "$shape" .json)
    # A family that jaxlm does not have yet is left out, by name.
    python configs/llm4academic/table.py --left-out "$shape" && continue
    python -m jaxlm.train --config configs/llm4academic/mix.yaml --config "configs/llm4academic/$base.yaml" --config configs/llm4academic/small.yaml \
        --model.shape "$shape" --output_dir "$out/$base" "${train[@]}"
    python -m jaxlm.generate --model "$out/$base" --predict_data configs/llm4academic/questions.json --save_file "$out/$base.json" \
        --overwrite --max_new_tokens 32 "${generate[@]}"
done
python configs/llm4academic/table.py "$out"
