#!/usr/bin/env bash
# Test the runtimes that networks are deployed to, where they are installed.
#
#   bash tools/test_runtimes.sh                 OpenVINO, NNCF and ncnn
#   RUNTIMES="executorch" bash tools/test_runtimes.sh     others
#
# They (requirements/NAME.txt) go into .venv-runtimes, which looks into .venv
# for all else, so that .venv stays as its constraints say. What cannot be
# downloaded is said, and is no failure.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
. "$ROOT/tools/setup_env.sh"
cd "$ROOT"
venv=$ROOT/.venv-runtimes
stamp=$venv/.mmseg_textkd-stamp
files=
for name in ${RUNTIMES:-openvino ncnn}; do
    files="$files -r requirements/$name.txt"
done

site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# shellcheck disable=SC2086
want="$site $(cat ${files// -r/} | sha256sum)"
if [ "$(cat "$stamp" 2> /dev/null)" != "$want" ]; then
    echo "test_runtimes: installing ${RUNTIMES:-openvino ncnn} into $venv"
    rm -rf "$venv"
    python -m venv "$venv"
    # Behind its own packages come those of .venv.
    "$venv/bin/python" - "$site" << 'END'
import sys
import sysconfig
with open(sysconfig.get_path('purelib') + '/stack.pth', 'w') as file:
    file.write(sys.argv[1] + '\n')
END
    # shellcheck disable=SC2086
    timeout 900 "$venv/bin/python" -m pip --disable-pip-version-check \
        install -c requirements/constraints-upstream.txt $files \
        > "$venv/setup.log" 2>&1 || {
        echo "test_runtimes: skipped, cannot be installed: $venv/setup.log"
        exit 0
    }
    echo "$want" > "$stamp"
fi
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest tests/test_deploy -m runtimes
