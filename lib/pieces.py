"""A long text -> token ids in pieces, the same ids as of the whole.

Tokenizing 10 MB at once takes a gigabyte and, where a tokenizer does not split words, more than linear time. A text may
be cut in front of a single space between two letters where the tokenizer is a BPE whose vocabulary has no token that
reaches over such a place: then no merge can cross it, and both sides are merged on their own. That what splits words
before the merges does the same on both sides is tried at each cut. A word stands in front of every later piece, for
what a tokenizer does at the start of a text, and its tokens are taken off again.
"""

import json
import re
from itertools import islice

PIECE = 100_000  # characters; a text of up to twice as many is tokenized whole
AROUND = 200  # characters on each side of a cut that are compared
TRIES = 100  # places that are tried for a cut
HEAD = "word"
CUT = re.compile(r"[a-z](?= [a-z])")


def tokenize(text, tokenizer, special=True, piece=None, progress=None):
    """Yield lists of token ids that together are tokenizer(text)["input_ids"]; special: with special tokens."""
    piece = piece or PIECE
    if len(text) <= 2 * piece or not divisible(tokenizer, text):
        yield tokenizer(text)["input_ids"] if special else tokenizer(text, add_special_tokens=False)["input_ids"]
        if progress:
            progress(len(text))
        return
    head = _plain(tokenizer, HEAD)
    around = tokenizer(HEAD)["input_ids"] if special else head
    at = next(i for i in range(len(around)) if around[i : i + len(head)] == head)
    yield around[:at]
    start = 0
    while start < len(text):
        end = len(text) if len(text) - start <= 2 * piece else _cut(tokenizer, text, start + piece)
        ids = _plain(tokenizer, HEAD * bool(start) + text[start:end])
        yield ids[len(head) :] if start else ids
        if progress:
            progress(end - start)
        start = end
    yield around[at + len(head) :]


def divisible(tokenizer, text):
    """Whether a tokenizer gives a text's pieces the same ids as the whole, as far as can be proven."""
    if not getattr(tokenizer, "is_fast", False):
        return False
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    if parts["model"]["type"] != "BPE" or parts.get("truncation") or parts["model"].get("dropout"):
        return False
    over = re.compile("[a-z][ \u2581\u0120]")  # a space as it is, as SentencePiece and as byte-level BPE write it
    if any(over.search(token) for token in parts["model"]["vocab"]):
        return False
    for token in parts["added_tokens"]:  # found before anything else; those that take spaces along move the boundary
        content = token["content"]
        if content in text and (" " in content or token["lstrip"] or token["rstrip"] or token["single_word"]):
            return False
    head = _plain(tokenizer, HEAD)
    return bool(head) and _plain(tokenizer, f"{HEAD} word")[: len(head)] == head


def _cut(tokenizer, text, start):
    """Return the next place from `start` where a text may be cut, its end where there is none.

    There the words around it have the ids that they have on their own.
    """
    head = len(_plain(tokenizer, HEAD))
    for found in islice(CUT.finditer(text, start), TRIES):
        end = found.end()
        left, right = text[max(0, end - AROUND) : end], text[end : end + AROUND]
        if _plain(tokenizer, left + right) == _plain(tokenizer, left) + _plain(tokenizer, HEAD + right)[head:]:
            return end
    return len(text)


def _plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]
