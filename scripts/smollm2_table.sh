#!/usr/bin/env bash
# The paper's table for a model that a CPU can hold: nineteen methods on SmolLM2-135M, calibrated on 64 Alpaca documents,
# and a page with pictures. Perplexities on 20 windows of each text, tasks at 20 % on 400 rows each, labelled as such.
#
#     BLOCKPRUNER_DATA=data bash scripts/smollm2_table.sh
#     bash scripts/smollm2_table.sh --methods bi last random --tasks    # a smaller one: flags of scripts.compare
#     bash scripts/smollm2_table.sh --methods blockpruner cost-greedy refined evopress --cal-seeds 42 43 44 \
#         --tasks --output-dir results/smollm2_draws    # how much of it is the draw of the calibration text
#
# BLOCKPRUNER_DATA is a folder with wikitext2, alpaca and the five tasks as .jsonl; without it the hub is asked. The last
# of equal flags counts. Everything goes to results/smollm2; what was cut short goes on when run again.
set -euo pipefail
data=${BLOCKPRUNER_DATA:+$(realpath "$BLOCKPRUNER_DATA")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python -m scripts.compare --model-path SmolLM2-135M-Instruct.Q4_1.gguf --compute-dtype fp32 \
    --methods blockpruner cost-greedy refined compensated evopress \
    mha mlp sleb ppl-oneshot bi rm taylor magnitude angular window_ppl window_cos laco last random \
    --ratios 0.1 0.2 0.25 --seeds 0 1 2 --cal-nsamples 64 --ppl-eval-seqlen 512 --search race \
    --limit 400 wikitext2=20 alpaca=20 --task-ratios 0.2 --batch-size 8 \
    ${data:+--data-dir "$data" --task-data "$data"} --output-dir results/smollm2 "$@"
