#!/usr/bin/env bash
# One slice of a study on a machine that is lent for minutes and has no
# network: install what is missing, unpack the data, go on with the study, and
# leave ledger and logs in a folder to take home, whatever happens.
#
#   bash tools/study_slice.sh STUDY OUT SECONDS JOBS [option of study.py ...]
#
# OUT/STUDY.jsonl is the ledger: put that of the last slice there to go on with
# it. Work directories are below WORK (default /tmp/study_slice): runs that are
# cut go on if the next slice finds them there, else they begin anew.
# WHEELS=DIR  wheels to install into a folder of their own, if it is there
# DATA=TAR    archive to unpack into WORK/data, where --vars finds its folders
set -euo pipefail
if [ $# -lt 4 ]; then
    sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
ROOT=$(CDPATH= cd -P "$(dirname "$0")/.." && pwd)
STUDY=$1 OUT=$2 SECONDS_LEFT=$3 JOBS=$4
shift 4
NAME=$(basename "$STUDY" .yaml)
WORK=${WORK:-/tmp/study_slice}
START=$SECONDS
mkdir -p "$OUT" "$WORK"
OUT=$(cd "$OUT" && pwd) WORK=$(cd "$WORK" && pwd)

if [ -n "${WHEELS:-}" ] && [ ! -d "$WORK/site" ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile \
        --target "$WORK/site.new" "$WHEELS"/*.whl
    mv "$WORK/site.new" "$WORK/site"
fi
if [ -n "${DATA:-}" ] && [ ! -d "$WORK/data" ]; then
    mkdir -p "$WORK/data.new"
    tar -xf "$DATA" -C "$WORK/data.new"
    mv "$WORK/data.new" "$WORK/data"
fi
export PYTHONPATH=$ROOT:$WORK/site${PYTHONPATH:+:$PYTHONPATH}
# The processes of the runs are enough to fill the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1

status=0
python3 -W ignore "$ROOT/tools/study.py" "$STUDY" --work-dir "$WORK/$NAME" \
    --ledger "$OUT/$NAME.jsonl" --jobs "$JOBS" --drop-checkpoints \
    --budget $((SECONDS_LEFT - SECONDS + START)) "$@" || status=$?
# Logs alone: weights stay where they are.
mkdir -p "$WORK/$NAME"
(cd "$WORK" && find "$NAME" -name '*.json' -o -name '*.txt' \
    -o -name config.py | tar -czf "$OUT/$NAME-logs.tar.gz" -T -) || true
exit "$status"
