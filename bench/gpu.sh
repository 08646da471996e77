#!/usr/bin/env bash
# A first run on a GPU, a Mac's or CUDA: tests in the GPU's way, memory and tokens/s of Gemma-2B, its
# numbers against the CPU's. At most 8 minutes; needs the checkout and what is installed, no network.
# usage: bash bench/gpu.sh [FILE.json] [--shape gemma-2b] [--minutes 7.5]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
exec "$python" -m bench.gpu.run "$@"
