#!/usr/bin/env bash
# The lowest versions that settings.ini allows must do: import the library, train a tiny model and run the tests named
# here, in an environment of their own. What is said there is thereby tried; who needs something newer raises it there.
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} MPLBACKEND=agg
tests=${*:-tests/test_models.py tests/test_corrections.py tests/test_store.py tests/test_planes.py tests/test_sites.py}
first=$(.ci/venv)
lowest=$(dirname "$first")/lowest-$(basename "$first")
uv=$first/bin/uv
[ -x "$uv" ] || "$first/bin/pip" install -q uv

[ -x "$lowest/bin/python" ] || "$uv" venv -q --python 3.11 "$lowest"
sed -n 's/^requirements = //p' settings.ini | tr ' ' '\n' > "$lowest/requirements.txt"
"$uv" pip install -q --python "$lowest/bin/python" --resolution lowest-direct -r "$lowest/requirements.txt" 'pytest>=8'
cd "$(mktemp -d)"; trap 'rm -rf "$PWD"' EXIT
export PYTHONPATH=$here
"$lowest/bin/python" -W ignore "$here/tools/smoke.py" --train
cd "$here"; "$lowest/bin/python" -m pytest -q -p no:cacheprovider $tests
