#!/usr/bin/env bash
# The paper's main table, and the methods it leaves out beside it: every method on the same 256 Alpaca documents, then
# WikiText-2 perplexity, perplexity on other Alpaca documents, and the five tasks. For a machine with a GPU.
#
#     bash scripts/paper_table.sh                           # all six models
#     bash scripts/paper_table.sh llama2_7b qwen1.5_7b      # some of them
#     MODELS=/models FLAGS="--data-dir data --task-data data" bash scripts/paper_table.sh llama2_13b
#
# MODELS is a folder of local copies (MODELS/Llama-2-7b-hf ...), else the hub is asked. FLAGS go to scripts.compare, the
# last of equal flags counts: FLAGS="--methods blockpruner laco" makes a smaller table. PYTHON names another Python than
# .venv's. Everything is written to results/table/ of this repository; what was cut short goes on when run again.
#
# The ratios are those at which layer methods remove the published number of layers and BlockPruner the published share
# of parameters, as far as its order ends on an attention block. The published numbers are the rows laco, rm, bi
# (ShortGPT) and blockpruner; where two ratios are needed, the first is the layer methods' and the second BlockPruner's.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) # paths on the command line stay the caller's: no cd

methods="blockpruner mha mlp sleb ppl-oneshot ppl-plus bi bi-block rm taylor taylor-plus magnitude angular window_ppl
    window_cos laco last random"

table() {
    local row=$1 hub=$2 ratios=$3 model=${MODELS:+$MODELS/${2##*/}}
    shift 3
    # shellcheck disable=SC2086 # lists of words
    PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$python" -m scripts.compare --model-path "${model:-$hub}" \
        --methods $methods --ratios $ratios --seeds 0 1 2 --compute-dtype bf16 \
        --cal-dataset alpaca --cal-nsamples 256 --ppl-eval-seqlen 2048 --ppl-eval-batch-size 8 \
        --eval-datasets wikitext2 alpaca --tasks piqa winogrande hellaswag arc_easy arc_challenge \
        --output-dir "$root/results/table/$row" "$@" "${flags[@]}"
}

row() {
    case $1 in
        llama2_7b) table "$1" meta-llama/Llama-2-7b-hf "0.21" ;;                # 7 of 32 layers 21.02 %, blocks 21.99 %
        llama2_13b) table "$1" meta-llama/Llama-2-13b-hf "0.2435" ;;            # 10 of 40 layers 24.37 %, 25.12 %
        qwen1.5_7b) table "$1" Qwen/Qwen1.5-7B "0.2096" ;;                      # 8 of 32 layers 20.97 %, 21.83 %
        qwen1.5_14b) table "$1" Qwen/Qwen1.5-14B "0.2225 0.237" ;;              # 10 of 40 layers 22.25 %, 23.72 %
        # 8 of 32 layers 21.57 %, 22.45 %; 10 of 40 layers 22.68 %, 24.19 %.
        # Baichuan2 brings its own Python code; read it before running this.
        baichuan2_7b) table "$1" baichuan-inc/Baichuan2-7B-Base "0.2156" --trust-remote-code ;;
        baichuan2_13b) table "$1" baichuan-inc/Baichuan2-13B-Base "0.2268 0.2418" --trust-remote-code ;;
    esac
}

rows=(llama2_7b llama2_13b baichuan2_7b baichuan2_13b qwen1.5_7b qwen1.5_14b)
for name in "$@"; do
    if [[ " ${rows[*]} " != *" $name "* ]]; then
        echo "paper_table.sh: error: $name: no such row; use some of ${rows[*]}" >&2
        exit 2
    fi
done
read -ra flags <<<"${FLAGS:-}"
python=${PYTHON:-$root/.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
failed=()
for name in "${@:-${rows[@]}}"; do
    echo "== $name"
    row "$name" || { code=$? && failed+=("$name"); } # a model that is gated or refused stops no other
done
if ((${#failed[@]})); then
    echo "paper_table.sh: error: ${failed[*]} failed, for the reason above; run again to go on" >&2
    exit "$code"
fi
