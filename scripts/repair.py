"""Repair what an order's first K removals leave of a model, without training or with little of it, and write it.

    python -m scripts.repair --model-path models/Llama-2-7b-hf --ppl-search-file ORDER.json --del-block-num 17 \\
        --method scale --cal-dataset alpaca+wikitext2 --output-dir models/Llama-2-7b-17-scaled

Part of the text is fitted on, another part chooses how strong the repair is, and a third part and a text of another
kind say what it is worth. docs/repair.md compares the methods.
"""

import math
import time

from scripts import ending, flags
from scripts.export import add_format_flag
from scripts.recover import add_text_flags, check_seqlen, cut_text, read_corpora

SECONDS = 10  # between lines of progress


def parse_args(argv=None):
    from lib.repair.methods import METHODS

    parser = flags.Parser(__doc__.split("\n\n")[0])
    flags.add_model_flags(parser)
    flags.add_removal_flags(parser, required=True)
    parser.add_argument(
        "--method", choices=METHODS, required=True, help="; ".join(f"{name}: {m.about}" for name, m in METHODS.items())
    )
    parser.add_argument("--output-dir", help="folder of the repaired checkpoint; made when missing")
    add_format_flag(parser, "auto")
    parser.add_argument(
        "--windows", type=flags.positive, default=64, help="windows to fit on; a quarter as many more choose by"
    )
    add_text_flags(parser)
    parser.set_defaults(watch=["pydoc"])
    parser.add_argument("--batch-size", type=flags.positive, default=4, help="windows per forward")
    parser.add_argument("--seed", type=int, default=42, help="seed of the text's order")
    parser.add_argument("--force", action="store_true", help="write a repair that makes held-out text worse, too")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in the folder")
    args = parser.parse_args(argv)
    for flag in ("model_path", "output_dir", "cal_dataset"):
        if not getattr(args, flag):
            parser.error(f"--{flag.replace('_', '-')} is missing")
    args.self_text = None
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    with parser.user_errors():
        run(parser, args)


def run(parser, args):
    from lib.edits import Edit
    from lib.export.write import export
    from lib.files import to_json
    from lib.model import versions
    from lib.repair.methods import mean_loss, repair

    # everything that can be refused is, before a weight is read
    removed, meta, format = check(args)
    tokenizer = flags.open_tokenizer(args)
    n_choose = max(1, args.windows // 4)
    text = cut_text(args, {"search": meta}, read_corpora(args), tokenizer, args.windows + n_choose)
    windows = text.windows[: text.pool]
    if len(windows) < 2:
        raise ValueError(
            f"--cal-dataset {args.cal_dataset}: one window to fit on and one to choose by; it has 1 in all"
        )
    n_choose = min(n_choose, len(windows) // 2)
    fit, choose = windows[:-n_choose], windows[-n_choose:]
    decoder = flags.open_decoder(args, windows)
    for line in text.lines:
        print(line)
    print(f"repair        {args.method}: fitted on {len(fit)} windows, chosen by {len(choose)}", flush=True)

    def perplexities(edit):
        return {
            name: math.exp(min(mean_loss(decoder, some, edit, args.batch_size), 700))
            for name, some in text.watched.items()
        }

    with parser.full_gpu("take a smaller --batch-size"):
        start = time.perf_counter()
        fitted = repair(decoder, removed, args.method, fit, choose, args.batch_size, Progress(), report)
        seconds = round(time.perf_counter() - start)
        ppl = {"dense": perplexities(Edit()), "pruned": perplexities(Edit(tuple(removed)))}
        ppl["repaired"] = perplexities(fitted.edit)
    rows = [("perplexity", "dense", "pruned", "repaired", "less")]
    for name in text.watched:
        less = 100 * (1 - ppl["repaired"][name] / ppl["pruned"][name])
        rows.append((name, *(f"{ppl[key][name]:.2f}" for key in ppl), f"{less:.1f} %"))
    flags.print_aligned(rows)
    worse = [name for name in text.watched if not ppl["repaired"][name] < ppl["pruned"][name]]
    if worse and not args.force:
        raise ValueError(
            f"--method {args.method}: held-out {worse[0]} is no better for it (perplexity "
            f"{ppl['pruned'][worse[0]]:.2f} -> {ppl['repaired'][worse[0]]:.2f}), so nothing was written; give another "
            "method, more or other text, or --force"
        )
    facts = {
        "windows": len(fit),
        "chosen_by": len(choose),
        "seqlen": args.seqlen,
        "seconds": seconds,
        "device": args.device,
        "dtype": args.compute_dtype,
        "seed": args.seed,
        "text": text.about,
        "runs_shared_with_held_out": text.shared,
        "perplexity": ppl,
    }
    result = export(
        args.model_path,
        fitted.edit._replace(about={**fitted.edit.about, **facts}),
        args.output_dir,
        format,
        stored_dtype(args, format),
        overwrite=args.overwrite,
        trust_remote_code=args.trust_remote_code,
        meta=meta,
        versions=versions(),
    )
    flags.warn_of_order(args, meta, removed)
    print(f"left          {result['parameters']:,} parameters, pruning ratio {result['removed_percent']:.2f} %")
    print(f"export        {args.output_dir}, format {result['format']}, {seconds} s of fitting")
    print(to_json(result))


class Progress:
    """Prints what a method is at, now and then."""

    last = 0.0

    def __call__(self, words):
        if time.monotonic() - self.last > SECONDS:
            self.last = time.monotonic()
            print(f"fitting       {words}", flush=True)


def report(strength, loss):
    words = "  ".join(f"{key} {value}" for key, value in strength.items() if not isinstance(value, (list, dict)))
    print(f"strength      {words}  loss {loss:.4f}", flush=True)


def check(args):
    """Return (removed, meta of the order, format); raise ValueError for what flags and files already tell."""
    from lib.edits import Edit
    from lib.export.checkpoint import Source
    from lib.export.folder import check_target
    from lib.export.write import FORMATS, choose
    from lib.model import check_device, default_device
    from lib.repair.methods import METHODS

    args.device = args.device or default_device()
    with flags.naming("--device"):
        check_device(args.device)
    order, meta = flags.read_removals(args)
    flags.check_folder(args.output_dir, "--output-dir")
    check_target(args.output_dir, args.model_path, args.overwrite)
    with flags.naming("--model-path"):
        source = Source(args.model_path, stored_dtype(args, args.format), args.trust_remote_code)
    check_seqlen(source.config, args.seqlen)
    removed = flags.check_removals(args, order, meta, source.bare)
    flags.refuse_scales(args, meta, removed)
    if not removed:
        raise ValueError("nothing is removed, so there is nothing to repair; remove a block or more")
    formats = METHODS[args.method].formats
    format = args.format
    if format == "auto":
        format = choose(source, removed) if "stock" in formats else formats[0]
    if format not in formats:
        raise ValueError(f"--format {format}: cannot hold --method {args.method}; use {', '.join(formats)}")
    if source.gguf and format == "gguf":  # can the types of its output projections be written at all?
        writers = [n for n, _ in source.bare.named_parameters() if n.endswith(("o_proj.weight", "down_proj.weight"))]
        source.edit = Edit(tensors=dict.fromkeys(writers))
    FORMATS[format](source, removed, {})  # of the model as it is: nothing is written
    return removed, meta, format


def stored_dtype(args, format):
    """Return the dtype of the new weights; a .gguf file's own where it stays one."""
    return None if format == "gguf" and args.model_path.endswith(".gguf") else args.compute_dtype


if __name__ == "__main__":
    ending.run(main)
