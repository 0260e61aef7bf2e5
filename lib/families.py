"""The families of models: which sub-modules of a decoder layer are its attention, its MLP, and their norms.

Masking and stepping by a row are proven on every model that is loaded (lib.blocks.Decoder); with which branch a norm
goes is what the row says.
"""

from typing import NamedTuple


class Family(NamedTuple):
    """Where a decoder layer class keeps its branches: names of sub-modules, absent ones ignored.

    Of several modules of a branch the last one's output joins the stream. Norms go with their
    branch; a layer without any of `mlp_norms` feeds both branches from the attention's norm.
    """

    mha: tuple
    mlp: tuple
    mha_norms: tuple
    mlp_norms: tuple


_LLAMA = Family(("self_attn",), ("mlp",), ("input_layernorm",), ("post_attention_layernorm",))
_GEMMA2 = Family(
    ("self_attn",),
    ("mlp",),
    ("input_layernorm", "post_attention_layernorm"),
    ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
_OLMO2 = Family(("self_attn",), ("mlp",), ("post_attention_layernorm",), ("post_feedforward_layernorm",))

# Keyed by the class of the decoder layer. A new row needs a toy model in tests/families.py.
FAMILIES = {
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "Phi3DecoderLayer": _LLAMA,
    "GemmaDecoderLayer": _LLAMA,
    "GraniteDecoderLayer": _LLAMA,
    "Starcoder2DecoderLayer": _LLAMA,
    "SmolLM3DecoderLayer": _LLAMA,
    "StableLmDecoderLayer": _LLAMA,
    "OlmoDecoderLayer": _LLAMA,
    "CohereDecoderLayer": _LLAMA,
    "Cohere2DecoderLayer": _LLAMA,
    "PhiDecoderLayer": _LLAMA,
    "Qwen2MoeDecoderLayer": _LLAMA,
    "Qwen3MoeDecoderLayer": _LLAMA,
    "OlmoeDecoderLayer": _LLAMA,
    "GlmDecoderLayer": _LLAMA,
    "Glm4MoeDecoderLayer": _LLAMA,
    "GptOssDecoderLayer": _LLAMA,
    "DeepseekV2DecoderLayer": _LLAMA,
    "DeepseekV3DecoderLayer": _LLAMA,
    "SeedOssDecoderLayer": _LLAMA,
    "MinistralDecoderLayer": _LLAMA,
    "Ministral3DecoderLayer": _LLAMA,
    "Ernie4_5DecoderLayer": _LLAMA,
    "ArceeDecoderLayer": _LLAMA,
    "HunYuanDenseV1DecoderLayer": _LLAMA,
    "NemotronDecoderLayer": _LLAMA,
    "ApertusDecoderLayer": Family(("self_attn",), ("mlp",), ("attention_layernorm",), ("feedforward_layernorm",)),
    "Glm4DecoderLayer": Family(
        ("self_attn",),
        ("mlp",),
        ("input_layernorm", "post_self_attn_layernorm"),
        ("post_attention_layernorm", "post_mlp_layernorm"),
    ),
    # transformers before 5 and checkpoints keep the experts under the second name
    "MixtralDecoderLayer": _LLAMA._replace(mlp=("mlp", "block_sparse_moe")),
    "MiniMaxM2DecoderLayer": _LLAMA._replace(mlp=("mlp", "block_sparse_moe")),
    "GraniteMoeDecoderLayer": _LLAMA._replace(mlp=("block_sparse_moe",)),
    # hybrids: a linear attention or a convolution stands in the place of some attentions
    "Qwen3NextDecoderLayer": _LLAMA._replace(mha=("self_attn", "linear_attn")),
    "Qwen3_5DecoderLayer": _LLAMA._replace(mha=("self_attn", "linear_attn")),
    "Qwen3_5MoeDecoderLayer": _LLAMA._replace(mha=("self_attn", "linear_attn")),
    "Lfm2DecoderLayer": Family(("self_attn", "conv"), ("feed_forward",), ("operator_norm",), ("ffn_norm",)),
    "Gemma2DecoderLayer": _GEMMA2,
    "Gemma3DecoderLayer": _GEMMA2,
    "Olmo2DecoderLayer": _OLMO2,
    "Olmo3DecoderLayer": _OLMO2,
    "OPTDecoderLayer": Family(("self_attn",), ("fc1", "fc2"), ("self_attn_layer_norm",), ("final_layer_norm",)),
    "GPT2Block": Family(("attn",), ("mlp",), ("ln_1",), ("ln_2",)),
    "MptBlock": Family(("attn",), ("ffn",), ("norm_1",), ("norm_2",)),
    "GPTJBlock": Family(("attn",), ("mlp",), ("ln_1",), ()),
    "GPTNeoXLayer": Family(("attention",), ("mlp",), ("input_layernorm",), ("post_attention_layernorm",)),
    "FalconDecoderLayer": Family(
        ("self_attention",), ("mlp",), ("input_layernorm", "ln_attn"), ("post_attention_layernorm", "ln_mlp")
    ),
    "BloomBlock": Family(("self_attention",), ("mlp",), ("input_layernorm",), ("post_attention_layernorm",)),
    # Baichuan2's remote code: 7B and 13B
    "DecoderLayer": _LLAMA,
    "BaichuanLayer": _LLAMA,
}

# Trained with a BOS token in front of every text, and lost without it.
NEED_BOS = {"GemmaDecoderLayer", "Gemma2DecoderLayer", "Gemma3DecoderLayer"}

# How configurations spell the number of positions; the first that is there counts.
POSITIONS = (
    "max_position_embeddings",
    "max_seq_len",
    "n_positions",
    "max_sequence_length",
    "model_max_length",
    "n_ctx",
)


def positions(config):
    """Return the most tokens that a model of this configuration takes, None where it sets no limit."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return next((most for name in POSITIONS if (most := getattr(config, name, None))), None)


def needs_bos(model):
    """Whether the model's family needs a BOS token in front of every text; weights are not needed."""
    return any(kind.__name__ in NEED_BOS for module in model.modules() for kind in type(module).__mro__)
