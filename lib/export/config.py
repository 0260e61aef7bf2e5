"""A configuration's fields that say something of each layer, when layers leave or move.

Transformers raises where such a list is as long as the model was. What a list says of attention goes with the
attention, and the same holds for the MLP, since a layer of the pruned model may have each from another layer.
"""

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
    if values.get("first_k_dense_replace") is not None:  # layers without experts at the bottom
        changed["first_k_dense_replace"] = sum(layer.mlp < values["first_k_dense_replace"] for layer in layers)
    if "max_window_layers" in values:  # layers before the first that slides
        changed["max_window_layers"] = sum(layer.mha < values["max_window_layers"] for layer in layers)
    return changed
