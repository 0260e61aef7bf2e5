"""What a causal language model costs to run: prefill and decode seconds, peak memory, KV-cache bytes, weights.

Works on any transformers causal LM: dense, pruned and reloaded, or with blocks masked or removed in process
(which cost the same, but for an addition of zeros each).

    runs = interleaved({"dense": lambda: generate(dense, ids, 32), "pruned": lambda: generate(pruned, ids, 32)}, 5)
    spread([ids.numel() / run.prefill_seconds for run in runs["pruned"]]).median    # prompt tokens/s
    count_kv(pruned).per_token, kv_per_token(pruned)    # KV-cache bytes, counted and in real tensors
"""

import ctypes
import gc
import inspect
import math
import os
import platform
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch


class Run(NamedTuple):
    """One greedy generation of N tokens for each of B prompts of T tokens.

    prefill_seconds: the prompts' forward and the choice of the first token, so also the latency of the
    first token; decode_seconds: the N - 1 forwards of one token after it. tokens: (B, N).
    cache_bytes: what the KV cache's tensors hold in the end.
    """

    prefill_seconds: float
    decode_seconds: float
    tokens: torch.Tensor
    cache_bytes: int


class Spread(NamedTuple):
    median: float
    low: float
    high: float


class KV(NamedTuple):
    """KV-cache bytes that a token adds.

    sliding: the part of per_token in attentions with a sliding window of `window` tokens, where growing ends.
    """

    per_token: int
    sliding: int
    window: int | None


@torch.inference_mode()
def generate(model, ids, new_tokens, cache=None):
    """Return the Run that greedily continues ids (B, T) by new_tokens, whatever the tokens are.

    The model's own forward is stepped with its own KV cache, or with `cache`, an empty one. Logits of the
    last position only are asked for where the forward can do so, as model.generate does.
    """
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    step, tokens = ids, []
    marks = [_now(ids.device)]
    for i in range(new_tokens):
        out = model(input_ids=step, past_key_values=cache, use_cache=True, **last)
        cache = out.past_key_values
        step = out.logits[:, -1].argmax(-1, keepdim=True).to(ids.device)
        tokens.append(step)
        if i == 0:
            marks.append(_now(ids.device))
    marks.append(_now(ids.device))
    start, first, end = marks
    return Run(first - start, end - first, torch.cat(tokens, 1), cache_bytes(cache))


def interleaved(runs, repeats):
    """Call each of `runs`, {name: function}, once as warm-up, then all in turns; return {name: [result, ...]}.

    A machine that is busy for a while slows all of them, not one.
    """
    for run in runs.values():
        run()
    results = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            results[name].append(run())
    return results


def spread(values):
    """Return the Spread of measured values: their median, the lowest and the highest."""
    return Spread(statistics.median(values), min(values), max(values))


# ---- the KV cache --------------------------------------------------------------------------------


def cache_without(config, removed):
    """Return an empty KV cache for the model of `config` that runs without `removed`, pairs (kind, layer).

    transformers asks layer 0, and the first layer with and the first without a sliding window, how many
    tokens are cached. A removed attention would answer 0 for ever, and everything after the prefill be
    wrong; here a kept attention's entry, of the same kind of window where there is one, answers for it.
    Raises ValueError where no attention is left: nothing would know the position of a token.
    """
    from transformers import DynamicCache

    layers = (cache := DynamicCache(config=config)).layers
    gone = {i for kind, i in removed if kind == "mha"}
    kept = [layer for i, layer in enumerate(layers) if i not in gone]
    if not any(hasattr(layer, "is_sliding") for layer in kept):
        raise ValueError(
            f"all {sum(hasattr(layer, 'is_sliding') for layer in layers)} attentions are removed: nothing "
            "is cached, not even a token's position"
        )
    for i in gone:
        alike = [layer for layer in kept if _kind(layer) == _kind(layers[i])]
        layers[i] = (alike or kept)[0]
    return cache


def _kind(layer):
    return getattr(layer, "is_sliding", type(layer))  # linear attentions and convolutions keep a state, no tokens


def cache_bytes(cache):
    """Return the bytes in the key and value tensors of a KV cache, a Cache of transformers or nested tuples."""
    if hasattr(cache, "layers"):
        layers = {id(layer): layer for layer in cache.layers}.values()  # one may answer for others
        tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    else:
        tensors = [t for layer in cache or () for t in layer]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def kv_per_token(model, new_cache=lambda: None, lengths=(2, 4)):
    """Return the bytes by which real cache tensors grow per token, between prompts of two lengths.

    new_cache: makes the empty cache of each run, None for the model's own. Both lengths should be on one side of a
    sliding window.
    """
    short, long = (generate(model, _some_ids(model, T), 1, new_cache()).cache_bytes for T in lengths)
    return (long - short) / (lengths[1] - lengths[0])


class Attention(NamedTuple):
    """One attention of a model. kv_bytes: of cache that a token adds; window: tokens it sees at most, None for all."""

    layer: int
    heads: int
    width: int
    kv_bytes: int
    window: int | None


def attentions(model):
    """Return the Attentions that are there: modules that know their layer and the width of their heads.

    kv_bytes is counted: key-value heads x head width x 2 x bytes of the model's dtype. A model may cache more than
    that: Falcon's new architecture repeats its key-value heads for every head. No weights are needed.
    """
    config, found = model.config.get_text_config(), []
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    for module in model.modules():
        width = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
        layer = getattr(module, "layer_idx", None)
        if width is None or layer is None:
            continue
        sliding = types[layer] == "sliding_attention" if types else window is not None
        kv_bytes = _kv_heads(module, config, width) * width * 2 * model.dtype.itemsize
        found.append(Attention(layer, config.num_attention_heads, width, kv_bytes, window if sliding else None))
    return found


def count_kv(model):
    """Return the KV of a model's `attentions`, None where none is found."""
    found = attentions(model)
    if not found:
        return None
    sliding = [attention for attention in found if attention.window is not None]
    window = sliding[0].window if sliding else None
    return KV(sum(a.kv_bytes for a in found), sum(a.kv_bytes for a in sliding), window)


def _kv_heads(module, config, width):
    """Return the key-value heads of an attention: from its projection, its own attributes, or the configuration."""
    if hasattr(module, "k_proj"):
        return module.k_proj.weight.shape[0] // width
    for owner in (module, config):
        for name in ("num_kv_heads", "num_key_value_heads"):
            if getattr(owner, name, None):
                return getattr(owner, name)
    return config.num_attention_heads


# ---- memory --------------------------------------------------------------------------------------


def weight_bytes(model):
    """Return the bytes of a model's parameters, tied ones counted once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def peak_memory(run, device):
    """Return bytes that run() adds at its peak: on CUDA the allocator's, else the resident set (Linux, else NaN)."""
    gc.collect()
    if str(device).startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    status = Path("/proc/self/status")
    if not status.exists():
        run()
        return math.nan
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc: what was freed before is no longer resident
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
    before = _status(status, "VmRSS")
    run()
    return _status(status, "VmHWM") - before


def _status(path, key):
    return next(int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith(key))


# ---- the machine ---------------------------------------------------------------------------------


def synchronize(device):
    """Wait until the device has done what it was given."""
    if str(device).startswith("cuda"):
        torch.cuda.synchronize(device)


def device_name(device):
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {os.cpu_count()} cores"


def _now(device):
    synchronize(device)
    return time.perf_counter()


def _some_ids(model, T):
    return torch.arange(T, device=model.get_input_embeddings().weight.device).unsqueeze(0)
