#!/usr/bin/env bash
# From a bare checkout to a pruned model, on two CPU cores in about five minutes after the installation: install,
# search SmolLM2-135M for the six blocks it misses least, compare dense and pruned on text the search never saw.
# Calibration is a few short windows, so the order is a demonstration. A second run finds the search done.
#
#     bash scripts/quickstart.sh
#     bash scripts/quickstart.sh --overwrite    # flags for block_search.py: search again
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
python=.venv/bin/python

model=SmolLM2-135M-Instruct.Q4_1.gguf # linked here by setup.sh
blocks=6 documents=4 seqlen=256
dtype=fp32 # bf16 is several times slower on CPUs without bf16 arithmetic
results=results/quickstart
name=$(basename "$model" .gguf)_mix_pydoc_ns_$documents

"$python" block_search.py --model-path "$model" --del-block-num "$blocks" --block-type mix \
    --cal-dataset pydoc --cal-nsamples "$documents" --ppl-eval-seqlen "$seqlen" \
    --compute-dtype "$dtype" --ppl-search-path "$results" "$@"
echo
"$python" eval.py --model-path "$model" --del-block-num "$blocks" \
    --ppl-search-file "$results/${name}_del_order_list.json" \
    --cal-dataset pydoc --cal-nsamples 15 --ppl-eval-seqlen "$seqlen" --compute-dtype "$dtype" \
    --output-path "$results/${name}_del_$blocks.json"
"$python" -m scripts.report "$results/${name}_del_order_list.json" "$results/${name}_del_$blocks.json" \
    --output-dir "$results/report"
echo
echo "model   $model"
echo "order   $results/${name}_del_order_list.json"
echo "result  $results/${name}_del_$blocks.json"
echo "page    $results/report/index.html"
