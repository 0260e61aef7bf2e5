"""Width: OSSCAR against brute force, rules against published numbers, every export against the model in memory."""

# ruff: noqa: F811 (two fixtures are test_export_gguf's)
import itertools
import json

import gguf
import numpy as np
import pytest
import test_export_decilm
import test_export_gguf
import torch
from command_line import assert_refused, flags, tree
from families import TOYS, toy
from test_export_gguf import folder, quantised  # noqa: F401

from lib import allocation
from lib.blocks import Block
from lib.decoder import Decoder
from lib.edits import applied, holding
from lib.evaluate import window_losses
from lib.export.write import export
from lib.model import load_model, parameter_count
from lib.osscar import eliminate, swapped
from lib.parts import Part, find_parts
from lib.units import Variants, greedy
from lib.width import CRITERIA, REFITS, RIDGE, Channels, narrow
from scripts import narrow as script


def mlp(widths):
    return {Block("mlp", i): width for i, width in widths.items()}


WINDOWS = torch.randint(0, 96, (6, 32), generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[5, 77, 20, 33, 90, 12, 9, 21, 21, 64]])
NO_WIDTH = ("mixtral", "gpt-oss", "minimax-m2", "qwen3-next", "deepseek-v2", "deepseek-v3", "gpt2")
DENSE = [name for name in TOYS if "moe" not in name and name not in NO_WIDTH]


def channels(seed, n=10, d=4, tokens=40, size=1):
    """Random Channels: correlated inputs, so that a refit matters."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, n)) @ rng.normal(size=(n, tokens))
    consumer = torch.nn.Linear(n, d, bias=False, dtype=torch.float64)
    consumer.weight.data = torch.tensor(rng.normal(size=(d, n)))
    producer = torch.nn.Linear(d, n, bias=False, dtype=torch.float64)
    sums = {"H": torch.tensor(X @ X.T), "total": torch.tensor(X.sum(1)), "tokens": tokens}
    return Channels(Part((producer,), consumer, n // size), sums), X, consumer.weight.detach().numpy()


def refitted(X, W, keep):
    """methods.md's equations by numpy: (weights (k, d), the ridged error without its constant)."""
    H = X @ X.T
    H = H + RIDGE * np.diag(H).mean() * np.eye(len(H))
    G = H @ W.T
    V = np.linalg.solve(H[np.ix_(keep, keep)], G[keep])
    return V, -(V * G[keep]).sum()


def brute_greedy(X, W, k):
    keep = list(range(len(X)))
    while len(keep) > k:
        keep = min(([c for c in keep if c != i] for i in keep), key=lambda rest: refitted(X, W, rest)[1])
    return keep


def brute_swaps(X, W, keep, most, rounds=20):
    """The authors' swaps, each error by a solve of its own."""
    q, n = min(most, len(keep), len(X) - len(keep)), len(X)
    for _ in range(rounds):
        if not q:
            break
        outside = [c for c in range(n) if c not in keep]
        best = sorted(outside, key=lambda c: refitted(X, W, [*keep, c])[1])[:q]
        grown = [*keep, *best]
        worst = sorted(grown, key=lambda c: refitted(X, W, [x for x in grown if x != c])[1])[:q]
        trial = [c for c in grown if c not in worst]
        if refitted(X, W, trial)[1] < refitted(X, W, keep)[1] * (1 + 1e-12):  # both are negative
            keep = trial
        else:
            q //= 2
    return sorted(keep)


@pytest.mark.parametrize("seed", range(20))
def test_osscar_is_brute_force(seed):
    case, X, W = channels(seed, n=8 + seed % 5)
    k = case.n // 2
    order, _ = eliminate(case, case.n - k, step=1)
    greedy = sorted(set(range(case.n)) - set(order.tolist()))
    assert greedy == brute_greedy(X, W, k)
    keep = swapped(case, torch.tensor(greedy))
    assert keep.tolist() == brute_swaps(X, W, greedy, 100)
    weight, bias = REFITS["ls"].fit(case, keep)
    assert bias is None
    np.testing.assert_allclose(weight.numpy().T, refitted(X, W, keep.tolist())[0], rtol=1e-9, atol=1e-9)
    every = min(itertools.combinations(range(case.n), k), key=lambda some: refitted(X, W, list(some))[1])
    best, found = refitted(X, W, list(every))[1], refitted(X, W, keep.tolist())[1]
    assert best - 1e-9 <= found <= refitted(X, W, greedy)[1] + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_osscar_drops_whole_heads_like_brute_force(seed):
    case, X, W = channels(seed, n=12, size=3)

    def columns(heads):
        return [3 * h + c for h in heads for c in range(3)]

    keep = [0, 1, 2, 3]
    while len(keep) > 2:
        keep = min(([h for h in keep if h != i] for i in keep), key=lambda rest: refitted(X, W, columns(rest))[1])
    found = CRITERIA["osscar"].keep(case, 2)
    assert found.tolist() == keep
    weight, _ = REFITS["ls"].fit(case, found)
    np.testing.assert_allclose(weight.numpy().T, refitted(X, W, columns(keep))[0], rtol=1e-9, atol=1e-9)


def test_the_error_is_that_of_the_outputs_and_snapshots_are_refits():
    case, X, W = channels(3)
    for refit in REFITS.values():
        keep = torch.tensor([0, 2, 3, 7])
        weight, bias = refit.fit(case, keep)
        out = weight.numpy() @ X[keep] + (0 if bias is None else bias.numpy()[:, None])
        assert case.error(keep, weight, bias) == pytest.approx(((W @ X - out) ** 2).sum() / ((W @ X) ** 2).sum())
    order, snapshots = eliminate(case, 6, step=4, every=3)
    for count, full in zip((3, 6), snapshots, strict=True):
        keep = sorted(set(range(case.n)) - set(order[:count].tolist()))
        np.testing.assert_allclose(full[:, keep].T.numpy(), refitted(X, W, keep)[0], rtol=1e-9, atol=1e-9)
        assert not full[:, order[:count]].any()


def test_dead_channels_go_first():
    case, _, _ = channels(0)
    for dead in (2, 5):
        case.H[dead], case.H[:, dead] = 0, 0
    assert set(eliminate(case, 2, step=1)[0].tolist()) == {2, 5}


@pytest.mark.parametrize(
    "name, dense, n, cost, layers, width, share",
    (
        ("Llama-2-7B", 6738415616, 11008, 3 * 4096, 32, 9856, 6.7224),
        ("Llama-3-8B", 8030261248, 14336, 3 * 4096, 32, 12928, 6.8945),
        ("Qwen2.5-14B", 14770033664, 13824, 3 * 5120, 48, 12416, 7.0284),
        ("Phi-3.5-mini", 3821079552, 8192, 3 * 3072, 32, 7424, 5.9274),
    ),
)
def test_quarks_widths_remove_what_it_published(name, dense, n, cost, layers, width, share):
    assert allocation.quark_width(n, 0.1) == width
    assert round(100 * layers * cost * (n - width) / dense, 4) == share


def test_the_hill_exponent_is_numpys():
    W = torch.randn(60, 40, generator=torch.Generator().manual_seed(0)) ** 3
    values = np.linalg.svd(W.double().numpy(), compute_uv=False) ** 2
    counts, edges = np.histogram(np.log10(values), bins=100)
    low = 10 ** edges[counts.argmax()]
    tail = values[values >= low]
    assert allocation.hill(W) == pytest.approx(1 + len(tail) / np.log(tail / low).sum(), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in allocation.ALLOCATIONS if name != "uniform"])
def test_allocations_meet_the_target(name):
    decoder = Decoder(toy("llama", num_hidden_layers=5, intermediate_size=512))
    parts, total = find_parts(decoder), parameter_count(decoder.model)
    plan = allocation.Plan(decoder, parts, WINDOWS, 0.3 * total, 4, 3)
    widths = allocation.ALLOCATIONS[name].find(plan).widths
    gone = sum((parts[b].n - width) * parts[b].cost for b, width in widths.items())
    assert abs(gone / total - 0.3) < 0.001
    assert len({*widths.values()}) > 1 and all(width % 4 == 0 for width in widths.values())


def test_less_goes_where_alpha_is_small():
    decoder = Decoder(toy("llama", intermediate_size=512))
    plan = allocation.Plan(decoder, find_parts(decoder), WINDOWS, 0.2 * parameter_count(decoder.model), 4, 3)
    alpha = {b: np.mean([allocation.hill(p) for p in allocation._matrices(plan, b.layer)]) for b in plan.parts}
    widths = allocation.alphapruning(plan).widths
    low, high = sorted(alpha, key=alpha.get)[0], sorted(alpha, key=alpha.get)[-1]
    assert (512 - widths[high]) / (512 - widths[low]) == pytest.approx(1.3 / 0.7, abs=0.1)


@pytest.mark.parametrize("blocks, kinds", ((False, ("mlp",)), (True, ("mlp",)), (True, ("mlp", "mha"))))
def test_greedy_knows_the_loss_of_what_it_has_done_and_restores_the_model(blocks, kinds):
    decoder = Decoder(toy("llama", num_hidden_layers=4))
    before, total = window_losses(decoder, WINDOWS, 3), parameter_count(decoder.model)
    parts = find_parts(decoder, (), kinds)
    plan = allocation.Plan(decoder, parts, WINDOWS, 0.2 * total, 8, 3, blocks=blocks)
    found = greedy(plan)
    assert torch.equal(window_losses(decoder, WINDOWS, 3), before)
    assert bool(found.removed) == blocks
    spent = sum(step["parameters"] for step in found.steps)
    gone = sum((parts[b].n - n) * parts[b].cost for b, n in found.widths.items())
    assert spent == gone + decoder.block_parameters(found.removed)
    assert abs(spent / total - 0.2) < 0.02  # half a group of 8 channels
    variants = Variants(plan)
    for block, n in found.widths.items():
        if n < parts[block].n:
            gone = (parts[block].n - n) // plan.group(block)
            parts[block].consumer.weight.data = variants.weight(block, gone)
    loss = window_losses(decoder, WINDOWS, 3, found.removed).sum().item() / WINDOWS[:, 1:].numel()
    assert loss == pytest.approx(found.steps[-1]["loss"], abs=1e-6)


def test_the_first_step_is_the_best_of_all_units_by_brute_force():
    decoder = Decoder(toy("llama", num_hidden_layers=3))
    plan = allocation.Plan(decoder, find_parts(decoder, (), ("mlp", "mha")), WINDOWS, 3000, 8, 3, blocks=True)
    variants, rates = Variants(plan), {}

    def loss(removed=()):
        return window_losses(decoder, WINDOWS, 3, removed).sum().item() / WINDOWS[:, 1:].numel()

    dense = loss()
    for block, part in plan.parts.items():
        with holding([(part.consumer.weight, variants.weight(block, 1))]):
            noun = "channels" if block.kind == "mlp" else "heads"
            rates[f"{noun}{block.layer}"] = (loss() - dense) / (part.cost * plan.group(block))
        rates[str(block)] = (loss([block]) - dense) / decoder.block_parameters([block])
    assert greedy(plan).steps[0]["unit"] == min(rates, key=rates.get)


# ---- a narrowed model -----------------------------------------------------------------------------------------------


def assert_narrow_is_zeros(name, kind, widths):
    """Independent of shapes: zero columns of the wide consumer instead of a narrow branch."""
    decoder = Decoder(toy(name))
    parts = find_parts(decoder, (), (kind,))
    result = narrow(decoder, WINDOWS, {b: widths(part.n, b.layer) for b, part in parts.items()}, "flap", "bias", 3)
    with applied(decoder, result.edit), torch.inference_mode():
        found = decoder.model(IDS).logits
    for block, keep in result.kept.items():
        consumer, n = parts[block].consumer, parts[block].n
        keep = [c for c in range(consumer.in_features) if c * n // consumer.in_features in keep.tolist()]
        wide = torch.zeros_like(consumer.weight)
        wide[:, keep] = consumer.weight[:, keep]
        biases = [t for key, t in result.edit.tensors.items() if key.endswith("bias") and not callable(t)]
        consumer.weight.data, consumer.bias = wide, torch.nn.Parameter(biases[[*result.kept].index(block)])
    with torch.inference_mode():
        assert (decoder.model(IDS).logits - found).abs().max() < 1e-4


@pytest.mark.parametrize("name", DENSE)
def test_a_narrowed_mlp_is_one_with_the_rest_of_its_channels_at_zero(name):
    assert_narrow_is_zeros(name, "mlp", lambda n, i: n // 2 - i)


HEADS = (
    "llama",
    "llama-bias",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "olmo",
    "granite",
    "starcoder2",
)
HEADS += ("smollm3", "cohere", "cohere2", "glm", "seed-oss", "ministral", "ernie4.5", "apertus", "arcee")
HEADS += ("mixtral", "qwen2-moe", "qwen3-moe")


@pytest.mark.parametrize("name", HEADS)
def test_a_narrowed_attention_is_one_with_the_rest_of_its_heads_at_zero(name):
    assert_narrow_is_zeros(name, "mha", lambda n, i: n - i % 2)


NO_HEADS = ("phi3", "phi2", "gpt2", "falcon-7b", "deepseek-v2", "olmo2", "olmoe", "lfm2", "gpt-oss", "stablelm")


@pytest.mark.parametrize("name", NO_HEADS)
def test_attentions_of_other_projections_are_refused_by_name(name):
    with pytest.raises(ValueError, match="its attention is not q_proj, k_proj, v_proj and o_proj of whole heads"):
        find_parts(Decoder(toy(name)), (), ("mha",))


@pytest.mark.parametrize("name", [name for name in TOYS if name not in DENSE])
def test_experts_and_other_projections_are_refused_by_name(name):
    with pytest.raises(ValueError, match="its MLP is no pair of linear projections.*width is defined for dense MLPs"):
        find_parts(Decoder(toy(name)))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("refit", REFITS)
def test_every_combination_narrows_and_restores(criterion, refit):
    decoder = Decoder(toy("llama"))
    before = window_losses(decoder, WINDOWS, 3)
    result = narrow(decoder, WINDOWS, mlp({0: 24, 2: 40}), criterion, refit, 3)
    assert torch.equal(window_losses(decoder, WINDOWS, 3), before)
    assert {b: len(keep) for b, keep in result.kept.items()} == mlp({0: 24, 2: 40})
    with applied(decoder, result.edit):
        assert decoder.layers[0].mlp.gate_proj.weight.shape == (24, 32)
        assert not torch.equal(window_losses(decoder, WINDOWS, 3), before)
    best = narrow(decoder, WINDOWS, mlp({0: 24, 2: 40}), "osscar", "ls", 3)
    assert best.errors["mlp", 0] <= result.errors["mlp", 0] + 1e-3  # the ridge is not in the error


WIDTHS = (
    ({0: 32, 1: 32, 2: 32}, ()),
    ({0: 32, 1: 16}, ()),
    ({0: 40, 1: 16, 2: 48}, ("mha1",)),
    ({0: 8, 2: 24}, ("mlp1",)),
)


@pytest.mark.parametrize("widths, removed", WIDTHS)
@pytest.mark.parametrize("name", ("llama", "llama-bias", "qwen2", "gemma2", "phi3", "opt", "starcoder2"))
@pytest.mark.parametrize("refit", ("ls", "bias"))
def test_an_export_is_the_model_in_memory(toy_folder, tmp_path, name, widths, removed, refit):
    folder = toy_folder(name)
    decoder, removed = Decoder(load_model(folder, "fp32")), [Block(b[:3], int(b[3:])) for b in removed]
    total, ids = parameter_count(decoder.model), IDS
    result = narrow(decoder, WINDOWS, mlp(widths), "osscar", refit, 3, removed=removed)
    with applied(decoder, result.edit), torch.inference_mode():
        expected = decoder.model(ids).logits
    written = export(folder, result.edit, tmp_path / "out", "auto")
    uniform = len({*widths.values()}) == 1 and len(widths) == 3
    has_bias = (
        decoder.layers[0].mlp.down_proj.bias is not None
        if hasattr(decoder.layers[0], "mlp") and hasattr(decoder.layers[0].mlp, "down_proj")
        else True
    )
    assert written["format"] == ("stock" if uniform and (refit == "ls" or has_bias) else "hf")
    model = load_model(tmp_path / "out", "fp32", trust_remote_code=True)
    assert parameter_count(model) == written["parameters"] < written["dense_parameters"] == total
    with torch.inference_mode():
        assert (model(ids).logits - expected).abs().max() < 1e-4
    again = Decoder(model)  # and it is a model like any other: its blocks can be searched
    assert again.n_layers == 3 - len([b for b in removed if b.kind == "mha"])


def test_decilm_holds_a_width_for_each_layer(toy_folder, tmp_path):
    """Read back by the definition of the format, written down in test_export_decilm."""
    folder = toy_folder("llama", intermediate_size=600)
    decoder = Decoder(load_model(folder, "fp32"))
    for k, removed in enumerate(((), (Block("mha", 1), Block("mlp", 2)))):
        widths = {i: w for i, w in {0: 520, 1: 300, 2: 200}.items() if ("mlp", i) not in removed}
        edit = narrow(decoder, WINDOWS, mlp(widths), "l1", "ls", 3, removed=removed).edit
        with applied(decoder, edit), torch.inference_mode():
            expected = decoder.model(torch.tensor([test_export_decilm.IDS])).logits[0]
        written = export(folder, edit, tmp_path / str(k), "decilm")
        assert (test_export_decilm.reference(tmp_path / str(k)) - expected).abs().max() < 1e-4
        config = json.loads((tmp_path / str(k) / "config.json").read_text())
        multiples = [block["ffn"]["ffn_mult"] for block in config["block_configs"]]
        stored = [-(-int(2 * m * 32 / 3) // 256) * 256 if m else None for m in multiples]  # as the runtimes do
        assert stored == ([768, 512, 256] if k == 0 else [768, 512, None][: len(stored)])
        assert written["stored_parameters"] > written["parameters"]


@pytest.mark.parametrize(
    "name, widths, removed, arch",
    (
        ("llama", {0: 40, 1: 40, 2: 40, 3: 40}, (), "llama"),
        ("llama", {0: 40, 2: 7}, (), "deci"),
        ("qwen2", {0: 40, 1: 24}, (Block("mha", 2), Block("mlp", 3)), "deci"),
        ("llama", {1: 24, 2: 24}, (Block("mha", 0), Block("mlp", 0), Block("mha", 3), Block("mlp", 3)), "llama"),
    ),
)
@pytest.mark.parametrize("refit", ("ls", "bias"))
def test_llama_cpp_runs_a_width_for_each_layer(folder, tmp_path, name, widths, removed, arch, refit):
    decoder = Decoder(load_model(folder(name), "fp32"))
    edit = narrow(decoder, WINDOWS, mlp(widths), "l1", refit, 3, removed=removed).edit
    with applied(decoder, edit), torch.inference_mode():
        expected = decoder.model(torch.tensor([test_export_gguf.IDS])).logits[0].log_softmax(-1)
    export(folder(name), edit, tmp_path / "out", "gguf")
    path = tmp_path / "out" / "model.gguf"
    assert test_export_gguf.read_gguf_arch(path) == arch
    assert (test_export_gguf.by_llama_cpp(path) - expected[7:12]).abs().max() < 1e-4


def test_a_quantised_gguf_file_is_narrowed_with_zeros_up_to_its_types_rows(quantised, tmp_path):
    source = quantised("llama")
    decoder = Decoder(load_model(source, "fp32"))
    edit = narrow(decoder, WINDOWS, mlp({0: 40, 1: 64, 3: 9}), "osscar", "ls", 3).edit
    kind, rounded = gguf.GGMLQuantizationType.Q4_0, {}
    for key in (key for key in edit.tensors if "down_proj" in key):  # the new weights as the file can hold them
        data = edit.load(key).numpy()
        packed = gguf.quantize(np.pad(data, ((0, 0), (0, -data.shape[1] % 32))), kind)
        rounded[key] = torch.tensor(gguf.dequantize(packed, kind)[:, : data.shape[1]])
    with applied(decoder, edit._replace(tensors={**edit.tensors, **rounded})), torch.inference_mode():
        expected = decoder.model(torch.tensor([test_export_gguf.IDS])).logits[0].log_softmax(-1)
    written = export(source, edit, tmp_path / "out", "gguf")
    assert written["padded_channels"] == {"0": 24, "3": 23}
    file = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert file.get_field("deci.feed_forward_length").contents() == [64, 64, 96, 32]
    down = {t.name: t for t in file.tensors}["blk.0.ffn_down.weight"]
    assert down.tensor_type.name == "Q4_0" and list(down.shape) == [64, 64]
    assert (test_export_gguf.by_llama_cpp(tmp_path / "out" / "model.gguf") - expected[7:12]).abs().max() < 0.1


@pytest.mark.parametrize(
    "name, widths, refit, says",
    (
        ("qwen3", {0: 32}, "ls", "feed_forward_length differs from layer to layer.*qwen3 has layers of one width only"),
        ("qwen2", {0: 32, 1: 32, 2: 32, 3: 32}, "bias", "qwen2 has no ffn_down.bias"),
    ),
)
def test_gguf_refuses_what_llama_cpp_has_no_place_for(folder, tmp_path, name, widths, refit, says):
    edit = narrow(Decoder(load_model(folder(name), "fp32")), WINDOWS, mlp(widths), "l1", refit, 3).edit
    with pytest.raises(ValueError, match=says):
        export(folder(name), edit, tmp_path / "out", "gguf")


@pytest.mark.parametrize(
    "format, widths, refit, says",
    (
        ("stock", {0: 32}, "ls", "one width; the nearest format is hf"),
        ("stock", {0: 32, 1: 32, 2: 32}, "bias", "which the refit has made; the nearest format is hf"),
        ("zeroed", {0: 32}, "ls", "use format stock or hf"),
        ("decilm", {0: 32}, "bias", "use format gguf or hf"),
    ),
)
def test_formats_that_cannot_hold_it_say_so(toy_folder, tmp_path, format, widths, refit, says):
    edit = narrow(Decoder(load_model(toy_folder(), "fp32")), WINDOWS, mlp(widths), "l1", refit, 3).edit
    with pytest.raises(ValueError, match=says):
        export(toy_folder(), edit, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


# ---- the command line -----------------------------------------------------------------------------------------------


def run(call, folder, text, **changes):
    given = {
        "model_path": folder,
        "cal_dataset": text,
        "align": 8,
        "device": "cpu",
        "compute_dtype": "fp32",
        "cal_nsamples": 20,
        "ppl_eval_seqlen": 64,
        "target_ratio": 0.1,
    }
    return call(script.main, *flags(**{**given, **changes}))


def test_the_choices_are_the_tables():
    tables = allocation.ALLOCATIONS, CRITERIA, REFITS
    assert (script.ALLOCATIONS, script.CRITERIA, script.REFITS) == tuple(tuple(table) for table in tables)


@pytest.mark.parametrize("units", script.UNITS)
def test_one_command_writes_a_model_of_the_size_asked_for(call, toy_folder, text, tmp_path, units):
    given = {"allocation": "greedy", "units": units, "align": 4, "search_windows": 3}
    tried = run(call, toy_folder(), text, dry_run=True, **given)
    assert tried.code == 0 and not any(tmp_path.iterdir()), tried
    done = run(call, toy_folder(), text, output_dir=tmp_path / "out", **given)
    assert done.code == 0, done
    result = done.result
    assert result["widths"] == tried.result["widths"] and result["removed"] == tried.result["removed"]
    assert result["removed_percent"] == pytest.approx(tried.result["removed_percent"]) == pytest.approx(10, abs=1)
    model = load_model(tmp_path / "out", "fp32", trust_remote_code=True)
    assert parameter_count(model) == result["parameters"]
    info = model.config.pruning_info
    assert info["edit"]["criterion"] == "osscar" and info["edit"]["units"] == units


def test_blocks_of_an_order_go_first(call, toy_folder, text, tmp_path, searched):
    given = {"ppl_search_file": searched[2], "del_block_num": 1, "target_ratio": 0.3, "output_dir": tmp_path / "out"}
    result = run(call, toy_folder(), text, **given).result
    assert len(result["removed"]) == 1 and len(result["widths"]) == 3 - result["removed"][0].startswith("mlp")


@pytest.mark.parametrize(
    "name, changes, says",
    (
        ("llama", {"target_ratio": 0.9}, "ask for less, remove blocks first, or keep fewer channels"),
        ("llama", {"target_ratio": 0}, "--target-ratio"),
        ("llama", {"target_ratio": None}, "--target-ratio is missing"),
        ("llama", {"output_dir": None}, "--output-dir is missing"),
        ("llama", {"units": "blocks,channels"}, "only --allocation greedy"),
        ("llama", {"format": "zeroed"}, "--format zeroed"),
        ("llama", {"search_windows": 999}, "--search-windows 999: the text has"),
        ("llama", {"del_block_num": 2}, "--ppl-search-file"),
        ("mixtral", {}, "MixtralDecoderLayer: its MLP is no pair of linear projections"),
        ("gpt2", {}, "c_fc: Conv1D"),
    ),
)
def test_what_cannot_be_is_refused_before_weights_are_read(call, toy_folder, text, tmp_path, name, changes, says):
    before = tree(tmp_path)
    assert_refused(run(call, toy_folder(name), text, **{"output_dir": tmp_path / "out", **changes}), says)
    assert tree(tmp_path) == before


def test_a_quantised_checkpoint_is_refused(call, damaged, text, tmp_path):
    quantised = b'{"quantization_config": {"quant_method": "gptq", "bits": 4},'
    folder = damaged("config.json", lambda config: config.replace(b"{", quantised, 1))
    assert_refused(run(call, folder, text, output_dir=tmp_path / "out"), "quantised")


def test_too_little_text_warns_of_the_rank(call, toy_folder, text, tmp_path):
    given = {"cal_nsamples": 1, "ppl_eval_seqlen": 8, "output_dir": tmp_path / "out"}
    done = run(call, toy_folder("llama", intermediate_size=512), text, **given)
    assert done.code == 0 and "tokens of text for 512 channels: their sums have no full rank" in done.err


def test_a_layer_that_would_keep_nothing_is_refused():
    decoder = Decoder(toy("llama"))
    for widths, says in (({0: 0}, "keep 1..48"), ({1: 49}, "keep 1..48"), ({7: 3}, "mlp7 is not there")):
        with pytest.raises(ValueError, match=says):
            narrow(decoder, WINDOWS, mlp(widths))


@pytest.mark.parametrize("name, folders", (("llama", "toy"), ("qwen3", "toy"), ("llama", "gguf"), ("qwen2", "gguf")))
def test_an_export_with_fewer_heads_in_some_layers_is_the_model_in_memory(toy_folder, folder, tmp_path, name, folders):
    path, format = (toy_folder(name), "hf") if folders == "toy" else (folder(name), "gguf")
    decoder, ids = Decoder(load_model(path, "fp32")), torch.tensor([test_export_gguf.IDS])
    ids = ids % decoder.model.config.vocab_size
    widths = {Block("mha", 0): 1, Block("mha", 2): 1, Block("mlp", 0): 24}
    edit = narrow(decoder, WINDOWS, widths, removed=[Block("mha", 1)]).edit
    with applied(decoder, edit), torch.inference_mode():
        expected = decoder.model(ids).logits[0]
    written = export(path, edit, tmp_path / "out", format)
    if format == "gguf":
        found = test_export_gguf.by_llama_cpp(tmp_path / "out" / "model.gguf")
        assert (found - expected.log_softmax(-1)[7:12]).abs().max() < 1e-4
        return
    model = load_model(tmp_path / "out", "fp32", trust_remote_code=True)
    assert parameter_count(model) == written["parameters"]
    with torch.inference_mode():
        assert (model(ids).logits[0] - expected).abs().max() < 1e-4
        one = model.generate(ids, max_new_tokens=6, do_sample=False)  # its cache has fewer heads in these layers
        assert torch.equal(one, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))
    for other, says in (("stock", "fewer heads than others"), ("decilm", "fewer heads than others|is for llama")):
        with pytest.raises(ValueError, match=says):
            export(path, edit._replace(removed=()), tmp_path / other, other)
