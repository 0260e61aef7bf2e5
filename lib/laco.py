"""LaCo: layers collapse into one by adding up what makes them differ (Yang et al., arXiv 2402.11187).

From the top down, C layers are merged into the lowest of them; a merge stays when the final hidden
states of a few texts keep a mean cosine above a threshold with the dense model's. Only the projections
are merged (attention and MLP, weights and biases); norms stay the lowest layer's. Two merges, by name:

    paper       theta_l + sum over k of (theta_(l+k) - theta_l), as the paper defines it
    last        the topmost layer's projections: what the authors' notebook comes to, because it
                subtracts the sum so far in place of theta_l

    collapsed = collapse(decoder, windows, merge=4, remove=6)
    export(path, edit(decoder, collapsed.layers), "merged", "stock")
"""

import contextlib
import functools
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from lib.blocks import KINDS, Block, blocks_of
from lib.edits import Edit, holding
from lib.importance import require_weights

HALVINGS = 12  # of the threshold's range, to 0.0005; each costs only states not compared before


class Merged(NamedTuple):
    """A layer of the collapsed model: layer `base` of the dense one with the sum of weights (layer, factor) in it."""

    base: int
    weights: tuple


class Collapsed(NamedTuple):
    """layers: list of Merged, lowest first; merges: (place in the model as it then was, similarity); threshold."""

    layers: tuple
    merges: list
    threshold: float


def collapse(
    decoder,
    windows,
    merge=4,
    *,
    interval=2,
    lowest=1,
    highest=None,
    variant="paper",
    threshold=None,
    remove=None,
    batch_size=8,
    progress=None,
):
    """Return the Collapsed model, for `threshold` or the greatest threshold that removes `remove` layers.

    No weight is changed. With `remove` the descent ends once so many are gone: how many layers a
    threshold removes jumps by several merges, since after one merge the next changes little.
    windows: token ids (N, T), a few; merge: layers merged at a time (C), so each merge removes merge - 1;
    interval: layers to go down after a merge; lowest, highest: merges lie in [lowest, highest), None is
    the top; progress() is called at each comparison. Raises ValueError for a family whose layers
    cannot be merged, and where no threshold removes `remove` layers.
    """
    check_mergeable(decoder)
    L = decoder.n_layers
    highest = L if highest is None else highest
    check_range(L, merge, lowest, highest, remove)
    similarity = _similarity(decoder, windows, batch_size, progress)

    def descend(threshold):
        layers, merges = tuple(Merged(i, ((i, 1),)) for i in range(L)), []
        place = highest - merge
        while place >= lowest and (remove is None or L - len(layers) < remove):
            candidate = merged(layers, place, merge, variant)
            s = similarity(candidate)
            if s > threshold:
                layers = candidate
                merges.append((place, s))
                place = min(place - interval, len(layers) - merge)
            else:
                place -= 1
        return Collapsed(layers, merges, threshold)

    if remove is None:
        return descend(threshold)
    low, high, found = -1.0, 1.0, descend(-1.0)
    if len(found.layers) > L - remove:
        raise ValueError(
            f"LaCo: merges of {merge} layers that go down by {interval} remove {L - len(found.layers)} layers at any "
            f"threshold, {remove} are asked for; merge fewer at a time, or go down by less"
        )
    for _ in range(HALVINGS):
        middle = descend((low + high) / 2)
        if len(middle.layers) == L - remove:
            low, found = middle.threshold, middle
        else:
            high = middle.threshold
    return found


def merged(layers, place, merge, variant="paper"):
    """Return `layers` with those of [place, place + merge) merged into the first of them."""
    group, total = layers[place : place + merge], Counter()
    for k, layer in enumerate(group):
        # theta_l + sum of differences: every other layer once, theta_l as often as is left of 1
        factor = {"paper": 2 - merge if k == 0 else 1, "last": int(k == merge - 1)}[variant]
        for i, part in layer.weights:
            total[i] += factor * part
    weights = tuple(sorted((i, factor) for i, factor in total.items() if factor))
    return (*layers[:place], Merged(group[0].base, weights), *layers[place + merge :])


VARIANTS = ("paper", "last")


def check_range(n_layers, merge, lowest, highest, remove=None):
    """Raise ValueError unless merges of so many layers fit in and can remove so many."""
    if not 0 <= lowest <= highest - merge <= n_layers - merge:
        raise ValueError(
            f"LaCo: merges of {merge} layers in [{lowest}, {highest}) of {n_layers} layers; make room for one"
        )
    most = (highest - lowest - 1) // (merge - 1) * (merge - 1)
    if remove is not None and (remove % (merge - 1) or not 0 < remove <= most):
        raise ValueError(
            f"LaCo: merges of {merge} layers in [{lowest}, {highest}) remove {merge - 1} at a time and at most {most}; "
            f"{remove} cannot be reached"
        )


def merge_sizes(remove):
    """Return how many layers a merge can take, of 4, 3 and 2, so that merges remove just `remove`; None: anything."""
    return [C for C in (4, 3, 2) if remove is None or remove % (C - 1) == 0]


def check_mergeable(decoder):
    """Raise ValueError where a decoder's layers are no stack of linear projections of the same shapes."""
    model, name = decoder.model, type(decoder.layers[0]).__name__
    require_weights(decoder, [Block("layer", i) for i in range(decoder.n_layers)], "LaCo", inside=True)
    shapes = [[(n, p.shape) for n, p in projections(decoder, i)] for i in range(decoder.n_layers)]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"LaCo: the layers of {type(model).__name__} differ in shape and cannot be merged")
    covered = {id(p) for _, p in projections(decoder, 0)}
    rest = [n for n, p in decoder.layers[0].named_parameters() if p.dim() > 1 and id(p) not in covered]
    if rest:
        raise ValueError(
            f"LaCo: {name} keeps weights outside its linear projections ({', '.join(rest)}), such as experts; merging "
            "is defined for dense layers: take another method for this family"
        )


def projections(decoder, i):
    """Return [(name, parameter)] of the linear modules in layer i's attention and MLP."""
    from transformers.pytorch_utils import Conv1D

    layer, found = decoder.layers[i], []
    for name in (name for kind in KINDS for name in getattr(decoder.family, kind)):
        for inner, module in getattr(layer, name, nn.Module()).named_modules(prefix=name):
            if isinstance(module, (nn.Linear, Conv1D)):
                found += [(f"{inner}.{n}", p) for n, p in module.named_parameters(recurse=False)]
    return found


def edit(decoder, layers, about=()):
    """Return the Edit that makes a model the one of these layers (a Collapsed's); about: what else it is to say.

    The sums are added up when they are asked for, from the weights that the model has now.
    """
    names = {id(p): name for name, p in decoder.model.named_parameters()}
    tensors, kept = {}, {layer.base for layer in layers}
    for layer in layers:
        if layer.weights != ((layer.base, 1),):
            targets = [names[id(p)] for _, p in projections(decoder, layer.base)]
            tensors |= zip(targets, _sums(decoder, layer), strict=True)
    removed = blocks_of(Block("layer", i) for i in range(decoder.n_layers) if i not in kept)
    how = {"layers": [[layer.base, [list(part) for part in layer.weights]] for layer in layers]}
    return Edit(tuple(removed), tensors, about={"method": "laco", **dict(about), **how})


def _similarity(decoder, windows, batch_size, progress):
    """Return the function of layers to the mean over tokens of cos(final state, dense final state); each asked once.

    The dense states entering all layers are kept: below the lowest merge they are the collapsed model's, too.
    """
    streams, dense, known = [decoder.embed(ids) for ids in windows.split(batch_size)], [], {}
    for stream in streams:
        states = [stream.h]
        for i in range(decoder.n_layers):
            states.append(decoder.run(i, KINDS, states[-1], stream))
        dense.append(states)

    def similarity(layers):
        if layers not in known:
            start = next(k for k, layer in enumerate(layers) if layer.weights != ((k, 1),))
            total = 0.0
            for stream, states in zip(streams, dense, strict=True):
                before, after = states[-1], _run(decoder, stream, layers[start:], states[start])
                before, after = before.double(), after.to(before.device).double()
                total += torch.nn.functional.cosine_similarity(before, after, dim=-1, eps=1e-30).sum().item()
            known[layers] = total / windows.numel()
            if progress:
                progress()
        return known[layers]

    return similarity


def _run(decoder, stream, layers, h):
    for layer in layers:
        with _replaced(decoder, layer):
            h = decoder.run(layer.base, KINDS, h, stream)
    return h


@contextlib.contextmanager
def _replaced(decoder, layer):
    """Within this context the layer `layer.base` has its merged weights."""
    if layer.weights == ((layer.base, 1),):
        yield
        return
    parameters = [p for _, p in projections(decoder, layer.base)]
    with holding([(p, load()) for p, load in zip(parameters, _sums(decoder, layer), strict=True)]):
        yield


def _sums(decoder, layer):
    """Return for each tensor of a Merged layer's projections the function that adds it up."""
    parts = [(factor, [p.data for _, p in projections(decoder, i)]) for i, factor in layer.weights]
    return [
        functools.partial(_sum, [(factor, tensors[k]) for factor, tensors in parts]) for k in range(len(parts[0][1]))
    ]


def _sum(parts):
    """Return the sum of factor * tensor in float32 or better, in the dtype of the first."""
    like = parts[0][1]
    wide = torch.promote_types(like.dtype, torch.float32)
    return sum(factor * tensor.to(like.device, wide) for factor, tensor in parts).to(like.dtype)
