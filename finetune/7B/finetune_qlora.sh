#!/usr/bin/env bash
# LoRA adapters beside weights in four bits of AquilaChat2-7B: DATA_FILE=train.jsonl bash finetune/7B/finetune_qlora.sh
# One GPU: NPROC=1. Several machines: HOSTFILE=hosts. All variables are in finetune/launch.sh.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -n ${HOSTFILE:-} || ! -f $here/hostfile ]] || HOSTFILE=$here/hostfile
export HOSTFILE=${HOSTFILE:-} RECIPE=${RECIPE:-7b-qlora} SHARDING=${SHARDING-zero2}
exec bash "$here/../launch.sh" "$@"
