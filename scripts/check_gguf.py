"""Compare llama.cpp on a .gguf file with transformers on the model it was pruned from: log-probabilities of real text.

The blocks that the file's pruning_info names are masked in transformers; a file without it is the dense model.
llama.cpp gets the text token by token, through its KV cache, behind a prompt of half of it. Needs `pip install
xllamacpp`.

    python -m scripts.check_gguf pruned/model.gguf --model-path models/SmolLM2-135M --text wikitext2.txt
"""

import json
from pathlib import Path

from lib.export import runtimes as llamacpp
from scripts import ending, flags


def parse_args(argv=None):
    parser = flags.Parser(__doc__.split("\n\n")[0])
    parser.add_argument("file", help=".gguf file of scripts.export, or of the dense model")
    add_reference_flags(parser)
    return parser, parser.parse_args(argv)


def add_reference_flags(parser):
    """Add the flags that say what transformers is asked, and how close the other program must come."""
    parser.add_argument("--model-path", required=True, help="the dense model: hub id, folder or .gguf file")
    parser.add_argument("--text", required=True, help="file of text; its first tokens are used")
    parser.add_argument("--tokens", type=flags.positive, default=64, help="tokens to compare")
    parser.add_argument("--tolerance", type=flags.size, default=0.01, help="largest difference of a log-probability")


def main(argv=None):
    parser, args = parse_args(argv)
    import torch

    from lib.export.gguf import read_info
    from lib.files import to_json

    with parser.user_errors():
        removed = (read_info(args.file) or {"removed": []})["removed"]
        ids, logits = masked_logits(args.model_path, removed, args.text, args.tokens + 1)
        wanted = logits[:-1].log_softmax(-1)
        with llamacpp.Server(args.file, 2 * len(ids), exact=True) as server:
            first = len(ids) // 2
            found = [server.logprobs(ids[: n + 1], wanted.shape[1]) for n in range(first, len(ids) - 1)]
    wanted, found = wanted[first:], torch.stack(found)
    next_ids = torch.tensor(ids[first + 1 :]).unsqueeze(1)
    of_text = (wanted.gather(1, next_ids) - found.gather(1, next_ids)).abs().max().item()
    of_all = (wanted.softmax(-1) - found.softmax(-1)).abs().max().item()
    print(f"{args.file}: {len(removed)} blocks removed, {len(found)} tokens")
    print(f"largest difference of a log-probability {of_text:.2e}, of a probability of any token {of_all:.2e}")
    print(to_json({"file": args.file, "tokens": len(found), "logprob": of_text, "probability": of_all}))
    if not of_text <= args.tolerance:  # NaN is not
        parser.exit(1, f"more than {args.tolerance}\n")


def of_folder(args):
    """Return (removed blocks, token ids, logits of transformers without these blocks) for the export args.folder."""
    info = json.loads((Path(args.folder) / "config.json").read_text(encoding="utf-8")).get("pruning_info")
    if info is None:
        raise ValueError(f"{args.folder}: config.json has no pruning_info; give a folder that scripts.export wrote")
    return info["removed"], *masked_logits(args.model_path, info["removed"], args.text, args.tokens)


def masked_logits(model_path, removed, text, n):
    """Return (the first n token ids of the file `text`, float32 logits (n, V)): transformers, blocks by name masked.

    Raises ValueError where the text has fewer tokens.
    """
    import torch

    from lib.blocks import parse_block
    from lib.decoder import Decoder
    from lib.model import load_model, load_tokenizer

    with open(text, encoding="utf-8") as file:
        ids = load_tokenizer(model_path).encode(file.read(40 * n))[:n]
    if len(ids) < n:
        raise ValueError(f"--text {text}: {len(ids)} tokens, {n} are needed; give a longer one, or fewer --tokens")
    decoder = Decoder(load_model(model_path, "fp32"))
    with decoder.masked([parse_block(name) for name in removed]), torch.inference_mode():
        return ids, decoder.model(torch.tensor([ids])).logits[0]


if __name__ == "__main__":
    ending.run(main)
