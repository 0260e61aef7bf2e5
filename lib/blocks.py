"""The residual blocks of a decoder, by name: two a layer, attention ("mha") and MLP ("mlp") (paper, section 3.1).

Methods that remove whole layers name one as Block("layer", i): both its blocks, whatever is left of them.
"""

import re
from reprlib import repr as brief
from typing import NamedTuple

KINDS = ("mha", "mlp")


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
