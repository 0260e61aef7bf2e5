"""LaCo against a merge written here on the plain model, and its command line; PruneMe's table and MergeKit file."""

import copy
import csv
import json
import math
import shutil

import matplotlib.image
import pytest
import torch
import transformers
import yaml
from command_line import SMALL, assert_refused, flags, tree
from families import V, toy
from safetensors.torch import load_file, save_file

from lib.decoder import Decoder
from lib.edits import Edit, applied, replaced
from lib.export.write import export
from lib.laco import VARIANTS, collapse, edit
from scripts import angular, laco

WINDOWS = torch.randint(V, (2, 20), generator=torch.Generator().manual_seed(1))
L = 8
LINEAR = {
    "llama": (
        "model",
        (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ),
    ),
    "gpt-neox": (
        "gpt_neox",
        ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
}


def deep_toy(name="llama", **overrides):
    return toy(name, num_hidden_layers=L, **overrides)


def written(decoder, found, folder, format="stock"):
    """Save the decoder's model, then what it collapses to; return the merged model's folder."""
    decoder.model.save_pretrained(folder.with_name("dense"))
    export(folder.with_name("dense"), edit(decoder, found.layers), folder, format)
    return folder


def merge_by_hand(model, name, place, C, variant):
    """Merge as paper or notebook write it down, in place, and delete the layers above."""
    stack, names = model.get_submodule(LINEAR[name][0]).layers, LINEAR[name][1]
    for module in names:
        for kind, base in stack[place].get_submodule(module).named_parameters():
            before = base.data.clone()
            for k in range(1, C):
                other = stack[place + k].get_submodule(module).get_parameter(kind).data
                base.data += other - (before if variant == "paper" else base.data)
    del stack[place + 1 : place + C]


def final_states(model, name):
    caught = []
    hook = (
        model.get_submodule(LINEAR[name][0])
        .layers[-1]
        .register_forward_hook(
            lambda module, args, output: caught.append(output[0] if isinstance(output, tuple) else output)
        )
    )
    with torch.no_grad():
        model(input_ids=WINDOWS, use_cache=False)
    hook.remove()
    return caught[0].double()


def laco_by_hand(model, name, threshold, C, interval, low, high, variant):
    dense, place, merges = final_states(model, name), high - C, []
    while place >= low:
        candidate = copy.deepcopy(model)
        merge_by_hand(candidate, name, place, C, variant)
        similarity = torch.cosine_similarity(dense, final_states(candidate, name), dim=-1).mean().item()
        if similarity > threshold:
            model = candidate
            merges.append((place, similarity))
            place = min(place - interval, len(model.get_submodule(LINEAR[name][0]).layers) - C)
        else:
            place -= 1
    return model, merges


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "name, threshold, C, interval, low, high",
    (
        ("llama", 0.3, 3, 2, 1, L),
        ("llama", 0.3, 4, 1, 0, L - 1),
        ("llama", -1.0, 2, 2, 1, L),
        ("gpt-neox", 0.5, 3, 2, 1, L),
    ),
)
def test_layers_merge_as_the_paper_and_its_notebook_say(name, threshold, C, interval, low, high, variant, tmp_path):
    expected, merges = laco_by_hand(deep_toy(name), name, threshold, C, interval, low, high, variant)
    model = deep_toy(name)
    decoder = Decoder(model)
    before = copy.deepcopy(model.state_dict())
    found = collapse(
        decoder,
        WINDOWS,
        C,
        interval=interval,
        lowest=low,
        highest=high,
        variant=variant,
        threshold=threshold,
        batch_size=1,
    )
    assert [place for place, _ in found.merges] == [place for place, _ in merges] != []
    assert [s for _, s in found.merges] == pytest.approx([s for _, s in merges], rel=1e-5)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()), "not changed yet"
    written(decoder, found, tmp_path / "short")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "short")
    assert again.config.num_hidden_layers == len(found.layers) == L - len(merges) * (C - 1)
    with torch.no_grad():
        logits = (m(input_ids=WINDOWS, use_cache=False).logits for m in (again, expected))
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remove, merge", ((1, 2), (2, 3), (3, 2), (4, 3), (3, 4)))
def test_the_threshold_is_found_for_a_number_of_layers(remove, merge):
    decoder, compared = Decoder(deep_toy()), []
    found = collapse(decoder, WINDOWS, merge, interval=1, remove=remove, progress=lambda: compared.append(1))
    assert len(found.layers) == L - remove
    assert found.threshold > -1 and all(s > found.threshold for _, s in found.merges)
    straight = collapse(decoder, WINDOWS, merge, interval=1, threshold=found.threshold)
    assert straight.merges[: len(found.merges)] == found.merges
    assert len(collapse(decoder, WINDOWS, merge, interval=1, threshold=found.threshold + 5e-4).layers) > L - remove
    assert len(compared) < 120, "a state is compared once, whatever the threshold"


def test_layers_keep_what_depends_on_their_place(tmp_path):
    """Gemma 2's layers take turns in what they see; the checkpoint's do as the layers that they come from."""
    types = ["sliding_attention", "full_attention"] * 4
    decoder = Decoder(toy("gemma2", num_hidden_layers=L, layer_types=types))
    found = collapse(decoder, WINDOWS, 2, remove=3)
    written(decoder, found, tmp_path / "short")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "short")
    assert config.layer_types == [types[layer.base] for layer in found.layers]


def test_families_without_a_merge_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="MixtralDecoderLayer.*experts"):
        collapse(Decoder(toy("mixtral")), WINDOWS, 2, remove=1)
    decoder = Decoder(toy("gpt2", scale_attn_by_inverse_layer_idx=True, n_layer=L))
    found = collapse(decoder, WINDOWS, 2, remove=3)
    with pytest.raises(ValueError, match="GPT2LMHeadModel.*depends on the layer's number.*nearest format is hf"):
        written(decoder, found, tmp_path / "short")
    assert not (tmp_path / "short").exists()


FORMATS = [("llama", "stock"), ("llama", "hf"), ("llama", "zeroed"), ("gpt-neox", "stock"), ("gpt2", "hf")]


@pytest.mark.parametrize("name, format", FORMATS)
def test_every_format_holds_the_merged_model(name, format, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    own = {"scale_attn_by_inverse_layer_idx": True, "n_layer": L} if name == "gpt2" else {"num_hidden_layers": L}
    decoder = Decoder(toy(name, **own))
    found = collapse(decoder, WINDOWS, 3, remove=4)
    folder = written(decoder, found, tmp_path / "out", format)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.inference_mode(), applied(decoder, edit(decoder, found.layers)):
        logits = (model(input_ids=WINDOWS, use_cache=False).logits for model in (again, decoder.model))
        torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def test_decilm_holds_the_merged_model(tmp_path, toy_folder):
    from test_export_decilm import IDS, reference

    folder = toy_folder(num_hidden_layers=L)
    decoder = Decoder(transformers.AutoModelForCausalLM.from_pretrained(folder).eval())
    merged = edit(decoder, collapse(decoder, WINDOWS, 3, remove=4).layers)
    export(folder, merged, tmp_path / "out", "decilm")
    with torch.inference_mode(), applied(decoder, merged):
        wanted = decoder.model(torch.tensor([IDS])).logits[0]
    assert (reference(tmp_path / "out") - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("source", ("folder", "gguf"))
def test_llama_cpp_runs_the_merged_model(source, tmp_path):
    from test_export_gguf import IDS, SHAPE, by_llama_cpp, byte_level

    toy("llama", **SHAPE | {"num_hidden_layers": L}).save_pretrained(tmp_path / "model")
    byte_level().save_pretrained(tmp_path / "model")
    decoder = Decoder(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval())
    merged = edit(decoder, collapse(decoder, WINDOWS, 3, remove=4).layers)
    path = tmp_path / "model"
    if source == "gguf":
        export(path, [], tmp_path / "dense", "gguf")
        path = tmp_path / "dense" / "model.gguf"
    export(path, merged, tmp_path / "out", "gguf")
    with torch.inference_mode(), applied(decoder, merged):
        wanted = decoder.model(torch.tensor([IDS])).logits[0].log_softmax(-1)[7:12]
    assert (by_llama_cpp(tmp_path / "out" / "model.gguf") - wanted).abs().max() < 1e-4


def test_a_quantised_files_merged_tensors_are_encoded_as_the_file_has_them(tmp_path):
    import gguf
    import numpy as np
    from test_export_gguf import SHAPE, byte_level, tensors

    from lib.export.gguf import read_gguf, save_gguf

    toy("llama", **SHAPE).save_pretrained(tmp_path / "model")
    byte_level().save_pretrained(tmp_path / "model")
    export(tmp_path / "model", [], tmp_path / "dense", "gguf")
    model = read_gguf(tmp_path / "dense" / "model.gguf")
    for name in ("blk.1.attn_output.weight", "blk.2.attn_output.weight"):
        data = gguf.quantize(model.tensors[name].load(), gguf.GGMLQuantizationType.Q8_0)
        changed = {"shape": data.shape, "dtype": "uint8", "type": gguf.GGMLQuantizationType.Q8_0}
        model.tensors[name] = model.tensors[name]._replace(load=lambda data=data: data, **changed)
    save_gguf(tmp_path / "q8.gguf", model)
    name, new = "model.layers.1.self_attn.o_proj.weight", torch.randn(64, 64)
    export(tmp_path / "q8.gguf", Edit(tensors={name: new}), tmp_path / "out", "gguf")
    before, after = tensors(tmp_path / "q8.gguf"), tensors(tmp_path / "out" / "model.gguf")
    assert before.keys() == after.keys()
    for key in before:
        assert np.array_equal(before[key].data, after[key].data) == (key != "blk.1.attn_output.weight"), key
    got = gguf.dequantize(after["blk.1.attn_output.weight"].data, gguf.GGMLQuantizationType.Q8_0)
    assert np.abs(got - new.numpy()).max() <= new.abs().max().item() / 127
    with pytest.raises(ValueError, match="replaces model.layers.9.*not"):
        edited = Edit(tensors={"model.layers.9.self_attn.o_proj.weight": new})
        export(tmp_path / "q8.gguf", edited, tmp_path / "no", "gguf")
    k_quant = gguf.GGMLQuantizationType.Q4_K
    monkey = model.tensors["blk.1.attn_output.weight"]._replace(type=k_quant)
    from lib.export.gguf import replaced as in_file

    with pytest.raises(ValueError, match="nothing here encodes the file.s Q4_K"):
        in_file(
            model._replace(tensors={**model.tensors, "blk.1.attn_output.weight": monkey}), Edit(tensors={name: new})
        )


def test_an_edit_is_checked_by_name_and_shape_and_leaves_no_trace(tmp_path):
    model = toy("gpt2")
    decoder, before = Decoder(model), {key: value.clone() for key, value in model.state_dict().items()}
    name = "h.0.attn.c_attn.weight"  # as a file of the base model has it
    new = torch.zeros_like(before[f"transformer.{name}"])
    with applied(decoder, Edit(tensors={name: new})):
        assert not model.transformer.h[0].attn.c_attn.weight.any()
    bad = [
        (Edit(tensors={name: new, "h.9.x": new}), "h.9.x"),
        (Edit(tensors={name: new, "h.1.ln_1.weight": torch.ones(3)}), "ln_1.weight is .3,"),
    ]
    model.save_pretrained(tmp_path / "dense")
    for wrong, says in bad:
        with pytest.raises(ValueError, match=says), applied(decoder, wrong):
            raise AssertionError("applied")
        with pytest.raises(ValueError, match=says):
            export(tmp_path / "dense", wrong, tmp_path / "out", "stock")
        assert not (tmp_path / "out").exists()
    with (
        pytest.raises(ValueError, match="changes layer_norm_epsilon"),
        applied(decoder, Edit(config={"layer_norm_epsilon": 1})),
    ):
        raise AssertionError("applied")
    export(tmp_path / "dense", Edit(config={"layer_norm_epsilon": 0.5}), tmp_path / "out", "stock")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_norm_epsilon"] == 0.5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_masks_within_masks_leave_the_outer_ones():
    from lib.blocks import Block

    decoder = Decoder(deep_toy())
    with torch.inference_mode(), decoder.masked([Block("mha", 1)]):
        wanted = decoder.model(WINDOWS).logits
        with decoder.masked([Block("mha", 1), Block("mlp", 2)]):
            assert not torch.equal(decoder.model(WINDOWS).logits, wanted)
        assert torch.equal(decoder.model(WINDOWS).logits, wanted)


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture
def run(call, toy_folder, text, tmp_path):
    def run(script, **changes):
        given = {"model_path": toy_folder(num_hidden_layers=6), "cal_dataset": text, "output_dir": tmp_path / "out"}
        return call(script.main, *flags(**{**SMALL, **given, **changes}))

    return run


def test_laco_writes_a_checkpoint_that_evaluates(run, evaluate, tmp_path):
    result = run(laco, target_ratio=0.3, merge_layers=2, interval=1).result
    record = json.loads((tmp_path / "out" / "laco.json").read_text())
    info = json.loads((tmp_path / "out" / "config.json").read_text())["pruning_info"]
    assert info["edit"].items() <= record.items() and info["evaluated"]["perplexity"] == result["perplexity"]
    assert "by laco" in (tmp_path / "out" / "README.md").read_text()
    assert record["dense_layers"] == 6 and len(record["layers"]) == result["layers"] == 3
    assert [m["similarity"] for m in record["merges"]] == [s for _, s in result["merges"]]
    assert result["removed_percent"] >= 30 and record["variant"] == "paper"
    measured = evaluate(model_path=tmp_path / "out").result
    assert measured["dense_perplexity"] == pytest.approx(result["perplexity"], rel=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"], "nothing is left beside it"
    again = run(laco, del_layer_num=2, variant="last", overwrite=True)
    assert again.code == 0 and again.result["layers"] == 4, again


def test_laco_by_threshold(run):
    assert run(laco, threshold=0.999).result["layers"] == 6
    few = run(laco, threshold=0.01, merge_layers=2, interval=1, lowest=0, overwrite=True).result
    assert few["layers"] < 6 and all(similarity > 0.01 for _, similarity in few["merges"])


def test_a_gguf_file_collapses(run, evaluate, toy_folder, tmp_path):
    pytest.importorskip("gguf")
    from command_line import write_gguf

    folder = toy_folder(vocab_size=257, num_key_value_heads=4, num_hidden_layers=6)
    write_gguf(tmp_path / "toy.gguf", transformers.AutoModelForCausalLM.from_pretrained(folder))
    result = run(laco, model_path=tmp_path / "toy.gguf", del_layer_num=2)
    assert result.code == 0, result
    measured = evaluate(model_path=tmp_path / "out").result
    assert measured["dense_perplexity"] == pytest.approx(result.result["perplexity"], rel=1e-4)


def test_laco_refuses_in_one_line(run, toy_folder, tmp_path):
    def refused(*says, **changes):
        before = tree(tmp_path)
        assert_refused(run(laco, **changes), *says)
        assert tree(tmp_path) == before

    unreachable = run(laco, del_layer_num=4, merge_layers=2)  # going down by 2 leaves no room for so many
    assert unreachable.code == 2 and "remove 2 layers at any threshold, 4 are asked for" in unreachable.err
    refused("--threshold, --del-layer-num or --target-ratio")
    refused("not allowed", threshold=0.5, del_layer_num=1)
    refused("--output-dir is missing", threshold=0.5, output_dir=None)
    refused("--target-ratio 0.99", "6 layers", target_ratio=0.99)
    refused("merges of 4 layers", "3 at a time", "2 cannot be reached", del_layer_num=2, merge_layers=4)
    refused("[1, 3)", threshold=0.5, highest=3)
    refused("[0, 7)", threshold=0.5, lowest=0, highest=7)
    refused("--merge-layers 1", threshold=0.5, merge_layers=1)
    refused("--threshold", "share from 0 to 1", threshold=2)
    refused(
        "MixtralDecoderLayer",
        "experts",
        "another method",
        threshold=0.5,
        merge_layers=2,
        model_path=toy_folder("mixtral"),
    )
    refused("no such file or folder", threshold=0.5, model_path=tmp_path / "nowhere")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("not a model")
    refused("not empty", "overwrite", threshold=0.5)
    refused("other things than an export", threshold=0.5, overwrite=True)
    given = dict(threshold=0.5, model_path=toy_folder("gemma", num_hidden_layers=6), output_dir=tmp_path / "new")
    refused("format gguf", "BPE without merges", format="gguf", **given)


def test_the_table_of_angles_and_the_mergekit_file(run, toy_folder, tmp_path, search):
    result = run(angular, layers_to_skip=2).result
    with open(tmp_path / "out" / "distances.csv") as file:
        rows = [(int(row["n"]), int(row["i"]), float(row["distance"])) for row in csv.DictReader(file)]
    assert [(n, i) for n, i, _ in rows] == [(n, i) for n in range(1, 7) for i in range(7 - n)]
    shown = matplotlib.image.imread(tmp_path / "out" / "distances.png")
    assert min(shown.shape[:2]) > 150 and len({tuple(pixel) for pixel in shown.reshape(-1, shown.shape[-1])}) > 20
    order = search(model_path=toy_folder(num_hidden_layers=6), metric="angular", block_type="layer", del_block_num=4)
    meta = json.loads(open(order.result["order_file"]).read())["meta"]
    assert {i: d for n, i, d in rows if n == 2} == pytest.approx({int(i): d for i, d in meta["window_scores"].items()})
    start = min((d, i) for n, i, d in rows if n == 2)[1]
    assert order.result["order"][0] == f"mha{start}" and result["start"] == start and 0 < rows[0][2] < 1
    file = yaml.safe_load((tmp_path / "out" / "slices.yaml").read_text())
    assert file["merge_method"] == "passthrough" and file["dtype"] == "float32", "the checkpoint's own"
    assert all(len(part["sources"]) == 1 for part in file["slices"])
    kept = [i for part in file["slices"] for i in range(*part["sources"][0]["layer_range"])]
    assert kept == [i for i in range(6) if not start <= i < start + 2]
    assert {part["sources"][0]["model"] for part in file["slices"]} == {str(toy_folder(num_hidden_layers=6))}


def test_mergekit_slices_have_no_empty_part():
    for start, ranges in ((0, [[2, 6]]), (4, [[0, 4]]), (1, [[0, 1], [3, 6]])):
        file = yaml.safe_load(angular.slices("owner/a: b", 6, start, 2, "float16"))
        assert file["dtype"] == "float16"
        assert [part["sources"][0]["layer_range"] for part in file["slices"]] == ranges
        assert file["slices"][0]["sources"][0]["model"] == "owner/a: b"


def test_angular_refuses_in_one_line(run, tmp_path, text, damaged):
    folder = damaged()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][:] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    done = run(angular, model_path=folder)
    assert done.code == 2 and "states are not finite\n" in done.err and not (tmp_path / "out").exists()
    shutil.rmtree(folder)
    assert_refused(run(angular, layers_to_skip=6), "--layers-to-skip 6", "6 layers", "1..5")
    assert_refused(run(angular, output_dir=text), str(text), "not a folder")
    assert_refused(run(angular, model_path=""), "--model-path is missing")
    assert tree(tmp_path) == {}
    assert math.isfinite(run(angular).result["layers"])


@pytest.mark.parametrize("name", ("llama", "gpt-neox"))
def test_a_collapsed_model_can_be_run_in_place_and_leaves_no_trace(name, tmp_path):
    from lib.evaluate import window_losses

    decoder = Decoder(deep_toy(name))
    before = {key: value.clone() for key, value in decoder.model.state_dict().items()}
    dense = window_losses(decoder, WINDOWS, 2)
    collapsed = collapse(decoder, WINDOWS, merge=3, remove=4)
    merged = edit(decoder, collapsed.layers)
    with pytest.raises(KeyboardInterrupt), applied(decoder, merged):
        in_place = window_losses(decoder, WINDOWS, 2)
        raise KeyboardInterrupt
    with replaced(decoder, merged):
        assert torch.equal(window_losses(decoder, WINDOWS, 2, merged.removed), in_place)
    assert len(merged.removed) == 8 and {block.kind for block in merged.removed} == {"mha", "mlp"}
    assert all(torch.equal(value, before[key]) for key, value in decoder.model.state_dict().items())
    assert torch.equal(window_losses(decoder, WINDOWS, 2), dense)
    written(decoder, collapsed, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = again(WINDOWS).logits[:, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), WINDOWS[:, 1:].flatten(), reduction="none")
    assert torch.allclose(losses.view(2, -1).sum(1), in_place, rtol=1e-5)
    assert not torch.allclose(in_place, dense, rtol=1e-3)
