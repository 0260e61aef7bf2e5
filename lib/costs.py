"""What removing blocks saves: parameters, KV cache, arithmetic, or seconds measured on one device.

A rule of the search divides by a cost (the loss a block adds per parameter it frees), a budget counts in one (a
quarter of the KV cache must go). All but seconds are counted from the model's modules, before any weight is read.

    cost = counted("kv", skeleton(path), find_layers(skeleton(path)))
    cost.of([Block("mha", 3)]) / cost.whole    # the share of the cache that attention 3 holds
"""

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lib.blocks import KINDS, Block, blocks_of
from lib.decoder import block_parameters, leaving_parameters
from lib.measure import attentions, cache_without, generate, interleaved, spread
from lib.model import parameter_count

COUNTED = ("parameters", "kv", "flops")
COSTS = (*COUNTED, "latency")
CONTEXT = 2048  # tokens before a token's own, over which its attention is counted in flops


class Cost(NamedTuple):
    """One kind of cost of one model. whole: what all of it costs; of(units): what goes with these blocks or layers."""

    name: str
    whole: float
    of: Callable

    def share(self, units):
        """Return the part of the whole that goes with `units`, 0 to 1."""
        return self.of(units) / self.whole


class Budget(NamedTuple):
    """A share of a cost that must go, above 0, to 1."""

    cost: Cost
    share: float

    def met(self, removed):
        """Whether enough is gone with the blocks `removed`."""
        return self.cost.share(removed) >= self.share


def counted(name, model, layers, context=CONTEXT):
    """Return the Cost `name` of COUNTED; model and its decoder layers need no weights.

    parameters: norms included, tied ones once. kv: bytes of cache that a token adds. flops: of one token's forward
    after `context` others: two for each weight of a matrix, of experts those that a token visits, and two products
    of its attentions with what they see. Raises ValueError where the model tells too little.
    """
    if name == "parameters":
        return Cost(name, parameter_count(model), lambda units: block_parameters(layers, units))
    if name == "kv":
        return _cost_of_kv(model)
    return _cost_of_flops(model, layers, context)


def _cost_of_kv(model):
    sizes = Counter()
    for attention in attentions(model):
        sizes[attention.layer] += attention.kv_bytes
    if not sizes:
        raise ValueError(
            f"{type(model).__name__}: no attention tells its layer and the width of its heads, so its KV cache cannot "
            f"be counted; use one of {', '.join(name for name in COSTS if name != 'kv')}"
        )
    return Cost("kv", sum(sizes.values()), lambda units: sum(sizes[i] for i in _layers_of("mha", units)))


def _cost_of_flops(model, layers, context):
    used = _flops_of_weights(model)
    scores = Counter()
    for attention in attentions(model):
        seen = min(context, attention.window or context) + 1
        scores[attention.layer] += 2 * 2 * attention.heads * attention.width * seen
    head = model.get_output_embeddings().weight

    def of(units):
        gone = sum(used[id(p)] for p in leaving_parameters(layers, units))
        return gone + sum(scores[i] for i in _layers_of("mha", units))

    every = [("layer", i) for i in range(len(layers))]
    return Cost("flops", of(every) + 2 * head.numel(), of)


def _flops_of_weights(model):
    """Return {id of a parameter: flops of one token}: vectors are added and scaled with, which counts as nothing."""
    config = model.config.get_text_config()
    experts = next((n for key in ("num_experts", "num_local_experts", "n_routed_experts")
                    if (n := getattr(config, key, None))), None)  # fmt: skip
    visited = getattr(config, "num_experts_per_tok", None)
    flops = {}
    for name, p in model.named_parameters():
        share = 1
        if experts and visited and (".experts." in name or (p.ndim == 3 and len(p) == experts)):
            share = visited / experts
        flops[id(p)] = 2 * p.numel() * share if p.ndim > 1 else 0
    return flops


def _layers_of(kind, units):
    return {i for name, i in blocks_of(units) if name == kind}


# ---- seconds -------------------------------------------------------------------------------------


class BlockSeconds(NamedTuple):
    """What one attention, one MLP, and all the rest of a model take on one device, for one shape of input."""

    weights: str  # fingerprint of the model
    device_name: str
    dtype: str
    layers: int
    tokens: tuple  # (prompts, tokens each, tokens written after each)
    mha: float
    mlp: float
    rest: float


def block_seconds(decoder, ids, new_tokens, repeats=5):
    """Return the seconds that one attention, one MLP, and all the rest take to read ids (B, T) and write new tokens.

    Medians of `repeats` turns of three models: the whole one, and those without every second attention or MLP. Raises
    ValueError where a model with less took longer: the machine was too busy.
    """
    half = range(1, decoder.n_layers, 2)
    gone = {kind: [Block(kind, i) for i in half] for kind in KINDS}

    def run(blocks):
        with decoder.masked(blocks):
            made = generate(decoder.model, ids, new_tokens, cache_without(decoder.model.config, blocks))
        return made.prefill_seconds + made.decode_seconds

    turns = {"whole": lambda: run(()), **{kind: functools.partial(run, blocks) for kind, blocks in gone.items()}}
    medians = {name: spread(times).median for name, times in interleaved(turns, repeats).items()}
    mha, mlp = ((medians["whole"] - medians[kind]) / max(1, len(half)) for kind in KINDS)
    if min(mha, mlp) <= 0:
        raise ValueError(
            f"an attention seems to take {mha:.2g} s and an MLP {mlp:.2g} s: the machine was busy, or the model has one"
            " layer; measure again with more repeats"
        )
    return mha, mlp, max(0.0, medians["whole"] - decoder.n_layers * (mha + mlp))


def cost_of_seconds(seconds):
    """Return the Cost of measured BlockSeconds."""

    def of(units):
        return sum(seconds.mha if kind == "mha" else seconds.mlp for kind, _ in set(blocks_of(units)))

    return Cost("latency", seconds.layers * (seconds.mha + seconds.mlp) + seconds.rest, of)


def read_seconds(path, weights, device_name, dtype):
    """Return the BlockSeconds of the file at `path`; raise ValueError unless measured of this model and device."""
    path = Path(path).expanduser()
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        seconds = BlockSeconds(**{key: held[key] for key in BlockSeconds._fields})
        right = all(value > 0 for value in (seconds.mha, seconds.mlp, seconds.layers)) and seconds.rest >= 0
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; measure it with python -m scripts.bench_model") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        right = False
    if not right:
        raise ValueError(
            f"{path}: does not hold the seconds of one attention and one MLP, above 0; measure them again with "
            "python -m scripts.bench_model"
        )
    here = {"weights": weights, "device_name": device_name, "dtype": dtype}
    for key, what in (("weights", "another model"), ("device_name", "another device"), ("dtype", "another dtype")):
        if getattr(seconds, key) != here[key]:
            raise ValueError(
                f"{path}: measured of {what} ({getattr(seconds, key)} there, {here[key]} now); measure this one with "
                "python -m scripts.bench_model"
            )
    return seconds
