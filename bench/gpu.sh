#!/usr/bin/env bash
# A first run on a GPU, a Mac's or CUDA: tests in the GPU's way, memory and tokens/s of Gemma-2B, its
# numbers against the CPU's. At most 8 minutes; needs the checkout and what is installed, no network.
# usage: bash bench/gpu.sh [FILE.json]      (default: bench/results/gpu.json)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
exec "$python" -m bench.gpu.run "${1:-bench/results/gpu.json}"
