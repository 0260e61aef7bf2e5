"""Per-window losses of a stepped decoder, the perplexity of them, and the objectives that a search can minimise.

losses = window_losses(Decoder(model), windows, batch_size=8)    # (N,) float64
perplexity(losses, windows.shape[1])
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from lib.memory import DEVICE_SHARE, free_bytes


def window_losses(decoder, windows, batch_size, masked=()):
    """Return each window's sum of next-token losses, (N,) float64, with `masked` blocks off as well.

    windows: token ids (N, T). Sums are float64 of float32 token losses, in window order; every target
    token counts, also one that equals the padding token (windows are cut from unpadded text, so it is
    real text).
    """
    batches, sums, together = windows.split(batch_size), [], 1
    if decoder.offloaded:  # its weights move once for all batches that pass a layer together
        free, _ = free_bytes(decoder.input_device)
        state = decoder.embed(batches[0]).h.nbytes  # three a batch: the embedded one, before a layer, after it
        together = max(1, int(DEVICE_SHARE * free / (3 * state)))
    for k in range(0, len(batches), together):
        some = batches[k : k + together]
        states = last_states(decoder, [decoder.embed(ids) for ids in some], masked)
        sums += [decoder.token_losses(h, ids).double().sum(1) for h, ids in zip(states, some, strict=True)]
    return torch.cat(sums)


def last_states(decoder, streams, masked=()):
    """Return the states (B, T, H) of each stream after the last layer, before the final norm, `masked` blocks off.

    All streams pass a layer before the next layer, so that an offloaded one is moved once.
    """
    states = [stream.h for stream in streams]
    for i in range(decoder.n_layers):
        kinds = decoder.kinds(i, masked)
        with decoder.resident(i):
            states = [decoder.run(i, kinds, h, stream) for h, stream in zip(states, streams, strict=True)]
    return states


def perplexity(losses, seqlen):
    """Return exp of the mean over windows of their mean token loss, from the windows' loss sums (N,).

    Infinite where the mean is too large for a float, nan where a loss is.
    """
    mean = losses.sum().item() / (len(losses) * (seqlen - 1))
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


class Objective(NamedTuple):
    """What a search minimises, made for the batches of its windows.

    losses(index, h): the token losses (B, n), on the CPU, that states h (B, T, H) after the last layer
    give on batch `index`; score: the number of several such tensors, in window order; lower is better.
    """

    losses: Callable
    score: Callable


def next_token(decoder, batches):
    """Return the Objective of the paper: perplexity on batches, a list of token ids (B, T)."""

    def score(losses):
        sums = torch.cat([token_losses.double().sum(1) for token_losses in losses])
        return perplexity(sums, losses[0].shape[1] + 1)

    return Objective(lambda index, h: decoder.token_losses(h, batches[index]), score)


def dense_logits(decoder, batches, top=None):
    """Return the Objective of EvoPress: mean over tokens of KL(logits of the model as it is || masked logits).

    Of the model as it is the last states are kept, one (B, T, H) a batch, and its head is run again on each slice: its
    log-probabilities would not fit. top: keep those of its so many most likely tokens instead, and count all the others
    as one: half of the head's work, and a lower bound of the divergence.
    """
    dense = last_states(decoder, [decoder.embed(ids) for ids in batches])
    if top:
        dense = [decoder.top_logs(h, top) for h in dense]

    def score(losses):
        sums = torch.cat([token_losses.double().sum(1) for token_losses in losses])
        return sums.sum().item() / sum(token_losses.numel() for token_losses in losses)

    measure = decoder.top_divergences if top else decoder.divergences
    return Objective(lambda index, h: measure(h, dense[index]), score)


OBJECTIVES = {"ppl": next_token, "kl": dense_logits}


def paired_difference(losses, base, seqlen):
    """Return (mean, its standard error) over windows of the difference in mean token loss, in nats.

    losses, base: the windows' loss sums (N,) of two models on the same windows, in the same order. exp(mean) is the
    ratio of the perplexities. The error is None for a single window.
    """
    differences = (losses - base) / (seqlen - 1)
    N = len(differences)
    return differences.mean().item(), differences.std().item() / math.sqrt(N) if N > 1 else None
