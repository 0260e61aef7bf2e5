"""A matrix on the stream at each gap: an H x H product more to run for each, and only the format hf holds it.

Least squares as in Ghosted Layers (arXiv 2605.15491): h -> h + h A, A = (X'X + ridge)^-1 X'D, X the dense stream before
the gap and D what is missing, tokens and sums as in lib.repair.replaceme. And LinearPatch's form (arXiv 2505.24680): in
the basis of a Hadamard matrix, which spreads the few enormous channels, each coordinate times its ratio of mean sizes.
"""

import torch

from lib.edits import Edit
from lib.repair.gaps import gaps_of, steps_of
from lib.repair.replaceme import RIDGES, SHARES, least_squares, moments


def linear(decoder, removed, fit, choose, batch_size=4, progress=None):
    """Yield (strength, Edit) as lib.repair.replaceme.replaceme; a gap with no kept block behind it stays as it is."""
    path = steps_of(decoder, removed)
    first = {}  # block behind a gap: where its matrix's stream begins and ends
    for start, end in gaps_of(path):
        if step := next((step for step in path[end:] if step.kept), None):
            first[step.blocks[0]] = first.get(step.blocks[0], (start,))[0], end
    if not first:
        raise ValueError("linear: no block is kept behind the gap to put a matrix before; take another repair")
    blocks = {start: block for block, (start, _) in first.items()}
    sums, samples = moments(decoder, path, dict(first.values()), fit, batch_size, progress, whole=True)
    found = [({"form": "squares", "ridge": r}, {k: least_squares(*sums[k], r) for k in sums}) for r in RIDGES]
    found.append(({"form": "hadamard"}, {k: by_hadamard(U, target) for k, (_, U, target) in samples.items()}))
    for strength, maps in found:
        for share in SHARES:
            matrices = {blocks[k]: (share * (T - torch.eye(len(T)).to(T))).float() for k, T in maps.items()}
            yield {**strength, "share": share}, Edit(tuple(removed), matrices=matrices)


def by_hadamard(X, target):
    """Return Q diag(d) Q', float64, d the ratio of the means of |target Q| and |X Q|, both (n, H)."""
    Q = hadamard(X.shape[1]).to(X.device)
    before, after = ((states.double() @ Q).abs().mean(0) for states in (X, target))
    return (Q * (after / before.clamp_min(1e-12))) @ Q.T


def hadamard(n):
    """Return an orthonormal matrix (n, n): Sylvester's Hadamard matrix times, for the odd part of n, cosines."""
    odd = n // (n & -n)
    k, i = torch.arange(odd, dtype=torch.float64).unsqueeze(1), torch.arange(odd, dtype=torch.float64)
    Q = torch.cos(torch.pi / odd * (i + 0.5) * k) * (2 / odd) ** 0.5
    Q[0] /= 2**0.5
    while len(Q) < n:
        Q = torch.cat((torch.cat((Q, Q), 1), torch.cat((Q, -Q), 1))) / 2**0.5
    return Q
