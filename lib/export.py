"""Write a pruned model as a checkpoint that other people's runtimes load.

The kept blocks are a sequence of attention and MLP steps. An attention directly followed by an MLP is an
ordinary decoder layer, even when the two come from different layers of the source (`repack`); where no
step is left over, the result is a plain checkpoint with fewer layers (format "stock"), else one that
brings a small modeling file along ("hf"). "zeroed" keeps every layer and zeroes what was removed.

    export("models/Llama-2-7b-hf", order[:10], "pruned", meta=meta)
"""
from typing import NamedTuple

from lib.checkpoint import Source, check_space, write_shards  # noqa: F401


class Layer(NamedTuple):
    """A decoder layer of the pruned model: the source layers of its attention and its MLP, None where absent."""

    mha: int | None
    mlp: int | None


def repack(n_layers, removed, mix=True):
    """Return the kept blocks as Layers, in depth order.

    An attention and the MLP that directly follows it share a layer, from different source layers only
    where `mix` allows it (not in models whose branches are parallel).
    """
    layers, removed = [], set(removed)
    for i in range(n_layers):
        if ("mha", i) not in removed:
            layers.append(Layer(i, None))
        if ("mlp", i) not in removed:
            if layers and layers[-1].mlp is None and (mix or layers[-1].mha == i):
                layers[-1] = layers[-1]._replace(mlp=i)
            else:
                layers.append(Layer(None, i))
    return layers


# A format is a function (source, removed, folder, info) that writes weights and configuration to the empty
# `folder` and returns how to load them, for the model card (Markdown). It raises ValueError, naming the
# nearest format, for a model that cannot have it. info: what goes into the configuration as pruning_info.
FORMATS = {}
