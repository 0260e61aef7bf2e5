"""The iterative search: mask each remaining block, remove the one whose absence hurts least, repeat.

Engines are generators of Step, one per removal, so that the caller can save after each; resuming is
passing the blocks already removed as `done`.

    for step in exhaustive(Decoder(model), decoder.blocks("mix"), windows, n=12, batch_size=8):
        print(step.block, step.perplexity)
"""
import math
import time
from typing import NamedTuple

from lib.blocks import Block
from lib.evaluate import perplexity, window_losses


class Step(NamedTuple):
    """One removal. block: what goes; perplexity: without it; scores: every candidate's perplexity.

    block_forwards and head_forwards count what the iteration computed, in windows times blocks and
    in windows; seconds is its wall time.
    """

    block: Block
    perplexity: float
    scores: dict
    block_forwards: int
    head_forwards: int
    seconds: float


class NoFiniteCandidate(RuntimeError):
    """Every candidate's perplexity is NaN or infinite; .scores holds them."""

    def __init__(self, scores):
        super().__init__(f"all {len(scores)} candidates have a perplexity that is NaN or infinite")
        self.scores = scores


def exhaustive(decoder, blocks, windows, n, done=(), batch_size=8, on_candidate=lambda block, score: None):
    """Yield n Steps minus those in `done`: the paper's search, every candidate run from the first layer.

    blocks: candidates in the order in which ties are decided (first wins); windows: token ids (N, T);
    done: blocks removed before, in order. on_candidate(block, perplexity) is called after each
    candidate. Raises NoFiniteCandidate where no candidate can win.
    """
    removed = list(done)
    while len(removed) < n:
        start, before = time.perf_counter(), decoder.counts.copy()
        scores = {}
        for block in blocks:
            if block not in removed:
                losses = window_losses(decoder, windows, batch_size, masked={*removed, block})
                scores[block] = perplexity(losses, windows.shape[1])
                on_candidate(block, scores[block])
        step = _decide(scores, decoder.counts - before, time.perf_counter() - start)
        removed.append(step.block)
        yield step


def _decide(scores, counts, seconds):
    """Return the Step that removes the block of lowest finite score, the first of equal ones."""
    finite = {block: score for block, score in scores.items() if math.isfinite(score)}
    if not finite:
        raise NoFiniteCandidate(scores)
    best = min(finite, key=finite.get)
    return Step(best, finite[best], scores, counts["block"], counts["head"], seconds)


ENGINES = {"exhaustive": exhaustive}
