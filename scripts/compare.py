"""The paper's table for any model: every method on the same calibration windows, one evaluation, one command.

Each method removes the fewest blocks that reach each ratio of the parameters, by the order that block_search.py would
write with the flags of METHODS; what is left is measured by perplexity on held-out texts, by zero-shot tasks, and with
--measure by its speed. One load of the model serves all: blocks are masked, which gives the numbers of removing them.
Every measurement is kept as soon as it is there: the same command goes on where it was cut short, and one with more
methods, ratios, texts or tasks computes only what is new. Writes compare.json, table.md, table.tex and a page.

    python -m scripts.compare --model-path models/Llama-2-7b-hf --device cuda --output-dir results/llama2_7b \\
        --methods blockpruner sleb bi rm laco random --ratios 0.1 0.2 0.25
"""

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path

from lib.methods import METHODS, SEEDED
from scripts import ending, flags

FEW = 10  # windows below which a text is a demonstration


def parse_args(argv=None):
    parser = flags.Parser(__doc__.split("\n\n")[0])
    flags.add_model_flags(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        type=method,
        metavar="METHOD",
        default=["blockpruner", "sleb", "bi", "rm", "random"],
        help=f"rows of the table: {', '.join(METHODS)}",
    )
    parser.add_argument(
        "--ratios",
        nargs="+",
        type=flags.share,
        default=[0.1, 0.2, 0.25],
        metavar="R",
        help="shares of the parameters that must go at least",
    )
    parser.add_argument("--seeds", nargs="+", type=flags.count, default=[0, 1, 2], metavar="N", help="draws of random")
    parser.add_argument(
        "--cal-seeds",
        nargs="+",
        type=flags.count,
        default=[],
        metavar="N",
        help="draws of the calibration text, over which rows are means with standard deviations; --seed when absent",
    )
    parser.add_argument("--cal-nsamples", type=flags.positive, default=256, help="documents to calibrate on")
    flags.add_text_flags(parser, dataset="alpaca", batch_size=None)
    parser.add_argument(
        "--search",
        choices=("cached", "race"),
        default="cached",
        help="of the greedy methods; cached: exact; race: approximate, faster",
    )
    parser.add_argument(
        "--eval-datasets",
        nargs="+",
        default=["wikitext2", "alpaca"],
        metavar="TEXT",
        help="texts of the perplexities, as --cal-dataset; documents calibrated on are left out",
    )
    parser.add_argument(
        "--eval-nsamples",
        type=flags.positive,
        default=None,
        help="documents to draw from each of these; all when absent",
    )
    parser.add_argument(
        "--tasks",
        nargs="*",
        metavar="TASK",
        help="zero-shot tasks; none when empty",
        default=["piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge"],
    )
    parser.add_argument(
        "--task-ratios",
        nargs="+",
        type=flags.fraction,
        default=None,
        metavar="R",
        help="ratios at which tasks are run; all when absent",
    )
    parser.add_argument("--task-data", default=None, help="folder with the five tasks' .jsonl files; else the hub")
    parser.add_argument("--num-fewshot", type=flags.count, default=0, help="examples in each task's prompt")
    parser.add_argument("--batch-size", type=flags.positive, default=1, help="requests per forward in tasks")
    parser.add_argument(
        "--limit",
        nargs="+",
        metavar="[NAME=]N",
        type=flags.limit,
        default=[],
        help="first N windows and items only, or N of one text or task; labelled",
    )
    parser.add_argument("--measure", action="store_true", help="also how many times faster than the dense model")
    parser.add_argument("--output-dir", default="results/compare", help="folder of everything; made when missing")
    args = parser.parse_args(argv)
    args.limit, args.ppl_eval_batch_size = dict(args.limit), flags.search_batch_size(args)
    args.ratios = sorted(set(args.ratios))
    if not args.model_path:
        parser.error("--model-path is missing: give a hub id, a local folder or a .gguf file")
    unknown = set(args.task_ratios or ()) - set(args.ratios)
    if unknown:
        parser.error(f"--task-ratios {unknown.pop():g}: not among --ratios {' '.join(f'{r:g}' for r in args.ratios)}")
    return parser, args


def method(name):
    """argparse type: a key of METHODS; NAME-layer is NAME."""
    plain = name.removesuffix("-layer")
    if plain not in METHODS:
        raise argparse.ArgumentTypeError(f"{name!r} is no method; use some of {', '.join(METHODS)}")
    return plain


def main(argv=None):
    parser, args = parse_args(argv)
    with contextlib.ExitStack() as stack:
        compare(parser, args, stack)


def compare(parser, args, stack):
    start = time.perf_counter()
    with parser.user_errors():  # everything that can fail fails before weights are read
        bench = open_bench(args, stack)

    from lib.cells import fill
    from lib.files import to_json
    from lib.model import dtype_note

    cells, summary = list_cells(args), describe(args, bench)
    print("\n".join(caption(summary)))
    if note := dtype_note(args.device, args.compute_dtype):
        print(f"note          {note}")
    print(f"cells         {len(cells)} -> {bench.folder}", flush=True)

    losses, measured, whole = {}, 0, rows_there(bench, summary)
    for k, cell in enumerate(cells, 1):
        row, losses[cell], new = fill(bench, cell)
        summary["rows"].append(row)
        if row["incomplete"]:
            summary["reduced"].append(f"INCOMPLETE: {cell} at {row['ratio']:g} %: {row['incomplete']}")
        measured += new
        finish(args, bench, summary, losses, whole)
        print(f"{k:4d}/{len(cells)}  {told(cell, row, new)}", flush=True)
    summary["seconds"] = time.perf_counter() - start
    page = write_tables(bench, summary)
    failed = sum(bool(row["failed"] or row["incomplete"]) for row in summary["rows"])
    print(
        to_json(
            {
                "result": str(bench.folder / "compare.json"),
                "page": page and str(page),
                "cells": len(cells),
                "failed": failed,
                "measurements": measured,
                "reduced": summary["reduced"],
                "seconds": summary["seconds"],
            }
        )
    )
    if failed:
        sys.exit(1)


# ---- before the cells ----------------------------------------------------------------------------


def open_bench(args, stack):
    """Return the Bench of these flags; raise ValueError for whatever cannot work, before weights are read.

    What lies in --output-dir is this process's until `stack` is closed.
    """
    from lib.cells import Bench, Tasks
    from lib.data import check_dataset
    from lib.decoder import find_layers
    from lib.files import expand, own
    from lib.hub import fingerprint
    from lib.job import Settings
    from lib.model import parameter_count

    for name in args.eval_datasets:
        check_dataset(name, None, args.data_dir, held_out=True)
    flags.check_folder(args.output_dir, "--output-dir")
    result = expand(args.output_dir) / "compare.json"
    flags.check_file(result, "--output-dir", kind="compare")
    flags.note(stack.enter_context(own(result)))
    texts = [text_name(dataset) for dataset in dict.fromkeys(args.eval_datasets)]
    twice = [name for name in texts if texts.count(name) > 1]
    if twice:
        raise ValueError(f"--eval-datasets: two files are called {twice[0]}; the table needs another name for one")
    if args.tasks:
        flags.check_tasks(args)
    names = {None, *args.tasks, *texts}
    unknown = [name for name in args.limit if name not in names]
    if unknown:
        raise ValueError(f"--limit {unknown[0]}=...: neither among --tasks nor --eval-datasets")
    bare = flags.open_bare(args)
    find_layers(bare)
    tokenizer = flags.open_tokenizer(args)
    draws, texts = read_texts(args, tokenizer, bare)
    decoder = flags.open_decoder(args, *(text.windows for text in (*draws.values(), *texts)))
    return Bench(
        Settings(
            args.model_path,
            seed=next(iter(draws)),
            batch_size=args.ppl_eval_batch_size,
            dtype=args.compute_dtype,
            device=args.device,
            search=args.search,
        ),
        decoder,
        tokenizer,
        next(iter(draws.values())),
        texts,
        parameters=parameter_count(decoder.model),
        weights=fingerprint(args.model_path),
        folder=Path(args.output_dir).expanduser(),
        tasks=Tasks(args.tasks, args.task_ratios, args.task_data, args.num_fewshot, args.batch_size, args.limit),
        speed=args.measure,
        say=lambda cell, line: print(f"          {cell!s:22s} {line.strip()}", flush=True),
        found={},
        draws=draws if len(draws) > 1 else {},
    )


def read_texts(args, tokenizer, bare):
    """Return ({seed: calibration Text}, evaluation Texts); what is calibrated on is left out of the latter."""
    from lib import data
    from lib.families import needs_bos

    bos = data.resolve_bos(args.bos, tokenizer, needs_bos(bare))
    chat = tokenizer if args.chat_template else None

    def cut(dataset, corpus, documents, **more):
        text = data.as_text(dataset, corpus, documents, tokenizer, args.ppl_eval_seqlen, bos=bos, **more)
        flags.warn_of_text(dataset, text.about)
        return text._replace(name=text_name(dataset))

    with flags.naming_text(args):
        corpus = data.load_documents(args.cal_dataset, args.cal_split, args.text_column, args.data_dir, chat=chat)
        draws, seen = {}, set()
        for seed in dict.fromkeys(args.cal_seeds or [args.seed]):
            drawn = data.draw(corpus, args.cal_nsamples, seed)
            draws[seed] = cut(args.cal_dataset, corpus, drawn, text_column=args.text_column, seed=seed)
            seen |= set(drawn)
    texts = []
    for dataset in dict.fromkeys(args.eval_datasets):
        column = args.text_column if dataset == args.cal_dataset else None
        other = data.load_documents(dataset, None, column, args.data_dir, held_out=True)
        documents, left_out = other.documents, None
        if data.same_origin(other, corpus):
            documents = [document for document in other.documents if document not in seen]
            left_out = len(other.documents) - len(documents)
            if not documents:
                raise ValueError(f"--eval-datasets {dataset}: calibration takes all of it; lower --cal-nsamples")
        if args.eval_nsamples:
            documents = data.sample_documents(documents, min(args.eval_nsamples, len(documents)), args.seed)
        limit = args.limit.get(text_name(dataset), args.limit.get(None))
        texts.append(cut(dataset, other, documents, limit=limit, text_column=column))
        texts[-1].about["left_out"] = left_out
    return draws, texts


def text_name(dataset):
    """Return a text's name in the table: a file's own, without the ending."""
    from lib.records import short_name

    return Path(dataset).stem if Path(dataset).is_file() else short_name(dataset)


def list_cells(args):
    """Return the Cells, the dense model first, a method's largest ratio first: smaller ones are parts of its order."""
    from lib.cells import Cell

    cells, draws = [Cell("dense", 0.0)], dict.fromkeys(args.cal_seeds)
    draws = draws if len(draws) > 1 else (None,)
    for name in dict.fromkeys(args.methods):
        drawn = [(seed, None) for seed in dict.fromkeys(args.seeds)] if name in SEEDED else [(None, k) for k in draws]
        cells += [Cell(name, ratio, *seeds) for seeds in drawn for ratio in reversed(args.ratios)]
    return cells


# ---- from cells to the table ---------------------------------------------------------------------


def finish(args, bench, summary, losses, whole=0):
    """Put perplexities and their errors into the rows so far, and write compare.json."""
    from lib.evaluate import paired_difference, perplexity
    from lib.schema import write

    rows = list(zip(losses, summary["rows"], strict=True))
    for text in bench.texts:
        T = args.ppl_eval_seqlen
        good = {cell: losses[cell][text.name] for cell, row in rows if row["failed"] is None}
        dense = next((losses[cell].get(text.name) for cell in losses if not cell.ratio), None)
        for cell, row in rows:
            if row["failed"] is None:
                mine = good[cell]
                base, value, error = dense if cell.ratio else 0 * mine, perplexity(mine, T), None
                if base is not None:
                    _, error = paired_difference(mine, base, T)
                error = None if error is None else value * error
                row["perplexity"][text.name] = {"value": value, "error": error, "level": False}
        for ratio in {cell.ratio for cell, _ in rows if cell.ratio}:
            alike = {cell: row for cell, row in rows if cell.ratio == ratio and cell in good}
            single = {cell: row for cell, row in alike.items() if not several(args, cell)}
            values = {cell: row["perplexity"][text.name]["value"] for cell, row in single.items()}
            best = min((cell for cell in values if math.isfinite(values[cell])), key=values.get, default=None)
            for cell, row in single.items():
                if best is not None and cell != best:
                    difference, error = paired_difference(good[cell], good[best], T)
                    behind = {"nats": difference, "error": error, "best": str(best)}
                    row["perplexity"][text.name] |= {"behind_best": behind}
                    row["perplexity"][text.name]["level"] = error is not None and difference <= 2 * error
    if len(summary["rows"]) >= whole:  # what a run before had finished is not replaced by less
        write(bench.folder / "compare.json", "compare", summary)


def rows_there(bench, summary):
    """Return how many rows compare.json has, where it is of the same settings; else 0."""
    from lib.files import to_json
    from lib.schema import read

    with contextlib.suppress(ValueError):
        there = read(bench.folder / "compare.json", "compare")
        if all(there.get(key) == json.loads(to_json(summary[key])) for key in ("weights", "settings", "texts")):
            return len(there["rows"])
    return 0


def several(args, cell):
    """Whether a cell is one of several draws, of which the table shows the mean."""
    return cell.draw is not None or (cell.seed is not None and len(set(args.seeds)) > 1)


def describe(args, bench):
    """Return the summary before the first row."""
    from lib.model import versions

    settings = {
        "methods": {name: METHODS[name].about for name in dict.fromkeys(args.methods)},
        "ratios": args.ratios,
        "seeds": args.seeds,
        "seed": args.seed,
        "cal_seeds": args.cal_seeds,
        "search": args.search,
        "batch_size": args.ppl_eval_batch_size,
        "dtype": args.compute_dtype,
        "device": args.device,
        "calibration": {"name": bench.calibration.name, **bench.calibration.about},
        "tasks": args.tasks,
        "task_ratios": args.task_ratios,
        "num_fewshot": args.num_fewshot,
        "limit": {str(name or "all"): n for name, n in args.limit.items()},
    }
    reduced = [f"NOT A RESULT, --limit: {' '.join(f'{k}={v}' for k, v in settings['limit'].items())}"]
    reduced = reduced if args.limit else []
    for name, text in (("calibration", bench.calibration), *((text.name, text) for text in bench.texts)):
        if len(text.windows) < FEW:
            reduced.append(f"FEW WINDOWS: {name} is {len(text.windows)} windows of {text.windows.shape[1]} tokens")
    return {
        "kind": "compare",
        "model": args.model_path,
        "layers": bench.decoder.n_layers,
        "parameters": bench.parameters,
        "weights": bench.weights,
        "reduced": reduced,
        "settings": settings,
        "texts": {text.name: text.about for text in bench.texts},
        "versions": versions(),
        "rows": [],
    }


def caption(summary):
    """Return lines that say what the numbers are numbers of."""
    settings = summary["settings"]

    def text(name, about):
        left = f", {about['left_out']} calibrated on left out" if about.get("left_out") else ""
        return (
            f"{about['documents']:,} documents of {about['source']} ({about['split'] or 'whole file'}{left}), "
            f"{about['windows']} windows of {about['seqlen']} = {about['tokens']:,} tokens"
        )

    lines = [
        f"model         {summary['model']}: {summary['parameters']:,} parameters, {summary['layers']} layers",
        f"compute       {settings['device']}, {settings['dtype']}, search {settings['search']}",
        f"calibration   {text(settings['calibration']['name'], settings['calibration'])}",
        *(f"{name:13s} {text(name, about)}" for name, about in summary["texts"].items()),
    ]
    if settings["tasks"]:
        lines.append(f"tasks         {' '.join(settings['tasks'])}, {settings['num_fewshot']} examples in the prompt")
    return lines + summary["reduced"]


def told(cell, row, new):
    """Return a line about a finished cell."""
    if row["failed"] is not None:
        return f"{cell!s:22s} {row['ratio']:5.4g} %  failed: {row['failed']}"
    numbers = [f"{name} {p['value']:.4f}" for name, p in row["perplexity"].items()]
    numbers += [f"{name} {100 * task['score']:.2f}" for name, task in row["tasks"].items()]
    if row["incomplete"]:
        numbers.append(f"failed: {row['incomplete']}")
    kept = "" if new else "  (kept)"
    return (
        f"{cell!s:22s} {row['ratio']:5.4g} %  {len(row['removed']):3d} blocks, {row['removed_percent']:6.2f} %  "
        f"{'  '.join(numbers)}{kept}"
    )


def write_tables(bench, summary):
    """Write and print the table, then draw the page; return the page's path, None where it cannot be drawn."""
    from lib.files import write_file
    from lib.report import tables
    from lib.report.page import write_report
    from lib.schema import write

    table, lines = tables.results_table(summary["rows"]), caption(summary)
    markdown = f"{tables.markdown(table)}\n{tables.LEGEND}\n"
    write(bench.folder / "compare.json", "compare", summary)
    write_file(bench.folder / "table.md", ("".join(f"    {line}\n" for line in lines) + "\n" + markdown).encode())
    comments = "".join(f"% {line}\n" for line in [*lines, tables.LEGEND])
    write_file(bench.folder / "table.tex", (comments + tables.latex(table)).encode())
    print(f"\n{markdown}")
    try:
        return write_report([bench.folder / "compare.json"], bench.folder)[0]
    except ImportError:
        print("note          no page: pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    ending.run(main)
