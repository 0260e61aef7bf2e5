"""The losses of the removal that is being searched, kept line by line: a search that is stopped goes on within it.

Beside an order file lies ORDER.journal while its search runs: a line that says which removals were made, then one JSON
line for each batch and candidate as soon as it is computed. A last line that was cut short is ignored, a line that does
not have its checksum ends the file. Once the removal is in the order file the journal begins anew, and it is gone when
the search is done.

    engine = Kept(Cached(...), Journal("ppls/order.json", "what decides the losses"), tokens=False)
"""

import base64
import contextlib
import json
import zlib
from pathlib import Path

import torch

from lib.blocks import UNITS, Block
from lib.files import read_bytes, strict

SCHEMA = 1


class Kept:
    """An engine that computes nothing that its journal holds, and keeps there what it computes.

    tokens: whether each token's loss is kept, as a race needs; else each window's sum, of which every score is made.
    check: called after each answer is kept; it may raise to end the search.
    """

    def __init__(self, engine, journal, tokens, check=None):
        self.engine, self.journal, self.tokens, self.check = engine, journal, tokens, check or (lambda: None)
        self.decoder, self.windows, self.batches, self.score = (
            engine.decoder,
            engine.windows,
            engine.batches,
            engine.score,
        )

    def losses(self, wanted, removed):
        """Yield as the engine does, what is known first."""
        known = self.journal.known(removed, self.tokens)
        rest = {}
        for k, units in wanted.items():
            for unit in units:
                if (k, unit) in known:
                    yield k, unit, known.pop((k, unit))
                else:
                    rest.setdefault(k, []).append(unit)
        for k, unit, losses in self.engine.losses(rest, removed) if rest else ():
            packed = pack(losses, self.tokens)
            self.journal.add(k, unit, packed)
            self.check()
            yield k, unit, unpack(packed)

    def base(self, removed):
        """Return as the engine does; computed anew."""
        return self.engine.base(removed)


class Journal:
    """The file beside the order file at `path`. deciding: a string that tells searches apart, whose losses differ.

    rank: of several processes each writes a file of its own; each reads those of all. Where nothing can be written the
    search goes on without a journal.
    """

    def __init__(self, path, deciding, rank=0):
        self.order, self.deciding, self.rank = Path(path), deciding, rank
        self._current, self._known, self._file = None, {}, None

    @property
    def path(self):
        return self.order.with_name(f"{self.order.name}.journal{f'.{self.rank}' if self.rank else ''}")

    def known(self, removed, tokens):
        """Return {(batch, unit): losses} of the search of the next removal after `removed`, in order."""
        head = self._head(removed, tokens)
        if head != self._current:
            self._known, self._current = {}, head
            self.close()
            for path in files_of(self.order):
                found, entries, end = read_journal(path)
                same = found == head
                if same:
                    self._known |= {key: unpack(packed) for key, packed in entries}
                if path == self.path and same:
                    self._open("r+b", end)
            if self._file is None:
                self._open("wb", 0)
                self._write(head)
        return self._known

    def count(self, removed, tokens):
        """Return how many answers are kept for the removal after `removed`; writes nothing."""
        head, found = self._head(removed, tokens), set()
        for path in files_of(self.order):
            there, entries, _ = read_journal(path)
            found |= {key for key, _ in entries} if there == head else set()
        return len(found)

    def _head(self, removed, tokens):
        removed = [str(unit) for unit in removed]
        return {"kind": "journal", "schema": SCHEMA, "search": self.deciding, "removed": removed, "tokens": tokens}

    def add(self, batch, unit, packed):
        """Keep one answer, as `pack` gives it."""
        self._write({"batch": batch, "unit": list(unit), **packed})

    def close(self):
        if self._file:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None

    def remove(self):
        """Delete the files of all processes."""
        self.close()
        self._current = None
        for path in files_of(self.order):
            path.unlink(missing_ok=True)

    def _open(self, mode, end):
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, mode)
            self._file.truncate(end)
            self._file.seek(end)

    def _write(self, line):
        if self._file:
            try:
                self._file.write(seal(line))
                self._file.flush()
            except OSError:  # a full disk: the order file will say so
                self.close()


def files_of(order):
    """Return the journals beside an order file, one for each process of the run that wrote them."""
    name = f"{order.name}.journal"
    return sorted(p for p in order.parent.glob("*.journal*") if p.name == name or p.name.startswith(f"{name}."))


def read_journal(path):
    """Return (its first line or None, [((batch, unit), packed losses)], where what is whole ends in bytes)."""
    head, entries, end = None, [], 0
    with contextlib.suppress(OSError, ValueError):
        for line in read_bytes(path).splitlines(keepends=True):
            value = opened(line)
            if value is None:
                break
            if head is None:
                head = value
            else:
                kind, layer = value["unit"]
                entries.append(((value["batch"], Block(kind, layer)), value))
            end += len(line)
    return head, entries, end


def seal(line):
    """Return a line of bytes: JSON with the CRC-32 of what it says."""
    text = json.dumps(strict(line), sort_keys=True)
    return f'{{"crc": {zlib.crc32(text.encode())}, "line": {text}}}\n'.encode()


def opened(line):
    """Return what a line says, None where it is cut short or changed."""
    try:
        value = json.loads(line)
        if not line.endswith(b"\n") or seal(value["line"]) != line:
            return None
        value = value["line"]
        if "unit" in value:
            kind, layer = value["unit"]
            unpack(value)
            assert kind in UNITS and isinstance(layer, int) and isinstance(value["batch"], int)
        return value
    except (ValueError, TypeError, KeyError, RecursionError, RuntimeError, AssertionError):
        return None


def pack(losses, tokens):
    """Return token losses (B, n) as JSON: all of them, or the sum of each window in float64."""
    if tokens:
        data = base64.b85encode(losses.contiguous().numpy().tobytes()).decode()
        return {"shape": list(losses.shape), "dtype": str(losses.dtype).removeprefix("torch."), "losses": data}
    return {"shape": list(losses.shape), "sums": losses.double().sum(1).tolist()}


def unpack(packed):
    """Return losses (B, n) whose sums over n are those of what was packed, bit for bit, and with tokens themselves."""
    B, n = packed["shape"]
    if "sums" in packed:
        losses = torch.zeros(B, n, dtype=torch.float64)
        losses[:, 0] = torch.tensor([float(x) for x in packed["sums"]], dtype=torch.float64)
        return losses
    data = bytearray(base64.b85decode(packed["losses"]))
    return torch.frombuffer(data, dtype=getattr(torch, packed["dtype"])).view(B, n)
