#!/usr/bin/env bash
# For a scheduler: the whole suite and the slow tests with the newest release
# of everything. What breaks here will break for users soon; the versions are
# printed so that the constraints can follow when nothing does.
set -euo pipefail
ROOT=$(CDPATH= cd -P "$(dirname "$0")/.." && pwd)
export STACK=newest
# Made anew every time: an old environment would not float.
if [ -f "$ROOT/.venv-newest/.mmseg_textkd-made-here" ]; then
    rm -rf "$ROOT/.venv-newest"
fi
. "$ROOT/tools/setup_env.sh"
python -m pip freeze --exclude-editable
bash "$ROOT/tools/run_tests.sh" "$@"
cd "$ROOT"
OMP_NUM_THREADS=1 python -m pytest -n 2 -m slow
