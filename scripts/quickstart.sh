#!/usr/bin/env bash
# From a bare checkout to a pruned model worth loading, on two CPU cores: install, search SmolLM2-135M for the layers it
# misses least, cut a fifth of it, train what is left a few minutes towards the dense model, and show dense, pruned and
# recovered side by side.
# Calibration is a few short windows, so the order is a demonstration. A second run goes on where the first one stopped.
#
#     bash scripts/quickstart.sh
#     bash scripts/quickstart.sh --overwrite    # flags for block_search.py: search again
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
python=.venv/bin/python

model=SmolLM2-135M-Instruct.Q4_1.gguf # linked here by setup.sh
ratio=0.2 documents=4 seqlen=256 tokens=40k
results=results/quickstart
order=$results/$(basename "$model" .gguf)_layer_pydoc_ns_${documents}_del_order_list.json
# bf16 is twice as fast as fp32 on CPUs that have instructions for it, and several times slower on others
dtype=$("$python" -c 'from lib.model import dtype_note; print("fp32" if dtype_note("cpu", "bf16") else "bf16")')
dtype=${dtype:-fp32}

"$python" block_search.py --model-path "$model" --target-ratio "$ratio" --block-type layer \
    --cal-dataset pydoc --cal-nsamples "$documents" --ppl-eval-seqlen "$seqlen" \
    --compute-dtype "$dtype" --ppl-search-path "$results" "$@"
echo
if [[ ! -e $results/pruned/config.json || $order -nt $results/pruned/config.json ]]; then
    rm -rf "$results/recovered" "$results/recovered.training"
    "$python" -m scripts.export --model-path "$model" --ppl-search-file "$order" --target-ratio "$ratio" \
        --compute-dtype fp32 --format stock --output-dir "$results/pruned" --overwrite
    echo
fi
if [[ ! -e $results/recovered/config.json ]]; then
    "$python" -m scripts.recover "$results/pruned" --teacher "$model" --tokens "$tokens" --lr 5e-4 --seqlen "$seqlen" \
        --cal-dataset pydoc --held-out 16 --checkpoint-every 20 --compute-dtype "$dtype" --output-dir "$results/recovered"
    echo
fi
"$python" eval.py --model-path "$model" --target-ratio "$ratio" --ppl-search-file "$order" \
    --cal-dataset pydoc --ppl-eval-seqlen "$seqlen" --limit 16 --compute-dtype "$dtype" \
    --output-path "$results/pruned.json"
"$python" -m scripts.report "$order" "$results/pruned.json" --output-dir "$results/report"
echo
"$python" -m scripts.generate "$model" "$results/pruned" "$results/recovered" --compute-dtype "$dtype" \
    --prompt "A list in Python is a" --new-tokens 24
echo
echo "order      $order"
echo "pruned     $results/pruned"
echo "recovered  $results/recovered"
echo "page       $results/report/index.html"
