"""Tiny random models of every family of lib.families.FAMILIES, from their own configuration classes."""

import torch
from torch import nn

V, H, L = 96, 32, 3
_COMMON = dict(vocab_size=V, hidden_size=H, num_hidden_layers=L, num_attention_heads=4, pad_token_id=0)
_LLAMA = dict(_COMMON, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=128)
_MOE = dict(_LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
_SLIDING = dict(head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
_ROUTED = dict(
    moe_intermediate_size=24,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)
_LATENT = dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
_LINEAR = dict(
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    head_dim=8,
    layer_types=["full_attention", "linear_attention", "full_attention"],
)

# name -> (configuration class, its arguments)
TOYS = {
    "llama": ("LlamaConfig", _LLAMA),
    "llama-bias": ("LlamaConfig", dict(_LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "mistral": ("MistralConfig", dict(_LLAMA, sliding_window=8)),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen2-sliding": ("Qwen2Config", dict(_LLAMA, use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "qwen3": ("Qwen3Config", dict(_LLAMA, head_dim=8)),
    "gemma": ("GemmaConfig", dict(_LLAMA, head_dim=8)),
    "gemma2": ("Gemma2Config", dict(_LLAMA, **_SLIDING, query_pre_attn_scalar=8)),
    "gemma3": ("Gemma3TextConfig", dict(_LLAMA, **_SLIDING, query_pre_attn_scalar=8)),
    "phi3": ("Phi3Config", _LLAMA),
    "phi2": ("PhiConfig", dict(_LLAMA)),
    "olmo": ("OlmoConfig", _LLAMA),
    "olmo2": ("Olmo2Config", _LLAMA),
    "olmo3": ("Olmo3Config", dict(_LLAMA, sliding_window=8, layer_types=_SLIDING["layer_types"])),
    "granite": ("GraniteConfig", dict(_LLAMA, residual_multiplier=0.5, logits_scaling=2.0)),
    "starcoder2": ("Starcoder2Config", _LLAMA),
    "smollm3": ("SmolLM3Config", _LLAMA),
    "stablelm": ("StableLmConfig", _LLAMA),
    "stablelm-parallel": ("StableLmConfig", dict(_LLAMA, use_parallel_residual=True)),
    "opt": ("OPTConfig", dict(_COMMON, ffn_dim=48, max_position_embeddings=128, word_embed_proj_dim=H)),
    "opt-post-norm": (
        "OPTConfig",
        dict(_COMMON, ffn_dim=48, max_position_embeddings=128, word_embed_proj_dim=16, do_layer_norm_before=False),
    ),
    "gpt2": ("GPT2Config", dict(vocab_size=V, n_embd=H, n_layer=L, n_head=4, n_positions=128)),
    "gptj": ("GPTJConfig", dict(vocab_size=V, n_embd=H, n_layer=L, n_head=4, n_positions=128, rotary_dim=4)),
    "gpt-neox": ("GPTNeoXConfig", dict(_COMMON, intermediate_size=48, max_position_embeddings=128)),
    "gpt-neox-serial": (
        "GPTNeoXConfig",
        dict(_COMMON, intermediate_size=48, max_position_embeddings=128, use_parallel_residual=False),
    ),
    "falcon-7b": ("FalconConfig", dict(_COMMON, parallel_attn=True, multi_query=True)),
    "falcon-40b": ("FalconConfig", dict(_COMMON, new_decoder_architecture=True, num_kv_heads=2)),
    "falcon-rw": ("FalconConfig", dict(_COMMON, parallel_attn=False, multi_query=False, alibi=True, bias=True)),
    "bloom": ("BloomConfig", dict(vocab_size=V, hidden_size=H, n_layer=L, n_head=4)),
    "bloom-post-norm": (
        "BloomConfig",
        dict(vocab_size=V, hidden_size=H, n_layer=L, n_head=4, apply_residual_connection_post_layernorm=True),
    ),
    "cohere": ("CohereConfig", _LLAMA),
    "cohere2": ("Cohere2Config", dict(_LLAMA, **_SLIDING)),
    "mixtral": ("MixtralConfig", dict(_LLAMA, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        dict(_MOE, shared_expert_intermediate_size=24, mlp_only_layers=[1], decoder_sparse_step=1),
    ),
    "qwen3-moe": ("Qwen3MoeConfig", dict(_MOE, head_dim=8)),
    "olmoe": ("OlmoeConfig", _MOE),
    "glm": ("GlmConfig", dict(_LLAMA, head_dim=8)),
    "glm4": ("Glm4Config", dict(_LLAMA, head_dim=8)),
    "glm4-moe": ("Glm4MoeConfig", dict(_LLAMA, head_dim=8, **_ROUTED)),
    "gpt-oss": ("GptOssConfig", dict(_LLAMA, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)),
    "deepseek-v2": ("DeepseekV2Config", dict(_LLAMA, num_key_value_heads=4, **_LATENT, **_ROUTED)),
    "deepseek-v3": ("DeepseekV3Config", dict(_LLAMA, num_key_value_heads=4, **_LATENT, **_ROUTED)),
    "seed-oss": ("SeedOssConfig", dict(_LLAMA, head_dim=8)),
    "ministral": ("MinistralConfig", dict(_LLAMA, head_dim=8, sliding_window=8)),
    "ministral3": ("Ministral3Config", dict(_LLAMA, head_dim=8)),
    "ernie4.5": ("Ernie4_5Config", dict(_LLAMA, head_dim=8)),
    "apertus": ("ApertusConfig", _LLAMA),
    "arcee": ("ArceeConfig", _LLAMA),
    "hunyuan": ("HunYuanDenseV1Config", dict(_LLAMA, head_dim=8)),
    "nemotron": ("NemotronConfig", _LLAMA),
    "minimax-m2": (
        "MiniMaxM2Config",
        dict(_LLAMA, head_dim=8, num_local_experts=4, num_experts_per_tok=2, rotary_dim=4),
    ),
    "granite-moe": (
        "GraniteMoeConfig",
        dict(_LLAMA, num_local_experts=4, num_experts_per_tok=2, residual_multiplier=0.5),
    ),
    "qwen3-next": ("Qwen3NextConfig", dict(_MOE, **_LINEAR, shared_expert_intermediate_size=24)),
    "qwen3.5": ("Qwen3_5TextConfig", dict(_LLAMA, **_LINEAR)),
    "qwen3.5-moe": ("Qwen3_5MoeTextConfig", dict(_MOE, **_LINEAR, shared_expert_intermediate_size=24)),
    "lfm2": ("Lfm2Config", dict(_LLAMA, full_attn_idxs=[0, 2], conv_L_cache=3, block_ff_dim=48)),
    "mpt": ("MptConfig", dict(vocab_size=V, d_model=H, n_layers=L, n_heads=4, max_seq_len=128)),
}
PARALLEL = {"phi2", "stablelm-parallel", "gptj", "gpt-neox", "falcon-7b", "falcon-40b", "cohere", "cohere2"}


def toy(name, seed=0, **overrides):
    """Return a tiny random model in eval mode, float32; every weight and bias is random, none zero."""
    import transformers

    if name == "baichuan":
        torch.manual_seed(seed)
        model = BaichuanForCausalLM()
    else:
        config_class, kwargs = TOYS[name]
        kwargs = {k: v for k, v in dict(kwargs, **overrides).items()}
        config = getattr(transformers, config_class)(**kwargs)
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # fresh norms are 1 and biases 0, which would hide mistakes
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.1 * noise)
    return model.eval()


class BaichuanForCausalLM(nn.Module):
    """A stand-in with the shape of Baichuan2's remote code: W_pack attention, layers that return tuples."""

    class Config:
        vocab_size, hidden_size, num_hidden_layers, is_encoder_decoder = V, H, L, False
        max_position_embeddings = 128
        architectures = ["BaichuanForCausalLM"]

    def __init__(self):
        super().__init__()
        self.config = self.Config()
        self.model = _BaichuanModel()
        self.lm_head = nn.Linear(H, V, bias=False)

    @property
    def base_model(self):
        return self.model

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def forward(self, input_ids, use_cache=None):
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids, use_cache)[0]))


class _BaichuanModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(V, H)
        self.layers = nn.ModuleList([DecoderLayer() for _ in range(L)])
        self.norm = nn.RMSNorm(H)

    def forward(self, input_ids, use_cache=None):
        h = self.embed_tokens(input_ids)
        T = input_ids.shape[1]
        mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
        for layer in self.layers:
            h = layer(h, attention_mask=mask, position_ids=None, past_key_value=None, use_cache=use_cache)[0]
        return (self.norm(h),)


class DecoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = _Attention(), _MLP()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(H), nn.RMSNorm(H)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None, use_cache=False):
        attended, weights, present = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), attention_mask=attention_mask
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return (hidden_states, present) if use_cache else (hidden_states,)


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.W_pack, self.o_proj = nn.Linear(H, 3 * H, bias=False), nn.Linear(H, H, bias=False)

    def forward(self, hidden_states, attention_mask=None):
        B, T, _ = hidden_states.shape
        q, k, v = self.W_pack(hidden_states).view(B, T, 3, 4, H // 4).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, H)), None, None


class _MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(H, 48, bias=False), nn.Linear(H, 48, bias=False)
        self.down_proj = nn.Linear(48, H, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
