"""Where the stream of a pruned model has gaps, and through which tensors blocks write to it.

steps = steps_of(decoder, removed)
for start, end in gaps_of(steps): ...       # steps[start:end] are missing
writers = find_writers(decoder, blocks, ids)    # proven on these tokens
"""

from typing import NamedTuple

import torch

from lib.blocks import KINDS, Block
from lib.edits import Edit, replaced

TOLERANCE = 0.02  # of what a block adds: norms have an eps, which a halved stream feels four times as much


class Step(NamedTuple):
    """What the dense model runs at a time on its way through layer `layer`, and what of it is kept."""

    layer: int
    kinds: tuple
    kept: tuple

    @property
    def blocks(self):
        return [Block(kind, self.layer) for kind in self.kept]


class Writer(NamedTuple):
    """The tensors, by name, that a block's contribution to the stream is proportional to.

    offset: what is added to the first of them where it is used, 1 in Gemma's norms. readers: matrices that are given
    the stream as it is, without a norm before them, and so must grow where it shrinks (OLMo 2).
    """

    names: tuple
    offset: float = 0.0
    readers: tuple = ()


def steps_of(decoder, removed):
    """Return the Steps in depth order: an attention or an MLP, or both where the layer's branches are parallel."""
    removed, steps = set(removed), []
    for i in range(decoder.n_layers):
        for kinds in [(kind,) for kind in KINDS] if decoder.split[i] else [KINDS]:
            steps.append(Step(i, kinds, tuple(kind for kind in kinds if (kind, i) not in removed)))
    return steps


def gaps_of(steps):
    """Return [(start, end)] in depth order: steps[start:end] are removed, or one parallel step that is so in part."""
    gaps = []
    for k, step in enumerate(steps):
        if step.kept == step.kinds:
            continue
        if gaps and gaps[-1][1] == k and not step.kept and not steps[k - 1].kept:
            gaps[-1] = gaps[-1][0], k + 1
        else:
            gaps.append((k, k + 1))
    return gaps


def find_writers(decoder, blocks, ids):
    """Return {block: Writer} for `blocks`, each proven on token ids (1, T).

    A block's Writer is the parameters of the module that it calls last: an output projection, or the norm behind it.
    The proof: with these halved (and readers doubled) and a stream of half the size, the block gives half of what it
    gave; the head, too, reads a stream of any size the same. Raises ValueError, naming the block, where that does not
    hold: experts, whose outputs are mixed, and families that normalise the stream itself.
    """
    names = {id(p): name for name, p in decoder.model.named_parameters()}
    stream, found, wanted = decoder.embed(ids), {}, set(blocks)
    h = stream.h
    for i in range(decoder.n_layers):
        for kind in KINDS:
            if (kind, i) in wanted:
                found[Block(kind, i)] = _writer(decoder, kind, i, h, stream, names)
        h = decoder.run(i, KINDS, h, stream)
    if not _close(decoder.head(h[0] / 2), decoder.head(h[0]), decoder.head(h[0])):
        raise ValueError(_refusal(decoder, "the head's logits depend on the size of the stream"))
    return found


def _writer(decoder, kind, i, h, stream, names):
    """Return the proven Writer of a block that reads h (1, T, H)."""
    layer, called, reading = decoder.layers[i], [], []
    of_branch = (*getattr(decoder.family, kind), *getattr(decoder.family, f"{kind}_norms"))
    modules = [
        m for name in of_branch if getattr(layer, name, None) is not None for m in getattr(layer, name).modules()
    ]

    def note(module, args, output):
        called.append(module)
        if args and isinstance(args[0], torch.Tensor) and torch.equal(args[0], h):
            reading.extend(p for p in module.parameters(recurse=False) if p.dim() == 2)

    leaves = [m for m in modules if any(True for _ in m.parameters(recurse=False))]
    hooks = [m.register_forward_hook(note) for m in leaves]
    try:
        after = decoder.run(i, (kind,), h, stream)
    finally:
        for hook in hooks:
            hook.remove()
    writing = [*called[-1].parameters(recurse=False)]
    parameters = {names.get(id(p)): p.data for p in (*writing, *reading)}
    for offset in (0.0, 1.0) if None not in parameters else ():
        writer = Writer(tuple(names[id(p)] for p in writing), offset, tuple(names[id(p)] for p in reading))
        with replaced(decoder, Edit(tensors=scaled(parameters, writer, 0.5))):
            halved = decoder.run(i, (kind,), h / 2, stream)
        if _close(2 * halved, after, after - h):
            return writer
    raise ValueError(_refusal(decoder, f"no tensor sets the size of what {kind}{i} adds to the stream"))


def scaled(parameters, writer, factor):
    """Return {name: tensor} of a Writer so that its block, given a stream `factor` times as large, adds `factor` times
    as much. parameters: {name: tensor}. Computed in float32 or better, kept in the tensors' own dtype.
    """
    tensors = {}
    for name in (*writer.names, *writer.readers):
        wide = parameters[name].to(torch.promote_types(parameters[name].dtype, torch.float32))
        offset = writer.offset if name == writer.names[0] else 0.0
        new = wide / factor if name in writer.readers else (wide + offset) * factor - offset
        tensors[name] = new.to(parameters[name].dtype)
    return tensors


def _close(a, b, scale):
    """Whether tensors differ by rounding and a small share of `scale` only."""
    rounding = 8 * torch.finfo(b.dtype).eps * b.double().norm()
    return bool((a.double() - b.double()).norm() <= TOLERANCE * scale.double().norm() + rounding)


def _refusal(decoder, what):
    return (
        f"{type(decoder.layers[0]).__name__}: {what} (experts, or a norm on the stream itself); take a repair that "
        "trains weights instead"
    )
