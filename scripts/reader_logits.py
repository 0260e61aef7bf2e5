"""Logits of checkpoints by the transformers of an environment of its own: `python reader_logits.py OUT FOLDER...`.

For scripts.check_readers. OUT gets {folder: logits of the tokens in its ids.json, or why it was refused, a string}.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def logits(folder):
    """Return the logits (T, V) in float32, or the reason why there are none."""
    ids = torch.tensor([json.loads((Path(folder) / "ids.json").read_text())])
    try:
        # eager: transformers 4 leaves out Gemma 2's soft-capping else; float: it keeps Apertus' activation in bf16
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        if info["missing_keys"]:
            return f"missing {sorted(info['missing_keys'])[0]}"
        with torch.inference_mode():
            return model.float().eval()(ids, use_cache=False).logits[0]
    except Exception as error:  # whatever it is, it is the answer
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"


torch.set_num_threads(1)
torch.save({folder: logits(folder) for folder in sys.argv[2:]}, sys.argv[1])
