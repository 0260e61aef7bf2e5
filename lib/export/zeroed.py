"""The format "zeroed": the full-size model whose removed blocks add zero, with which all others are compared."""

import copy
import functools

from lib.export.checkpoint import verify, write_checkpoint, zeros
from lib.export.folder import in_python


def as_zeroed(source, removed, info):
    """The model at its full size, the removed blocks' weights zero: loads everywhere and saves nothing."""
    if source.edit.widths:
        raise ValueError("format zeroed: MLPs are narrower, and it has the model's own sizes; use format stock or hf")
    config, gone = copy.deepcopy(source.config), {tuple(block) for block in removed}
    on_stream = getattr(config, "apply_residual_connection_post_layernorm", False)
    if on_stream or not getattr(config, "do_layer_norm_before", True):
        raise ValueError(
            f"format zeroed: {type(source.layers[0]).__name__} normalises the residual stream itself in this model, "
            "so that a block with zero weights still changes it; the nearest format is hf"
        )
    config.pruning_info = info
    outputs = set()  # the last module of a branch writes to the stream; files may have names that memory has not
    for names in (source.family.mha, source.family.mlp):
        there = [name for name in names if getattr(source.layers[0], name, None) is not None]
        outputs |= set(names) - set(there[:-1])
    entries = []
    for name in source.names():
        entry, place = source.entry(name), source.place(name)
        if place and entry.dtype.is_floating_point and place.rest.split(".")[0] in outputs:  # no masks
            if all((kind, place.layer) in gone for kind in place.kinds):
                entry = zeros(name, entry.shape, entry.dtype)
        entries.append(entry)
    verify(type(source.bare), config, entries)

    return functools.partial(write_checkpoint, source=source, config=config, entries=entries), in_python("PATH") + (
        "\n\nThe removed blocks are there, with weights of zero: this checkpoint is as large and as slow as its base.\n"
    )
