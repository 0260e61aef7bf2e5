"""What a source may hold beside what its class saves, and what it may lack: the same for every format."""

import pytest
import torch
from families import toy
from safetensors.torch import load_file, save_file
from test_export_gguf import SHAPE, assert_same, blocks, byte_level, tensors

from lib.export.write import FORMATS, export

REMOVED = "mha1 mlp1"  # every format can have it
WEIGHTS = "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def model(tmp_path):
    """Return a function that saves a toy whose weights edit({name: tensor}) has changed: (edit, **overrides)."""

    def save(edit=None, **overrides):
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        toy("llama", **SHAPE, **overrides).save_pretrained(folder)
        byte_level().save_pretrained(folder)
        if edit:
            weights = load_file(folder / WEIGHTS)
            edit(weights)
            save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        return folder

    return save


def stored(folder, target, format):
    """Export and return the shapes in the file by the tensors' names."""
    export(folder, blocks(REMOVED), target, format)
    if format == "gguf":
        return {name: tuple(tensor.shape) for name, tensor in tensors(target / "model.gguf").items()}
    return {name: tuple(tensor.shape) for name, tensor in load_file(target / WEIGHTS).items()}


@pytest.mark.parametrize(
    "name, extra",
    [
        ("deepseek-v3", "model.layers.61.eh_proj.weight"),
        ("deepseek-v3", "model.layers.61.self_attn.o_proj.weight"),
        ("glm4-moe", "model.layers.46.eh_proj.weight"),
        ("qwen3.5", "mtp.layers.0.self_attn.o_proj.weight"),
    ],
)
@pytest.mark.parametrize("format", ["stock", "hf", "zeroed"])
def test_layers_that_predict_more_tokens_are_left_out(name, extra, format, tmp_path):
    for kind in ("plain", "more"):
        toy(name).save_pretrained(tmp_path / kind)
    weights = load_file(tmp_path / "more" / WEIGHTS) | {extra: torch.ones(3)}
    save_file(weights, tmp_path / "more" / WEIGHTS, metadata={"format": "pt"})
    assert stored(tmp_path / "more", tmp_path / "a", format) == stored(tmp_path / "plain", tmp_path / "b", format)


def test_a_layer_whose_number_another_size_leaves_out_is_kept(tmp_path):
    """The class of GLM-4.5, 92 layers, leaves out layer 46, too: GLM-4.5-Air has 46 and one that predicts more."""
    toy("glm4-moe", num_hidden_layers=48).save_pretrained(tmp_path / "deep")
    assert any(".layers.46." in name for name in stored(tmp_path / "deep", tmp_path / "out", "zeroed"))


@pytest.mark.parametrize("format", FORMATS)
def test_frequencies_of_rotations_are_left_out(model, tmp_path, format):
    def add(weights):
        weights |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(4)}

    old = model(add)
    assert stored(old, tmp_path / "old", format) == stored(model(), tmp_path / "new", format)
    if format == "gguf":
        assert_same(tmp_path / "old" / "model.gguf", model(), REMOVED)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", (HEAD, EMBEDDING, "model.norm.weight", "model.layers.2.mlp.up_proj.weight"))
def test_a_source_without_one_of_its_tensors_is_refused(model, tmp_path, format, name):
    folder = model(lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match="up_proj.weight.*complete source" if "up_proj" in name else name):
        export(folder, blocks(REMOVED), tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_tied_embeddings_may_be_stored_twice_or_as_the_head_but_not_differ(model, tmp_path, format):
    def twice(weights):
        weights[HEAD] = weights[EMBEDDING].clone()

    def as_head(weights):
        weights[HEAD] = weights.pop(EMBEDDING)

    def differ(weights):
        weights[HEAD] = weights[EMBEDDING] + 1

    once = stored(model(tie_word_embeddings=True), tmp_path / "once", format)
    for edit in (twice, as_head):
        assert stored(model(edit, tie_word_embeddings=True), tmp_path / edit.__name__, format) == once
    with pytest.raises(ValueError, match=f"ties {HEAD} to {EMBEDDING}.*differ"):
        stored(model(differ, tie_word_embeddings=True), tmp_path / "differ", format)
    assert not (tmp_path / "differ").exists()
