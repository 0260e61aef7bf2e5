"""What blocks cost, against counts by hand, real caches and a profiler's flops."""

import json

import pytest
import torch
from families import L, toy

from lib import costs, measure
from lib.blocks import Block
from lib.decoder import Decoder, find_layers
from lib.model import parameter_count

EVERY = [Block(kind, i) for kind in ("mha", "mlp") for i in range(L)]


def cost_of(name, model, **options):
    return costs.counted(name, model, find_layers(model), **options)


@pytest.mark.parametrize("name", ("llama", "llama-bias", "gptj", "mixtral", "bloom"))
def test_parameters_are_those_that_removing_takes(name):
    model = toy(name)
    cost, removed = cost_of("parameters", model), [Block("mha", 0), Block("mlp", 1), Block("mlp", 0)]
    assert cost.whole == parameter_count(model)
    gone = cost.of(removed)
    assert cost.share(removed) == gone / cost.whole
    Decoder(model).remove(removed)
    assert parameter_count(model) == cost.whole - gone


@pytest.mark.parametrize("name", ("llama", "gemma3", "gpt2", "qwen2"))
def test_kv_is_what_real_caches_lose(name):
    model, removed = toy(name), [Block("mha", 0), Block("mlp", 1), Block("mha", 2)]
    cost = cost_of("kv", model)
    assert cost.whole == measure.kv_per_token(model)
    with Decoder(model).masked(removed):
        without = measure.kv_per_token(model, lambda: measure.cache_without(model.config, removed))
    assert cost.whole - cost.of(removed) == without == cost.whole / 3
    assert cost.of([Block("mlp", 0)]) == 0
    assert cost.share([Block("layer", i) for i in range(L)]) == 1


@pytest.mark.parametrize("name", ("llama", "llama-bias", "qwen3", "gpt2", "opt"))
def test_flops_of_weights_are_a_profilers(name):
    from torch.utils.flop_counter import FlopCounterMode

    model, T = toy(name), 16

    def profiled(masked):
        with FlopCounterMode(display=False) as counter, torch.inference_mode(), Decoder(model).masked(masked):
            counter.flop_counts.clear()
            model(input_ids=torch.arange(T)[None], use_cache=False)
        products = counter.get_flop_counts()["Global"]
        return sum(n for op, n in products.items() if "attention" not in str(op) and "bmm" not in str(op)) / T

    cost = cost_of("flops", model, context=-1)  # a token that sees nothing: its weights alone
    dense = profiled([])
    assert cost.whole == dense
    for block in EVERY:
        assert cost.of([block]) == dense - profiled([block])


def test_flops_of_scores_grow_with_the_context_up_to_the_window():
    one, other = Block("mha", 0), Block("mha", 1)  # a window of 8 tokens, and none
    near, far = (cost_of("flops", toy("gemma2"), context=T) for T in (8, 108))
    assert far.of([one]) == near.of([one])
    assert far.of([other]) - near.of([other]) == 2 * 2 * 4 * 8 * 100  # two products, 4 heads of 8, 100 tokens more
    assert far.of([Block("mlp", 0)]) == near.of([Block("mlp", 0)])


@pytest.mark.parametrize("name", ("mixtral", "qwen3-moe", "gpt-oss", "deepseek-v3", "granite-moe"))
def test_flops_count_the_experts_that_a_token_visits(name):
    half, all_of_them = (cost_of("flops", toy(name, num_experts_per_tok=n)).of([Block("mlp", 1)]) for n in (2, 4))
    model = toy(name)
    experts = sum(
        p.numel()
        for n, p in model.named_parameters()
        if ".1." in n and (".experts." in n or p.ndim == 3) and p.ndim > 1
    )
    assert all_of_them - half == experts  # half of two flops a weight


def test_what_cannot_be_counted_is_said():
    model = toy("llama")
    for layer in model.model.layers:
        del layer.self_attn.layer_idx
    with pytest.raises(ValueError, match="no attention tells its layer.*use one of parameters, flops, latency"):
        cost_of("kv", model)


def test_seconds_add_up_and_what_is_shared_counts_once():
    seconds = costs.BlockSeconds("f", "cpu", "fp32", 3, (1, 8), mha=2.0, mlp=3.0, rest=5.0)
    cost = costs.cost_of_seconds(seconds)
    assert cost.whole == 20
    assert cost.of([Block("mha", 0), Block("layer", 0), Block("mlp", 2)]) == 2 + 3 + 3


def test_a_budget_is_met_at_its_share():
    cost = costs.cost_of_seconds(costs.BlockSeconds("f", "cpu", "fp32", 3, (1, 8), mha=2.0, mlp=3.0, rest=5.0))
    budget = costs.Budget(cost, 0.25)
    assert not budget.met([Block("mha", 0)])
    assert budget.met([Block("mha", 0), Block("mlp", 0)])


GOOD = {
    "weights": "f", "device_name": "cpu", "dtype": "fp32", "layers": 3, "tokens": [1, 8], "mha": 2.0, "mlp": 3.0,
    "rest": 5.0,
}  # fmt: skip


def written(tmp_path, text):
    path = tmp_path / "seconds.json"
    path.write_text(text)
    return path


def test_seconds_are_read_back(tmp_path):
    assert costs.read_seconds(written(tmp_path, json.dumps(GOOD)), "f", "cpu", "fp32").mlp == 3.0


@pytest.mark.parametrize(
    "changes, says",
    (
        ({"weights": "g"}, "measured of another model .g there, f now.; measure this one"),
        ({"device_name": "H100"}, "measured of another device .H100 there, cpu now."),
        ({"dtype": "bf16"}, "measured of another dtype"),
        ({"mha": 0.0}, "does not hold the seconds of one attention and one MLP"),
        ({"mlp": "nan"}, "does not hold the seconds"),
        ({"mlp": None}, "does not hold the seconds"),
    ),
)
def test_seconds_of_something_else_are_refused(tmp_path, changes, says):
    with pytest.raises(ValueError, match=says) as error:
        costs.read_seconds(written(tmp_path, json.dumps(GOOD | changes)), "f", "cpu", "fp32")
    assert "\n" not in str(error.value)


def test_no_file_of_seconds_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file; measure it with python -m scripts.bench_model"):
        costs.read_seconds(tmp_path / "none.json", "f", "cpu", "fp32")
    for text in ("[]", "{", "{}", "\x00"):
        with pytest.raises(ValueError, match="does not hold the seconds"):
            costs.read_seconds(written(tmp_path, text), "f", "cpu", "fp32")
