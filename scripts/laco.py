"""Prune a model by LaCo: merge layers into one another until a threshold, or as many as wanted, and write a checkpoint.

The result is an ordinary checkpoint with fewer layers, or another --format of scripts.export, with laco.json beside the
weights: which layers were merged, at which similarity. Any runtime loads it; eval.py measures it like any model.

    python -m scripts.laco --model-path models/Llama-2-7b-hf --target-ratio 0.2 --output-dir Llama-2-7b-laco
    python eval.py --model-path Llama-2-7b-laco
"""

import time
from pathlib import Path

from scripts import ending, flags
from scripts.export import add_format_flag


def parse_args(argv=None):
    parser = flags.Parser(__doc__.split("\n\n")[0])
    flags.add_model_flags(parser)
    parser.add_argument("--output-dir", default=None, help="folder of the checkpoint; made when missing")
    add_format_flag(parser, "stock")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--threshold",
        type=flags.fraction,
        default=None,
        help="least mean cosine with the dense model's final states; the paper's is 0.65 to 0.75",
    )
    amount.add_argument(
        "--del-layer-num", type=flags.positive, default=None, help="layers to remove; the threshold is searched"
    )
    amount.add_argument(
        "--target-ratio",
        type=flags.share,
        default=None,
        help="remove the fewest layers that reach this share of all parameters",
    )
    parser.add_argument(
        "--merge-layers",
        type=flags.positive,
        default=None,
        help="layers merged at a time; 4, or the most of 4, 3, 2 that remove what is asked for",
    )
    parser.add_argument("--interval", type=flags.positive, default=2, help="layers to go down after a merge")
    parser.add_argument("--lowest", type=flags.count, default=1, help="lowest layer to merge")
    parser.add_argument("--highest", type=flags.positive, default=None, help="first layer not to merge, if any")
    parser.add_argument(
        "--variant",
        choices=("paper", "last"),
        default="paper",
        help="paper: sum of differences; last: the topmost projections, as the released notebook does",
    )
    parser.add_argument("--cal-nsamples", type=flags.positive, default=8, help="documents to draw (not windows)")
    flags.add_text_flags(parser, dataset="alpaca", batch_size=8)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in the folder")
    args = parser.parse_args(argv)
    if not args.model_path:
        parser.error("--model-path is missing: give a hub id, a local folder or a .gguf file")
    if not args.output_dir:
        parser.error("--output-dir is missing: give a folder for the checkpoint")
    if args.threshold is None and args.del_layer_num is None and args.target_ratio is None:
        parser.error("how far? give --threshold, --del-layer-num or --target-ratio")
    if args.merge_layers == 1:
        parser.error("--merge-layers 1: merges nothing; use 2 or more")
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    from lib.edits import applied
    from lib.evaluate import perplexity, window_losses
    from lib.export.write import export
    from lib.files import to_json, write_json
    from lib.laco import check_mergeable, collapse, edit
    from lib.model import versions

    with parser.user_errors():  # everything that can fail fails before weights are read
        flags.check_folder(args.output_dir, "--output-dir")
        bare = flags.open_bare(args)
        remove, merge = layers_to_remove(args, bare)
        text = flags.open_text(args, flags.open_tokenizer(args), bare)
        decoder = flags.open_decoder(args, text.windows)
        check_mergeable(decoder)
    flags.print_opened(args, text, decoder)
    L, windows = decoder.n_layers, text.windows
    wanted = f"threshold {args.threshold}" if remove is None else f"{remove} layers to remove"
    print(f"laco          {args.variant}, {merge} layers at a time, {wanted}", flush=True)
    less = "take fewer documents in --cal-nsamples, or a smaller --ppl-eval-batch-size"
    with parser.full_gpu(less):
        dense = perplexity(window_losses(decoder, windows, args.ppl_eval_batch_size), args.ppl_eval_seqlen)
    start, compared = time.perf_counter(), []
    with parser.user_errors(), parser.full_gpu(less):
        collapsed = collapse(
            decoder,
            windows,
            merge,
            interval=args.interval,
            lowest=args.lowest,
            highest=args.highest,
            variant=args.variant,
            threshold=args.threshold,
            remove=remove,
            batch_size=args.ppl_eval_batch_size,
            progress=lambda: compared.append(1),
        )
        seconds = time.perf_counter() - start
        for place, similarity in collapsed.merges:
            print(f"merged        layers {place}..{place + merge - 1} of what was there, similarity {similarity:.4f}")
        merged = edit(
            decoder,
            collapsed.layers,
            {
                "model": args.model_path,
                "variant": args.variant,
                "merge_layers": merge,
                "interval": args.interval,
                "lowest": args.lowest,
                "highest": args.highest or L,
                **text.about,
                "dtype": args.compute_dtype,
                "device": args.device,
                "comparisons": len(compared),
                "seconds": seconds,
                "dense_layers": L,
                "merges": [{"layer": place, "similarity": s} for place, s in collapsed.merges],
                "threshold": collapsed.threshold,
            },
        )
        with applied(decoder, merged):
            after = perplexity(window_losses(decoder, windows, args.ppl_eval_batch_size), args.ppl_eval_seqlen)
        written = export(
            args.model_path,
            merged,
            args.output_dir,
            args.format,
            stored_dtype(args),
            overwrite=args.overwrite,
            trust_remote_code=args.trust_remote_code,
            versions=versions(),
            evaluated={"dataset": args.cal_dataset, "dense_perplexity": dense, "perplexity": after},
        )
    sizes = ("versions", "dense_parameters", "parameters", "removed_percent")
    write_json(Path(args.output_dir).expanduser() / "laco.json", written["edit"] | {key: written[key] for key in sizes})
    print(f"perplexity    {dense:.4f} -> {after:.4f} on the calibration text")
    print(
        f"size          {L} -> {len(collapsed.layers)} layers, removed {written['removed_percent']:.2f} %, "
        f"{len(compared)} comparisons in {seconds:.1f} s -> {args.output_dir}, format {written['format']}"
    )
    print(
        to_json(
            {
                "checkpoint": str(args.output_dir),
                "format": written["format"],
                "layers": len(collapsed.layers),
                "dense_layers": L,
                "removed_percent": written["removed_percent"],
                "threshold": collapsed.threshold,
                "merges": collapsed.merges,
                "dense_perplexity": dense,
                "perplexity": after,
                "seconds": seconds,
            }
        )
    )


def stored_dtype(args):
    """Return the dtype of the new weights; a .gguf file's own where it stays one."""
    return None if args.format == "gguf" and args.model_path.endswith(".gguf") else args.compute_dtype


def layers_to_remove(args, bare):
    """Return (layers to remove or None, layers a merge); raise ValueError for what flags and files already tell."""
    from lib.candidates import candidates
    from lib.decoder import find_layers
    from lib.export.checkpoint import Source
    from lib.export.folder import check_target
    from lib.export.write import FORMATS
    from lib.laco import check_range, merge_sizes
    from lib.model import parameter_count

    check_target(args.output_dir, args.model_path, args.overwrite)
    layers = find_layers(bare)
    highest = len(layers) if args.highest is None else args.highest
    remove = args.del_layer_num
    if args.target_ratio is not None:
        with flags.naming("--target-ratio"):
            total = parameter_count(bare)
            remove = candidates(layers, total, "layer", ratio=args.target_ratio, consecutive=True).window
    merge = args.merge_layers or merge_sizes(remove)[0]
    if args.target_ratio is not None:
        remove += -remove % (merge - 1)
    check_range(len(layers), merge, args.lowest, highest, remove)
    if args.format != "auto" and not args.model_path.endswith(".gguf"):  # of the dense model, nothing is written
        FORMATS[args.format](Source(args.model_path, stored_dtype(args), args.trust_remote_code), (), {})
    return remove, merge


if __name__ == "__main__":
    ending.run(main)
