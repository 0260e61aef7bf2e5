"""The residual blocks of a decoder, by name: two a layer, attention ("mha") and MLP ("mlp") (paper, section 3.1).

Methods that remove whole layers name one as Block("layer", i): both its blocks, whatever is left of them.
"""

import re
from reprlib import repr as brief
from typing import NamedTuple

KINDS = ("mha", "mlp")
MOST_LAYERS = 1024  # of a model: a larger number in a file is damage, and would be built for minutes


class Block(NamedTuple):
    """A residual block: `kind` is "mha" or "mlp", or "layer" for both of a layer; `layer` counts from 0."""

    kind: str
    layer: int

    def __str__(self):
        return f"{self.kind}{self.layer}"


def parse_block(name):
    """Return the Block that prints as `name`, such as "mha25"."""
    match = re.fullmatch("([a-z]+)([0-9]+)", name)
    if not match:
        raise ValueError(f"{brief(name)} is not the name of a block, such as mha25")
    return Block(match[1], int(match[2]))


UNITS = (*KINDS, "layer")  # what can be masked and removed as one


def blocks_of(units):
    """Return the blocks that `units` are made of: a layer is its mha, then its mlp."""
    return [Block(kind, i) for unit, i in units for kind in (KINDS if unit == "layer" else (unit,))]


def parse_blocks(text, n_layers):
    """Return the blocks that a list such as "mha5,mlp7,layer21-28" names, in its order, of a model of n_layers layers.

    A range counts both its ends; a layer is its mha, then its mlp. Raises ValueError, naming the part, for what names
    no block of the model, and for a block that is named twice.
    """
    blocks = []
    for part in text.split(","):
        match = re.fullmatch(r"(mha|mlp|layer)([0-9]+)(?:-([0-9]+))?", part.strip())
        if not match:
            raise ValueError(
                f"{brief(part)} names no blocks; allowed are mha5, mlp7, layer21-28, and lists with commas"
            )
        first, last = int(match[2]), int(match[3] or match[2])
        if not first <= last < n_layers:
            raise ValueError(f"{brief(part)}: the model has layers 0 to {n_layers - 1}, and ranges run upwards")
        for block in blocks_of((match[1], i) for i in range(first, last + 1)):
            if block in blocks:
                raise ValueError(f"{brief(part)}: {block} is named before; name each block once")
            blocks.append(block)
    return blocks
