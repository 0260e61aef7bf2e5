"""Repairs: each against the same thing said by hooks or by numpy, in memory and in every format that holds it."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from command_line import assert_refused, flags, tree
from families import toy
from test_export_decilm import IDS, reference
from test_export_gguf import IDS as GGUF_IDS
from test_export_gguf import SHAPE, by_llama_cpp, byte_level

from lib.blocks import parse_block
from lib.decoder import Decoder
from lib.edits import Edit, applied, replaced
from lib.export.write import export
from lib.model import load_model
from lib.repair.gaps import Writer, find_writers, gaps_of, steps_of
from lib.repair.linear import hadamard, linear
from lib.repair.methods import METHODS, repair
from lib.repair.reconstruct import SHARES, reconstruct, relative_error, streamline
from lib.repair.replaceme import least_squares, moments, replaceme
from lib.repair.scale import growth
from scripts import repair as script

FAMILIES = ("llama", "llama-bias", "qwen2", "gpt2", "gemma2", "gemma3", "olmo2", "gpt-neox", "granite", "falcon-rw")
REMOVED = [parse_block(name) for name in ("mha1", "mlp1", "mlp2", "mha3")]
WINDOWS = torch.randint(1, 96, (6, 32), generator=torch.Generator().manual_seed(1))
FEW = WINDOWS[:4]  # of random tokens: what is learnt of them holds for no others
LAYERS = {"gpt2": "n_layer", "falcon-rw": "num_hidden_layers"}


def deep(name, layers=5):
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]} if "gemma" in name else {}
    return toy(name, **{LAYERS.get(name, "num_hidden_layers"): layers}, **kinds)


def blocks(names):
    return [parse_block(name) for name in names.split()]


def entering(decoder, i, run):
    """The state entering layer i while run() runs the model, by a hook."""
    seen = []
    hook = decoder.layers[i].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    run()
    hook.remove()
    return seen[0]


def logits_of(decoder, edit, ids):
    with applied(decoder, edit), torch.no_grad():
        return decoder.model(ids).logits


def states_of(decoder, ids):
    """The states entering each layer, as transformers reports them."""
    with torch.no_grad():
        return decoder.model(ids, output_hidden_states=True).hidden_states


def rms(x):
    return x.double().square().mean(-1).sqrt()


def same(a, b, tolerance=1e-4):
    return ((a - b).abs().max() / b.abs().max()).item() < tolerance


# ---- where the gaps are ------------------------------------------------------------------------------------------


def test_gaps_are_runs_of_removed_steps():
    decoder = Decoder(deep("llama"))
    steps = steps_of(decoder, REMOVED)
    assert [(step.layer, step.kinds) for step in steps[:3]] == [(0, ("mha",)), (0, ("mlp",)), (1, ("mha",))]
    assert gaps_of(steps) == [(2, 4), (5, 7)]
    assert gaps_of(steps_of(decoder, blocks("mha0 mlp4 mha2"))) == [(0, 1), (4, 5), (9, 10)]
    assert gaps_of(steps_of(decoder, [])) == []


def test_gaps_of_parallel_layers_are_whole_layers_or_a_part_of_one():
    decoder = Decoder(deep("gpt-neox"))
    steps = steps_of(decoder, blocks("mha1 mlp1 mha2 mlp2 mlp3"))
    assert len(steps) == 5 and steps[3].kept == ("mha",)
    assert gaps_of(steps) == [(1, 3), (3, 4)]


# ---- scale -------------------------------------------------------------------------------------------------------


def reference_scaled(decoder, removed, windows, factors):
    """The logits of the model without `removed`, the stream entering layer i multiplied by factors[i]."""
    hooks = []

    def times(factor):
        def hook(module, args, kwargs):
            h, *rest = args or (kwargs["hidden_states"],)
            return ((h * factor, *rest), {k: v for k, v in kwargs.items() if k != "hidden_states"})

        return hook

    for i, factor in factors.items():
        hooks.append(decoder.layers[i].register_forward_pre_hook(times(factor), with_kwargs=True))
    try:
        with decoder.masked(removed), torch.no_grad():
            return decoder.model(windows).logits
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", FAMILIES)
def test_scale_is_the_masked_model_with_its_stream_scaled(name):
    """Two removed layers: the factor is that of the states that transformers itself reports."""
    decoder, removed = Decoder(deep(name)), blocks("mha1 mlp1 mha3 mlp3")
    states = states_of(decoder, WINDOWS[:4])
    factors = {i + 1: (rms(states[i + 1]) / rms(states[i])).mean().item() for i in (1, 3)}
    assert all(abs(math.log(factor)) > 0.01 for factor in factors.values()), "a toy that needs no repair shows nothing"
    fitted = repair(decoder, removed, "scale", WINDOWS[:4], WINDOWS[4:], 2)
    strength = fitted.edit.about
    assert strength["factors"] == pytest.approx([f ** strength["power"] for f in factors.values()], rel=1e-3)
    wanted = reference_scaled(decoder, removed, WINDOWS, {i: f ** strength["power"] for i, f in factors.items()})
    got = logits_of(decoder, fitted.edit, WINDOWS)
    plain = logits_of(decoder, Edit(tuple(removed)), WINDOWS)
    assert same(got, wanted) and not same(plain, wanted, 1e-3)
    assert fitted.losses["none"] == pytest.approx(mean_loss(plain[4:], WINDOWS[4:]), rel=1e-5)
    key = f"power {strength['power']}"
    assert fitted.losses[key] == pytest.approx(mean_loss(got[4:], WINDOWS[4:]), rel=1e-4)
    assert fitted.losses[key] == min(loss for which, loss in fitted.losses.items() if which != "none")


def mean_loss(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten()).item()


def test_a_gap_within_layers_is_measured_between_the_states_around_it():
    decoder = Decoder(deep("llama"))
    seen = {}
    norms = [decoder.layers[i].post_attention_layernorm for i in (1, 3)]  # both are given the state before their MLP
    hooks = [m.register_forward_pre_hook(lambda m, args, k=k: seen.update({k: args[0]})) for k, m in enumerate(norms)]
    states = states_of(decoder, WINDOWS)
    for hook in hooks:
        hook.remove()
    steps = steps_of(decoder, blocks("mlp1 mha2 mlp2 mha3"))
    factors = growth(decoder, steps, gaps_of(steps), WINDOWS, 4)
    assert factors == pytest.approx([(rms(seen[1]) / rms(seen[0])).mean().item()], rel=1e-5)
    steps = steps_of(decoder, blocks("mlp4"))
    with torch.no_grad():
        last = decoder.run(4, ("mha",), states[4], decoder.embed(WINDOWS))
        full = decoder.run(4, ("mlp",), last, decoder.embed(WINDOWS))
    assert growth(decoder, steps, gaps_of(steps), WINDOWS) == pytest.approx([(rms(full) / rms(last)).mean().item()])


def test_writers_are_what_the_families_have():
    def writer(name, block):
        decoder = Decoder(toy(name))
        return find_writers(decoder, [parse_block(block)], WINDOWS[:1])[parse_block(block)]

    assert writer("llama", "mha1") == Writer(("model.layers.1.self_attn.o_proj.weight",))
    assert writer("gpt2", "mlp2") == Writer(tuple(f"transformer.h.2.mlp.c_proj.{p}" for p in ("weight", "bias")))
    assert writer("gemma3", "mlp0") == Writer(("model.layers.0.post_feedforward_layernorm.weight",), 1.0)
    olmo = writer("olmo2", "mlp0")
    assert olmo.names == ("model.layers.0.post_feedforward_layernorm.weight",) and olmo.offset == 0
    assert [name.split(".")[-2] for name in olmo.readers] == ["gate_proj", "up_proj"]


@pytest.mark.parametrize("name", ["mixtral", "opt-post-norm", "bloom-post-norm"])
def test_a_stream_that_cannot_be_scaled_is_refused(name):
    with pytest.raises(ValueError, match="no tensor sets the size of what ml?[hp]a?1 adds"):
        repair(Decoder(toy(name)), blocks("mlp0 mha1"), "scale", WINDOWS[:4], WINDOWS[4:])


# ---- the formats -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def modules_cache(tmp_path_factory, monkeypatch):
    """Keep remote code out of the user's cache."""
    folder = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize(
    "format, name, removed",
    [("stock", name, "mha1 mlp1") for name in ("llama", "qwen2", "gpt2", "gemma3", "olmo2")]
    + [("hf", name, "mlp0 mha1") for name in ("llama-bias", "qwen2", "gpt2", "gemma2", "olmo2")]
    + [("zeroed", "llama", "mlp0 mha1"), ("decilm", "llama", "mlp0 mha1"), ("decilm", "qwen2", "mlp1")]
    + [("gguf", "llama", "mlp0 mha1"), ("gguf", "qwen2", "mha1 mlp1")],
)
def test_every_format_gives_the_logits_of_the_repaired_model(format, name, removed, toy_folder, tmp_path):
    folder = toy_folder(name)
    if format == "gguf":
        folder = tmp_path / "model"
        toy(name, **SHAPE).save_pretrained(folder)
        byte_level().save_pretrained(folder)
    decoder = Decoder(load_model(folder, "fp32"))
    fitted = repair(decoder, blocks(removed), "scale", WINDOWS[:4], WINDOWS[4:])
    ids = torch.tensor([GGUF_IDS if format == "gguf" else IDS])
    wanted = logits_of(decoder, fitted.edit, ids)[0]
    written = export(folder, fitted.edit, tmp_path / "out", format)
    assert written["edit"]["method"] == "scale" and written["removed"] == removed.split()
    assert "scale" in (tmp_path / "out" / "README.md").read_text()
    if format == "decilm":
        got = reference(tmp_path / "out")
    elif format == "gguf":
        got, wanted = by_llama_cpp(tmp_path / "out" / "model.gguf"), wanted.log_softmax(-1)[7:12]
    else:
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
        with torch.no_grad():
            got = again(ids).logits[0]
    plain = logits_of(decoder, Edit(tuple(fitted.edit.removed)), ids)[0]
    assert same(got, wanted)
    assert format == "gguf" or not same(plain, wanted, 1e-3)


# ---- the command line --------------------------------------------------------------------------------------------


@pytest.fixture
def run(call, toy_folder, tmp_path):
    """Return a function that runs scripts.repair on a toy of 4 layers and a text of its own."""
    words = "the fox and a dog went over hills under bridges through rain in search of bread".split()
    documents = [" ".join(words[(i * k + 3) % len(words)] for k in range(1, 20)) + f" {i}." for i in range(80)]
    (tmp_path / "own.txt").write_text("\n\n".join(documents))
    (tmp_path / "order.json").write_text(json.dumps({str(k): [["mlp", 1], ["mha", 2]][:k] for k in (1, 2)}))

    def run(**changes):
        given = {
            "model_path": toy_folder(num_hidden_layers=4),
            "ppl_search_file": tmp_path / "order.json",
            "del_block_num": 2,
            "method": "scale",
            "cal_dataset": tmp_path / "own.txt",
            "output_dir": tmp_path / "out",
            "compute_dtype": "fp32",
            "device": "cpu",
            "seqlen": 32,
            "held_out": 2,
            "windows": 8,
            "force": True,
        }
        return call(script.main, *flags(**{**given, **changes}))

    return run


def test_the_script_writes_what_it_measured(run, tmp_path):
    done = run()
    assert done.code == 0, done
    result = done.result
    info = json.loads((tmp_path / "out" / "config.json").read_text())["pruning_info"]
    assert info["edit"] == result["edit"] and result["edit"]["method"] == "scale"
    assert set(result["edit"]["perplexity"]["repaired"]) == {"own", "pydoc"}
    assert result["edit"]["runs_shared_with_held_out"] == {"own": 0, "pydoc": 0}
    card, values = (tmp_path / "out" / "README.md").read_text(), result["edit"]["perplexity"]
    assert "found by BlockPruner, and repaired by scale, which changes weights of the others, too" in card
    assert f"{values['repaired']['pydoc']:.4f} (unrepaired {values['pruned']['pydoc']:.4f}) |" in card
    from lib.data import load_documents
    from lib.model import load_tokenizer
    from lib.recover_text import first_windows

    windows = first_windows(load_documents("pydoc", held_out=True).documents, load_tokenizer(tmp_path / "out"), 32, 2)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        loss = mean_loss(again(windows).logits, windows)
    assert result["edit"]["perplexity"]["repaired"]["pydoc"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_a_repair_that_harms_is_refused_unless_forced(run, tmp_path, monkeypatch):
    def harm(decoder, removed, *rest):
        from lib.edits import Edit

        name = "model.layers.0.self_attn.o_proj.weight"
        yield {"power": 1}, Edit(tuple(removed), {name: torch.full((32, 32), 3.0)})

    monkeypatch.setitem(METHODS, "scale", METHODS["scale"]._replace(function=harm))
    before = tree(tmp_path)
    done = run(force=None)
    assert done.code == 2 and "--method scale: held-out" in done.err and "--force" in done.err
    assert len(done.err.splitlines()) == 1 and tree(tmp_path) == before
    assert run(force=True).code == 0


def test_eval_repairs_and_exports_what_it_measured(evaluate, toy_folder, tmp_path, run):
    run(output_dir=tmp_path / "elsewhere")  # writes own.txt and order.json first
    given = dict(model_path=toy_folder(num_hidden_layers=4), ppl_search_file=tmp_path / "order.json", del_block_num=2)
    given |= dict(repair="scale", repair_dataset=tmp_path / "own.txt")
    plain = evaluate(**{**given, "repair": None}).result
    done = evaluate(**given, export_path=tmp_path / "out")
    assert done.code == 0 and done.result["repair"]["method"] == "scale", done
    assert done.result["dense_perplexity"] == plain["dense_perplexity"]
    assert done.result["perplexity"] != pytest.approx(plain["perplexity"], rel=1e-3)
    again = evaluate(model_path=tmp_path / "out", trust_remote_code=True).result
    assert again["dense_perplexity"] == pytest.approx(done.result["perplexity"], rel=1e-5)
    assert_refused(evaluate(**given, cal_dataset=tmp_path / "own.txt"), "--repair-dataset", "is measured on, too")
    assert_refused(evaluate(**{**given, "repair": "glue"}), "--repair glue: no such method", "scale, reconstruct")
    assert_refused(evaluate(**{**given, "del_block_num": 0}), "--repair scale: nothing is removed")


def test_bad_input_is_one_line(run, toy_folder, damaged, tmp_path):
    def refused(*says, **changes):
        before = tree(tmp_path)
        assert_refused(run(**changes), *says)
        assert tree(tmp_path) == before

    refused("nothing is removed", del_block_num=0)
    refused("--cal-dataset is missing", cal_dataset="")
    refused("holds 2 removals", del_block_num=3)
    refused("invalid choice: 'glue'", method="glue")
    refused("--seqlen 4096", "2..128", seqlen=4096)
    refused("too few to hold out", held_out=500)
    refused("--format stock: cannot hold --method linear; use hf", method="linear", format="stock")
    refused("format stock", "without its other half", format="stock", del_block_num=1)
    refused("format gguf is for llama", model_path=toy_folder("gpt2", n_layer=4), format="gguf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("not a model")
    refused("not empty")
    (tmp_path / "out" / "thesis.txt").unlink()
    (tmp_path / "out").rmdir()
    config = json.loads((toy_folder(num_hidden_layers=4) / "config.json").read_text())
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    (quantised / "model.safetensors").touch()
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    refused("quantised (gptq)", model_path=quantised)


def test_states_that_are_not_finite_are_one_line(run, toy_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "nan"
    transformers.AutoModelForCausalLM.from_pretrained(toy_folder(num_hidden_layers=4)).save_pretrained(folder)
    for file in toy_folder(num_hidden_layers=4).glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][:] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    done = run(model_path=folder)
    assert done.code == 2 and "not finite; try fp32" in done.err and len(done.err.splitlines()) == 1


# ---- reconstruct and streamline ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma3", "olmo2", "gpt-neox", "mixtral"])
def test_reconstruct_follows_the_dense_stream_and_touches_the_blocks_next_to_gaps(name):
    decoder, removed = Decoder(deep(name)), blocks("mha2 mlp2")
    before = {key: value.clone() for key, value in decoder.model.state_dict().items()}
    (_, full), *_, (strength, edit) = reconstruct(decoder, removed, FEW, FEW, 2, None, 60, 1e-2)
    wanted = states_of(decoder, FEW)[3]
    near = ("mlp1", "mha3") if name != "gpt-neox" else ("mha1 mlp1", "mha3 mlp3")
    assert tuple(strength["errors"]) == near
    layers = {int(part) for key in edit.tensors for part in key.split(".") if part.isdecimal() and len(part) == 1}
    assert layers <= {0, 1, 2, 3} and {1, 3} <= layers
    assert all(torch.equal(value, before[key]) for key, value in decoder.model.state_dict().items())

    def error(edited):
        state = entering(decoder, 3, lambda: logits_of(decoder, edited, FEW))
        return ((state - wanted).square().sum(-1) / wanted.square().sum(-1)).mean().item()

    first, last = strength["errors"][near[0]]
    assert error(Edit(tuple(removed))) == pytest.approx(first, rel=1e-3)
    assert error(full) == pytest.approx(last, rel=1e-3) and last < 0.9 * first
    name, tensor = next(iter(edit.tensors.items()))
    assert torch.allclose(tensor, torch.lerp(before[name], full.tensors[name], SHARES[-1]), atol=1e-6)


def test_streamline_puts_one_trained_layer_in_the_place_of_a_run():
    decoder, removed = Decoder(deep("llama")), blocks("mha3 mlp1 mha1 mha2 mlp2")
    full = next(e for _, e in streamline(decoder, removed, FEW, FEW, 2, None, 100, 1e-2))
    assert list(full.removed) == blocks("mha3 mha2 mlp2")
    assert {name.split(".")[2] for name in full.tensors} == {"1"} and len(full.tensors) == 9
    wanted = decoder.run(3, ("mha",), states_of(decoder, FEW)[3], decoder.embed(FEW))

    def error(edited):
        return relative_error(entering(decoder, 3, lambda: logits_of(decoder, edited, FEW)), wanted).item()

    assert error(full) < 0.9 * error(Edit(full.removed)), "trained towards the dense state behind the whole gap"
    with pytest.raises(ValueError, match="streamline: none of the removed blocks make up a whole layer"):
        next(streamline(decoder, blocks("mha1 mlp2"), WINDOWS[:4], WINDOWS[4:]))


# ---- replaceme ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-bias", "gpt2", "qwen2", "granite"])
def test_replaceme_is_weighted_least_squares_merged_into_the_writer(name):
    """A ridge of almost nothing: numpy's solution on the states that transformers reports."""
    decoder, removed = Decoder(deep(name)), blocks("mha2 mlp2")
    states, stream = states_of(decoder, FEW), decoder.embed(FEW)
    y = decoder.run(1, ("mha",), states[1], stream)
    U, target = ((x.flatten(0, 1).double().numpy()) for x in (decoder.run(1, ("mlp",), y, stream) - y, states[3]))
    weight = 1 / np.linalg.norm(target, axis=1, keepdims=True)
    residual = target - y.flatten(0, 1).double().numpy()
    T, *_ = np.linalg.lstsq(weight * U, weight * residual, rcond=None)
    found = [(s, e) for s, e in replaceme(decoder, removed, FEW, FEW, 2)]
    sums, _ = moments(decoder, steps_of(decoder, removed), {3: 6}, FEW, 2)
    assert np.allclose(least_squares(*sums[3], 1e-12).numpy(), T, atol=1e-3 * np.abs(T).max())
    strength, edit = found[0]
    wanted = least_squares(*sums[3], strength["ridge"])
    with replaced(decoder, edit), torch.no_grad():
        got = decoder.run(1, ("mlp",), y, stream) - y
    assert torch.allclose(got.flatten(0, 1).double(), torch.as_tensor(U) @ wanted, atol=1e-4 * np.abs(U).max())
    assert [s["objective"] for s, _ in found] == ["squares"] * 6 + ["cosine"] * 2

    def cosine(edited):
        with replaced(decoder, edited), torch.no_grad():
            out = decoder.run(1, ("mlp",), y, stream)
        return torch.nn.functional.cosine_similarity(out, states[3], dim=-1).mean().item()

    assert cosine(found[6][1]) > cosine(Edit()) + 1e-3


def test_replaceme_in_parallel_layers_changes_what_the_mlp_adds():
    decoder = Decoder(deep("gpt-neox"))
    path = steps_of(decoder, blocks("mha2 mlp2 mlp3"))
    y = decoder.run(
        1, ("mha",), decoder.run(0, ("mha", "mlp"), decoder.embed(FEW).h, decoder.embed(FEW)), decoder.embed(FEW)
    )
    _, samples = moments(decoder, path, {1: 3, 3: 4}, FEW, 4)
    assert torch.allclose(samples[1][0], y.flatten(0, 1), atol=1e-5)
    tensors = [edit.tensors for _, edit in replaceme(decoder, blocks("mha2 mlp2 mlp3"), FEW, FEW, 2)][0]
    assert {name.split(".")[2] + name.split(".")[3] for name in tensors} == {"1mlp", "3attention"}


def test_replaceme_refuses_what_it_cannot_merge_into():
    with pytest.raises(ValueError, match="writes to the stream through a norm .*post_feedforward_layernorm"):
        next(replaceme(Decoder(toy("gemma3")), blocks("mha1"), WINDOWS[:4], WINDOWS[4:]))
    with pytest.raises(ValueError, match="no block is kept before the first gap"):
        next(replaceme(Decoder(toy("llama")), blocks("mha0 mlp0"), WINDOWS[:4], WINDOWS[4:]))


# ---- linear ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 8, 12, 36, 576])
def test_the_hadamard_basis_is_orthonormal_and_spreads_a_single_channel(n):
    Q = hadamard(n)
    assert torch.allclose(Q @ Q.T, torch.eye(n, dtype=torch.float64), atol=1e-10)
    assert Q[-1].abs().max() <= (2 / n) ** 0.5 + 1e-9
    if n == 8:
        assert {round(x, 6) for x in Q.abs().flatten().tolist()} == {round(8**-0.5, 6)}


def test_the_linear_form_is_weighted_least_squares():
    decoder, removed = Decoder(deep("llama")), blocks("mha2 mlp2")
    states = states_of(decoder, FEW)
    X, target = (states[k].flatten(0, 1).double().numpy() for k in (2, 3))
    weight = 1 / np.linalg.norm(target, axis=1, keepdims=True)
    T, *_ = np.linalg.lstsq(weight * X, weight * target, rcond=None)
    sums, samples = moments(decoder, steps_of(decoder, removed), {4: 6}, FEW, 2, whole=True)
    assert np.allclose(least_squares(*sums[4], 1e-12).numpy(), T, atol=1e-3 * np.abs(T).max())
    found = list(linear(decoder, removed, FEW, FEW, 2))
    assert [s["form"] for s, _ in found] == ["squares"] * 6 + ["hadamard"] * 2
    Q = hadamard(32).numpy()
    d = np.abs(target @ Q).mean(0) / np.abs(X @ Q).mean(0)
    ((block, A),) = found[6][1].matrices.items()
    assert block == parse_block("mha3") and np.allclose(A.numpy() + np.eye(32), Q @ np.diag(d) @ Q.T, atol=1e-4)


@pytest.mark.parametrize(
    "name, removed",
    [("llama", "mlp0 mha1"), ("llama", "mlp1"), ("qwen2", "mha1 mlp1"), ("gpt2", "mlp0 mha1 mlp1"), ("gemma2", "mha1")]
    + [("llama", "mha0 mlp2"), ("gpt-neox", "mha1 mlp1"), ("gpt-neox", "mlp1")],
)
def test_hf_holds_the_matrices_and_no_other_format_does(name, removed, toy_folder, tmp_path):
    folder = toy_folder(name)
    decoder = Decoder(load_model(folder, "fp32"))
    *_, (_, edit) = linear(decoder, blocks(removed), FEW, FEW, 2)
    wanted = logits_of(decoder, edit, FEW)
    with decoder.masked(edit.removed), torch.no_grad():
        assert not same(decoder.model(FEW).logits, wanted, 1e-3)
    assert export(folder, edit, tmp_path / "out")["format"] == "hf"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        assert same(again(FEW).logits, wanted)
        out = again.generate(FEW[:1, :8], max_new_tokens=4, do_sample=False, pad_token_id=0)
        for n in range(8, 12):  # with the cache as without
            assert out[0, n] == again(out[:, :n], use_cache=False).logits[0, -1].argmax()
    for format in ("stock", "zeroed", "decilm", "gguf"):
        with pytest.raises(ValueError, match=f"format {format}: holds no matrices on the stream"):
            export(folder, edit, tmp_path / "no", format)
