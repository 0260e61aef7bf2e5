"""What other readers find in an export, and what of a source would be dropped without a word."""

import json

import gguf
import pytest
import torch
from command_line import write_gguf
from families import toy
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.blocks import Block
from lib.export.write import export
from lib.model import llama3_factors, load_config, load_model, load_tokenizer

IDS = torch.arange(60)[None]
LAYER = [Block("mha", 1), Block("mlp", 1)]
OLD = {"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 2.0}}


def logits(model):
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


# ---- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ("stock", "zeroed"))
def test_the_sources_own_words_stay(toy_folder, damaged, tmp_path, format):
    folder = damaged()
    path = folder / "config.json"
    own = json.loads(path.read_text())
    del own["rope_parameters"]
    own |= OLD | {"torch_dtype": own.pop("dtype"), "somebodys": "field"}
    path.write_text(json.dumps(own))
    export(folder, LAYER, tmp_path / "out", format)
    new = json.loads((tmp_path / "out" / "config.json").read_text())
    changed = {"pruning_info"} | ({"num_hidden_layers"} if format == "stock" else set())
    assert {key for key in own.keys() | new.keys() if own.get(key) != new.get(key)} == changed
    export(folder, LAYER, tmp_path / "half", format, "fp16")
    new = json.loads((tmp_path / "half" / "config.json").read_text())
    assert (new["torch_dtype"], "dtype" in new) == ("float16", False)


@pytest.mark.parametrize(
    "name, rope, older",
    [
        ("llama", {"rope_theta": 777.0, "rope_type": "default"}, {"rope_theta": 777.0}),
        (
            "llama",
            {"rope_theta": 777.0, "rope_type": "linear", "factor": 2.0},
            {"rope_theta": 777.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        ("phi2", {"rope_theta": 777.0, "partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.5}),
        (
            "gpt-neox",
            {"rope_theta": 777.0, "partial_rotary_factor": 0.5},
            {"rotary_emb_base": 777.0, "rotary_pct": 0.5},
        ),
        (
            "gemma3",
            {"full_attention": {"rope_theta": 777.0}, "sliding_attention": {"rope_theta": 55.0}},
            {"rope_theta": 777.0, "rope_local_base_freq": 55.0},
        ),
        ("qwen3-moe", {"rope_theta": 777.0}, {"num_experts": 4, "num_local_experts": 4}),
    ],
)
def test_the_older_spelling_stands_beside_the_new(toy_folder, tmp_path, name, rope, older):
    folder = toy_folder(name)
    model = toy(name, vocab_size=256, rope_parameters=rope)
    model.save_pretrained(tmp_path / "source")
    for file in folder.glob("tokenizer*"):
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    export(tmp_path / "source", [], tmp_path / "out", "stock")
    new = json.loads((tmp_path / "out" / "config.json").read_text())
    assert older.items() <= new.items()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


# ---- tokenizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ("stock", "hf", "decilm", "zeroed"))
def test_tokenizer_files_are_copied_byte_for_byte(toy_folder, tmp_path, format):
    export(toy_folder(), LAYER, tmp_path / "out", format)
    files = sorted(toy_folder().glob("tokenizer*"))
    assert files and all(file.read_bytes() == (tmp_path / "out" / file.name).read_bytes() for file in files)


def test_code_that_only_the_tokenizer_names_travels(damaged, tmp_path):
    folder = damaged()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": [None, "own.Own"]}}))
    (folder / "own.py").write_text("from transformers import PreTrainedTokenizerFast as Own\n")
    export(folder, LAYER, tmp_path / "out", "stock")
    assert (tmp_path / "out" / "own.py").is_file()


@pytest.mark.parametrize("format", ("stock", "hf"))
def test_a_tokenizer_out_of_a_gguf_file_is_one_that_transformers_4_knows(tmp_path, format):
    write_gguf(tmp_path / "model.gguf", toy("llama", vocab_size=257, num_key_value_heads=4))
    export(tmp_path / "model.gguf", LAYER, tmp_path / "out", format)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only", "backend", "extra_special_tokens"} & settings.keys()
    there = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)("a ~ b") == there("a ~ b")


# ---- .gguf files ---------------------------------------------------------------------------------


@pytest.fixture
def with_more(tmp_path, monkeypatch):
    """Return a function that writes a .gguf file of a Llama, and what `more(writer)` adds to it."""
    ours = gguf.GGUFWriter.write_header_to_file

    def write(model, more):
        with monkeypatch.context() as patch:
            patch.setattr(gguf.GGUFWriter, "write_header_to_file", lambda self: (more(self), ours(self)))
            write_gguf(tmp_path / "model.gguf", model)
        return tmp_path / "model.gguf"

    return write


def scaled(kind, factor=4.0):
    return lambda writer: (writer.add_rope_scaling_type(kind), writer.add_rope_scaling_factor(factor))


def test_rotations_that_a_gguf_file_slows_down_are_read(with_more):
    llama3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 8192}
    llama3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    for rope in (llama3, linear):
        model = toy("llama", vocab_size=257, num_key_value_heads=4, hidden_size=64, rope_parameters=rope)
        freqs = llama3_factors(model.config).numpy() if rope is llama3 else None
        more = scaled(gguf.RopeScalingType.LINEAR)
        path = with_more(model, more if freqs is None else lambda w, f=freqs: w.add_tensor("rope_freqs.weight", f))
        torch.testing.assert_close(logits(load_model(path, "fp32")), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "more, says",
    [
        (scaled(gguf.RopeScalingType.YARN), "llama.rope.scaling.type"),
        (lambda w: w.add_tensor("blk.1.attn_q.bias", torch.ones(32).numpy()), "blk.1.attn_q.bias"),
        (lambda w: w.add_tensor("rope_freqs.weight", torch.arange(1.0, 5).numpy()), "rope_freqs.weight"),
    ],
)
def test_what_of_a_gguf_file_is_not_read_is_refused_by_name(with_more, more, says):
    path = with_more(toy("llama", vocab_size=257, num_key_value_heads=4), more)
    with pytest.raises(ValueError, match=says) as error:
        load_config(path)
    assert "\n" not in str(error.value)


def test_a_gguf_file_is_of_its_architecture_whatever_it_is_called(with_more):
    model = toy("llama", vocab_size=257, num_key_value_heads=4)
    path = with_more(model, lambda writer: writer.add_name("mistral"))
    assert torch.equal(logits(load_model(path, "fp32")), logits(model))
    assert load_tokenizer(path)("a ~ b").input_ids


def test_a_gguf_file_that_format_gguf_cannot_prune_goes_out_in_the_others(with_more, tmp_path):
    """What the refusal says works: stock and hf of the same file."""
    model = toy("llama", vocab_size=257, num_key_value_heads=4)
    path = with_more(model, lambda writer: writer.add_tensor("blk.1.attn_rest.weight", torch.ones(4).numpy()))
    with pytest.raises(ValueError, match="use format stock or hf, which read this file too"):
        export(path, LAYER, tmp_path / "out", "gguf")
    for format in ("stock", "hf"):
        assert export(path, LAYER, tmp_path / format, format)["format"] == format


# ---- files that hold another model ---------------------------------------------------------------


def test_a_configuration_with_fewer_layers_than_the_file_is_refused_on_loading(damaged):
    folder = damaged()
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match="weights of layers have no place"):
        load_model(folder, "fp32")


def test_tied_embeddings_over_two_matrices_are_refused_on_loading(toy_folder, damaged):
    folder = damaged()
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match="ties lm_head.weight"):
        load_model(folder, "fp32")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_model(folder, "fp32").config.tie_word_embeddings, "one matrix stored twice"


# ---- names in hf exports -------------------------------------------------------------------------


def test_a_name_in_an_hf_export_has_one_number(toy_folder, tmp_path):
    export(toy_folder(num_hidden_layers=4), [Block("mha", 1), Block("mha", 2), Block("mlp", 3)], tmp_path / "out", "hf")
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert any(".steps.step0." in name for name in names)
    assert all(sum(part.isdigit() for part in name.split(".")) <= 1 for name in names)


def test_folders_of_before_that_rule_load_beside_new_ones(toy_folder, tmp_path, modules_cache):
    """Each folder runs the code that lies in it; the steps of a layer were a plain list."""
    removed = [Block("mha", 1), Block("mha", 2), Block("mlp", 3)]
    for name in ("new", "old"):
        export(toy_folder(num_hidden_layers=4), removed, tmp_path / name, "hf")
    code = tmp_path / "old" / "modeling_blockpruned.py"
    text = code.read_text()
    for new, old in (
        ('nn.ModuleDict({f"step{i}": step for i, step in enumerate(steps)})', "nn.ModuleList(steps)"),
        ("self.steps.values()", "self.steps"),
    ):
        assert text.count(new) == 1
        text = text.replace(new, old)
    code.write_text(text)
    weights = load_file(tmp_path / "old" / "model.safetensors")
    weights = {name.replace(".steps.step", ".steps."): tensor for name, tensor in weights.items()}
    save_file(weights, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    found = []
    for name in ("new", "old", "new"):
        model, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, trust_remote_code=True, output_loading_info=True
        )
        assert not any(info.values()) and any(".steps.step0." in n for n in model.state_dict()) == (name == "new")
        found.append(logits(model))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_tokenizer_of_an_hf_export_needs_no_code(toy_folder, tmp_path, monkeypatch):
    """Told not to run any, transformers does not ask, and finds the tokenizer."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asks whether code may run"))
    export(toy_folder(), [Block("mha", 1)], tmp_path / "out", "hf")
    there = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert there("a ~ b") == AutoTokenizer.from_pretrained(toy_folder())("a ~ b")
