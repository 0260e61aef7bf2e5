"""Per-window losses of a stepped decoder, and the perplexity of them.

    losses = window_losses(Decoder(model), windows, batch_size=8)    # (N,) float64
    perplexity(losses, windows.shape[1])
"""
import math

import torch


def window_losses(decoder, windows, batch_size, masked=(), streams=None):
    """Return each window's sum of next-token losses, (N,) float64, with `masked` blocks off as well.

    windows: token ids (N, T); streams: decoder.embed of each batch of them, where the caller keeps
    those. Sums are float64 of float32 token losses, in window order; every target token counts,
    also one that equals the padding token (windows are cut from unpadded text, so it is real text).
    """
    sums = []
    for index, ids in enumerate(windows.split(batch_size)):
        stream = streams[index] if streams else decoder.embed(ids)
        h = stream.h
        for i in range(decoder.n_layers):
            h = decoder.run(i, decoder.kinds(i, masked), h, stream)
        sums.append(decoder.token_losses(h, ids).double().sum(1))
    return torch.cat(sums)


def perplexity(losses, seqlen):
    """Return exp of the mean over windows of their mean token loss, from the windows' loss sums (N,).

    Infinite where the mean is too large for a float, nan where a loss is.
    """
    mean = losses.sum().item() / (len(losses) * (seqlen - 1))
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
