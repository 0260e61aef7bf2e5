"""The door of the exports: write a pruned model as a checkpoint that other people's runtimes load.

The kept blocks are a sequence of attention and MLP steps. An attention directly followed by an MLP is an ordinary
decoder layer, even when the two come from different layers of the source (lib.export.layers); where no step is left
over, the result is a plain checkpoint with fewer layers (format "stock"), else one that brings a small modeling file
along ("hf"). A format is a file of this folder and a row of FORMATS.

    export("models/Llama-2-7b-hf", order[:10], "pruned", meta=meta)
"""

from lib.edits import Edit
from lib.export.checkpoint import Source
from lib.export.decilm import as_decilm
from lib.export.folder import base_name, card, check_target, complete_or_nothing, copy_small_files, pruned_before
from lib.export.gguf import as_gguf
from lib.export.hf import anchored, as_hf
from lib.export.stock import as_stock, stock_config
from lib.export.zeroed import as_zeroed
from lib.orders import check_order

# A format is a function (source, removed, info) that writes nothing and returns (write, how to load it): write(folder)
# writes weights and configuration, the other is Markdown for the model card. It raises ValueError, naming the nearest
# format, for a model that cannot have it. info: goes into the configuration as pruning_info; decilm adds to it.
FORMATS = {"stock": as_stock, "hf": as_hf, "decilm": as_decilm, "gguf": as_gguf, "zeroed": as_zeroed}
SEARCH_KEYS = (  # what of an order's meta goes into the export
    "block_type",
    "dataset",
    "source",
    "split",
    "seed",
    "documents",
    "windows",
    "seqlen",
    "tokens",
    "text_sha256",
    "dtype",
    "engine",
    "approximate",
    "metric",
    "protect_first",
    "protect_last",
    "window",
)


def export(
    path,
    edit,
    folder,
    format="auto",
    compute_dtype=None,
    *,
    overwrite=False,
    trust_remote_code=False,
    meta=(),
    versions=(),
    evaluated=None,
):
    """Write the model at `path`, changed by `edit`, to `folder`; return what was written, as a dict.

    path, compute_dtype, trust_remote_code: as in lib.export.checkpoint.Source. edit: an Edit, or just the blocks that
    are removed, in the order of their removal. format: "auto" or a key of FORMATS. meta: the order file's; versions,
    evaluated: dicts for the configuration's pruning_info. Everything is written beside `folder` and renamed when
    complete.
    Raises ValueError, one line, for everything a user can mend; then nothing is left behind.
    """
    check_target(folder, path, overwrite)
    edit = edit if isinstance(edit, Edit) else Edit(tuple(edit))
    source, removed = Source(path, compute_dtype, trust_remote_code, edit), edit.removed
    check_order(removed, source.n_layers, "the order")
    format = choose(source, removed) if format == "auto" else format
    if edit.matrices and format != "hf":
        raise ValueError(f"format {format}: holds no matrices on the stream, which this edit adds; use format hf")
    if format == "gguf" and source.gguf and compute_dtype:
        raise ValueError(
            f"compute dtype {compute_dtype}: format gguf copies a .gguf file's weights as they are; ask for none"
        )
    total, kept = source.parameters()
    info = {
        "base_model": base_name(source),
        "format": format,
        "removed": [str(block) for block in removed],
        "parameters": kept,
        "dense_parameters": total,
        "removed_percent": 100 * (1 - kept / total),
        **perplexities(removed, meta),
        "search": {k: dict(meta)[k] for k in SEARCH_KEYS if k in dict(meta)},
        "evaluated": evaluated,
        "versions": dict(versions),
    }
    if edit.about:
        info["edit"] = dict(edit.about)
    if before := pruned_before(source):
        info["pruned_before"] = before
    write, how_to_load = FORMATS[format](source, removed, info)
    text = card(source, info, how_to_load)
    with complete_or_nothing(folder) as temporary:
        check_target(folder, path, overwrite)  # again: another run may have been faster
        copy_small_files(source, temporary, format)
        (temporary / "README.md").write_text(text, encoding="utf-8")
        write(temporary)  # last: the rest, where it can fail, fails in seconds
        size = sum(file.stat().st_size for file in temporary.iterdir())
    return {"export": str(folder), **info, "bytes": size}


def choose(source, removed):
    """Return the format of "auto": "stock" where the model can have it, else "hf"; raise ValueError for neither."""
    try:
        if source.edit.matrices:
            raise ValueError("only hf holds them")
        stock_config(source, removed)
    except ValueError:
        anchored(source, removed)
        return "hf"
    return "stock"


def perplexities(removed, meta):
    """Return the order's perplexities, dense and after these removals; None where the order does not know them."""
    steps = dict(meta).get("steps")
    step = steps[len(removed) - 1] if removed and isinstance(steps, list) and len(steps) >= len(removed) else {}
    step = step if isinstance(step, dict) else {}
    dense = dict(meta).get("dense_perplexity")
    return {"dense_perplexity": dense, "perplexity": step.get("perplexity") if removed else dense}
