"""How many channels each MLP keeps: from one number of parameters to a width for each layer.

ALLOCATIONS, at the end of this file, holds the methods with their sources. `greedy` is the only one that measures what
a group of channels does to the model's loss; with `blocks` it weighs groups against whole attentions and MLPs, so that
one budget buys whatever harms least for its size.

    plan = Plan(decoder, find_parts(decoder), windows, budget=0.2 * parameter_count(model), align=128)
    found = ALLOCATIONS["alphapruning"].find(plan)
    narrow(decoder, windows, found.widths, removed=found.removed)
"""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from lib.decoder import Decoder
from lib.edits import holding
from lib.units import Found, greedy
from lib.width import dense_channels, flap, walk

TAU = 0.3  # AlphaPruning's: layers lose 1 - TAU to 1 + TAU times the mean share
BINS = 100  # of the histogram in which it looks for the smallest eigenvalue of the tail
OUTLIER, SPAN = 5, 0.08  # OWL's
EPSILON, MOST = 1e-3, 0.8  # ECoFLaP's step along a random direction, and the largest share that a layer loses


class Plan(NamedTuple):
    """What an allocation starts from: `parts` {Block: lib.parts.Part}, windows (N, T), `budget` parameters to remove.

    parts: MLPs; of greedy attentions too, where it may remove their heads. align: kept widths are multiples of it, and
    greedy's groups have so many channels. removed: blocks that are gone already. criterion, refit: of greedy's groups.
    blocks: whether greedy may remove whole blocks, too. scored: windows whose loss greedy measures, None for all.
    progress(text).
    """

    decoder: Decoder
    parts: dict
    windows: torch.Tensor
    budget: float
    align: int = 128
    batch_size: int = 8
    seed: int = 0
    removed: tuple = ()
    criterion: str = "osscar"
    refit: str = "ls"
    blocks: bool = False
    scored: torch.Tensor | None = None
    progress: Callable | None = None

    def group(self, block):
        """Return how many units of a part go at a time: heads one by one."""
        return self.align if block.kind == "mlp" else 1

    def share(self):
        """Return the share of all channels' parameters that has to go."""
        return self.budget / sum(mlp.n * mlp.cost for mlp in self.parts.values())


def check_budget(parts, budget, align, total):
    """Raise ValueError unless MLPs of these widths can lose so many of `total` parameters and keep some channels."""
    most = sum((mlp.n - min(align, mlp.n)) * mlp.cost for mlp in parts.values())
    if budget > most:
        raise ValueError(
            f"width: {budget / total:.4f} of the parameters are to go, and MLPs that keep {align} channels each lose "
            f"{math.floor(1e4 * most / total) / 1e4}; ask for less, remove blocks first, or keep fewer channels"
        )


def quark_width(n, share, align=128):
    """Return how many of n channels AMD Quark keeps when `share` of them is to go: the nearest multiple of `align`."""
    width = int((1 - share) * n)
    return max(align, round(width / align) * align) if width % align else width


def uniform(plan):
    """Return the same width for all layers, by Quark's rule: near the budget, and not on it."""
    return Found({block: min(mlp.n, quark_width(mlp.n, plan.share(), plan.align)) for block, mlp in plan.parts.items()})


def spread(plan, shares, most=1.0):
    """Return {layer: width} that removes the budget, to half a step of `align`, each layer in proportion to its share.

    shares: {layer: number from 0}; most: the largest share that a layer loses. At least `align` channels stay.
    """
    parts, align = plan.parts, plan.align
    caps = {block: min(most, 1 - min(align, mlp.n) / mlp.n) for block, mlp in parts.items()}

    def removed(c):
        return sum(min(caps[block], c * shares[block]) * mlp.n * mlp.cost for block, mlp in parts.items())

    high = max(caps.values()) / max(min(share for share in shares.values() if share > 0), 1e-9)
    c = bisected(removed, plan.budget, 0, high)
    return rounded(plan, {block: (1 - min(caps[block], c * shares[block])) * mlp.n for block, mlp in parts.items()})


def bisected(f, wanted, low, high):
    """Return where the rising function f is `wanted`, within [low, high]."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < wanted else (low, middle)
    return high


def rounded(plan, widths):
    """Return widths that are multiples of plan.align, or whole: rounded up, then down where most was rounded, until
    the budget is met as well as it can be."""
    parts, align = plan.parts, plan.align
    result = {block: min(parts[block].n, math.ceil(width / align - 1e-9) * align) for block, width in widths.items()}
    gone = sum((parts[block].n - width) * parts[block].cost for block, width in result.items())
    for block in sorted(widths, key=lambda block: widths[block] - result[block]):
        narrower = (result[block] - 1) // align * align
        less = (result[block] - narrower) * parts[block].cost
        if narrower >= min(align, parts[block].n) and abs(plan.budget - gone - less) < abs(plan.budget - gone):
            result[block], gone = narrower, gone + less
    return result


# ---- from weights, activations or slopes ------------------------------------------------------------------------


def alphapruning(plan):
    """Return widths by the tails of the spectra of each layer's matrices: the heavier, the less is removed."""
    alpha = {block: _mean([hill(p.detach()) for p in _matrices(plan, block.layer)]) for block in plan.parts}
    low, high = min(alpha.values()), max(alpha.values())
    return Found(
        spread(plan, {block: 1 - TAU + 2 * TAU * (a - low) / ((high - low) or 1) for block, a in alpha.items()})
    )


def hill(weight):
    """Return the Hill exponent of a matrix' eigenvalues σ², above the peak of the histogram of their logarithms."""
    values = torch.linalg.svdvals(weight.double()).square()
    values = values[values > 1e-5].sort().values  # as the authors' code: below it they are noise
    logs = values.log10()
    counts = torch.histc(logs, BINS)
    low = logs.min() + (logs.max() - logs.min()) * counts.argmax() / BINS
    tail = values[logs >= low]
    return 1 + len(tail) / (tail / 10**low).log().sum().item()


def owl(plan):
    """Return widths by the share of outliers, |W_ij| ||X_j|| above 5 times the layer's mean: the more, the wider."""
    norms = {}
    with contextlib.ExitStack() as stack:
        for block in plan.parts:
            for module in _linears(plan, block.layer):

                def add(module, args):
                    norms[module] = norms.get(module, 0) + args[0].flatten(0, -2).double().square().sum(0)

                stack.callback(module.register_forward_pre_hook(add).remove)
        for _ in walk(plan.decoder, plan.windows, plan.batch_size, plan.removed):
            pass
    outliers = {}
    for block in plan.parts:
        linears = [m for m in _linears(plan, block.layer) if m in norms]
        metric = [m.weight.detach().double().abs() * norms[m].sqrt() for m in linears]
        count, total = sum(m.numel() for m in metric), sum(m.sum().item() for m in metric)
        outliers[block] = sum((m > OUTLIER * total / count).sum().item() for m in metric) / count
    low, high = min(outliers.values()), max(outliers.values())
    scaled = {block: 2 * SPAN * (D - low) / ((high - low) or 1) for block, D in outliers.items()}
    mean = _mean(scaled.values())
    return Found(spread(plan, {block: max(0.0, plan.share() - (s - mean)) for block, s in scaled.items()}))


def ecoflap(plan):
    """Return widths by |w| times the slope of the loss along a random direction of the MLP: kept in proportion."""
    generator, importance = torch.Generator().manual_seed(plan.seed), {}
    batches = plan.windows.split(plan.batch_size)
    for block, mlp in plan.parts.items():
        weights = [module.weight for module in (*mlp.producers, mlp.consumer)]
        draws = [torch.randn(w.shape, generator=generator) for w in weights]
        losses = []
        for sign in (1, -1):
            moved = [
                (w.data.double() + sign * EPSILON * z.to(w.device)).to(w.dtype)
                for w, z in zip(weights, draws, strict=True)
            ]
            with holding([*zip(weights, moved, strict=True)]):
                losses.append(sum(_loss(plan, ids) for ids in batches))
        slope = abs(losses[0] - losses[1]) / (2 * EPSILON * plan.windows[:, 1:].numel())
        importance[block] = slope * _mean([w.detach().double().abs().mean().item() for w in weights])

    def kept(block, c):
        return min(1.0, max(1 - MOST, c * importance[block]))

    def left(c):
        return sum(kept(block, c) * mlp.n * mlp.cost for block, mlp in plan.parts.items())

    wanted = sum(mlp.n * mlp.cost for mlp in plan.parts.values()) - plan.budget
    c = bisected(left, wanted, 0, 1 / max(min(importance.values()), 1e-300))
    return Found(rounded(plan, {block: max(plan.align, kept(block, c) * mlp.n) for block, mlp in plan.parts.items()}))


def global_threshold(plan):
    """Return widths by one threshold for FLAP's scores of all channels, standardised in each layer."""
    scores = {}
    for block, channels in dense_channels(plan.decoder, plan.parts, plan.windows, plan.batch_size, plan.removed):
        s = flap(channels)
        scores[block] = (s - s.mean()) / s.std().clamp_min(1e-300)
    every = torch.cat([*scores.values()]).sort()
    costs = torch.cat([torch.full((len(s),), float(plan.parts[block].cost)) for block, s in scores.items()])
    last = int((costs[every.indices.cpu()].cumsum(0) < plan.budget).sum())
    threshold = every.values[min(last, len(costs) - 1)]
    return Found(rounded(plan, {block: max(plan.align, (s >= threshold).sum().item()) for block, s in scores.items()}))


def _loss(plan, ids):
    """Return the sum of token losses of a batch of windows (B, T)."""
    decoder = plan.decoder
    stream = decoder.embed(ids)
    h = stream.h
    for i in range(decoder.n_layers):
        h = decoder.run(i, decoder.kinds(i, plan.removed), h, stream)
    return decoder.token_losses(h, ids).double().sum().item()


def _linears(plan, i):
    """Return the linear projections of a layer's attention and MLP that are still there."""
    layer, family = plan.decoder.layers[i], plan.decoder.family
    branches = [
        getattr(layer, name, None) for kind in plan.decoder.kinds(i, plan.removed) for name in getattr(family, kind)
    ]
    return [m for branch in branches if branch is not None for m in branch.modules() if isinstance(m, nn.Linear)]


def _matrices(plan, i):
    return [module.weight for module in _linears(plan, i)]


def _mean(values):
    values = [*values]
    return sum(values) / len(values)


class Allocation(NamedTuple):
    """find(plan): the Found."""

    find: Callable
    about: str
    source: str


ALLOCATIONS = {
    "uniform": Allocation(uniform, "the same width for all layers, near the target", "AMD Quark's width rule"),
    "alphapruning": Allocation(alphapruning, "less from layers with heavy-tailed spectra", "arXiv 2410.10912"),
    "owl": Allocation(owl, "less from layers with more outliers", "arXiv 2310.05175"),
    "ecoflap": Allocation(ecoflap, "less from layers with a steeper loss", "arXiv 2310.02998"),
    "flap": Allocation(
        global_threshold, "one threshold for the standardised scores of all channels", "arXiv 2312.11983"
    ),
    "greedy": Allocation(
        greedy, "group by group, what raises the loss least for its size", "MultiPruner, arXiv 2501.09949"
    ),
}
