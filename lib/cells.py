"""The cells of scripts.compare's table: what a method removes at a ratio, what is measured of the rest, kept in a file.

A cell's file is named by a hash of all that decides what is removed, and holds every measurement under a key that says
on what exactly; whatever is there is not computed again, nor what another cell without the same blocks holds. The
orders that the methods write are block_search.py's.

    row, losses, new = fill(bench, Job("sleb", 0.2, None))
"""

import contextlib
import hashlib
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

LACO_WINDOWS = 4  # its authors compare on a few sentences; bisecting its threshold on all windows takes hours

_ONCE = {  # method: metric, protected layers, what it is
    "ppl-oneshot": ("ppl-oneshot", (0, 0), "perplexity without the unit, judged once (Shortened LLaMA)"),
    "ppl-plus": ("ppl-oneshot", (4, 2), "ppl-oneshot, layers 0-3 and the last two kept (Shortened LLaMA, PPL+)"),
    "bi": ("bi", (0, 0), "block influence, 1 - cos of what enters and leaves (ShortGPT)"),
    "rm": ("rm", (0, 0), "relative magnitude of what the unit adds (Samragh et al.)"),
    "taylor": ("taylor", (0, 0), "sum of |weight x gradient| (Shortened LLaMA)"),
    "taylor-plus": ("taylor", (4, 2), "taylor, layers 0-3 and the last two kept (Shortened LLaMA, Taylor+)"),
    "magnitude": ("magnitude", (0, 0), "sum of |weight|"),
    "kl-oneshot": ("kl-oneshot", (0, 0), "divergence from the dense model without the unit, judged once"),
    "last": ("last", (0, 0), "from the top down, a baseline"),
    "random": ("random", (0, 0), "a draw, a baseline; mean over --seeds"),
}
# name: (flags of block_search.py, or of scripts.laco, what it is). What judges once removes whole layers under its
# own name, as published, and blocks as NAME-block.
METHODS = {
    "blockpruner": (["--metric", "ppl", "--block-type", "mix"], "the paper: greedy perplexity, all blocks"),
    "mha": (["--metric", "ppl", "--block-type", "mha"], "greedy perplexity, attention blocks only"),
    "mlp": (["--metric", "ppl", "--block-type", "mlp"], "greedy perplexity, MLP blocks only"),
    "sleb": (["--metric", "ppl", "--block-type", "layer"], "greedy perplexity, layers (SLEB)"),
    "kl": (["--metric", "kl", "--block-type", "mix"], "greedy divergence from the dense model, all blocks (EvoPress)"),
    **{
        f"{name}{suffix}": (
            ["--metric", metric, "--block-type", kind, "--protect-first", str(first), "--protect-last", str(last)],
            f"{what}: {about}",
        )
        for name, (metric, (first, last), about) in _ONCE.items()
        for suffix, kind, what in (("", "layer", "layers"), ("-block", "mix", "blocks"))
    },
    "angular": (["--metric", "angular", "--block-type", "layer"], "consecutive layers, angle (Gromov et al.)"),
    "window_ppl": (["--metric", "window_ppl", "--block-type", "layer"], "consecutive layers, perplexity (Quark)"),
    "window_cos": (["--metric", "window_cos", "--block-type", "layer"], "consecutive layers, cos (LLM-Streamline)"),
    "laco": (["--variant", "paper"], f"layers merged by differences, judged on {LACO_WINDOWS} windows (LaCo)"),
    "laco-last": (["--variant", "last"], f"layers merged, topmost stays, {LACO_WINDOWS} windows (LaCo's notebook)"),
}
SEEDED = ("random", "random-block")
MERGED = ("laco", "laco-last")
GREEDY = ("blockpruner", "mha", "mlp", "sleb", "kl")

PROMPT, NEW, REPEATS = 512, 32, 5  # of --measure: tokens read and written, turns taken
SPEED = f"speed {PROMPT} + {NEW} tokens"


class Text(NamedTuple):
    """Windows (N, T) of a text, and what result files say about them."""

    name: str
    windows: object
    about: dict


class Job(NamedTuple):
    """A cell of the table: a method at a ratio, 0 being the dense model; seed: of methods that draw, else None."""

    method: str
    ratio: float
    seed: int | None

    def __str__(self):
        return self.method if self.seed is None else f"{self.method} seed {self.seed}"


class Bench(NamedTuple):
    """What all cells share. calibration: a Text; corpus: where it is from; texts: those of the perplexities;
    parameters: their number; weights: the checkpoint's fingerprint; found: {what is left: its measurements}, for
    methods that remove the same."""

    args: object
    decoder: object
    tokenizer: object
    corpus: object
    calibration: Text
    texts: list
    parameters: int
    weights: str
    found: dict

    @property
    def folder(self):
        return Path(self.args.output_dir).expanduser()


def fill(bench, job):
    """Return (row of lib.tables, {text: loss sums}, how many measurements were made now) of a cell."""
    from lib.files import write_json

    path, cell = open_cell(bench, job)
    wanted, new, failed = measurements(bench, job), 0, None
    try:
        if "removed" not in cell:
            start = time.perf_counter()
            cell |= remove(bench, job)
            cell["seconds"]["removal"] = time.perf_counter() - start
            write_json(path, cell)
        same = bench.found.setdefault(json.dumps([sorted(cell["removed"]), cell.get("merged")]), {})
        if copied := {key: same[key] for key in wanted if key in same and key not in cell["measured"]}:
            cell["measured"] |= copied
            write_json(path, cell)
        missing = [key for key in wanted if key not in cell["measured"]]
        with weights_of(bench, cell) if missing else contextlib.nullcontext():
            for key in missing:
                start = time.perf_counter()
                try:
                    cell["measured"][key] = wanted[key](removed_blocks(cell))
                except Exception as error:  # the other measurements go on, and are kept
                    failed = failed or reason(error)
                    continue
                cell["seconds"][key] = time.perf_counter() - start
                write_json(path, cell)
                new += 1
        same |= cell["measured"]
    except Exception as error:  # whatever a cell meets, the other cells go on, and the table says what it was
        failed = reason(error)
    return row_of(bench, job, cell, failed), losses_of(bench, cell), new


def reason(error):
    """Return one line about an exception."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def open_cell(bench, job):
    """Return (path, content) of the file that keeps a cell; its name holds a hash of all that decides the removals."""
    settings = {
        **cell_settings(bench),
        "method": job.method,
        "ratio": job.ratio,
        "seed": job.seed,
        "flags": METHODS[job.method][0] if job.ratio else [],
    }
    if job.method in MERGED:
        settings["windows"] = LACO_WINDOWS
    deciding = dict(settings)
    if bench.weights != "not cached":
        del deciding["model"]  # known by its weights, however it is spelled
    name = f"{str(job).replace(' ', '_')}_{job.ratio:g}_{digest(deciding)}.json"
    path = bench.folder / "cells" / name
    try:
        return path, json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); remove it, and this cell is measured again") from None
    return path, {"settings": settings, "measured": {}, "seconds": {}}


def cell_settings(bench):
    """Return the settings that decide which blocks go, and with which numbers."""
    args = bench.args
    return {
        "model": args.model_path,
        "weights": bench.weights,
        "dtype": args.compute_dtype,
        "device": args.device,
        "search": args.search,
        "batch_size": args.ppl_eval_batch_size,
        "calibration": bench.calibration.about,
    }


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def remove(bench, job):
    """Return what a cell removes: {"removed", "order_file"}."""
    if not job.ratio:
        return {"removed": [], "order_file": None}
    if job.method in MERGED:
        return merge(bench, job)
    import block_search
    from lib import candidates, orders

    args = block_search.parse_args(search_flags(bench, job))[1]
    plan = candidates.candidates(
        bench.decoder.layers,
        bench.parameters,
        args.block_type,
        0,
        args.target_ratio,
        args.protect_first,
        args.protect_last,
        consecutive=args.metric in block_search.WINDOWS,
    )
    path = orders.order_path(
        args.ppl_search_path,
        args.model_path,
        args.block_type,
        args.cal_dataset,
        args.cal_nsamples,
        block_search.metric_name(args, plan),
    )
    fresh = block_search.describe(args, bench.corpus, bench.calibration.windows, plan)
    order, meta = block_search.resume(path, fresh, overwrite=False)
    if not plan.enough(order):
        if args.metric not in block_search.GREEDY:  # judged at once: nothing to continue
            order, meta = [], fresh
        meta["dense_perplexity"] = calibration_perplexity(bench)
        block_search.extend(args, plan, bench.decoder, bench.calibration.windows, path, order, meta, Printer(job))
    order = order[: plan.enough(order)]
    return {"removed": [str(block) for block in order], "order_file": str(path.relative_to(bench.folder))}


def merge(bench, job):
    """Return what a cell of LaCo holds: {"removed", "order_file", "merged": the layers that are left, "laco": how}.

    As many layers go as the ratio takes, in the largest merges of 4, 3 or 2 layers that reach just that. States are
    compared on the first LACO_WINDOWS windows of the calibration text.
    """
    from lib import candidates, laco
    from lib.blocks import Block, blocks_of

    args, decoder = bench.args, bench.decoder
    laco.check_mergeable(decoder)
    n = candidates.candidates(
        decoder.layers, bench.parameters, "layer", ratio=job.ratio, first=1, consecutive=True
    ).window
    for C in laco.merge_sizes(n):
        try:
            found = laco.collapse(
                decoder,
                bench.calibration.windows[:LACO_WINDOWS],
                C,
                variant=METHODS[job.method][0][1],
                remove=n,
                batch_size=args.ppl_eval_batch_size,
            )
            break
        except ValueError as error:  # smaller merges may reach it
            reason = error
    else:
        raise reason
    left, gone = list(range(decoder.n_layers)), []
    for place, similarity in found.merges:  # places are those among the layers left
        Printer(job).write(f"layers {place}..{place + C - 1} of what was there merged, similarity {similarity:.4f}")
        gone += left[place + 1 : place + C]
        del left[place + 1 : place + C]
    removed = [str(block) for block in blocks_of(Block("layer", i) for i in gone)]
    how = {"merge_layers": C, "threshold": found.threshold, "merges": found.merges}
    return {"removed": removed, "order_file": None, "merged": found.layers, "laco": how}


def weights_of(bench, cell):
    """Return a context in which the model has the weights of a cell: other ones where layers are merged."""
    if not cell.get("merged"):
        return contextlib.nullcontext()
    from lib import edits, laco

    layers = [laco.Merged(base, tuple(map(tuple, weights))) for base, weights in cell["merged"]]
    return edits.replaced(bench.decoder, laco.edit(bench.decoder, layers))


class Printer:
    """Stands for block_search.py's progress bar: prints the lines of finished steps."""

    def __init__(self, job):
        self.job = job

    def advance(self, block, windows, score):
        pass

    def done(self, windows):
        pass

    def write(self, line):
        print(f"          {self.job!s:22s} {line.strip()}", flush=True)


def calibration_perplexity(bench):
    """Return the dense model's perplexity on the calibration text, which its cell keeps."""
    from lib.evaluate import perplexity

    sums = open_cell(bench, Job("dense", 0.0, None))[1]["measured"].get(text_key(bench.calibration))
    if sums is None:
        raise ValueError("the dense model could not be measured")
    return perplexity(torch_sums(sums), bench.args.ppl_eval_seqlen)


def search_flags(bench, job):
    """Return the command line of block_search.py that writes a cell's order."""
    args = bench.args
    folder = bench.folder / "orders" / digest(cell_settings(bench)) / job.method
    words = [
        "--model-path",
        args.model_path,
        "--device",
        args.device,
        "--compute-dtype",
        args.compute_dtype,
        "--cal-dataset",
        args.cal_dataset,
        "--cal-nsamples",
        args.cal_nsamples,
        "--ppl-eval-seqlen",
        args.ppl_eval_seqlen,
        "--ppl-eval-batch-size",
        args.ppl_eval_batch_size,
        "--seed",
        args.seed if job.seed is None else job.seed,
        "--ppl-search-path",
        folder,
        "--target-ratio",
        job.ratio,
        *METHODS[job.method][0],
    ]
    if job.method in GREEDY:
        words += ["--search", args.search]
    for name in ("cal_split", "text_column", "data_dir"):
        if getattr(args, name) is not None:
            words += ["--" + name.replace("_", "-"), getattr(args, name)]
    return list(map(str, words))


def removed_blocks(cell):
    from lib.blocks import parse_block

    return [parse_block(name) for name in cell["removed"]]


def measurements(bench, job):
    """Return {key: function of the removed blocks} of what a cell measures; a key says on what exactly."""
    from lib.evaluate import window_losses

    args, decoder, wanted = bench.args, bench.decoder, {}
    for text in (bench.calibration, *bench.texts) if not job.ratio else bench.texts:
        wanted[text_key(text)] = lambda removed, text=text: window_losses(
            decoder, text.windows, args.ppl_eval_batch_size, removed
        ).tolist()
    if not job.ratio or job.ratio in (args.task_ratios or args.ratios):
        for task in args.tasks:
            wanted[task_key(args, task)] = lambda removed, task=task: run_task(bench, task, removed)
    if args.measure:
        wanted[SPEED] = lambda removed: run_speed(bench, removed)
    return wanted


def text_key(text):
    return f"losses {text.name} {text.about['text_sha256'][:12]}"


def task_key(args, task):
    rows = "hub"
    if args.task_data is not None:
        rows = hashlib.sha256((Path(args.task_data).expanduser() / f"{task}.jsonl").read_bytes()).hexdigest()[:12]
    return f"task {task} {rows} limit {args.limit.get(task, args.limit.get(None))} shots {args.num_fewshot}"


def run_task(bench, task, removed):
    from lib.tasks import zero_shot

    args = bench.args
    most = args.limit.get(task, args.limit.get(None))
    with bench.decoder.masked(removed):
        return zero_shot(
            bench.decoder.model, bench.tokenizer, [task], args.batch_size, args.num_fewshot, most, args.task_data
        )[task]


def run_speed(bench, removed):
    """Return how many times faster than the dense model a prompt is read and continued; both take turns."""
    from lib.measure import cache_without, generate, interleaved, spread

    decoder = bench.decoder
    most = getattr(decoder.model.config, "max_position_embeddings", None) or math.inf
    ids = bench.calibration.windows[:1, : min(PROMPT, most - NEW)].to(decoder.input_device)

    def run(blocks):
        with decoder.masked(blocks):
            return generate(decoder.model, ids, NEW, cache_without(decoder.model.config, blocks))

    runs = interleaved({"dense": lambda: run(()), "pruned": lambda: run(removed)}, REPEATS)

    def times(seconds):
        return spread([getattr(a, seconds) / getattr(b, seconds) for a, b in zip(*runs.values(), strict=True)]).median

    return {"prefill x": times("prefill_seconds"), "decode x": times("decode_seconds")}


def losses_of(bench, cell):
    """Return {text: loss sums (N,), float64} of what is measured."""
    found = {text.name: cell["measured"].get(text_key(text)) for text in bench.texts}
    return {name: torch_sums(sums) for name, sums in found.items() if sums}


def torch_sums(sums):
    """Return loss sums as JSON has them, where "nan" is a string, as a tensor (N,), float64."""
    import torch

    return torch.tensor([float(x) for x in sums], dtype=torch.float64)


def row_of(bench, job, cell, failed):
    """Return the row of lib.tables; perplexities are put in by finish.

    A failure is the row's where a perplexity is missing; else it is `incomplete`, and what was measured is shown.
    """
    args, parameters = bench.args, bench.parameters
    whole = all(text_key(text) in cell["measured"] for text in bench.texts)
    incomplete, failed = (failed, None) if whole else (None, failed)
    row = {
        "method": job.method,
        "label": job.method,
        "ratio": 100 * job.ratio,
        "seed": job.seed,
        "removed": [],
        "removed_percent": None,
        "parameters": None,
        "perplexity": {},
        "tasks": {},
        "speed": None,
        "order_file": cell.get("order_file"),
        "laco": cell.get("laco"),
        "failed": failed,
        "incomplete": incomplete,
        "seconds": sum(cell["seconds"].values()),
    }
    if failed is None:
        gone = bench.decoder.block_parameters(removed_blocks(cell))
        found = {task: cell["measured"].get(task_key(args, task)) for task in args.tasks}
        row |= {
            "removed": cell["removed"],
            "parameters": parameters - gone,
            "removed_percent": 100 * gone / parameters,
            "speed": cell["measured"].get(SPEED) if args.measure else None,
            "tasks": {task: score for task, score in found.items() if score},
        }
    return row
