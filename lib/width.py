"""Narrower MLPs and attentions: which channels or heads go, and what the rest makes of it.

Every published method is three choices. An ALLOCATION (lib.allocation) says how many units each branch keeps, a
CRITERION which, a REFIT gives the projection behind them new weights on what is kept. Layers are done from the bottom
up, each on the inputs that the model gives it that is already narrow below. The tables at the end of this file hold
criteria and refits with their sources.

    narrowed = narrow(decoder, windows, {Block("mlp", i): 1024 for i in range(30)}, "osscar", "ls")
    with applied(decoder, narrowed.edit):
        after = window_losses(decoder, windows, 8)
    export("models/Llama-2-7b-hf", narrowed.edit, "narrow")
"""

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from lib.blocks import KINDS, Block
from lib.edits import Edit, replaced
from lib.importance import summed_gradients
from lib.osscar import eliminate, swapped
from lib.parts import check_widths, find_parts

RIDGE = 1e-2  # of the mean diagonal of H


class Narrowed(NamedTuple):
    """edit: the Edit. kept: {Block: units kept, (k,) long}. errors: {Block: ||W X - W_K X_K||² / ||W X||² on the
    calibration inputs}, after the refit."""

    edit: Edit
    kept: dict
    errors: dict


@torch.no_grad()
def narrow(decoder, windows, widths, criterion="osscar", refit="ls", batch_size=8, removed=(), about=()):
    """Return the Narrowed model whose branches keep `widths`; the one in memory stays as it is.

    windows: token ids (N, T). widths: {Block("mlp", i): channels, Block("mha", i): key-value heads}; branches that it
    does not name stay whole. criterion, refit: names in CRITERIA and REFITS. removed: blocks that are removed as well,
    and masked here. about: what else the Edit is to say. The sums of one branch are held at a time, (n, n) float64,
    8 n² bytes, and OSSCAR needs up to six of them: 37 GiB at the 28,672 channels of a 70B model.
    Raises ValueError for a model whose branches are other than lib.parts knows, and for widths that are none.
    """
    parts = find_parts(decoder, removed, sorted({block.kind for block in widths}))
    check_widths(parts, widths)
    narrower = {block: parts[block] for block, width in widths.items() if width < parts[block].n}
    names = {id(p): name for name, p in decoder.model.named_parameters()}
    modules = {id(m): name for name, m in decoder.model.named_modules()}
    chosen = CRITERIA[criterion]
    gradients = taylor(decoder, narrower, windows) if chosen.gradients else {}
    streams = [decoder.embed(ids) for ids in windows.split(batch_size)]
    states = [stream.h for stream in streams]
    tensors, kept, errors = {}, {}, {}

    def after(i):
        kinds = decoder.kinds(i, removed)
        return [decoder.run(i, kinds, h, s) for h, s in zip(states, streams, strict=True)]

    for i in range(decoder.n_layers):
        with contextlib.ExitStack() as already:
            for block in (Block(kind, i) for kind in KINDS if (kind, i) in narrower):
                part = narrower[block]
                with inputs(part.consumer) as sums:
                    after(i)
                channels = Channels(part, sums, gradients.get(block))
                keep = chosen.keep(channels, widths[block])
                weight, bias = REFITS[refit].fit(channels, keep)
                kept[block], errors[block] = keep.cpu(), channels.error(keep, weight, bias)
                cut = _cut(part, keep, weight, bias, names, modules)
                already.enter_context(replaced(decoder, Edit(tensors=cut, widths={block: len(keep)})))
                tensors |= cut
            states = after(i)
    new = {block: len(keep) for block, keep in kept.items()}
    how = {"method": "width", "criterion": criterion, "refit": refit, **dict(about)}
    how["widths"] = {str(block): n for block, n in new.items()}
    return Narrowed(Edit(tuple(removed), tensors, about=how, widths=new), kept, errors)


def _cut(part, keep, weight, bias, names, modules):
    """Return {name: tensor, or function that loads it} of a Part that keeps `keep`, with the consumer's new weights."""
    tensors, last = {}, part.consumer
    for module in part.producers:
        rows = part.rows(module, keep)
        for parameter in module.parameters(recurse=False):
            tensors[names[id(parameter)]] = functools.partial(parameter.data.index_select, 0, rows)
    tensors[names[id(last.weight)]] = weight.to(last.weight.dtype)
    if bias is not None:
        tensors[f"{modules[id(last)]}.bias"] = bias.to(last.weight.dtype)
    return tensors


# ---- what is known of a layer's channels -------------------------------------------------------------------------


@contextlib.contextmanager
def inputs(module):
    """Within this context a projection's inputs X (n, tokens) are added up: yields {"H": X Xᵀ, "total": X 1, "tokens"}.

    float64, on the projection's device.
    """
    n = module.weight.shape[1]
    zeros = functools.partial(torch.zeros, dtype=torch.float64, device=module.weight.device)
    sums = {"H": zeros(n, n), "total": zeros(n), "tokens": 0}

    def add(_, args):
        x = args[0].flatten(0, -2).double()
        sums["H"].addmm_(x.T, x)
        sums["total"] += x.sum(0)
        sums["tokens"] += len(x)

    hook = module.register_forward_pre_hook(add)
    try:
        yield sums
    finally:
        hook.remove()


@torch.no_grad()
def walk(decoder, windows, batch_size=8, removed=(), context=contextlib.nullcontext):
    """Run windows (N, T) through the layers, all through one before the next, each within context(i); yield i after it.

    The default context takes no notice of i.
    """
    streams = [decoder.embed(ids) for ids in windows.split(batch_size)]
    states = [stream.h for stream in streams]
    for i in range(decoder.n_layers):
        with context(i):
            kinds = decoder.kinds(i, removed)
            states = [decoder.run(i, kinds, h, s) for h, s in zip(states, streams, strict=True)]
        yield i


def dense_channels(decoder, parts, windows, batch_size=8, removed=()):
    """Yield (Block, Channels) of each of `parts` on the inputs that the model as it is gives it."""
    sums = {}

    @contextlib.contextmanager
    def watched(i):
        with contextlib.ExitStack() as stack:
            for block in (Block(kind, i) for kind in KINDS if (kind, i) in parts):
                sums[block] = stack.enter_context(inputs(parts[block].consumer))
            yield

    for _ in walk(decoder, windows, batch_size, removed, watched):
        for block in [*sums]:
            yield block, Channels(parts[block], sums.pop(block))


class Channels:
    """What a criterion and a refit may ask of a Part's n units, each `size` columns of N in all.

    W: the consumer's matrix (d, N), float64. H: X Xᵀ (N, N) of its inputs over `tokens` calibration tokens; mean: (N,).
    gradients: (fine, coarse) Taylor scores of the units (n,), or None. G, B, ridged: OSSCAR's quantities.
    """

    def __init__(self, part, sums, gradients=None):
        self.part, self.gradients = part, gradients
        self.H, self.tokens = sums["H"], sums["tokens"]
        self.mean = sums["total"] / max(1, self.tokens)
        self.W = part.consumer.weight.detach().double()
        self.n, self.size = part.n, part.size

    @functools.cached_property
    def ridged(self):
        """H + λ mean(diag H) I; the identity where no input ever differs from zero."""
        diagonal = self.H.diagonal()
        return self.H + torch.eye(len(self.H), dtype=self.H.dtype, device=self.H.device) * (
            RIDGE * diagonal.mean() or 1.0
        )

    @functools.cached_property
    def B(self):
        """Wᵀ (N, d) with zero rows for dead columns, whose input is always zero."""
        return self.W.T * (self.H.diagonal() > 0).unsqueeze(1)

    @functools.cached_property
    def G(self):
        return self.ridged @ self.B

    def error(self, keep, weight, bias=None):
        """Return ||W X - weight X_K - bias||² / ||W X||², bias beyond the one that was there."""
        E = self.W.clone()
        E[:, self.part.columns(keep)] -= weight
        new = torch.zeros_like(self.W[:, 0]) if bias is None else bias.double() - _bias(self.part.consumer, self.W)
        shift = 2 * self.tokens * (new @ (E @ self.mean)) - self.tokens * (new @ new)
        return (((E @ self.H) * E).sum() - shift).item() / max(((self.W @ self.H) * self.W).sum().item(), 1e-300)


def _bias(module, like):
    return like.new_zeros(len(like)) if module.bias is None else module.bias.double()


def taylor(decoder, parts, windows):
    """Return {Block: (fine, coarse)} of LLM-Pruner: Σ|w g| and |Σ w g| over all weights of a unit, (n,) float64.

    g: the gradient of the sum over windows of their mean next-token loss, a window at a time.
    """
    modules = {block: (*part.producers, part.consumer) for block, part in parts.items()}
    scores = {}
    with summed_gradients(decoder.model, [m.weight for some in modules.values() for m in some]) as gradients:
        for ids in windows.split(1):
            ids = ids.to(decoder.input_device)
            logits = decoder.model(input_ids=ids, use_cache=False).logits
            logits = logits if logits.dtype == torch.float64 else logits.float()
            nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:].to(logits.device)).backward()
    for block, part in parts.items():
        fine, coarse = 0, 0
        for module in modules[block]:
            weight, g = module.weight.detach(), gradients[id(module.weight)]
            s = (weight.to(g.device) * g).double()
            of_units = 0 if module is part.consumer else 1  # the dimension that is not the units'
            fine = fine + part.sums(s.abs().sum(of_units)).to(weight.device)
            coarse = coarse + part.sums(s.sum(of_units)).to(weight.device)
        scores[block] = (fine, coarse.abs())
    return scores


# ---- the tables ------------------------------------------------------------------------------------------------------


class Criterion(NamedTuple):
    """order(channels, n_drop): the channels that go, the first first, (n_drop,) long. improve(channels, keep): a better
    kept set of the same size, where the criterion has a second stage. gradients: whether it needs a backward pass."""

    order: Callable
    about: str
    source: str
    improve: Callable | None = None
    gradients: bool = False

    def keep(self, channels, k):
        """Return the k channels kept, sorted (k,) long."""
        rest = torch.ones(channels.n, dtype=torch.bool, device=channels.H.device)
        rest[self.order(channels, channels.n - k)] = False
        keep = rest.nonzero().squeeze(1)
        return self.improve(channels, keep) if self.improve and len(keep) < channels.n and channels.size == 1 else keep


def lowest(score):
    """Return a Criterion's order from a function of Channels to scores (n,): the lowest go first, of equal ones the
    first."""
    return lambda channels, n_drop: score(channels).argsort(stable=True)[:n_drop]


def l1(channels):
    part = channels.part
    return sum(part.sums(p.weight.detach().double().abs().sum(1)) for p in part.producers)


def activation(channels):
    return channels.part.sums(channels.H.diagonal())


def magnitude(channels):
    return channels.part.sums(channels.W.abs().sum(0))


def flap(channels):
    variance = channels.H.diagonal() / channels.tokens - channels.mean.square()
    return channels.part.sums(variance * channels.W.square().sum(0))


def blended(channels):
    """HyWIA's blend a·fine + (1-a)·coarse of shares of the layer's sums.

    The released network that finds `a` is never trained; here `a` is, of 0, 0.1, ..., 1, what leaves the least error
    of reconstruction without a refit when half of the channels go.
    """
    fine, coarse = (s / s.sum().clamp_min(1e-300) for s in channels.gradients)

    def lost(a):
        drop = (a * fine + (1 - a) * coarse).argsort(stable=True)[: channels.n // 2]
        gone = channels.part.columns(drop)
        W = channels.W[:, gone]
        return ((W @ channels.H[gone][:, gone]) * W).sum().item()

    a = min((k / 10 for k in range(11)), key=lost)
    return a * fine + (1 - a) * coarse


CRITERIA = {
    "osscar": Criterion(
        lambda channels, n_drop: eliminate(channels, n_drop)[0],
        "least error of the layer's output after a refit: greedy, then swaps",
        "OSSCAR, arXiv 2406.07706; AMD Quark's pruner",
        swapped,
    ),
    "l1": Criterion(lowest(l1), "L1 norm of the rows that write the channel", "MultiPruner, arXiv 2501.09949"),
    "magnitude": Criterion(lowest(magnitude), "L1 norm of the column that reads the channel", "a baseline"),
    "activation": Criterion(lowest(activation), "norm of the channel's activations", "2SSP, arXiv 2501.17771"),
    "flap": Criterion(
        lowest(flap), "variance of the channel times its column's squared norm", "FLAP, arXiv 2312.11983"
    ),
    "taylor-fine": Criterion(
        lowest(lambda channels: channels.gradients[0]), "sum of |w g| over the channel", "LLM-Pruner", gradients=True
    ),
    "taylor-coarse": Criterion(
        lowest(lambda channels: channels.gradients[1]), "|sum of w g| over the channel", "LLM-Pruner", gradients=True
    ),
    "hywia": Criterion(
        lowest(blended), "fine and coarse Taylor scores, blended for each layer", "HyWIA", gradients=True
    ),
}


class Refit(NamedTuple):
    """fit(channels, keep): (the consumer's weights on what is kept (d, k) float64, its bias (d,), None: as it is)."""

    fit: Callable
    about: str
    source: str


def least_squares(channels, keep):
    K = channels.part.columns(keep)
    H, G = channels.ridged[K][:, K], channels.G[K]
    return torch.cholesky_solve(G, torch.linalg.cholesky(H)).T.contiguous(), None


def mean_in_bias(channels, keep):
    mean, K = channels.mean.clone(), channels.part.columns(keep)
    mean[K] = 0
    return channels.W[:, K].contiguous(), _bias(channels.part.consumer, channels.W) + channels.W @ mean


def unchanged(channels, keep):
    return channels.W[:, channels.part.columns(keep)].contiguous(), None


REFITS = {
    "ls": Refit(least_squares, "least squares on what is kept", "OSSCAR; GRAIL, arXiv 2602.23795"),
    "bias": Refit(mean_in_bias, "the mean of what is gone goes into the bias", "FLAP, arXiv 2312.11983"),
    "none": Refit(unchanged, "the weights as they are", ""),
}
