"""GGUF exports: llama.cpp itself gives transformers' probabilities, and every tensor is in its place, byte for byte."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from command_line import assert_refused, flags
from families import toy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lib.blocks import Block
from lib.decoder import Decoder
from lib.edits import Edit
from lib.export.checkpoint import Source
from lib.export.gguf import prune, read_gguf, read_info, save_gguf
from lib.export.write import export
from lib.orders import save_order

SHAPE = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 4}
IDS = [5, 77, 200, 33, 290, 12, 9, 121, 121, 64, 8, 300]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}
GAPS = (  # every place, every kind; what is whole again keeps the ordinary architecture
    ("", "whole"),
    ("mha0", "deci"),
    ("mha1", "deci"),
    ("mha3", "deci"),
    ("mlp0", "deci"),
    ("mlp1", "deci"),
    ("mlp3", "deci"),
    ("mha0 mlp0", "whole"),
    ("mha2 mlp2", "whole"),
    ("mha3 mlp3", "whole"),
    ("mlp1 mha2", "whole"),
    ("mlp0 mlp1", "deci"),
    ("mha0 mha1", "deci"),
    ("mha0 mlp1 mlp3", "deci"),
    ("mha1 mha2 mlp2 mlp3", "deci"),
)


def blocks(names):
    return [Block(name[:3], int(name[3:])) for name in names.split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a function that saves a toy and a tokenizer with merges, once: (name, **overrides) -> folder."""
    saved = {}

    def save(name="llama", **overrides):
        key = json.dumps([name, overrides])
        if key not in saved:
            saved[key] = tmp_path_factory.mktemp("models") / f"{name}-{len(saved)}"
            toy(name, **{**SHAPE, **overrides}).save_pretrained(saved[key])
            byte_level().save_pretrained(saved[key])
        return saved[key]

    return save


def byte_level(*splits, ignore_merges=False, merges=60):
    """Return a byte-level BPE tokenizer, trained on a few words, that splits text by `splits` first."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not any("Split" in str(type(s)) for s in splits))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last]) if splits else last
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["The quick brown fox's 1234567 jumps, they've said; 99 99 the end.\n\n  end"] * 3,
        trainers.BpeTrainer(
            vocab_size=258 + merges,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<s>", "</s>"],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token=None)


def written(folder, target, removed, **options):
    export(folder, blocks(removed), target, format="gguf", **options)
    return target / "model.gguf"


def expected(folder, removed):
    """The log-probabilities (T, V) of transformers with the blocks masked."""
    from lib.model import load_model

    decoder = Decoder(load_model(folder, "fp32"))
    for module in decoder.model.modules():
        if "gelu" in type(getattr(module, "act_fn", None)).__name__.lower():
            module.act_fn = Tabulated()
    with decoder.masked(blocks(removed)), torch.inference_mode():
        return decoder.model(torch.tensor([IDS])).logits[0].log_softmax(-1)


class Tabulated(torch.nn.Module):
    """GELU as llama.cpp's CPU has it: looked up, to the precision of fp16."""

    def forward(self, x):
        table = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x >= 10, x, torch.where(x <= -10, 0, table))


def by_llama_cpp(path):
    """The same by llama.cpp: after a prompt, and token by token with its cache."""
    pytest.importorskip("xllamacpp")
    from lib.export.runtimes import Server

    with Server(path, 256, exact=True) as server:
        return torch.stack([server.logprobs(IDS[: n + 1], SHAPE["vocab_size"]) for n in (7, 8, 9, 10, 11)])


def assert_same(path, folder, removed, within=1e-4):
    assert (by_llama_cpp(path) - expected(folder, removed)[7:12]).abs().max() < within


# ---- llama.cpp gives the same probabilities -------------------------------------------------------


@pytest.mark.parametrize("removed, architecture", GAPS)
def test_llama_cpp_agrees_with_transformers(folder, tmp_path, removed, architecture):
    path = written(folder(), tmp_path / "out", removed)
    assert read_gguf_arch(path) == ("llama" if architecture == "whole" else "deci")
    assert_same(path, folder(), removed)


@pytest.mark.parametrize("removed", ("", "mha0", "mha1 mlp2", "mlp1 mha2"))
@pytest.mark.parametrize(
    "name, overrides",
    (
        ("qwen2", {}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": None, "head_dim": 32}),
        ("llama-bias", {}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": LINEAR}),
        ("qwen2", {"tie_word_embeddings": True}),
    ),
)
def test_llama_cpp_agrees_on_every_family_offered(folder, tmp_path, name, overrides, removed):
    assert_same(written(folder(name, **overrides), tmp_path / "out", removed), folder(name, **overrides), removed)


S, F = "sliding_attention", "full_attention"
SCALED = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
}
WHOLE = {  # families with an architecture of their own, whose layers llama.cpp has only whole; the windows are felt
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, large heads, tied": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"layer_types": [S, F, S, F]}),
    "gemma2, all full": ("gemma2", {"layer_types": [F] * 4}),
    "gemma3": ("gemma3", {"layer_types": [S, S, F, S], "rope_parameters": SCALED}),
    "gemma3, an own head": ("gemma3", {"layer_types": [S, F, F, S], "tie_word_embeddings": False}),
    "gemma3, all sliding": ("gemma3", {"layer_types": [S] * 4, "sliding_window": 5}),
    "gemma3, all full": ("gemma3", {"layer_types": [F] * 4}),
}


@pytest.mark.parametrize("removed", ("", "mha0 mlp0", "mlp1 mha2", "mha2 mlp2 mha3 mlp3"))
@pytest.mark.parametrize("name", WHOLE)
def test_llama_cpp_agrees_where_a_family_has_an_architecture_of_its_own(folder, tmp_path, name, removed):
    source = folder(WHOLE[name][0], **WHOLE[name][1])
    within = 1e-3 if "gemma" in name else 1e-4  # a last digit may decide what is looked up
    path = written(source, tmp_path / "out", removed)
    assert read_gguf_arch(path) == WHOLE[name][0]
    assert_same(path, source, removed, within)
    dense = written(source, tmp_path / "dense", "")
    save_gguf(tmp_path / "pruned.gguf", prune(read_gguf(dense), blocks(removed)))
    assert_same(tmp_path / "pruned.gguf", source, removed, within)


@pytest.mark.parametrize("removed", ("", "mha0 mlp0"))
@pytest.mark.parametrize("name", [name for name in WHOLE if name != "gemma"])  # transformers converts no Gemma 1
def test_a_file_is_read_back_as_the_model_that_it_was(folder, tmp_path, name, removed):
    """By transformers, which leaves windows, local rotations and sizes of heads of most architectures to defaults."""
    source = folder(WHOLE[name][0], **WHOLE[name][1])
    again = expected(written(source, tmp_path / "out", removed), "")
    assert (again - expected(source, removed)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ("qwen3", "gemma3"))
def test_an_edit_of_a_file_is_the_edit_of_its_checkpoint(folder, tmp_path, name):
    """Its tensors have transformers' names and values, of norms too, where Gemma's files hold one more."""
    source = folder(WHOLE[name][0], **WHOLE[name][1])
    new = {"model.layers.1.input_layernorm.weight": torch.randn(64), "model.norm.weight": torch.randn(64)}
    new["model.layers.2.mlp.down_proj.weight"] = torch.randn(64, 48)
    edit = Edit(tuple(blocks("mha0 mlp0")), new)
    export(source, edit, tmp_path / "a", "gguf")
    export(written(source, tmp_path / "dense", ""), edit, tmp_path / "b", "gguf")
    one, other = (tensors(tmp_path / x / "model.gguf") for x in "ab")
    assert one.keys() == other.keys() and all(np.array_equal(one[key].data, other[key].data) for key in one)
    assert np.allclose(
        one["blk.0.attn_norm.weight"].data, new["model.layers.1.input_layernorm.weight"] + (name == "gemma3")
    )


def write_gpt_oss(path, folder):
    """Write a toy gpt-oss as llama.cpp's converter does: gates, then ups, each (experts, rows, columns)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lib.export.gguf_vocab import vocabulary

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config, writer = model.config, gguf.GGUFWriter(path, "gpt-oss")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_sliding_window(config.sliding_window)
    writer.add_vocab_size(config.vocab_size)
    for key, value in vocabulary(AutoTokenizer.from_pretrained(folder), config.vocab_size).items():
        writer.add_key_value(key, value.value, value.type, value.sub_type)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if "experts" not in name:
            if name.endswith("sinks"):
                name += ".weight"
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.contiguous().numpy())
            continue
        layer, kind = name.split(".")[2], "bias" if name.endswith("bias") else "weight"
        tensor = tensor.transpose(1, 2) if kind == "weight" else tensor
        parts = {"gate": tensor[:, ::2], "up": tensor[:, 1::2]} if "gate_up" in name else {"down": tensor}
        for part, values in parts.items():
            writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.{kind}", values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("removed", ("", "mha0 mlp0", "mlp1 mha2", "mha2 mlp2 mha3 mlp3"))
def test_a_gpt_oss_file_is_pruned_by_whole_layers(folder, tmp_path, removed):
    """transformers reads its configuration, and not its experts: the order comes from the checkpoint."""
    source = folder("gpt-oss", rope_parameters=DEFAULT, tie_word_embeddings=False, head_dim=64)
    write_gpt_oss(tmp_path / "dense.gguf", source)
    path = written(tmp_path / "dense.gguf", tmp_path / "out", removed)
    assert read_gguf_arch(path) == "gpt-oss"
    assert_same(path, source, removed)


@pytest.mark.parametrize("removed", ("mha0 mlp1 mlp3", "mha1 mha2 mlp2 mlp3"))
def test_greedy_generation_with_llama_cpps_cache_is_transformers_without(folder, tmp_path, removed):
    pytest.importorskip("xllamacpp")
    from lib.export.runtimes import Server
    from lib.model import load_model

    found, wanted = IDS[:5], torch.tensor([IDS[:5]])
    with Server(written(folder(), tmp_path / "out", removed), 256, exact=True) as server:
        for _ in range(12):
            found = [*found, server.logprobs(found, SHAPE["vocab_size"]).argmax().item()]
    decoder = Decoder(load_model(folder(), "fp32"))
    with decoder.masked(blocks(removed)), torch.inference_mode():
        for _ in range(12):
            logits = decoder.model(wanted, use_cache=False).logits[:, -1:]
            wanted = torch.cat([wanted, logits.argmax(-1)], 1)
    assert found == wanted[0].tolist()


def test_an_attention_without_mlp_is_lost_where_the_zero_mlp_is_left_out(folder, tmp_path):
    """Why it is written: llama.cpp skips the rest of a layer whose feed_forward_length is 0, attention included."""
    path = written(folder(), tmp_path / "out", "mlp2")
    with_fault = read_deci(path)
    lengths = with_fault.fields["deci.feed_forward_length"].value
    assert lengths == [48, 48, 256, 48]
    lengths[2] = 0
    for name in [name for name in with_fault.tensors if name.startswith("blk.2.ffn")]:
        del with_fault.tensors[name]
    save_gguf(tmp_path / "fault.gguf", with_fault)
    got = by_llama_cpp(tmp_path / "fault.gguf")
    assert (got - expected(folder(), "mlp2")[7:12]).abs().max() > 0.1  # wrong
    assert (got - expected(folder(), "mha2 mlp2")[7:12]).abs().max() < 1e-4  # as if the attention were gone too


def test_layer_0_without_heads_does_not_load(folder, tmp_path):
    """Why layer 0 keeps a head count: sizes of all heads come from it."""
    pytest.importorskip("xllamacpp")
    from lib.export.runtimes import Server

    without = read_deci(written(folder(), tmp_path / "out", "mha0"))
    assert without.fields["deci.attention.head_count"].value == [4, 4, 4, 4]
    assert without.fields["deci.attention.head_count_kv"].value == [0, 2, 2, 2]
    without.fields["deci.attention.head_count"].value[0] = 0
    save_gguf(tmp_path / "fault.gguf", without)
    with pytest.raises(ValueError, match="does not load"), Server(tmp_path / "fault.gguf", 256):
        pass


def test_removed_attentions_hold_no_cache(folder, tmp_path):
    pytest.importorskip("xllamacpp")
    from lib.export.runtimes import Server

    sizes = []
    for i, removed in enumerate(("", "mha1", "mha0 mha2")):
        path = written(folder(num_key_value_heads=4, num_attention_heads=4), tmp_path / str(i), removed)
        with Server(path, 8192) as server:
            sizes.append(server.cache_mib)
    assert sizes == [8192 * 4 * 2 * 64 * 2 / 2**20 * left / 4 for left in (4, 3, 2)]


def test_one_command_makes_a_file_that_llama_cpp_loads(call, folder, tmp_path):
    from scripts import export as script

    save_order(tmp_path / "order.json", blocks("mha1 mlp2 mha0"), {"layers": 4})
    given = {"ppl_search_file": tmp_path / "order.json", "output_dir": tmp_path / "out", "format": "gguf"}
    run = call(script.main, *flags(model_path=folder(), del_block_num=2, **given))
    assert run.code == 0 and run.result["format"] == "gguf" and run.result["removed"] == ["mha1", "mlp2"]
    assert_same(tmp_path / "out" / "model.gguf", folder(), "mha1 mlp2")
    run = call(script.main, *flags(model_path=folder("cohere"), del_block_num=2, overwrite=True, **given))
    assert_refused(run, "cohere", "llama, mistral, qwen2", "format hf")
    assert read_info(tmp_path / "out" / "model.gguf")["removed"] == ["mha1", "mlp2"]


def test_the_check_compares_with_the_blocks_that_the_file_names(call, folder, text, tmp_path):
    pytest.importorskip("xllamacpp")
    from scripts import check_gguf

    path = written(folder(), tmp_path / "out", "mha1 mlp2")
    given = {"model_path": folder(), "text": text, "tokens": 12}
    run = call(check_gguf.main, str(path), *flags(**given))
    assert run.code == 0 and run.result["tokens"] == 6 and 0 < run.result["logprob"] < 1e-4
    model = read_deci(path)
    info = read_info(path) | {"removed": ["mha1"]}
    save_gguf(tmp_path / "other.gguf", model, info)
    run = call(check_gguf.main, str(tmp_path / "other.gguf"), *flags(**given))
    assert run.code == 1 and run.result["logprob"] > 0.01 and "more than 0.01" in run.err
    dense = read_gguf(written(folder(), tmp_path / "dense", ""))
    for name, bare in (("dense", dense), ("pruned", model)):  # without pruning_info it is the dense model, or fails
        del bare.fields["pruning_info"]
        save_gguf(tmp_path / f"{name}.gguf", bare)
    run = call(check_gguf.main, str(tmp_path / "dense.gguf"), *flags(**given))
    assert run.code == 0 and run.result["logprob"] < 1e-4 and "0 blocks removed" in run.out
    assert call(check_gguf.main, str(tmp_path / "pruned.gguf"), *flags(**given)).code == 1


def test_the_check_passes_neither_nan_nor_a_short_text(call, folder, text, tmp_path, monkeypatch):
    pytest.importorskip("xllamacpp")
    from scripts import check_gguf

    path = str(written(folder(), tmp_path / "out", "mha1"))
    (tmp_path / "short").write_text("the fox")
    run = call(check_gguf.main, path, *flags(model_path=folder(), text=tmp_path / "short", tokens=40))
    assert_refused(run, "--text", "41 are needed", "fewer --tokens")
    nan = check_gguf.masked_logits(folder(), [], text, 9)[1] * float("nan")
    monkeypatch.setattr(check_gguf, "masked_logits", lambda *args: (IDS[:9], nan))
    run = call(check_gguf.main, path, *flags(model_path=folder(), text=text, tokens=8))
    assert run.code == 1 and run.result["logprob"] == "nan"


def test_the_benchmark_runs_files_in_turns(call, folder, tmp_path):
    pytest.importorskip("xllamacpp")
    from scripts import bench_gguf

    files = [str(written(folder(), tmp_path / str(i), removed)) for i, removed in enumerate(("", "mha1 mlp2"))]
    run = call(bench_gguf.main, *files, *flags(prompt=16, new=4, n_ctx=4096, repeats=2))
    dense, pruned = run.result["results"]
    assert len(dense["decode_all"]) == len(pruned["prefill_all"]) == 2 and pruned["decode"] > 0
    assert (dense["cache_mib"], pruned["cache_mib"]) == (2.0, 1.5) and dense["decode_gain"] == 1
    assert_refused(call(bench_gguf.main, *files, *flags(n_ctx=64)), "--n-ctx 64", "--prompt 512")
    assert_refused(call(bench_gguf.main, str(folder() / "config.json")), "config.json", "llama.cpp does not load it")


# ---- the tensors ----------------------------------------------------------------------------------


def tensors(path):
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def read_gguf_arch(path):
    return gguf.GGUFReader(path).get_field("general.architecture").contents()


def read_deci(path):
    """The Model of a deci file, which read_gguf refuses: it is pruned already."""
    from unittest.mock import patch

    with patch("lib.export.gguf._check_file"):
        return read_gguf(path)


@pytest.mark.parametrize(
    "dtype, kind, exact",
    (("fp32", "F32", torch.float32), ("fp16", "F16", torch.float16), ("bf16", "BF16", torch.bfloat16)),
)
def test_weights_are_those_of_the_checkpoint_in_the_dtype_asked_for(folder, tmp_path, dtype, kind, exact):
    path = written(folder(), tmp_path / "out", "mha1 mlp2", compute_dtype=dtype)
    state, found = toy("llama", **SHAPE).state_dict(), tensors(path)
    wanted = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
    parts = {"attn_norm": "input_layernorm", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
    mlp = {"ffn_norm": "post_attention_layernorm"} | {f"ffn_{p}": f"mlp.{p}_proj" for p in ("gate", "up", "down")}
    for i, (a, m) in enumerate(((0, 0), (None, 1), (2, None), (3, 3))):
        wanted |= {f"blk.{i}.{new}": f"model.layers.{a}.{old}" for new, old in parts.items() if a is not None}
        wanted |= {f"blk.{i}.{new}": f"model.layers.{m}.{old}" for new, old in mlp.items() if m is not None}
    for new, old in wanted.items():
        tensor, weight = found.pop(f"{new}.weight"), state[f"{old}.weight"].to(exact)
        assert tensor.tensor_type.name == ("F32" if weight.dim() == 1 else kind)
        weight = weight.float() if weight.dim() == 1 else weight
        assert tensor.data.tobytes() == weight.contiguous().view(torch.uint8).numpy().tobytes(), new
    for i, a in ((0, 0), (2, 2), (3, 3)):
        for new, heads in (("q", 4), ("k", 2)):  # rows of a head: 0, half, 1, half + 1, ...
            weight = state[f"model.layers.{a}.self_attn.{new}_proj.weight"].to(exact)
            rows = [h * 16 + half * 8 + r for h in range(heads) for r in range(8) for half in range(2)]
            data = found.pop(f"blk.{i}.attn_{new}.weight").data.tobytes()
            assert data == weight[rows].contiguous().view(torch.uint8).numpy().tobytes()
    assert sorted(found) == [f"blk.2.ffn_{part}.weight" for part in ("down", "gate", "norm", "up")]
    assert not any(tensor.data.any() for tensor in found.values())
    assert read_info(path)["removed"] == ["mha1", "mlp2"]


@pytest.fixture
def quantised(folder, tmp_path):
    """Return a function that writes a quantised .gguf file of a toy: (name) -> path."""

    def write(name):
        model = read_gguf(written(folder(name, intermediate_size=96), tmp_path / "dense", ""))
        types = {"attn_q": "Q8_0", "attn_k": "Q4_1", "attn_v": "Q5_0", "ffn_down": "Q4_0", "token_embd": "Q8_0"}
        for key, tensor in model.tensors.items():
            if kind := types.get(key.split(".")[-2]) if key.endswith("weight") else None:
                kind = gguf.GGMLQuantizationType[kind]
                data = gguf.quantize(tensor.load(), kind)
                model.tensors[key] = tensor._replace(shape=data.shape, dtype="uint8", type=kind, load=lambda d=data: d)
        model.fields["general.license"] = gguf.GGUFValue("apache-2.0", gguf.GGUFValueType.STRING)
        save_gguf(tmp_path / "quantised.gguf", model)
        return tmp_path / "quantised.gguf"

    return write


@pytest.mark.parametrize("name", ("llama", "qwen2"))
@pytest.mark.parametrize("removed", ("mha1 mlp2", "mlp1 mha2"))
def test_a_gguf_file_is_pruned_byte_for_byte(quantised, tmp_path, name, removed):
    source = quantised(name)
    dense, path = tensors(source), written(source, tmp_path / "out", removed)
    pruned, deci = tensors(path), removed == "mha1 mlp2"
    layers = ((0, 0), (None, 1), (2, None), (3, 3)) if deci else ((0, 0), (1, 2), (3, 3))
    for i, layer in enumerate(layers):
        for part, place in (("attn", layer[0]), ("ffn", layer[1])):
            new = {k.split(".", 2)[2]: t for k, t in pruned.items() if k.startswith(f"blk.{i}.{part}")}
            old = {k.split(".", 2)[2]: t for k, t in dense.items() if k.startswith(f"blk.{place}.{part}")}
            if place is None:
                assert all(not tensor.data.any() for tensor in new.values())
                continue
            assert new.keys() == old.keys()
            for key, tensor in new.items():
                assert tensor.tensor_type == old[key].tensor_type
                data = old[key].data
                if deci and name == "qwen2" and key.startswith(("attn_q", "attn_k")):
                    heads = 4 if key.startswith("attn_q") else 2
                    data = data[[h * 16 + half * 8 + r for h in range(heads) for r in range(8) for half in range(2)]]
                assert np.array_equal(tensor.data, data), key
    for key in ("token_embd.weight", "output.weight", "output_norm.weight"):
        assert np.array_equal(pruned[key].data, dense[key].data)
    old, new = gguf.GGUFReader(source).fields, gguf.GGUFReader(path).fields
    for key, field in old.items():
        if key.startswith("tokenizer.") or key in ("general.license", "general.name", "general.file_type"):
            assert new[key].contents() == field.contents() and new[key].types == field.types
        if key.startswith(f"{name}.rope") or "context_length" in key or "epsilon" in key:
            assert new[key.replace(f"{name}.", "deci." if deci else f"{name}.")].contents() == field.contents()


@pytest.mark.parametrize("name", ("llama", "qwen2"))
@pytest.mark.parametrize("removed", ("mha0 mlp3", "mha1 mlp2", "mlp1 mha2"))
def test_a_pruned_gguf_file_gives_the_probabilities_of_the_masked_model(folder, tmp_path, name, removed):
    dense = written(folder(name), tmp_path / "dense", "")
    save_gguf(tmp_path / "pruned.gguf", prune(read_gguf(dense), blocks(removed)))
    assert_same(tmp_path / "pruned.gguf", folder(name), removed)


def test_a_quantised_file_pruned_runs_in_llama_cpp(quantised, tmp_path):
    """Near the dequantised model's probabilities: llama.cpp rounds activations to 8 bits beside quantised weights."""
    source = quantised("llama")
    got = by_llama_cpp(written(source, tmp_path / "out", "mha1 mlp2"))
    wanted = expected(source, "mha1 mlp2")[7:12]
    assert (got - wanted).abs().max() < 0.1 < (got - expected(source, "mha1")[7:12]).abs().max()


def test_a_tokenizer_with_code_of_its_own_is_run_where_that_is_allowed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    shutil.copytree(folder(), tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    (tmp_path / "model" / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    path = written(tmp_path / "model", tmp_path / "out", "mha1", trust_remote_code=True)
    tokens = gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()
    assert (
        tokens
        == gguf.GGUFReader(written(folder(), tmp_path / "plain", "mha1")).fields["tokenizer.ggml.tokens"].contents()
    )


# ---- what is refused ------------------------------------------------------------------------------


def refused(folder, tmp_path, *says, removed="mlp1", **options):
    with pytest.raises(ValueError) as error:
        export(folder, blocks(removed), tmp_path / "out", format="gguf", **options)
    for words in says:
        assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


GEMMA = {"layer_types": ["sliding_attention"] * 4}


@pytest.mark.parametrize(
    "name, overrides, says",
    (
        ("cohere", {}, ("cohere", "llama, mistral, qwen2", "format hf")),
        ("qwen3", {"attention_bias": True}, ("_proj.bias", "qwen3 has no such tensor", "format hf")),
        ("qwen3", {}, ("mha1 is left without its other half", "qwen3 has whole layers only", "hf")),
        ("gemma2", GEMMA | {"query_pre_attn_scalar": 16}, ("query_pre_attn_scalar is 16", "8", "format hf")),
        ("gemma2", GEMMA | {"attn_logit_softcapping": None}, ("attn_logit_softcapping is None", "format hf")),
        ("gemma3", GEMMA | {"final_logit_softcapping": 30.0}, ("final_logit_softcapping is 30.0", "format hf")),
        ("llama", {"hidden_act": "gelu"}, ("activation is gelu", "silu for llama", "format hf")),
        ("llama", {"rope_parameters": YARN}, ("yarn", "default, linear, llama3", "format hf")),
    ),
)
def test_a_family_that_llama_cpp_would_run_differently_is_refused(folder, tmp_path, name, overrides, says):
    refused(folder(name, **overrides), tmp_path, *says)


@pytest.mark.parametrize("name", ("mistral", "qwen2-sliding"))
def test_a_window_that_llama_cpp_has_not_bounds_the_files_context(folder, tmp_path, name):
    """Within the window both give the same, and llama.cpp takes no more than the context."""
    pytest.importorskip("xllamacpp")
    from lib.export.runtimes import Server

    source = folder(name, sliding_window=10)
    path = written(source, tmp_path / "out", "mlp1")
    assert gguf.GGUFReader(path).fields["deci.context_length"].contents() == 10
    assert "at most 10 tokens" in (path.parent / "README.md").read_text()
    with Server(path, 256, exact=True) as server:
        got = torch.stack([server.logprobs(IDS[:n], SHAPE["vocab_size"]) for n in (8, 9)])
        with pytest.raises(ValueError, match="context size"):
            server.logprobs(IDS, SHAPE["vocab_size"])
    assert (got - expected(source, "mlp1")[7:9]).abs().max() < 1e-4


def test_a_sliding_window_that_is_removed_or_never_reached_is_none(folder, tmp_path):
    path = written(folder("qwen2-sliding"), tmp_path / "out", "mha1 mha2 mha3")
    assert_same(path, folder("qwen2-sliding"), "mha1 mha2 mha3")
    wide = written(folder("mistral", sliding_window=128), tmp_path / "wide", "mlp1")
    for file in (path, wide):
        assert gguf.GGUFReader(file).fields["deci.context_length"].contents() == 128
        assert "at most" not in (file.parent / "README.md").read_text()


def test_a_gemma_whose_size_llama_cpp_guesses_by_its_layers_is_refused(folder, tmp_path):
    layers = {"num_hidden_layers": 47, "layer_types": ["sliding_attention", "full_attention"] * 23 + ["full_attention"]}
    model = read_gguf(written(folder("gemma2", **layers), tmp_path / "dense", ""))
    with pytest.raises(ValueError, match="gemma2 of 46 layers for the largest"):
        prune(model, blocks("mha9 mlp9"))
    prune(model, blocks("mha9 mlp9 mha8 mlp8"))


def test_a_model_without_attention_is_refused(folder, tmp_path):
    refused(folder(), tmp_path, "no attention is left", "format zeroed", removed="mha0 mha1 mha2 mha3")


def test_a_dtype_that_gguf_has_not_is_refused(folder, tmp_path):
    refused(folder(), tmp_path, "float64", "fp32, fp16 or bf16", compute_dtype="fp64")


def test_a_dtype_for_a_file_that_is_copied_is_refused(folder, tmp_path):
    source = written(folder(), tmp_path / "dense", "")
    refused(source, tmp_path, "compute dtype fp32", "ask for none", compute_dtype="fp32")


def test_a_full_disk_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    refused(folder(), tmp_path, "GiB free", "another disk")


def number(value):
    return gguf.GGUFValue(value, gguf.GGUFValueType.UINT32)


def numbers(*values):
    return gguf.GGUFValue(list(values), gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32)


@pytest.mark.parametrize(
    "change, says",
    (
        (lambda m: m.fields.update({"split.count": number(2)}), "one of 2 parts"),
        (lambda m: m.tensors.update({"blk.1.ffn_gate_exps.weight": m.tensors["blk.1.ffn_up.weight"]}), "ffn_gate_exps"),
        (lambda m: m.fields.pop("llama.block_count"), "llama.block_count"),
        (lambda m: m.tensors.pop("blk.2.ffn_up.weight"), "lacks blk.2.ffn_up.weight"),
        (lambda m: m.tensors.pop("output_norm.weight"), "lacks output_norm.weight"),
        (lambda m: m.fields.update({"llama.rope.dimension_count": number(8)}), "part of each head"),
        (
            lambda m: m.fields.update({"llama.attention.head_count": numbers(4, 4, 4, 4)}),
            "head_count differs from layer",
        ),
    ),
)
def test_a_gguf_file_that_cannot_be_pruned_is_refused(folder, tmp_path, change, says):
    model = read_gguf(written(folder(), tmp_path / "dense", ""))
    change(model)
    save_gguf(tmp_path / "changed.gguf", model)
    with pytest.raises(ValueError, match=says):
        read_gguf(tmp_path / "changed.gguf")


def test_an_export_is_no_source_again_and_no_file_is_no_gguf(folder, tmp_path):
    with pytest.raises(ValueError, match="architecture deci"):
        read_gguf(written(folder(), tmp_path / "out", "mha1"))
    whole = written(folder(), tmp_path / "whole", "mha1 mlp1")  # this one is, and says so
    again = read_info(written(whole, tmp_path / "again", "mha1 mlp1"))
    assert again["pruned_before"] == read_info(whole) and again["base_model"] == "model.gguf"
    (tmp_path / "no.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(ValueError, match="no.gguf"):
        read_gguf(tmp_path / "no.gguf")


def test_an_export_may_be_overwritten_and_another_gguf_may_not(folder, tmp_path):
    path = written(folder(), tmp_path / "out", "mha1")
    assert sorted(file.name for file in path.parent.iterdir()) == ["README.md", "model.gguf"]
    assert "llama-cli" in (path.parent / "README.md").read_text()
    written(folder(), tmp_path / "out", "mlp1", overwrite=True)
    assert read_info(path)["removed"] == ["mlp1"]
    other = read_gguf(written(folder(), tmp_path / "dense", ""))
    del other.fields["pruning_info"]
    save_gguf(path, other)
    with pytest.raises(ValueError, match="than an export"):
        written(folder(), tmp_path / "out", "mlp1", overwrite=True)


def test_a_model_is_read_tensor_by_tensor(folder, tmp_path, monkeypatch):
    """No more than one weight is asked for at a time, and each of them once."""
    asked = []
    monkeypatch.setattr(Source, "tensor", lambda self, name, read=Source.tensor: asked.append(name) or read(self, name))
    written(folder(), tmp_path / "out", "mha1")
    assert len(asked) == len(set(asked)) == 4 * 9 + 3 - 5
