#!/bin/sh
# Run a command with a faster product for few rows (short.cpp), on a Linux CPU with AVX-512:
#
#   sh bench/blas/with.sh .venv/bin/python -m bench.learning.experiment
#
# For runs that are about learning. Seconds that are compared are measured without it. Other
# trainers' environments (bench/peers/) get it too.
set -eu
PATH="$PATH:/usr/sbin:/sbin"
openblas=$(ldconfig -p | awk '/libopenblas\.so\.0 / {print $NF; exit}')
if [ -z "$openblas" ]; then
  echo "OpenBLAS is missing; type: make openblas" >&2
  exit 2
fi
here=$(dirname "$0")
mkdir -p "$here/../../.cache/blas"
built=$(cd "$here/../../.cache/blas" && pwd)/short.so
c++ -O3 -march=native -shared -fPIC -DOPENBLAS="\"$openblas\"" -o "$built.$$" "$here/short.cpp" -ldl
mv "$built.$$" "$built"
export LD_PRELOAD="$built" OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
exec "$@"
