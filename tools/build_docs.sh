#!/usr/bin/env bash
# Build the documentation, in English and Chinese; a warning is an error.
#
#   bash tools/build_docs.sh               docs/*/_build/html
#   NOTEBOOKS=off bash tools/build_docs.sh without executing the notebook
#
# Sphinx (requirements/docs.txt) goes into .venv-docs, which looks into .venv
# for all else, so that .venv stays as its constraints say.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
. "$ROOT/tools/setup_env.sh"
cd "$ROOT"
docs=$ROOT/.venv-docs
stamp=$docs/.mmseg_textkd-stamp

site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
want="$site $(sha256sum < requirements/docs.txt)"
if [ "$(cat "$stamp" 2> /dev/null)" != "$want" ]; then
    echo "build_docs: installing Sphinx into $docs"
    rm -rf "$docs"
    python -m venv "$docs"
    # Behind its own packages come those of .venv.
    "$docs/bin/python" - "$site" << 'END'
import sys
import sysconfig
with open(sysconfig.get_path('purelib') + '/stack.pth', 'w') as file:
    file.write(sys.argv[1] + '\n')
END
    "$docs/bin/python" -m pip --disable-pip-version-check install \
        -r requirements/docs.txt > "$docs/setup.log" 2>&1 || {
        echo "build_docs: pip failed, see $docs/setup.log" >&2
        exit 1
    }
    echo "$want" > "$stamp"
fi
# The notebook runs with the same environment.
export PATH="$docs/bin:$PATH" PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
for language in en zh_cn; do
    echo "build_docs: $language"
    python -m sphinx -W --keep-going -q "docs/$language" \
        "docs/$language/_build/html"
done
