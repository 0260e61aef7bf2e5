"""Layer streaming: an offloaded model gives the numbers of one in memory, and moves each layer once."""
import shutil

import pytest
import torch
from families import V, toy
from memory import in_fresh_process, linux_only

from lib.blocks import Decoder
from lib.model import load_model
from lib.search import exhaustive, streamed

WINDOWS = torch.randint(V, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "bloom", "falcon-40b", "mixtral"])
def test_streamed_is_exhaustive_bit_for_bit(name):
    decoder = Decoder(toy(name))
    for block_type in ("mix", "mlp"):
        expected = list(exhaustive(decoder, decoder.blocks(block_type), WINDOWS, 3, batch_size=2))
        steps = list(streamed(decoder, decoder.blocks(block_type), WINDOWS, 3, batch_size=2))
        assert [(s.block, s.scores) for s in steps] == [(s.block, s.scores) for s in expected]


def test_every_state_put_away_is_dropped_once(monkeypatch):
    """The device's budget holds only while puts and drops pair up; on a CPU nothing else would show it."""
    held = {}

    def put(store, h):
        kept = h.clone()
        held[id(kept)] = kept
        return kept

    monkeypatch.setattr("lib.search.Store.put", put)
    monkeypatch.setattr("lib.search.Store.drop", lambda store, kept: held.pop(id(kept)))
    decoder = Decoder(toy("llama"))
    for _ in streamed(decoder, decoder.blocks(), WINDOWS, 2, batch_size=2):
        assert held == {}


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


def test_each_layer_is_moved_once_in_an_iteration(toy_folder, monkeypatch):
    from accelerate.hooks import AlignDevicesHook

    model = load_model(toy_folder("llama"), "fp32", offload=True)
    decoder = Decoder(model)
    moves, plain = [], AlignDevicesHook.pre_forward

    def counted(hook, module, *args, **kwargs):
        moves.append(hook.offload)
        return plain(hook, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", counted)
    next(streamed(decoder, decoder.blocks(), WINDOWS, 1, batch_size=1))
    modules = [m for m in decoder.layers.modules() if list(m.parameters(recurse=False))]
    assert sum(moves) == len(modules)


MEMORY = """
from lib.blocks import Decoder
from lib.model import load_model
from lib.search import streamed
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
