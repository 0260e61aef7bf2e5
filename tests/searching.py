"""Searches by name, from the first forward to a list of Steps: an engine of lib.engines under lib.search.greedy."""

import math

from lib.engines import Cached, Exhaustive, Streamed
from lib.evaluate import next_token
from lib.importance import METRICS
from lib.search import greedy


def _search(engine):
    def run(
        decoder,
        units,
        windows,
        n,
        done=(),
        batch_size=8,
        progress=None,
        objective=next_token,
        *,
        confidence=math.inf,
        **options,
    ):
        made = engine(decoder, units, windows, batch_size, objective, **options)
        yield from greedy(made, units, n, done, confidence, progress)

    return run


exhaustive, cached, streamed = map(_search, (Exhaustive, Cached, Streamed))
race = cached  # with a confidence


def judging(name):
    """Return the function of lib.importance that judges every unit once by a metric, a searched one too."""
    once = f"{name}-oneshot" if METRICS[name].kind == "searched" else name
    return METRICS[once].function
