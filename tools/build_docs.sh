#!/usr/bin/env bash
# Build the documentation, in English and Chinese; a warning is an error.
#
#   bash tools/build_docs.sh               docs/*/_build/html
#   NOTEBOOKS=off bash tools/build_docs.sh without executing the notebook
#
# Sphinx (requirements/docs.txt) goes into .venv-docs.
set -euo pipefail
ROOT=$(CDPATH= cd -P "$(dirname "$0")/.." && pwd)
. "$ROOT/tools/setup_env.sh"
cd "$ROOT"
setup_overlay docs -r requirements/docs.txt
# The notebook runs with the same environment.
export PATH="$overlay/bin:$PATH" PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
for language in en zh_cn; do
    echo "build_docs: $language"
    python -m sphinx -W --keep-going -q "docs/$language" \
        "docs/$language/_build/html"
done
