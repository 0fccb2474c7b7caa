#!/usr/bin/env bash
# All weights of AquilaChat2-34B: DATA_FILE=train.jsonl bash finetune/34B/finetune.sh
# One GPU: NPROC=1. Several machines: HOSTFILE=hosts. All variables are in finetune/launch.sh.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -n ${HOSTFILE:-} || ! -f $here/hostfile ]] || HOSTFILE=$here/hostfile
export HOSTFILE=${HOSTFILE:-} RECIPE=${RECIPE:-34b-full} SHARDING=${SHARDING-zero3}
exec bash "$here/../launch.sh" "$@"
