"""A batch that does not fit in memory is halved: injected errors, on a model for which the whole batch is the truth."""

import pytest
import torch
from families import toy

from lib.decoder import Decoder
from lib.engines import Cached, Exhaustive, judge
from lib.evaluate import OBJECTIVES, window_losses

ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried to"),
)


@pytest.fixture
def small(monkeypatch):
    """Return a function that makes the toy's Decoder, whose layers hold so many rows at once: (most, error, name)."""

    def make(most, error, name="llama"):
        torch.manual_seed(0)
        decoder = Decoder(toy(name, vocab_size=256))
        for layer in decoder.layers:
            forward = layer.forward

            def limited(h, *args, forward=forward, **kwargs):
                if len(h) > most:
                    raise error
                return forward(h, *args, **kwargs)

            monkeypatch.setattr(layer, "forward", limited)
        return decoder

    return make


WINDOWS = torch.randint(0, 256, (11, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_scores_are_those_of_batches_that_fit(small, error, objective):
    decoder = small(99, error)
    units = decoder.blocks()
    expected = judge(Exhaustive(decoder, units, WINDOWS, 8, OBJECTIVES[objective]), units)
    decoder = small(2, error)
    for made in (Exhaustive, Cached):
        scores = judge(made(decoder, units, WINDOWS, 8, OBJECTIVES[objective]), units)
        assert scores == pytest.approx(expected, rel=1e-5)
        assert min(scores, key=scores.get) == min(expected, key=expected.get)
    assert decoder.rows == 2 and len(decoder.notes) == 2  # from 8 to 4 to 2, and never again
    assert decoder.notes[-1].startswith("memory is full: windows are run 2 at a time")


def test_layers_whose_arguments_have_a_row_for_each_window(small):
    decoder = small(99, ERRORS[0], "bloom")
    expected = window_losses(decoder, WINDOWS, 8)
    assert torch.allclose(window_losses(small(3, ERRORS[0], "bloom"), WINDOWS, 8), expected, rtol=1e-5)


def test_kept_states_go_before_batches_are_halved(small):
    decoder = small(99, ERRORS[0])
    units, left = decoder.blocks(), [0]
    engine = Cached(decoder, units, WINDOWS, 8)
    expected = judge(engine, units)
    run = decoder.layers[2].forward

    def full(h, *args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise ERRORS[0]
        return run(h, *args, **kwargs)

    decoder.layers[2].forward = full
    left[0] = 1
    before = sum(engine._store.rooms.values())
    assert judge(engine, units) == expected and decoder.notes == [] and not left[0]
    assert sum(engine._store.rooms.values()) < before


def test_one_window_that_does_not_fit_is_the_error_that_scripts_know(small):
    with pytest.raises(torch.OutOfMemoryError, match="allocate memory"):
        window_losses(small(0, ERRORS[1]), WINDOWS, 8)


def test_other_errors_are_errors(small):
    with pytest.raises(RuntimeError, match="shapes"):
        window_losses(small(2, RuntimeError("shapes do not fit")), WINDOWS, 8)


def test_the_head_is_halved_too(small, monkeypatch):
    decoder = small(99, ERRORS[0])
    expected, losses = window_losses(decoder, WINDOWS, 8), decoder._losses

    def full(h, ids):
        if len(h) > 4:
            raise ERRORS[0]
        return losses(h, ids)

    monkeypatch.setattr(decoder, "_losses", full)
    assert torch.allclose(window_losses(decoder, WINDOWS, 8), expected, rtol=1e-6)
