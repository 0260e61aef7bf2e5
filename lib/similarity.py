"""How far blocks and layers move the residual stream: one forward pass a window, for every similarity metric.

The stepping decoder hands over the state entering each layer, the state between a layer's two blocks,
and the state after the last layer, before the final norm (`hidden_states[-1]` of transformers comes
after it). A batch's states are summed up in float64 and dropped.

    s = similarities(decoder, decoder.blocks("layer"), windows)
    s.angular[8, 16]    # between the states entering layers 8 and 16, at the last token
"""

import math
from typing import NamedTuple

import torch

from lib.blocks import Block

TOKENS = 64  # tokens whose states of all layers are compared at a time, in float64


class Similarities(NamedTuple):
    """Means over all windows; a unit is a block or a layer, f(x) its branch, x its input.

    cos: unit -> mean over tokens of cos(x, x + f(x)).
    magnitude: unit -> mean over tokens of ||f(x)|| / (||x + f(x)|| + 1e-6).
    pairs: (L + 1, L + 1), mean over tokens of cos(h_i, h_j), h_i the state entering layer i.
    angular: (L + 1, L + 1), mean over windows of arccos(cos(h_i, h_j)) / pi at the LAST token.
    """

    cos: dict
    magnitude: dict
    pairs: torch.Tensor
    angular: torch.Tensor


def similarities(decoder, units, windows, batch_size=8, progress=None):
    """Return the Similarities of `units` and of all pairs of layers; progress(windows) as batches are done.

    Each window passes the decoder once. Only where blocks of a parallel layer are asked for, whose
    states do not lie on the way, the layer is run a second time, branch by branch. Of a batch the
    states of all layers are held at once, as transformers' output_hidden_states would.
    """
    L, units = decoder.n_layers, set(units)
    sums = {unit: torch.zeros(2, dtype=torch.float64) for unit in units}
    pairs, angular = torch.zeros(2, L + 1, L + 1, dtype=torch.float64)

    def compare(unit, x, y):
        if unit in units:
            sums[unit] += _branch(x, y)

    for ids in windows.split(batch_size):
        stream = decoder.embed(ids)
        states = [stream.h]
        for i in range(L):
            h, kinds = states[-1], decoder.kinds(i)
            mid = h
            if decoder.split[i]:
                for kind in kinds:
                    x, mid = mid, decoder.run(i, (kind,), mid, stream)
                    compare((kind, i), x, mid)
            else:
                for kind in kinds:
                    if (kind, i) in units:
                        compare((kind, i), h, decoder.run(i, (kind,), h, stream))
                mid = decoder.run(i, kinds, h, stream)
            compare(("layer", i), h, mid)
            states.append(mid)
        for start in range(0, ids.shape[1], TOKENS):
            unit_length = torch.stack([_unit(h[:, start : start + TOKENS].to(stream.h.device)) for h in states])
            pairs += (unit_length.flatten(1) @ unit_length.flatten(1).T).cpu()
        last = unit_length[:, :, -1].transpose(0, 1)  # (B, L + 1, H)
        angular += (last @ last.mT).clamp(-1, 1).arccos().sum(0).cpu() / math.pi
        if progress:
            progress(len(ids))
    tokens = windows.numel()
    means = {Block(*unit): (total / tokens).tolist() for unit, total in sums.items()}
    return Similarities(
        {unit: cos for unit, (cos, _) in means.items()},
        {unit: size for unit, (_, size) in means.items()},
        pairs / tokens,
        angular / len(windows),
    )


def _branch(x, y):
    """Return the sums over tokens of cos(x, y) and of ||y - x|| / (||y|| + 1e-6), as a tensor of two."""
    total = torch.zeros(2, dtype=torch.float64, device=x.device)
    for before, after in zip(x.split(TOKENS, 1), y.to(x.device).split(TOKENS, 1), strict=True):
        before, after = before.double(), after.double()
        cos = (_unit(before) * _unit(after)).sum(-1)
        size = (after - before).norm(dim=-1) / (after.norm(dim=-1) + 1e-6)
        total += torch.stack((cos.sum(), size.sum()))
    return total.cpu()


def _unit(x):
    """Return x (..., H) as float64 vectors of length 1; a zero vector stays zero."""
    x = x.double()
    return x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
