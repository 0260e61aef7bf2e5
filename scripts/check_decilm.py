"""Compare mlx-lm on a decilm export with transformers on the model it was pruned from: logits of real text.

The blocks that the export's pruning_info names are masked in transformers. mlx-lm gets half of the text as a
prompt and the rest token by token, through its cache. scripts/check_decilm.sh makes the environment that
mlx-lm needs, beside this one.

    bash scripts/check_decilm.sh pruned --model-path models/SmolLM2-135M --text wikitext2.txt
"""

import json
import subprocess
import tempfile
from pathlib import Path

from scripts import ending, flags
from scripts.check_gguf import add_reference_flags, of_folder


def parse_args(argv=None):
    parser = flags.Parser(__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="folder written by scripts.export --format decilm --compute-dtype fp32")
    add_reference_flags(parser)
    parser.add_argument("--mlx-python", required=True, help="python of an environment with mlx-lm")
    return parser, parser.parse_args(argv)


def main(argv=None):
    parser, args = parse_args(argv)
    import numpy as np
    import torch

    from lib.files import to_json

    with parser.user_errors():
        removed, ids, wanted = of_folder(args)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "logits.npy"
        here = Path(__file__).with_name("mlx_logits.py")
        subprocess.run([args.mlx_python, here, args.folder, json.dumps(ids), out], check=True)
        found = torch.from_numpy(np.load(out))
    logits = (wanted - found).abs().max().item()
    logprobs = (wanted.log_softmax(-1) - found.log_softmax(-1)).abs().max().item()
    print(f"{args.folder}: {len(removed)} blocks removed, {len(ids)} tokens, all of the vocabulary")
    print(f"largest difference of a logit {logits:.2e}, of a log-probability {logprobs:.2e}")
    print(to_json({"folder": args.folder, "tokens": len(ids), "logit": logits, "logprob": logprobs}))
    if not logprobs <= args.tolerance:  # NaN is not
        parser.exit(1, f"more than {args.tolerance}\n")


if __name__ == "__main__":
    ending.run(main)
