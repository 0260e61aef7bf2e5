"""The cells of the table of methods: what one removes at a ratio, and what is measured of the rest, kept in a file.

A cell's file is named by a hash of all that decides what is removed, and holds every measurement under a key that says
on what exactly; whatever is there is not computed again, nor what another cell without the same blocks holds. The
orders that the methods write are lib.job's.

    row, losses, new = fill(bench, Cell("sleb", 0.2))
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from lib import edits, laco
from lib.blocks import Block, blocks_of, parse_block
from lib.candidates import candidates
from lib.data import Text
from lib.decoder import Decoder
from lib.evaluate import perplexity, window_losses
from lib.files import NotWritten
from lib.job import Settings, check_decoder, open_job, refinements, steps, told, told_swap
from lib.measure import cache_without, generate, interleaved, spread
from lib.methods import LACO_WINDOWS, METHODS, settings_for
from lib.orders import passes_in
from lib.repair.scale import folded
from lib.schema import read, write
from lib.tasks import rows_key, zero_shot

PROMPT, NEW, REPEATS = 512, 32, 5  # of the speed: tokens read and written, turns taken
SPEED = f"speed {PROMPT} + {NEW} tokens"


class Cell(NamedTuple):
    """A cell of the table: a method at a ratio, 0 being the dense model; seed: of methods that draw, else None; draw:
    the key of the calibration text among several, else None."""

    method: str
    ratio: float
    seed: int | None = None
    draw: int | None = None

    def __str__(self):
        return self.method + "".join(
            f" {what} {n}" for what, n in (("seed", self.seed), ("draw", self.draw)) if n is not None
        )


class Tasks(NamedTuple):
    """Zero-shot tasks: their names; the ratios at which they are run, None for all; the rest as lib.tasks.zero_shot has
    it, limit being {task, or None for all others: rows}."""

    names: tuple = ()
    ratios: tuple | None = None
    data: str | None = None
    num_fewshot: int = 0
    batch_size: int = 1
    limit: dict = {}

    def rows(self, task):
        """Return how many rows of a task are asked, None for all."""
        return self.limit.get(task, self.limit.get(None))


class Bench(NamedTuple):
    """What all cells share. settings: those common to all methods; calibration: a Text; texts: those of the
    perplexities; parameters: of the dense model; weights: the checkpoint's fingerprint; speed: whether it is measured;
    say: called with each line about work in progress; found: {what is left: its measurements}, for methods that remove
    the same; draws: {seed: calibration Text} where cells are made for several."""

    settings: Settings
    decoder: Decoder
    tokenizer: object
    calibration: Text
    texts: list
    parameters: int
    weights: str
    folder: Path
    tasks: Tasks
    speed: bool
    say: Callable
    found: dict
    draws: dict = {}


def calibration_of(bench, cell):
    """Return the calibration Text of a cell."""
    return bench.calibration if cell.draw is None else bench.draws[cell.draw]


def fill(bench, cell):
    """Return (row of lib.report.tables, {text: loss sums}, how many measurements were made now) of a cell.

    Whatever a cell meets, its file included, becomes the row's failure: the other cells go on. Raises NotWritten where
    nothing can be kept.
    """
    kept, new, failed = {"measured": {}, "seconds": {}}, 0, None
    try:
        path, kept = open_cell(bench, cell)
        wanted = measurements(bench, cell)
        if "removed" not in kept:
            start = time.perf_counter()
            kept |= remove(bench, cell)
            kept["seconds"]["removal"] = time.perf_counter() - start
            write(path, "cell", kept)
        same = bench.found.setdefault(json.dumps([sorted(kept["removed"]), kept.get("merged"), kept.get("passes")]), {})
        if copied := {key: same[key] for key in wanted if key in same and key not in kept["measured"]}:
            kept["measured"] |= copied
            write(path, "cell", kept)
        missing = [key for key in wanted if key not in kept["measured"]]
        with weights_of(bench, kept) if missing else contextlib.nullcontext():
            for key in missing:
                start = time.perf_counter()
                try:
                    kept["measured"][key] = wanted[key](removed_blocks(kept))
                except NotWritten:
                    raise
                except Exception as error:  # the other measurements go on, and are kept
                    failed = failed or reason(error)
                    continue
                kept["seconds"][key] = time.perf_counter() - start
                write(path, "cell", kept)
                new += 1
        same |= kept["measured"]
    except NotWritten:
        raise
    except Exception as error:
        failed = reason(error)
    return row_of(bench, cell, kept, failed), losses_of(bench, kept), new


def reason(error):
    """Return one line about an exception."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def open_cell(bench, cell):
    """Return (path, content) of the file that keeps a cell; its name holds a hash of all that decides the removals."""
    deciding = {"method": cell.method, "ratio": cell.ratio, "seed": cell.seed, **shared(bench, cell)}
    if cell.ratio:
        method = METHODS[cell.method]
        deciding |= {"changes": method.changes} if method.variant is None else {"laco": [method.variant, LACO_WINDOWS]}
    name = f"{str(cell).replace(' ', '_')}_{cell.ratio:g}_{digest(deciding)}.json"
    path = bench.folder / "cells" / name
    if not path.exists():
        settings = {**deciding, "model": bench.settings.model, "weights": bench.weights}
        return path, {"settings": settings, "measured": {}, "seconds": {}}
    try:
        return path, read(path, "cell")
    except ValueError as error:
        raise ValueError(f"{error}; remove it, and this cell is measured again") from None


def shared(bench, cell):
    """Return what decides the removals of all cells. A model is known by its weights, however it is spelled."""
    s = bench.settings
    model = bench.weights if bench.weights != "not cached" else s.model
    return {
        "model": model,
        **{key: getattr(s, key) for key in ("dtype", "device", "search", "batch_size")},
        "calibration": calibration_of(bench, cell).about["text_sha256"],
    }


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def remove(bench, cell):
    """Return what a cell removes: {"removed", "order_file"}."""
    if not cell.ratio:
        return {"removed": [], "order_file": None}
    if METHODS[cell.method].variant is not None:
        return merge(bench, cell)
    seed = cell.draw if cell.seed is None else cell.seed
    settings = settings_for(cell.method, bench.settings, cell.ratio, seed)
    folder = bench.folder / "orders" / digest(shared(bench, cell)) / cell.method
    text = calibration_of(bench, cell)
    job = open_job(settings, text, bench.decoder.model, folder)
    if not job.finished:
        check_decoder(job, bench.decoder)
        for unit, step in steps(job, bench.decoder, dense_perplexity(bench, text)):
            for line in told(job, unit, step):
                bench.say(cell, line)
        for swap in refinements(job, bench.decoder):
            bench.say(cell, told_swap(job, swap))
    kept = {"removed": [str(block) for block in job.removed], "order_file": str(job.path.relative_to(bench.folder))}
    return kept | ({"passes": job.meta["passes"]} if settings.passes != "nothing" else {})


def merge(bench, cell):
    """Return what a cell of LaCo holds: {"removed", "order_file", "merged": the layers that are left, "laco": how}.

    As many layers go as the ratio takes, in the largest merges of 4, 3 or 2 layers that reach just that. States are
    compared on the first LACO_WINDOWS windows of the calibration text.
    """
    decoder = bench.decoder
    laco.check_mergeable(decoder)
    n = candidates(decoder.layers, bench.parameters, "layer", ratio=cell.ratio, first=1, consecutive=True).window
    for C in laco.merge_sizes(n):
        try:
            found = laco.collapse(
                decoder,
                calibration_of(bench, cell).windows[:LACO_WINDOWS],
                C,
                variant=METHODS[cell.method].variant,
                remove=n,
                batch_size=bench.settings.batch_size,
            )
            break
        except ValueError as error:  # smaller merges may reach it
            reason = error
    else:
        raise reason
    left, gone = list(range(decoder.n_layers)), []
    for place, similarity in found.merges:  # places are those among the layers left
        bench.say(cell, f"layers {place}..{place + C - 1} of what was there merged, similarity {similarity:.4f}")
        gone += left[place + 1 : place + C]
        del left[place + 1 : place + C]
    removed = [str(block) for block in blocks_of(Block("layer", i) for i in gone)]
    how = {"merge_layers": C, "threshold": found.threshold, "merges": found.merges}
    return {"removed": removed, "order_file": None, "merged": found.layers, "laco": how}


def weights_of(bench, kept):
    """Return a context in which the model has a cell's weights: others where layers are merged, or blocks scale."""
    if kept.get("passes"):
        return edits.replaced(bench.decoder, folded(bench.decoder, removed_blocks(kept), passes_in(kept)))
    if not kept.get("merged"):
        return contextlib.nullcontext()
    layers = [laco.Merged(base, tuple(map(tuple, weights))) for base, weights in kept["merged"]]
    return edits.replaced(bench.decoder, laco.edit(bench.decoder, layers))


def dense_perplexity(bench, text):
    """Return the dense model's perplexity on a calibration text, which its cell keeps."""
    sums = open_cell(bench, Cell("dense", 0.0))[1]["measured"].get(text_key(text))
    if sums is None:
        raise ValueError("the dense model could not be measured")
    return perplexity(loss_sums(sums), text.windows.shape[1])


def removed_blocks(kept):
    return [parse_block(name) for name in kept["removed"]]


def measurements(bench, cell):
    """Return {key: function of the removed blocks} of what a cell measures; a key says on what exactly."""
    decoder, tasks, wanted = bench.decoder, bench.tasks, {}
    calibrations = [] if cell.ratio else [bench.calibration, *bench.draws.values()]
    for text in (*calibrations, *bench.texts):
        wanted[text_key(text)] = lambda removed, text=text: window_losses(
            decoder, text.windows, bench.settings.batch_size, removed
        ).tolist()
    if not cell.ratio or tasks.ratios is None or cell.ratio in tasks.ratios:
        for task in tasks.names:
            wanted[task_key(tasks, task)] = lambda removed, task=task: run_task(bench, task, removed)
    if bench.speed:
        wanted[SPEED] = lambda removed: run_speed(bench, removed)
    return wanted


def text_key(text):
    return f"losses {text.name} {text.about['text_sha256'][:12]}"


def task_key(tasks, task):
    return f"task {task} {rows_key(task, tasks.data)} limit {tasks.rows(task)} shots {tasks.num_fewshot}"


def run_task(bench, task, removed):
    tasks = bench.tasks
    with bench.decoder.masked(removed):
        return zero_shot(
            bench.decoder.model,
            bench.tokenizer,
            [task],
            batch_size=tasks.batch_size,
            num_fewshot=tasks.num_fewshot,
            limit=tasks.rows(task),
            task_data=tasks.data,
        )[task]


def run_speed(bench, removed):
    """Return how many times faster than the dense model a prompt is read and continued; both take turns."""
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


def losses_of(bench, kept):
    """Return {text: loss sums (N,), float64} of what is measured."""
    found = {text.name: kept["measured"].get(text_key(text)) for text in bench.texts}
    return {name: loss_sums(sums) for name, sums in found.items() if sums}


def loss_sums(sums):
    """Return loss sums as JSON has them, where "nan" is a string, as a tensor (N,), float64."""
    return torch.tensor([float(x) for x in sums], dtype=torch.float64)


def row_of(bench, cell, kept, failed):
    """Return the row of lib.report.tables; perplexities are put in later, which compare rows.

    A failure is the row's where a perplexity is missing; else it is `incomplete`, and what was measured is shown.
    """
    tasks, parameters = bench.tasks, bench.parameters
    whole = all(text_key(text) in kept["measured"] for text in bench.texts)
    incomplete, failed = (failed, None) if whole else (None, failed)
    row = {
        "method": cell.method,
        "label": cell.method,
        "ratio": 100 * cell.ratio,
        "seed": cell.draw if cell.seed is None else cell.seed,
        "removed": [],
        "removed_percent": None,
        "parameters": None,
        "perplexity": {},
        "tasks": {},
        "speed": None,
        "order_file": kept.get("order_file"),
        "laco": kept.get("laco"),
        "failed": failed,
        "incomplete": incomplete,
        "seconds": sum(kept["seconds"].values()),
    }
    if failed is None:
        gone = bench.decoder.block_parameters(removed_blocks(kept))
        found = {task: kept["measured"].get(task_key(tasks, task)) for task in tasks.names}
        row |= {
            "removed": kept["removed"],
            "parameters": parameters - gone,
            "removed_percent": 100 * gone / parameters,
            "speed": kept["measured"].get(SPEED) if bench.speed else None,
            "tasks": {task: score for task, score in found.items() if score},
        }
    return row
