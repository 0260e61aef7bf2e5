"""A search from its settings to the order file: plan and resume before any weight is read, save after every removal.

    job = open_job(Settings("models/Llama-2-7b-hf", number=17), text, skeleton(path), "ppls")
    if not job.finished:
        for unit, step in steps(job, Decoder(load_model(path)), dense=5.47):
            print(unit, step["perplexity"])

block_search.py and the cells of scripts.compare are the two callers.
"""

import contextlib
import functools
import hashlib
import math
import time
from pathlib import Path
from typing import NamedTuple

from lib.blocks import Block, blocks_of, parse_block
from lib.candidates import Candidates, candidates, reachable, starts
from lib.costs import COUNTED, BlockSeconds, Budget, Cost, cost_of_seconds, counted
from lib.data import Text
from lib.decoder import find_layers
from lib.engines import ENGINES
from lib.evaluate import perplexity
from lib.hub import fingerprint
from lib.importance import METRICS, ranked, require_weights
from lib.journal import Journal, Kept
from lib.model import parameter_count, versions
from lib.orders import check_order, held_passes, order_path, passes_in, read_order, save_order
from lib.ranks import Shared, first, join, shared_losses
from lib.refine import evolve, swaps
from lib.repair.scale import passes_of, require_free_size
from lib.search import CONFIDENCE, NoFiniteCandidate, greedy


class Settings(NamedTuple):
    """With the text, all that decides an order.

    model: path or hub id. metric: a key of lib.importance.METRICS. block_type: "mix", "mha", "mlp" or "layer". number:
    blocks to remove; ratio: instead, the share of the parameters to reach. protect_first, protect_last: layers at the
    two ends that stay whole. seed: of metrics that draw. batch_size: windows per forward. dtype, device: of the model.
    search: "cached", "exhaustive" or "streamed", which are exact, or "race", which is not; race_confidence: see
    lib.search.race. rule: of a search, "lowest" (the paper: the lowest score goes first) or "per-parameter" (the least
    rise of the loss per unit of cost, lib.search.price). cost: a name of lib.costs.COSTS, in which the rule and ratio
    count; seconds: where it is latency. budgets: pairs (name of a cost, share that must go), beside ratio. refine: what
    lib.refine makes of the order: "none", "swaps", or "evolve", which takes no order but random sets; evaluations: of
    the whole text at most, for that. passes: what a removed block adds to the stream, "nothing", or "scale", which
    multiplies it by what the block made it grow (lib.repair.scale). audit: whether a race is followed by all losses.
    kl_top_k: tokens of the dense model that the metric kl compares one by one, None for all.
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
    rule: str = "lowest"
    cost: str = "parameters"
    seconds: BlockSeconds | None = None
    budgets: tuple = ()
    refine: str = "none"
    evaluations: int | None = None
    passes: str = "nothing"
    audit: bool = False
    kl_top_k: int | None = 512


# Facts of an order file that must be the same for it to be continued. Exact engines give the same order.
DECIDING = (
    "model metric block_type protect_first protect_last window dataset split text_column seed documents seqlen "
    "batch_size dtype device approximate race_confidence text_sha256 weights bos rule cost seconds budgets refine "
    "amount pass kl_top_k"
).split()
BEFORE = {  # what files without them mean
    "metric": "ppl",
    "protect_first": 0,
    "protect_last": 0,
    "approximate": False,
    "bos": "text",
    "rule": "lowest",
    "cost": None,
    "seconds": None,
    "budgets": None,
    "refine": "none",
    "amount": None,
    "pass": "nothing",
    "kl_top_k": None,
}


class Taken(ValueError):
    """The order file is of another search, or no order file that can be continued."""


class Job(NamedTuple):
    """A search and how far it is. order: the removals made; meta: of the order file at `path`; both grow.

    cost: what the rule divides by, None for the rule "lowest".
    """

    settings: Settings
    text: Text
    candidates: Candidates
    path: Path
    order: list
    meta: dict
    cost: Cost | None = None

    @property
    def searched(self):
        """Whether candidates are judged anew after each removal, so that an order can be continued."""
        return METRICS[self.settings.metric].kind == "searched"

    @property
    def finished(self):
        """How many of the removals made are as many as asked for, None where they are too few, or not yet refined."""
        if self.settings.refine == "none":
            return self.candidates.enough(self.order)
        return len(self.removed) if self.refined else None

    @property
    def refined(self):
        """Whether the exchanges have come to an end, or to as many evaluations as are allowed."""
        found, most = self.meta.get("refined", {"ended": False, "evaluations": 0}), self.settings.evaluations
        return found["ended"] or (most is not None and found["evaluations"] >= most)

    @property
    def removed(self):
        """The blocks that are gone: the set that exchanges made so far, else as many of the order as asked for."""
        if "refined" in self.meta:
            return blocks_of(Block(*unit) for unit in self.meta["refined"]["removed"])
        return self.order[: self.candidates.enough(self.order)]

    @property
    def evaluations(self):
        """How many passes of all windows are ahead, at most; those of a refinement are not known."""
        c, settings = self.candidates, self.settings
        if settings.refine == "evolve":
            return 0
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
    s, layers = settings, find_layers(bare)
    choices = ("rule", s.rule, "lowest"), ("refinement", s.refine, "none"), ("pass", s.passes, "nothing")
    for what, chosen, plain in choices:
        if chosen != plain and METRICS[s.metric].kind != "searched":
            raise ValueError(f"the {what} {chosen}: {s.metric} judges once and does not search; use a metric that does")
    costs = {
        name: _cost(s, name, bare, layers, text)
        for name in {s.cost, *(name for name, _ in s.budgets)}
        if s.rule != "lowest" or s.budgets or s.cost != "parameters"
    }
    budgets = [Budget(costs[name], share) for name, share in s.budgets]
    if s.ratio is not None and (budgets or s.cost != "parameters"):
        budgets.insert(0, Budget(costs[s.cost], s.ratio))
    chosen = candidates(
        layers,
        parameter_count(bare),
        s.block_type,
        number=s.number,
        ratio=s.ratio,
        first=s.protect_first,
        last=s.protect_last,
        consecutive=METRICS[s.metric].kind == "run",
        budgets=budgets,
    )
    name = s.metric if chosen.window is None else f"{s.metric}{chosen.window}"
    name = f"random{s.seed}" if s.metric == "random" else name  # draws and runs of other lengths lie beside each other
    if s.rule != "lowest":
        name = "_".join([name] * (name != "ppl") + [f"per-{s.cost.removesuffix('s')}"])
    if s.passes != "nothing":
        name = "_".join([name] * (name != "ppl") + [s.passes])
    if s.refine != "none":  # sets of other sizes lie beside each other
        size = f"{s.ratio:g}" if s.ratio is not None else s.number or "budgets"
        name = "_".join([name] * (name != "ppl") + [f"{s.refine}{size}"])
    path = order_path(folder, s.model, s.block_type, text.about["dataset"], text.about["documents"], name)
    meta = _describe(s, text, chosen)
    if path.is_dir():
        raise ValueError(f"{path}: a folder, where the order file belongs; move it, or give another folder")
    if hold and join()[0] == 0:
        hold(path)
    order, old = first(([], meta) if overwrite else _resume(path, meta))
    job = Job(s, text, chosen, path, order, old, None if s.rule == "lowest" else costs[s.cost])
    if not job.searched and not job.finished:  # judged at once: nothing to continue
        job = job._replace(order=[], meta=meta)
    return job


def _cost(settings, name, model, layers, text):
    """Return the lib.costs.Cost of that name; flops are counted in the middle of a window."""
    if name != "latency":
        return counted(name, model, layers, context=text.windows.shape[1] // 2)
    if settings.seconds is None:
        raise ValueError("the cost latency needs a file of seconds; measure it with python -m scripts.bench_model")
    return cost_of_seconds(settings.seconds)


def check_decoder(job, decoder):
    """Raise ValueError where the metric cannot work on a model as it is loaded: quantised, offloaded."""
    if decoder.offloaded and job.searched and job.settings.search != "streamed":
        raise ValueError(
            f"{job.settings.device}: the GPUs cannot hold the model, and layers in the host's memory would be moved "
            "for every candidate; a search that offloads moves each once for all (from a folder, not a .gguf)"
        )
    if job.settings.passes == "scale" and not decoder.offloaded:  # what could not be written is not searched for
        require_free_size(decoder)
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
        with decoder.passing({}):  # what is set within is undone
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
    return journal.count(_units(job, job.order), job.settings.search == "race")


def _save(job, refined=None):
    if join()[0] == 0:
        save_order(job.path, job.order, job.meta, refined)


def _units(job, blocks):
    """Return blocks as the search has them: blocks, or whole layers."""
    if job.candidates.size == 1:
        return list(blocks)
    return [Block("layer", i) for i in dict.fromkeys(i for _, i in blocks)]


def _steps(job, decoder, dense, cache_bytes, progress, check, journal):
    settings, order, meta, enough = job.settings, job.order, job.meta, job.candidates.enough
    total, seqlen = parameter_count(decoder.model), job.text.windows.shape[1]
    meta["dense_perplexity"] = dense
    if settings.passes == "scale" and "passes" not in meta:
        meta["passes"] = held_passes(passes_of(decoder, job.text.windows, settings.batch_size))
    if settings.refine == "evolve" or enough(order):
        return
    decoder.passes = passes_in(meta, job.path)
    try:
        for unit, step in _removals(job, decoder, cache_bytes, progress, check, journal):
            for block in blocks_of([unit]):  # a layer is two removals; what is known stands on the second
                order.append(block)
                rest = {"removed_percent": 100 * decoder.block_parameters(order) / total, "block": block}
                meta["steps"].append({"perplexity": None, "scores": {}, "seconds": 0.0} | rest)
            meta["steps"][-1] = step = step | rest
            if step["perplexity"] is None and (job.searched or enough(order)):
                losses = shared_losses(decoder, job.text.windows, settings.batch_size, order)
                step["perplexity"] = perplexity(losses, seqlen)
            if job.searched:
                _save(job)
            yield unit, step
            if enough(order):
                break
    except NoFiniteCandidate as error:
        meta["failed"] = {"error": str(error), "candidates": error.scores}
        _save(job)
        raise
    if order and not job.searched:
        _save(job)


def refinements(job, decoder, cache_bytes=None):
    """Yield each lib.refine.Swap, the last one included, as soon as the set that it leaves is saved.

    What stands in the file's meta["refined"] goes on from its last set; an evolution begins anew.
    """
    if job.settings.refine == "none" or job.refined:
        return
    with decoder.passing(passes_in(job.meta, job.path)):
        yield from _refinements(job, decoder, cache_bytes)


def _refinements(job, decoder, cache_bytes):
    s, meta, N, start = job.settings, job.meta, len(job.text.windows), time.perf_counter()
    found = {"evaluations": 0, "seconds": 0.0, "swaps": []}
    if s.refine == "swaps" and "refined" in meta:
        found = meta["refined"]
    before, seconds = found["evaluations"], found["seconds"]
    most = math.inf if s.evaluations is None else (s.evaluations - before) * N
    engine, units = _engine(job, decoder, cache_bytes), job.candidates.units
    fits = functools.lru_cache(None)(job.candidates.meets)
    if s.refine == "swaps":
        made = swaps(engine, units, _units(job, job.removed), fits, confidence=s.race_confidence, most=most)
    else:
        made = evolve(engine, units, fits, seed=s.seed, most=most)
    for swap in made:
        seen = before + swap.seen / N
        if exchanged := bool(swap.back or swap.out):
            known = {"back": swap.back, "out": swap.out, "score": swap.score, "evaluations": seen}
            found["swaps"].append(known)
        removed = sorted(blocks_of(swap.removed), key=lambda block: (block.layer, block.kind))
        losses = shared_losses(decoder, job.text.windows, s.batch_size, removed)
        found |= {
            "removed": removed,
            "removed_percent": 100 * decoder.block_parameters(removed) / parameter_count(decoder.model),
            "score": swap.score,
            "perplexity": perplexity(losses, job.text.windows.shape[1]),
            "evaluations": seen,
            "ended": not exchanged and swap.seen < most,
            "seconds": seconds + time.perf_counter() - start,
        }
        meta["refined"] = found
        _save(job, removed)
        yield swap


def reachable_shares(job, decoder):
    """Return {name: share} of each counted cost that goes with all candidates; without those that cannot be counted."""
    units, shares = job.candidates.units, {}
    for name in COUNTED:
        with contextlib.suppress(ValueError):  # an attention that does not tell its width
            shares[name] = reachable(units, _cost(job.settings, name, decoder.model, decoder.layers, job.text))
    return shares


def summary(job):
    """Return what the order file holds of the removals asked for, as a dict."""
    removed = job.removed
    known = job.meta["steps"] if "refined" in job.meta else job.meta["steps"][: len(removed)]
    last = known[-1] if known else {"perplexity": job.meta["dense_perplexity"], "removed_percent": 0.0}
    refined = job.meta.get("refined", last | {"seconds": 0.0})
    return {
        "order_file": str(job.path),
        "order": [str(block) for block in removed],
        "dense_perplexity": job.meta["dense_perplexity"],
        "perplexity": refined["perplexity"],
        "removed_percent": refined["removed_percent"],
        "seconds": sum(step["seconds"] for step in known) + refined["seconds"],
    }


def _engine(job, decoder, cache_bytes, wrap=None):
    """Return the engine of a search, shared between the processes; wrap: as of lib.ranks.Shared."""
    s = job.settings
    options = {} if s.search == "exhaustive" else {"cache_bytes": cache_bytes}
    made, objective = ENGINES["cached" if s.search == "race" else s.search], METRICS[s.metric].function
    if s.metric == "kl":
        objective = functools.partial(objective, top=s.kl_top_k)
    return Shared(
        lambda some: made(decoder, job.candidates.units, some, s.batch_size, objective, **options),
        job.text.windows,
        s.batch_size,
        by_unit=s.search == "race" or wrap is None,
        wrap=wrap,
    )


def _removals(job, decoder, cache_bytes, progress, check, journal):
    """Yield (unit, step) for every removal of the metric, until the caller has enough."""
    settings, c, windows = job.settings, job.candidates, job.text.windows
    metric, B, start = METRICS[settings.metric], settings.batch_size, time.perf_counter()
    if not c.most:
        return
    if job.searched:
        racing = settings.search == "race"
        engine = _engine(job, decoder, cache_bytes, lambda engine: Kept(engine, journal, racing, check))
        done, confidence = _units(job, job.order), settings.race_confidence if racing else math.inf
        held = {name: seen for step in job.meta["steps"] for name, seen in step.get("memory", {}).items()}
        memory = {parse_block(str(name)): tuple(map(float, seen)) for name, seen in held.items()} if racing else {}
        how = {"cost": job.cost, "serves": c.serves, "audit": settings.audit, "memory": memory}
        for step in greedy(engine, c.units, c.most // c.size, done, confidence, progress, **how):
            known = step._asdict()
            known = {
                key: value
                for key, value in known.items()
                if value is not None or key not in ("prices", "audit", "memory")
            }
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
        "rule": s.rule,
        "cost": s.cost if s.rule != "lowest" else None,
        "seconds": s.seconds and [s.seconds.mha, s.seconds.mlp, s.seconds.rest],
        "budgets": _serving(s),
        "kl_top_k": s.kl_top_k if s.metric == "kl" else None,
        "pass": s.passes,
        "refine": s.refine,
        "amount": None if s.refine == "none" else [s.number, s.ratio, [list(pair) for pair in s.budgets]],
        "versions": versions(),
        "steps": [],
    }


def _serving(settings):
    """Return what decides which units help, as kept in the file: nothing where all do and only their number is open.

    One budget of another cost leaves out what costs nothing of it, whatever its share; of several each share matters.
    """
    budgets = [[name, share] for name, share in settings.budgets]
    if settings.ratio is not None and (budgets or settings.cost != "parameters"):
        budgets.insert(0, [settings.cost, settings.ratio])
    return budgets if len(budgets) > 1 else [name for name, _ in budgets] or None


def _resume(path, meta):
    """Return (removals made, meta) of the order file at `path`, ([], meta) where there is none."""
    if not path.exists():
        return [], meta
    order, old = read_order(path)
    if old.get("nested") is False:
        order = [Block(*block) for block in old["order"]]
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
    if unseen := sum(not n for n in (step.get("windows") or {}).values()):
        lines[0] += f"  {unseen} not looked at"
    if step.get("audit", unit) != unit:
        lines.append(f"audit: the race chose {unit}; on all windows {step['audit']} is ahead")
    bad = [str(b) for b, s in step["scores"].items() if not math.isfinite(s)]
    return lines + [f"warning: {metric} not finite without {', '.join(bad)}: never removed in this step"] * bool(bad)


def told_swap(job, swap):
    """Return the line for people about one lib.refine.Swap."""
    found = job.meta["refined"]
    what = f"{' '.join(map(str, swap.back))} back, {' '.join(map(str, swap.out))} out"
    if not (swap.back or swap.out):
        what = "no exchange helps" if found["ended"] else "as many evaluations as allowed"
    return (
        f"{job.settings.refine:9s} {job.settings.metric} {swap.score:.6g}  removed {found['removed_percent']:6.2f} %  "
        f"{found['evaluations']:7.1f} evaluations  {found['seconds']:7.1f} s  {what}"
    )
