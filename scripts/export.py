"""Write a model without the first K removals of a pruning order, as a checkpoint that runtimes load.

    python -m scripts.export --model-path models/Llama-2-7b-hf --output-dir models/Llama-2-7b-17 \\
        --ppl-search-file ppls/Llama-2-7b-hf_mix_alpaca_ns_256_del_order_list.json --del-block-num 17
"""

from scripts import ending, flags


def parse_args(argv=None):
    parser = flags.Parser(__doc__.split("\n\n")[0])
    parser.add_argument("--model-path", help="hub id, local folder, or .gguf file (dequantised, but for gguf)")
    flags.add_removal_flags(parser, required=True)
    parser.add_argument("--output-dir", help="folder of the new checkpoint; made when missing")
    add_format_flag(parser, "auto")
    parser.add_argument(
        "--compute-dtype",
        choices=flags.DTYPES,
        default=None,
        help="dtype of the new weights; as they are stored when absent (.gguf: bf16)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in the folder")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python that the model brings along")
    args = parser.parse_args(argv)
    for flag, value in (("--model-path", args.model_path), ("--output-dir", args.output_dir)):
        if not value:
            parser.error(f"{flag} is missing")
    return parser, args


def add_format_flag(parser, default):
    parser.add_argument(
        "--format",
        default=default,
        choices=("auto", "stock", "hf", "decilm", "gguf", "zeroed"),
        help="stock: plain checkpoint with fewer layers; hf: brings a modeling file; "
        "auto: stock, else hf; decilm: for vLLM, SGLang and mlx-lm; gguf: for llama.cpp, "
        "a .gguf file's weights as they are; zeroed: full size, for comparison",
    )


def main(argv=None):
    parser, args = parse_args(argv)
    with parser.user_errors():
        order, meta = flags.read_removals(args)
        flags.check_folder(args.output_dir, "--output-dir")
        from lib.export.folder import check_target
        from lib.export.write import export
        from lib.files import to_json
        from lib.model import skeleton, versions

        check_target(args.output_dir, args.model_path, args.overwrite)
        with flags.naming("--model-path"):
            bare = skeleton(args.model_path, args.trust_remote_code)
        removed = flags.check_removals(args, order, meta, bare)
        result = export(
            args.model_path,
            edit_of(args, meta, removed),
            args.output_dir,
            args.format,
            args.compute_dtype,
            overwrite=args.overwrite,
            trust_remote_code=args.trust_remote_code,
            meta=meta,
            versions=versions(),
        )
    flags.warn_of_order(args, meta, removed)
    print(f"model         {args.model_path}: {result['dense_parameters']:,} parameters")
    print(f"removed       {len(removed)} blocks: {' '.join(map(str, removed)) or 'none'}")
    print(f"left          {result['parameters']:,} parameters, pruning ratio {result['removed_percent']:.2f} %")
    print(f"format        {result['format']}")
    if "stored_parameters" in result:
        print(
            f"stored        {result['stored_parameters']:,} parameters: wider MLPs, and zeros where runtimes expect "
            "weights"
        )
    if most := result.get("most_tokens"):
        print(f"note          for at most {most:,} tokens, the model's sliding window, which its runtimes have not")
    if result["format"] == "zeroed":
        print("note          the removed blocks are zero, not gone: this checkpoint is as large and slow as its base")
    print(f"export        {args.output_dir}, {result['bytes'] / 2**20:,.1f} MiB")
    print(to_json(result))


def edit_of(args, meta, removed):
    """Return the Edit to write; the weights are loaded only where the order holds scales, which change them."""
    from lib.decoder import Decoder
    from lib.edits import Edit
    from lib.model import load_model
    from lib.orders import passes_in

    if not removed or not passes_in(meta):
        return Edit(tuple(removed))
    model = load_model(args.model_path, "fp32", "cpu", args.trust_remote_code)
    return flags.replayed(args, meta, removed, Decoder(model))


if __name__ == "__main__":
    ending.run(main)
