"""The states of one batch on its way through the decoder, shared between candidates.

All candidates share the base model's states up to the layer of their block. After a removal at layer
q, whatever was on its way with an earlier block masked is still right up to layer q: such states are
kept, at the layer boundaries that a memory budget allows, and the next iteration continues from them.
With n blocks left and the last removal at x = p/n of the depth an iteration costs (1 - x^2)/2 of an
exhaustive one. What is computed is exactly what a run from the first layer computes, so per-window
losses are bit-identical to it.
"""
from collections import Counter
from pathlib import Path

import torch

from lib.blocks import UNITS, Block

DEVICE_SHARE = 0.6  # of the memory free on each of the model's devices
HOST_SHARE = 0.25  # of the host memory available, for what spills from a GPU
HOST = torch.device("cpu")


class Trajectories:
    """One batch: its Stream, and the states kept between iterations.

    losses: function of the states (B, T, H) after the last layer to token losses (B, n).
    """

    def __init__(self, decoder, stream, plan, store, losses):
        self.decoder, self.stream, self.plan, self.store, self.losses = decoder, stream, plan, store, losses
        self.kept = {}  # block, or None for the base model -> {layer: the state entering it}

    def token_losses(self, candidates, removed):
        """Yield (block, token losses (B, n)) with that block or layer masked on top of `removed`, by depth.

        Only what no kept state covers is computed, and only as deep as a candidate needs it.
        """
        decoder, stream = self.decoder, self.stream
        deepest = max((block.layer for block in candidates), default=-1)
        x = stream.h
        for i in range(deepest + 1):
            mid = None  # between the layer's two blocks, where it has such a state
            for block in (Block(unit, i) for unit in UNITS):
                if block not in candidates:
                    continue
                start, h = self._resume(block)
                if h is None:
                    start, kinds = i + 1, decoder.kinds(i, {*removed, block})
                    h = decoder.run(i, kinds, x, stream)
                    if decoder.split[i] and kinds == ("mha",):
                        mid = h
                yield block, self.losses(self._finish(block, start, h, removed))
            if i < deepest:
                x = self._advance(i, x, mid, removed)

    def removal_at(self, layer):
        """Forget what a removal in `layer` makes wrong: every state that has passed it."""
        for states in self.kept.values():
            for passed in [i for i in states if i > layer]:
                self.store.drop(states.pop(passed))

    def forget(self, block):
        """Drop the states of a block that is no candidate any more."""
        for kept in self.kept.pop(block, {}).values():
            self.store.drop(kept)

    def _resume(self, block):
        """Return (layer, state entering it) of the deepest kept state with `block` masked, (None, None) without."""
        states = self.kept.get(block)
        if not states:
            return None, None
        return max(states), self.store.get(states[max(states)], self.stream.h)

    def _finish(self, block, start, h, removed):
        """Run layers start.. on h, keeping states where the plan says, and return the last."""
        for i in range(start, self.decoder.n_layers):
            if i in self.plan.boundaries:
                self._keep(block, i, h)
            h = self.decoder.run(i, self.decoder.kinds(i, removed), h, self.stream)
        return h

    def _advance(self, i, x, mid, removed):
        """Return the base model's state entering layer i + 1."""
        if i + 1 in self.kept.get(None, ()):
            return self.store.get(self.kept[None][i + 1], self.stream.h)
        kinds = self.decoder.kinds(i, removed)
        if mid is not None:
            kinds, x = tuple(kind for kind in kinds if kind != "mha"), mid
        h = self.decoder.run(i, kinds, x, self.stream)
        if self.plan.base:
            self._keep(None, i + 1, h)
        return h

    def _keep(self, block, layer, h):
        states = self.kept.setdefault(block, {})
        if layer not in states and (held := self.store.put(h)) is not None:
            states[layer] = held


class Plan:
    """Which states to keep. base: the base model's at every boundary; boundaries: layers where candidates' are kept."""

    def __init__(self, blocks, n_layers, state_bytes, budget):
        """blocks: candidates; state_bytes: one state of all windows; budget: bytes for all that is kept."""
        self.bytes, chosen = 0, set()  # what saves the most layers a byte comes first; 0 stands for the base
        while True:
            options = []
            for c in set(range(n_layers)) - chosen:
                cost = state_bytes * (sum(block.layer < c for block in blocks) if c else n_layers)
                if cost and self.bytes + cost <= budget:
                    gain = _recomputed(chosen, n_layers) - _recomputed(chosen | {c}, n_layers)
                    gain = gain * len(blocks) / n_layers if c else n_layers * (n_layers - 1) / 2
                    options.append((gain / cost, c, cost))
            if not options:
                break
            _, c, cost = max(options)
            chosen.add(c)
            self.bytes += cost
        self.base, self.boundaries = 0 in chosen, frozenset(chosen - {0})


def _recomputed(boundaries, n_layers):
    """Layers run again for want of a boundary, summed over removals in every layer and candidates before it."""
    total, last = 0, 0
    for q in range(n_layers):
        last = q if q in boundaries else last
        total += last * (q - last) + (q - last) * (q - last + 1) // 2  # candidates before `last`, and after it
    return total


class Store:
    """Where states are held: on the device that made them while it has room, else in pinned host memory.

    rooms: {device: bytes} left, as rooms() gives them. A device that has none spills all of its states.
    """

    def __init__(self, rooms):
        self.rooms = Counter(rooms)
        self.pins = any(torch.device(device).type == "cuda" for device in rooms)  # to ask a tensor makes a CUDA context

    def put(self, h, must=False):
        """Return h as it is held from now on; None where there is no room, unless it `must` be held."""
        if h.nbytes > self.rooms[h.device] and h.is_cuda and self._bytes_on_host(h) <= self.rooms[HOST]:
            try:
                pinned = torch.empty_like(h, device=HOST, pin_memory=True)  # h's strides, too: other ones, other bits
            except RuntimeError:  # the system pins no more
                pass
            else:
                self.rooms[HOST] -= self._bytes_on_host(h)
                return pinned.copy_(h)
        if h.nbytes > self.rooms[h.device] and not must:
            return None
        self.rooms[h.device] -= h.nbytes
        return h

    def get(self, held, like):
        return held if held.is_cuda else held.to(like.device, non_blocking=True)

    def drop(self, held):
        self.rooms[held.device] += self._bytes_on_host(held) if held.device == HOST else held.nbytes

    def fits(self, states):
        """Return how many lists of states like these there is room for, whichever device makes them."""
        device = min((room for device, room in self.rooms.items() if device != HOST), default=0)
        return device // sum(h.nbytes for h in states) + self.rooms[HOST] // sum(map(self._bytes_on_host, states))

    def _bytes_on_host(self, h):
        """Return what a state takes in host memory: torch rounds pinned memory up to a power of two."""
        return 1 << (h.nbytes - 1).bit_length() if h.is_cuda or (self.pins and h.is_pinned()) else h.nbytes


def rooms(devices, cache_bytes=None):
    """Return {device: bytes} for the states of a model on `devices`, the host among them.

    DEVICE_SHARE of what is free on each, and HOST_SHARE of the host's for what spills from a GPU. cache_bytes bounds
    their sum: spread evenly over the devices up to their shares, and what is left on the host.
    """
    free = {device: free_bytes(device) for device in devices}
    shares = {device: int(DEVICE_SHARE * own) for device, (own, _) in free.items()}
    on_host = min(host for _, host in free.values())
    spill = int(HOST_SHARE * on_host)
    if cache_bytes is not None:
        shares = {device: min(share, cache_bytes // len(shares)) for device, share in shares.items()}
        left = cache_bytes - sum(shares.values())
        spill = left if HOST in shares else min(left, on_host)  # pinned pages cannot be swapped
    return shares | {HOST: shares.get(HOST, 0) + spill}


def free_bytes(device):
    """Return (bytes free on the device, host bytes available for spilling, 0 where the device is the host).

    What torch has reserved on a GPU and nothing uses counts as free.
    """
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused, _free_on_host()
    return _free_on_host(), 0


def _free_on_host(proc=Path("/proc"), groups=Path("/sys/fs/cgroup")):
    """Return available host memory: the kernel's estimate, or what the tightest of the process's control groups leaves.

    Containers, Slurm and systemd set limits at any depth, in version 1 or 2. What files left in the cache and nobody
    uses counts as free.
    """
    known = [line.split() for line in _lines(proc / "meminfo")]
    available = [int(words[1]) * 1024 for words in known if words[0] == "MemAvailable:"] or [4 * 2**30]
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version1 = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        version2 = groups, "memory.max", "memory.current", "inactive_file"
        folder, limit, usage, cache = version1 if controllers else version2
        for part in ("", *path.strip("/").split("/")):
            folder = folder / part
            try:
                used = int((folder / usage).read_text())
                inactive = dict(entry.split() for entry in _lines(folder / "memory.stat")).get(cache, 0)
                available.append(int((folder / limit).read_text()) - used + int(inactive))
            except (OSError, ValueError):  # no such file, or "max"
                pass
    return max(0, min(available))


def _lines(path):
    return path.read_text().splitlines() if path.exists() else []
