"""How much a model needs its blocks or layers: one function a metric, the lowest score is removed first.

METRICS is the one table of them. What is "searched" is judged anew after each removal, by lib.search. What is judged
"once" scores blocks ("mha", i), ("mlp", i) or layers ("layer", i) of the model as it is and removes the first K of
`ranked`. A "run" scores every run of n consecutive layers and removes one. Sources, by name:

    bi               block influence: ShortGPT, arXiv 2403.03853; for blocks: LLM-Drop, arXiv 2406.15786
    rm               relative magnitude: Samragh et al., arXiv 2309.02784
    taylor, ppl      Shortened LLaMA, arXiv 2402.02834 (its "plus" variants keep layers 0-3 and the last two)
    magnitude        sum of absolute weights, ibid.
    kl               the fitness of EvoPress, arXiv 2410.14649
    last, random     what a method has to beat
    angular          Gromov et al., arXiv 2403.17887; PruneMe
    window_ppl       the depth-wise pruner of AMD Quark
    window_cos       the selection of LLM-Streamline, arXiv 2403.19135

    scores = METRICS["bi"].function(decoder, decoder.blocks("layer"), windows)
    order = ranked(scores)[:7]
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch

from lib.blocks import Block
from lib.candidates import starts
from lib.engines import Cached, Streamed, judge
from lib.evaluate import OBJECTIVES, perplexity, window_losses
from lib.memory import DEVICE_SHARE, free_bytes
from lib.similarity import similarities


def ranked(scores):
    """Return the keys of finite score, the lowest first, of equal ones the first given."""
    return sorted((unit for unit, score in scores.items() if math.isfinite(score)), key=scores.get)


# ---- one score for each of `units`, blocks or layers of the decoder ------------------------------
# function(decoder, units, windows, *, batch_size, seed, progress) -> {unit: score}
# windows: token ids (N, T); progress(n) is called as n more windows (times units) are done.


def bi(decoder, units, windows, *, batch_size=8, seed=0, progress=None):
    """Return 1 - mean over tokens cos(x, x + f(x))."""
    cos = similarities(decoder, units, windows, batch_size, progress).cos
    return {unit: 1 - cos[unit] for unit in units}


def rm(decoder, units, windows, *, batch_size=8, seed=0, progress=None):
    """Return the mean over tokens of ||f(x)|| / (||x + f(x)|| + 1e-6)."""
    magnitudes = similarities(decoder, units, windows, batch_size, progress).magnitude
    return {unit: magnitudes[unit] for unit in units}


def ppl(decoder, units, windows, *, batch_size=8, seed=0, progress=None):
    """Return the perplexity with the unit masked: the first step of the iterative search."""
    return _masked(decoder, units, windows, batch_size, progress, OBJECTIVES["ppl"])


def kl(decoder, units, windows, *, batch_size=8, seed=0, progress=None):
    """Return the mean over tokens of KL(logits of the model || its logits with the unit masked)."""
    return _masked(decoder, units, windows, batch_size, progress, OBJECTIVES["kl"])


def magnitude(decoder, units, windows, *, batch_size=8, seed=0, progress=None):
    """Return the sum of abs(w) over all parameters that leave with the unit: weights, biases, its norms."""
    require_weights(decoder, units, "magnitude")
    scores = {}
    for unit in units:
        with decoder.resident(unit.layer):
            scores[unit] = sum(p.abs().sum(dtype=torch.float64).item() for p in decoder.parameters([unit]))
    return scores


def taylor(decoder, units, windows, *, batch_size=8, seed=0, progress=None):
    """Return the sum of abs(w dL/dw) over all parameters that leave with the unit, norms included.

    L is the sum over windows of a window's mean next-token loss. A window at a time, whatever the batch size:
    its activations must fit the device. The units' gradients are summed in float32 or better, in host
    memory where the device has no room for them. Raises ValueError where there are no gradients: quantised or
    offloaded weights.
    """
    require_weights(decoder, units, "taylor", inside=True)
    parts = {unit: decoder.parameters([unit]) for unit in units}
    wanted = {id(p): p for parameters in parts.values() for p in parameters}
    with summed_gradients(decoder.model, wanted.values()) as gradients:
        for ids in windows.split(1):
            ids = ids.to(decoder.input_device)
            logits = decoder.model(input_ids=ids, use_cache=False).logits
            logits = logits if logits.dtype == torch.float64 else logits.float()
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten().to(logits.device), reduction="sum"
            )
            (losses / (ids.shape[1] - 1)).backward()
            if progress:
                progress(len(ids))
        return {
            unit: sum(
                (p.detach().to(gradients[id(p)].device) * gradients[id(p)]).abs().sum(dtype=torch.float64).item()
                for p in parts[unit]
            )
            for unit in units
        }


def last(decoder, units, windows, *, batch_size=8, seed=0, progress=None):
    """Return minus the position from the bottom: the topmost goes first, of a layer its MLP before its attention."""
    return {unit: -(2.0 * unit.layer + (unit.kind != "mha")) for unit in units}


def random(decoder, units, windows, *, batch_size=8, seed=0, progress=None):
    """Return a draw that `seed` decides."""
    draw = torch.rand(len(units), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return dict(zip(units, draw.tolist(), strict=True))


# ---- one score for each run of n consecutive layers ----------------------------------------------
# function(decoder, n, windows, *, batch_size, first, last, progress) -> {start: score}
# The layers start..start + n - 1 would go; the first `first` and the last `last` layers are kept.


def angular(decoder, n, windows, *, batch_size=8, first=0, last=0, progress=None):
    """Return the mean over windows of the angle between h_start and h_(start + n) at the last token, over pi.

    PruneMe's tool leaves out layer 0's input, so that it can never remove that layer, and takes the
    last state after the final norm; both are put right here.
    """
    distances = similarities(decoder, (), windows, batch_size, progress).angular
    return {i: distances[i, i + n].item() for i in starts(decoder.n_layers, n, first, last)}


def window_cos(decoder, n, windows, *, batch_size=8, first=0, last=0, progress=None):
    """Return 1 - mean over tokens cos(h_start, h_(start + n)).

    LLM-Streamline puts one trained layer in the window's place and so takes n one larger than the
    number of layers saved; here all n go.
    """
    cos = similarities(decoder, (), windows, batch_size, progress).pairs
    return {i: 1 - cos[i, i + n].item() for i in starts(decoder.n_layers, n, first, last)}


def window_ppl(decoder, n, windows, *, batch_size=8, first=0, last=0, progress=None):
    """Return the perplexity without the window's layers; the layers below a window are run once for all of them.

    Not so where layers are offloaded: there a window is one walk through all layers, each moved once.
    """
    windows_of = starts(decoder.n_layers, n, first, last)
    if decoder.offloaded:
        scores = {}
        for i in windows_of:
            run = [Block("layer", j) for j in range(i, i + n)]
            scores[i] = perplexity(window_losses(decoder, windows, batch_size, run), windows.shape[1])
            if progress:
                progress(len(windows))
        return scores
    losses = {i: [] for i in windows_of}
    batches = windows.split(batch_size)
    objective = OBJECTIVES["ppl"](decoder, batches)
    for k, ids in enumerate(batches):
        stream = decoder.embed(ids)
        x = stream.h
        for i in range(decoder.n_layers - last - n + 1):
            if i in losses:
                h = x
                for j in range(i + n, decoder.n_layers):
                    h = decoder.run(j, decoder.kinds(j), h, stream)
                losses[i].append(objective.losses(k, h))
                if progress:
                    progress(len(ids))
            x = decoder.run(i, decoder.kinds(i), x, stream)
    return {i: objective.score(losses[i]) for i in windows_of}


# ---- the table -----------------------------------------------------------------------------------


class Metric(NamedTuple):
    """A way to choose what goes.

    kind: "searched" step by step, every unit judged "once", or one "run" of consecutive layers. function: an objective
    of lib.evaluate of what is searched, else a function of this file. about: what it is, in a few words. passes: how
    many passes of all windows it takes, None for one a unit (or run). weights: "dense" where it works on unquantised
    weights, "inside" where it needs them in memory, too.
    """

    kind: str
    function: Callable
    about: str
    passes: int | None = None
    weights: str | None = None


METRICS = {
    "ppl": Metric("searched", OBJECTIVES["ppl"], "perplexity without the unit (BlockPruner, SLEB)"),
    "kl": Metric("searched", OBJECTIVES["kl"], "divergence from the dense model (EvoPress's fitness)"),
    "ppl-oneshot": Metric("once", ppl, "perplexity without the unit (Shortened LLaMA)"),
    "kl-oneshot": Metric("once", kl, "divergence from the dense model without the unit"),
    "bi": Metric("once", bi, "block influence, 1 - cos of what enters and leaves (ShortGPT)", passes=1),
    "rm": Metric("once", rm, "relative magnitude of what the unit adds (Samragh et al.)", passes=1),
    "taylor": Metric("once", taylor, "sum of |weight x gradient| (Shortened LLaMA)", passes=3, weights="inside"),
    "magnitude": Metric("once", magnitude, "sum of |weight|", passes=0, weights="dense"),
    "last": Metric("once", last, "from the top down, a baseline", passes=0),
    "random": Metric("once", random, "a draw, a baseline", passes=0),
    "angular": Metric("run", angular, "angle between a run's ends (Gromov et al.)", passes=1),
    "window_ppl": Metric("run", window_ppl, "perplexity without the run (Quark)"),
    "window_cos": Metric("run", window_cos, "1 - cos of a run's ends (LLM-Streamline)", passes=1),
}


# ---- what metrics need ---------------------------------------------------------------------------


def require_weights(decoder, units, method, inside=False):
    """Raise ValueError, naming the method, where the weights of `units` are quantised, or `inside` and offloaded."""
    name = type(decoder.model).__name__
    layers = {unit.layer for unit in units}
    tensors = [t for i in layers for t in (*decoder.layers[i].parameters(), *decoder.layers[i].buffers())]
    packed = (torch.int32, torch.int16)
    if any(t.dtype in packed or (t.dtype.itemsize == 1 and t.dtype != torch.bool) for t in tensors):
        raise ValueError(
            f"{method}: the weights of this {name} are quantised, and it works on dense ones; load the model's "
            "unquantised checkpoint, or take another method"
        )
    if inside and any(p.is_meta for i in layers for p in decoder.layers[i].parameters()):
        raise ValueError(
            f"{method}: needs gradients or all weights at once, and the layers of this {name} are offloaded; load "
            "it into memory, or take another method"
        )


def _roomy(sizes):
    """Return the devices that have room for so many bytes: {device: bytes}."""
    return {device for device, size in sizes.items() if size < DEVICE_SHARE * free_bytes(device)[0]}


@contextlib.contextmanager
def summed_gradients(model, parameters):
    """Within this context a backward pass adds to {id(p): gradient}, float32 or better, and on the device of p where
    the gradients of all its parameters find room, else in host memory. The model is restored.
    """
    parameters = list(parameters)
    dtypes = {id(p): torch.promote_types(p.dtype, torch.float32) for p in parameters}
    sizes = Counter()
    for p in parameters:
        sizes[p.device] += p.numel() * dtypes[id(p)].itemsize
    roomy = _roomy(sizes)
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    sums, hooks = {}, []

    def gather(p):
        sums[id(p)] += p.grad.to(sums[id(p)].device)
        p.grad = None

    try:
        model.requires_grad_(False)
        for p in parameters:
            p.grad = None
            p.requires_grad_(True)
            where = p.device if p.device in roomy else "cpu"
            sums[id(p)] = torch.zeros(p.shape, dtype=dtypes[id(p)], device=where)
            hooks.append(p.register_post_accumulate_grad_hook(gather))
        with torch.enable_grad():
            yield sums
    finally:
        for hook in hooks:
            hook.remove()
        for p, requires_grad, grad in before:
            p.requires_grad_(requires_grad)
            p.grad = grad


def _masked(decoder, units, windows, batch_size, progress, objective):
    """Return the objective with each of `units` masked alone, by the engine for a model that fits or does not."""
    if decoder.offloaded:
        engine = Streamed(decoder, units, windows, batch_size, objective)
    else:
        engine = Cached(decoder, units, windows, batch_size, objective, cache_bytes=0)  # nothing is used twice
    return judge(engine, units, progress=progress)
