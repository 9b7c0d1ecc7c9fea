#!/usr/bin/env bash
# Evidence from one GPU: `bash benchmarks/gpu.sh speed`, or `--tiny` for all of it in a small size on a CPU
# Results go to the folder $OUT (default benchmarks/gpu) as they are made, and are shown as a table at the end
set -euo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-$PWD/benchmarks/gpu} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore MPLBACKEND=agg
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-3} OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
mkdir -p "$OUT"
what=${1:-all} tiny=
if [ "$what" = --tiny ]; then what=all tiny=--tiny; fi

speed() { python benchmarks/gpu.py speed --limit "${LIMIT:-185}" $tiny; }

case $what in
    speed|all) speed;;
    *) echo "bash benchmarks/gpu.sh [speed|--tiny], not $what"; exit 2;;
esac
