"""A removed block multiplies the stream: in searches, in what is replayed and exported; against hooks."""

import json
import math

import pytest
import torch
from command_line import assert_refused, flags, unsealed
from families import toy
from test_repair import REMOVED, WINDOWS, deep, rms, same

from lib.blocks import KINDS, Block
from lib.decoder import Decoder
from lib.edits import applied
from lib.engines import Cached, Exhaustive, Streamed
from lib.evaluate import last_states
from lib.orders import held_passes, passes_in, read_order
from lib.repair.scale import folded, passes_of
from lib.search import greedy
from scripts import export


def logits(decoder, removed, ids):
    (h,) = last_states(decoder, [decoder.embed(ids)], removed)
    return torch.stack([decoder.head(x) for x in h])


def by_hooks(model, removed, passes, ids):
    """The logits of a Llama whose removed blocks add nothing and whose stream grows behind them, by plain hooks."""
    hooks = []

    def silent(module, args, output):
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    for i, layer in enumerate(model.model.layers):
        factors = {kind: passes[i, (kind,)] if (kind, i) in removed else 1.0 for kind in KINDS}
        for kind, module in (("mha", layer.self_attn), ("mlp", layer.mlp)):
            if (kind, i) in removed:
                hooks.append(module.register_forward_hook(silent))

        def forward(h, layer=layer, factors=factors, **rest):
            h = (h + layer.self_attn(layer.input_layernorm(h), **rest)[0]) * factors["mha"]
            return (h + layer.mlp(layer.post_attention_layernorm(h))) * factors["mlp"]

        layer.forward = forward
    try:
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
        for layer in model.model.layers:
            del layer.forward


def test_the_stepped_model_is_the_one_with_hooks():
    model = deep("llama")
    decoder = Decoder(model)
    passes = {(i, (kind,)): 1.1 + 0.1 * i + (kind == "mlp") for i in range(5) for kind in KINDS}
    with decoder.passing(passes):
        stepped = logits(decoder, REMOVED, WINDOWS[:2])
    assert same(stepped, by_hooks(model, REMOVED, passes, WINDOWS[:2]), 1e-5)
    assert not same(stepped, logits(decoder, REMOVED, WINDOWS[:2]), 1e-2)
    assert decoder.passes == {}


@pytest.mark.parametrize("name", ("llama", "gpt-neox"))
@pytest.mark.parametrize("engine", (Cached, Streamed))
def test_engines_agree_on_scaled_losses_bit_for_bit(name, engine):
    decoder = Decoder(deep(name))
    units = decoder.blocks("mix")
    with decoder.passing(passes_of(decoder, WINDOWS)):
        one, other = (list(greedy(made(decoder, units, WINDOWS, 2), units, 4)) for made in (Exhaustive, engine))
    plain = list(greedy(Exhaustive(decoder, units, WINDOWS, 2), units, 4))
    assert [(s.block, s.scores) for s in one] == [(s.block, s.scores) for s in other]
    assert one[0].scores != plain[0].scores


def test_factors_are_how_much_blocks_make_the_stream_grow():
    model, seen = deep("llama"), []
    passes = passes_of(Decoder(model), WINDOWS, 4)
    norms = [norm for layer in model.model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    hooks = [norm.register_forward_pre_hook(lambda module, args: seen.append(rms(args[0]))) for norm in norms]
    with torch.inference_mode():
        model(input_ids=WINDOWS, use_cache=False)
    for hook in hooks:
        hook.remove()
    for k, (before, after) in enumerate(zip(seen, seen[1:], strict=False)):
        assert passes[k // 2, (KINDS[k % 2],)] == pytest.approx((after / before).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    "name", ("llama", "llama-bias", "qwen2", "gpt2", "gemma2", "gemma3", "olmo2", "gpt-neox", "granite", "falcon-rw")
)
def test_folded_into_weights_it_is_the_same_model(name):
    decoder = Decoder(deep(name))
    passes = passes_of(decoder, WINDOWS)
    with decoder.passing(passes):
        wanted = logits(decoder, REMOVED, WINDOWS[:2])
    with applied(decoder, folded(decoder, REMOVED, passes)):
        assert same(decoder.model(input_ids=WINDOWS[:2], use_cache=False).logits.detach(), wanted)
    assert not same(wanted, logits(decoder, REMOVED, WINDOWS[:2]))


def test_a_file_holds_factors_and_refuses_what_is_none():
    passes = {(0, ("mha",)): 1.5, (3, ("mlp",)): 0.9, (4, KINDS): 2.0}
    assert passes_in({"passes": held_passes(passes)}) == passes and passes_in({}) == {}
    for bad in ({"mha3": math.nan}, {"mha3": "nan"}, {"mlp1": 0}, {"mlp1": True}, {"cake1": 1.0}, {"mha": 1.0}, 3):
        with pytest.raises(ValueError, match="its scale of .* expected a number above 0") as error:
            passes_in({"passes": bad})
        assert "\n" not in str(error.value)


def test_states_that_are_not_finite_are_refused():
    model = toy("llama")
    model.model.layers[1].mlp.down_proj.weight.data.fill_(math.inf)
    with pytest.raises(ValueError, match="the stream at layer 1 grows by (nan|inf)"):
        passes_of(Decoder(model), WINDOWS)


SCALED = {"del_block_num": None, "target_ratio": 0.3, "rule": "per-parameter", "pass": "scale", "refine": "swaps"}


def test_a_scaled_search_is_replayed_and_exported_as_it_was_searched(search, evaluate, call, toy_folder, tmp_path):
    run = search(**SCALED)
    (path,) = (tmp_path / "out").glob("*_scale_*.json")
    order, meta = read_order(path)
    assert run.code == 0 and meta["pass"] == "scale" and len(meta["passes"]) == 6
    replayed = evaluate(ppl_search_file=path, del_block_num=len(order), seed=42).result
    assert replayed["perplexity"] == pytest.approx(run.result["perplexity"], rel=1e-5)
    bare = unsealed(path)
    del bare["meta"]["passes"]
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    plain = evaluate(ppl_search_file=tmp_path / "bare.json", del_block_num=len(order), seed=42).result
    assert plain["perplexity"] != pytest.approx(run.result["perplexity"], rel=1e-4)
    for k in (1, len(order)):
        words = {"model_path": toy_folder(), "ppl_search_file": path, "del_block_num": k, "format": "hf"}
        assert call(export.main, *flags(**words, output_dir=tmp_path / f"export{k}")).code == 0
    again = evaluate(model_path=tmp_path / f"export{len(order)}", trust_remote_code=True, seed=42)
    assert again.code == 0, again
    again = again.result
    assert again["perplexity"] == pytest.approx(replayed["perplexity"], rel=1e-5)
    first = evaluate(ppl_search_file=path, del_block_num=1, seed=42).result
    assert first["perplexity"] == pytest.approx(meta["steps"][0]["perplexity"], rel=1e-5)


def test_what_would_drop_the_scales_refuses_the_order(search, evaluate, call, toy_folder, text, tmp_path):
    from scripts import narrow, repair

    search(**SCALED)
    (path,) = (tmp_path / "out").glob("*_scale_*.json")
    words = {"model_path": toy_folder(), "ppl_search_file": path, "del_block_num": 1, "cal_dataset": text}
    words |= {"output_dir": tmp_path / "new", "device": "cpu", "compute_dtype": "fp32"}
    assert_refused(call(repair.main, *flags(**words, method="scale", seqlen=64)), str(path), "--pass scale")
    assert_refused(call(narrow.main, *flags(**words, target_ratio=0.2, ppl_eval_seqlen=64)), str(path), "--pass scale")
    assert_refused(evaluate(ppl_search_file=path, del_block_num=1, repair="scale"), str(path), "--pass scale")
    assert not (tmp_path / "new").exists()


def test_a_scaled_order_goes_on_with_its_own_factors(search, tmp_path):
    words = {"rule": "per-parameter", "pass": "scale"}
    whole = search(**words, del_block_num=4).result
    search(**words, del_block_num=2, overwrite=True)
    assert search(**words, del_block_num=4).result["order"] == whole["order"]


def test_scale_is_refused_where_nothing_is_searched_or_a_file_is_spoilt(search, refused, tmp_path):
    refused("--pass scale: --metric bi does not search", **{"pass": "scale", "metric": "bi"})
    search(**SCALED)
    (path,) = (tmp_path / "out").glob("*_scale_*.json")
    held = unsealed(path)
    held["meta"]["passes"]["mha1"] = "nan"
    path.write_text(json.dumps(held))
    refused("its scale of 'mha1' is 'nan'", script="eval", ppl_search_file=path, del_block_num=1)


def test_experts_are_refused_before_the_search():
    decoder = Decoder(toy("mixtral"))
    with pytest.raises(ValueError, match="experts"):
        folded(decoder, [Block("mha", 0)], passes_of(decoder, WINDOWS))
