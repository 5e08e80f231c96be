#!/usr/bin/env bash
# Test the runtimes that networks are deployed to, where they are installed.
#
#   bash tools/test_runtimes.sh                 OpenVINO, NNCF and ncnn
#   RUNTIMES="executorch" bash tools/test_runtimes.sh     others
#
# They (requirements/NAME.txt) go into .venv-runtimes. What cannot be
# downloaded is said, and is no failure.
set -euo pipefail
ROOT=$(CDPATH= cd -P "$(dirname "$0")/.." && pwd)
. "$ROOT/tools/setup_env.sh"
cd "$ROOT"
words=(-c requirements/constraints-upstream.txt)
for name in ${RUNTIMES:-openvino ncnn}; do
    words+=(-r "requirements/$name.txt")
done
setup_overlay runtimes "${words[@]}" || {
    echo "test_runtimes: skipped, ${RUNTIMES:-openvino ncnn} cannot be installed"
    exit 0
}
OMP_NUM_THREADS=1 "$overlay/bin/python" -m pytest tests/test_deploy \
    -m runtimes
