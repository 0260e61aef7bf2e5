"""The iterative search: mask each remaining block, remove the one whose absence hurts least, repeat.

Engines are generators of Step, one per removal, so that the caller can save after each; resuming is
passing the blocks already removed as `done`. `exhaustive` is the paper's loop, `cached` shares work
between candidates and iterations and gives the same numbers bit for bit, `race` stops scoring a
candidate once it is clearly behind (approximate), `streamed` walks layer by layer for a model that does
not fit the device.

    for step in cached(decoder, decoder.blocks("mix"), windows, n=12, batch_size=8):
        print(step.block, step.perplexity)

Candidates are blocks (the paper) or whole layers (SLEB, arXiv 2402.09025). What is minimised is an
objective of lib.evaluate: perplexity, or the divergence from the dense model (EvoPress's fitness).
"""

import functools
import math
import time
from collections import Counter
from typing import NamedTuple

import torch

from lib.blocks import Block
from lib.evaluate import last_states, next_token
from lib.memory import Store, rooms
from lib.trajectories import Plan, Trajectories


class Step(NamedTuple):
    """One removal. block: what goes; perplexity: without it; scores: every candidate's perplexity,
    or another objective where that is what is minimised.

    windows: how many windows each candidate was scored on, None where it is all of them.
    block_forwards and head_forwards count what the iteration computed, in windows times blocks and
    in windows; seconds is its wall time.
    """

    block: Block
    perplexity: float
    scores: dict
    windows: dict | None
    block_forwards: int
    head_forwards: int
    seconds: float


class NoFiniteCandidate(RuntimeError):
    """Every candidate's perplexity is NaN or infinite; .scores holds them."""

    def __init__(self, scores):
        super().__init__(f"all {len(scores)} candidates have a perplexity that is NaN or infinite")
        self.scores = scores


def exhaustive(decoder, blocks, windows, n, done=(), batch_size=8, progress=None, objective=next_token):
    """Yield the Steps that bring `done` to n removals: the paper's search, each candidate from the first layer.

    blocks: candidates in the order in which ties are decided (first wins); windows: token ids (N, T);
    done: blocks removed before, in order; progress(block, windows, running perplexity) is called as
    work gets done; objective: a value of lib.evaluate.OBJECTIVES. Raises NoFiniteCandidate where no
    candidate can win.
    """
    removed, batches = list(done), windows.split(batch_size)
    streams, goal = [decoder.embed(ids) for ids in batches], objective(decoder, batches)
    while len(removed) < n:
        clock = _Clock(decoder)
        scores = {}
        for block in _left(blocks, removed):
            masked = {*removed, block}
            losses = [goal.losses(k, *last_states(decoder, [stream], masked)) for k, stream in enumerate(streams)]
            scores[block] = goal.score(losses)
            if progress:
                progress(block, len(windows), scores[block])
        step = _decide(scores, scores, None, clock)
        removed.append(step.block)
        yield step


def cached(decoder, blocks, windows, n, done=(), batch_size=8, progress=None, objective=next_token, cache_bytes=None):
    """Yield the same Steps as `exhaustive`, from the same losses bit for bit, in a fraction of the forwards.

    cache_bytes: memory for states kept between iterations; None takes the shares of what is free that
    lib.trajectories names. Less memory means more forwards, never other numbers.
    """
    yield from _shared(decoder, blocks, windows, n, done, batch_size, progress, objective, cache_bytes, math.inf)


def race(
    decoder,
    blocks,
    windows,
    n,
    done=(),
    batch_size=8,
    progress=None,
    objective=next_token,
    cache_bytes=None,
    *,
    confidence,
):
    """Yield Steps like `cached`, but score candidates batch by batch and drop those clearly behind (approximate).

    After each batch a candidate drops out once the mean of its token losses minus the leader's, over
    the tokens both have seen, exceeds `confidence` standard errors. The error is that of the mean of
    tokens, times the root of (N - n) / (N - 1), since n of N windows are drawn without replacement and
    the last ones leave nothing open, times the root of 1 + 2 / n, by which Student's t with n + 2 degrees
    of freedom is wider than the normal: few windows tell little of how documents differ. The rest see
    all windows, and one of them is removed.
    A dropped candidate's score is the perplexity of the windows it saw; batches are visited in an order
    that spreads over the text. Should none of the rest be finite in the end, the dropped ones see what
    they missed, and all are decided among. Small batches decide sooner. confidence = inf drops nobody:
    the numbers of `cached`.
    """
    yield from _shared(decoder, blocks, windows, n, done, batch_size, progress, objective, cache_bytes, confidence)


def streamed(decoder, blocks, windows, n, done=(), batch_size=8, progress=None, objective=next_token, cache_bytes=None):
    """Yield the same Steps as `exhaustive`, bit for bit, with many candidates passing a layer before the next layer.

    For a model that does not fit the device: an offloaded layer's weights are moved there once for all
    candidates whose states of all windows fit in cache_bytes (as in `cached`) beside the base model's,
    one at least. Such groups follow each other by depth, each from its first candidate's layer on: less
    memory means more moves, never more forwards nor other numbers.
    """
    removed, batches = list(done), windows.split(batch_size)
    streams, goal = [decoder.embed(ids) for ids in batches], objective(decoder, batches)
    store = _store(decoder, cache_bytes)
    size = max(1, store.fits([stream.h for stream in streams]) - 1)

    def advance(states, i, kinds):
        for k, stream in enumerate(streams):
            h = decoder.run(i, kinds, store.get(states[k], stream.h), stream)
            store.drop(states[k])
            states[k] = store.put(h, must=True)

    while len(removed) < n:
        clock = _Clock(decoder)
        left = _left(blocks, removed)
        deep = sorted(left, key=lambda block: block.layer)
        groups = [deep[k : k + size] for k in range(0, len(deep), size)]
        base, start = [store.put(stream.h, must=True) for stream in streams], 0  # the states entering layer `start`
        scores = dict.fromkeys(left)  # ties: order of candidates
        for group, after in zip(groups, [*groups[1:], deep[-1:]], strict=False):
            states, last = {}, after[0].layer
            for i in range(start, decoder.n_layers):
                kinds = decoder.kinds(i, removed)
                with decoder.resident(i):
                    for block in states:
                        advance(states[block], i, kinds)
                    for block in [block for block in group if block.layer == i]:
                        rest = decoder.kinds(i, {*removed, block})
                        states[block] = [
                            store.put(decoder.run(i, rest, store.get(h, stream.h), stream), must=True)
                            for h, stream in zip(base, streams, strict=True)
                        ]
                    if i < last:
                        advance(base, i, kinds)
            start = last
            for block in group:
                losses = []
                for k, h in enumerate(states.pop(block)):
                    losses.append(goal.losses(k, store.get(h, streams[k].h)))
                    store.drop(h)
                scores[block] = goal.score(losses)
                if progress:
                    progress(block, len(windows), scores[block])
        for h in base:
            store.drop(h)
        step = _decide(scores, scores, None, clock)
        removed.append(step.block)
        yield step


ENGINES = {"cached": cached, "race": race, "exhaustive": exhaustive, "streamed": streamed}


def _shared(decoder, blocks, windows, n, done, batch_size, progress, objective, cache_bytes, confidence):
    removed, batches = list(done), windows.split(batch_size)
    streams, goal = [decoder.embed(ids) for ids in batches], objective(decoder, batches)
    store = _store(decoder, cache_bytes)  # of what is free once they are there
    state_bytes = sum(stream.h.nbytes for stream in streams)
    plan = Plan(_left(blocks, removed), decoder.n_layers, state_bytes, sum(store.rooms.values()))
    batches = [
        Trajectories(decoder, stream, plan, store, functools.partial(goal.losses, k))
        for k, stream in enumerate(streams)
    ]

    visits = _spread(len(batches)) if confidence < math.inf else range(len(batches))

    def see(k, candidates, losses, sums):
        for block, token_losses in batches[k].token_losses(candidates, removed):
            losses[block][k] = token_losses
            if progress:
                sums[block] += token_losses.double().sum(0)
                mean = sums[block] / sum(map(len, losses[block].values()))  # one window that stands for all seen
                progress(block, len(token_losses), goal.score([mean[None]]))

    def score(seen):
        return goal.score([seen[k] for k in sorted(seen)])

    while len(removed) < n:
        clock = _Clock(decoder)
        left = _left(blocks, removed)
        alive, losses, sums = left, {block: {} for block in left}, Counter()  # token losses by number of the batch
        for k in visits:
            see(k, alive, losses, sums)
            if confidence < math.inf and k != visits[-1]:
                alive = _survivors(alive, losses, confidence, len(windows))
        if not any(math.isfinite(score(losses[block])) for block in alive):
            for k in visits:
                see(k, [block for block in left if k not in losses[block]], losses, sums)
            alive = left
        scores = {block: score(losses[block]) for block in left}
        seen = {block: sum(map(len, losses[block].values())) for block in left}
        if progress:
            for block in left:
                progress(block, len(windows) - seen[block], scores[block])
        step = _decide(scores, alive, seen if confidence < math.inf else None, clock)
        removed.append(step.block)
        for batch in batches:
            batch.removal_at(step.block.layer)
            batch.forget(step.block)
        yield step


def _spread(n):
    """Return 0..n-1 in an order whose first few lie far apart.

    Neighbouring windows are of the same documents, and speak less for the rest of the text. The k-th
    goes where k times the golden ratio, modulo 1, ranks among all.
    """
    golden = (math.sqrt(5) - 1) / 2
    ranked = sorted(range(n), key=lambda k: k * golden % 1)
    return sorted(range(n), key=ranked.__getitem__)


def _survivors(alive, losses, confidence, N):
    """Return the candidates not clearly behind the leader; losses: block -> {batch: token losses (B, n)}."""
    n = sum(map(len, losses[alive[0]].values()))
    tokens = {block: torch.cat([t.flatten() for t in losses[block].values()]).double() for block in alive}
    finite = [block for block in alive if tokens[block].isfinite().all()]
    if not finite or len(tokens[finite[0]]) < 2:  # a single difference has no standard error
        return alive
    leader = min(finite, key=lambda block: tokens[block].mean().item())
    wider = confidence * math.sqrt((N - n) / (N - 1) * (1 + 2 / n))
    survivors = []
    for block in finite:
        behind = tokens[block] - tokens[leader]
        error = behind.std().item() / math.sqrt(len(behind))
        if block == leader or behind.mean().item() <= wider * error:
            survivors.append(block)
    return survivors


def _decide(scores, alive, windows, clock):
    """Return the Step that removes the block of lowest finite score among `alive`, the first of equal ones."""
    finite = {block: score for block, score in scores.items() if block in alive and math.isfinite(score)}
    if not finite:
        raise NoFiniteCandidate(scores)
    best = min(finite, key=finite.get)
    return Step(best, finite[best], scores, windows, *clock.read())


def _left(blocks, removed):
    return [block for block in blocks if block not in removed]


def _store(decoder, cache_bytes):
    return Store(rooms(decoder.devices, cache_bytes))


class _Clock:
    """Counts and seconds since it was made."""

    def __init__(self, decoder):
        self.decoder, self.before, self.start = decoder, decoder.counts.copy(), time.perf_counter()

    def read(self):
        counts = self.decoder.counts - self.before
        return counts["mha"] + counts["mlp"], counts["head"], time.perf_counter() - self.start
