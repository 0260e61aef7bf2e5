"""decilm exports: what the runtimes read in config.json is there and right, and the weights give transformers' logits.

The reference here is a Nemotron-NAS written down from the format alone; mlx-lm is asked too where
BLOCKPRUNER_MLX names a python that has it (scripts/check_decilm.sh makes one).
"""

import copy
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from command_line import ROOT, flags
from safetensors.torch import load_file
from torch.nn import functional as F

from lib.blocks import Block
from lib.decoder import Decoder
from lib.export.write import export
from lib.model import load_model

IDS = [5, 77, 200, 33, 190, 12, 9, 121, 121, 64]
BLOCK_KEYS = {
    "attention": {"no_op", "replace_with_linear", "n_heads_in_group"},
    "ffn": {"no_op", "replace_with_linear", "ffn_mult"},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = (
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True}),
    ("llama", {"intermediate_size": 512}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
)
GAPS = ("", "mha0", "mlp0", "mha0 mlp0", "mha1", "mlp1", "mha1 mlp1", "mha2", "mlp2", "mlp1 mha2", "mha0 mha1 mlp2")
EVERY = [("llama", {}, gaps) for gaps in GAPS]
EVERY += [(name, overrides, gaps) for name, overrides in MODELS[1:] for gaps in ("mha0", "mha1 mlp2", "mlp1 mha2")]


def blocks(names):
    return [Block(name[:3], int(name[3:])) for name in names.split()]


def expected(folder, removed):
    """The logits (T, V) of transformers with the blocks masked."""
    decoder = Decoder(load_model(folder, "fp32"))
    with decoder.masked(blocks(removed)), torch.inference_mode():
        return decoder.model(torch.tensor([IDS])).logits[0]


def reference(folder):
    """The logits (T, V) of a Nemotron-NAS checkpoint, computed from its files by the definition of the format."""
    config, w = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    heads, T, used = config["num_attention_heads"], len(IDS), set()
    size = config["hidden_size"] // heads

    def linear(x, name, bias):
        used.update({f"{name}.weight", f"{name}.bias"} if bias else {f"{name}.weight"})
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"] if bias else None)

    def norm(x, name):
        used.add(name)
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + config["rms_norm_eps"]) * w[name]

    def rotate(x):  # (T, heads, size)
        angles = torch.arange(T).unsqueeze(1) * config["rope_theta"] ** -(torch.arange(0, size, 2) / size)
        cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        a, b = x[..., : size // 2], x[..., size // 2 :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def attention(x, at, settings):
        kv_heads = heads // settings["n_heads_in_group"]
        q, k, v = (linear(x, f"{at}.{p}_proj", config["attention_bias"]) for p in "qkv")
        q, k = rotate(q.view(T, heads, size)), rotate(k.view(T, kv_heads, size))
        k, v = (y.view(T, kv_heads, size).repeat_interleave(settings["n_heads_in_group"], 1) for y in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5
        scores += torch.full((T, T), float("-inf")).triu(1)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(T, -1)
        return linear(out, f"{at}.o_proj", config["attention_bias"])

    def mlp(x, at, settings):
        width = int(2 * settings["ffn_mult"] * config["hidden_size"] / 3)
        width += -width % 256
        assert w[f"{at}.gate_proj.weight"].shape == w[f"{at}.up_proj.weight"].shape == (width, config["hidden_size"])
        inner = F.silu(linear(x, f"{at}.gate_proj", False)) * linear(x, f"{at}.up_proj", False)
        return linear(inner, f"{at}.down_proj", False)

    x = w["model.embed_tokens.weight"][IDS]
    for i, block in enumerate(config["block_configs"]):
        at = f"model.layers.{i}"
        if not block["attention"]["no_op"]:
            x = x + attention(norm(x, f"{at}.input_layernorm.weight"), f"{at}.self_attn", block["attention"])
        if not block["ffn"]["no_op"]:
            x = x + mlp(norm(x, f"{at}.post_attention_layernorm.weight"), f"{at}.mlp", block["ffn"])
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    logits = linear(norm(x, "model.norm.weight"), head, False)
    assert used | {"model.embed_tokens.weight"} == set(w)  # nothing lacks and nothing is left over
    return logits


def written(folder, target, removed, **options):
    export(folder, blocks(removed), target, format="decilm", **options)
    return target


@pytest.mark.parametrize("name, overrides, removed", EVERY)
def test_weights_and_configuration_give_the_masked_models_logits(toy_folder, tmp_path, name, overrides, removed):
    folder = toy_folder(name, **overrides)
    assert (reference(written(folder, tmp_path / "out", removed)) - expected(folder, removed)).abs().max() < 1e-5


def test_mlx_lm_agrees_with_transformers(toy_folder, tmp_path):
    if not (python := os.environ.get("BLOCKPRUNER_MLX")):
        pytest.skip("BLOCKPRUNER_MLX names no python with mlx-lm")
    script, out = ROOT / "scripts" / "mlx_logits.py", tmp_path / "logits.npy"
    for i, (name, overrides, removed) in enumerate(EVERY):
        folder = written(toy_folder(name, **overrides), tmp_path / str(i), removed)
        subprocess.run([python, script, folder, json.dumps(IDS), out], check=True)
        wanted = expected(toy_folder(name, **overrides), removed)
        assert (torch.from_numpy(np.load(out)) - wanted).abs().max() < 1e-4, (name, overrides, removed)


def test_the_check_fails_on_nan(call, toy_folder, text, tmp_path):
    """A program stands for mlx-lm that writes NaN, then one that writes transformers' own logits."""
    from scripts import check_decilm
    from scripts.check_gguf import masked_logits

    folder = written(toy_folder(), tmp_path / "out", "mha1")
    logits = masked_logits(toy_folder(), ["mha1"], text, 8)[1].numpy()
    for values, code in ((logits, 0), (logits * np.nan, 1)):
        np.save(tmp_path / "logits.npy", values)
        (tmp_path / "program").write_text(f"#!/bin/sh\nfor out; do :; done\ncp {tmp_path}/logits.npy $out\n")
        (tmp_path / "program").chmod(0o755)
        given = flags(model_path=toy_folder(), text=text, tokens=8, mlx_python=tmp_path / "program")
        assert call(check_decilm.main, str(folder), *given).code == code


@pytest.mark.parametrize("name, overrides", MODELS)
def test_the_configuration_is_what_vllm_sglang_and_mlx_lm_read(toy_folder, tmp_path, name, overrides):
    folder = written(toy_folder(name, **overrides), tmp_path / "out", "mha0 mha1 mlp2")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "nemotron-nas" and config["architectures"] == ["DeciLMForCausalLM"]
    assert config["num_hidden_layers"] == len(config["block_configs"]) == 3
    gaps = [(block["attention"]["no_op"], block["ffn"]["no_op"]) for block in config["block_configs"]]
    assert gaps == [(False, False), (True, False), (False, True)]  # layer 0 keeps an attention, of zeros
    for block in config["block_configs"]:
        assert block.keys() == BLOCK_KEYS.keys()  # mlx-lm refuses any other key
        for part, settings in block.items():
            assert settings.keys() == BLOCK_KEYS[part] and settings["replace_with_linear"] is False
            value = settings["n_heads_in_group" if part == "attention" else "ffn_mult"]
            assert (value is None) == settings["no_op"]
            rounded = round(value, 6) if part == "ffn" and value else 0  # as mlx-lm does
            assert not rounded or int(2 * rounded * 32 / 3) // 256 == int(2 * value * 32 / 3) // 256
    assert config["attention_bias"] == (name == "qwen2" or "attention_bias" in overrides)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] and config["rope_scaling"] is None
    assert config["pruning_info"]["removed"] == ["mha0", "mha1", "mlp2"]
    weights = load_file(folder / "model.safetensors")
    assert not any(weights[n].any() for n in weights if n.startswith("model.layers.0.self_attn"))
    assert ("lm_head.weight" in weights) == ("tie_word_embeddings" not in overrides)
    assert "layer 0" in (folder / "README.md").read_text().lower()


def test_a_window_that_slides_bounds_the_positions(toy_folder, tmp_path):
    for removed, most in (("mlp1", 8), ("mha1 mha2", 128)):
        folder = written(toy_folder("qwen2-sliding"), tmp_path / removed[:4], removed)
        assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == most
        assert ("at most 8 tokens" in (folder / "README.md").read_text()) == (most == 8)


def test_scaled_rotations_are_written_in_both_spellings(toy_folder, tmp_path):
    folder = toy_folder(rope_parameters=None)  # saved apart from the plain toy
    config = json.loads((folder / "config.json").read_text()) | {"rope_parameters": LLAMA3}
    (folder / "config.json").write_text(json.dumps(config))
    written(folder, tmp_path / "out", "mha1")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"] == LLAMA3
    assert {**config["rope_scaling"], "rope_theta": config["rope_theta"]} == LLAMA3
    assert config["rope_scaling"]["rope_type"] == "llama3"


def test_block_configs_are_attributes_in_a_fresh_process(toy_folder, tmp_path):
    folder = written(toy_folder(), tmp_path / "out", "mha1 mlp2")
    code = """
import copy, json, sys
from transformers import AutoConfig, AutoTokenizer
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
config = copy.deepcopy(config)
block = config.block_configs[1]
assert block.attention.no_op is True and block.attention.n_heads_in_group is None and block.ffn.no_op is False
assert config.block_configs[2].ffn.ffn_mult is None and not hasattr(block.ffn, "intermediate_size")
assert block.ffn.ffn_mult == 1.5 * 128 / 32 and config.block_configs[0].attention.n_heads_in_group == 2
assert config.rope_theta == config.rope_parameters["rope_theta"] == 10000.0
assert json.loads(config.to_json_string())["block_configs"][1] == block
AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(config).__name__)
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == "DeciLMConfig", run.stderr


def test_the_configuration_file_is_pickled_to_worker_processes(tmp_path, monkeypatch):
    from lib.export.decilm import CONFIGURATION

    (tmp_path / "configuration_decilm.py").write_text(CONFIGURATION)
    monkeypatch.syspath_prepend(tmp_path)
    import configuration_decilm

    block = {"attention": {"no_op": True}, "ffn": {"no_op": False}}
    config = configuration_decilm.DeciLMConfig(block_configs=[block], num_hidden_layers=1)
    for again in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert again.block_configs[0].attention.no_op is True and again.block_configs[0] == block


def test_transformers_itself_refuses_the_checkpoint(toy_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError):
        AutoModelForCausalLM.from_pretrained(written(toy_folder(), tmp_path / "out", "mha1"), trust_remote_code=False)


@pytest.mark.parametrize(
    "name, overrides, removed, says",
    (
        ("gemma2", {}, "mlp1", ("gemma2", "llama, mistral, qwen2", "format hf")),
        ("qwen3", {}, "mlp1", ("qwen3", "llama, mistral, qwen2", "format hf")),
        ("llama", {"head_dim": 16}, "mlp1", ("4 heads of 16", "hidden size 32", "format gguf or hf")),
        ("llama-bias", {}, "mlp1", ("MLPs have biases", "format gguf or hf")),
        ("llama", {"hidden_act": "gelu"}, "mlp1", ("activation is gelu", "silu for llama", "format hf")),
        ("llama", {}, "mha0 mha1 mha2", ("no attention is left", "format zeroed")),
    ),
)
def test_what_these_runtimes_would_run_differently_is_refused(toy_folder, tmp_path, name, overrides, removed, says):
    with pytest.raises(ValueError) as error:
        written(toy_folder(name, **overrides), tmp_path / "out", removed)
    for words in says:
        assert words in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
