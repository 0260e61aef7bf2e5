"""Kept blocks as the layers of a smaller model: every attention takes in the MLP that directly follows it."""

from typing import NamedTuple

from lib.blocks import Block


class Layer(NamedTuple):
    """A decoder layer of the pruned model: the source layers of its attention and its MLP, None where absent."""

    mha: int | None
    mlp: int | None

    def blocks(self):
        return [Block(kind, i) for kind, i in self._asdict().items() if i is not None]

    def __str__(self):
        return " ".join(map(str, self.blocks()))


def places(layers):
    """Return {block of the source: number of its Layer}."""
    return {block: k for k, layer in enumerate(layers) for block in layer.blocks()}


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
