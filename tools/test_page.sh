#!/usr/bin/env bash
# Test the page of demo/gradio_app.py in a headless browser.
#
#   bash tools/test_page.sh             install what is missing, and test
#   bash tools/test_page.sh -k legend   with words for pytest
#   CHROMIUM=/path/to/chrome ...        a browser of your own
#
# gradio and Playwright (requirements/web.txt) go into .venv-web, which looks
# into .venv for all else, so that .venv stays as its constraints say. The
# browser is the Chromium of the system. Without one, and with CI set, a root
# takes Debian's package; else Playwright downloads its own. What cannot be
# downloaded is said, and is no failure.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
. "$ROOT/tools/setup_env.sh"
cd "$ROOT"
web=$ROOT/.venv-web
stamp=$web/.mmseg_textkd-stamp

skip() {
    echo "test_page: skipped, $*"
    exit 0
}

site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
want="$site $(sha256sum < requirements/web.txt)"
if [ "$(cat "$stamp" 2> /dev/null)" != "$want" ]; then
    echo "test_page: installing gradio and Playwright into $web"
    rm -rf "$web"
    python -m venv "$web"
    # Behind its own packages come those of .venv.
    "$web/bin/python" - "$site" << 'END'
import sys
import sysconfig
with open(sysconfig.get_path('purelib') + '/stack.pth', 'w') as file:
    file.write(sys.argv[1] + '\n')
END
    timeout 600 "$web/bin/python" -m pip --disable-pip-version-check install \
        -r requirements/web.txt > "$web/setup.log" 2>&1 ||
        skip "requirements/web.txt cannot be installed, see $web/setup.log"
    echo "$want" > "$stamp"
fi

if [ -z "${CHROMIUM:-}" ] && ! command -v chromium chromium-browser \
    google-chrome > /dev/null; then
    echo "test_page: getting a Chromium (log: $web/browser.log)"
    if [ -n "${CI:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get; then
        export DEBIAN_FRONTEND=noninteractive
        timeout 120 apt-get update && timeout 300 apt-get install -y \
            --no-install-recommends chromium
    fi > "$web/browser.log" 2>&1 || true
    if ! command -v chromium > /dev/null; then
        timeout 300 "$web/bin/python" -m playwright install --only-shell \
            chromium >> "$web/browser.log" 2>&1 ||
            skip "no Chromium can be had, see $web/browser.log; install one," \
                "or name it by CHROMIUM=..."
    fi
fi
"$web/bin/python" -m pytest tests/test_apis/test_page.py "$@"
