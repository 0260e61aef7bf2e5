"""Layer streaming: an offloaded model gives the numbers of one in memory, and moves each layer once."""

import shutil

import pytest
import torch
from families import V, toy
from memory import in_fresh_process, linux_only
from searching import exhaustive, judging, streamed

from lib.decoder import Decoder
from lib.evaluate import OBJECTIVES, window_losses
from lib.importance import METRICS
from lib.model import load_model

WINDOWS = torch.randint(V, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "bloom", "falcon-40b", "mixtral"])
def test_streamed_is_exhaustive_bit_for_bit(name):
    decoder = Decoder(toy(name))
    for block_type in ("mix", "mlp"):
        expected = list(exhaustive(decoder, decoder.blocks(block_type), WINDOWS, 3, batch_size=2))
        steps = list(streamed(decoder, decoder.blocks(block_type), WINDOWS, 3, batch_size=2))
        assert [(s.block, s.scores) for s in steps] == [(s.block, s.scores) for s in expected]


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "bloom", "mixtral"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_offloaded_model_gives_the_same_numbers(toy_folder, name, dtype):
    folder = toy_folder(name)
    inside = load_model(folder, dtype)
    outside = load_model(folder, dtype, offload=True)
    spread = Decoder(outside)
    assert all(p.is_meta for p in spread.layers.parameters()), "the layers' weights are not in memory"
    plain = Decoder(inside)
    expected = list(exhaustive(plain, plain.blocks(), WINDOWS, 3, batch_size=2))
    steps = list(streamed(spread, spread.blocks(), WINDOWS, 3, batch_size=2))
    assert [(s.block, s.scores) for s in steps] == [(s.block, s.scores) for s in expected]
    assert all(p.is_meta for p in spread.layers.parameters()), "each layer went back"


@pytest.fixture
def offloaded(toy_folder, monkeypatch):
    """A decoder of 3 offloaded layers, and a function that returns how often each was moved since it was last asked."""
    from accelerate.hooks import AlignDevicesHook

    decoder = Decoder(load_model(toy_folder("llama"), "fp32", offload=True))
    moved, plain = [], AlignDevicesHook.pre_forward

    def counted(hook, module, *args, **kwargs):
        moved.extend([module] if hook.offload else [])
        return plain(hook, module, *args, **kwargs)

    def moves():
        parts = [[m for m in layer.modules() if list(m.parameters(recurse=False))] for layer in decoder.layers]
        counts = [{moved.count(module) for module in modules} for modules in parts]
        moved.clear()
        assert all(len(count) == 1 for count in counts), "a layer moves as a whole"
        return [count.pop() for count in counts]

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", counted)
    return decoder, moves


def test_each_layer_is_moved_once_for_a_group_of_candidates(offloaded):
    """6 candidates, two a layer: a group starts at its first one's layer, and one candidate is the least it has."""
    decoder, moves = offloaded
    state = WINDOWS.numel() * 32 * 4
    expected = list(exhaustive(decoder, decoder.blocks(), WINDOWS, 2, batch_size=2))
    moves()
    budgets = {
        None: [1, 1, 1],
        7 * state: [1, 1, 1],
        4 * state: [1, 2, 2],
        3 * state: [1, 2, 3],
        3 * state - 1: [2, 4, 6],
        0: [2, 4, 6],
    }  # one state is the base model's
    for budget, times in budgets.items():
        steps = streamed(decoder, decoder.blocks(), WINDOWS, 2, batch_size=2, cache_bytes=budget)
        first = next(steps)
        assert moves() == times, budget
        for step, other in zip([first, *steps], expected, strict=True):
            assert (step.block, list(step.scores.items())) == (other.block, list(other.scores.items()))
        moves()


def test_each_layer_is_moved_once_for_all_batches(offloaded, monkeypatch):
    decoder, moves = offloaded
    inside = window_losses(decoder, WINDOWS, 3)
    assert moves() == [1, 1, 1]
    losses = window_losses(decoder, WINDOWS, 1)
    assert moves() == [1, 1, 1]
    torch.testing.assert_close(losses, inside, rtol=1e-5, atol=1e-5)
    OBJECTIVES["kl"](decoder, WINDOWS.split(1))
    assert moves() == [1, 1, 1]
    monkeypatch.setattr("lib.evaluate.free_bytes", lambda device: (0, 0))
    assert torch.equal(window_losses(decoder, WINDOWS, 1), losses)
    assert moves() == [3, 3, 3], "a batch at a time where there is no memory for more"


def test_each_layer_is_moved_once_for_a_run_of_layers(offloaded):
    decoder, moves = offloaded
    METRICS["window_ppl"].function(decoder, 2, WINDOWS, batch_size=1)
    assert moves() == [2, 2, 2], "runs start at layers 0 and 1"


def test_offloaded_weights_have_a_magnitude_and_no_gradient(toy_folder):
    inside, away = (Decoder(load_model(toy_folder("llama"), "fp32", offload=offload)) for offload in (False, True))
    units = inside.blocks("layer")
    for metric in ("magnitude", "ppl", "bi"):
        assert judging(metric)(away, units, WINDOWS) == judging(metric)(inside, units, WINDOWS)
    assert METRICS["window_ppl"].function(away, 1, WINDOWS) == METRICS["window_ppl"].function(inside, 1, WINDOWS)
    with pytest.raises(ValueError, match="taylor: needs gradients.*LlamaForCausalLM are offloaded"):
        METRICS["taylor"].function(away, units, WINDOWS)


MEMORY = """
from lib.decoder import Decoder
from lib.model import load_model
from searching import streamed
_, folder, small, how = sys.argv
def search(folder, offload):
    decoder = Decoder(load_model(folder, "bf16", offload=offload))
    next(streamed(decoder, decoder.blocks(), torch.arange(64).view(2, 32), 1))
    return decoder
search(small, True)  # whatever torch sets up once
print(peak(lambda: search(folder, how == "offload")))
"""


@linux_only
def test_weights_of_four_times_the_memory_are_searched(toy_folder, tmp_path):
    """Float32 files computed in bf16, so that no weight is a view of its file."""
    folder = tmp_path / "big"
    shutil.copytree(toy_folder("llama"), folder)
    model = toy("llama", vocab_size=256, hidden_size=256, intermediate_size=4096, num_hidden_layers=16)
    model.save_pretrained(folder)
    weights = 2 * sum(p.numel() for p in model.parameters())
    peaks = {how: in_fresh_process(MEMORY, folder, toy_folder("llama"), how)[0] for how in ("offload", "inside")}
    assert peaks["offload"] < weights / 4
    assert peaks["inside"] > weights, "the measure sees weights that are in memory"


STATES = """
from lib.decoder import Decoder
from lib.model import load_model
from searching import exhaustive, streamed
windows = torch.arange(4096).view(32, 128) % 256
def search(engine, **options):
    decoder = Decoder(load_model(sys.argv[1], "fp32", offload=True))
    next(engine(decoder, decoder.blocks(), windows, 1, batch_size=16, **options))
search(exhaustive)  # whatever torch sets up once
print(peak(lambda: search(exhaustive)))
for budget in sys.argv[2:]:
    print(peak(lambda: search(streamed, cache_bytes=int(budget))))
"""


@linux_only
def test_states_of_all_candidates_take_no_more_than_the_budget(toy_folder):
    """16 candidates and the base model have a state of 1 MiB each."""
    state, slack = 2**20, 4 * 2**20  # slack: small tensors and the allocator's own
    budgets = [0, 4 * state, 10**9]
    folder = toy_folder("llama", hidden_size=64, num_hidden_layers=8)
    plain, nothing, some, everything = in_fresh_process(STATES, folder, *budgets)
    assert nothing <= plain + 2 * state + slack, "one candidate's and the base model's"
    assert some <= plain + budgets[1] + slack
    assert everything > plain + budgets[1] + slack, "the measure sees what is held"
