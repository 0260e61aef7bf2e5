"""How many removals budgets need, against counting block by block."""

import pytest
from families import L, toy

from lib.blocks import Block
from lib.candidates import candidates
from lib.costs import Budget, counted
from lib.decoder import find_layers
from lib.model import parameter_count

ATTENTIONS = [Block("mha", i) for i in range(L)]
MLPS = [Block("mlp", i) for i in range(L)]
LAYERS = [Block(kind, i) for i in range(L) for kind in ("mha", "mlp")]


def chosen(model, *budgets, block_type="mix", **options):
    layers = find_layers(model)
    budgets = [Budget(counted(name, model, layers), share) for name, share in budgets]
    return candidates(layers, parameter_count(model), block_type, budgets=budgets, **options)


def test_a_budget_in_parameters_is_the_target_ratio():
    model = toy("llama")
    layers, total = find_layers(model), parameter_count(model)
    for ratio in (0.05, 0.2, 0.4):
        for block_type, order in (("mix", [*MLPS, *ATTENTIONS]), ("layer", LAYERS)):
            known = candidates(layers, total, block_type, ratio=ratio)
            one = chosen(model, ("parameters", ratio), block_type=block_type)
            assert (one.units, one.most) == (known.units, known.most)
            assert [one.enough(order[:k]) for k in range(7)] == [known.enough(order[:k]) for k in range(7)]
            assert one.serves([]) == known.units


def test_all_budgets_are_met_and_only_what_helps_may_go():
    model = toy("llama")
    both = chosen(model, ("kv", 0.6), ("parameters", 0.35))
    assert both.serves([]) == [*ATTENTIONS, *MLPS]
    assert both.enough(ATTENTIONS[:2]) is None  # two of three attentions: the cache, not the parameters
    assert both.serves(ATTENTIONS[:2]) == [ATTENTIONS[2], *MLPS]  # what is gone helps no more
    assert both.enough(MLPS) is None  # the other way round: now attentions only
    assert both.serves(MLPS) == ATTENTIONS
    assert both.enough([*ATTENTIONS[:2], *MLPS]) == 3
    assert both.most >= 5 and both.serves([*ATTENTIONS, *MLPS]) == []


def test_only_attentions_serve_the_cache():
    assert chosen(toy("llama"), ("kv", 0.5)).serves([]) == ATTENTIONS
    assert chosen(toy("llama"), ("kv", 0.5)).most == 2
    assert chosen(toy("llama"), ("kv", 0.5), block_type="layer").enough(LAYERS) == 4


@pytest.mark.parametrize(
    "budget, options, says",
    (
        (
            ("kv", 0.7),
            {"first": 1},
            r"a share of 0.7 of kv to remove: 4 blocks .*protected.* hold 0.6666 of it; use at",
        ),
        (("kv", 0.1), {"block_type": "mlp"}, "a share of 0.1 of kv to remove: .*all mlp.* hold 0.0 of it"),
        (("flops", 0.999), {}, "a share of 0.999 of flops to remove"),
        (("kv", 0.1), {"block_type": "layer", "consecutive": True}, "a run of layers is chosen by its length"),
    ),
)
def test_budgets_that_cannot_be_met_say_what_can(budget, options, says):
    with pytest.raises(ValueError, match=says) as error:
        chosen(toy("llama"), budget, **options)
    assert "\n" not in str(error.value)
