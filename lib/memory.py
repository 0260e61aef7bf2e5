"""What memory is free, and where states are held: on the device that made them, else in host memory."""

import os
from collections import Counter
from pathlib import Path

import torch

DEVICE_SHARE = 0.6  # of the memory free on each of the model's devices


HOST_SHARE = 0.25  # of the host memory available, for what spills from a GPU


HOST = torch.device("cpu")


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
    return max(0, min(available)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes share it


def _lines(path):
    return path.read_text().splitlines() if path.exists() else []
