"""Write a pruned model as a checkpoint that other people's runtimes load.

The kept blocks are a sequence of attention and MLP steps. An attention directly followed by an MLP is an
ordinary decoder layer, even when the two come from different layers of the source (`repack`); where no
step is left over, the result is a plain checkpoint with fewer layers (format "stock"), else one that
brings a small modeling file along ("hf"). "zeroed" keeps every layer and zeroes what was removed.

    export("models/Llama-2-7b-hf", order[:10], "pruned", meta=meta)
"""

import copy
import shutil
from pathlib import Path

import torch

from lib.decoder import block_parameters
from lib.export import modeling_blockpruned as modeling
from lib.export.checkpoint import Entry, Source, verify, write_shards
from lib.export.decilm import as_decilm
from lib.export.folder import base_name, card, check_target, complete_or_nothing, copy_small_files, pruned_before
from lib.export.gguf import as_gguf
from lib.export.layers import Layer, repack
from lib.model import parameter_count, readable
from lib.orders import check_order

# Fields of a configuration that hold one value for each layer, and the branch that they describe.
PER_LAYER = {"layer_types": "mha", "no_rope_layers": "mha", "mlp_layer_types": "mlp"}
# Fields that say the same as such a list, for readers that know no list: layer p, 2p, 3p, ... is of this kind.
PATTERNS = {
    "sliding_window_pattern": ("layer_types", "full_attention"),
    "_sliding_window_pattern": ("layer_types", "full_attention"),
    "no_rope_layer_interval": ("no_rope_layers", 0),
}
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
    removed,
    folder,
    format="auto",
    compute_dtype=None,
    overwrite=False,
    trust_remote_code=False,
    meta=(),
    versions=(),
    evaluated=None,
):
    """Write the model at `path` without the blocks `removed` to `folder`; return what was written, as a dict.

    path, compute_dtype, trust_remote_code: as in lib.checkpoint.Source. removed: blocks in the order of their
    removal. format: "auto" or a key of FORMATS. meta: the order file's; versions, evaluated: dicts for
    the configuration's pruning_info. Everything is written beside `folder` and renamed when complete.
    Raises ValueError, one line, for everything a user can mend; then nothing is left behind.
    """
    check_target(folder, path, overwrite)
    source = Source(path, compute_dtype, trust_remote_code)
    check_order(removed, source.n_layers, "the order")
    format = choose(source, removed) if format == "auto" else format
    if format == "gguf" and source.gguf and compute_dtype:
        raise ValueError(f"--compute-dtype {compute_dtype}: --format gguf copies a .gguf file's weights; leave it out")
    total = parameter_count(source.bare)
    kept = total - block_parameters(source.layers, removed)
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
    if before := pruned_before(source):
        info["pruned_before"] = before
    write, how_to_load = FORMATS[format](source, removed, info)
    text = card(source, info, how_to_load)
    with complete_or_nothing(folder) as temporary:
        copy_small_files(source, temporary, format)
        (temporary / "README.md").write_text(text, encoding="utf-8")
        write(temporary)  # last: the rest, where it can fail, fails in seconds
        size = sum(file.stat().st_size for file in temporary.iterdir())
    return {"export": str(folder), **info, "bytes": size}


def choose(source, removed):
    """Return the format of "auto": "stock" where the model can have it, else "hf"; raise ValueError for neither."""
    try:
        stock_config(source, removed)
    except ValueError:
        anchored(source, removed)
        return "hf"
    return "stock"


# ---- formats -------------------------------------------------------------------------------------------------


def as_stock(source, removed, info):
    """The original class with fewer layers. Refused where a layer would be incomplete, or changes with its place."""
    config, layers = stock_config(source, removed)
    config.pruning_info = info | {"source_blocks": [str(layer) for layer in layers]}
    entries = source.relabelled({block: k for k, layer in enumerate(layers) for block in layer.blocks()})
    verify(type(source.bare), config, entries)

    def write(folder):
        write_shards(folder, entries)
        _save_config(source, config, folder)

    return write, _python("PATH")


def as_hf(source, removed, info):
    """A checkpoint with its own modeling file: one layer for each attention, MLPs chained to it."""
    chains = anchored(source, removed)
    family = type(source.config).__name__, type(source.bare.base_model).__name__, type(source.bare).__name__
    names = [modeling.PREFIX + name for name in family]
    config_class, _, model_class = (getattr(modeling, name) for name in names)
    anchors = [next(layer.mha for layer in chain if layer.mha is not None) for chain in chains]
    changed = reindexed(source.config, source.n_layers, [Layer(i, i) for i in anchors])
    values = source.config.to_dict()
    fields = {field: values[field] for field in changed}
    row = {key: list(names) for key, names in source.family._asdict().items()}
    auto = dict(zip(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), names, strict=True))
    config = config_class.from_dict(
        values
        | changed
        | {
            "model_type": config_class.model_type,
            "architectures": [names[-1]],
            "auto_map": {key: f"{Path(modeling.__file__).stem}.{name}" for key, name in auto.items()},
            "source_blocks": [", ".join(map(str, chain)) for chain in chains],
            "source_fields": fields,
            "block_modules": {"layer": type(source.layers[0]).__name__, **row},
            "pruning_info": info,
        }
    )
    labels = {}
    for k, chain in enumerate(chains):
        for j, layer in enumerate(chain):
            label = str(k) if len(chain) == 1 else f"{k}.steps.{j}"
            labels |= dict.fromkeys(layer.blocks(), label)
    entries = source.relabelled(labels)
    verify(model_class, config, entries)

    def write(folder):
        write_shards(folder, entries)
        shutil.copyfile(modeling.__file__, folder / Path(modeling.__file__).name)
        _save_config(source, config, folder)

    return write, _python("PATH, trust_remote_code=True") + (
        f"\n\nThe code is `{Path(modeling.__file__).name}` beside the weights; it builds on the classes of "
        "transformers 5. A program that does not run it refuses the model type.\n"
    )


def as_zeroed(source, removed, info):
    """The model at its full size, the removed blocks' weights zero: loads everywhere and saves nothing."""
    config, gone = copy.deepcopy(source.config), {tuple(block) for block in removed}
    on_stream = getattr(config, "apply_residual_connection_post_layernorm", False)
    if on_stream or not getattr(config, "do_layer_norm_before", True):
        raise ValueError(
            f"--format zeroed: {type(source.layers[0]).__name__} normalises the residual stream itself in this model, "
            "so that a block with zero weights still changes it; the nearest format is hf"
        )
    config.pruning_info = info
    outputs = set()  # the last module of a branch writes to the stream; files may have names that memory has not
    for names in (source.family.mha, source.family.mlp):
        there = [name for name in names if getattr(source.layers[0], name, None) is not None]
        outputs |= set(names) - set(there[:-1])
    entries = []
    for name in source.names():
        entry, place = source.entry(name), source.place(name)
        if place and entry.dtype.is_floating_point and place.rest.split(".")[0] in outputs:  # no masks
            if all((kind, place.layer) in gone for kind in place.kinds):
                entry = Entry(name, entry.shape, entry.dtype, _zeros(entry))
        entries.append(entry)
    verify(type(source.bare), config, entries)

    def write(folder):
        write_shards(folder, entries)
        _save_config(source, config, folder)

    return write, _python("PATH") + (
        "\n\nThe removed blocks are there, with weights of zero: this checkpoint is as large and as slow as its base.\n"
    )


# A format is a function (source, removed, info) that writes nothing and returns (write, how to load it): write(folder)
# writes weights and configuration, the other is Markdown for the model card. It raises ValueError, naming the nearest
# format, for a model that cannot have it. info: goes into the configuration as pruning_info; decilm adds to it.
FORMATS = {"stock": as_stock, "hf": as_hf, "decilm": as_decilm, "gguf": as_gguf, "zeroed": as_zeroed}


def stock_config(source, removed):
    """Return (configuration, layers) of format stock; raise ValueError where there is none."""
    layers = repack(source.n_layers, removed, mix=not source.parallel)
    short = [layer for layer in layers if None in layer]
    if short or not layers:
        reason, nearest = "no layer is left", "zeroed"
        if short:
            reason, nearest = f"{short[0]} is left without its other half", "hf"
        raise ValueError(
            f"--format stock: {reason}, and {type(source.bare).__name__} has whole layers only; "
            f"the nearest format is {nearest}"
        )
    config = copy.deepcopy(source.config)
    for field, value in reindexed(source.config, source.n_layers, layers).items():
        setattr(config, field, value)
    with readable(source.path, "configuration"), torch.device("meta"):
        bare = type(source.bare)(type(config).from_dict(config.to_dict()))
    moved = _find(bare, type(source.layers[0]))
    for k, layer in enumerate(layers):
        for kind, i in layer.blocks():
            differ = _difference(source, kind, source.layers[i], moved[k])
            if differ:
                raise ValueError(
                    f"--format stock: in {type(source.bare).__name__} the {differ} of {kind}{i} depends on the layer's "
                    f"number and would change as layer {k}; the nearest format is hf"
                )
    return config, layers


def reindexed(config, n, layers):
    """Return {field: value} of a configuration of n layers that change when `layers`, all whole, are its layers."""
    values = config.to_dict()
    changed = {config.attribute_map.get("num_hidden_layers", "num_hidden_layers"): len(layers)}
    for field, value in values.items():
        branch = PER_LAYER.get(field, "mha" if "layer" in field else None)
        if field == "mlp_only_layers" or not isinstance(value, (list, tuple)):
            continue
        if branch and len(value) == n:
            changed[field] = [value[getattr(layer, branch)] for layer in layers]
    for field, (listed, kind) in PATTERNS.items():
        if values.get(field) and listed in changed:
            every = [value == kind for value in changed[listed]]
            fits = (
                p
                for p in (values[field], *range(2, len(layers) + 2))
                if every == [(k + 1) % p == 0 for k in range(len(layers))]
            )
            changed[field] = next(fits, 0)  # no pattern: a reader that needs one must not find the old one
    if "mlp_only_layers" in values:  # layers without experts, which are also those between the steps
        step, dense = values.get("decoder_sparse_step") or 1, values["mlp_only_layers"] or []
        dense = {i for i in range(n) if i in dense or (i + 1) % step}
        changed |= {"mlp_only_layers": [k for k, layer in enumerate(layers) if layer.mlp in dense]}
        if step != 1:
            changed["decoder_sparse_step"] = 1
    if values.get("first_k_dense_replace") is not None:  # layers without experts at the bottom
        changed["first_k_dense_replace"] = sum(layer.mlp < values["first_k_dense_replace"] for layer in layers)
    if "max_window_layers" in values:  # layers before the first that slides
        changed["max_window_layers"] = sum(layer.mha < values["max_window_layers"] for layer in layers)
    return changed


def anchored(source, removed):
    """Return the kept blocks as chains of Layers, each with exactly one attention; refuse what has none."""
    name = type(source.bare).__name__
    if not source.native:
        raise ValueError(
            f"--format hf: {name} is code of the checkpoint's own, and hf builds on transformers' classes; the nearest "
            "format is stock where whole layers are left, else zeroed"
        )
    chains = []
    for layer in repack(source.n_layers, removed, mix=not source.parallel):
        if chains and (layer.mha is None or all(other.mha is None for other in chains[-1])):
            chains[-1].append(layer)
        else:
            chains.append([layer])
    attentions = [layer.mha for chain in chains for layer in chain if layer.mha is not None]
    if all(any(hasattr(source.layers[i], name) for name in modeling.BARE) for i in attentions):
        raise ValueError(
            f"--format hf: no attention of {name} is left, and the cache needs one; the nearest format is zeroed"
        )
    return chains


def perplexities(removed, meta):
    """Return the order's perplexities, dense and after these removals; None where the order does not know them."""
    steps = dict(meta).get("steps")
    step = steps[len(removed) - 1] if removed and isinstance(steps, list) and len(steps) >= len(removed) else {}
    step = step if isinstance(step, dict) else {}
    dense = dict(meta).get("dense_perplexity")
    return {"dense_perplexity": dense, "perplexity": step.get("perplexity") if removed else dense}


def _python(arguments):
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({arguments})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({arguments})\n```"
    )


def _save_config(source, config, folder):
    if source.dtype:
        config.dtype = source.dtype
    config.save_pretrained(folder)


def _zeros(entry):
    return lambda: torch.zeros(entry.shape, dtype=entry.dtype)


# ---- does a layer stay what it was? --------------------------------------------------------------------------


def _find(model, kind):
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) and isinstance(m[0], kind))


def _difference(source, kind, before, after):
    """Return the name of what differs in one branch of two layers of the same family, None where nothing does."""
    pairs = [("", before, after)] if kind == "mha" else []  # a layer's own attributes are its attention's
    for name in (*getattr(source.family, kind), *getattr(source.family, f"{kind}_norms")):
        if getattr(before, name, None) is not None:
            there = dict(getattr(after, name).named_modules())
            pairs += [(f"{name}.{n}", m, there.get(n)) for n, m in getattr(before, name).named_modules()]
    for name, one, other in pairs:
        if _settings(one) != _settings(other):
            return name.strip(".") or "kind"
    return None


def _settings(module):
    """Return what is known of a module itself: class, plain attributes, shapes of its parameters."""
    if module is None:
        return None
    plain = {
        key: value
        for key, value in vars(module).items()
        if key not in ("layer_idx", "training") and isinstance(value, (int, float, str, bool, tuple, type(None)))
    }
    return type(module), plain, {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
