"""lib/measure.py and scripts/bench_model.py: what is counted is what real caches and models hold."""

import json
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from command_line import assert_refused, flags, tree, write_gguf
from families import TOYS, V, toy

from lib import measure
from lib.blocks import Block
from lib.decoder import Decoder
from lib.export.write import export
from lib.model import parameter_count, skeleton
from lib.orders import save_order
from lib.schema import MARKS
from scripts import bench_model, bench_search


def prompts(B=2, T=12):
    return torch.randint(1, 96, (B, T), generator=torch.Generator().manual_seed(1))


def precise(name):
    """Return a toy without near ties: the same sums in another order give the same tokens."""
    model = toy(name).double()
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the usual one knows no float64
    return model


@torch.inference_mode()
def greedy_without_cache(model, ids, new_tokens):
    for _ in range(new_tokens):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[:, -new_tokens:]


# ---- generating ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("llama", "mistral", "gemma2", "gemma3", "gpt2", "opt", "bloom", "mixtral"))
def test_tokens_are_those_of_generate(name):
    model = precise(name)
    model.generation_config.eos_token_id = None
    ids = prompts()
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)[:, 12:]
    assert torch.equal(measure.generate(model, ids, 9).tokens, expected)


@pytest.mark.parametrize("name", TOYS)
def test_decoding_without_attentions_is_exact(name):
    model, ids = precise(name), prompts()
    removed = [Block("mha", 0), Block("mlp", 0), Block("mha", 1)]  # the only one without a window, where some have one
    Decoder(model).remove(removed)
    tokens = measure.generate(model, ids, 6, measure.cache_without(model.config, removed)).tokens
    assert torch.equal(tokens, greedy_without_cache(model, ids, 6))


def test_a_model_whose_first_attention_is_removed_needs_that_cache():
    model, ids = precise("llama"), prompts()
    Decoder(model).remove([Block("mha", 0)])
    assert not torch.equal(measure.generate(model, ids, 6).tokens, greedy_without_cache(model, ids, 6))


def test_a_model_without_attentions_has_no_cache():
    with pytest.raises(ValueError, match="all 3 attentions are removed"):
        measure.cache_without(toy("llama").config, [Block("mha", i) for i in range(3)])
    with pytest.raises(ValueError, match="all 2 attentions are removed"):
        measure.cache_without(toy("qwen3.5").config, [Block("mha", 0), Block("mha", 2)])


class Slow:
    """Stands for a model: a forward of a prompt takes 3 seconds of its own clock, of one token 0.5; the first, 100."""

    def __init__(self, calls, name="slow"):
        self.now, self.calls, self.name = 0.0, calls, name

    def forward(self, input_ids, past_key_values, use_cache):
        seconds = (3.0 if past_key_values is None else 0.5) if self.calls else 100.0
        self.now += seconds
        self.calls.append((self.name, input_ids.shape[1]))
        cache = (*(past_key_values or ()), (torch.zeros(5), torch.zeros(5)))
        return types.SimpleNamespace(logits=torch.eye(4).expand(2, 4, 4), past_key_values=cache)

    __call__ = forward


def test_seconds_are_those_of_the_calls_and_the_warm_up_is_left_out(monkeypatch):
    calls = []
    model = Slow(calls)
    monkeypatch.setattr(measure, "time", types.SimpleNamespace(perf_counter=lambda: model.now))
    results = measure.interleaved({"slow": lambda: measure.generate(model, prompts(T=7), 4)}, 3)
    assert [(r.prefill_seconds, r.decode_seconds) for r in results["slow"]] == [(3.0, 1.5)] * 3
    assert calls == [("slow", 7), ("slow", 1), ("slow", 1), ("slow", 1)] * 4
    assert results["slow"][0].tokens.tolist() == [[3] * 4] * 2
    assert results["slow"][0].cache_bytes == 4 * 2 * 5 * 4


def test_models_take_turns():
    calls = []
    runs = {name: partial(measure.generate, Slow(calls, name), prompts(), 1) for name in "abc"}
    assert {name: len(results) for name, results in measure.interleaved(runs, 2).items()} == {"a": 2, "b": 2, "c": 2}
    assert [name for name, _ in calls] == list("abc" * 3)


def test_spread_is_median_and_extremes():
    assert measure.spread([5.0, 1.0, 2.0]) == (2.0, 1.0, 5.0)


# ---- bytes ---------------------------------------------------------------------------------------


def cached_bytes(model, T):
    """Brute force: the tensors in the cache that the model's own forward returns."""
    with torch.inference_mode():
        cache = model(input_ids=torch.ones(1, T, dtype=torch.long), use_cache=True).past_key_values
    return sum(t.numel() * t.element_size() for entry in cache for t in entry[:2])


HEADS = {  # key-value heads and head width, by hand
    "llama": (2, 8),
    "gemma2": (2, 8),
    "gemma3": (2, 8),
    "qwen3": (2, 8),
    "phi3": (2, 8),
    "gpt2": (4, 8),
    "gpt-neox": (4, 8),
    "bloom": (4, 8),
    "falcon-7b": (1, 8),
    "opt": (4, 8),
    "qwen2-sliding": (2, 8),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_counted_kv_bytes_are_those_in_real_caches(name, dtype):
    model, (heads, width) = toy(name).to(dtype), HEADS[name]
    counted = measure.count_kv(model)
    assert counted.per_token == 3 * heads * width * 2 * dtype.itemsize
    assert counted.per_token == measure.kv_per_token(model) == cached_bytes(model, 5) - cached_bytes(model, 4)


@pytest.mark.parametrize("name, sliding", (("llama", 0), ("mistral", 3), ("gemma2", 2), ("qwen2-sliding", 2)))
def test_kv_bytes_in_sliding_windows_stop_growing(name, sliding):
    model = toy(name)
    counted = measure.count_kv(model)
    assert counted.sliding * 3 == counted.per_token * sliding
    assert counted.window == (8 if sliding else None)
    beyond = counted.per_token - counted.sliding
    assert beyond == measure.kv_per_token(model, lengths=(20, 30)) == cached_bytes(model, 21) - cached_bytes(model, 20)


@pytest.mark.parametrize("name", ("llama", "gemma3", "gpt2"))
def test_removed_attentions_take_their_share_of_the_cache(name):
    model = toy(name)
    dense, removed = measure.count_kv(model).per_token, [Block("mha", 0), Block("mlp", 1), Block("mha", 2)]
    Decoder(model).remove(removed)
    assert measure.count_kv(model).per_token * 3 == dense
    assert measure.kv_per_token(model, lambda: measure.cache_without(model.config, removed)) * 3 == dense
    assert measure.generate(model, prompts(), 4, measure.cache_without(model.config, removed)).cache_bytes == (
        2 * 15 * dense // 3
    )


def test_measured_bytes_tell_of_a_cache_that_is_larger_than_it_need_be():
    model = toy("falcon-40b")  # its key-value heads are repeated before they are cached
    assert measure.kv_per_token(model) == 2 * measure.count_kv(model).per_token


def test_a_model_without_known_attentions_is_not_counted():
    model = toy("llama")
    for layer in model.model.layers:
        del layer.self_attn.layer_idx
    assert measure.count_kv(model) is None


def test_tied_weights_are_counted_once():
    tied = toy("llama-bias")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert measure.weight_bytes(tied) == 4 * parameter_count(tied)
    tied.lm_head.weight = torch.nn.Parameter(tied.lm_head.weight.clone())
    assert measure.weight_bytes(tied) == 4 * parameter_count(tied)
    assert measure.weight_bytes(tied.half()) == 2 * parameter_count(tied)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the resident set is read as Linux tells it")
@pytest.mark.parametrize("pieces", (1, 512))
def test_peak_memory_is_what_a_run_adds_each_time(pieces):
    def run():
        return len([torch.ones(2**22 // pieces) for _ in range(pieces)])

    for _ in range(2):  # small pieces, once freed, would stay resident and count for nothing in the next run
        assert 0.9 * 2**24 < measure.peak_memory(run, "cpu") < 1.3 * 2**24


# ---- the command ---------------------------------------------------------------------------------

QUICK = {"device": "cpu", "compute_dtype": "fp32", "batch_sizes": 1, "prompt_lengths": 4, "new_tokens": 3, "repeats": 2}


@pytest.fixture
def bench(call, tmp_path):
    """Return a function that runs bench_model.main: (models, **flags); a list of values gives a flag several."""

    def run(*models, **changes):
        words = flags(**{k: v for k, v in {**QUICK, **changes}.items() if not isinstance(v, list)})
        for name, values in changes.items():
            if isinstance(values, list):
                words += ["--" + name.replace("_", "-"), *map(str, values)]
        return call(bench_model.main, *map(str, models), *words)

    return run


@pytest.fixture
def order(tmp_path):
    path = tmp_path / "order.json"
    blocks = [Block("mha", 0), Block("mlp", 1), Block("mha", 2), Block("mha", 1)]
    save_order(path, blocks, {"layers": 3, "model": "another"})
    return path


def test_two_checkpoints_are_compared(bench, toy_folder, tmp_path):
    dense, small = toy_folder(), toy_folder(num_hidden_layers=2, num_key_value_heads=4)
    out, plot = tmp_path / "new" / "speed.json", tmp_path / "new" / "speed.png"
    run = bench(dense, small, batch_sizes=[1, 2], prompt_lengths=[5, 9], output_path=out, plot=plot)
    assert (run.code, run.err) == (0, "")
    assert sorted(tree(tmp_path)) == ["new", "new/speed.json", "new/speed.png"]
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and plot.stat().st_size > 5000
    result = json.loads(out.read_text())
    assert {k: v for k, v in result.items() if k not in MARKS} == run.result
    assert [m["name"] for m in result["models"]] == [dense.name, small.name]
    assert (result["dtype"], result["device"], result["threads"], result["new_tokens"]) == ("fp32", "cpu", 1, 3)
    assert result["versions"]["torch"] == torch.__version__
    for model, layers, heads in zip(result["models"], (3, 2), (2, 4), strict=True):
        reloaded = toy("llama", vocab_size=256, num_hidden_layers=layers, num_key_value_heads=heads)
        assert model["parameters"] == parameter_count(reloaded) == model["weight_bytes"] / 4
        per_token = layers * heads * 8 * 2 * 4
        assert model["kv_bytes_per_token"] == model["kv_bytes_per_token_measured"] == per_token
        assert model["peak_bytes"] >= model["weight_bytes"]
        settings = [(s["batch_size"], s["prompt_length"]) for s in model["speed"]]
        assert settings == [(1, 5), (1, 9), (2, 5), (2, 9)]
        for s in model["speed"]:
            assert len(s["prefill_seconds"]) == len(s["decode_seconds"]) == 2
            B, T = s["batch_size"], s["prompt_length"]
            assert s["prefill_tokens_per_second"]["high"] == pytest.approx(B * T / min(s["prefill_seconds"]))
            assert s["decode_tokens_per_second"]["low"] == pytest.approx(B * 2 / max(s["decode_seconds"]))
            assert s["kv_cache_bytes"] == B * (T + 2) * per_token  # the last token is never fed back
    sizes = [line.split() for line in run.out.splitlines() if line.startswith(small.name)]
    first, second = (m["parameters"] for m in result["models"])
    assert sizes[0][1:3] == [f"{second:,}", f"{second / first:.2f}x"]
    assert len(sizes) == 5


def test_removals_of_an_order_are_compared(bench, toy_folder, order):
    run = bench(toy_folder(), ppl_search_file=order, del_block_num=[0, 1, 3], batch_sizes=[2], prompt_lengths=[9])
    assert run.code == 0
    assert run.err == "warning: the order was searched on another\n"
    models = run.result["models"]
    assert [m["name"] for m in models] == ["K = 0", "K = 1", "K = 3"]
    assert models[2]["removed"] == ["mha0", "mlp1", "mha2"]
    for m in models:
        pruned = toy("llama", vocab_size=256)
        Decoder(pruned).remove([Block(name[:3], int(name[3:])) for name in m["removed"]])
        assert m["parameters"] == parameter_count(pruned) == m["weight_bytes"] / 4
    assert [m["kv_bytes_per_token_measured"] for m in models] == [384, 256, 128]
    assert [m["speed"][0]["kv_cache_bytes"] for m in models] == [2 * 11 * 384, 2 * 11 * 256, 2 * 11 * 128]


def test_a_gguf_is_a_model_like_its_folder(bench, toy_folder, tmp_path):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "toy.gguf", toy("llama", vocab_size=257, num_key_value_heads=4, hidden_size=64))
    run = bench(tmp_path / "toy.gguf", toy_folder())
    assert run.code == 0, run
    model = run.result["models"][0]
    assert model["kv_bytes_per_token_measured"] == model["kv_bytes_per_token"] == 3 * 64 * 2 * 4


def test_sliding_windows_are_noted(bench, toy_folder):
    run = bench(toy_folder("gemma3"))
    assert "256 of its KV bytes/token stop growing at a window of 8 tokens" in run.out


@pytest.mark.parametrize(
    "paths, expected",
    (
        (("a/x", "b/y"), ["x", "y"]),
        (("a/x", "b/x", "c"), ["a/x", "b/x", "c"]),
        (("a/x", "a/x", "b/y"), ["a/x (1)", "a/x (2)", "y"]),
    ),
)
def test_models_have_different_names(paths, expected):
    assert bench_model.names(paths) == expected


# ---- refused before weights are read -------------------------------------------------------------


@pytest.fixture
def refused(bench, toy_folder, tmp_path, monkeypatch):
    def no_weights(*args, **kwargs):
        raise AssertionError("weights were loaded")

    def run(*says, models=None, **changes):
        before = tree(tmp_path)
        assert_refused(bench(*([toy_folder()] if models is None else models), **changes), *says)
        assert tree(tmp_path) == before

    monkeypatch.setattr("lib.model.load_model", no_weights)
    return run


def test_models_that_cannot_be_read_are_refused(refused, toy_folder, tmp_path):
    refused("MODEL", "nowhere", "no such file or folder", models=[toy_folder(), tmp_path / "nowhere"])
    refused("MODEL", "folder without config.json", models=[tmp_path])
    refused("MODEL", models=[])


def test_a_model_that_runs_its_own_code_is_refused_without_the_flag(refused, toy_folder, tmp_path):
    config = json.loads((toy_folder() / "config.json").read_text())
    code = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "pruned-llama", "auto_map": code}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "modeling.py").write_text("raise SystemExit")
    refused("MODEL", "--trust-remote-code", models=[toy_folder(), tmp_path])


def test_more_tokens_than_positions_are_refused(refused, toy_folder):
    refused("--prompt-lengths 126", "128 positions", prompt_lengths=[5, 126])
    short = toy_folder(max_position_embeddings=40)
    refused("--prompt-lengths 38", str(short), "40 positions", models=[toy_folder(), short], prompt_lengths=[38])


def test_numbers_that_mean_nothing_are_refused(refused):
    for name in ("batch_sizes", "prompt_lengths", "repeats", "threads", "new_tokens"):
        refused("--" + name.replace("_", "-"), "'0'", **{name: 0})
    refused("--new-tokens 1", "2 or more", new_tokens=1)


def test_places_that_cannot_be_written_are_refused(refused, toy_folder, tmp_path):
    (tmp_path / "file").write_text("")
    refused("--output-path", "a directory", output_path=tmp_path / "file" / "speed.json")
    refused("--output-path", "a folder", output_path=tmp_path)
    refused("--plot", "a directory", plot=tmp_path / "file" / "speed.png")
    refused("--plot", ".png", plot=tmp_path / "speed.jpg")


def test_orders_that_do_not_fit_are_refused(refused, toy_folder, order, tmp_path):
    refused("--del-block-num 5", "holds 4 removals", "0..4", ppl_search_file=order, del_block_num=[0, 5])
    refused("--del-block-num 4", "all 3 attentions", ppl_search_file=order, del_block_num=[0, 4])
    refused("--ppl-search-file", "--del-block-num", ppl_search_file=order)
    refused("--ppl-search-file", "--del-block-num", del_block_num=[1])
    refused("one model", "2 are given", models=[toy_folder()] * 2, ppl_search_file=order, del_block_num=[1])
    refused("no such order file", ppl_search_file=tmp_path / "nowhere.json", del_block_num=[1])
    other = toy_folder(num_hidden_layers=2)
    refused("3 layers; this one has 2", models=[other], ppl_search_file=order, del_block_num=[1])


def test_an_order_of_the_base_is_no_order_of_its_pruned_export(refused, toy_folder, order, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    pruned, again = tmp_path / "pruned", dict(ppl_search_file=order, del_block_num=1, trust_remote_code=True)
    export(toy_folder(), [Block("mlp", 1)], pruned, "hf")  # has as many layers as the base
    skeleton(pruned, True)
    refused("MODEL", "pruned export (blockpruned_llama)", "base model", models=[pruned], **again)


def test_models_that_do_not_fit_the_memory_are_refused(refused, toy_folder, monkeypatch):
    monkeypatch.setattr("lib.memory.free_bytes", lambda device: (4 * 39648 * 2 - 1, 0))
    refused("GiB of weights", "compare fewer models", models=[toy_folder()] * 2)


def test_devices_that_are_not_there_are_refused(refused):
    refused("--device", "tpu", device="tpu")


def test_search_benchmark_shares_the_measurements(call, toy_folder, text, tmp_path):
    run = call(
        bench_search.main,
        *flags(
            model_path=toy_folder(),
            cal_dataset=text,
            device="cpu",
            compute_dtype="fp32",
            ppl_eval_seqlen=32,
            del_block_num=1,
            output_path=tmp_path / "search.json",
        ),
    )
    assert run.code == 0, run
    assert set(run.result["engines"]) == {"exhaustive", "cached", "race"}
    assert all(r["same_order"] and r["removals_compared"] == 1 for r in run.result["engines"].values())
    written = json.loads((tmp_path / "search.json").read_text())
    assert {k: v for k, v in written.items() if k not in MARKS} == run.result


def test_search_benchmark_claims_only_what_it_compared(call, toy_folder, text):
    given = {
        "model_path": toy_folder(),
        "cal_dataset": text,
        "device": "cpu",
        "compute_dtype": "fp32",
        "ppl_eval_seqlen": 32,
        "del_block_num": 2,
    }
    alone = call(bench_search.main, *flags(**given), "--engines", "race").result["engines"]["race"]
    assert alone["same_order"] is alone["same_scores"] is alone["compared_with"] is None
    line = [*flags(**given, exhaustive_steps=1), "--engines", "exhaustive", "race"]
    run = call(bench_search.main, *line)
    race = run.result["engines"]["race"]
    assert race["compared_with"] == "exhaustive" and race["removals_compared"] == 1
    printed = next(words for words in run.out.splitlines() if words.startswith("race"))
    assert printed.count(" (1)") == 2, "one of two removals was compared"
    assert_refused(call(bench_search.main, *flags(**given | {"ppl_eval_seqlen": 1})), "--ppl-eval-seqlen 1", "2 tokens")
    run = call(bench_search.main, *flags(random_config="llama2-7b", scale=64, ppl_eval_seqlen=1))
    assert_refused(run, "--ppl-eval-seqlen 1", "2 tokens")
    for scale in (3, 8192):
        assert_refused(call(bench_search.main, *flags(random_config="llama2-7b", scale=scale)), f"--scale {scale}")


def test_search_benchmark_runs_an_engine_once_and_ends_in_one_line(call, toy_folder, text, monkeypatch):
    from lib import engines, search

    given = flags(
        model_path=toy_folder(),
        cal_dataset=text,
        device="cpu",
        compute_dtype="fp32",
        ppl_eval_seqlen=32,
        del_block_num=2,
    )
    run = call(bench_search.main, *given, "--engines", "cached", "cached")
    assert list(run.result["engines"]) == ["cached"] and run.result["engines"]["cached"]["steps_timed"] == 2
    for error, says in (
        (search.NoFiniteCandidate({}), "NaN or infinite"),
        (torch.OutOfMemoryError("CUDA"), "--cache-gb"),
    ):

        def failing(*args, error=error, **kwargs):
            raise error

        monkeypatch.setitem(engines.ENGINES, "cached", failing)
        run = call(bench_search.main, *given, "--engines", "cached")
        assert run.code == 2 and says in run.err and run.err.count("\n") == 1, run


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3-moe", "minimax-m2", "deepseek-v3"])
def test_flops_of_an_mlp_are_those_that_torch_counts(name):
    from torch.utils.flop_counter import FlopCounterMode

    decoder, T = Decoder(toy(name)), 32
    if name != "llama":
        decoder.model.set_experts_implementation("eager")  # what it is made of otherwise is not counted
    stream = decoder.embed(torch.arange(T)[None] % V)
    with FlopCounterMode(display=False) as counter:
        for i in range(decoder.n_layers):
            decoder.run(i, ("mlp",), stream.h, stream)
    counted = counter.get_total_flops() / decoder.n_layers
    assert bench_search.block_flops(decoder, T)["mlp"] == pytest.approx(counted, rel=0.02), "norms are the rest"
