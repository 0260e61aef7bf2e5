"""Replay the first K removals of a pruning order, then measure what is left.

The blocks are taken out of the model for good (its memory shrinks); dense and pruned perplexity are
printed, and with --do-eval the paper's five zero-shot tasks. Reads orders of block_search.py and of
the paper's own scripts; without an order, or with --del-block-num 0, the dense model is measured.

    python eval.py --do-eval --model-path models/Llama-2-7b-hf --device cuda --del-block-num 17 \\
        --ppl-search-file ppls/Llama-2-7b-hf_mix_alpaca_ns_256_del_order_list.json
"""

from scripts import flags


def parse_args(argv=None):
    parser = flags.Parser(__doc__.split("\n\n")[0])
    flags.add_model_flags(parser)
    flags.add_removal_flags(parser)
    flags.add_text_flags(parser, dataset="wikitext2", batch_size=2)
    parser.add_argument("--cal-nsamples", type=flags.positive, default=None, help="documents to draw; all when absent")
    parser.add_argument("--do-eval", action="store_true", help="also run the zero-shot tasks (lm-eval)")
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="tasks of --do-eval",
        default=["piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge"],
    )
    parser.add_argument("--task-data", default=None, help="folder with the five tasks' .jsonl files; else the hub")
    parser.add_argument("--num-fewshot", type=flags.count, default=0, help="examples in each task's prompt")
    parser.add_argument("--batch-size", type=flags.positive, default=1, help="requests per forward in tasks")
    parser.add_argument(
        "--limit",
        nargs="+",
        metavar="[TASK=]N",
        type=flags.limit,
        default=[],
        help="first N windows and items only, or N items of TASK; not a result",
    )
    parser.add_argument("--output-path", help="result file (.json), written after every step", default=None)
    parser.add_argument("--export-path", help="folder for the pruned checkpoint, in --compute-dtype", default=None)
    args = parser.parse_args(argv)
    args.limit = dict(args.limit)
    if not args.model_path:
        parser.error("--model-path is missing: give a hub id, a local folder or a .gguf file")
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    with parser.user_errors():  # everything that can fail fails before weights are read
        removed, meta, text, tokenizer, decoder = open_eval(args)
    flags.warn_of_order(args, meta, removed)
    flags.print_opened(args, text, decoder, title="text")

    from lib.edits import keep
    from lib.files import to_json, write_json
    from lib.measure import weight_bytes
    from lib.model import parameter_count
    from lib.tasks import zero_shot

    model = decoder.model
    sizes, dense = [(parameter_count(model), weight_bytes(model))], measure(parser, args, text, decoder)
    with parser.user_errors():
        edit = flags.replayed(args, meta, removed, decoder)
    keep(decoder, edit)
    decoder.remove(removed)
    sizes.append((parameter_count(model), weight_bytes(model)))
    pruned = measure(parser, args, text, decoder) if removed else dense
    result = describe(args, text, removed, sizes, dense, pruned)
    print_measured(result, sizes)

    def save():
        if args.output_path:
            write_json(args.output_path, result)

    save()
    for task in args.tasks if args.do_eval else ():
        most = args.limit.get(task, args.limit.get(None))
        with parser.full_gpu("take a smaller --batch-size"):
            result["tasks"] |= zero_shot(
                model,
                tokenizer,
                [task],
                batch_size=args.batch_size,
                num_fewshot=args.num_fewshot,
                limit=most,
                task_data=args.task_data,
            )
        save()
    print()
    print_table(result)
    if args.export_path:  # last: what is measured is not lost where it fails
        failed = write_export(args, edit, meta, result)
        save()
    print(to_json(result))
    if args.export_path and failed:
        parser.error(failed)


def open_eval(args):
    """Return (removals, meta of the order, Text, tokenizer, Decoder); raise ValueError for whatever cannot work."""
    from lib.decoder import block_parameters, find_layers
    from lib.export.checkpoint import Source, check_space
    from lib.export.folder import check_target
    from lib.export.write import choose
    from lib.model import DTYPES, parameter_count

    order, meta = flags.read_removals(args)
    if args.do_eval:
        flags.check_tasks(args)
    unknown = set(args.limit) - {None, *args.tasks}
    if unknown:
        raise ValueError(f"--limit {unknown.pop()}=...: not among --tasks {' '.join(args.tasks)}")
    flags.check_file(args.output_path, "--output-path")
    bare = flags.open_bare(args, held_out=True)
    removed = flags.check_removals(args, order, meta, bare)
    if args.export_path:
        flags.check_folder(args.export_path, "--export-path")
        check_target(args.export_path, args.model_path)
        choose(Source(args.model_path, args.compute_dtype, args.trust_remote_code), removed)
        left = parameter_count(bare) - block_parameters(find_layers(bare), removed)
        check_space(args.export_path, left * DTYPES[args.compute_dtype].itemsize)
    tokenizer = flags.open_tokenizer(args)
    text = flags.open_text(args, tokenizer, bare, held_out=True, limit=args.limit.get(None))
    return removed, meta, text, tokenizer, flags.open_decoder(args, text.windows)


def measure(parser, args, text, decoder):
    """Return the perplexity on the text of what is there of the model."""
    from lib.evaluate import perplexity, window_losses

    with parser.full_gpu("take a smaller --ppl-eval-batch-size"):
        return perplexity(window_losses(decoder, text.windows, args.ppl_eval_batch_size), args.ppl_eval_seqlen)


def describe(args, text, removed, sizes, dense, pruned):
    """Return the result before the tasks, as a dict."""
    from lib.model import versions

    (dense_parameters, _), (parameters, _) = sizes
    label = "NOT A RESULT, --limit: " + " ".join(f"{k or 'all'}={v}" for k, v in args.limit.items())
    return {
        "model": args.model_path,
        "order_file": args.ppl_search_file,
        "removed": [str(b) for b in removed],
        "dense_parameters": dense_parameters,
        "parameters": parameters,
        "pruning_ratio_percent": 100 * (1 - parameters / dense_parameters),
        **text.about,
        "dense_perplexity": dense,
        "perplexity": pruned,
        "limit": label if args.limit else None,
        "num_fewshot": args.num_fewshot,
        "dtype": args.compute_dtype,
        "device": args.device,
        "versions": versions(),
        "tasks": {},
    }


def print_measured(result, sizes):
    (dense_parameters, dense_bytes), (parameters, left) = sizes
    if result["limit"]:
        print(result["limit"])
    print(f"removed       {len(result['removed'])} blocks: {' '.join(result['removed']) or 'none'}")
    print(
        f"size          {dense_parameters:,} -> {parameters:,} parameters, "
        f"{dense_bytes / 2**20:,.1f} -> {left / 2**20:,.1f} MiB, "
        f"pruning ratio {result['pruning_ratio_percent']:.2f} %"
    )
    print(f"perplexity    {result['dense_perplexity']:.4f} -> {result['perplexity']:.4f}")


def write_export(args, edit, meta, result):
    """Write --export-path and put what was written into the result; return the error where that fails, else None."""
    from lib.export.write import export

    keys = "dataset", "dense_perplexity", "perplexity", "windows", "seqlen", "limit"
    try:
        result["export"] = export(
            args.model_path,
            edit,
            args.export_path,
            compute_dtype=args.compute_dtype,
            meta=meta,
            trust_remote_code=args.trust_remote_code,
            versions=result["versions"],
            evaluated={key: result[key] for key in keys},
        )
        print(f"export        {args.export_path}, format {result['export']['format']}")
    except (ValueError, OSError) as error:
        return error


def print_table(result):
    """Print the paper's table: the dense row's perplexity, and everything measured of the model evaluated."""
    from lib.tasks import TITLES

    names = [*TITLES, *(t for t in result["tasks"] if t not in TITLES)] if result["tasks"] else []
    titles = ["", "ratio %", "PPL", *(TITLES.get(n, n) for n in names), *(["average"] if names else [])]
    scores = {name: 100 * task["score"] for name, task in result["tasks"].items()}
    average = sum(scores.values()) / len(scores) if scores else None
    cells = [f"{scores[n]:.2f}" if n in scores else "-" for n in names] + ([f"{average:.2f}"] if names else [])
    rows = [titles]
    if result["removed"]:
        rows.append(["dense", "0.00", f"{result['dense_perplexity']:.2f}", *("-" for _ in cells)])
    name = f"{len(result['removed'])} blocks removed" if result["removed"] else "dense"
    rows.append([name, f"{result['pruning_ratio_percent']:.2f}", f"{result['perplexity']:.2f}", *cells])
    flags.print_aligned(rows)
    if result["limit"]:
        print(result["limit"])


if __name__ == "__main__":
    main()
