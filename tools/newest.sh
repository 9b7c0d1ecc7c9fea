#!/usr/bin/env bash
# The library must not depend on the pins of development: import all of it and train a tiny model with the newest
# fastai and fastcore, in a small second environment that sees the packages of the first one (no second torch).
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD
export OMP_NUM_THREADS=2 MPLBACKEND=agg PIP_DISABLE_PIP_VERSION_CHECK=1
first=$(.ci/venv)
second=$(dirname "$first")/newest-$(basename "$first")
packages() { "$1/bin/python" -c 'import site; print(site.getsitepackages()[0])'; }

[ -x "$second/bin/python" ] || "$first/bin/python" -m venv "$second"
packages "$first" > "$(packages "$second")/first.pth"
"$second/bin/pip" install -q --upgrade fastai fastcore   # what pip says of nbdev does not matter here
cd "$(mktemp -d)"; trap 'rm -rf "$PWD"' EXIT
export PYTHONPATH=$here
"$second/bin/python" -c 'import fastai, fastcore; print("fastai", fastai.__version__, "fastcore", fastcore.__version__)'
"$second/bin/python" "$here/tools/smoke.py" --train
