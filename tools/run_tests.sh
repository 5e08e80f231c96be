#!/usr/bin/env bash
# Set up the environment, then test and lint.
#
#   bash tools/run_tests.sh                          lint and the whole suite
#   bash tools/run_tests.sh tests/test_text -k tower some of it
#   STACK=onedl bash tools/run_tests.sh -m stacks    on the OneDL forks
set -euo pipefail
ROOT=$(CDPATH= cd -P "$(dirname "$0")/.." && pwd)
. "$ROOT/tools/setup_env.sh"
cd "$ROOT"

# Beside the tests; what it finds comes after them, and counts as failure.
lint=$(mktemp)
trap 'rm "$lint"' EXIT
bash tools/lint.sh > "$lint" 2>&1 &
echo "run_tests: pytest $*"
# Threads of tiny models wait for each other more than they compute, the more
# so on a busy machine.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# A worker for each core; what shares a fixture of its file stays together, in
# the order of tests/conftest.py.
# pytest ends with 5 where nothing was selected: that is a failure too.
PYTHONPATH=$ROOT/tests${PYTHONPATH:+:$PYTHONPATH} python -m pytest \
    -p worker_conftests -n "${WORKERS:-2}" --dist loadscope \
    --no-loadscope-reorder "$@" || status=$?
wait $! || status=${status:-$?}
cat "$lint"
exit "${status:-0}"
