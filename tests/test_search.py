"""The engines against a brute-force search by plain forward passes, and against each other, bit for bit."""

import functools
import math
import random

import pytest
import torch
from families import TOYS, V, toy
from memory import in_fresh_process, linux_only
from searching import cached, exhaustive, race
from test_refine import trained

from lib.blocks import Block
from lib.costs import counted
from lib.decoder import Decoder, block_parameters, find_layers
from lib.engines import Cached, Exhaustive, Streamed, judge
from lib.evaluate import Objective, dense_logits, last_states, next_token, perplexity, window_losses
from lib.memory import HOST, Store
from lib.search import NoFiniteCandidate, far_behind, greedy, price, spread
from lib.trajectories import Keeping, Trajectories

EVERY = [*TOYS, "baichuan"]
WINDOWS = torch.randint(V, (5, 24), generator=torch.Generator().manual_seed(1))
STATE = WINDOWS.numel() * 32 * 4  # bytes of one state of all windows, hidden size 32, float32


RACE = functools.partial(race, confidence=3.0)


def brute_force(model, kinds, K):
    """The paper's loop with nothing of lib.search: o_proj and down_proj zeroed, plain forwards, torch's loss."""

    def score(removed):
        saved = []
        for kind, i in removed:
            layer = model.model.layers[i]
            weight = layer.self_attn.o_proj.weight if kind == "mha" else layer.mlp.down_proj.weight
            saved.append((weight, weight.data.clone()))
            weight.data.zero_()
        with torch.inference_mode():
            logits = model(input_ids=WINDOWS, use_cache=False).logits.double()
        for weight, data in saved:
            weight.data.copy_(data)
        means = [torch.nn.functional.cross_entropy(x[:-1], ids[1:]) for x, ids in zip(logits, WINDOWS, strict=True)]
        return math.exp(sum(means) / len(means))

    removed, steps = [], []
    for _ in range(K):
        scores = {}
        for kind in kinds:
            for i in range(3):
                if (kind, i) not in removed:
                    scores[kind, i] = score([*removed, (kind, i)])
        removed.append(min(scores, key=scores.get))
        steps.append((removed[-1], scores))
    return steps


@pytest.mark.parametrize("block_type", ["mix", "mha", "mlp"])
def test_the_search_is_the_papers_by_brute_force(block_type):
    model = toy("llama")
    decoder = Decoder(model)
    K = 6 if block_type == "mix" else 3
    expected = brute_force(model, ("mha", "mlp") if block_type == "mix" else (block_type,), K)
    for engine in (exhaustive, cached):
        steps = list(engine(decoder, decoder.blocks(block_type), WINDOWS, K, batch_size=2))
        assert [tuple(s.block) for s in steps] == [block for block, _ in expected]
        for step, (block, scores) in zip(steps, expected, strict=True):
            assert {tuple(b): s for b, s in step.scores.items()} == pytest.approx(scores, rel=1e-5)
            assert step.score == step.scores[Block(*block)]


@pytest.mark.parametrize("name", EVERY)
def test_cached_is_exhaustive_bit_for_bit_whatever_the_budget(name):
    decoder, windows, state = Decoder(toy(name)), WINDOWS[:3], STATE * 3 // 5
    for block_type, K in (("mix", 4), ("mha", 3), ("mlp", 2)):
        blocks = decoder.blocks(block_type)
        expected = list(exhaustive(decoder, blocks, windows, K, batch_size=2))
        forwards = []
        # nothing kept; the base model's states; some candidates'; all
        for budget in (0, 3 * state, 6 * state, 10**9):
            steps = list(cached(decoder, blocks, windows, K, batch_size=2, cache_bytes=budget))
            assert [s.scores for s in steps] == [s.scores for s in expected]
            assert [s.block for s in steps] == [s.block for s in expected]
            assert [list(s.scores) for s in steps] == [list(s.scores) for s in expected], "ties: order of candidates"
            forwards.append(sum(s.block_forwards for s in steps))
        assert forwards == sorted(forwards, reverse=True), "more memory, fewer forwards"
        assert forwards[0] < sum(s.block_forwards for s in expected)


def trajectories(decoder, ids, plan):
    store = Store({HOST: plan.bytes})
    return Trajectories(decoder, decoder.embed(ids), plan, store, lambda h: decoder.token_losses(h, ids))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "falcon-7b", "mixtral"])
def test_losses_stay_identical_whatever_goes_and_comes_back(name):
    """A property: through random removals and restorations, under any budget, losses equal a run from scratch."""
    decoder = Decoder(toy(name))
    for seed in range(8):
        rng = random.Random(seed)
        blocks, removed = decoder.blocks(), set()
        budget = rng.choice([0, 5, 12, 20, 1000]) * STATE
        engine = Cached(decoder, blocks, WINDOWS, 2, cache_bytes=budget)
        for _ in range(rng.randint(3, 9)):
            left = [b for b in blocks if b not in removed]
            alive = rng.sample(left, rng.randint(1, len(left)))  # the race drops candidates
            losses = {block: {} for block in alive}
            batches = rng.sample(range(3), rng.randint(1, 3))  # and visits batches in an order of its own
            for k, block, token_losses in engine.losses(dict.fromkeys(batches, alive), removed):
                losses[block][k] = token_losses
            for block in alive:
                for k in batches:
                    expected = window_losses(decoder, engine.batches[k], 2, masked={*removed, block})
                    assert torch.equal(losses[block][k].double().sum(1), expected), (seed, removed, block)
            kept = [h for t in engine._trajectories for states in t.kept.values() for h in states.values()]
            assert sum(h.nbytes for h in kept) <= budget
            changed = set(rng.sample(blocks, rng.randint(1, 3)))  # what is there goes, what is gone comes back
            if len(removed ^ changed) < len(blocks):
                removed = removed ^ changed


def test_putting_a_block_back_costs_no_more_than_taking_it_out():
    """States below the lowest changed layer are kept, in whichever direction the set changed."""
    decoder = Decoder(toy("llama", num_hidden_layers=8))
    engine, top = Cached(decoder, decoder.blocks(), WINDOWS, 5, cache_bytes=10**9), Block("mlp", 6)
    asked = {0: [b for b in decoder.blocks() if b != top]}
    costs = []
    for removed in ((), (top,), (), (top,)):
        decoder.counts.clear()
        list(engine.losses(asked, removed))
        costs.append(decoder.counts["mha"] + decoder.counts["mlp"])
    assert max(costs[1:]) < costs[0] / 2 and costs[3] == costs[1]


def test_kept_states_stay_within_the_budget():
    decoder = Decoder(toy("llama", num_hidden_layers=6))
    for budget in (0, 3 * STATE, 7 * STATE, 20 * STATE, 31 * STATE, 10**9):
        plan = Keeping(decoder.blocks(), 6, STATE, budget)
        batches = [trajectories(decoder, ids, plan) for ids in WINDOWS.split(2)]
        removed = []
        for block in (Block("mlp", 4), Block("mha", 1), Block("mha", 5)):
            for batch in batches:
                left = [b for b in decoder.blocks() if b not in removed]
                list(batch.token_losses(left, removed))
            kept = sum(h.nbytes for batch in batches for states in batch.kept.values() for h in states.values())
            assert kept <= plan.bytes <= budget
            removed.append(block)
        assert kept > 0 or not budget


def test_an_iteration_costs_what_the_formula_says():
    """With everything kept: (1 - x^2)/2 of the exhaustive iteration, x the depth of the last removal."""
    decoder = Decoder(toy("llama", num_hidden_layers=24))
    plan = Keeping(decoder.blocks(), 24, STATE, 10**9)
    for q in (2, 12, 20):
        batch = trajectories(decoder, WINDOWS, plan)
        list(batch.token_losses(decoder.blocks(), []))
        removed = [Block("mha", q)]
        decoder.counts.clear()
        list(batch.token_losses([b for b in decoder.blocks() if b not in removed], removed))
        n = 47  # blocks left; exhaustive: each of them masked, the other 46 run
        share = (decoder.counts["mha"] + decoder.counts["mlp"]) / len(WINDOWS) / (n * (n - 1))
        x = 2 * q / n
        assert share == pytest.approx((1 - x**2) / 2, abs=0.03)


def test_race_without_confidence_bound_is_exhaustive():
    for name in ("llama", "gpt-neox", "bloom"):
        decoder = Decoder(toy(name))
        expected = list(exhaustive(decoder, decoder.blocks(), WINDOWS, 5, batch_size=2))
        steps = list(race(decoder, decoder.blocks(), WINDOWS, 5, batch_size=2, confidence=math.inf))
        assert [(s.block, s.score, s.scores) for s in steps] == [(s.block, s.score, s.scores) for s in expected]


def test_race_skips_what_it_drops():
    decoder = Decoder(toy("llama"))
    blocks = decoder.blocks()
    windows = torch.randint(V, (12, 24), generator=torch.Generator().manual_seed(2))
    everything = list(cached(decoder, blocks, windows, 3, batch_size=1))
    raced = list(race(decoder, blocks, windows, 3, batch_size=1, confidence=1.0))
    for k, step in enumerate(raced):
        base = 0 if k else len(windows)  # the dense model, above which the first rises are taken
        assert step.head_forwards == base + sum(step.windows.values()), "a head forward for each window seen, no more"
        assert step.windows[step.block] == len(windows), "the winner has seen every window"
        assert min(step.windows.values()) < len(windows)
    assert sum(s.block_forwards for s in raced) < sum(s.block_forwards for s in everything)
    # the survivors' scores are the exact ones while the same blocks are gone
    survivors = [b for b, seen in raced[0].windows.items() if seen == len(windows)]
    for block in survivors:
        assert raced[0].scores[block] == everything[0].scores[block]


def test_race_drops_by_the_error_of_few_windows_drawn_without_replacement():
    """Each candidate leaves after as many windows as a reading of the rule in numpy, on plain forwards, says."""
    decoder, z = Decoder(toy("llama")), 2.0
    N, windows = 12, torch.randint(V, (12, 24), generator=torch.Generator().manual_seed(2))
    losses = {}
    for block in decoder.blocks():
        with decoder.masked([block]), torch.inference_mode():
            logits = decoder.model(input_ids=windows, use_cache=False).logits[:, :-1].double()
        losses[block] = torch.nn.functional.cross_entropy(logits.mT, windows[:, 1:], reduction="none").numpy()
    left, expected = set(losses), {}
    for n in range(1, N):
        tokens = {block: losses[block][spread(N)[:n]].ravel() for block in left}
        leader = min(left, key=lambda block: tokens[block].mean())
        for block in left - {leader}:
            behind = tokens[block] - tokens[leader]
            error = (behind.var(ddof=1) / behind.size * (N - n) / (N - 1) * (n + 2) / n) ** 0.5
            if behind.mean() > z * error:
                expected[block] = n
                left = left - {block}
    expected |= dict.fromkeys(left, N)
    assert next(race(decoder, decoder.blocks(), windows, 1, batch_size=1, confidence=z)).windows == expected
    assert len(set(expected.values())) > 2, "candidates leave at different times, or this says little"


def test_race_brings_the_dropped_back_where_no_survivor_is_finite():
    """The leader, alone by then, overflows in the last window."""
    decoder = Decoder(toy("llama"))
    blocks = decoder.blocks()
    leader = next(race(decoder, blocks, WINDOWS[:1], 1, batch_size=1, confidence=3.5)).block
    fatal = last_states(decoder, [decoder.embed(WINDOWS[4:])], {leader})[0]

    def objective(decoder, batches):
        plain = next_token(decoder, batches)

        def losses(k, h):
            return plain.losses(k, h) * (math.inf if k == 4 and torch.equal(h, fatal) else 1)

        return Objective(losses, plain.score)

    seen = []
    step = next(race(decoder, blocks, WINDOWS, 1, (), 1, lambda *done: seen.append(done), objective, confidence=0.0))
    expected = next(exhaustive(decoder, blocks, WINDOWS, 1, (), 1, None, objective))
    assert expected.scores[leader] == math.inf and step.block != leader
    assert (step.block, step.scores) == (expected.block, expected.scores)
    assert set(step.windows.values()) == {5} and step.head_forwards == 5 + 30, "no window is scored twice"
    assert sum(windows for windows, _, _ in seen) == 30


def test_race_visits_far_windows_before_neighbours():
    """Of n windows the first k leave no gap much wider than n / k, so that no document decides alone."""
    for n in range(1, 60):
        order = spread(n)
        assert sorted(order) == list(range(n))
        for k in range(2, n + 1):
            seen = sorted(order[:k])
            gaps = [b - a for a, b in zip(seen, [*seen[1:], seen[0] + n], strict=True)]
            assert max(gaps) <= 3 * math.ceil(n / k), (n, k)


def test_race_decides_nothing_on_a_single_token():
    decoder = Decoder(toy("llama"))
    windows = WINDOWS[:, :2]
    expected = next(exhaustive(decoder, decoder.blocks(), windows, 1, batch_size=1))
    step = next(race(decoder, decoder.blocks(), windows, 1, batch_size=1, confidence=100))
    assert (step.block, step.scores) == (expected.block, expected.scores)
    step = next(race(decoder, decoder.blocks(), windows, 1, batch_size=1, confidence=0.0))
    assert min(step.windows.values()) == 2, "from two tokens on"
    assert step.windows[step.block] == 5


@pytest.mark.parametrize("engine, visits", [(cached, (0, 1, 2)), (RACE, (0, 2, 1))])
def test_progress_tells_the_score_of_the_windows_seen(engine, visits):
    decoder, told = Decoder(toy("llama")), {}
    step = next(
        engine(
            decoder, decoder.blocks(), WINDOWS, 1, (), 2, lambda n, b, score: told.setdefault(b, []).append((n, score))
        )
    )
    for block, calls in told.items():
        assert sum(n for n, _ in calls) == 5
        for k in range(len(calls) - 1):
            batches = [WINDOWS.split(2)[visit] for visit in visits[: k + 1]]
            losses = window_losses(decoder, torch.cat(batches), 2, {block})
            assert calls[k] == (len(batches[-1]), pytest.approx(perplexity(losses, 24), rel=1e-9))
        assert calls[-1][1] == step.scores[block]


@pytest.mark.parametrize("engine", [exhaustive, cached])
def test_resuming_is_passing_what_is_done(engine):
    decoder = Decoder(toy("llama"))
    whole = list(engine(decoder, decoder.blocks(), WINDOWS, 5, batch_size=2))
    rest = list(engine(decoder, decoder.blocks(), WINDOWS, 5, [s.block for s in whole[:2]], 2))
    assert [(s.block, s.scores) for s in rest] == [(s.block, s.scores) for s in whole[2:]]
    assert list(engine(decoder, decoder.blocks(), WINDOWS, 2, [s.block for s in whole[:3]], 2)) == []


@pytest.mark.parametrize("engine", [exhaustive, cached, RACE])
def test_a_candidate_that_is_not_finite_never_wins(engine):
    model = toy("llama")
    model.model.layers[1].mlp.down_proj.weight.data.fill_(math.nan)
    decoder = Decoder(model)
    step = next(iter(engine(decoder, decoder.blocks(), WINDOWS, 1, batch_size=2)))
    assert step.block == Block("mlp", 1), "the only candidate without the NaN"
    assert math.isfinite(step.score)
    assert sum(math.isnan(s) for s in step.scores.values()) == 5


@pytest.mark.parametrize("engine", [exhaustive, cached, RACE])
def test_when_no_candidate_is_finite_the_search_says_so(engine):
    model = toy("llama")
    decoder = Decoder(model)
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(NoFiniteCandidate) as caught:
        next(iter(engine(decoder, decoder.blocks(), WINDOWS, 1, batch_size=2)))
    assert len(caught.value.scores) == 6


def test_perplexity_is_the_exponential_of_the_mean_token_loss():
    losses = torch.tensor([3.0, 5.0], dtype=torch.float64)
    assert perplexity(losses, 5) == pytest.approx(math.exp(8 / 8))
    assert perplexity(losses * 1e6, 5) == math.inf
    assert math.isnan(perplexity(losses * math.nan, 5))


def test_a_target_that_equals_the_padding_token_counts():
    """The reference skips it; windows are cut from unpadded text, so here it is a token like any other."""
    model = toy("llama")
    model.config.pad_token_id = 7
    windows = WINDOWS.clone()
    windows[:, 5] = 7
    with torch.inference_mode():
        logits = model(input_ids=windows, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2).double(), windows[:, 1:], reduction="none"
    ).sum(1)
    torch.testing.assert_close(window_losses(Decoder(model), windows, 2), expected, rtol=1e-5, atol=1e-5)


PEAK = """
from families import toy
from lib.decoder import Decoder
from searching import cached, exhaustive
decoder = Decoder(toy("llama", hidden_size=64, num_hidden_layers=8))
windows = torch.randint(96, (32, 128))
search = lambda engine, **options: list(engine(decoder, decoder.blocks(), windows, 2, batch_size=16, **options))
list(exhaustive(decoder, decoder.blocks(), windows[:4], 1))  # whatever torch sets up once
print(peak(lambda: search(exhaustive)))
for budget in sys.argv[1:]:
    print(peak(lambda: search(cached, cache_bytes=int(budget))))
"""


@linux_only
def test_cached_takes_what_exhaustive_takes_and_its_budget():
    """Keeping everything takes 8 states of 1 MiB for the base model and up to 56 more."""
    budgets = [0, 12 * 2**20, 10**9]
    plain, nothing, some, everything = in_fresh_process(PEAK, *budgets)
    slack = 4 * 2**20  # small tensors and the allocator's own
    assert nothing <= plain + slack
    assert some <= plain + budgets[1] + slack
    assert everything > plain + budgets[1] + slack, "the measure sees what is kept"


def cheapest(scores, before, frees):
    """Of {block: perplexity}, the block of the least rise in loss per parameter; one that lowers the loss first."""
    rises = {block: math.log(score) - math.log(before) for block, score in scores.items()}
    lowered = {block: rise for block, rise in rises.items() if rise <= 0}
    return min(lowered, key=lowered.get) if lowered else min(rises, key=lambda block: rises[block] / frees(block))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ("llama", "gptj", "gpt2"))
def test_the_rule_per_parameter_is_brute_force(name, seed):
    model = toy(name, seed)
    decoder = Decoder(model)
    layers, units = find_layers(model), decoder.blocks("mix")
    cost = counted("parameters", model, layers)
    engine = Cached(decoder, units, WINDOWS, 2)
    removed, before = [], perplexity(window_losses(decoder, WINDOWS, 2), 24)
    for step in greedy(engine, units, 6, cost=cost):
        scores = {
            u: perplexity(window_losses(decoder, WINDOWS, 2, [*removed, u]), 24) for u in units if u not in removed
        }
        assert step.scores == scores
        gone = block_parameters(layers, removed)
        expected = cheapest(scores, before, lambda u, r=tuple(removed), g=gone: block_parameters(layers, [*r, u]) - g)
        assert step.block == expected and step.score == scores[expected]
        assert step.prices.keys() == scores.keys()
        before = step.score
        removed.append(step.block)


@pytest.mark.parametrize("seed", range(4))
def test_the_rule_does_not_prefer_small_blocks_of_any_objective(seed):
    model = toy("llama", seed, intermediate_size=960)  # an MLP of 30 attentions
    decoder = Decoder(model)
    layers, units = find_layers(model), decoder.blocks("mix")
    engine = Cached(decoder, units, WINDOWS, 2, dense_logits)
    (step,) = greedy(engine, units, 1, cost=counted("parameters", model, layers))
    rates = {u: score / block_parameters(layers, [u]) for u, score in step.scores.items()}  # from a divergence of 0
    assert step.block == min(rates, key=rates.get)
    assert step.block.kind == "mlp" and min(step.scores, key=step.scores.get).kind == "mha"


def test_the_rule_goes_on_where_it_was_cut_short():
    decoder = Decoder(toy("llama"))
    units, cost = decoder.blocks("mix"), counted("parameters", decoder.model, decoder.layers)
    whole = list(greedy(Cached(decoder, units, WINDOWS, 2), units, 5, cost=cost))
    rest = list(greedy(Cached(decoder, units, WINDOWS, 2), units, 5, [s.block for s in whole[:2]], cost=cost))
    assert [(s.block, s.scores, s.prices) for s in rest] == [(s.block, s.scores, s.prices) for s in whole[2:]]


@pytest.mark.parametrize("engine", (Exhaustive, Streamed))
def test_engines_agree_on_prices_bit_for_bit(engine):
    decoder = Decoder(toy("qwen2"))
    units, cost = decoder.blocks("mix"), counted("parameters", decoder.model, decoder.layers)
    one, other = (list(greedy(made(decoder, units, WINDOWS, 2), units, 4, cost=cost)) for made in (Cached, engine))
    assert [(s.block, s.prices) for s in one] == [(s.block, s.prices) for s in other]


def test_a_price_of_what_lowers_the_loss_comes_first():
    base = {0: torch.ones(1, 4), 1: torch.ones(1, 4)}

    def of(losses, frees):
        return price({0: torch.full((1, 4), losses)}, base, frees)

    assert of(1.5, 0.01) == 50 and of(1.5, 0.02) == 25  # the same rise for twice as much
    assert of(0.9, 0.01) == of(0.9, 0.02) < of(1.0, 0.01) == 0 < of(1.0001, 0.5)


@pytest.mark.parametrize("seed", range(4))
def test_a_race_for_prices_decides_as_without_a_race(seed):
    model, windows = trained(seed, layers=4, windows=12)
    decoder = Decoder(model)
    units, cost = decoder.blocks("mix"), counted("parameters", decoder.model, decoder.layers)
    exact = list(greedy(Cached(decoder, units, windows, 1), units, 4, cost=cost))
    raced = list(greedy(Cached(decoder, units, windows, 1), units, 4, confidence=3.0, cost=cost, audit=True))
    assert [s.block for s in raced] == [s.block for s in exact] == [s.audit for s in raced]
    assert any(n < 12 for s in raced for n in s.windows.values())


def test_who_was_far_behind_the_last_time_is_not_looked_at_and_the_rest_is():
    memory = {Block("mlp", i): (rise, 0.01) for i, rise in enumerate((0.1, 0.2, 0.25, 0.3, 0.5))}
    # from the leader's 0.12, twice that; an error of 0.01 counts twice
    assert {block.layer for block in far_behind(0.12, memory)} == {3, 4}
    assert {block.layer for block in far_behind(0.15, memory)} == {4}
    # a leader that costs little: half of the way from 0.1 to the median of 0.25
    assert {block.layer for block in far_behind(0.02, memory)} == {1, 2, 3, 4}
    noisy = {**memory, Block("mlp", 4): (0.5, 0.2)}
    assert Block("mlp", 4) not in far_behind(0.12, noisy)


def test_a_race_remembers_counts_whom_it_passed_over_and_an_audit_tells_when_it_was_wrong():
    model, windows = trained(1, layers=6, windows=12)
    decoder = Decoder(model)
    units = decoder.blocks("mix")
    steps = list(greedy(Cached(decoder, units, windows, 1), units, 4, confidence=3.0, audit=True))
    unseen = [[unit for unit, n in step.windows.items() if not n] for step in steps]
    assert not unseen[0] and any(unseen[1:])
    for step, some in zip(steps, unseen, strict=True):
        assert set(some).isdisjoint(step.scores) and step.windows[step.block] == 12
    done, engine = [], Cached(decoder, units, windows, 12)
    for step in steps:
        left = [unit for unit in units if unit not in done]
        scores = judge(engine, left, done)
        assert step.audit == min(left, key=scores.get)
        done.append(step.block)


def test_what_frees_nothing_of_the_cost_is_no_candidate():
    decoder = Decoder(toy("llama"))
    units, cost = decoder.blocks("mix"), counted("kv", decoder.model, decoder.layers)
    steps = list(greedy(Cached(decoder, units, WINDOWS, 2), units, 3, cost=cost))
    assert [s.block.kind for s in steps] == ["mha"] * 3
    assert all(block.kind == "mha" for s in steps for block in s.scores)
    with pytest.raises(NoFiniteCandidate):
        list(greedy(Cached(decoder, units, WINDOWS, 2), units, 4, cost=cost))
