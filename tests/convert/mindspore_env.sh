#!/bin/sh
# Makes an environment with the real MindSpore (about 2.5 GB; it wants numpy<2, so it cannot share jaxlm's), for
# tests/convert/test_mindspore_peer.py and tests/data/test_mindrecord_peer.py:
#
#   sh tests/convert/mindspore_env.sh ~/mindspore-env
#   JAXLM_MINDSPORE_PYTHON=~/mindspore-env/bin/python python -m pytest tests/convert/test_mindspore_peer.py
#
# The base Python must be one that MindSpore 2.10 has wheels for: 3.9 to 3.12 (default: python3.11; another: PYTHON=…).
set -eu
target=${1:?"usage: $0 DIRECTORY"}
"${PYTHON:-python3.11}" -m venv "$target"
"$target/bin/pip" install --quiet "mindspore==2.10.*" "numpy<2"
"$target/bin/python" -c "import mindspore; print('mindspore', mindspore.__version__)"
