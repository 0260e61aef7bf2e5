"""A search from its settings to the order file: plan and resume before any weight is read, save after every removal.

    job = open_job(Settings("models/Llama-2-7b-hf", number=17), text, skeleton(path), "ppls")
    if not job.finished:
        for unit, step in steps(job, Decoder(load_model(path)), dense=5.47):
            print(unit, step["perplexity"])

block_search.py and the cells of scripts.compare are the two callers.
"""

import hashlib
import math
import time
from pathlib import Path
from typing import NamedTuple

from lib.blocks import Block, blocks_of
from lib.candidates import Candidates, candidates, starts
from lib.data import Text
from lib.decoder import find_layers
from lib.engines import ENGINES
from lib.evaluate import perplexity
from lib.hub import fingerprint
from lib.importance import METRICS, ranked, require_weights
from lib.journal import Journal, Kept
from lib.model import parameter_count, versions
from lib.orders import check_order, order_path, read_order, save_order
from lib.ranks import Shared, first, join, shared_losses
from lib.search import CONFIDENCE, NoFiniteCandidate, greedy


class Settings(NamedTuple):
    """With the text, all that decides an order.

    model: path or hub id. metric: a key of lib.importance.METRICS. block_type: "mix", "mha", "mlp" or "layer". number:
    blocks to remove; ratio: instead, the share of the parameters to reach. protect_first, protect_last: layers at the
    two ends that stay whole. seed: of metrics that draw. batch_size: windows per forward. dtype, device: of the model.
    search: "cached", "exhaustive" or "streamed", which are exact, or "race", which is not; race_confidence: see
    lib.search.race.
    """

    model: str
    metric: str = "ppl"
    block_type: str = "mix"
    number: int = 0
    ratio: float | None = None
    protect_first: int = 0
    protect_last: int = 0
    seed: int = 42
    batch_size: int = 8
    dtype: str = "bf16"
    device: str = "cpu"
    search: str = "cached"
    race_confidence: float = CONFIDENCE


# Facts of an order file that must be the same for it to be continued. Exact engines give the same order.
DECIDING = (
    "model metric block_type protect_first protect_last window dataset split text_column seed documents seqlen "
    "batch_size dtype device approximate race_confidence text_sha256 weights bos"
).split()
BEFORE = {"metric": "ppl", "protect_first": 0, "protect_last": 0, "approximate": False, "bos": "text"}  # of old files


class Taken(ValueError):
    """The order file is of another search, or no order file that can be continued."""


class Job(NamedTuple):
    """A search and how far it is. order: the removals made; meta: of the order file at `path`; both grow."""

    settings: Settings
    text: Text
    candidates: Candidates
    path: Path
    order: list
    meta: dict

    @property
    def searched(self):
        """Whether candidates are judged anew after each removal, so that an order can be continued."""
        return METRICS[self.settings.metric].kind == "searched"

    @property
    def finished(self):
        """How many of the removals made are as many as asked for, None where they are too few."""
        return self.candidates.enough(self.order)

    @property
    def evaluations(self):
        """How many passes of all windows are ahead, at most."""
        c, settings = self.candidates, self.settings
        if self.searched:
            return sum(len(c.units) - k for k in range(len(self.order) // c.size, c.most // c.size))
        passes = METRICS[settings.metric].passes
        if passes is None and c.window is not None:
            return len(starts(len(c.layers), c.window, settings.protect_first, settings.protect_last))
        return len(c.units) if passes is None else passes


def open_job(settings, text, bare, folder, overwrite=False, hold=None):
    """Return the Job of a search, resumed from the order file in `folder` where there is one.

    text: lib.data.Text. bare: the model, weights not needed. overwrite: forget the file that is there. hold: called
    with the file's path before it is read, such as lib.files.own. Raises Taken where it was made with other settings,
    ValueError where so much cannot be removed.
    """
    s = settings
    chosen = candidates(
        find_layers(bare),
        parameter_count(bare),
        s.block_type,
        number=s.number,
        ratio=s.ratio,
        first=s.protect_first,
        last=s.protect_last,
        consecutive=METRICS[s.metric].kind == "run",
    )
    name = s.metric if chosen.window is None else f"{s.metric}{chosen.window}"
    name = f"random{s.seed}" if s.metric == "random" else name  # draws and runs of other lengths lie beside each other
    path = order_path(folder, s.model, s.block_type, text.about["dataset"], text.about["documents"], name)
    meta = _describe(s, text, chosen)
    if path.is_dir():
        raise ValueError(f"{path}: a folder, where the order file belongs; move it, or give another folder")
    if hold and join()[0] == 0:
        hold(path)
    order, old = first(([], meta) if overwrite else _resume(path, meta))
    job = Job(s, text, chosen, path, order, old)
    if not job.searched and not job.finished:  # judged at once: nothing to continue
        job = job._replace(order=[], meta=meta)
    return job


def check_decoder(job, decoder):
    """Raise ValueError where the metric cannot work on a model as it is loaded: quantised, offloaded."""
    if decoder.offloaded and job.searched and job.settings.search != "streamed":
        raise ValueError(
            f"{job.settings.device}: the GPUs cannot hold the model, and layers in the host's memory would be moved "
            "for every candidate; a search that offloads moves each once for all (from a folder, not a .gguf)"
        )
    if weights := METRICS[job.settings.metric].weights:
        require_weights(decoder, job.candidates.units, job.settings.metric, inside=weights == "inside")


def steps(job, decoder, dense, cache_bytes=None, progress=None, check=None):
    """Yield (unit, step of the order file) for each removal, as soon as it is saved, until there are enough.

    dense: the model's perplexity on the text. cache_bytes: memory for kept states, see lib.engines.
    progress(windows, unit, score) is called as work gets done; check() after each batch of a candidate that the journal
    keeps, and may raise. What is judged at once is saved at the end. Raises NoFiniteCandidate, also kept in the file,
    where no candidate is left that can go. Of several processes (lib.ranks) the first one writes.
    """
    journal = Journal(job.path, journal_key(job), join()[0])
    try:
        yield from _steps(job, decoder, dense, cache_bytes, progress, check, journal)
    finally:
        journal.close()
    if join()[0] == 0:
        journal.remove()


def journal_key(job):
    """Return what tells the losses of this search from those of others."""
    decides = {key: job.meta.get(key) for key in DECIDING}
    return hashlib.sha256(repr(sorted(decides.items())).encode()).hexdigest()[:16]


def journaled(job):
    """Return how many batches of candidates of the next removal are computed and kept."""
    if not job.searched:
        return 0
    journal = Journal(job.path, journal_key(job))
    return journal.count(_units(job), job.settings.search == "race")


def _save(job):
    if join()[0] == 0:
        save_order(job.path, job.order, job.meta)


def _units(job):
    """Return the removals made as the search has them: blocks, or whole layers."""
    return job.order if job.candidates.size == 1 else [Block("layer", i) for _, i in job.order[:: job.candidates.size]]


def _steps(job, decoder, dense, cache_bytes, progress, check, journal):
    settings, order, meta = job.settings, job.order, job.meta
    total, seqlen = parameter_count(decoder.model), job.text.windows.shape[1]
    meta["dense_perplexity"] = dense
    try:
        for unit, step in _removals(job, decoder, cache_bytes, progress, check, journal):
            for block in blocks_of([unit]):  # a layer is two removals; what is known stands on the second
                order.append(block)
                rest = {"removed_percent": 100 * decoder.block_parameters(order) / total, "block": block}
                meta["steps"].append({"perplexity": None, "scores": {}, "seconds": 0.0} | rest)
            meta["steps"][-1] = step = step | rest
            if step["perplexity"] is None and (job.searched or job.finished):
                losses = shared_losses(decoder, job.text.windows, settings.batch_size, order)
                step["perplexity"] = perplexity(losses, seqlen)
            if job.searched:
                _save(job)
            yield unit, step
            if job.finished:
                break
    except NoFiniteCandidate as error:
        meta["failed"] = {"error": str(error), "candidates": error.scores}
        _save(job)
        raise
    if order and not job.searched:
        _save(job)


def summary(job):
    """Return what the order file holds of the removals asked for, as a dict."""
    order = job.order[: job.finished]
    known = job.meta["steps"][: len(order)]
    last = known[-1] if known else {"perplexity": job.meta["dense_perplexity"], "removed_percent": 0.0}
    return {
        "order_file": str(job.path),
        "order": [str(block) for block in order],
        "dense_perplexity": job.meta["dense_perplexity"],
        "perplexity": last["perplexity"],
        "removed_percent": last["removed_percent"],
        "seconds": sum(step["seconds"] for step in known),
    }


def _removals(job, decoder, cache_bytes, progress, check, journal):
    """Yield (unit, step) for every removal of the metric, until the caller has enough."""
    settings, c, windows = job.settings, job.candidates, job.text.windows
    metric, B, start = METRICS[settings.metric], settings.batch_size, time.perf_counter()
    if not c.most:
        return
    if job.searched:
        racing = settings.search == "race"
        options = {} if settings.search == "exhaustive" else {"cache_bytes": cache_bytes}
        made = ENGINES["cached" if racing else settings.search]
        engine = Shared(
            lambda some: made(decoder, c.units, some, B, metric.function, **options),
            windows,
            B,
            by_unit=racing,
            wrap=lambda engine: Kept(engine, journal, racing, check),
        )
        confidence = settings.race_confidence if racing else math.inf
        for step in greedy(engine, c.units, c.most // c.size, _units(job), confidence, progress):
            known = step._asdict()
            known = {"block": known.pop("block"), "perplexity": known.pop("score"), **known}
            yield step.block, known | ({} if settings.metric == "ppl" else {"score": step.score, "perplexity": None})
        return
    if metric.kind == "run":
        ends = {"first": settings.protect_first, "last": settings.protect_last}
        scores = metric.function(decoder, c.window, windows, batch_size=B, progress=progress, **ends)
        job.meta["window_scores"] = scores
        best = next(iter(ranked(scores)), None)
        units = [] if best is None else [Block("layer", i) for i in range(best, best + c.window)]
        value, first = dict.fromkeys(units, scores.get(best)), {}
    else:
        scores = metric.function(decoder, c.units, windows, batch_size=B, seed=settings.seed, progress=progress)
        units, value, first = ranked(scores), scores, scores
    seconds = time.perf_counter() - start
    for unit in units:
        yield unit, {"perplexity": None, "score": value[unit], "scores": first, "seconds": seconds}
        first, seconds = {}, 0.0
    raise NoFiniteCandidate({unit: score for unit, score in scores.items() if not math.isfinite(score)})


def _describe(settings, text, chosen):
    """Return the order file's meta before the first removal."""
    s, about, racing = settings, text.about, settings.search == "race"
    return {
        "model": s.model,
        "weights": fingerprint(s.model),
        "layers": len(chosen.layers),
        "metric": s.metric,
        "block_type": s.block_type,
        "protect_first": s.protect_first,
        "protect_last": s.protect_last,
        "window": chosen.window,
        **{key: about[key] for key in ("dataset", "source", "split", "text_column")},
        "seed": s.seed,
        **{key: about[key] for key in ("documents", "windows", "seqlen", "bos", "tokens")},
        "batch_size": s.batch_size,
        "text_sha256": about["text_sha256"],
        **({"chat_template": True} if about.get("chat_template") else {}),
        "dtype": s.dtype,
        "device": s.device,
        "engine": s.search if METRICS[s.metric].kind == "searched" else None,
        "approximate": racing,
        "race_confidence": s.race_confidence if racing else None,
        "versions": versions(),
        "steps": [],
    }


def _resume(path, meta):
    """Return (removals made, meta) of the order file at `path`, ([], meta) where there is none."""
    if not path.exists():
        return [], meta
    order, old = read_order(path)
    there = BEFORE | {"weights": meta["weights"]} | old  # old files do not name the weights
    same = {"model"} if old.get("weights") == meta["weights"] != "not cached" else set()  # however it is spelled
    same |= {"dataset", "split", "text_column"} if old.get("text_sha256") == meta["text_sha256"] else set()
    differ = [
        f"{key} {there.get(key)!r} there, {meta[key]!r} now"
        for key in DECIDING
        if key not in same and there.get(key) != meta[key]
    ]
    if differ:
        what = f"with other settings ({'; '.join(differ)})" if old else "and does not say how it was searched"
        raise Taken(f"{path}: exists {what}")
    check_order(order, meta["layers"], path, old)
    known, fields = old.get("steps"), {"perplexity", "removed_percent", "seconds", "scores"}
    whole = isinstance(known, list) and all(isinstance(step, dict) and fields <= step.keys() for step in known)
    if not whole or len(known) != len(order) or "dense_perplexity" not in old:
        raise Taken(f"{path}: its meta does not hold the dense model's perplexity and one step for each removal")
    old.pop("failed", None)
    return order, old | {"engine": meta["engine"]}


def told(job, unit, step):
    """Return the lines for people about one removal."""
    metric = job.settings.metric
    score = f"{metric:10s} {step.get('score', step['perplexity']):12.6g}"
    if metric == "ppl":
        score = f"perplexity {step['perplexity']:12.4f}"
    lines = [
        f"{len(job.order):4d}/{job.candidates.most}  {unit!s:7s} {score}  removed {step['removed_percent']:6.2f} %  "
        f"{step['seconds']:7.1f} s"
    ]
    bad = [str(b) for b, s in step["scores"].items() if not math.isfinite(s)]
    return lines + [f"warning: {metric} not finite without {', '.join(bad)}: never removed in this step"] * bool(bad)
