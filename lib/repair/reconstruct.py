"""Kept blocks learn to give what the dense model has behind a gap, one block after the other.

From the bottom up, a block before a gap is trained towards the dense stream behind the gap, a block after one towards
the dense stream behind itself, each from the stream that the model, pruned and repaired so far, gives it (block by
block as in arXiv 2510.14444). The error of a token is taken relative to its own size: a few tokens are a thousand
times as large as the rest and would decide everything else. Going all the way fits the text and harms others; part of
the way from the old weights to the new ones does not, so that is the strength that is chosen.

`streamline` (LLM-Streamline, arXiv 2403.19135): the first layer of each run of removed layers comes back and is trained
to stand for the run. Without it the method is plain removal.
"""

import math

import torch

from lib.blocks import KINDS, blocks_of
from lib.edits import Edit, holding
from lib.repair.gaps import Step, steps_of
from lib.repeated import with_tensors

STEPS, LR = 60, 3e-4  # a block
LOOKS = 4  # how often the error on the other part is looked at
SHARES = (1.0, 0.5, 0.25)  # of the way from the old weights to the trained ones


def reconstruct(decoder, removed, fit, choose, batch_size=4, progress=None, steps=STEPS, lr=LR):
    """Yield (strength, Edit): the kept blocks next to gaps trained on the windows `fit` (N, T), `steps` batches each.

    choose: windows (M, T) on which a block's weights are kept from the step with the lowest error. progress(words)
    after each block. Raises ValueError for a block that shares its parameters with others.
    """
    path = steps_of(decoder, removed)
    near = [k for k, step in enumerate(path) if step.kept and _is_near(path, k)]
    yield from _trained(decoder, removed, path, near, fit, choose, batch_size, progress, steps, lr)


def streamline(decoder, removed, fit, choose, batch_size=4, progress=None, steps=3 * STEPS, lr=LR):
    """Yield (strength, Edit): the first layer of each run of removed layers back, trained to stand for the run.

    Arguments and errors as those of `reconstruct`; ValueError, too, where no whole layer is removed. The Edit removes
    less than was asked for: both blocks of one layer a run are there again.
    """
    gone = [i for i in range(decoder.n_layers) if all((kind, i) in set(removed) for kind in KINDS)]
    firsts = [i for i in gone if i - 1 not in gone]
    if not firsts:
        raise ValueError(
            "streamline: none of the removed blocks make up a whole layer, and it replaces runs of layers; take "
            "another repair, or an order of layers"
        )
    left = [block for block in removed if block[1] not in firsts]
    path = [
        step if step.layer not in firsts else Step(step.layer, KINDS, KINDS)
        for step in steps_of(decoder, left)
        if step.layer not in firsts or step.kinds[-1] == KINDS[-1]
    ]
    near = [k for k, step in enumerate(path) if step.layer in firsts]
    yield from _trained(decoder, left, path, near, fit, choose, batch_size, progress, steps, lr)


def _trained(decoder, removed, path, near, fit, choose, batch_size, progress, steps, lr):
    """Yield (strength, Edit) with the steps path[k], k in `near`, trained in depth order."""
    n_fit = len(fit.split(batch_size))
    streams = [decoder.embed(ids) for ids in (*fit.split(batch_size), *choose.split(batch_size))]
    dense = pruned = [stream.h for stream in streams]  # one list as long as nothing differs
    names, trained, errors = {id(p): name for name, p in decoder.model.named_parameters()}, {}, {}

    def run(states, step, kinds):
        return [decoder.run(step.layer, kinds, h, stream) for h, stream in zip(states, streams, strict=True)]

    for k, step in enumerate(path[: max(near, default=-1) + 1]):
        before, dense = dense, run(dense, step, step.kinds)
        layer, weights = dict(decoder.layers[step.layer].named_parameters()), {}
        if k in near:
            target = dense
            for later in path[k + 1 :]:
                if later.kept:
                    break
                target = run(target, later, later.kinds)
            weights, (first, last) = train(decoder, step, pruned, target, streams, n_fit, steps, lr)
            blocks = " ".join(map(str, step.blocks))
            errors[blocks] = [round(first, 5), round(last, 5)]
            if progress:
                progress(f"{blocks}: relative error {first:.4f} -> {last:.4f}")
        for name, new in weights.items():
            if id(layer[name]) not in names:
                raise ValueError(f"{name} of layer {step.layer} is no parameter of the model's own; take scale")
            trained[names[id(layer[name])]] = layer[name].data, new
        with holding([(layer[name], new) for name, new in weights.items()]):
            same = pruned is before and step.kept == step.kinds and not weights
            pruned = dense if same else run(pruned, step, step.kept)
    for share in SHARES:
        tensors = {name: torch.lerp(old.to(new.dtype), new, share) for name, (old, new) in trained.items()}
        yield {"share": share, "steps": steps, "lr": lr, "errors": errors}, Edit(tuple(removed), tensors)


def _is_near(path, k):
    """Whether a kept step is next to a gap, or lacks one of its own branches."""
    around = [path[other] for other in (k - 1, k + 1) if 0 <= other < len(path)]
    return path[k].kept != path[k].kinds or not all(step.kept for step in around)


def train(decoder, step, inputs, targets, streams, n_fit, steps=STEPS, lr=LR, seed=0):
    """Return ({name in the layer: float32 tensor}, (error before, error after)) of a step's trained blocks.

    inputs, targets: states (B, T, H) of each batch, of which the first n_fit are trained on; the errors are of the
    rest, and the weights those of the lowest, which may be the old ones. Computed in the model's dtype.
    """
    i, layer = step.layer, dict(decoder.layers[step.layer].named_parameters())
    own = {id(p) for p in decoder.parameters(blocks_of(step.blocks))}
    weights = {n: p.detach().float().clone().requires_grad_() for n, p in layer.items() if id(p) in own}
    dtype, device = next(iter(layer.values())).dtype, inputs[0].device
    optimizer = torch.optim.AdamW(weights.values(), lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator, order = torch.Generator().manual_seed(seed), []

    def error(b):
        call = with_tensors(streams[b].calls[i], torch.clone)  # what inference mode has made takes part in no gradient
        with torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            out = decoder.step(i, step.kept, inputs[b].clone().float(), call, weights)
        return relative_error(out.float(), targets[b].clone().float())

    def look():
        with torch.no_grad():
            return sum(error(b).item() for b in range(n_fit, len(inputs))) / (len(inputs) - n_fit)

    first = lowest = look()
    best = {n: w.detach().clone() for n, w in weights.items()}
    for number in range(steps):
        order = order or torch.randperm(n_fit, generator=generator).tolist()
        with torch.enable_grad():
            error(order.pop()).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (number + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * number / steps))
        optimizer.step()
        optimizer.zero_grad()
        if (number + 1) % max(1, steps // LOOKS) == 0 and (now := look()) < lowest:
            lowest, best = now, {n: w.detach().clone() for n, w in weights.items()}
    return best, (first, lowest)


def relative_error(out, target):
    """Return the mean over tokens of |out - target|^2 / |target|^2, of states (B, T, H)."""
    return ((out - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).mean()
