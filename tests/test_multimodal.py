"""The text decoder inside a multimodal checkpoint: loaded, searched, replayed, and written as a model of its own."""

import json

import pytest
import torch
import transformers
from command_line import assert_refused, flags
from conftest import byte_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.blocks import Block
from lib.decoder import Decoder
from lib.export.checkpoint import Source
from lib.export.write import export
from lib.model import load_model, parameter_count, skeleton

IDS = torch.arange(60)[None]
TEXT = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "head_dim": 8,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["full_attention", "linear_attention", "full_attention"],
}
EYES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 28,
    "patch_size": 14,
}
DEEP = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32, "patch_size": 4}
MODELS = {  # name -> (configuration class, text, vision, the class that the text decoder has alone)
    "gemma3": ("Gemma3Config", {"sliding_window": 8, "query_pre_attn_scalar": 8}, EYES, "Gemma3ForCausalLM"),
    "mistral3": ("Mistral3Config", {"model_type": "mistral"}, EYES | {"model_type": "pixtral"}, "MistralForCausalLM"),
    "ministral3": (
        "Mistral3Config",
        {"model_type": "ministral3"},
        EYES | {"model_type": "pixtral"},
        "Ministral3ForCausalLM",
    ),
    "qwen3.5": ("Qwen3_5Config", LINEAR, DEEP, "Qwen3_5ForCausalLM"),
    "llava": ("LlavaConfig", {"model_type": "llama"}, EYES | {"model_type": "clip_vision_model"}, "LlamaForCausalLM"),
}
LAYER = [Block("mha", 2), Block("mlp", 2)]


@pytest.fixture
def seeing(tmp_path):
    """Return a function that saves a random multimodal model and a tokenizer: name -> (folder, model)."""

    def save(name):
        config, text, vision, _ = MODELS[name]
        config = getattr(transformers, config)(text_config=TEXT | text, vision_config=vision)
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
        return tmp_path / name, model

    return save


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_model_that_reads_text(seeing, name):
    folder, whole = seeing(name)
    model = load_model(folder, "fp32")
    assert type(model).__name__ == MODELS[name][3]
    torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=1e-5)
    assert parameter_count(model) == parameter_count(skeleton(folder)) < parameter_count(whole)


@pytest.mark.parametrize("format", ("stock", "hf"))
@pytest.mark.parametrize("name", MODELS)
def test_it_goes_out_as_a_model_of_its_own(seeing, tmp_path, modules_cache, name, format):
    folder, _ = seeing(name)
    removed = LAYER if format == "stock" else [Block("mlp", 0), Block("mha", 2)]
    result = export(folder, removed, tmp_path / "out", format)
    alone, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=format == "hf", output_loading_info=True
    )
    assert not any(info.values()) and parameter_count(alone) == result["parameters"]
    assert type(alone).__name__ == ("BlockPruned" if format == "hf" else "") + MODELS[name][3]
    model = load_model(folder, "fp32")
    with Decoder(model).masked(removed):
        torch.testing.assert_close(logits(alone.eval()), logits(model), rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"vision_config", "text_config"} & config.keys()
    assert not any("vision" in name or "visual" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=format == "hf")
    assert tokenizer("a ~ b") == AutoTokenizer.from_pretrained(folder)("a ~ b")


@pytest.mark.parametrize("name", ("gemma3", "llava"))
def test_both_ways_to_name_its_tensors_are_read(seeing, tmp_path, name):
    """language_model.model.layers..., and model.language_model.layers... with the head outside."""
    folder, whole = seeing(name)
    file = folder / "model.safetensors"
    before = Source(folder).names()
    weights = load_file(file)
    assert any(name.startswith("language_model.model.") for name in weights)
    other = {
        name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head"): t
        for name, t in weights.items()
    }
    save_file(other, file, metadata={"format": "pt"})
    torch.testing.assert_close(logits(load_model(folder, "fp32")), logits(whole), rtol=0, atol=1e-5)
    assert sorted(Source(folder).names()) == sorted(before)


def test_a_head_in_the_file_is_a_head_whatever_the_configuration_says(seeing):
    folder, _ = seeing("mistral3")  # its configuration ties by default, its decoder's does not
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"language_model.lm_head.weight": torch.randn(256, 32)}, file, metadata={"format": "pt"})
    model = load_model(folder, "fp32")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert "lm_head.weight" in Source(folder).names()


def test_it_is_searched_replayed_and_exported_by_the_scripts(search, evaluate, call, seeing, tmp_path):
    from scripts import export as script

    folder, whole = seeing("gemma3")
    assert search(model_path=folder).code == 0
    order = next((tmp_path / "out").glob("*.json"))
    run = evaluate(model_path=folder, ppl_search_file=order, del_block_num=2)
    assert run.code == 0 and run.result["dense_parameters"] == parameter_count(load_model(folder, "fp32"))
    given = {"model_path": folder, "ppl_search_file": order, "del_block_num": 2, "output_dir": tmp_path / "pruned"}
    assert call(script.main, *flags(**given)).code == 0


def test_a_text_decoder_that_transformers_has_not_alone_is_refused(call, tmp_path):
    from scripts import export as script

    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config={"depth": 2, "embed_dim": 16, "num_heads": 2})
    config.architectures = ["Qwen2VLForConditionalGeneration"]
    config.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    given = {"model_path": tmp_path / "model", "del_block_num": 0, "output_dir": tmp_path / "out"}
    run = call(script.main, *flags(**given))
    assert_refused(run, "Qwen2VLForConditionalGeneration", "none for a text decoder in it", "ForCausalLM")
