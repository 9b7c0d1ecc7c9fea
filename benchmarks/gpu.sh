#!/usr/bin/env bash
# Evidence from one GPU: `bash benchmarks/gpu.sh speed`, then `... train`, or `--tiny` for all of it in a small size on a CPU
# Results go to the folder $OUT (default benchmarks/gpu) as they are made, and are shown as tables at the end; images to $WORK
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export OUT=${OUT:-$PWD/benchmarks/gpu} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore MPLBACKEND=agg
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
mkdir -p "$OUT"
own=$(mktemp -d); trap 'rm -rf "$own"' EXIT
export WORK=${WORK:-$own/work}
what=${1:-all} tiny=
if [ "$what" = --tiny ]; then what=all tiny=--tiny LIMIT=900; fi

named() { # a checkout that is used from PYTHONPATH alone has no version to be asked for
    $python -c 'from importlib.metadata import version as v; v("cellmae")' 2> "$own/why" && return
    mkdir "$own/cellmae-0.dist-info"
    printf 'Metadata-Version: 2.1\nName: cellmae\nVersion: %s\n' "$(sed -n 's/^__version__ = "\(.*\)"/\1/p' cellmae/__init__.py)" > "$own/cellmae-0.dist-info/METADATA"
    export PYTHONPATH=$own:$PYTHONPATH
}
speed() { TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-3} $python benchmarks/gpu.py speed --limit "${LIMIT:-185}" $tiny; }
train() { TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-1} $python benchmarks/gpu_train.py all --limit "${LIMIT:-380}" $tiny; }

named
case $what in
    speed|train) $what;;
    all) speed; train;;
    *) echo "bash benchmarks/gpu.sh [speed|train|--tiny], not $what"; exit 2;;
esac
