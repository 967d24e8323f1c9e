#!/bin/sh
# Everything that is to be measured on a GPU, in order of worth: benchmarks/on_gpu.sh [--minutes 8]
cd "$(dirname "$0")/.." || exit 1
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" benchmarks/on_gpu.py "$@"
