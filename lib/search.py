"""The iterative search: judge each remaining unit, remove the one whose absence hurts least, repeat.

`greedy` is a generator of Step, one per removal, so that the caller can save after each; resuming is passing the
removals made before as `done`. It asks an engine of lib.engines for losses: all of them (the paper's search), or batch
by batch while it races (`confidence`), where a candidate that is clearly behind is not scored any further.

    engine = Cached(decoder, decoder.blocks("mix"), windows, batch_size=8)
    for step in greedy(engine, decoder.blocks("mix"), n=12):
        print(step.block, step.score)

Which unit hurts least is a rule's to say: the lowest objective (the paper), or the least rise of the loss for each
unit of a cost that goes with it (`price`), which does not prefer small blocks.

Units are blocks (the paper) or whole layers (SLEB, arXiv 2402.09025). What is minimised is the engine's objective:
perplexity, or the divergence from the dense model (EvoPress's fitness).
"""

import math
import statistics
import time
from typing import NamedTuple

import torch

from lib.blocks import Block
from lib.engines import score_of, see

CONFIDENCE = 3.0  # standard errors of a race; docs/engines.md: how it was chosen


class Step(NamedTuple):
    """One removal.

    block: the block or whole layer that goes; score: the objective without it; scores: of all candidates. prices: of
    each candidate (`price`), None where the score alone decides. windows: how many windows each candidate was scored
    on, None where it is all of them; those of 0 have no score. audit: who wins where all see all, None where that was
    not asked for; then counts and seconds are not those of a race. memory: what the race takes along (`race`), of who
    was looked at. block_forwards and head_forwards count what the step computed, in windows times blocks and in
    windows; seconds is its wall time.
    """

    block: Block
    score: float
    scores: dict
    prices: dict | None
    windows: dict | None
    audit: Block | None
    memory: dict | None
    block_forwards: int
    head_forwards: int
    seconds: float


class NoFiniteCandidate(RuntimeError):
    """Every candidate's score is NaN or infinite; .scores holds them."""

    def __init__(self, scores):
        super().__init__(f"all {len(scores)} candidates have a perplexity that is NaN or infinite")
        self.scores = scores


def greedy(
    engine, units, n, done=(), confidence=math.inf, progress=None, *, cost=None, serves=None, audit=False, memory=()
):
    """Yield the Steps that bring `done` to n removals.

    units: candidates in the order in which ties are decided, the first wins. done: units removed before, in order.
    confidence: standard errors behind the leader at which a candidate drops out of the race (`race`); infinite: all
    candidates see all windows. progress(windows, unit, running score) is called as work gets done. cost: a
    lib.costs.Cost, to remove the unit of the lowest `price`; None removes that of the lowest score. serves(removed):
    the units that help now, where not all do. audit: score everything after each race, and say who would have won.
    memory: of a race that goes on.
    Raises NoFiniteCandidate where no candidate can win.
    """
    removed, base, memory = list(done), None, dict(memory)
    while len(removed) < n:
        clock = _Clock(engine.decoder)
        left = [unit for unit in (units if serves is None else serves(removed)) if unit not in removed]
        frees = None if cost is None else {unit: cost.share([*removed, unit]) - cost.share(removed) for unit in left}
        if cost is not None:
            left = [unit for unit in left if frees[unit] > 0]
        if base is None and (cost is not None or confidence < math.inf):
            base = engine.base(removed)

        def prices(seen, base=base, frees=frees):
            return None if cost is None else {unit: price(some, base, frees[unit]) for unit, some in seen.items()}

        seen, alive, windows = {unit: {} for unit in left}, left, None
        if confidence < math.inf:
            seen, alive = race(engine, left, removed, confidence, progress, base=base, frees=frees, memory=memory)
            windows = {unit: sum(map(len, seen.get(unit, {}).values())) for unit in left}
        else:
            see(engine, dict.fromkeys(range(len(engine.batches)), left), removed, seen, progress)
        scores = {unit: score_of(engine, some) for unit, some in seen.items()}
        finite = [unit for unit in alive if math.isfinite(scores[unit])]
        if not finite:
            raise NoFiniteCandidate(scores)
        best = min(finite, key=(prices(seen) or scores).get)
        exact = None
        if audit and windows is not None:
            every = see_rest(engine, left, removed, {unit: dict(seen.get(unit, {})) for unit in left})
            exact = {unit: score_of(engine, some) for unit, some in every.items()}
            exact = min((u for u in left if math.isfinite(exact[u])), key=(prices(every) or exact).get)
        looked = None if windows is None else {unit: memory[unit] for unit in seen if unit in memory}
        yield Step(best, scores[best], scores, prices(seen), windows, exact, looked, *clock.read())
        base = seen[best]
        removed.append(best)


def price(seen, base, frees):
    """Return what a removal costs: the rise of the mean token loss, in nats, divided by the share that it frees.

    seen: {batch: token losses (B, n)} without the unit; base: with it, of these batches and others. A removal that
    lowers the loss comes before all that raise it: its price is the change itself, which is negative.
    """
    rise = torch.cat([(seen[k].double() - base[k].double()).flatten() for k in sorted(seen)]).mean().item()
    return rise / frees if rise > 0 else rise


def race(engine, left, removed, confidence, progress=None, *, base=None, frees=None, memory=None):
    """Return (seen, alive): what the candidates `left` saw, {unit: {batch: token losses}}, and who saw all windows.

    After each batch a candidate drops out once the mean of its token losses minus the leader's, over the tokens both
    have seen, exceeds `confidence` standard errors. The error is that of the mean of tokens, times the root of
    (N - n) / (N - 1), since n of N windows are drawn without replacement and the last ones leave nothing open, times
    the root of 1 + 2 / n, by which Student's t with n + 2 degrees of freedom is wider than the normal: few windows say
    little about how documents differ. Batches are visited in an order that spreads over the text. Should none of the
    rest be finite in the end, those dropped see what they missed, and all are alive. Small batches decide sooner.
    frees: {unit: share of a cost}, to race for the lowest `price`; base: the losses that prices are taken from.

    memory: {unit: (rise above base, its error)} of earlier removals, which is brought up to date. Who led then sees all
    windows first, and who was far behind that (`far_behind`) is not looked at: `seen` holds nothing of it.
    """
    N, visits = len(engine.windows), spread(len(engine.batches))
    known = [unit for unit in left if unit in (memory or {})]
    seen, looked = {}, left
    if known:
        first = min(known, key=lambda unit: memory[unit][0])
        see_rest(engine, [first], removed, seen, progress)
        lead, _ = standing(seen[first], base, frees and frees[first], N)
        far = far_behind(lead, {unit: memory[unit] for unit in known}) - {first}
        looked = [unit for unit in left if unit not in far]
    seen |= {unit: {} for unit in looked if unit not in seen}
    alive = looked
    for n, k in enumerate(visits, 1):
        see(engine, {k: [unit for unit in alive if k not in seen[unit]]}, removed, seen, progress)
        if k != visits[-1]:
            both = {unit: {j: seen[unit][j] for j in visits[:n]} for unit in alive}
            alive = survivors(alive, both, confidence, N, base, frees)
    if not any(math.isfinite(score_of(engine, seen[unit])) for unit in alive):
        see_rest(engine, left, removed, seen, progress)
        alive = left
    if memory is not None:
        memory |= {unit: standing(some, base, frees and frees[unit], N) for unit, some in seen.items()}
        for unit in [unit for unit, (rise, _) in memory.items() if not math.isfinite(rise)]:
            del memory[unit]
    if progress:
        for unit in left:  # what need not be computed counts as done
            if skipped := N - sum(map(len, seen.get(unit, {}).values())):
                progress(skipped, unit, score_of(engine, seen[unit]) if unit in seen else math.nan)
    return seen, alive


def see_rest(engine, units, removed, seen, progress=None):
    """Ask for what `units` have not yet seen; return `seen`, as lib.engines.see, with the answers added."""
    missed = {k: [u for u in units if k not in seen.get(u, {})] for k in spread(len(engine.batches))}
    return see(engine, missed, removed, seen, progress)


def standing(losses, base, frees, N):
    """Return (rise of the mean token loss above `base`, its standard error), for each unit of cost where `frees` says.

    losses: {batch: token losses} of n of N windows, which the error knows as `race` does.
    """
    n, rises = sum(map(len, losses.values())), torch.cat([(losses[k].double() - base[k]).flatten() for k in losses])
    error = rises.std().item() / math.sqrt(len(rises)) if len(rises) > 1 else math.inf
    error *= math.sqrt((N - n) / max(1, N - 1) * (1 + 2 / n))
    return rises.mean().item() / (frees or 1), error / (frees or 1)


def far_behind(lead, memory):
    """Return the units that a race need not look at: {unit: (rise, error)} of before, `lead`: the leader's rise now.

    In 27 removals of SmolLM2 on 4 to 32 documents nobody won who had been behind by more than the leader's own rise.
    Where that is small, half the way from the least to the median rise stands for it.
    """
    rises = [rise for rise, _ in memory.values()]
    bound = lead + max(abs(lead), (statistics.median(rises) - min(rises)) / 2)
    return {unit for unit, (rise, error) in memory.items() if rise - 2 * error > bound}


def spread(n):
    """Return 0..n-1 in an order whose first few lie far apart.

    Neighbouring windows come from the same documents and say less about the rest of the text. The k-th goes where k
    times the golden ratio, modulo 1, ranks among all.
    """
    golden = (math.sqrt(5) - 1) / 2
    ranked = sorted(range(n), key=lambda k: k * golden % 1)
    return sorted(range(n), key=ranked.__getitem__)


def survivors(alive, losses, confidence, N, base=None, frees=None):
    """Return the candidates not clearly behind the leader; losses: unit -> {batch: token losses (B, n)}."""
    n = sum(map(len, losses[alive[0]].values()))
    tokens = {unit: torch.cat([t.flatten() for t in losses[unit].values()]).double() for unit in alive}
    finite = [unit for unit in alive if tokens[unit].isfinite().all()]
    if not finite or len(tokens[finite[0]]) < 2:  # a single difference has no standard error
        return alive
    if frees is not None:
        tokens = _priced({unit: tokens[unit] for unit in finite}, losses, base, frees)
    leader = min(finite, key=lambda unit: tokens[unit].mean().item())
    wider = confidence * math.sqrt((N - n) / (N - 1) * (1 + 2 / n))
    survivors = []
    for unit in finite:
        behind = tokens[unit] - tokens[leader]
        error = behind.std().item() / math.sqrt(len(behind))
        if unit == leader or behind.mean().item() <= wider * error:
            survivors.append(unit)
    return survivors


def _priced(tokens, losses, base, frees):
    """Return each unit's token losses as what is to be compared: their rise, for each unit of cost where all raise."""
    rises = {
        unit: some - torch.cat([base[k].flatten() for k in losses[unit]]).double() for unit, some in tokens.items()
    }
    if min(rise.mean().item() for rise in rises.values()) <= 0:  # one that lowers the loss goes first, however small
        return rises
    return {unit: rise / frees[unit] for unit, rise in rises.items()}


class _Clock:
    """Counts and seconds since it was made."""

    def __init__(self, decoder):
        self.decoder, self.before, self.start = decoder, decoder.counts.copy(), time.perf_counter()

    def read(self):
        counts = self.decoder.counts - self.before
        return counts["mha"] + counts["mlp"], counts["head"], time.perf_counter() - self.start
