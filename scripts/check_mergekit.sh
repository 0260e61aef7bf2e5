#!/usr/bin/env bash
# Check that MergeKit and this project make the same model of the same layers: measure a model's angular distances, let
# mergekit-yaml run on our slices.yaml, and compare every tensor and the configuration with a checkpoint from which
# the layers were taken out. MergeKit gets an environment of its own in a temporary folder (10 to 20 minutes and
# several GB where pip's torch comes with CUDA; MERGEKIT=/path/to/mergekit-yaml uses one that is there).
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
    set -- "$model" "$n" --cal-dataset pydoc --cal-nsamples 8 --ppl-eval-seqlen 64
fi

if [[ -z ${MERGEKIT:-} ]]; then
    "$python" -m venv "$work/venv"
    "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "mergekit==$version"
    MERGEKIT=$work/venv/bin/mergekit-yaml
fi

"$python" -m scripts.angular --model-path "$model" --layers-to-skip "$n" --output-dir "$work/angular" \
    --compute-dtype fp32 "${@:3}"
cat "$work/angular/slices.yaml"
"$MERGEKIT" "$work/angular/slices.yaml" "$work/merged" --quiet

"$python" - "$model" "$work" "$n" <<'PY'
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

sys.path.insert(0, ".")
from lib.blocks import find_layers

model_path, work, n = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
rows = [line.split(",") for line in (work / "angular" / "distances.csv").read_text().splitlines()[1:]]
start = min((float(d), int(i)) for m, i, d in rows if int(m) == n)[1]
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
layers = find_layers(model)
parent = next(m for m in model.modules() if any(child is layers for child in m.children()))
name = next(name for name, child in parent.named_children() if child is layers)
setattr(parent, name, torch.nn.ModuleList([layer for i, layer in enumerate(layers) if not start <= i < start + n]))
model.config.num_hidden_layers = len(getattr(parent, name))
if types := getattr(model.config, "layer_types", None):
    model.config.layer_types = types[:start] + types[start + n :]
model.save_pretrained(work / "stock")


def tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}
    return found


ours, theirs = tensors(work / "stock"), tensors(work / "merged")
differ = sorted(ours.keys() ^ theirs.keys()) + [
    key for key in ours.keys() & theirs.keys() if not torch.equal(ours[key], theirs[key].to(ours[key].dtype))
]
configs = [json.loads((work / folder / "config.json").read_text()) for folder in ("stock", "merged")]
fields = [key for key in ("num_hidden_layers", "layer_types", "architectures", "vocab_size")
          if configs[0].get(key) != configs[1].get(key)]
reloaded = AutoModelForCausalLM.from_pretrained(work / "merged", dtype=torch.float32)
ids = torch.arange(16)[None] % model.config.vocab_size
with torch.inference_mode():
    same = torch.equal(reloaded(ids, use_cache=False).logits, model.eval()(ids, use_cache=False).logits)
print(f"left out      layers {start}..{start + n - 1}")
print(f"tensors       {len(ours)} ours, {len(theirs)} MergeKit's, {len(differ)} differ {' '.join(differ[:5])}")
print(f"configuration {'the same' if not fields else 'differs in ' + ', '.join(fields)}")
print(f"logits        {'bit-identical' if same else 'DIFFER'}")
sys.exit(bool(differ or fields or not same))
PY
