"""Narrow a model's MLPs, and remove blocks beside them, until a share of its parameters is gone; write a checkpoint.

An allocation says how many channels each MLP keeps, a criterion which, a refit what the rest makes of it. With --units
blocks,channels one search spends the budget on whole attentions, whole MLPs and groups of channels alike.

    python -m scripts.narrow --model-path models/Llama-2-7b-hf --target-ratio 0.2 --output-dir Llama-2-7b-narrow
    python -m scripts.narrow --model-path models/Llama-2-7b-hf --target-ratio 0.2 --allocation greedy \\
        --units blocks,channels --align 256 --output-dir Llama-2-7b-mixed
"""

import argparse
import sys
import time

from scripts import flags
from scripts.export import add_format_flag

ALLOCATIONS = ("uniform", "alphapruning", "owl", "ecoflap", "flap", "greedy")
CRITERIA = ("osscar", "l1", "magnitude", "activation", "flap", "taylor-fine", "taylor-coarse", "hywia")
REFITS = ("ls", "bias", "none")
UNITS = ("channels", "blocks,channels", "blocks,channels,heads")


def parse_args(argv=None):
    parser = flags.Parser(__doc__.split("\n\n")[0])
    flags.add_model_flags(parser)
    parser.add_argument("--output-dir", default=None, help="folder of the checkpoint; made when missing")
    add_format_flag(parser, "auto")
    parser.add_argument(
        "--target-ratio",
        type=flags.share,
        default=None,
        help="share of all parameters that goes, removed blocks included",
    )
    parser.add_argument("--allocation", choices=ALLOCATIONS, default="uniform", help="how many channels each MLP keeps")
    parser.add_argument("--criterion", choices=CRITERIA, default="osscar", help="which channels go")
    parser.add_argument(
        "--refit",
        choices=REFITS,
        default="ls",
        help="new weights on what is kept: least squares, a bias, or as they were",
    )
    parser.add_argument(
        "--align", type=flags.positive, default=128, help="widths are multiples of it, and greedy's groups are as large"
    )
    parser.add_argument("--units", choices=UNITS, default=UNITS[0], help="what --allocation greedy may remove")
    parser.add_argument(
        "--search-windows", type=flags.positive, default=None, help="windows that greedy scores; all when absent"
    )
    parser.add_argument("--ppl-search-file", default=None, help="order whose first blocks go as well, and count")
    parser.add_argument("--del-block-num", type=flags.count, default=None, help="removals of the order to replay")
    parser.add_argument("--cal-nsamples", type=flags.positive, default=64, help="documents to draw (not windows)")
    flags.add_text_flags(parser, dataset="alpaca", batch_size=8)
    parser.add_argument("--dry-run", action="store_true", help="print the widths, write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in the folder")
    args = parser.parse_args(argv)
    if not args.model_path:
        parser.error("--model-path is missing: give a hub id, a local folder or a .gguf file")
    if args.target_ratio is None:
        parser.error("--target-ratio is missing: give the share of all parameters that is to go, such as 0.2")
    if not (args.output_dir or args.dry_run):
        parser.error("--output-dir is missing: give a folder for the checkpoint, or --dry-run")
    if args.units != UNITS[0] and args.allocation != "greedy":
        parser.error(f"--units {args.units}: only --allocation greedy weighs blocks against channels")
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    from lib import allocation
    from lib.edits import applied
    from lib.evaluate import perplexity, window_losses
    from lib.export.write import export
    from lib.files import to_json
    from lib.model import parameter_count, versions
    from lib.width import narrow

    with parser.user_errors():  # everything that can fail fails before weights are read
        if args.output_dir:
            flags.check_folder(args.output_dir, "--output-dir")
        bare = flags.open_bare(args)
        removed = check(args, bare)
        text = flags.open_text(args, flags.open_tokenizer(args), bare)
        windows = text.windows
        if (args.search_windows or 0) > len(windows):
            n = len(windows)
            raise ValueError(f"--search-windows {args.search_windows}: the text has {n}; use 1..{n}")
        decoder = flags.open_decoder(args, windows)
        plan = make_plan(args, decoder, removed, windows)
    flags.print_opened(args, text, decoder)
    total = parameter_count(decoder.model)
    widest = max(part.n for part in plan.parts.values())
    if windows.numel() < widest:
        print(
            f"warning: {windows.numel()} tokens of text for {widest} channels: their sums have no full rank, and the "
            "refit follows the ridge; take more documents in --cal-nsamples",
            file=sys.stderr,
        )
    print(f"width         {args.allocation}, {args.criterion}, {args.refit}, multiples of {args.align}", flush=True)
    less = "take fewer documents in --cal-nsamples, or a smaller --ppl-eval-batch-size"
    start = time.perf_counter()
    with parser.user_errors(), parser.full_gpu(less):
        found = allocation.ALLOCATIONS[args.allocation].find(plan)
        removed = [*found.removed] if found.removed else removed
        show(plan, found, removed)
        if args.dry_run:
            gone = decoder.block_parameters(removed) + channel_parameters(plan, found)
            result = {"removed_percent": 100 * gone / total, "widths": by_name(found.widths)}
            result["removed"] = [*map(str, removed)]
            print(to_json(result))
            return
        about = {
            "model": args.model_path,
            "allocation": args.allocation,
            "align": args.align,
            "units": args.units,
            "target_ratio": args.target_ratio,
            "dataset": args.cal_dataset,
            "seed": args.seed,
            **{key: text.about[key] for key in ("source", "split", "documents", "windows", "seqlen")},
            "dtype": args.compute_dtype,
            "device": args.device,
            "steps": [*found.steps],
        }
        narrowed = narrow(
            decoder,
            windows,
            found.widths,
            args.criterion,
            args.refit,
            args.ppl_eval_batch_size,
            removed=removed,
            about=about,
        )
        seconds = time.perf_counter() - start
        dense = perplexity(window_losses(decoder, windows, args.ppl_eval_batch_size), args.ppl_eval_seqlen)
        with applied(decoder, narrowed.edit):
            after = perplexity(window_losses(decoder, windows, args.ppl_eval_batch_size), args.ppl_eval_seqlen)
        written = export(
            args.model_path,
            narrowed.edit,
            args.output_dir,
            args.format,
            stored_dtype(args),
            overwrite=args.overwrite,
            trust_remote_code=args.trust_remote_code,
            versions=versions(),
            evaluated={"dataset": args.cal_dataset, "dense_perplexity": dense, "perplexity": after},
        )
    print(f"perplexity    {dense:.4f} -> {after:.4f} on the calibration text")
    print(f"size          removed {written['removed_percent']:.2f} % of the parameters in {seconds:.1f} s")
    if padded := written.get("padded_channels"):
        print(
            f"padding       {sum(padded.values())} channels of zeros in {len(padded)} layers, as the file's type needs"
        )
    print(f"export        {args.output_dir}, format {written['format']}, {written['bytes'] / 2**20:,.1f} MiB")
    print(
        to_json(
            {
                "checkpoint": str(args.output_dir),
                "format": written["format"],
                "allocation": args.allocation,
                "criterion": args.criterion,
                "refit": args.refit,
                "widths": by_name(found.widths),
                "removed": written["removed"],
                "parameters": written["parameters"],
                "removed_percent": written["removed_percent"],
                "errors": by_name(narrowed.errors),
                "dense_perplexity": dense,
                "perplexity": after,
                "seconds": seconds,
            }
        )
    )


def check(args, bare):
    """Return the blocks that go before; raise ValueError for what flags, files and configuration already tell."""
    from lib.allocation import check_budget
    from lib.blocks import Block
    from lib.decoder import block_parameters, find_layers
    from lib.export.checkpoint import Source
    from lib.export.folder import check_target
    from lib.families import FAMILIES
    from lib.model import parameter_count
    from lib.parts import find_part

    replay = argparse.Namespace(**{**vars(args), "target_ratio": None})  # here it is the share of all that goes
    order, meta = flags.read_removals(replay)
    if args.output_dir:
        check_target(args.output_dir, args.model_path, args.overwrite)
    if args.format == "zeroed":
        raise ValueError("--format zeroed: holds the model's own sizes; use stock, hf, decilm or gguf")
    layers, total = find_layers(bare), parameter_count(bare)
    removed = flags.check_removals(replay, order, meta, bare)
    flags.refuse_scales(replay, meta, removed)
    row = FAMILIES[type(layers[0]).__name__]
    there = [Block(kind, i) for kind in kinds_of(args) for i in range(len(layers)) if (kind, i) not in set(removed)]
    parts = {block: find_part(layers[block.layer], block.kind, row) for block in there}
    budget = args.target_ratio * total - block_parameters(layers, removed)
    if budget < 0:
        share = block_parameters(layers, removed) / total
        raise ValueError(
            f"--target-ratio {args.target_ratio}: the removed blocks hold {share:.4f} already; ask for more"
        )
    if args.units == UNITS[0]:
        check_budget(parts, budget, args.align, total)
    if not args.dry_run and not args.model_path.endswith(".gguf"):
        Source(args.model_path, stored_dtype(args), args.trust_remote_code)
    return removed


def kinds_of(args):
    """Return the kinds of blocks that may become narrower."""
    return ("mlp", "mha") if "heads" in args.units else ("mlp",)


def make_plan(args, decoder, removed, windows):
    from lib.allocation import Plan
    from lib.model import parameter_count
    from lib.parts import find_parts

    def progress(text):
        print(f"  {text}", file=sys.stderr, flush=True)

    step = len(windows) // (args.search_windows or len(windows))
    return Plan(
        decoder,
        find_parts(decoder, removed, kinds_of(args)),
        windows,
        budget=args.target_ratio * parameter_count(decoder.model) - decoder.block_parameters(removed),
        align=args.align,
        batch_size=args.ppl_eval_batch_size,
        seed=args.seed,
        removed=tuple(removed),
        criterion=args.criterion,
        refit=args.refit,
        blocks=args.units != UNITS[0],
        scored=windows[::step][: args.search_windows],
        progress=progress,
    )


def channel_parameters(plan, found):
    """Return the parameters of what goes from the blocks that stay."""
    return sum((plan.parts[block].n - width) * plan.parts[block].cost for block, width in found.widths.items())


def by_name(values):
    return {str(block): value for block, value in values.items()}


def show(plan, found, removed):
    """Print which blocks go and what is left of the MLPs."""
    print(f"removed       {len(removed)} blocks: {' '.join(map(str, removed)) or 'none'}")
    for kind, noun in (("mlp", "channels"), ("mha", "heads")):
        widths = [f"{block.layer}:{n}" for block, n in sorted(found.widths.items()) if block.kind == kind]
        if widths:
            most = max(part.n for block, part in plan.parts.items() if block.kind == kind)
            print(f"{noun:14}of {most}, by layer: {' '.join(widths)}", flush=True)


def stored_dtype(args):
    """Return the dtype of the new weights; a .gguf file's own where it stays one."""
    return None if args.format == "gguf" and args.model_path.endswith(".gguf") else args.compute_dtype


if __name__ == "__main__":
    main()
