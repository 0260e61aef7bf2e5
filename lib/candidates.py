"""Which blocks may go and how many must: block type, protected layers, a number of blocks or shares of what they cost.

All of it is known from the model's modules, before any weight is read.

    bare = skeleton(path)
    chosen = candidates(find_layers(bare), parameter_count(bare), "layer", ratio=0.2, first=4, last=2)
    chosen.enough(order)    # how many of these removals reach 20 %, None where they are too few
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from lib.blocks import KINDS, Block, blocks_of
from lib.decoder import block_parameters


class WrongAmount(ValueError):
    """There is not so much to remove, or not in such pieces. what: "number", "ratio" or "protected"."""

    def __init__(self, what, message):
        super().__init__(message)
        self.what = what


class Candidates(NamedTuple):
    """units: the blocks or whole layers that may go, in the paper's order; size: blocks in a unit, 2 in a layer.

    most: removals, counted in blocks, that may be needed. window: the length of a run of consecutive
    layers, None where units go one by one. enough(order): how many removals of an order are as many as
    asked for, None where they are too few. serves(removed): the units that bring a budget nearer which is not yet met,
    None where every unit always does.
    """

    layers: list
    units: list
    size: int
    most: int
    window: int | None
    enough: Callable
    serves: Callable | None = None

    def meets(self, removed):
        """Whether a set of units is as much as asked for."""
        return self.enough(blocks_of(removed)) is not None


def candidates(layers, total, block_type, *, number=0, ratio=None, first=0, last=0, consecutive=False, budgets=()):
    """Return the Candidates in `layers`, decoder layers with or without weights, of a model of `total` parameters.

    number: blocks to remove; ratio: instead, the share of `total` to reach with the fewest removals;
    first, last: layers at the two ends that stay whole; consecutive: remove one run of layers; budgets: instead of
    number and ratio, lib.costs.Budgets that must all be met. Raises WrongAmount where there are not so many.
    """
    L, size = len(layers), 2 if block_type == "layer" else 1
    n = L - first - last
    if n < 0:
        raise WrongAmount(
            "protected", f"{first} lowest and {last} topmost layers to protect: the model has {L}; protect 0..{L}"
        )
    kinds = KINDS if block_type == "mix" else (block_type,)
    units = [Block(kind, i) for kind in kinds for i in range(first, L - last)]
    most = len(units) * size
    what = {"mix": f"{n} mha + {n} mlp", "layer": f"{n} layers"}.get(block_type, f"all {block_type}")
    what = f"{most} blocks ({what}{f', {L - n} of {L} layers protected' if n < L else ''})"
    if number > most:
        raise WrongAmount("number", f"{number} blocks to remove: the model has {what}; use 0..{most}")
    if number % size:
        raise WrongAmount(
            "number", f"{number} blocks to remove: whole layers go, which are two blocks each; use an even number"
        )
    if budgets:
        if consecutive:
            raise ValueError(
                "a run of layers is chosen by its length; give a number of blocks or a share of parameters"
            )
        return _budgeted(layers, units, size, what, budgets)
    if ratio is None:
        return _counted(layers, units, size, number, number // 2 if consecutive else None)
    if block_parameters(layers, units) / total < ratio:
        reach = math.floor(1e4 * block_parameters(layers, units) / total) / 1e4
        raise WrongAmount("ratio", f"{ratio} of the parameters to remove: {what} hold {reach}; use at most that")
    if consecutive:  # so many layers that every run of them is enough
        runs = (
            [[Block("layer", j) for j in range(i, i + k)] for i in starts(L, k, first, last)] for k in range(1, n + 1)
        )
        window = next(
            k
            for k, choice in enumerate(runs, 1)
            if all(block_parameters(layers, run) / total >= ratio for run in choice)
        )
        return _counted(layers, units, size, 2 * window, window)
    smallest_first = list(accumulate(sorted(block_parameters(layers, [unit]) for unit in units)))
    most = min(most, size * (1 + bisect_left(smallest_first, ratio, key=lambda gone: gone / total)))
    return Candidates(layers, units, size, most, None, lambda order: enough(layers, order, ratio, total, size))


def enough(layers, order, ratio, total, size=1):
    """Return the fewest removals of an order that take a share of `total` parameters, None where all of them do not.

    layers: decoder layers with or without weights. size: blocks that go together, 2 where the order is of whole layers.
    """
    k = bisect_left(range(len(order) + 1), ratio, key=lambda k: block_parameters(layers, order[:k]) / total)
    k += -k % size
    return k if k <= len(order) else None


def reachable(units, cost):
    """Return the share of a lib.costs.Cost that goes with all `units`, rounded down to four digits."""
    return math.floor(1e4 * cost.share(units)) / 1e4


def _budgeted(layers, units, size, what, budgets):
    """Return the Candidates that meet all of lib.costs.Budgets; `what` names the units in an error."""
    most = 0
    for cost, share in budgets:
        if cost.share(units) < share:
            most_of_it = f"hold {reachable(units, cost)} of it; use at most that"
            raise ValueError(f"a share of {share:g} of {cost.name} to remove: {what} {most_of_it}")
        smallest_first = accumulate(sorted(cost.of([unit]) for unit in units if cost.of([unit]) > 0))
        most += size * (1 + bisect_left(list(smallest_first), share, key=lambda gone: gone / cost.whole))

    def met(order):
        return all(budget.met(order) for budget in budgets)

    def enough(order):
        k = bisect_left(range(len(order) + 1), True, key=lambda k: met(order[:k]))
        k += -k % size  # a layer goes whole
        return k if k <= len(order) else None

    def serves(removed):
        owed = [cost for cost, share in budgets if cost.share(removed) < share]
        return [unit for unit in units if any(cost.of([*removed, unit]) > cost.of(removed) for cost in owed)]

    return Candidates(layers, units, size, min(most, len(units) * size), None, enough, serves)


def starts(n_layers, n, first=0, last=0):
    """Return where a run of n layers can start with the `first` lowest and the `last` topmost layers kept."""
    return range(first, n_layers - last - n + 1)


def _counted(layers, units, size, most, window):
    return Candidates(layers, units, size, most, window, lambda order: most if 0 < most <= len(order) else None)
