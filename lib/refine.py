"""A set of removed blocks made better: blocks are put back and others taken instead, while the loss falls.

A greedy search never takes a removal back, though blocks that were dispensable first need not be so once others are
gone. `swaps` exchanges a few removed units for a few kept ones, and ends where no exchange helps; `evolve` is the
search of EvoPress, which starts from random sets. Both ask an engine of lib.engines for losses, as the greedy search
does. The sets that they leave are not nested.

    for swap in swaps(engine, decoder.blocks("mix"), removed, fits=lambda some: len(some) >= 12):
        print(swap.back, swap.out, swap.score)
"""

import itertools
import math
import random
from typing import NamedTuple

import torch

from lib.engines import score_of
from lib.search import CONFIDENCE, spread, survivors

SCREEN = 6  # batches on which every unit changes its place alone, of which exchanges are estimated
CHEAPEST = 10  # units of each side, by what they do alone, that are exchanged several at a time
TRIED = 40  # exchanges that are tried by estimates made for the set before; then they are made anew

STARTS, OFFSPRING, FINALISTS = 64, 32, 2  # of EvoPress's search, arXiv 2410.14649
FEW, MANY = 2_048, 32_768  # tokens on which all offspring are compared, and the finalists with their parent


class Swap(NamedTuple):
    """An exchange that lowered the loss: units put `back`, units taken `out` instead, and what it left.

    removed: the set now; score: its objective; seen: windows that units were scored on since the start. The last one of
    a search exchanges nothing and says how it ended.
    """

    back: tuple
    out: tuple
    removed: frozenset
    score: float
    seen: int


def swaps(engine, units, removed, fits, confidence=CONFIDENCE, most=math.inf):
    """Yield a Swap for each exchange that is made, until none lowers the loss, then the last one.

    units: all that may go; removed: some of them; fits(set): whether enough is gone with a set, as after each exchange
    it must be. confidence: standard errors behind at which an exchange is given up. most: windows to score at most.
    Exchanges are tried in the order of an estimate, the sum of what each of their changes does alone. In the end every
    removed unit was exchanged for every kept one and for none, and up to three for one, or one for up to three, where
    the estimate is below zero. Raises ValueError where a removed unit is not among `units`.
    """
    strangers = sorted(set(removed) - set(units))
    if strangers:
        raise ValueError(f"{strangers[0]} is removed but may not be put back: it is protected, or of another kind")
    state = _State(engine, frozenset(removed))
    alone, fresh = state.alone(units), True
    while state.seen < most:
        flips = _exchanges(units, state.removed, alone)
        flips = (flip for flip in flips if fits(state.removed ^ flip))
        made = state.first_better(flips if fresh else itertools.islice(flips, TRIED), confidence, most)
        if made:
            yield made
            changed = {*made.back, *made.out}
            alone = {unit: -rise if unit in changed else rise for unit, rise in alone.items()}
            fresh = False
        elif fresh:
            break
        else:
            alone, fresh = state.alone(units), True
    yield Swap((), (), state.removed, score_of(engine, state.losses), state.seen)


def _exchanges(units, removed, alone):
    """Return sets of units that could change places, the best estimate first; alone: {unit: rise of the loss}."""
    cheap = sorted(units, key=alone.get)
    gone, kept = [u for u in cheap if u in removed], [u for u in cheap if u not in removed]
    single = [*((back,) for back in gone), *((back, out) for back in gone for out in kept)]
    some_gone, some_kept = gone[:CHEAPEST], kept[:CHEAPEST]
    several = [
        (*back, *out)
        for n, m in ((1, 2), (1, 3), (2, 1), (3, 1))
        for back in itertools.combinations(some_gone, n)
        for out in itertools.combinations(some_kept, m)
    ]
    estimates = [(sum(map(alone.get, flip)), flip) for flip in single]
    estimates += [(rise, flip) for flip in several if (rise := sum(map(alone.get, flip))) < 0]
    return [frozenset(flip) for _, flip in sorted(estimates)]


class _State:
    """The set so far, its losses, and how many windows were scored."""

    def __init__(self, engine, removed):
        self.engine, self.removed, self.seen = engine, removed, 0
        self.visits = spread(len(engine.batches))
        self.losses = engine.base(removed)

    def alone(self, units):
        """Return {unit: rise of the mean token loss} when that unit alone changes its place, on SCREEN batches."""
        rises = {}
        for unit in units:
            some = {k: self._of(self.removed ^ {unit}, k) for k in self.visits[:SCREEN]}
            rise = self._rise(some)
            rises[unit] = rise if math.isfinite(rise) else math.inf
        return rises

    def first_better(self, flips, confidence, most):
        """Make the first of some exchanges that lowers the loss and return the Swap, None where none does."""
        for flip in flips:
            if self.seen >= most:
                return None
            if made := self._try_out(flip, confidence):
                return made

    def _try_out(self, flip, confidence):
        """Change the places of the units of `flip` where that lowers the loss, and return the Swap, else None."""
        new, some, N = self.removed ^ flip, {}, len(self.engine.windows)
        for k in self.visits:
            some[k] = self._of(new, k)
            if k != self.visits[-1]:
                seen = {"now": {j: self.losses[j] for j in some}, "new": some}
                if "new" not in survivors(["now", "new"], seen, confidence, N):
                    return None
        if not self._rise(some) < 0:  # also where it is not a number
            return None
        back, out = (tuple(sorted(units)) for units in (flip & self.removed, flip - self.removed))
        self.removed, self.losses = new, some
        return Swap(back, out, new, score_of(self.engine, some), self.seen)

    def _rise(self, some):
        """Return how much higher than now the mean token loss is, over the batches of `some`."""
        return torch.cat([(some[k].double() - self.losses[k].double()).flatten() for k in sorted(some)]).mean().item()

    def _of(self, removed, k):
        losses = losses_of(self.engine, removed, k)
        self.seen += len(losses)
        return losses


def losses_of(engine, removed, k):
    """Return the token losses (B, n) of batch k without `removed`, a frozenset: one unit more than the others."""
    if not removed:
        return engine.base(removed)[k]
    last = max(removed, key=lambda unit: unit.layer)
    ((_, _, losses),) = engine.losses({k: [last]}, removed - {last})
    return losses


# ---- evolution -----------------------------------------------------------------------------------


def evolve(engine, units, fits, seed=0, most=math.inf):
    """Yield a Swap for each generation whose best offspring beats its parent, then the last one: EvoPress's search.

    The first parent is the best of STARTS random sets on FEW tokens. A generation has OFFSPRING mutations of its
    parent, of which the FINALISTS best on FEW tokens meet the parent on MANY; tokens are drawn anew each time, whole
    batches, from a text that may be shorter. k(n - k) / 1.5 generations for k of n layers, or until `most` windows are
    scored. fits(set): whether enough is gone; no unit of a set could stay. `mutated` says where this differs from
    EvoPress, which keeps the numbers of removed attentions and MLPs. `Swap.score` is of the batches that were looked
    at, the last one's of all.
    """
    draw, seen, K = random.Random(seed), 0, len(engine.batches)
    tokens = engine.windows.numel() / K
    few, many = (min(K, max(1, round(some / tokens))) for some in (FEW, MANY))

    def judged(sets, count):
        nonlocal seen
        batches = draw.sample(range(K), count)
        seen += len(sets) * sum(len(engine.batches[k]) for k in batches)
        scores = {some: score_of(engine, {k: losses_of(engine, some, k) for k in batches}) for some in sets}
        return {some: score if math.isfinite(score) else math.inf for some, score in scores.items()}

    starts = [smallest((), draw.sample(units, len(units)), fits, draw) for _ in range(STARTS)]
    scores = judged(list(dict.fromkeys(starts)), few)
    parent = min(scores, key=scores.get)
    yield Swap((), tuple(sorted(parent)), parent, scores[parent], seen)
    layers, gone = len({unit.layer for unit in units}), len(parent) * len({unit.layer for unit in units}) / len(units)
    for _ in range(math.ceil(gone * (layers - gone) / 1.5)):
        if seen >= most:
            break
        offspring = [mutated(parent, units, fits, draw) for _ in range(OFFSPRING)]
        scores = judged(list(dict.fromkeys(some for some in offspring if some != parent)), few)
        finalists = sorted(scores, key=scores.get)[:FINALISTS]
        scores = judged([parent, *finalists], many)
        best = min(scores, key=scores.get)  # of equal ones the parent
        if best != parent:
            back, out = (tuple(sorted(units)) for units in (parent - best, best - parent))
            parent = best
            yield Swap(back, out, parent, scores[best], seen)
    yield Swap((), (), parent, score_of(engine, engine.base(parent)), seen + len(engine.windows))


def mutated(parent, units, fits, draw):
    """Return a set in which one to three removed units are exchanged for kept ones of the same kind, as EvoPress does.

    Where that does not fit, further units go, and where more than needed is gone, some stay.
    """
    count = min(draw.randint(1, 3), draw.randint(1, 3), len(parent))
    back = draw.sample(sorted(parent), count)
    kept = [unit for unit in units if unit not in parent]
    kept, alike = draw.sample(kept, len(kept)), set()
    for unit in back:
        alike |= {next((u for u in kept if u.kind == unit.kind and u not in alike), unit)}
    return smallest(parent - set(back) | alike, [*kept, *back], fits, draw)


def smallest(removed, more, fits, draw):
    """Return a set that fits and no unit of which could stay: `removed`, with units of the list `more`, or without."""
    removed = frozenset(removed)
    for unit in more:
        if fits(removed):
            break
        removed |= {unit}
    for unit in draw.sample(sorted(removed), len(removed)):
        if fits(removed - {unit}):
            removed -= {unit}
    return removed
