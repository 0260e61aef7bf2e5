"""The order file: its name, reading, checking, and writing it so that nothing is ever lost.

{"1": [["mha", 25]], "2": [["mha", 25], ["mha", 27]], ..., "meta": {...}}: entry k is the SET of the
first k removals sorted by layer, as the paper's scripts write it; the order is the difference between
consecutive entries. Everything else that this project knows lives under "meta". No torch in this file: results are
read, and drawn, where it is not installed.

Where a set was made from an order by exchanges, meta.nested is false: the last entry is that set, the entries before it
are of the greedy order as far as they are smaller, and meta.order holds that order.
"""

import math
from pathlib import Path
from reprlib import repr as brief

from lib.blocks import KINDS, MOST_LAYERS, Block
from lib.files import expand, read_json
from lib.hub import model_name
from lib.records import short_name
from lib.schema import opened, write


def order_path(folder, model_path, block_type, dataset, nsamples, metric="ppl"):
    """Return the reference's file name: <model>_<type>_<dataset>_ns_<n>_del_order_list.json.

    Of another metric than the reference's the name follows the type: <model>_<type>_<metric>_<dataset>_...
    """
    name = Path(model_name(model_path)).name
    model = Path(name).stem if name.lower().endswith(".gguf") else name
    data = short_name(dataset)
    block_type = block_type if metric == "ppl" else f"{block_type}_{metric}"
    return expand(folder) / f"{model}_{block_type}_{data}_ns_{nsamples}_del_order_list.json"


def read_order(path):
    """Return (list of Block in removal order, meta dict) of an order file, ours or the reference's.

    Where sets are not nested, the list is the last set, by depth; `first` knows the smaller ones. Raises ValueError,
    one line, where the file is not one.
    """
    try:
        entries = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such order file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON order file ({error}); search again to write a new one") from None
    if not isinstance(entries, dict):
        raise ValueError(f'{path}: not an order file: expected {{"1": [["mha", 25]], ...}}')
    meta = entries.pop("meta", {})
    if not isinstance(meta, dict):
        raise ValueError(f'{path}: "meta" holds {brief(meta)}; expected {{...}}, or no "meta" at all')
    if meta.get("nested") is False:
        return _read_set(path, entries, meta), opened(path, {**entries, "meta": meta}, "order")["meta"]
    order = []
    for k in range(1, len(entries) + 1):
        if str(k) not in entries:
            raise ValueError(f'{path}: {len(entries)} entries but no "{k}"; they must be numbered from 1')
        blocks = _parse(path, k, entries[str(k)])
        new = blocks - set(order)
        if len(new) != 1 or len(blocks) != k or len(entries[str(k)]) != k:
            raise ValueError(f'{path}: entry "{k}" must add exactly one block to entry "{k - 1}"')
        order += new
    if not order and not meta:
        raise ValueError(f"{path}: holds no removals")
    return order, opened(path, {**entries, "meta": meta}, "order")["meta"]


def first(order, meta, number, path="the order"):
    """Return the blocks that are gone after `number` removals; order, meta: as `read_order` returns them.

    Raises ValueError where sets are not nested and the file holds none of that size.
    """
    if meta.get("nested") is not False or number in (0, len(order)):
        return order[:number]
    before = [Block(*block) for block in meta["order"]]
    if number > min(len(order) - 1, len(before)):
        raise ValueError(f"{path}: holds a set of {len(order)} removals and none of {number}; use {sizes(order, meta)}")
    return before[:number]


def fewest(order, meta, enough):
    """Return how many removals of a file reach what is asked for, None where none do; enough: as in lib.candidates.

    Where sets are not nested, that is a part of the greedy order only where less is asked for than it was made for.
    """
    if meta.get("nested") is False:
        before = [Block(*block) for block in meta["order"]]
        k = enough(before)
        if k is None or k >= min(len(before), len(order)):
            return None if enough(order) is None else len(order)
        return k
    return enough(order)


def sizes(order, meta):
    """Return in words how many removals an order file can replay."""
    before = min(len(order) - 1, len(meta["order"])) if meta.get("nested") is False else len(order)
    return f"0..{before} or {len(order)}" if before < len(order) - 1 else f"0..{len(order)}"


def passes_in(meta, path="the order"):
    """Return {(layer, kinds): factor} that removed blocks multiply the stream by, {} where they pass it as it is.

    Raises ValueError where what the file holds is none, or not a positive finite number.
    """
    held, passes = meta.get("passes", {}), {}
    for name, factor in held.items() if isinstance(held, dict) else [("", held)]:
        kinds, number = name.rstrip("0123456789"), isinstance(factor, (int, float)) and not isinstance(factor, bool)
        if kinds not in (*KINDS, "layer") or kinds == name or not number or not 0 < factor < math.inf:
            raise ValueError(
                f"{path}: its scale of {brief(name)} is {brief(factor)}; expected a number above 0; search again"
            )
        passes[int(name.removeprefix(kinds)), KINDS if kinds == "layer" else (kinds,)] = float(factor)
    return passes


def held_passes(passes):
    """Return passes as an order file holds them: by the name of a block, or of a layer for both its blocks."""
    return {f"{kinds[0] if len(kinds) == 1 else 'layer'}{i}": factor for (i, kinds), factor in passes.items()}


def check_order(order, n_layers, path, meta=()):
    """Raise ValueError unless every block of the order exists in a model of n_layers layers."""
    searched = dict(meta).get("layers", n_layers)
    if searched != n_layers:
        raise ValueError(f"{path}: made for a model of {brief(searched)} layers; this one has {n_layers}")
    for block in order:
        if block.layer >= n_layers:
            raise ValueError(
                f"{path}: {block.kind} {brief(block.layer)} does not exist in a model of {n_layers} layers "
                f"(0..{n_layers - 1}); give the order of this model"
            )


def save_order(path, order, meta, refined=None):
    """Write the order file, atomically; refined: the set that exchanges made of the order, where they were made."""
    sets = {k: order[:k] for k in range(1, len(order) + 1)}
    if refined is not None and set(refined) != set(order[: len(refined)]):
        sets = {k: some for k, some in sets.items() if k < len(refined)} | {len(refined): refined}
        meta = {**meta, "nested": False, "order": order}
    entries = {str(k): sorted(some, key=lambda b: (b.layer, b.kind)) for k, some in sets.items()}
    write(path, "order", {**entries, "meta": meta})


def _read_set(path, entries, meta):
    """Return the last entry of a file whose sets are not nested, by depth; raise ValueError where it is damaged."""
    try:
        sets = {int(k): _parse(path, k, entry) for k, entry in entries.items()}
        order = [Block(*block) for block in meta["order"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{path}: not nested, and damaged ({error}); it needs numbered sets and "order" in "meta"'
        ) from None
    n = max(sets, default=0)
    right = {k: set(order[:k]) for k in range(1, min(n - 1, len(order)) + 1)} | {n: sets.get(n)}
    if not n or len(sets[n]) != n or sets != right:
        raise ValueError(
            f'{path}: not nested, and damaged: entries before the last must be the first of "order" in "meta"'
        )
    return sorted(sets[n], key=lambda b: (b.layer, b.kind))


def _parse(path, k, entry):
    """Return one entry as a set of Blocks."""
    blocks = set()
    for item in entry if isinstance(entry, list) else [entry]:
        if not (isinstance(item, list) and len(item) == 2):
            raise ValueError(f'{path}: entry "{k}" holds {brief(item)}; expected a pair like ["mha", 25]')
        kind, layer = item
        if kind not in KINDS:
            raise ValueError(f'{path}: entry "{k}" has block type {brief(kind)}; allowed are {" and ".join(KINDS)}')
        if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
            raise ValueError(f'{path}: entry "{k}" has layer {brief(layer)}; allowed are whole numbers from 0')
        if layer >= MOST_LAYERS:
            raise ValueError(f'{path}: entry "{k}" has layer {brief(layer)}; no model has so many')
        blocks.add(Block(kind, layer))
    return blocks
