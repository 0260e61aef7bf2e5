"""Let several models continue the same beginning, side by side: a dense model, a pruned one, a recovered one.

python -m scripts.generate models/Llama-2-7b-hf pruned recovered --trust-remote-code --prompt "The list is sorted by"
"""

import textwrap

from scripts import flags


def parse_args(argv=None):
    parser = flags.Parser(__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="hub id, local folder, or .gguf file")
    flags.add_compute_flags(parser)
    parser.add_argument("--prompt", required=True, help="the beginning")
    parser.add_argument("--new-tokens", type=flags.positive, default=32, help="tokens to add, the likeliest each time")
    return parser, parser.parse_args(argv)


def main(argv=None):
    parser, args = parse_args(argv)
    from lib.files import to_json
    from lib.model import check_device, default_device, load_tokenizer, skeleton

    args.device = args.device or default_device()
    with parser.user_errors():
        with flags.naming("--device"):
            check_device(args.device)
        with flags.naming("MODEL"):
            for path in args.models:
                skeleton(path, args.trust_remote_code)
            tokenizers = [load_tokenizer(path, args.trust_remote_code) for path in args.models]
        if not tokenizers[0](args.prompt)["input_ids"]:
            raise ValueError(f"--prompt {args.prompt!r}: no token; give a few words")
    print(f"beginning     {args.prompt}")
    written = {}
    for path, tokenizer in zip(args.models, tokenizers, strict=True):
        with parser.user_errors(), flags.naming("MODEL"):
            written[path] = continued(args, path, tokenizer)
        print(
            textwrap.fill(" ".join(written[path].split()), 104, initial_indent="... ", subsequent_indent="    ").join(
                (f"\n{path}\n", "")
            ),
            flush=True,
        )
    print()
    print(to_json({"prompt": args.prompt, "new_tokens": args.new_tokens, "continuations": written}))


def continued(args, path, tokenizer):
    """Return the text that the model at `path` adds to the prompt, by the likeliest tokens."""
    import torch

    from lib.model import load_model

    model = load_model(path, args.compute_dtype, args.device, args.trust_remote_code)
    ids = torch.tensor([tokenizer(args.prompt)["input_ids"]], device=model.get_input_embeddings().weight.device)
    end = model.generation_config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.new_tokens,
        do_sample=False,
        pad_token_id=end if end is not None else 0,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
