"""Replay the first K removals of a pruning order, then measure what is left.

The blocks are taken out of the model for good (its memory shrinks); dense and pruned perplexity are
printed, and with --do-eval the paper's five zero-shot tasks. Reads orders of block_search.py and of
the paper's own scripts; without an order, or with --del-block-num 0, the dense model is measured.

    python eval.py --do-eval --model-path models/Llama-2-7b-hf --device cuda --del-block-num 17 \\
        --ppl-search-file ppls/Llama-2-7b-hf_mix_alpaca_ns_256_del_order_list.json
"""

import argparse
import contextlib
import json

from scripts import ending, flags

FIT_WINDOWS = 80  # of --repair


def parse_args(argv=None):
    parser = flags.Parser(__doc__.split("\n\n")[0])
    flags.add_model_flags(parser)
    flags.add_removal_flags(parser)
    flags.add_text_flags(parser, dataset="wikitext2", batch_size=2)
    parser.add_argument("--cal-nsamples", type=flags.positive, default=None, help="documents to draw; all when absent")
    parser.add_argument("--repair", default=None, metavar="METHOD", help="of scripts.repair: repair what is left first")
    parser.add_argument("--repair-dataset", default="alpaca", help="text that --repair is fitted on, not measured on")
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
    flags.join_ranks(parser)
    with contextlib.ExitStack() as stack:
        evaluate(parser, args, stack)


def evaluate(parser, args, stack):
    with parser.user_errors():  # everything that can fail fails before weights are read
        removed, meta, text, fit, tokenizer, decoder = open_eval(args, stack)
    flags.warn_of_order(args, meta, removed)
    flags.print_opened(args, text, decoder, title="text")

    from lib.edits import replaced
    from lib.files import to_json
    from lib.measure import weight_bytes
    from lib.model import parameter_count
    from lib.ranks import join
    from lib.schema import write

    model = decoder.model
    sizes = [(parameter_count(model), weight_bytes(model))]
    sizes.append((sizes[0][0] - decoder.block_parameters(removed), None))
    result = describe(args, text, removed, sizes) | {"passes": meta.get("passes")}
    kept = {} if args.repair else finished(args, result)  # what a repair finds is not known before it is fitted
    dense = kept.get("dense_perplexity") or measure(parser, args, text, decoder)
    held = contextlib.ExitStack()
    with parser.user_errors():
        edit = flags.replayed(args, meta, removed, decoder)
    if args.repair:
        edit = repaired(parser, args, decoder, removed, fit)
        removed = list(edit.removed)
    held.enter_context(replaced(decoder, edit))  # to the end of the program, as what is removed is gone
    decoder.remove(removed)
    sizes[1] = parameter_count(model), weight_bytes(model)
    if args.repair:
        result = describe(args, text, removed, sizes) | {"passes": None, "repair": edit.about}
    pruned = kept.get("perplexity") or (measure(parser, args, text, decoder) if removed else dense)
    result |= {"dense_perplexity": float(dense), "perplexity": float(pruned), "tasks": kept.get("tasks", {})}
    if join()[0]:
        return  # the first process does the rest: tasks are not shared
    print_measured(result, sizes)
    if kept:
        print(f"kept          perplexities and {' '.join(result['tasks']) or 'no task'}, from {args.output_path}")

    def save():
        if args.output_path:
            write(args.output_path, "result", result)

    save()
    failed = run_tasks(parser, args, model, tokenizer, result, save)
    print()
    print_table(result)
    if args.export_path:  # last: what is measured is not lost where it fails
        failed = write_export(args, edit, meta, result) or failed
        save()
    print(to_json(result))
    if failed:
        parser.error(failed)


def run_tasks(parser, args, model, tokenizer, result, save):
    """Put the scores of the tasks that are not there into the result, saved one by one; return why one has none."""
    from lib.tasks import rows_key, zero_shot

    failed = None
    for task in args.tasks if args.do_eval else ():
        most, rows = args.limit.get(task, args.limit.get(None)), rows_key(task, args.task_data)
        if result["tasks"].get(task, {}).get("rows") == rows:
            continue
        try:
            with parser.full_gpu("take a smaller --batch-size"):
                scores = zero_shot(
                    model,
                    tokenizer,
                    [task],
                    batch_size=args.batch_size,
                    num_fewshot=args.num_fewshot,
                    limit=most,
                    task_data=args.task_data,
                )
        except ValueError as error:  # the other tasks go on
            failed = f"task {task}: {error}"
            result.setdefault("failed", {})[task] = str(error)
            print(f"failed        {failed}{flags.try_fp32(args) if 'NaN' in failed else ''}")
        else:
            result["tasks"][task] = scores[task] | {"rows": rows}
        save()
    return failed


def finished(args, result):
    """Return the result that lies at --output-path, measured with the settings of this one, {} where there is none."""
    from lib.files import expand, to_json
    from lib.ranks import first
    from lib.schema import read

    kept = {}
    if args.output_path and expand(args.output_path).exists():
        with contextlib.suppress(ValueError):  # damaged: measured again
            kept = read(args.output_path, "result")
    same = all(kept.get(key) == json.loads(to_json(value)) for key, value in result.items() if key != "tasks")
    return first(kept if same else {})


def open_eval(args, stack):
    """Return (removals, meta of the order, Text, windows to fit a repair on, tokenizer, Decoder).

    Raises ValueError for whatever cannot work.

    The file of --output-path is this process's until `stack` is closed.
    """
    from lib.decoder import block_parameters, find_layers
    from lib.export.checkpoint import Source, check_space
    from lib.export.folder import check_target
    from lib.export.write import choose
    from lib.files import own
    from lib.model import DTYPES, parameter_count
    from lib.ranks import join
    from lib.tasks import check_tokenizer

    order, meta = flags.read_removals(args)
    if args.do_eval:
        flags.check_tasks(args)
    unknown = set(args.limit) - {None, *args.tasks}
    if unknown:
        raise ValueError(f"--limit {unknown.pop()}=...: not among --tasks {' '.join(args.tasks)}")
    flags.check_file(args.output_path, "--output-path", kind="result")
    if args.output_path and join()[0] == 0:
        flags.note(stack.enter_context(own(args.output_path)))
    bare = flags.open_bare(args, held_out=True)
    removed = flags.check_removals(args, order, meta, bare)
    if args.repair:
        flags.refuse_scales(args, meta, removed)
    if args.export_path:
        flags.check_folder(args.export_path, "--export-path")
        check_target(args.export_path, args.model_path)
        choose(Source(args.model_path, args.compute_dtype, args.trust_remote_code), removed)
        left = parameter_count(bare) - block_parameters(find_layers(bare), removed)
        check_space(args.export_path, left * DTYPES[args.compute_dtype].itemsize)
    tokenizer = flags.open_tokenizer(args)
    if args.do_eval:
        with flags.naming("--model-path"):
            check_tokenizer(tokenizer)
    text = flags.open_text(args, tokenizer, bare, held_out=True, limit=args.limit.get(None))
    fit = open_fit(args, removed, tokenizer, bare, text) if args.repair else None
    return removed, meta, text, fit, tokenizer, flags.open_decoder(args, text.windows)


def open_fit(args, removed, tokenizer, bare, text):
    """Return the windows (N, T) that --repair is fitted on; raise ValueError where it cannot be, or the text is one."""
    from lib.repair.methods import METHODS

    if args.repair not in METHODS:
        raise ValueError(f"--repair {args.repair}: no such method; use {', '.join(METHODS)}")
    if not removed:
        raise ValueError(f"--repair {args.repair}: nothing is removed, so there is nothing to repair")
    given = {"cal_dataset": args.repair_dataset, "cal_split": None, "cal_nsamples": None}
    fit = flags.open_text(argparse.Namespace(**vars(args) | given), tokenizer, bare, limit=FIT_WINDOWS)
    sources = [about["source"].split("+") for about in (fit.about, text.about)]  # of mixes
    if set(sources[0]) & set(sources[1]) and fit.about["split"] == text.about["split"]:
        raise ValueError(f"--repair-dataset {args.repair_dataset}: is measured on, too; give another text")
    if len(fit.windows) < 2:
        raise ValueError(f"--repair-dataset {args.repair_dataset}: one window, and a second has to choose; give more")
    return fit.windows


def repaired(parser, args, decoder, removed, fit):
    """Return the Edit of --repair; a fifth of the windows `fit` chooses how strong it is."""
    from lib.repair.methods import repair

    n = max(1, len(fit) // 5)
    with parser.user_errors(), parser.full_gpu("take a smaller --ppl-eval-batch-size"):
        found = repair(decoder, removed, args.repair, fit[:-n], fit[-n:], args.ppl_eval_batch_size)
    print(f"repair        {args.repair}: fitted on {len(fit) - n} windows of {args.repair_dataset}, chosen by {n}")
    return found.edit


def measure(parser, args, text, decoder):
    """Return the perplexity on the text of what is there of the model."""
    from lib.evaluate import perplexity
    from lib.ranks import shared_losses

    with parser.full_gpu("take a smaller --ppl-eval-batch-size"):
        return perplexity(shared_losses(decoder, text.windows, args.ppl_eval_batch_size), args.ppl_eval_seqlen)


def describe(args, text, removed, sizes):
    """Return the result before anything is measured, as a dict: what it will be of."""
    from lib.hub import fingerprint
    from lib.model import versions

    (dense_parameters, _), (parameters, _) = sizes
    label = "NOT A RESULT, --limit: " + " ".join(f"{k or 'all'}={v}" for k, v in args.limit.items())
    return {
        "model": args.model_path,
        "weights": fingerprint(args.model_path),
        "order_file": args.ppl_search_file,
        "removed": [str(b) for b in removed],
        "dense_parameters": dense_parameters,
        "parameters": parameters,
        "pruning_ratio_percent": 100 * (1 - parameters / dense_parameters),
        **text.about,
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
    ending.run(main)
