#!/usr/bin/env bash
# Usage: [NNODES= NODE_RANK= MASTER_ADDR= PORT=] \
#        bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of test.py]
# Without a GPU the processes work on the CPUs, over gloo.
set -e

CONFIG=$1
CHECKPOINT=$2
GPUS=$3
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
PORT=${PORT:-29500}
MASTER_ADDR=${MASTER_ADDR:-"127.0.0.1"}

# `python -m torch.distributed.run` is torchrun, of this very Python.
PYTHONPATH="$(dirname "$0")/..":$PYTHONPATH \
python -m torch.distributed.run \
    --nnodes="$NNODES" \
    --node_rank="$NODE_RANK" \
    --master_addr="$MASTER_ADDR" \
    --nproc_per_node="$GPUS" \
    --master_port="$PORT" \
    "$(dirname "$0")/test.py" \
    "$CONFIG" \
    "$CHECKPOINT" \
    --launcher pytorch "${@:4}"
