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
    from lib import tasks
    from lib.decoder import Decoder
    from lib.evaluate import perplexity, window_losses
    from lib.export.write import export
    from lib.files import to_json, write_json
    from lib.measure import weight_bytes
    from lib.model import default_device, dtype_note, load_model, load_tokenizer, parameter_count

    args.device = args.device or default_device()
    with parser.user_errors():  # everything that can fail fails before weights are read
        order, meta = check(args)
        tokenizer = load_tokenizer(args.model_path, args.trust_remote_code)
        corpus, documents, windows = flags.read_windows(args, tokenizer, held_out=True)
        windows = windows[: args.limit.get(None)]
        model = load_model(args.model_path, args.compute_dtype, args.device, args.trust_remote_code)
        flags.check_tokens(windows, model)
        decoder = Decoder(model)
    flags.warn_of_order(args, meta, order)

    def measure():
        with parser.full_gpu("take a smaller --ppl-eval-batch-size"):
            losses = window_losses(decoder, windows, args.ppl_eval_batch_size)
        return perplexity(losses, args.ppl_eval_seqlen)

    label = "NOT A RESULT, --limit: " + " ".join(f"{k or 'all'}={v}" for k, v in args.limit.items())
    label = label if args.limit else None
    print(f"model         {args.model_path}, {args.device}, {args.compute_dtype}")
    if note := dtype_note(args.device, args.compute_dtype):
        print(f"note          {note}")
    print(
        f"text          {corpus.source} ({corpus.split or 'whole file'}), "
        f"{len(windows)} windows of {args.ppl_eval_seqlen} = {windows.numel():,} tokens"
    )
    if label:
        print(label)
    dense_parameters, dense_bytes, dense = parameter_count(model), weight_bytes(model), measure()
    decoder.remove(order)
    parameters = parameter_count(model)
    ratio = 100 * (1 - parameters / dense_parameters)
    print(f"removed       {len(order)} blocks: {' '.join(map(str, order)) or 'none'}")
    print(
        f"size          {dense_parameters:,} -> {parameters:,} parameters, "
        f"{dense_bytes / 2**20:,.1f} -> {weight_bytes(model) / 2**20:,.1f} MiB, "
        f"pruning ratio {ratio:.2f} %"
    )
    pruned = measure() if order else dense
    print(f"perplexity    {dense:.4f} -> {pruned:.4f}")
    result = {
        "model": args.model_path,
        "order_file": args.ppl_search_file,
        "removed": [str(b) for b in order],
        "dense_parameters": dense_parameters,
        "parameters": parameters,
        "pruning_ratio_percent": ratio,
        "dataset": args.cal_dataset,
        "source": corpus.source,
        "split": corpus.split,
        "windows": len(windows),
        "seqlen": args.ppl_eval_seqlen,
        "bos": args.bos,
        "documents": len(documents),
        "seed": args.seed,
        "dense_perplexity": dense,
        "perplexity": pruned,
        "limit": label,
        "num_fewshot": args.num_fewshot,
        "dtype": args.compute_dtype,
        "device": args.device,
        "versions": flags.versions(),
        "tasks": {},
    }

    def save():
        if args.output_path:
            write_json(args.output_path, result)

    save()
    for task in args.tasks if args.do_eval else ():
        most = args.limit.get(task, args.limit.get(None))
        with parser.full_gpu("take a smaller --batch-size"):
            result["tasks"] |= tasks.zero_shot(
                model, tokenizer, [task], args.batch_size, args.num_fewshot, most, args.task_data
            )
        save()
    print()
    print_table(result, label)
    failed = None
    if args.export_path:  # last: what is measured is not lost where it fails
        keys = "dataset", "dense_perplexity", "perplexity", "windows", "seqlen", "limit"
        try:
            result["export"] = export(
                args.model_path,
                order,
                args.export_path,
                compute_dtype=args.compute_dtype,
                meta=meta,
                trust_remote_code=args.trust_remote_code,
                versions=flags.versions(),
                evaluated={key: result[key] for key in keys},
            )
            print(f"export        {args.export_path}, format {result['export']['format']}")
        except (ValueError, OSError) as error:
            failed = error
        save()
    print(to_json(result))
    if failed:
        parser.error(failed)


def check(args):
    """Raise ValueError for whatever flags, files and the configuration already tell; return (removals, meta)."""
    from lib import tasks
    from lib.data import check_dataset
    from lib.decoder import block_parameters, find_layers
    from lib.export.checkpoint import Source, check_space
    from lib.export.folder import check_target
    from lib.export.write import choose
    from lib.model import DTYPES, check_device, parameter_count, skeleton

    check_device(args.device)
    check_dataset(args.cal_dataset, args.cal_split, args.data_dir, held_out=True)
    order, meta = flags.read_removals(args)
    if args.do_eval:
        tasks.check_tasks(args.tasks, args.task_data, args.num_fewshot)
        check_task_cache(args.tasks, args.task_data)
    unknown = set(args.limit) - {None, *args.tasks}
    if unknown:
        raise ValueError(f"--limit {unknown.pop()}=...: not among --tasks {' '.join(args.tasks)}")
    flags.check_file(args.output_path, "--output-path")
    bare = skeleton(args.model_path, args.trust_remote_code)
    flags.check_seqlen(bare.config, args.ppl_eval_seqlen)
    removed = flags.check_removals(args, order, meta, bare)
    if args.export_path:
        flags.check_folder(args.export_path, "--export-path")
        check_target(args.export_path, args.model_path)
        choose(Source(args.model_path, args.compute_dtype, args.trust_remote_code), removed)
        left = parameter_count(bare) - block_parameters(find_layers(bare), removed)
        check_space(args.export_path, left * DTYPES[args.compute_dtype].itemsize)
    return removed, meta


def check_task_cache(names, task_data):
    """Raise ValueError where a task's rows are neither local, nor on a hub in reach, nor cached."""
    from lib import tasks
    from lib.hub import hub_error

    if task_data is not None or not hub_error():
        return
    for name in names:
        try:
            tasks.task_manager(hub=True).load([name])
        except ConnectionError:
            raise ValueError(
                f"--tasks {name}: its rows are not cached and the hub cannot be reached ({hub_error()}); "
                "fetch them where there is a network, or give --task-data, a folder with the five tasks' .jsonl files"
            ) from None


def print_table(result, label):
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
    if label:
        print(label)


if __name__ == "__main__":
    main()
