#!/bin/sh
# Makes an environment with the real Megatron-Core (and a PyTorch for CPUs, about 1 GB), for tests/data/test_megatron_peer.py:
#
#   sh tests/data/megatron_env.sh ~/megatron-env
#   JAXLM_MEGATRON_PYTHON=~/megatron-env/bin/python python -m pytest tests/data/test_megatron_peer.py
set -eu
target=${1:?"usage: $0 DIRECTORY"}
"${PYTHON:-python3.11}" -m venv "$target"
"$target/bin/pip" install --quiet torch numpy packaging
"$target/bin/pip" install --quiet --no-deps "megatron-core==0.16.*"
"$target/bin/python" -c "from megatron.core.datasets import indexed_dataset; print('megatron-core is there')"
