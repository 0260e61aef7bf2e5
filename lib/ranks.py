"""Many processes on one search, started by torchrun: each holds the model and computes a share of the losses.

Every process asks for the same, computes what is its own and gets the rest from the others, in window order: all decide
alike, on numbers that do not depend on how many they are. The first one writes and prints. What is exchanged are sums
of losses, a few bytes a window, over gloo, whichever device computes them.

    rank, size = join()
    engine = Shared(lambda windows: Cached(decoder, units, windows, 8), windows, 8)
"""

import functools
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from lib.evaluate import window_losses
from lib.journal import pack, unpack

PATIENCE = timedelta(days=2)  # a share may take long; a process that dies is noticed at once


class Lost(RuntimeError):
    """Another process of the run has ended."""

    def __init__(self):
        super().__init__("another process of this run has ended; what it said is above")


@functools.cache
def join():
    """Return (rank, how many), having met the other processes where torchrun started this one; (0, 1) alone.

    Each process of a machine is given its part of the GPUs that are visible, before any is used.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size < 2:
        return 0, 1
    here, local = int(os.environ.get("LOCAL_WORLD_SIZE", size)), int(os.environ.get("LOCAL_RANK", 0))
    each = torch.cuda.device_count() // here
    if each:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        visible = visible if visible != [""] else [str(i) for i in range(torch.cuda.device_count())]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[local * each : (local + 1) * each])
    dist.init_process_group("gloo", timeout=PATIENCE)
    return dist.get_rank(), size


def gather(value):
    """Return every process's value, in the order of their ranks. Raises Lost where one has ended."""
    rank, size = join()
    if size == 1:
        return [value]
    values = [None] * size
    try:
        dist.all_gather_object(values, value)
    except RuntimeError as error:
        raise Lost from error
    return values


def first(value):
    """Return the first process's value on every one."""
    return gather(value)[0]


def share(n):
    """Return the range of n things that are this process's: neighbours, and as many as of the others, or one more."""
    rank, size = join()
    return range(n * rank // size, n * (rank + 1) // size)


class Shared:
    """An engine whose work is shared. Alone, it is the engine.

    make: function of windows (N, T) that returns an engine of lib.engines for them. by_unit: each process computes all
    batches for its share of the candidates, as a race needs, which asks for one batch at a time; else its share of the
    batches, and only their states are kept, for all candidates. wrap: function of the engine of this share, whose
    batches are numbered as those of all windows, that returns what is asked instead, such as lib.journal.Kept.
    """

    def __init__(self, make, windows, batch_size, by_unit=False, wrap=None):
        self.by_unit, self.windows, self.batches = by_unit, windows, windows.split(batch_size)
        n = len(self.batches)
        self.mine = range(n) if by_unit else share(n)
        held = self.mine or range(1)  # with more processes than batches some have none to compute
        engine = _Part(make(windows[held.start * batch_size : held.stop * batch_size]), held.start)
        self.engine, self.decoder, self.score = wrap(engine) if wrap else engine, engine.decoder, engine.score

    def losses(self, wanted, removed):
        """Yield as lib.engines does, by batch, on every process the same."""
        rank, size = join()
        if size == 1:
            yield from self.engine.losses(wanted, removed)
            return
        if self.by_unit:
            mine = {k: units[rank::size] for k, units in wanted.items() if units[rank::size]}
        else:
            mine = {k: units for k, units in wanted.items() if k in self.mine}
        before = self.decoder.counts.copy()
        known = [(k, unit, pack(losses, self.by_unit)) for k, unit, losses in self.engine.losses(mine, removed)]
        everyone = gather((known, self.decoder.counts - before))
        for other, (_, counts) in enumerate(everyone):
            if other != rank:
                self.decoder.counts += counts
        for k, unit, packed in sorted((item for some, _ in everyone for item in some), key=lambda item: item[:2]):
            yield k, unit, unpack(packed)

    def base(self, removed):
        """Return as lib.engines does, on every process the same."""
        mine = {k: pack(losses, self.by_unit) for k, losses in self.engine.base(removed).items() if k in self.mine}
        everyone = [mine] if self.by_unit else gather(mine)
        return {k: unpack(packed) for some in everyone for k, packed in some.items()}


class _Part:
    """An engine of some windows, whose batches are numbered from `start`."""

    def __init__(self, engine, start):
        self.engine, self.start = engine, start
        self.decoder, self.windows, self.batches, self.score = (
            engine.decoder,
            engine.windows,
            engine.batches,
            engine.score,
        )

    def losses(self, wanted, removed):
        wanted = {k - self.start: units for k, units in wanted.items()}
        for k, unit, losses in self.engine.losses(wanted, removed):
            yield k + self.start, unit, losses

    def base(self, removed):
        return {k + self.start: losses for k, losses in self.engine.base(removed).items()}


def shared_losses(decoder, windows, batch_size, masked=()):
    """Return lib.evaluate.window_losses of all windows, each process computing a share of the batches."""
    batches = windows.split(batch_size)
    mine = share(len(batches))
    some = windows[mine.start * batch_size : mine.stop * batch_size]
    losses = window_losses(decoder, some, batch_size, masked) if mine else torch.zeros(0, dtype=torch.float64)
    return torch.cat(gather(losses))
