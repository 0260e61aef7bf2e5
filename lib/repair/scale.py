"""One number for each gap: the stream is multiplied by what the missing blocks would have made it grow.

After Prune&Comp (arXiv 2507.18212), with the mean over tokens of RMS(after) / RMS(before) in the place of its mean over
channels. Every norm that reads the stream cancels its size, so multiplying the stream at a gap is the same as dividing
everything that is added to it later: that is how the factor goes into weights, with tied embeddings, biases, learned
positions and any format left as they are, and at no cost.
"""

import functools
import math

import torch

from lib.blocks import KINDS
from lib.edits import Edit
from lib.repair.gaps import find_writers, gaps_of, scaled, steps_of

POWERS = (1.0, 0.75, 0.5, 0.25)  # of the measured factors; 1 is the published method


def scale(decoder, removed, fit, choose, batch_size=8, progress=None):
    """Yield (strength, Edit) for each power of the factors measured on the windows `fit` (N, T).

    Less than the whole factor is better where several gaps follow each other: the blocks between them restore some of
    the stream's size, too. choose: not looked at. progress(words) after each batch. Raises ValueError for a family
    whose stream is not free in size, and where a factor is not finite.
    """
    path = steps_of(decoder, removed)
    gaps = gaps_of(path)
    factors = growth(decoder, path, gaps, fit, batch_size, progress)
    later = [block for step in path[gaps[0][1] :] for block in step.blocks]
    writers = find_writers(decoder, later, fit[:1])
    for power in POWERS:
        used = [factor**power for factor in factors]
        edit = Edit(tuple(removed), divided(decoder, path, gaps, used, writers))
        yield {"power": power, "factors": [round(f, 4) for f in used]}, edit


def growth(decoder, path, gaps, windows, batch_size=8, progress=None):
    """Return for each gap the mean over tokens of RMS(after) / RMS(before) on the dense model's streams.

    Raises ValueError where one is not a positive number.
    """
    sums, done = torch.zeros(len(gaps), dtype=torch.float64), 0
    starts, ends = ({gap[side]: g for g, gap in enumerate(gaps)} for side in (0, 1))
    for ids in windows.split(batch_size):
        stream = decoder.embed(ids)
        h = before = stream.h
        for k, step in enumerate(path[: gaps[-1][1]]):
            if k in starts:
                before = decoder.run(step.layer, step.kept, h, stream)
            h = decoder.run(step.layer, step.kinds, h, stream)
            if k + 1 in ends:
                sums[ends[k + 1]] += (_size(h) / _size(before.to(h.device))).sum().cpu()
        done += ids.numel()
        if progress:
            progress(f"{done:,} of {windows.numel():,} tokens")
    factors = (sums / done).tolist()
    for (start, _), factor in zip(gaps, factors, strict=True):
        if not 0 < factor < float("inf"):
            raise ValueError(
                f"scale: the stream at layer {path[start].layer} grows by {factor}: the model's states are not "
                "finite; try fp32"
            )
    return factors


def passes_of(decoder, windows, batch_size=8):
    """Return {(layer, kinds): factor} for Decoder.passing: how much the stream grows where these kinds are.

    The mean over tokens of RMS(with them) / RMS(without), on the dense model's own streams: for an attention and an MLP
    in turn, or, where a layer's branches are parallel, for each and for both. Raises ValueError where one is not a
    positive number.
    """
    sums = {}
    for ids in windows.split(batch_size):
        stream = decoder.embed(ids)
        h = stream.h
        for i in range(decoder.n_layers):
            for step in [(kind,) for kind in KINDS] if decoder.split[i] else [KINDS]:
                after = decoder.run(i, step, h, stream)
                for off in [step] if len(step) == 1 else [("mha",), ("mlp",), KINDS]:
                    without = decoder.run(i, tuple(kind for kind in step if kind not in off), h, stream)
                    ratio = (_size(after) / _size(without.to(after.device))).sum().item()
                    sums[i, off] = sums.get((i, off), 0.0) + ratio
                h = after
    passes = {key: total / windows.numel() for key, total in sums.items()}
    for (i, off), factor in passes.items():
        if not 0 < factor < float("inf"):
            raise ValueError(
                f"scale: the stream at layer {i} grows by {factor} with its {' and '.join(off)}: the model's states "
                "are not finite; try fp32"
            )
    return passes


def folded(decoder, removed, passes):
    """Return the Edit whose model does what `decoder` does without `removed` while `passing(passes)`, up to rounding.

    Raises ValueError for a family whose stream is not free in size.
    """
    path = steps_of(decoder, removed)
    gaps = gaps_of(path)
    factors = [
        math.prod(passes[step.layer, tuple(k for k in step.kinds if k not in step.kept)] for step in path[start:end])
        for start, end in gaps
    ]
    later = [block for step in path[gaps[0][1] :] for block in step.blocks] if gaps else []
    tensors = divided(decoder, path, gaps, factors, find_writers(decoder, later, _some_ids(decoder)))
    about = {"method": "scale", "source": "arXiv 2507.18212", "factors": [round(f, 4) for f in factors]}
    return Edit(tuple(removed), tensors, about=about)


def require_free_size(decoder):
    """Raise ValueError for a family whose stream is not free in size, so that factors could not go into weights."""
    find_writers(decoder, decoder.blocks(), _some_ids(decoder))


def _some_ids(decoder):
    return torch.arange(16).unsqueeze(0) % decoder.model.config.get_text_config().vocab_size


def divided(decoder, path, gaps, factors, writers):
    """Return {name: function that loads the tensor}: writers divided by the factors of all gaps before them."""
    at = {end: factor for (_, end), factor in zip(gaps, factors, strict=True)}
    parameters = {name: p.data for name, p in decoder.model.named_parameters()}
    total, tensors = 1.0, {}
    for k, step in enumerate(path):
        total *= at.get(k, 1.0)
        for block in step.blocks if total != 1.0 else ():
            writer = writers[block]
            mine = {name: parameters[name] for name in (*writer.names, *writer.readers)}
            tensors |= {name: functools.partial(_load, mine, writer, 1 / total, name) for name in mine}
    return tensors


def _load(parameters, writer, factor, name):
    return scaled(parameters, writer, factor)[name]


def _size(h):
    """Return the RMS of each token's state (B, T), float64."""
    return h.double().square().mean(-1).sqrt()
