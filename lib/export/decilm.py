"""Write a pruned model as a Nemotron-NAS checkpoint (DeciLMForCausalLM), whose layers may lack attention or MLP.

vLLM, SGLang and mlx-lm have that model built in; transformers knows its configuration only through the
small file that is written along. What their code asks for is written out here: `block_configs` with
these keys and no others, MLP widths as a multiple that they round to 256, rotation in the old and the
new spelling, an output bias wherever the queries have one.

    export("models/Llama-2-7b-hf", order[:10], "pruned", format="decilm")
"""

import json
import math

import torch

from lib.export.checkpoint import write_shards, zeros
from lib.export.layers import places, repack

FAMILIES = dict.fromkeys(("llama", "mistral", "qwen2"), "silu")  # no norms of queries and keys, none behind a block
ROPE_TYPES = ("default", "linear", "llama3")  # the same in all these runtimes
WIDTH = 256  # MLP widths are multiples of it

CONFIGURATION = '''"""Configuration of a Nemotron-NAS checkpoint: block_configs can be read as attributes."""
from transformers import LlamaConfig


class Attributes(dict):
    """A dict, so that it goes into JSON, whose items are attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **kwargs):
        super().__init__(**kwargs)
        self.rope_theta = self.rope_parameters["rope_theta"]  # transformers 5 has it there alone
        self.block_configs = [
            Attributes({kind: Attributes(settings) for kind, settings in block.items()}) for block in block_configs
        ]
'''


def as_decilm(source, removed, info):
    """Weights, config.json and configuration_decilm.py; a format of lib.export.FORMATS."""
    check_family(source, "decilm", FAMILIES)
    layers, config = repack(source.n_layers, removed), source.config
    check_attention(layers, "decilm")
    if getattr(config, "mlp_bias", False):
        raise ValueError("format decilm: the MLPs have biases, which SGLang leaves out; use format gguf or hf")
    size = head_size(config)
    if size * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"format decilm: {config.num_attention_heads} heads of {size} are not the hidden size "
            f"{config.hidden_size}, as mlx-lm wants it; use format gguf or hf"
        )
    if source.added:
        raise ValueError(f"format decilm: it has no {source.added[0]}, which the refit has made; use format gguf or hf")
    if heads := source.edit.kept("mha"):
        raise ValueError(f"format decilm: mha{min(heads)} has fewer heads than others; use format gguf or hf")
    source.verify_dense()
    entries = _entries(source, layers)
    info["stored_parameters"] = sum(math.prod(entry.shape) for entry in entries)  # zeros, wider MLPs
    most = most_tokens(source, removed)
    window = window_note(source, most, info)
    settings = json.dumps(_config(source, layers, info) | {"max_position_embeddings": most}, indent=2) + "\n"

    def write(folder):
        write_shards(folder, entries)
        (folder / "config.json").write_text(settings, encoding="utf-8")
        (folder / "configuration_decilm.py").write_text(CONFIGURATION, encoding="utf-8")

    zeroed = layers[0].mha is None
    note = "Layer 0 has an attention of zeros, because runtimes expect one there.\n\n" if zeroed else ""
    return write, (
        "A Nemotron-NAS checkpoint (`DeciLMForCausalLM`), for runtimes that have this model built in; transformers "
        f"has not.\n\n{note}{window}```bash\nmlx_lm.generate --model FOLDER --trust-remote-code --prompt ...\n"
        "vllm serve FOLDER --trust-remote-code\n```"
    )


def check_family(source, format, activations):
    """Raise ValueError unless a runtime that knows these families runs this model as transformers does.

    activations: {model type: the activation that the runtime has there}
    """
    config = source.config
    if config.model_type not in activations or not source.native:
        raise ValueError(
            f"{source.path}: its model type is {config.model_type}; format {format} is for {', '.join(activations)}; "
            "use format hf"
        )
    given, known = getattr(config, "hidden_activation", None) or config.hidden_act, activations[config.model_type]
    if given.replace("swish", "silu") != known:
        raise ValueError(
            f"{source.path}: its activation is {given}; format {format} has {known} for {config.model_type}; use "
            "format hf"
        )
    if rotation(config)["rope_type"] not in ROPE_TYPES:
        raise ValueError(
            f"{source.path}: its rotary positions are {rotation(config)['rope_type']}; "
            f"format {format} can hold {', '.join(ROPE_TYPES)}; use format hf"
        )


def rotation(config):
    """Return the rotary settings of a configuration, those of full attention where each kind has its own."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def most_tokens(source, removed):
    """Return for how many tokens a runtime without sliding windows runs this model as transformers does.

    All its positions, but no more than a window that slides: as long as nothing has slid out of it, it is none.
    """
    config, gone = source.config, set(removed)
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * source.n_layers
    slides = any(("mha", i) not in gone and types[i] == "sliding_attention" for i in range(source.n_layers))
    return min(config.max_position_embeddings, window) if window and slides else config.max_position_embeddings


def window_note(source, most, info):
    """Return a paragraph for the model card, and tell `info`, where the runtime takes fewer tokens than the model."""
    if most == source.config.max_position_embeddings:
        return ""
    info["most_tokens"] = most
    return (
        f"For at most {most:,} tokens, the model's sliding window: this runtime has none, and would look further.\n\n"
    )


def check_attention(layers, format):
    """Raise ValueError where no layer has attention: these runtimes take their cache from one."""
    if all(layer.mha is None for layer in layers):
        raise ValueError(
            f"format {format}: no attention is left, which its runtimes cannot run; remove fewer blocks, or use "
            "format zeroed"
        )


def head_size(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def padded(width):
    """Return the MLP width that is written: the next multiple of WIDTH."""
    return -(-width // WIDTH) * WIDTH


def _config(source, layers, info):
    """Return config.json."""
    config = source.config
    rope = dict(config.rope_parameters)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    mha = {
        "no_op": False,
        "replace_with_linear": False,
        "n_heads_in_group": config.num_attention_heads // config.num_key_value_heads,
    }
    # read back as int(2 * ffn_mult * hidden_size / 3), then up to a multiple of 256: aimed at the middle
    widths = [padded(0 if layer.mlp is None else _width(source, layer.mlp)) for layer in layers]
    multiples = [1.5 * (width - WIDTH // 2) / config.hidden_size if width else None for width in widths]
    mlps = [{"no_op": not m, "replace_with_linear": False, "ffn_mult": m} for m in multiples]
    no_mha = mha | {"no_op": True, "n_heads_in_group": None}
    kept = {
        name: getattr(config, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "hidden_act",
            "rms_norm_eps",
            "initializer_range",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "tie_word_embeddings",
        )
    }
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        **kept,
        "num_hidden_layers": len(layers),
        "intermediate_size": max(widths),
        "head_dim": head_size(config),
        "attention_bias": _has_bias(source),
        "mlp_bias": False,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "rope_parameters": rope,
        "dtype": str(source.entry(_embedding(source)).dtype).removeprefix("torch."),
        "block_configs": [
            {"attention": no_mha if layer.mha is None and i else mha, "ffn": mlp}
            for i, (layer, mlp) in enumerate(zip(layers, mlps, strict=True))
        ],
        "pruning_info": info,
    }


def _entries(source, layers):
    """Return the Entries of the checkpoint: blocks in their new layers, MLPs of full width, zeros where zeros stand."""
    config, entries = source.config, []
    for entry in source.relabelled(places(layers)):
        if ".mlp." in entry.name:
            dim = int("down_proj" in entry.name)
            entry = _widened(entry, dim, padded(entry.shape[dim]))
        entries.append(entry)
    H, dtype = config.hidden_size, source.entry(_embedding(source)).dtype  # a tied head is the embedding, here too
    if layers[0].mha is None:
        kv = head_size(config) * config.num_key_value_heads
        shapes = {"q_proj": (H, H), "k_proj": (kv, H), "v_proj": (kv, H), "o_proj": (H, H)}
        entries += [zeros(f"model.layers.0.self_attn.{name}.weight", shape, dtype) for name, shape in shapes.items()]
        entries.append(zeros("model.layers.0.input_layernorm.weight", (H,), dtype))
        if _has_bias(source):
            biases = {name: shape[:1] for name, shape in shapes.items()}
            entries += [zeros(f"model.layers.0.self_attn.{name}.bias", shape, dtype) for name, shape in biases.items()]
    if _has_bias(source):
        names = {entry.name for entry in entries}
        outputs = [name.replace("q_proj", "o_proj") for name in names if name.endswith("q_proj.bias")]
        entries += [zeros(name, (H,), dtype) for name in sorted({*outputs} - names)]
    return entries


def _width(source, layer):
    return source.widths.get(layer, source.config.intermediate_size)


def _has_bias(source):
    return any(name.endswith("q_proj.bias") for name in source.names())


def _embedding(source):
    return next(name for name in source.names() if name.endswith("embed_tokens.weight"))


def _widened(entry, dim, size):
    """Return the Entry of a matrix with zeros behind it along `dim`, up to `size`."""
    shape = list(entry.shape)
    missing, shape[dim] = size - shape[dim], size

    def load():
        tensor = entry.load()
        zeros = list(tensor.shape)
        zeros[dim] = missing
        return torch.cat((tensor, tensor.new_zeros(zeros)), dim)

    return entry._replace(shape=tuple(shape), load=load)
