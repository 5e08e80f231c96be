#!/usr/bin/env bash
# Test the page of demo/gradio_app.py in a headless browser.
#
#   bash tools/test_page.sh             install what is missing, and test
#   bash tools/test_page.sh -k legend   with words for pytest
#   CHROMIUM=/path/to/chrome ...        a browser of your own
#
# gradio and Playwright (requirements/web.txt) go into .venv-web. The browser
# is the Chromium of the system. Without one, and with CI set, a root takes
# Debian's package; else Playwright downloads its own. What cannot be
# downloaded is said, and is no failure.
set -euo pipefail
ROOT=$(CDPATH= cd -P "$(dirname "$0")/.." && pwd)
. "$ROOT/tools/setup_env.sh"
cd "$ROOT"

skip() {
    echo "test_page: skipped, $*"
    exit 0
}

setup_overlay web -r requirements/web.txt ||
    skip "requirements/web.txt cannot be installed"

if [ -z "${CHROMIUM:-}" ] && ! command -v chromium chromium-browser \
    google-chrome > /dev/null; then
    echo "test_page: getting a Chromium (log: $overlay/browser.log)"
    if [ -n "${CI:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get; then
        export DEBIAN_FRONTEND=noninteractive
        timeout 120 apt-get update && timeout 300 apt-get install -y \
            --no-install-recommends chromium
    fi > "$overlay/browser.log" 2>&1 || true
    if ! command -v chromium > /dev/null; then
        timeout 300 "$overlay/bin/python" -m playwright install --only-shell \
            chromium >> "$overlay/browser.log" 2>&1 ||
            skip "no Chromium can be had, see $overlay/browser.log;" \
                "install one, or name it by CHROMIUM=..."
    fi
fi
"$overlay/bin/python" -m pytest tests/test_apis/test_page.py "$@"
