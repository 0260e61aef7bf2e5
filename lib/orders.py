"""The order file: its name, reading, checking, and writing it so that nothing is ever lost.

{"1": [["mha", 25]], "2": [["mha", 25], ["mha", 27]], ..., "meta": {...}}: entry k is the SET of the
first k removals sorted by layer, as the paper's scripts write it; the order is the difference between
consecutive entries. Everything else that this project knows lives under "meta". No torch in this file: results are
read, and drawn, where it is not installed.
"""

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

    Raises ValueError, one line, where the file is not one.
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


def save_order(path, order, meta):
    """Write the order file, atomically."""
    entries = {}
    for k in range(1, len(order) + 1):
        entries[str(k)] = sorted(order[:k], key=lambda b: (b.layer, b.kind))
    write(path, "order", {**entries, "meta": meta})


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
