"""OSSCAR: which channels a linear layer can lose when the rest is refitted (Meng et al., arXiv 2406.07706).

The error of a layer Y = W X on the channels K is least for W_K = (H_KK)⁻¹ (H Wᵀ)_K, H = X Xᵀ, and the best K is looked
for in two stages: a greedy elimination, whose steps are updates of H⁻¹, then swaps of kept against dropped channels.
AMD Quark's pruner offers the method, but searches on a Cholesky factor of H⁻¹ in place of H⁻¹, which finds worse sets.

    order, _ = eliminate(channels, 512)    # of a lib.width.Channels
    keep = swapped(channels, rest)         # rest: the others, sorted
"""

from typing import NamedTuple

import torch

STEP = 10  # channels that are dropped at a time
ROUNDS, SWAPS = 20, 100  # at most, of kept against dropped channels


class Solved(NamedTuple):
    """Least squares on the channels `left` (k,): A = H_KK⁻¹ (k, k), V = A G_K (k, d), the consumer's new rows."""

    left: torch.Tensor
    A: torch.Tensor
    V: torch.Tensor

    def cost(self, size=1):
        """Return twice what dropping each unit of `size` channels alone adds to half the squared error, (k / size,)."""
        if size == 1:
            return self.V.square().sum(1) / self.A.diagonal()
        k = torch.arange(len(self.left) // size, device=self.left.device)
        own, V = self.A.reshape(len(k), size, len(k), size)[k, :, k], self.V.reshape(len(k), size, -1)
        return (V * torch.linalg.solve(own, V)).sum((1, 2))

    def without(self, drop):
        """Return the solution without the channels where the mask `drop` (k,) is set."""
        A, V, stay = self.A, self.V, ~drop
        across = torch.linalg.solve(A[drop][:, drop], A[drop][:, stay])  # A_SS⁻¹ A_SR
        return Solved(self.left[stay], A[stay][:, stay] - A[stay][:, drop] @ across, V[stay] - across.T @ V[drop])

    def within(self, more, H, G):
        """Return the solution with the channels `more` (q,) as well."""
        K = self.left
        reach = self.A @ H[K][:, more]  # (k, q)
        S = _inverse(H[more][:, more] - H[more][:, K] @ reach)
        new = S @ (G[more] - H[more][:, K] @ self.V)
        A = torch.cat((torch.cat((self.A + reach @ S @ reach.T, -reach @ S), 1), torch.cat((-S @ reach.T, S), 1)))
        return Solved(torch.cat((K, more)), A, torch.cat((self.V - reach @ new, new)))


def eliminate(channels, n_drop, step=STEP, every=None):
    """Return (order of the dropped units (n_drop,), [refitted consumer (d, N) after each `every` of them]).

    OSSCAR's greedy: dropping channel i adds ½ ||V_i||² / A_ii to the error, dropping the channels S of a head
    ½ tr(V_Sᵀ (A_SS)⁻¹ V_S). The `step` cheapest go at a time, 1 is exact greedy, as heads always go.
    """
    size = channels.size
    now = Solved(torch.arange(len(channels.H), device=channels.H.device), _inverse(channels.ridged), channels.B)
    order, snapshots, step = [], [], step if size == 1 else 1
    while len(order) < n_drop:
        cost, t = now.cost(size), min(step, n_drop - len(order), every - len(order) % every if every else step)
        drop = torch.zeros_like(cost, dtype=torch.bool)
        drop[cost.topk(t, largest=False).indices] = True
        order += (now.left[::size] // size)[drop][cost[drop].argsort()].tolist()
        now = now.without(drop.repeat_interleave(size))
        if every and len(order) % every == 0:
            snapshots.append(torch.zeros_like(channels.W).index_copy_(1, now.left, now.V.T))
    return torch.tensor(order, dtype=torch.long, device=channels.H.device), snapshots


def swapped(channels, keep, rounds=ROUNDS, most=SWAPS):
    """Return kept channels, sorted, after OSSCAR's local search: dropped ones come in, the least needed ones go.

    In a round the q dropped channels that would lower the error most, each alone, come in, then the q that are
    needed least of all go; where that is no better, q is halved. At most `rounds` rounds of `most` swaps.
    """
    H, G, n, k = channels.ridged, channels.G, channels.n, len(keep)
    A = _inverse(H[keep][:, keep])
    now = Solved(keep, A, A @ G[keep])
    q = min(most, k, n - k)
    for _ in range(rounds):
        if not q:
            break
        outside = torch.ones(n, dtype=torch.bool, device=H.device)
        outside[now.left] = False
        outside = outside.nonzero().squeeze(1)
        across = H[outside][:, now.left]
        gain = (G[outside] - across @ now.V).square().sum(1)
        gain /= H.diagonal()[outside] - ((across @ now.A) * across).sum(1)
        more = now.within(outside[gain.topk(q).indices], H, G)
        drop = torch.zeros_like(more.left, dtype=torch.bool)
        drop[more.cost().topk(q, largest=False).indices] = True
        candidate = more.without(drop)
        before, after = ((solved.V * G[solved.left]).sum() for solved in (now, candidate))  # what they explain
        if after > before * (1 + 1e-12):
            now = candidate
        else:
            q //= 2
    return now.left.sort().values


def _inverse(H):
    return torch.cholesky_inverse(torch.linalg.cholesky(H))
