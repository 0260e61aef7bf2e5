#!/usr/bin/env bash
# One row of the paper's main table: search on 256 Alpaca documents, then WikiText-2 perplexity and five tasks.
#
#     bash scripts/paper.sh HUB_ID K [MODEL] [FLAGS]
#     bash scripts/llama2_7b.sh models/Llama-2-7b-hf --data-dir data      # HUB_ID and K of that row
#     EVAL_FLAGS="--task-data data" CUDA_VISIBLE_DEVICES=0,1 bash scripts/llama2_13b.sh --data-dir data
#
# MODEL, or the variable MODEL_PATH, is a local copy of HUB_ID. FLAGS go to both commands, the variables
# SEARCH_FLAGS and EVAL_FLAGS to one; the last of equal flags counts. PYTHON names another Python than .venv's.
# Everything is written to ppls/ and results/ of this repository; a search cut short continues when run again.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) # paths on the command line stay the caller's: no cd

if (($# < 2)) || ! [[ $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "paper.sh: error: which model, and how many blocks to remove? bash scripts/paper.sh HUB_ID K" >&2
    exit 2
fi
model=${MODEL_PATH:-$1} K=$2
shift 2
if (($#)) && [[ $1 != -* ]]; then
    model=$1
    shift
fi
read -ra search_flags <<<"${SEARCH_FLAGS:-}"
read -ra eval_flags <<<"${EVAL_FLAGS:-}"
python=${PYTHON:-$root/.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3

name=$(basename "$model" .gguf)_mix_alpaca_ns_256
"$python" "$root/block_search.py" --model-path "$model" --del-block-num "$K" --block-type mix \
    --cal-dataset alpaca --cal-nsamples 256 --ppl-eval-seqlen 2048 --ppl-eval-batch-size 8 --compute-dtype bf16 \
    --ppl-search-path "$root/ppls" "$@" "${search_flags[@]}"
"$python" "$root/eval.py" --do-eval --model-path "$model" --del-block-num "$K" \
    --ppl-search-file "$root/ppls/${name}_del_order_list.json" \
    --cal-dataset wikitext2 --ppl-eval-seqlen 2048 --ppl-eval-batch-size 2 --compute-dtype bf16 \
    --output-path "$root/results/${name}_del_$K.json" "$@" "${eval_flags[@]}"
