#!/usr/bin/env bash
# Recovery on several GPUs, weights and optimizer states sharded over them (FSDP): scripts.recover by accelerate launch.
#
#     bash scripts/recover_multi.sh pruned models/Llama-2-7b-hf recovered --tokens 20M --cal-dataset alpaca+wikitext2
#     GPUS=4 bash scripts/recover_multi.sh ...
#     ACCELERATE="--config_file mine.yaml" bash scripts/recover_multi.sh ...    # nodes, DeepSpeed: accelerate's own file
#
# A step is --batch-size x --accumulate windows on every GPU. The same command goes on after a kill.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: bash scripts/recover_multi.sh EXPORT TEACHER OUTPUT_DIR [flags of scripts.recover]" >&2
    exit 2
fi
export=$(realpath "$1") output=$(realpath -m "$3") teacher=$2
if [ -e "$teacher" ]; then teacher=$(realpath "$teacher"); fi # else a hub id
cd "$(dirname "${BASH_SOURCE[0]}")/.."
default="--num_processes ${GPUS:-8} --num_machines 1 --mixed_precision bf16 --dynamo_backend no
    --use_fsdp --fsdp_sharding_strategy FULL_SHARD --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP
    --fsdp_state_dict_type FULL_STATE_DICT --fsdp_use_orig_params true"
# shellcheck disable=SC2086  # flags, to be split
exec .venv/bin/accelerate launch ${ACCELERATE:-$default} -m scripts.recover "$export" --teacher "$teacher" \
    --output-dir "$output" "${@:4}"
