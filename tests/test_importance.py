"""Every metric against a computation of its own on the plain model: hooks, zeros, layers taken out; nothing shared.

And the command line of all of them: block_search.py --metric, --block-type layer, --protect-*, --target-ratio.
"""

import copy
import json
import math

import pytest
import torch
from command_line import tree
from families import V, toy
from searching import cached, exhaustive, judging, race, streamed

from lib.blocks import Block
from lib.decoder import Decoder
from lib.importance import METRICS, _roomy, ranked, require_weights
from lib.orders import read_order
from lib.schema import MARKS
from lib.similarity import similarities

L, W, T = 3, 5, 24
RUNS = [name for name, metric in METRICS.items() if metric.kind == "run"]
WINDOWS = torch.randint(V, (W, T), generator=torch.Generator().manual_seed(1))
SHAPES = ("llama", "gemma2", "gpt-neox")  # serial, norms after the branches, parallel
TYPES = ("mix", "layer")

# ---- the plain model, by hand --------------------------------------------------------------------
# Per family: layers, and of a layer the module whose output joins the stream for each kind, and all
# modules that belong to it. In gpt-neox both branches read the layer's input.

LAYERS = {"llama": "model.layers", "gemma2": "model.layers", "gpt-neox": "gpt_neox.layers"}
ENDS = {  # the last module of a branch: its output is what the stream gets
    "llama": {"mha": "self_attn", "mlp": "mlp"},
    "gemma2": {"mha": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"},
    "gpt-neox": {"mha": "attention", "mlp": "mlp"},
}
MODULES = {
    "llama": {"mha": ("self_attn", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")},
    "gemma2": {
        "mha": ("self_attn", "input_layernorm", "post_attention_layernorm"),
        "mlp": ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    },
    "gpt-neox": {"mha": ("attention", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")},
}


def layers_of(model, name):
    return model.get_submodule(LAYERS[name])


def kinds_of(unit):
    return ("mha", "mlp") if unit.kind == "layer" else (unit.kind,)


def forward(model, name, masked=()):
    """Return (logits, states entering each layer and after the last, branch outputs) with branches zeroed by hooks."""
    states, branches, hooks = [], {}, []

    def end(kind, i):
        def hook(module, args, output):
            f = output[0] if isinstance(output, tuple) else output
            f = f * 0 if (kind, i) in masked else f
            branches[kind, i] = f
            return (f, *output[1:]) if isinstance(output, tuple) else f

        return hook

    def catch(module, args, kwargs):
        states.append(args[0] if args else kwargs["hidden_states"])

    def after(module, args, output):
        final.append(output[0] if isinstance(output, tuple) else output)

    final, stack = [], layers_of(model, name)
    for i, layer in enumerate(stack):
        hooks.append(layer.register_forward_pre_hook(catch, with_kwargs=True))
        hooks += [layer.get_submodule(ENDS[name][kind]).register_forward_hook(end(kind, i)) for kind in ENDS[name]]
    hooks.append(stack[-1].register_forward_hook(after))
    with torch.no_grad():
        logits = model(input_ids=WINDOWS, use_cache=False).logits.double()
    for hook in hooks:
        hook.remove()
    return logits, [h.double() for h in [*states, *final]], {key: f.double() for key, f in branches.items()}


def masked_logits(model, name, unit):
    return forward(model, name, {(kind, unit.layer) for kind in kinds_of(unit)})[0]


def input_and_output(name, unit, states, branches):
    x, out = states[unit.layer], states[unit.layer + 1]
    if unit.kind == "layer":
        return x, out
    if unit.kind == "mlp" and name != "gpt-neox":
        x = x + branches["mha", unit.layer]
    return x, x + branches[unit.kind, unit.layer]


def cosine(a, b):
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def plain_perplexity(logits, ids=WINDOWS):
    means = [torch.nn.functional.cross_entropy(x[:-1], y[1:]) for x, y in zip(logits, ids, strict=True)]
    return math.exp(sum(means) / len(means))


def weights(model, name, unit):
    layer = layers_of(model, name)[unit.layer]
    names = [module for kind in kinds_of(unit) for module in MODULES[name][kind]]
    return [p for module in names for p in layer.get_submodule(module).parameters()]


def brute_force(metric, name, unit):
    """Return the score of one unit, from a fresh model and plain forward passes."""
    model = toy(name)
    if metric == "ppl":
        return plain_perplexity(masked_logits(model, name, unit))
    if metric == "kl":
        p = forward(model, name)[0].softmax(-1)
        q = masked_logits(model, name, unit).softmax(-1)
        return (p * (p / q).log()).sum(-1).mean().item()
    if metric in ("bi", "rm"):
        _, states, branches = forward(model, name)
        x, y = input_and_output(name, unit, states, branches)
        if metric == "bi":
            return 1 - cosine(x, y).mean().item()
        return ((y - x).norm(dim=-1) / (y.norm(dim=-1) + 1e-6)).mean().item()
    if metric == "magnitude":
        return sum(p.double().abs().sum().item() for p in weights(model, name, unit))
    for ids in WINDOWS:  # taylor: transformers' own loss, a window at a time
        model(input_ids=ids[None], labels=ids[None], use_cache=False).loss.backward()
    return sum((p.double() * p.grad.double()).abs().sum().item() for p in weights(model, name, unit))


@pytest.mark.parametrize("block_type", TYPES)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("metric", ("bi", "rm", "taylor", "magnitude", "ppl", "kl"))
def test_a_metric_is_its_formula_on_the_plain_model(metric, name, block_type):
    decoder = Decoder(toy(name))
    units = decoder.blocks(block_type)
    scores = judging(metric)(decoder, units, WINDOWS, batch_size=2)
    assert list(scores) == units, "ties are decided by this order"
    assert scores == pytest.approx({unit: brute_force(metric, name, unit) for unit in units}, rel=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_windows_of_layers_are_their_formulas_on_the_plain_model(name):
    decoder, states = Decoder(toy(name)), forward(toy(name), name)[1]
    for n in range(1, L + 1):
        angles = {
            i: cosine(states[i][:, -1], states[i + n][:, -1]).arccos().mean().item() / math.pi for i in range(L - n + 1)
        }
        assert METRICS["angular"].function(decoder, n, WINDOWS, batch_size=2) == pytest.approx(angles, rel=1e-5)
        cosines = {i: 1 - cosine(states[i], states[i + n]).mean().item() for i in range(L - n + 1)}
        assert METRICS["window_cos"].function(decoder, n, WINDOWS, batch_size=2) == pytest.approx(cosines, rel=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_window_ppl_is_every_window_removed_from_the_model(name):
    decoder = Decoder(toy(name))
    for n in (1, 2, 3):
        expected = {}
        for i in range(L - n + 1):
            model = toy(name)
            parent = model.get_submodule(LAYERS[name].rpartition(".")[0])
            parent.layers = torch.nn.ModuleList([*parent.layers[:i], *parent.layers[i + n :]])
            if name == "gemma2":  # masks go by the place of a layer
                types = model.config.layer_types
                model.config.layer_types = types[:i] + types[i + n :]
            model.config.num_hidden_layers = L - n
            with torch.no_grad():
                expected[i] = plain_perplexity(model(input_ids=WINDOWS, use_cache=False).logits.double())
        assert METRICS["window_ppl"].function(decoder, n, WINDOWS, batch_size=2) == pytest.approx(expected, rel=1e-5)


def test_protected_layers_are_in_no_window():
    decoder = Decoder(toy("llama", num_hidden_layers=6))
    for metric in (METRICS[name].function for name in RUNS):
        everywhere = metric(decoder, 2, WINDOWS)
        assert list(everywhere) == [0, 1, 2, 3, 4]
        assert metric(decoder, 2, WINDOWS, first=1, last=2) == {i: everywhere[i] for i in (1, 2)}


def test_the_lowest_score_goes_first_and_of_equal_ones_the_first():
    a, b, c, d = (Block("mha", i) for i in range(4))
    assert ranked({a: 2.0, b: 1.0, c: math.nan, d: 1.0}) == [b, d, a]
    assert ranked({a: math.inf, b: -math.inf, c: 0.0}) == [c]


def test_last_goes_from_the_top_and_random_is_a_draw():
    decoder = Decoder(toy("llama"))
    order = ranked(METRICS["last"].function(decoder, decoder.blocks(), WINDOWS))
    assert list(map(str, order)) == ["mlp2", "mha2", "mlp1", "mha1", "mlp0", "mha0"]
    order = ranked(METRICS["last"].function(decoder, decoder.blocks("layer"), WINDOWS))
    assert list(map(str, order)) == ["layer2", "layer1", "layer0"]
    draws = [
        tuple(ranked(METRICS["random"].function(decoder, decoder.blocks(), WINDOWS, seed=seed))) for seed in range(20)
    ]
    assert len(set(draws)) > 15 and all(sorted(draw) == sorted(decoder.blocks()) for draw in draws)
    assert draws[3] == tuple(ranked(METRICS["random"].function(decoder, decoder.blocks(), WINDOWS, seed=3)))


# ---- what it costs -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("llama", "gemma2", "gpt-neox", "bloom", "mixtral"))
def test_all_similarities_of_all_windows_come_from_one_forward_pass(name):
    decoder = Decoder(toy(name))
    units = decoder.blocks("layer") if name == "gpt-neox" else decoder.blocks() + decoder.blocks("layer")
    decoder.counts.clear()
    found = similarities(decoder, units, WINDOWS, batch_size=2)
    assert decoder.counts == {"mha": W * L, "mlp": W * L}, "each block once a window, and no head"
    for n in range(1, L + 1):
        assert {i: found.angular[i, i + n].item() for i in range(L - n + 1)} == pytest.approx(
            METRICS["angular"].function(decoder, n, WINDOWS), rel=1e-9
        )
        assert {i: 1 - found.pairs[i, i + n].item() for i in range(L - n + 1)} == pytest.approx(
            METRICS["window_cos"].function(decoder, n, WINDOWS), rel=1e-9
        )
    for unit in decoder.blocks("layer"):
        assert found.cos[unit] == pytest.approx(found.pairs[unit.layer, unit.layer + 1].item(), abs=1e-12)


def test_a_parallel_layers_blocks_cost_one_pass_more():
    decoder = Decoder(toy("gpt-neox"))
    similarities(decoder, decoder.blocks(), WINDOWS, batch_size=2)
    assert decoder.counts == {"mha": 2 * W * L, "mlp": 2 * W * L}


def test_the_batch_size_decides_nothing():
    decoder = Decoder(toy("llama"))
    for name, metric in METRICS.items():
        if metric.kind != "once":
            continue
        one, five = (metric.function(decoder, decoder.blocks(), WINDOWS, batch_size=b) for b in (1, 5))
        assert one == pytest.approx(five, rel=1e-5), name


def test_taylors_gradients_are_summed_where_there_is_room(monkeypatch):
    free = {"cuda:0": (100, 10**6), "cuda:1": (1000, 10**6)}
    monkeypatch.setattr("lib.importance.free_bytes", free.get)
    assert _roomy({"cuda:0": 59, "cuda:1": 599}) == {"cuda:0", "cuda:1"}
    assert _roomy({"cuda:0": 61, "cuda:1": 599}) == {"cuda:1"}, "a GPU's own room, not the host's"


def test_taylor_leaves_the_model_as_it_was():
    model = toy("llama").requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    decoder = Decoder(model)
    METRICS["taylor"].function(decoder, decoder.blocks(), WINDOWS)
    with pytest.raises(IndexError):
        METRICS["taylor"].function(decoder, decoder.blocks(), WINDOWS + V)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_quantised_weights_are_refused_by_name():
    model = toy("llama")
    decoder = Decoder(model)
    require_weights(decoder, decoder.blocks(), "--metric taylor", inside=True)
    model.model.layers[1].mlp.register_buffer("qweight", torch.zeros(4, dtype=torch.int32))
    for metric in ("taylor", "magnitude"):
        with pytest.raises(ValueError, match=f"{metric}: the weights of this LlamaForCausalLM are quantised"):
            METRICS[metric].function(decoder, decoder.blocks(), WINDOWS)


# ---- whole layers in the search ------------------------------------------------------------------


def sleb(model, name, K):
    """Greedy removal of whole layers by plain forwards."""
    removed, steps = [], []
    for _ in range(K):
        scores = {}
        for i in range(L):
            if i not in removed:
                gone = {(kind, j) for kind in ("mha", "mlp") for j in [*removed, i]}
                scores[Block("layer", i)] = plain_perplexity(forward(model, name, gone)[0])
        removed.append(min(scores, key=scores.get).layer)
        steps.append((removed[-1], scores))
    return steps


@pytest.mark.parametrize("name", SHAPES)
def test_the_search_of_layers_is_sleb_by_brute_force(name):
    expected = sleb(toy(name), name, L)
    decoder = Decoder(toy(name))
    steps = list(cached(decoder, decoder.blocks("layer"), WINDOWS, L, batch_size=2))
    assert [step.block for step in steps] == [Block("layer", i) for i, _ in expected]
    for step, (_, scores) in zip(steps, expected, strict=True):
        assert step.scores == pytest.approx(scores, rel=1e-5)


@pytest.mark.parametrize("objective", ("ppl", "kl"))
@pytest.mark.parametrize("name", SHAPES)
def test_every_engine_gives_layers_and_divergences_the_same_bits(name, objective):
    from lib.evaluate import OBJECTIVES

    decoder = Decoder(toy(name))
    state = WINDOWS[:3].numel() * 32 * 4
    for units in (decoder.blocks("layer"), decoder.blocks())[: 2 if objective == "kl" else 1]:
        given = (decoder, units, WINDOWS[:3], 2)
        same = {"batch_size": 2, "objective": OBJECTIVES[objective]}
        expected = [(s.block, s.score, s.scores) for s in exhaustive(*given, **same)]
        runs = [cached(*given, **same, cache_bytes=budget) for budget in (0, 5 * state, 10**9)]
        for steps in (*runs, race(*given, **same, confidence=math.inf), streamed(*given, **same)):
            assert [(s.block, s.score, s.scores) for s in steps] == expected


def test_a_search_of_the_divergence_is_greedy_on_the_plain_model():
    model, decoder = toy("llama"), Decoder(toy("llama"))
    from lib.evaluate import OBJECTIVES

    dense, removed = forward(model, "llama")[0].log_softmax(-1), []
    for step in cached(decoder, decoder.blocks(), WINDOWS, 4, batch_size=2, objective=OBJECTIVES["kl"]):
        scores = {}
        for block in decoder.blocks():
            if block not in removed:
                q = forward(model, "llama", {*removed, block})[0].log_softmax(-1)
                scores[block] = (dense.exp() * (dense - q)).sum(-1).mean().item()
        assert step.scores == pytest.approx(scores, rel=1e-5)
        removed.append(min(scores, key=scores.get))
        assert step.block == removed[-1]


@pytest.mark.parametrize("name", SHAPES)
def test_a_layer_is_both_its_blocks_wherever_it_is_named(name):
    decoder = Decoder(toy(name))
    layer, both = [Block("layer", 1)], [Block("mha", 1), Block("mlp", 1)]
    assert decoder.block_parameters(layer) == decoder.block_parameters(both) > 0
    with torch.no_grad():
        with decoder.masked(layer):
            expected = decoder.model(input_ids=WINDOWS, use_cache=False).logits
        decoder.remove(layer)
        assert torch.equal(decoder.model(input_ids=WINDOWS, use_cache=False).logits, expected)
    assert decoder.removed == set(both) and decoder.block_parameters(layer) == 0
    assert decoder.blocks("layer") == [Block("layer", 0), Block("layer", 2)]
    assert decoder.kinds(0, layer) and not decoder.kinds(0, [Block("layer", 0)])


# ---- the command line ----------------------------------------------------------------------------

EVERY = [(name, kind) for kind in TYPES for name, m in METRICS.items() if kind == "layer" or m.kind != "run"]


def test_settings_of_another_method_are_not_continued(search, refused):
    search(protect_first=1)
    refused("protect_first 1 there, 0 now", "--overwrite")


def test_an_order_from_before_there_were_metrics_is_continued(search):
    run = search(del_block_num=2)
    path = run.result["order_file"]
    entries = json.loads(open(path).read())
    for key in ("metric", "protect_first", "protect_last", "window"):
        del entries["meta"][key]
    for key in MARKS[1:]:
        del entries["meta"][key]
    with open(path, "w") as f:
        json.dump(entries, f)
    assert "resuming      2 removals" in search(del_block_num=3).out


@pytest.mark.parametrize("metric, block_type", [(m, t) for m, t in EVERY if m in ("ppl", "last", "random", "angular")])
def test_a_ratio_is_reached_with_the_fewest_removals(search, toy_folder, metric, block_type):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(toy_folder())
    decoder, total = Decoder(model), sum(p.numel() for p in model.parameters())
    for ratio in (0.05, 0.25, 0.5):
        run = search(metric=metric, block_type=block_type, target_ratio=ratio, del_block_num=None, overwrite=True)
        order, _ = read_order(run.result["order_file"])
        assert run.code == 0 and run.result["removed_percent"] >= 100 * ratio
        assert decoder.block_parameters(order[: -2 if block_type == "layer" else -1]) < ratio * total
        assert (
            "nothing to do" in search(metric=metric, block_type=block_type, target_ratio=ratio, del_block_num=None).out
        )


def test_protected_layers_stay(search):
    for metric, block_type in (("ppl", "mix"), ("kl", "layer"), ("last", "mix"), ("angular", "layer"), ("bi", "layer")):
        run = search(metric=metric, block_type=block_type, del_block_num=2, protect_first=1, protect_last=1)
        assert {name[3:] for name in run.result["order"]} == {"1"}, (metric, run)


def test_dry_runs_of_metrics_write_nothing(search, tmp_path):
    before = tree(tmp_path)
    assert search(dry_run=True, metric="bi").result["evaluations"] == 1
    assert search(dry_run=True, metric="ppl-oneshot").result["evaluations"] == 6
    assert search(dry_run=True, metric="window_ppl", block_type="layer").result["evaluations"] == 3
    assert search(dry_run=True, block_type="layer", del_block_num=4).result["evaluations"] == 3 + 2
    assert search(dry_run=True, target_ratio=0.5, del_block_num=None).result["evaluations"] <= 21
    assert tree(tmp_path) == before


def test_a_score_that_is_not_finite_is_never_chosen(search, damaged):
    import struct

    from safetensors.torch import load, save

    def spoil(content):
        weights = load(content)
        weights["model.layers.1.mlp.down_proj.weight"][0, 0] = struct.unpack("f", struct.pack("I", 0x7FC00000))[0]
        return save(weights, metadata={"format": "pt"})

    folder = damaged("model.safetensors", spoil)
    run = search(model_path=folder, metric="ppl-oneshot", del_block_num=1)
    assert run.code == 0 and run.result["order"] == ["mlp1"]
    run = search(model_path=folder, metric="ppl-oneshot", del_block_num=2)
    assert run.code == 1 and "all 5 candidates have a perplexity that is NaN or infinite" in run.err
    assert search(model_path=folder, metric="angular", block_type="layer", del_block_num=2).code == 0


# ---- bad input -----------------------------------------------------------------------------------


def test_methods_that_cannot_be_are_refused(refused):
    refused("--metric", "'shapley'", "taylor", "window_cos", metric="shapley")
    refused("--metric angular removes whole layers", "--block-type layer", metric="angular")
    refused("--metric taylor", "gradients", "drop --offload", metric="taylor", offload=True)
    refused("--search race", "--metric bi", "drop --search", metric="bi", search="race")
    refused("--del-block-num 3", "whole layers", "even", del_block_num=3, block_type="layer")


def test_ratios_that_cannot_be_reached_are_refused(refused):
    refused("--target-ratio", "'1.5'", "share from 0 to 1", target_ratio="1.5", del_block_num=None)
    refused("--target-ratio", "'few'", "share from 0 to 1", target_ratio="few", del_block_num=None)
    refused("--target-ratio", "--del-block-num", "not allowed", target_ratio="0.2", del_block_num=2)
    for changes in ({}, {"block_type": "layer"}, {"block_type": "layer", "metric": "angular"}):
        refused(
            "--target-ratio 0.5",
            "2 of 3 layers protected",
            "hold 0.",
            "use at most that",
            target_ratio=0.5,
            del_block_num=None,
            protect_first=1,
            protect_last=1,
            **changes,
        )
    refused("--target-ratio 0.9", "3 blocks (all mha)", target_ratio=0.9, del_block_num=None, block_type="mha")


def test_more_protected_layers_than_there_are_is_refused(refused):
    refused("--protect-first, --protect-last: 2 lowest and 2 topmost", "has 3", "0..3", protect_first=2, protect_last=2)
    refused(
        "--del-block-num 3",
        "2 blocks (1 mha + 1 mlp, 2 of 3 layers protected)",
        "0..2",
        del_block_num=3,
        protect_first=1,
        protect_last=1,
    )
    refused("--protect-first", "'-1'", protect_first="-1")
