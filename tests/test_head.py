"""The head on a GPU that tests make up: larger slices, the same losses; and the proof of a model on two GPUs."""

import pytest
import torch
from families import V, toy

from lib import decoder as blocks
from lib.decoder import Decoder
from lib.evaluate import last_states

IDS = torch.randint(V, (3, 128), generator=torch.Generator().manual_seed(1))  # as long as the positions of OPT reach


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU; what it holds is in the host's memory."""

    is_cuda = True


class OnOther(torch.Tensor):
    """On another GPU: torch refuses to compute on both."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if OnGpu in types:
            raise RuntimeError("Expected all tensors to be on the same device")
        return super().__torch_function__(func, types, args, kwargs)

    def to(self, device):
        return self.as_subclass(OnGpu)


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "gemma2"])
@pytest.mark.parametrize("tokens", [3 * 128, 2 * 128, 128, 127, 50, 1])
def test_slices_of_any_size_give_the_losses(name, tokens, monkeypatch):
    decoder = Decoder(toy(name))
    monkeypatch.setattr(blocks, "HEAD_LOGITS", tokens * V + 1)
    (h,) = last_states(decoder, [decoder.embed(IDS)])
    dense = decoder.embed(IDS).h
    there = h.as_subclass(OnGpu)
    slices = decoder._head_slices(there, 128)
    assert len(slices) == {384: 1, 256: 2, 128: 3, 127: 4, 50: 8, 1: 384}[tokens]
    assert torch.equal(torch.cat([x.as_subclass(torch.Tensor).flatten(0, 1) for x in slices]), h.flatten(0, 1))
    if tokens == 1 and name != "llama":
        return  # as many calls of the model as tokens: once is enough
    torch.testing.assert_close(decoder.token_losses(there, IDS).as_subclass(torch.Tensor), decoder.token_losses(h, IDS))
    found = decoder.divergences(there, dense.as_subclass(OnGpu)).as_subclass(torch.Tensor)
    torch.testing.assert_close(found, decoder.divergences(h, dense), rtol=1e-4, atol=1e-5)


def test_the_layers_are_bridged_once_for_all_slices(monkeypatch):
    decoder = Decoder(toy("llama"))
    (h,) = last_states(decoder, [decoder.embed(IDS)])
    monkeypatch.setattr(blocks, "HEAD_TOKENS", 50)
    bridged, slices, plain, call = [], [], decoder._layers_replaced, decoder.model.forward
    monkeypatch.setattr(decoder, "_layers_replaced", lambda *a: bridged.append(a) or plain(*a))
    monkeypatch.setattr(decoder.model, "forward", lambda *a, **k: slices.append(k) or call(*a, **k))
    decoder.token_losses(h, IDS)
    assert (len(bridged), len(slices)) == (1, 8), "3 windows of 127 tokens in slices of 50"


def test_the_proof_compares_across_gpus():
    x = torch.tensor([1.0, float("nan")])
    here, there = x.as_subclass(OnGpu), x.clone().as_subclass(OnOther)
    with pytest.raises(RuntimeError):
        torch.eq(here, there)
    assert blocks._same(here, there)
    assert not blocks._same(here, (x + 1).as_subclass(OnOther))
