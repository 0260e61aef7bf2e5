"""Per-window losses of a stepped decoder, and the perplexity of them.

    losses = window_losses(Decoder(model), windows, batch_size=8)    # (N,) float64
    perplexity(losses, windows.shape[1])
"""
import math

import torch


def window_losses(decoder, windows, batch_size, masked=()):
    """Return each window's sum of next-token losses, (N,) float64, with `masked` blocks off as well.

    windows: token ids (N, T). Sums are gathered in window order; every target token counts, also
    one that equals the padding token (windows are cut from unpadded text, so it is real text).
    """
    return torch.cat([_batch_losses(decoder, decoder.embed(ids), ids, masked) for ids in windows.split(batch_size)])


def _batch_losses(decoder, stream, ids, masked=()):
    h = stream.h
    for i in range(decoder.n_layers):
        h = decoder.run(i, decoder.kinds(i, masked), h, stream)
    return decoder.losses(h, ids)


def perplexity(losses, seqlen):
    """Return exp of the mean over windows of their mean token loss; inf or nan where a loss is."""
    mean = losses.sum().item() / (len(losses) * (seqlen - 1))
    return math.exp(mean) if mean < 709 else math.inf if not math.isnan(mean) else math.nan
