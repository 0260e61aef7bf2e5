"""Masking, removing and stepping, for every family, against models whose output projections are zeroed by hand."""

import copy
import gc
import re
import weakref

import pytest
import torch
from families import PARALLEL, TOYS, V, toy

from lib.blocks import KINDS, Block
from lib.decoder import Decoder, find_layers
from lib.families import FAMILIES

EVERY = [*TOYS, "baichuan"]
IDS = torch.randint(V, (2, 24), generator=torch.Generator().manual_seed(3))
OUTPUTS = {  # the projections that write to the residual stream, found by name, not through lib.blocks
    "mha": r"(attn|attention|conv)\.(o_proj|out_proj|dense|c_proj)\.(weight|bias)$",
    "mlp": r"(down_proj|dense_4h_to_h|mlp\.c_proj|feed_forward\.w2|fc2|fc_out)([._]weight|[._]bias)?$",
}
# Two toys normalise the stream itself; that norm goes with its block.
NORMS_ON_STREAM = {
    "opt-post-norm": {"mha": ["self_attn_layer_norm"], "mlp": ["final_layer_norm"]},
    "bloom-post-norm": {"mha": ["input_layernorm"], "mlp": ["post_attention_layernorm"]},
}


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def zeroed(model, blocks, norms_on_stream):
    """Return a full-size copy whose `blocks` add exactly zero to the stream."""
    model = copy.deepcopy(model)
    for kind, i in blocks:
        hits = [p for name, p in find_layers(model)[i].named_parameters() if re.search(OUTPUTS[kind], name)]
        assert hits
        for parameter in hits:
            parameter.data.zero_()
        for norm in norms_on_stream.get(kind, ()):
            setattr(find_layers(model)[i], norm, torch.nn.Identity())
    return model


@pytest.mark.parametrize("name", EVERY)
def test_masking_and_removing_equal_zeroed_output_projections(name):
    model = toy(name)
    decoder = Decoder(model)
    chosen = [Block("mha", 0), Block("mlp", 1), Block("mha", 2), Block("mlp", 2)]
    expected = logits(zeroed(model, chosen, NORMS_ON_STREAM.get(name, {})))
    dense = logits(model)
    with decoder.masked(chosen):
        masked = logits(model)
    assert torch.equal(masked, expected)
    assert torch.equal(logits(model), dense), "masking left something behind"
    assert not torch.equal(masked, dense)
    decoder.remove(chosen)
    assert torch.equal(logits(model), masked)


@pytest.mark.parametrize("name", EVERY)
def test_each_block_changes_the_output_and_all_together_are_the_identity(name):
    decoder = Decoder(toy(name))
    dense = logits(decoder.model)
    for block in decoder.blocks():
        with decoder.masked([block]):
            assert not torch.equal(logits(decoder.model), dense), block
    stream = decoder.embed(IDS)
    with decoder.masked(decoder.blocks()):
        bare = logits(decoder.model)
    assert torch.equal(decoder.head(stream.h[0]), bare[0])


@pytest.mark.parametrize("name", EVERY)
def test_stepping_gives_the_losses_of_the_masked_model(name):
    decoder = Decoder(toy(name))
    masked = {Block("mlp", 0), Block("mha", 1)}
    with decoder.masked(masked):
        out = logits(decoder.model)[:, :-1].double()
    expected = torch.nn.functional.cross_entropy(out.transpose(1, 2), IDS[:, 1:], reduction="none")
    stream = decoder.embed(IDS)
    h = stream.h
    for i in range(decoder.n_layers):
        h = decoder.run(i, decoder.kinds(i, masked), h, stream)
    torch.testing.assert_close(decoder.token_losses(h, IDS).double(), expected, rtol=1e-5, atol=1e-5)
    assert decoder.counts["mha"] + decoder.counts["mlp"] == 2 * (2 * decoder.n_layers - 2)  # windows x blocks
    assert decoder.counts["head"] == 2


@pytest.mark.parametrize("name", EVERY)
def test_only_parallel_layers_have_no_state_between_their_blocks(name):
    assert Decoder(toy(name)).split == [name not in PARALLEL] * 3


@pytest.mark.parametrize("name", EVERY)
def test_removing_frees_exactly_the_blocks_parameters(name):
    model = toy(name)
    decoder = Decoder(model)
    before = sum(p.numel() for p in model.parameters())
    layer = decoder.layers[1]
    whole = sum(p.numel() for p in layer.parameters())
    both = decoder.block_parameters([Block("mha", 1), Block("mlp", 1)])
    assert both == whole, "a layer without its blocks has no parameters of its own"
    for block in (Block("mlp", 1), Block("mha", 1)):
        promised = decoder.block_parameters([block])
        decoder.remove([block])
        after = sum(p.numel() for p in model.parameters())
        assert before - after == promised > 0
        before = after
    assert sum(p.numel() for p in layer.parameters()) == 0
    assert Block("mha", 1) not in decoder.blocks()
    with decoder.masked([Block("mlp", 1)]):
        logits(model)
    assert sum(p.numel() for p in model.parameters()) == before, "masking brought removed weights back"


def test_every_row_of_the_table_has_a_toy():
    seen = {type(find_layers(toy(name))[0]).__name__ for name in EVERY}
    assert set(FAMILIES) - seen <= {"BaichuanLayer"}, "the 13B class differs from the stand-in's in name only"


def test_blocks_come_in_the_papers_order():
    decoder = Decoder(toy("llama"))
    assert list(map(str, decoder.blocks())) == ["mha0", "mha1", "mha2", "mlp0", "mlp1", "mlp2"]
    assert list(map(str, decoder.blocks("mlp"))) == ["mlp0", "mlp1", "mlp2"]


def test_an_unknown_layer_is_refused_by_class_name():
    import transformers

    config = transformers.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(ValueError, match="MambaBlock.*FAMILIES"):
        Decoder(transformers.AutoModelForCausalLM.from_config(config))


def test_a_row_that_does_not_describe_the_model_is_refused(monkeypatch):
    row = FAMILIES["Gemma2DecoderLayer"]
    monkeypatch.setitem(FAMILIES, "Gemma2DecoderLayer", row._replace(mlp=("pre_feedforward_layernorm",)))
    with pytest.raises(ValueError, match="Gemma2DecoderLayer.*FAMILIES"):
        decoder = Decoder(toy("gemma2"))
        print(decoder.split)
    monkeypatch.setitem(FAMILIES, "LlamaDecoderLayer", FAMILIES["LlamaDecoderLayer"]._replace(mlp=("ffn",)))
    with pytest.raises(ValueError, match="LlamaDecoderLayer has none of the modules ffn"):
        Decoder(toy("llama"))


def test_masking_is_undone_when_a_forward_fails():
    decoder = Decoder(toy("llama"))
    dense = logits(decoder.model)
    with pytest.raises(ZeroDivisionError), decoder.masked(decoder.blocks()):
        raise ZeroDivisionError
    assert torch.equal(logits(decoder.model), dense)


def test_stepping_through_accelerates_hooks_gives_the_same_numbers(tmp_path):
    """A model spread by accelerate (here: two layers on disk) is stepped like one in memory."""
    from accelerate import dispatch_model

    plain = Decoder(toy("llama"))
    device_map = {
        "model.layers.1": "disk",
        "model.layers.2": "disk",
        "model.layers.0": "cpu",
        "lm_head": "cpu",
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
    }
    spread = Decoder(dispatch_model(toy("llama"), device_map, main_device="cpu", offload_dir=tmp_path))
    results = []
    for decoder in (plain, spread):
        stream = decoder.embed(IDS)
        h = stream.h
        for i in range(decoder.n_layers):
            h = decoder.run(i, KINDS[i % 2 :], h, stream)
        results.append(decoder.token_losses(h, IDS))
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon-rw"])
def test_batches_share_masks_and_rotations_and_compute_the_same(name):
    ids, other, short = IDS[:, :12], IDS[:, 12:], IDS[:1, :12]
    decoder, alone = Decoder(toy(name)), Decoder(toy(name))
    first, second = decoder.embed(ids), decoder.embed(other)
    given = [tensors_of(stream.calls) for stream in (first, second)]
    assert len(given[0]) == len(given[1]) > 0
    assert all(a is b for a, b in zip(*given, strict=True))
    apart = alone.embed(other)
    h, expected = second.h, apart.h
    for i in range(decoder.n_layers):
        h, expected = decoder.run(i, KINDS, h, second), alone.run(i, KINDS, expected, apart)
        assert torch.equal(h, expected)
    shorter, expected = decoder.embed(short), alone.embed(short)
    assert torch.equal(decoder.run(0, KINDS, shorter.h, shorter), alone.run(0, KINDS, expected.h, expected))
    held = [weakref.ref(tensor) for tensor in given[0]]
    del first, second, given, shorter
    gc.collect()
    assert not any(reference() is not None for reference in held), "nobody else keeps them"


def tensors_of(calls):
    if isinstance(calls, torch.Tensor):
        return [calls]
    items = calls.values() if isinstance(calls, dict) else calls if isinstance(calls, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors_of(item)]
