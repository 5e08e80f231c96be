#!/usr/bin/env bash
# Check style, imports, format, spelling, docstrings and types; changes
# nothing.
set -u
cd "$(dirname "$0")/.."

FILES=(mmseg_textkd configs tools tests demo setup.py)
STEPS=() PIDS=() FAULTS=()
OUTPUT=$(mktemp -d)
trap 'rm -r "$OUTPUT"' EXIT
# All steps go on at once; each says what it found in one piece.
step() {
    python -m "$@" >"$OUTPUT/$1" 2>&1 &
    STEPS+=("$1")
    PIDS+=($!)
}
# What .mim links to is checked as what it is.
step flake8 --exclude .mim "${FILES[@]}"
step isort --check-only --diff --skip .mim "${FILES[@]}"
step yapf --parallel --diff --recursive --exclude '*/.mim/*' "${FILES[@]}"
step codespell_lib --skip .mim mmseg_textkd configs tools tests README.md
step interrogate --quiet --config setup.cfg mmseg_textkd
step mypy --config-file setup.cfg
for i in "${!STEPS[@]}"; do
    wait "${PIDS[i]}" || FAULTS+=("${STEPS[i]}")
    echo "lint: ${STEPS[i]}"
    cat "$OUTPUT/${STEPS[i]}"
done
if [ ${#FAULTS[@]} -gt 0 ]; then
    echo "lint: faults found by ${FAULTS[*]}" >&2
    exit 1
fi
