"""Engines: the token losses of a model without any set of blocks, asked one candidate more at a time.

An engine holds the batches of a text and answers `engine.losses(wanted, removed)`: for each batch and unit (a block,
or a whole layer) of `wanted` the token losses of the model without `removed` and without that unit. Every search, every
metric that masks one unit, and every exchange of blocks stands on this one call. `removed` may be any set, larger or
smaller than the one asked about before.

    engine = Cached(decoder, decoder.blocks("mix"), windows, batch_size=8)
    scores = judge(engine, decoder.blocks("mix"), removed=())    # {unit: perplexity without it}

`Exhaustive` runs every candidate from the first layer, as the paper's scripts do. `Cached` shares work between
candidates and between calls and gives the same losses bit for bit. `Streamed` walks layer by layer, for a model that
does not fit the device, and gives the same losses, too.
"""

import functools
import weakref

from lib.evaluate import last_states, next_token
from lib.memory import Store, rooms
from lib.trajectories import Keeping, Trajectories


class Exhaustive:
    """Each candidate from the first layer.

    decoder: lib.decoder.Decoder. units: what may be asked for, blocks or layers. windows: token ids (N, T), cut into
    `batches` of batch_size windows. objective: a value of lib.evaluate.OBJECTIVES; `score` makes a number of the
    losses of several batches, lower is better.
    """

    def __init__(self, decoder, units, windows, batch_size=8, objective=next_token):
        self.decoder, self.windows, self.batches = decoder, windows, windows.split(batch_size)
        self.streams = [decoder.embed(ids) for ids in self.batches]
        self.objective = objective(decoder, self.batches)
        self.score = self.objective.score

    def losses(self, wanted, removed):
        """Yield (batch, unit, token losses (B, n)) for each unit of wanted, {batch: units}, on top of `removed`."""
        for k, units in wanted.items():
            for unit in units:
                (h,) = last_states(self.decoder, [self.streams[k]], {*removed, unit})
                yield k, unit, self.objective.losses(k, h)

    def base(self, removed):
        """Return {batch: token losses (B, n)} of the model without `removed` and nothing more."""
        states = last_states(self.decoder, self.streams, frozenset(removed))
        return {k: self.objective.losses(k, h) for k, h in enumerate(states)}


class Cached(Exhaustive):
    """The losses of `Exhaustive`, bit for bit, in a fraction of the forwards.

    cache_bytes: memory for states kept between calls; None takes the shares of what is free that lib.memory names.
    Less memory means more forwards, never other numbers.
    """

    def __init__(self, decoder, units, windows, batch_size=8, objective=next_token, cache_bytes=None):
        super().__init__(decoder, units, windows, batch_size, objective)
        self._store = store = Store(rooms(decoder.devices, cache_bytes))  # of what is free once the streams are there
        state_bytes = sum(stream.h.nbytes for stream in self.streams)
        keeping = Keeping(units, decoder.n_layers, state_bytes, sum(store.rooms.values()))
        self._trajectories = [
            Trajectories(decoder, stream, keeping, store, functools.partial(self.objective.losses, k))
            for k, stream in enumerate(self.streams)
        ]

        decoder.on_full = weakref.WeakMethod(self.shrink)

    def shrink(self):
        """Drop all kept states and keep half as many from here on; return whether there were any."""
        held = sum(trajectories.forget() for trajectories in self._trajectories)
        for device in self._store.rooms:
            self._store.rooms[device] //= 2
        return held > 0

    def losses(self, wanted, removed):
        """Yield as `Exhaustive.losses`, the units of a batch by depth."""
        removed = frozenset(removed)
        for k, units in wanted.items():
            for unit, token_losses in self._trajectories[k].token_losses(units, removed):
                yield k, unit, token_losses


class Streamed(Exhaustive):
    """The losses of `Exhaustive`, bit for bit, with many candidates passing a layer before the next layer.

    For a model that does not fit the device: an offloaded layer's weights are moved there once for all candidates
    whose states of all windows fit in cache_bytes (as in `Cached`) beside the base model's, one at least. Such groups
    follow each other by depth, each from its first candidate's layer on: less memory means more moves, never more
    forwards nor other numbers.
    """

    def __init__(self, decoder, units, windows, batch_size=8, objective=next_token, cache_bytes=None):
        super().__init__(decoder, units, windows, batch_size, objective)
        self.store = Store(rooms(decoder.devices, cache_bytes))

    def losses(self, wanted, removed):
        """Yield as `Exhaustive.losses`, the units by depth and the batches of a unit in turn."""
        decoder, store, streams = self.decoder, self.store, {k: self.streams[k] for k in wanted}
        if not streams:
            return
        size = max(1, store.fits([stream.h for stream in streams.values()]) - 1)
        deep = sorted(dict.fromkeys(unit for units in wanted.values() for unit in units), key=lambda unit: unit.layer)
        groups = [deep[k : k + size] for k in range(0, len(deep), size)]

        def advance(states, i, kinds):
            for k, held in states.items():
                h = decoder.run(i, kinds, store.get(held, streams[k].h), streams[k])
                store.drop(held)
                states[k] = store.put(h, must=True)

        base, start = {k: store.put(stream.h, must=True) for k, stream in streams.items()}, 0  # entering layer `start`
        for group, after in zip(groups, [*groups[1:], deep[-1:]], strict=False):
            states, last = {}, after[0].layer
            for i in range(start, decoder.n_layers):
                kinds = decoder.kinds(i, removed)
                with decoder.resident(i):
                    for unit in states:
                        advance(states[unit], i, kinds)
                    for unit in [unit for unit in group if unit.layer == i]:
                        rest = decoder.kinds(i, {*removed, unit})
                        states[unit] = {
                            k: store.put(decoder.run(i, rest, store.get(base[k], s.h), s), must=True)
                            for k, s in streams.items()
                            if unit in wanted[k]
                        }
                    if i < last:
                        advance(base, i, kinds)
            start = last
            for unit in group:
                for k, held in states.pop(unit).items():
                    yield k, unit, self.objective.losses(k, store.get(held, streams[k].h))
                    store.drop(held)
        for held in base.values():
            store.drop(held)


ENGINES = {"cached": Cached, "exhaustive": Exhaustive, "streamed": Streamed}


def judge(engine, units, removed=(), progress=None):
    """Return {unit: score over all windows} without `removed` and that unit, in the order of `units`.

    progress(windows, unit, score of what it has seen) is called as batches are done.
    """
    seen = see(engine, dict.fromkeys(range(len(engine.batches)), units), removed, {}, progress)
    return {unit: score_of(engine, seen[unit]) for unit in units}


def score_of(engine, losses):
    """Return the objective of {batch: token losses (B, n)}, taken in window order whatever the order of the visits."""
    return engine.score([losses[k] for k in sorted(losses)])


def see(engine, wanted, removed, seen, progress=None):
    """Ask for wanted, {batch: units}; return `seen`, {unit: {batch: token losses (B, n)}}, with the answers added."""
    for k, unit, token_losses in engine.losses(wanted, removed):
        seen.setdefault(unit, {})[k] = token_losses
        if progress:
            progress(len(token_losses), unit, score_of(engine, seen[unit]))
    return seen
