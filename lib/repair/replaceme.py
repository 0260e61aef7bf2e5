"""A matrix for each gap, merged into the nearest kept writer before it: ReplaceMe (arXiv 2505.02819), at no cost.

Before a gap the last kept block adds U to the stream; with U T in its place the stream is to be what the dense model
has behind the gap: T = I + (U'U + ridge)^-1 U' D, D what is missing. The ridge pulls towards the identity, which is no
repair. Tokens count by 1 / size^2, since a few are a thousand times as large as the rest; sums are float64.
"""

import functools

import torch

from lib.edits import Edit
from lib.repair.gaps import find_writers, gaps_of, steps_of

RIDGES = (0.01, 0.1, 1.0)  # times the mean of the diagonal of U'U
SHARES = (1.0, 0.5)  # of the way from the identity to T
TOKENS, STEPS, LR = 8192, 200, 1e-3  # the cosine objective: tokens of a gap kept, steps of Adam


def replaceme(decoder, removed, fit, choose, batch_size=4, progress=None):
    """Yield (strength, Edit): least squares with each ridge, then the cosine objective, from the dense streams.

    fit: windows (N, T); choose: not looked at. progress(words) after each batch. A gap with no kept block before it
    stays as it is. Raises ValueError where blocks write through a norm, into which no matrix can be merged.
    """
    path = steps_of(decoder, removed)
    ends = {_before(path, gap): gap[1] for gap in gaps_of(path)}
    ends.pop(None, None)
    if not ends:
        raise ValueError("replaceme: no block is kept before the first gap to merge a matrix into; take another repair")
    writers = find_writers(decoder, [path[k].blocks[-1] for k in ends], fit[:1])
    parameters = {name: p.data for name, p in decoder.model.named_parameters()}
    for block, writer in writers.items():
        if parameters[writer.names[0]].dim() != 2:
            raise ValueError(
                f"replaceme: {block} writes to the stream through a norm ({writer.names[0]}), which no matrix can be "
                "merged into; take another repair"
            )
    sums, samples = moments(decoder, path, ends, fit, batch_size, progress)

    def edit(maps):
        tensors = {}
        for k, T in maps.items():
            for name in writers[path[k].blocks[-1]].names:
                tensors[name] = functools.partial(_merged, decoder.model, name, parameters[name], T)
        return Edit(tuple(removed), tensors)

    for ridge in RIDGES:
        maps = {k: least_squares(A, B, ridge) for k, (A, B) in sums.items()}
        for share in SHARES:
            yield {"objective": "squares", "ridge": ridge, "share": share}, edit(part_of(maps, share))
    maps = {k: by_cosine(*sample) for k, sample in samples.items()}
    for share in SHARES:
        yield {"objective": "cosine", "share": share}, edit(part_of(maps, share))


def least_squares(A, B, ridge):
    """Return T = I + (A + ridge * mean diagonal)^-1 B, float64; A = U'U and B = U'D, (H, H), token-weighted."""
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
    return eye + torch.linalg.solve(A + ridge * A.diagonal().mean() * eye, B)


def by_cosine(y, U, target, steps=STEPS, lr=LR, seed=0):
    """Return T (H, H) for the highest mean cosine of y + U T with the target, all (n, H), by Adam from the identity."""
    T = torch.eye(U.shape[1], device=U.device).requires_grad_()
    optimizer, generator = torch.optim.Adam([T], lr), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        some = torch.randint(len(U), (min(len(U), 1024),), generator=generator)
        with torch.enable_grad():
            out = y[some].float() + U[some].float() @ T
            loss = -torch.nn.functional.cosine_similarity(out, target[some].float(), dim=-1).mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return T.detach().double()


def _before(path, gap):
    """Return the index of the nearest step before the end of a gap of which anything is kept, None for none."""
    return next((k for k in range(gap[1] - 1, -1, -1) if path[k].kept), None)


def moments(decoder, path, ends, windows, batch_size, progress=None, whole=False):
    """Return ({k: (U'U, U'D)}, {k: (y, U, target) of some tokens}) of the dense streams at the steps k of `ends`.

    ends: {k: end}; U is what the last kept block of step k adds to y, the stream so far; the target is the stream
    that enters step `end`, and D what y + U lacks of it. whole: U is y + U, and y zero.
    """
    sums, samples = {}, {}
    every, done = max(1, windows.numel() // TOKENS), 0
    for ids in windows.split(batch_size):
        stream = decoder.embed(ids)
        h, states = stream.h, {}
        for k, step in enumerate(path[: max(ends.values())]):
            if k in ends:
                y = torch.zeros_like(h) if whole else decoder.run(step.layer, step.kept[:-1], h, stream)
                states[k] = y, decoder.run(step.layer, step.kept, h, stream) - y
            h = decoder.run(step.layer, step.kinds, h, stream)
            for start in [start for start, end in ends.items() if end == k + 1]:
                parts = [x.flatten(0, 1).clone() for x in (*states.pop(start), h)]
                for kept, part in zip(samples.setdefault(start, ([], [], [])), parts, strict=True):
                    kept.append(part[::every])
                y, U, target = (part.double() for part in parts)
                weighted = U / target.square().sum(-1, keepdim=True).clamp_min(1e-12)
                A, B = sums.get(start, (0, 0))
                sums[start] = A + weighted.T @ U, B + weighted.T @ (target - y - U)
        done += ids.numel()
        if progress:
            progress(f"{done:,} of {windows.numel():,} tokens")
    return sums, {k: [torch.cat(part) for part in parts] for k, parts in samples.items()}


def part_of(maps, share):
    return {k: torch.lerp(torch.eye(len(T), dtype=T.dtype, device=T.device), T, share) for k, T in maps.items()}


def _merged(model, name, tensor, T):
    """Return an output projection's weight or bias with T behind it: x -> (W x + b) T."""
    from transformers.pytorch_utils import Conv1D

    T = T.to(tensor.device)
    rows = tensor.dim() == 1 or isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
    return (tensor.double() @ T if rows else T.T @ tensor.double()).to(tensor.dtype)
