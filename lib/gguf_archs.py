"""llama.cpp's architectures: a family's name there, the tensors of its blocks, and what its graph takes for granted.

A .gguf file says neither which activation a model has nor, in most of them, which of its layers slide: both are code of
llama.cpp, keyed by the architecture's name. A family has a row here where that code and transformers' agree.
"""

from typing import NamedTuple

_MHA = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
_MLP = ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
_NORMED = (*_MHA, "attn_q_norm", "attn_k_norm")
GELU = "gelu_pytorch_tanh"


class Arch(NamedTuple):
    """name: llama.cpp's. activation: transformers' name of what its graph computes. mha, mlp: the tensors of a block.

    period: of every `period` layers all but the last slide, where a file does not say otherwise; 0: no layer can.
    window: of those that slide, in tokens, where a file does not say it; 0: then none slides.
    shift: what its norms add to the weights of transformers'. large: the number of layers by which it knows a model
    that scales attention in another way; 0: there is none.
    """

    name: str
    activation: str = "silu"
    mha: tuple = _MHA
    mlp: tuple = _MLP
    period: int = 0
    window: int = 0
    shift: int = 0
    large: int = 0


LLAMA = Arch("llama")
# transformers' model_type -> Arch
ARCHS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Arch("qwen2"),
    "qwen3": Arch("qwen3", mha=_NORMED),
    "gemma": Arch("gemma", GELU, shift=1),
    "gemma2": Arch(
        "gemma2",
        GELU,
        (*_MHA, "post_attention_norm"),
        (*_MLP, "post_ffw_norm"),
        period=2,
        window=4096,
        shift=1,
        large=46,
    ),
    "gemma3_text": Arch(
        "gemma3", GELU, (*_NORMED, "post_attention_norm"), (*_MLP, "post_ffw_norm"), period=6, shift=1, large=62
    ),
}
GPT_OSS = Arch(  # from its own files only, in which experts are packed already
    "gpt-oss",
    mha=(*_MHA, "attn_sinks"),
    mlp=("post_attention_norm", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
    period=2,
)
BY_NAME = {arch.name: arch for arch in (*ARCHS.values(), GPT_OSS)}
DECI = ("llama", "qwen2")  # whose blocks llama.cpp's "deci", where layers may lack one, runs too


def slides(arch, pattern, n):
    """Return which of n layers slide, a list of booleans, by the field sliding_window_pattern: a period or a list."""
    if isinstance(pattern, list):
        return [bool(value) for value in pattern]
    return [pattern == 0 or i % pattern < pattern - 1 for i in range(n)]


def window_fields(arch, sliding, window, context):
    """Return {key: value} that make the layers of `sliding`, a list of booleans, see `window` tokens.

    context: the model's positions. Without any layer that slides, a model whose window cannot be left out has one that
    covers all positions.
    """
    if not arch.period:
        return {}
    if not any(sliding):
        return {} if arch.name == "gemma3" else {"attention.sliding_window": context}
    fields = {"attention.sliding_window": window}
    if sliding != slides(arch, arch.period, len(sliding)):
        periods = (p for p in (0, *range(2, len(sliding) + 1)) if sliding == slides(arch, p, len(sliding)))
        fields["attention.sliding_window_pattern"] = next(periods, sliding)
    return fields
