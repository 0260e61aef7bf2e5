#!/usr/bin/env bash
# Check that MergeKit makes of our slices.yaml the model that scripts.export makes of our order: block_search.py
# takes the nearest run of layers, scripts.export leaves it out, mergekit-yaml runs on the file of scripts.angular;
# every tensor, the configuration and the logits are compared. MergeKit gets an environment of its own in a temporary
# folder, on top of this project's (a few minutes; MERGEKIT=/path/to/mergekit-yaml uses one that is there).
#
#     bash scripts/check_mergekit.sh                                          # a small random Llama
#     bash scripts/check_mergekit.sh models/Mistral-7B-Instruct-v0.2 8 --cal-dataset alpaca --device cuda
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
version=0.1.5
model=${1:-}
n=${2:-2}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"

if [[ -z $model ]]; then
    model=$work/toy
    "$python" - "$model" <<'PY'
import sys
sys.path.insert(0, "tests")
from conftest import byte_tokenizer
from families import toy
model = toy("llama", vocab_size=256, num_hidden_layers=6)
for layer in model.model.layers[2:4]:  # the nearest window lies inside: two slices
    layer.self_attn.o_proj.weight.data /= 8
    layer.mlp.down_proj.weight.data /= 8
model.save_pretrained(sys.argv[1])
byte_tokenizer().save_pretrained(sys.argv[1])
PY
    set -- "$model" "$n" --cal-dataset pydoc --cal-nsamples 8 --ppl-eval-seqlen 64 --compute-dtype fp32
fi

if [[ -z ${MERGEKIT:-} ]]; then
    "$python" -m venv "$work/venv"
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$(echo "$work"/venv/lib/python*/site-packages)/project.pth"
    "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "mergekit==$version"
    MERGEKIT=$work/venv/bin/mergekit-yaml
fi

"$python" -m scripts.angular --model-path "$model" --layers-to-skip "$n" --output-dir "$work/angular" "${@:3}"
"$python" block_search.py --model-path "$model" --metric angular --block-type layer --del-block-num $((2 * n)) \
    --ppl-search-path "$work/order" "${@:3}"
"$python" -m scripts.export --model-path "$model" --ppl-search-file "$work"/order/*.json --del-block-num $((2 * n)) \
    --format stock --output-dir "$work/stock"
cat "$work/angular/slices.yaml"
"$MERGEKIT" "$work/angular/slices.yaml" "$work/merged" --quiet

"$python" - "$work" <<'PY'
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

work = Path(sys.argv[1])


def tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}
    return found


ours, theirs = tensors(work / "stock"), tensors(work / "merged")
differ = sorted(ours.keys() ^ theirs.keys()) + [
    key for key in ours.keys() & theirs.keys()
    if ours[key].dtype != theirs[key].dtype or not torch.equal(ours[key], theirs[key])
]
configs = [json.loads((work / folder / "config.json").read_text()) for folder in ("stock", "merged")]
fields = [key for key in ("num_hidden_layers", "layer_types", "architectures", "vocab_size")
          if configs[0].get(key) != configs[1].get(key)]
logits = []
for folder in ("stock", "merged"):
    model = AutoModelForCausalLM.from_pretrained(work / folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits.append(model(torch.arange(16)[None] % model.config.vocab_size, use_cache=False).logits)
same = torch.equal(*logits)
print(f"tensors       {len(ours)} ours, {len(theirs)} MergeKit's, {len(differ)} differ {' '.join(differ[:5])}")
print(f"configuration {'the same' if not fields else 'differs in ' + ', '.join(fields)}")
print(f"logits        {'bit-identical' if same else 'DIFFER'}")
sys.exit(bool(differ or fields or not same))
PY
