"""config.json of a pruned model: the source's own file, with what pruning changes.

Transformers raises where a list with a value for each layer is as long as the model was. What a list says of attention
goes with the attention, and the same holds for the MLP, since a layer of the pruned model may have each from another
layer. Everything else stays as the source spells it: what transformers 5 writes of it, other readers do not find.
"""

import copy
import json

# Fields of a configuration that hold one value for each layer, and the branch that they describe.
PER_LAYER = {"layer_types": "mha", "no_rope_layers": "mha", "mlp_layer_types": "mlp"}
# Fields that say the same as such a list, for readers that know no list: layer p, 2p, 3p, ... is of this kind.
PATTERNS = {
    "sliding_window_pattern": ("layer_types", "full_attention"),
    "_sliding_window_pattern": ("layer_types", "full_attention"),
    "no_rope_layer_interval": ("no_rope_layers", 0),
}


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
    if values.get("full_attn_idxs") is not None and "layer_types" in changed:
        kinds = changed["layer_types"]
        changed["full_attn_idxs"] = [k for k, kind in enumerate(kinds) if kind == "full_attention"]
    if values.get("first_k_dense_replace") is not None:  # layers without experts at the bottom
        changed["first_k_dense_replace"] = sum(layer.mlp < values["first_k_dense_replace"] for layer in layers)
    if "max_window_layers" in values:  # layers before the first that slides
        changed["max_window_layers"] = sum(layer.mha < values["max_window_layers"] for layer in layers)
    return changed


def config_json(config, own=None):
    """Return config.json as a dict that transformers reads as `config`.

    own: the source's config.json, None where it has none. What it spells as transformers 5 does, or all where it is
    None, is there in the older spelling too: transformers 4, and what is built on it, would take a default instead.
    """
    values = _values(config)
    if own is None or own.get("model_type") != config.model_type:
        own = json.loads(config.to_json_string())
        older = True
    else:
        own, older = copy.deepcopy(own), "rope_parameters" in own
        before = _read(config, own)
        for field in (field for field in values if field not in before or before[field] != values[field]):
            names = [field, *(alias for alias, name in config.attribute_map.items() if name == field)]
            names += ["torch_dtype"] if field == "dtype" else []
            own |= dict.fromkeys([name for name in names if name in own] or [field], values[field])
    for field, value in (_older(values) if older else {}).items():
        both = {**own, field: own.get(field, value)}
        if _read(config, both, field) == _read(config, own, field):  # to transformers 5 it says nothing new
            own = both
    return own


def _read(config, values, without=None):
    """Return all that transformers reads as the configuration's class from a config.json of `values`."""
    read = _values(type(config).from_dict(copy.deepcopy(values)))
    read.pop(without, None)
    return read


def _values(config):
    values = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in values.items() if key not in ("_name_or_path", "transformers_version")}


def _older(values):
    """Return what transformers 4 calls fields that transformers 5 has renamed."""
    rope, older = values.get("rope_parameters") or {}, {}
    if "full_attention" in rope:  # one for each kind of attention
        if "rope_theta" in (rope.get("sliding_attention") or {}):
            older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"] or {}
    theta, part = ("rotary_emb_base", "rotary_pct") if "neox" in values["model_type"] else ("rope_theta", None)
    for new, old in (("rope_theta", theta), ("partial_rotary_factor", part or "partial_rotary_factor")):
        if new in rope:
            older[old] = rope[new]
    if rope.get("rope_type", "default") != "default":
        plain = ("rope_theta", "partial_rotary_factor")
        scaling = {key: value for key, value in rope.items() if key not in plain}
        if scaling["rope_type"] == "longrope":  # three fields, and no others
            scaling = {"type": "longrope", **{k: scaling[k] for k in ("short_factor", "long_factor")}}
        older["rope_scaling"] = scaling
    if "num_local_experts" in values:
        older["num_experts"] = values["num_local_experts"]
    if "dtype" in values:
        older["torch_dtype"] = values["dtype"]
    return older
