"""The format "stock": the original class with fewer layers, which every runtime of that class loads."""

import copy
import functools

import torch

from lib.export.checkpoint import verify, write_checkpoint
from lib.export.config import reindexed
from lib.export.folder import in_python
from lib.export.layers import places, repack
from lib.model import readable


def as_stock(source, removed, info):
    """The original class with fewer layers. Refused where a layer would be incomplete, or changes with its place."""
    config, layers = stock_config(source, removed)
    config.pruning_info = info | {"source_blocks": [str(layer) for layer in layers]}
    entries = source.relabelled(places(layers))
    verify(type(source.bare), config, entries)

    return functools.partial(write_checkpoint, source=source, config=config, entries=entries), in_python("PATH")


def stock_config(source, removed):
    """Return (configuration, layers) of format stock; raise ValueError where there is none."""
    layers = repack(source.n_layers, removed, mix=not source.parallel)
    if source.added:
        raise ValueError(
            f"format stock: {type(source.bare).__name__} has no {source.added[0]}, which the refit has made; "
            "the nearest format is hf"
        )
    if heads := source.edit.kept("mha"):
        raise ValueError(f"format stock: mha{min(heads)} has fewer heads than others; the nearest format is hf")
    if source.widths:
        raise ValueError(
            f"format stock: MLPs of {min(source.widths.values())} to {max(source.widths.values())} channels, and "
            f"{type(source.bare).__name__} has one width; the nearest format is hf"
        )
    short = [layer for layer in layers if None in layer]
    if short or not layers:
        reason, nearest = "no layer is left", "zeroed"
        if short:
            reason, nearest = f"{short[0]} is left without its other half", "hf"
        raise ValueError(
            f"format stock: {reason}, and {type(source.bare).__name__} has whole layers only; "
            f"the nearest format is {nearest}"
        )
    config = copy.deepcopy(source.config)
    for field, value in reindexed(source.config, source.n_layers, layers).items():
        setattr(config, field, value)
    with readable(source.path, "configuration"), torch.device("meta"):
        bare = type(source.bare)(type(config).from_dict(config.to_dict()))
    moved = _find(bare, type(source.layers[0]))
    for k, layer in enumerate(layers):
        for kind, i in layer.blocks():
            differ = _difference(source, kind, source.layers[i], moved[k])
            if differ:
                raise ValueError(
                    f"format stock: in {type(source.bare).__name__} the {differ} of {kind}{i} depends on the layer's "
                    f"number and would change as layer {k}; the nearest format is hf"
                )
    return config, layers


# ---- does a layer stay what it was? --------------------------------------------------------------------------


def _find(model, kind):
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) and isinstance(m[0], kind))


def _difference(source, kind, before, after):
    """Return the name of what differs in one branch of two layers of the same family, None where nothing does."""
    pairs = [("", before, after)] if kind == "mha" else []  # a layer's own attributes are its attention's
    for name in (*getattr(source.family, kind), *getattr(source.family, f"{kind}_norms")):
        if getattr(before, name, None) is not None:
            there = dict(getattr(after, name).named_modules())
            pairs += [(f"{name}.{n}", m, there.get(n)) for n, m in getattr(before, name).named_modules()]
    for name, one, other in pairs:
        if _settings(one) != _settings(other):
            return name.strip(".") or "kind"
    return None


def _settings(module):
    """Return what is known of a module itself: class, plain attributes, shapes of its parameters."""
    if module is None:
        return None
    plain = {
        key: value
        for key, value in vars(module).items()
        if key not in ("layer_idx", "training") and isinstance(value, (int, float, str, bool, tuple, type(None)))
    }
    return type(module), plain, {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
