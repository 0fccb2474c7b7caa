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
#   RECIPE            another recipe than the script's, a name or a file
#
# What follows the script's name goes to `aquila2-tut finetune`: bash finetune/7B/finetune_lora.sh --dry-run
set -euo pipefail

die() {
    echo "finetune: $*" >&2
    exit 2
}
positive() { # NAME VALUE
    [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || die "$1 must be a whole number above 0, not '$2'"
}
quoted() { # a path or a name, as the recipe's YAML takes it whatever is in it
    printf "'%s'" "${1//\'/\'\'}"
}

PYTHON=${PYTHON:-python3}
HOSTFILE=${HOSTFILE:-}
hosts=() slots='' number=0
if [[ -n $HOSTFILE ]]; then
    [[ -f $HOSTFILE ]] || die "HOSTFILE: there is no file $HOSTFILE"
    while read -r host more || [[ -n $host ]]; do
        number=$((number + 1)) more=${more%%#*} host=${host%$'\r'}
        [[ -n $host && $host != \#* ]] || continue
        [[ $host =~ ^[A-Za-z0-9_][A-Za-z0-9_.:@-]*$ && $more =~ ^(slots=([1-9][0-9]{0,3}))?[[:space:]]*$ ]] ||
            die "$HOSTFILE, line $number: a host and its slots are needed, such as '10.0.0.1 slots=8'"
        hosts+=("$host")
        [[ ${slots:-${BASH_REMATCH[2]}} == "${BASH_REMATCH[2]}" ]] ||
            die "$HOSTFILE, line $number: every machine needs as many slots as the first, which has $slots"
        slots=${BASH_REMATCH[2]}
    done <"$HOSTFILE"
    ((${#hosts[@]})) || die "HOSTFILE: no host in $HOSTFILE"
fi
command -v "$PYTHON" >/dev/null || die "there is no '$PYTHON': name a Python in PYTHON, such as .venv/bin/python"
"$PYTHON" -c 'from importlib.util import find_spec; exit(not all(map(find_spec, ["torch", "aquila2_tut"])))' ||
    die "$PYTHON has no PyTorch or no aquila2_tut: pip install '.[train,quant]' for it, or PYTHON=.venv/bin/python"
MASTER_PORT=${MASTER_PORT:-20001} NPROC=${NPROC:-$slots}
[[ -n $NPROC ]] || NPROC=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
positive NPROC "$NPROC"
positive MASTER_PORT "$MASTER_PORT"
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
        # shellcheck disable=SC2029  # the folder is that of this machine
        ssh "${hosts[rank]}" "cd $(printf '%q' "$PWD") && $line" &
    done
    failed=0
    for _ in "${hosts[@]}"; do
        wait -n || failed=1
    done
    exit "$failed"
fi

command=(-m aquila2_tut.cli finetune --recipe "$RECIPE")
[[ -z ${DATA_FILE:-} ]] || command+=(--data="$DATA_FILE")
[[ -z ${MODEL_NAME_INPUT:-} ]] || command+=(--set "base=$(quoted "$MODEL_NAME_INPUT")")
[[ -z ${CKPT_INPUT:-} ]] || command+=(--set "model_dir=$(quoted "$CKPT_INPUT")")
[[ -z ${EPOCHS:-} ]] || command+=(--set "epochs=$EPOCHS")
[[ -z ${CONVO_TEMPLATE:-} ]] || command+=(--set "template=$(quoted "$CONVO_TEMPLATE")")
command+=(--out="${CKPT_OUTPUT:-output/checkpoints}/$(basename "$RECIPE" .yaml)-${EXPNAME:-aquila_experiment}")

if ((nodes * NPROC == 1)); then
    exec "$PYTHON" "${command[@]}" "$@"
fi
exec "$PYTHON" -m torch.distributed.run --nnodes="$nodes" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$NPROC" \
    --master_addr="${hosts[0]:-127.0.0.1}" --master_port="$MASTER_PORT" \
    "${command[@]}" --set "sharding=$SHARDING" "$@"
