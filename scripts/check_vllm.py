"""Compare vLLM on an export with transformers on the model it was pruned from: log-probabilities of real text.

The blocks that the export's pruning_info names are masked in transformers. scripts/check_vllm.sh makes the environment
that vLLM's CPU build needs, beside this one.

    bash scripts/check_vllm.sh pruned --model-path models/SmolLM2-135M --text wikitext2.txt
"""

import json
import subprocess
import tempfile
from pathlib import Path

from scripts import ending, flags
from scripts.check_gguf import add_reference_flags, of_folder

WRITTEN = 24  # greedy tokens


def parse_args(argv=None):
    parser = flags.Parser(__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="folder written by scripts.export --compute-dtype fp32: stock, hf or decilm")
    add_reference_flags(parser)
    parser.add_argument("--vllm-python", required=True, help="python of an environment with vLLM")
    return parser, parser.parse_args(argv)


def main(argv=None):
    parser, args = parse_args(argv)
    import torch

    from lib.files import to_json

    with parser.user_errors():
        removed, ids, logits = of_folder(args)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "vllm.json"
        here = Path(__file__).with_name("vllm_logprobs.py")
        subprocess.run([args.vllm_python, here, args.folder, json.dumps(ids), str(WRITTEN), out], check=True)
        found = json.loads(out.read_text())
    wanted = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    largest = (wanted - torch.tensor(found["logprobs"])).abs().max().item()
    print(f"{args.folder}: {len(removed)} blocks removed, {len(ids)} tokens")
    print(f"largest difference of a log-probability {largest:.2e}; then written: {found['tokens']}")
    print(to_json({"folder": args.folder, "tokens": len(ids), "logprob": largest}))
    if not largest <= args.tolerance:  # NaN is not
        parser.exit(1, f"more than {args.tolerance}\n")


if __name__ == "__main__":
    ending.run(main)
