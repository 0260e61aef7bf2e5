#!/usr/bin/env bash
# What the search engines cost and find, as the README tells it: exhaustive against cached and race on SmolLM2-135M,
# exact orders against the race's on six draws of documents, a toy of Llama-2-7B's shape, and on a GPU that shape itself.
# About six hours of one core; bf16 is slow on CPUs without bf16 arithmetic.
#
#     BLOCKPRUNER_DATA=data bash scripts/engine_figures.sh
#     bash scripts/engine_figures.sh --del-block-num 2 --cal-nsamples 2    # smaller ones: flags of scripts.bench_search
#
# BLOCKPRUNER_DATA is a folder with alpaca as .jsonl; without it the hub is asked. The last of equal flags counts. Each
# comparison is kept in results/engines when it is done; run again, the script shows those and makes the others.
set -euo pipefail
data=${BLOCKPRUNER_DATA:+$(realpath "$BLOCKPRUNER_DATA")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
mkdir -p results/engines
given=("$@")

bench() { # name, flags of scripts.bench_search
    local kept=results/engines/$1
    set -- -m scripts.bench_search --compute-dtype fp32 --ppl-eval-batch-size 1 "${@:2}" "${given[@]}"
    if [[ -e $kept.json && $(head -n 1 "$kept.log") == "python $*" ]]; then
        cat "$kept.log"
    else
        rm -f "$kept.json"
        { echo "python $*" && .venv/bin/python "$@" --output-path "$kept.json"; } | tee "$kept.log"
    fi
    echo
}

smollm2() {
    bench "$1" --model-path SmolLM2-135M-Instruct.Q4_1.gguf --cal-dataset alpaca ${data:+--data-dir "$data"} "${@:2}"
}

bench toy_of_llama2_7b --random-config llama2-7b --scale 16 --tokens 256 --ppl-eval-seqlen 256 --del-block-num 20 \
    --engines exhaustive cached
smollm2 8_documents --cal-nsamples 8 --ppl-eval-seqlen 512 --del-block-num 12 --engines exhaustive cached
smollm2 8_documents_bf16 --cal-nsamples 8 --ppl-eval-seqlen 512 --del-block-num 12 --engines exhaustive cached \
    --compute-dtype bf16 --exhaustive-steps 1
smollm2 32_documents --cal-nsamples 32 --ppl-eval-seqlen 512 --del-block-num 12 --engines exhaustive race \
    --exhaustive-steps 1
for seed in 0 1 2 3 4 5; do
    smollm2 seed_$seed --cal-nsamples 8 --ppl-eval-seqlen 256 --del-block-num 8 --seed $seed --engines cached race
done
if .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    gpu() { # one engine at a time, so that they do not share memory; the race decides after each batch: one window
        bench "gpu_$1" --random-config llama2-7b --device cuda --compute-dtype bf16 --tokens 32768 \
            --ppl-eval-seqlen 2048 --ppl-eval-batch-size "$2" --del-block-num 20 --exhaustive-steps 1 \
            --engines exhaustive "$1"
    }
    gpu cached 8
    gpu race 1
else
    echo "no GPU here: --random-config llama2-7b --device cuda is left out"
fi
