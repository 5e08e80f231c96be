#!/usr/bin/env bash
# Set up the environment, then show the whole of it on generated images:
# stock BiSeNetV2 against its text twin, two stages, in about 14 minutes on
# two cores and without any download but packages.
#
#   bash tools/quickstart.sh              about 14 minutes after set-up
#   bash tools/quickstart.sh --iters 20   a first look (any quickstart.py flag)
set -euo pipefail
ROOT=$(CDPATH= cd -P "$(dirname "$0")/.." && pwd)
. "$ROOT/tools/setup_env.sh"
cd "$ROOT"
python -W ignore tools/quickstart.py "$@"
