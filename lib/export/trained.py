"""An export with trained weights: the same folder, the same format, other numbers.

write_trained("pruned", model, "recovered", {"tokens": 2_000_000})
"""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

from lib.export.folder import WRITTEN, complete_or_nothing
from lib.files import write_json
from lib.model import DTYPES, quiet

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


def write_trained(source, model, folder, facts):
    """Write the export in the folder `source` to `folder` with the weights of `model`, in the dtype it is stored in.

    model: the export in memory, trained. facts: a dict, kept as `recovered` in the configuration's pruning_info and
    told by the model card. Complete or not there; raises ValueError where it cannot be written.
    """
    source = Path(source)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["pruning_info"]["recovered"] = facts
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    model = model.to({str(v).removeprefix("torch."): v for v in DTYPES.values()}[dtype])
    with complete_or_nothing(folder) as temporary:
        with quiet():
            model.save_pretrained(temporary)
        for file in source.iterdir():  # the export's own, also where transformers has just written one
            if any(fnmatch(file.name, p) for p in WRITTEN) and not any(fnmatch(file.name, p) for p in WEIGHTS):
                shutil.copyfile(file, temporary / file.name)
        write_json(temporary / "config.json", config)
        card = temporary / "README.md"
        text = card.read_text(encoding="utf-8") if card.exists() else ""
        card.write_text(f"{text.rstrip()}\n\n{_paragraph(facts)}\n", encoding="utf-8")


def _paragraph(facts):
    """Return the model card's section on the training."""
    lines = [
        "## Recovery",
        "",
        f"After the removal the weights ({facts['train']}) were trained on {facts['tokens']:,} tokens of "
        f"{' and '.join(facts['text'])} to follow the logits of {facts['teacher']}. Perplexity on held-out text:",
        "",
        "| | dense | pruned | recovered |",
        "|---|---|---|---|",
    ]
    for name, value in facts["perplexity"].items():
        lines.append(f"| {name} | {value['dense']:.2f} | {value['pruned']:.2f} | {value['recovered']:.2f} |")
    return "\n".join(lines)


def check_trainable(folder):
    """Return the pruning_info of an export in `folder` whose weights can be trained; raise ValueError for another."""
    path = Path(folder)
    if path.suffix == ".gguf" or (path / "model.gguf").is_file():
        raise ValueError(
            f"{folder}: a .gguf export holds quantised weights; train one of format stock or hf, then convert"
        )
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("pruning_info"), dict):
        raise ValueError(f"{folder}: not an export, there is no config.json with pruning_info; give a folder of one")
    if "quantization_config" in config:
        raise ValueError(f"{folder}: its weights are quantised; train an export of the model as it was before that")
    info = config["pruning_info"]
    if info.get("format") not in ("stock", "hf"):
        raise ValueError(f"{folder}: of format {info.get('format')}; only stock and hf exports are trained")
    return info
