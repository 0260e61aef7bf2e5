"""The text that recovery trains on, and the part of it that training never sees.

Whole documents are held out: of each data set the first ones that fill the watched windows, after the documents that
a search was calibrated on have been left out, as the table of methods does. A document that occurs in both parts is
left out of training, and a check on runs of tokens says whether anything is in both all the same.

    parts = [split("alpaca", corpus.documents, tokenizer, 512, 20, drawn)]
    windows = pack(parts, tokenizer, 512, seed=42)
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from lib.data import cut_windows
from lib.files import write_json

RUN = 64  # tokens: longer than a prompt template, shorter than a paragraph


class Part(NamedTuple):
    """A data set in two: documents to train on, and windows (M, T) cut from `held` other documents."""

    name: str
    documents: list
    watched: torch.Tensor
    held: int


def split(name, documents, tokenizer, seqlen, n_windows, left_out=()):
    """Return the Part of a data set whose first documents that fill n_windows windows are held out.

    left_out: documents that belong to neither part. Raises ValueError where nothing would be left to train on.
    """
    gone = {_key(d) for d in left_out}
    documents = [d for d in documents if _key(d) not in gone] if gone else list(documents)
    held = _filling(documents, tokenizer, n_windows * seqlen + 1)
    keys = {_key(d) for d in documents[:held]}
    rest = [d for d in documents[held:] if _key(d) not in keys]
    if not any(_key(d) for d in rest):
        tokens = len(tokenizer("\n\n".join(documents))["input_ids"])
        raise ValueError(
            f"{name}: its {tokens:,} tokens are too few to hold out {n_windows} windows of {seqlen} and train on the "
            "rest; give more text, or hold out fewer or shorter windows"
        )
    return Part(name, rest, first_windows(documents, tokenizer, seqlen, n_windows), held)


def first_windows(documents, tokenizer, seqlen, n_windows):
    """Return the first n_windows windows (M, T) of documents, fewer where the text is shorter."""
    held = _filling(documents, tokenizer, n_windows * seqlen + 1)
    return cut_windows(documents[:held], tokenizer, seqlen)[:n_windows]


def pack(parts, tokenizer, seqlen, seed, n_windows):
    """Return (n_windows training windows (N, T), how many the text has), all parts mixed in an order drawn by `seed`.

    A text that is too short is passed through again, each time in another order.
    """
    windows = torch.cat([cut_windows(part.documents, tokenizer, seqlen) for part in parts])
    generator = torch.Generator().manual_seed(seed)
    passes = -(-n_windows // len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(passes)])
    return windows[order[:n_windows]], len(windows)


def shared_runs(windows, watched, run=RUN):
    """Return how many runs of `run` tokens of the watched windows (M, T) are in the training windows (N, T) as well."""
    run = min(run, windows.shape[1])
    factors = torch.randint(1, 2**62, (run,), generator=torch.Generator().manual_seed(0))

    def hashes(rows):  # products wrap around at 64 bits: equal runs have equal sums, others hardly ever
        return [(row.unfold(0, run, 1) * factors).sum(1) for row in rows]

    seen = torch.cat(hashes(windows)).unique()
    own = torch.cat(hashes(watched))
    return int(torch.isin(own, seen).sum())


def write_own_text(model, tokenizer, n_documents, seqlen, *, seed, path, batch_size=8, progress=iter):
    """Return n_documents texts of at most seqlen tokens that the model writes by sampling, kept in the file `path`.

    Sampling at temperature 1 from the model's whole distribution, from its first token on: where a text's own data is
    not at hand, what the model would say is the nearest to what it was trained on.
    """
    if Path(path).exists():
        return json.loads(Path(path).read_text(encoding="utf-8"))
    config, device, documents = model.config, next(model.parameters()).device, []
    start = next((t for t in (config.bos_token_id, config.eos_token_id, 0) if isinstance(t, int)), 0)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for rows in progress(range(0, n_documents, batch_size)):
            first = torch.full((min(batch_size, n_documents - rows), 1), start, device=device)
            ids = model.generate(
                first,
                attention_mask=torch.ones_like(first),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=seqlen - 1,
                pad_token_id=start,
            )
            documents += tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True)
    write_json(path, documents)
    return documents


def _filling(documents, tokenizer, tokens):
    """Return how many of the first documents have so many tokens together; all where they have fewer."""
    low, high = 1, len(documents)
    while low < high:
        middle = (low + high) // 2
        if len(tokenizer("\n\n".join(documents[:middle]))["input_ids"]) >= tokens:
            high = middle
        else:
            low = middle + 1
    return low


def _key(document):
    return " ".join(document.split())
