#!/usr/bin/env bash
# Starts a recipe on one GPU, on all GPUs of a machine, or on those of a hostfile. The scripts in 7B and 34B call it.
#
#   DATA_FILE         conversations, .json or .jsonl
#   MODEL_NAME_INPUT  the base model, if it is not the recipe's; CKPT_INPUT the folder that holds it
#   CKPT_OUTPUT       where runs go (output/checkpoints); EXPNAME the name of this one
#   EPOCHS            how often all of the data is seen; CONVO_TEMPLATE the prompt format
#   HOSTFILE          a line a machine, "10.0.0.1 slots=8" (default: `hostfile` beside the script, if it is there)
#   NPROC             processes on each machine: 1 for a single GPU (default: the slots, else the GPUs of this one)
#   SHARDING          how several processes share the work: zero2, zero3, fsdp2, or nothing for copies
#   MASTER_PORT       (20001)
#   PYTHON            (python3)
#
# What follows the script's name goes to `aquila2-tut finetune`: bash finetune/7B/finetune_lora.sh --dry-run
set -euo pipefail

PYTHON=${PYTHON:-python3}
HOSTFILE=${HOSTFILE:-}
hosts=()
if [[ -n $HOSTFILE ]]; then
    while read -r host _; do
        [[ -z $host || $host == \#* ]] || hosts+=("$host")
    done <"$HOSTFILE"
    slots=$(sed -n 's/^[^#]*slots=\([0-9][0-9]*\).*/\1/p' "$HOSTFILE" | head -n 1)
fi
gpus=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
NPROC=${NPROC:-${slots:-$gpus}}
nodes=${#hosts[@]}
((nodes)) || nodes=1

# Several machines: this script again on each of them, with the same variables.
if ((nodes > 1)) && [[ -z ${NODE_RANK:-} ]]; then
    settings=(RECIPE="$RECIPE" HOSTFILE="$HOSTFILE" NPROC="$NPROC" PYTHON="$PYTHON" SHARDING="$SHARDING")
    for name in DATA_FILE MODEL_NAME_INPUT CKPT_INPUT CKPT_OUTPUT EXPNAME EPOCHS CONVO_TEMPLATE MASTER_PORT PYTHONPATH; do
        [[ -z ${!name:-} ]] || settings+=("$name=${!name}")
    done
    for rank in "${!hosts[@]}"; do
        line=$(printf '%q ' env "${settings[@]}" NODE_RANK="$rank" bash "$0" "$@")
        ssh "${hosts[rank]}" "cd $(printf '%q' "$PWD") && $line" &
    done
    failed=0
    for _ in "${hosts[@]}"; do
        wait -n || failed=1
    done
    exit "$failed"
fi

command=(-m aquila2_tut.cli finetune --recipe "$RECIPE")
[[ -z ${DATA_FILE:-} ]] || command+=(--data "$DATA_FILE")
[[ -z ${MODEL_NAME_INPUT:-} ]] || command+=(--set "base=$MODEL_NAME_INPUT")
[[ -z ${CKPT_INPUT:-} ]] || command+=(--set "model_dir=$CKPT_INPUT")
[[ -z ${EPOCHS:-} ]] || command+=(--set "epochs=$EPOCHS")
[[ -z ${CONVO_TEMPLATE:-} ]] || command+=(--set "template=$CONVO_TEMPLATE")
command+=(--out "${CKPT_OUTPUT:-output/checkpoints}/$(basename "$RECIPE" .yaml)-${EXPNAME:-aquila_experiment}")

if ((nodes * NPROC == 1)); then
    exec "$PYTHON" "${command[@]}" "$@"
fi
exec "$PYTHON" -m torch.distributed.run --nnodes="$nodes" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$NPROC" \
    --master_addr="${hosts[0]:-127.0.0.1}" --master_port="${MASTER_PORT:-20001}" \
    "${command[@]}" --set "sharding=$SHARDING" "$@"
