"""A branch of a layer as units that can go: an MLP as its channels, an attention as its key-value heads.

A channel is a row of the projections that write it and a column of the one that reads it. A key-value head goes with
all of its query heads: rows of the three projections, columns of the output's.

    parts = find_parts(decoder)                # {Block("mlp", 0): Part, ...}
    parts[Block("mlp", 0)].n                   # channels
"""

from typing import NamedTuple

import torch
from torch import nn

from lib.blocks import Block
from lib.importance import require_weights

# the projection that reads the units, and those that write them; one that writes gate and up has twice the rows
MLP = (
    ("down_proj", ("gate_proj", "up_proj")),
    ("down_proj", ("gate_up_proj",)),
    ("down_proj", ("up_proj",)),
    ("w2", ("w1", "w3")),
    ("c_proj", ("c_fc",)),
    ("fc2", ("fc1",)),
    ("fc_out", ("fc_in",)),
    ("dense_4h_to_h", ("dense_h_to_4h",)),
)
MHA = (("o_proj", ("q_proj", "k_proj", "v_proj")),)
NOUNS = {"mlp": "channels", "mha": "key-value heads"}


class Part(NamedTuple):
    """n units: `producers` write them, `consumer` reads them, each in as many rows and columns."""

    producers: tuple
    consumer: nn.Module
    n: int

    @property
    def size(self):
        """The consumer's columns that belong to a unit: 1 for a channel."""
        return self.consumer.weight.shape[1] // self.n

    @property
    def cost(self):
        """Parameters that leave with one unit."""
        written = sum(p.weight.shape[0] // self.n * (p.weight.shape[1] + (p.bias is not None)) for p in self.producers)
        return written + self.size * self.consumer.weight.shape[0]

    def columns(self, units):
        """Return the columns of the consumer that belong to units (k,), (k * size,) long."""
        return (units.unsqueeze(1) * self.size + torch.arange(self.size, device=units.device)).flatten()

    def rows(self, producer, units):
        """Return the rows of a producer that belong to units: gate's, then up's where they are one matrix."""
        each = producer.weight.shape[0] // self.n
        if self.size == 1:
            return torch.cat([units + k * self.n for k in range(each)])
        return (units.unsqueeze(1) * each + torch.arange(each, device=units.device)).flatten()

    def sums(self, values):
        """Return for values of rows of a producer, or of columns of the consumer, their sum in each unit, (n,)."""
        return values.reshape(-1, self.n).sum(0) if self.size == 1 else values.reshape(self.n, -1).sum(1)


def find_parts(decoder, removed=(), kinds=("mlp",)):
    """Return {Block: Part} of the branches still there; raise ValueError, with the class, where none has units."""
    there = [Block(k, i) for k in kinds for i in range(decoder.n_layers) if k in decoder.kinds(i, removed)]
    require_weights(decoder, there, "width", inside=True)
    return {block: find_part(decoder.layers[block.layer], block.kind, decoder.family) for block in there}


def find_part(layer, kind, family):
    """Return the Part of a decoder layer's branch, weights not needed; raise ValueError as `find_parts`."""
    branch = [m for name in getattr(family, kind) if (m := getattr(layer, name, None)) is not None]
    owner = branch[0] if len(branch) == 1 else layer
    matrices = {id(p) for module in branch for p in module.parameters() if p.dim() > 1}
    for last, first in MLP if kind == "mlp" else MHA:
        found = [getattr(owner, name, None) for name in (*first, last)]
        if not all(isinstance(m, nn.Linear) for m in found) or matrices != {id(m.weight) for m in found}:
            continue
        columns, rows = found[-1].weight.shape[1], [m.weight.shape[0] for m in found[:-1]]
        if kind == "mlp" and all(r in (columns, 2 * columns) for r in rows):
            return Part(tuple(found[:-1]), found[-1], columns)
        head = getattr(owner, "head_dim", None)
        whole = {id(m.bias) for m in found} | {id(p) for p in owner.parameters() if p.numel() == head}
        fixed = hasattr(owner, "num_heads")  # StableLM's forward counts them itself
        if kind == "mha" and head and not fixed and all(p.dim() > 1 or id(p) in whole for p in owner.parameters()):
            n = rows[1] // head
            if rows[1] == rows[2] == n * head and rows[0] == columns and columns % (n * head) == 0:
                return Part(tuple(found[:-1]), found[-1], n)
    there = ", ".join(f"{name}: {type(part).__name__}" for module in branch for name, part in module.named_children())
    if kind == "mlp":
        raise ValueError(
            f"{type(layer).__name__}: its MLP is no pair of linear projections of known names ({there}), as where a "
            "router chooses experts; width is defined for dense MLPs: remove blocks of this family"
        )
    raise ValueError(
        f"{type(layer).__name__}: its attention is not q_proj, k_proj, v_proj and o_proj of whole heads ({there}); "
        "remove channels and blocks of this family"
    )


def check_widths(parts, widths):
    """Raise ValueError unless these branches can keep so many units."""
    for block, width in widths.items():
        if block not in parts:
            raise ValueError(f"width: {block} is not there any more, and is to keep {width}; leave it out")
        if not 1 <= width <= parts[block].n:
            n, noun = parts[block].n, NOUNS[block.kind]
            raise ValueError(f"width: {block} is to keep {width} of its {n} {noun}; keep 1..{n}")
