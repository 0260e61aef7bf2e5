"""Losses of single tokens from logits, in float32 or better, with no float32 copy of all logits."""

import torch

CACHED_LOGITS = 2**18  # logits that the losses are taken from at once on a CPU: 1 MiB, half of a core's cache


def divergence(logits, others):
    """Return KL(p || q) of each row (n,), p and q the softmax of logits and others (n, V); float32 or better."""
    logits, others = (x if x.dtype == torch.float64 else x.float() for x in (logits, others))
    p, q = logits.log_softmax(-1), others.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def top_logs(logits, k):
    """Return (log-probabilities (n, k), tokens (n, k)) of the k, or V, most likely tokens of logits (n, V)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    values, tokens = logits.topk(min(k, logits.shape[1]))
    return values - logits.logsumexp(-1, keepdim=True), tokens


def top_divergence(logs, tokens, others):
    """Return KL(p || q) of each row (n,), the tokens that are not among the most likely counted as one; others (n, V).

    logs, tokens: p's, as `top_logs` gives them; q is the softmax of others. Never above the `divergence` of all tokens.
    """
    others = others if others.dtype == torch.float64 else others.float()
    q = others.gather(-1, tokens) - others.logsumexp(-1, keepdim=True)
    p = logs.to(q.dtype)
    rest, other = ((1 - x.exp().sum(-1)).clamp(min=torch.finfo(q.dtype).tiny) for x in (p, q))
    return (p.exp() * (p - q)).sum(-1) + rest * (rest / other).log()


def cross_entropy(logits, targets):
    """Return token losses (n,), computed in float32 or better from logits (n, V) of any float dtype.

    On a CPU a few rows at a time: logsumexp reads its input three times and makes a copy, which stay in
    the cache then. A float32 copy of all logits is never made.
    """
    targets = targets.to(logits.device).unsqueeze(-1)
    rows = len(logits) if logits.is_cuda else max(1, CACHED_LOGITS // logits.shape[1])
    losses = []
    for some, target in zip(logits.split(rows), targets.split(rows), strict=True):
        some = some if some.dtype == torch.float64 else some.float()
        losses.append(some.logsumexp(-1) - some.gather(-1, target).squeeze(-1))
    return torch.cat(losses)
