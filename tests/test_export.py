"""Pruned checkpoints against the masked model: every family, every gap, loaded by a process without this library."""

import json
import os
import shutil
import subprocess
import sys
from itertools import product

import pytest
import torch
import transformers
from families import PARALLEL, TOYS, V, toy
from memory import in_fresh_process, linux_only
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from lib.blocks import Block
from lib.decoder import Decoder
from lib.export import modeling_blockpruned as modeling
from lib.export.checkpoint import Source, write_shards
from lib.export.layers import Layer, repack
from lib.export.write import FORMATS, export

IDS = torch.randint(V, (2, 24), generator=torch.Generator().manual_seed(3))
ON_STREAM = {"opt-post-norm", "bloom-post-norm"}  # norms of the stream itself: zero weights are not enough
GAPS = {  # of three layers: what is removed
    "attention-only first, two attentions in a row, MLP-only last": ("mlp0", "mha2"),
    "leading MLP, empty middle, attention-only last": ("mha0", "mha1", "mlp1", "mlp2"),
    "empty first, attention-only middle": ("mha0", "mlp0", "mlp1"),
    "MLP-only middle, empty last": ("mha1", "mha2", "mlp2"),
}
WHOLE = {  # gaps that leave whole layers, the second only where branches are not parallel
    "an empty layer": ("mha1", "mlp1"),
    "attention and MLP of two layers": ("mlp0", "mha1"),
}


def blocks(*names):
    return [Block(name[:3], int(name[3:])) for name in names]


def logits(model, **kwargs):
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False, **kwargs).logits


# Loads each folder named on stdin as anybody would; the logits, and whether cached greedy generation is greedy.
CLIENT = """
import sys, torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
torch.set_num_threads(1)
ids = torch.load(sys.argv[1])
for line in sys.stdin:
    folder = line.strip()
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits
        cached = model.generate(ids[:, :5], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        greedy = model(cached, use_cache=False).logits[:, 4:-1].argmax(-1)
    assert torch.equal(cached[:, 5:], greedy), "generation with the cache differs from without"
    torch.save((logits, type(model).__name__), folder + ".logits")
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def reload(tmp_path_factory):
    """Return a function that loads a folder in another process: folder -> (logits of IDS, class name)."""
    home = tmp_path_factory.mktemp("client")
    torch.save(IDS, home / "ids")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(home / "modules")}
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(home / "ids")],
        cwd=home,
        env=env,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(home / "err").open("w"),
    )

    def run(folder):
        process.stdin.write(f"{folder}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n", (home / "err").read_text()[-3000:]
        return torch.load(f"{folder}.logits")

    yield run
    process.stdin.close()
    process.wait()


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a toy: name -> (folder, model)."""

    def save(name, **overrides):
        model = toy(name, **overrides)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name, model

    return save


# ---- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_every_gap_is_the_masked_model_in_another_process(name, saved, reload, tmp_path):
    folder, model = saved(name)
    decoder = Decoder(model)
    whole = WHOLE["an empty layer" if name in PARALLEL else "attention and MLP of two layers"]
    cases = [(gap, "auto", "hf") for gap in GAPS.values()]
    cases += [(whole, "auto", "stock"), (whole, "hf", "hf")]
    cases += [(gap, "zeroed", "zeroed") for gap in GAPS.values()] if name not in ON_STREAM else []
    for i, (names, asked, format) in enumerate(cases):
        removed, target = blocks(*names), tmp_path / str(i)
        assert export(folder, removed, target, asked)["format"] == format, names
        got, model_class = reload(target)
        with decoder.masked(removed):
            torch.testing.assert_close(got, logits(model), rtol=0, atol=1e-4, msg=lambda m, i=i: f"{cases[i]}: {m}")
        assert model_class == ("BlockPruned" if format == "hf" else "") + type(model).__name__
        config = json.loads((target / "config.json").read_text())
        layers = 3 if format == "zeroed" else 3 - sum(block.kind == "mha" for block in removed)
        depth = next(config[name] for name in ("num_hidden_layers", "n_layer", "n_layers") if name in config)
        assert depth == layers, "a cache entry for each attention"


def test_many_mlps_may_share_an_attention(saved, reload, tmp_path):
    folder, model = saved("gemma3")
    removed = blocks("mha0", "mha2")
    export(folder, removed, tmp_path / "out")
    with Decoder(model).masked(removed):
        torch.testing.assert_close(reload(tmp_path / "out")[0], logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TOYS)
def test_an_export_holds_the_kept_blocks_tensors_and_no_others(name, saved, tmp_path):
    folder, model = saved(name)
    removed = blocks("mha0", "mlp2")
    result = export(folder, removed, tmp_path / "out", "hf")
    decoder = Decoder(model)
    before = sum(p.numel() for p in model.parameters())
    assert result["parameters"] == before - decoder.block_parameters(removed)
    buffers = {name.split(".")[-1] for name, _ in model.named_buffers()}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        kept = [file.get_tensor(key) for key in file.keys() if key.split(".")[-1] not in buffers]
        written = sum(tensor.numel() for tensor in kept)
    assert written == result["parameters"]


@pytest.mark.parametrize("name", ["qwen3.5", "lfm2"])
def test_a_hybrid_keeps_an_attention_that_counts_tokens(name, saved, tmp_path):
    folder, model = saved(name)
    with pytest.raises(ValueError, match=f"no attention of {type(model).__name__} is left.*zeroed"):
        export(folder, blocks("mha0", "mha2"), tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_a_family_is_parallel_where_its_layers_have_no_state_between_their_blocks(saved):
    """An attention and the MLP of another layer make a layer only where Decoder proves the two steps separate."""
    assert {name for name in TOYS if Source(saved(name)[0]).parallel} == PARALLEL


# ---- repacking -----------------------------------------------------------------------------------


def test_kept_steps_stay_in_order_and_pair_greedily():
    assert repack(3, []) == [Layer(0, 0), Layer(1, 1), Layer(2, 2)]
    assert repack(4, blocks("mlp0", "mha1", "mlp2")) == [Layer(0, 1), Layer(2, None), Layer(3, 3)]
    assert repack(3, blocks("mha0", "mlp1")) == [Layer(None, 0), Layer(1, None), Layer(2, 2)]
    assert repack(3, blocks("mlp0", "mha1"), mix=False) == [Layer(0, None), Layer(None, 1), Layer(2, 2)]
    assert repack(2, blocks("mha0", "mlp0", "mha1", "mlp1")) == []


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    "name, changes, removed, expected",
    (
        ("gemma3", {}, ("mha0", "mlp0"), {"layer_types": [FULL, SLIDING], "num_hidden_layers": 2}),
        ("gemma3", {}, ("mlp0", "mha1"), {"layer_types": [SLIDING, SLIDING], "num_hidden_layers": 2}),
        (
            "gemma3",
            {"sliding_window_pattern": 2},
            ("mha0", "mlp0"),
            {"layer_types": [FULL, SLIDING], "sliding_window_pattern": 0},
        ),
        (
            "gemma3",
            {"sliding_window_pattern": 2},
            ("mha1", "mlp1"),
            {"layer_types": [SLIDING, SLIDING], "sliding_window_pattern": 3},
        ),
        ("gemma2", {}, ("mha0", "mlp0"), {"layer_types": [FULL, SLIDING]}),
        ("cohere2", {}, ("mha1", "mlp1"), {"layer_types": [SLIDING, SLIDING]}),
        ("qwen2-sliding", {}, ("mha0", "mlp0"), {"layer_types": [SLIDING, SLIDING], "max_window_layers": 0}),
        ("qwen2-sliding", {}, ("mlp1", "mha2"), {"layer_types": [FULL, SLIDING], "max_window_layers": 1}),
        (
            "smollm3",
            {"no_rope_layer_interval": 2},
            ("mha0", "mlp0"),
            {"no_rope_layers": [0, 1], "no_rope_layer_interval": 0},
        ),
        (
            "smollm3",
            {"no_rope_layer_interval": 2},
            ("mha2", "mlp2"),
            {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2},
        ),
        ("qwen2-moe", {}, ("mha0", "mlp0"), {"mlp_only_layers": [0]}),
        ("qwen2-moe", {}, ("mlp0", "mha1"), {"mlp_only_layers": [0]}),
        ("qwen2-moe", {}, ("mha1", "mlp1"), {"mlp_only_layers": []}),
        (
            "qwen3-moe",
            {"decoder_sparse_step": 2, "intermediate_size": 40},
            ("mlp0", "mha1"),
            {"mlp_only_layers": [1], "decoder_sparse_step": 1},
        ),
    ),
)
def test_what_a_configuration_says_of_each_layer_moves_with_it(
    name, changes, removed, expected, saved, reload, tmp_path
):
    folder, model = saved(name, **changes)
    for format in ("stock", "hf"):
        export(folder, blocks(*removed), tmp_path / format, format)
        config = json.loads((tmp_path / format / "config.json").read_text())
        for key, value in expected.items():
            if format == "stock" or not key.startswith(("mlp", "decoder")):  # hf builds MLPs by their source layer
                assert config[key] == value
        with Decoder(model).masked(blocks(*removed)):
            torch.testing.assert_close(reload(tmp_path / format)[0], logits(model), rtol=0, atol=1e-4)


def test_an_attention_that_depends_on_its_layers_number_needs_hf(saved, reload, tmp_path):
    folder, model = saved("gpt2", scale_attn_by_inverse_layer_idx=True)
    removed = blocks("mha0", "mlp0")
    with pytest.raises(ValueError, match="stock: in GPT2LMHeadModel the attn of mha1 depends .* nearest format is hf"):
        export(folder, removed, tmp_path / "stock", "stock")
    assert export(folder, removed, tmp_path / "out")["format"] == "hf"
    with Decoder(model).masked(removed):
        torch.testing.assert_close(reload(tmp_path / "out")[0], logits(model), rtol=0, atol=1e-4)


# ---- format hf under transformers ----------------------------------------------------------------


@pytest.fixture
def hf(saved, tmp_path):
    """Return a function that exports with a chain before and after an attention: name -> (pruned, reference).

    The reference is the zeroed export, loaded as the plain family.
    """

    def load(name="llama"):
        folder, _ = saved(name)
        hybrid = name in ("qwen3.5", "lfm2")  # layer 1 has no attention that counts tokens
        removed = blocks("mha0", "mha1" if hybrid else "mha2")
        export(folder, removed, tmp_path / "hf", "hf")
        export(folder, removed, tmp_path / "zeroed", "zeroed")
        config = json.loads((tmp_path / "hf" / "config.json").read_text())
        pruned = getattr(modeling, config["architectures"][0]).from_pretrained(tmp_path / "hf")
        return pruned.eval(), AutoModelForCausalLM.from_pretrained(tmp_path / "zeroed").eval()

    return load


GENERATING = "llama gemma3 gpt2 bloom falcon-7b gpt-neox mixtral gpt-oss deepseek-v3 qwen3.5 lfm2".split()


@pytest.mark.parametrize("name", GENERATING)
def test_generation_is_the_familys(name, hf):
    """Beams, left padding and every cache, against the full-size model whose removed blocks are zero."""
    pruned, reference = hf(name)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :7], mask[1, :7] = 0, 0
    ways = {
        "left padding": {},
        "beams": {"num_beams": 3},
        "static cache": {"cache_implementation": "static"},
        "no cache": {"use_cache": False},
    }
    if name == "bloom":
        del ways["static cache"]  # alibi: not in the family either
    for way, kwargs in ways.items():
        same = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=mask)
        kwargs = kwargs | ({"disable_compile": True} if way == "static cache" else {})
        got, expected = (model.generate(ids, **same, **kwargs) for model in (pruned, reference))
        assert torch.equal(got, expected), way


def test_the_cache_holds_the_kept_attentions_only(hf):
    pruned, _ = hf()
    assert pruned.config.num_hidden_layers == 1
    cache = pruned(IDS, use_cache=True).past_key_values
    assert len(cache.layers) == 1 and cache.get_seq_length() == IDS.shape[1]


def test_outputs_are_counted_by_layers(hf):
    pruned, reference = hf()
    pruned.set_attn_implementation("eager")
    reference.set_attn_implementation("eager")
    got, expected = (m(IDS, output_hidden_states=True, output_attentions=True) for m in (pruned, reference))
    assert len(got.hidden_states) == 2 and len(got.attentions) == 1
    torch.testing.assert_close(got.attentions[0], expected.attentions[1])
    torch.testing.assert_close(got.hidden_states[-1], expected.hidden_states[-1])


def test_gradients_flow_with_checkpointing(hf):
    """Each block of a chain runs twice, forwards and again for its gradient, not a third time within its chain."""
    pruned, reference = hf()
    pruned.train().gradient_checkpointing_enable()
    runs = []
    for module in pruned.modules():
        if isinstance(module, transformers.models.llama.modeling_llama.LlamaMLP):
            module.gate_proj.register_forward_hook(lambda m, *_: runs.append(m))
    for model in (pruned, reference):
        model(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(pruned.model.embed_tokens.weight.grad, reference.model.embed_tokens.weight.grad)
    assert len(set(runs)) == 3 and {runs.count(m) for m in runs} == {2}


CLASSIFIERS = [
    *product(("llama", "gpt2", "mixtral"), ("Sequence", "Token")),
    ("gemma3", "Sequence"),
    ("opt", "Sequence"),
]


@pytest.mark.parametrize("name, task", CLASSIFIERS)
def test_classifiers_stand_on_an_export(name, task, hf, tmp_path, modules_cache):
    """A class of the family's own, its head the same here and on the model whose removed blocks are zero."""
    auto = getattr(transformers, f"AutoModelFor{task}Classification")
    hf(name)
    pruned = auto.from_pretrained(tmp_path / "hf", trust_remote_code=True, num_labels=3, pad_token_id=0).eval()
    reference = auto.from_pretrained(tmp_path / "zeroed", num_labels=3, pad_token_id=0).eval()
    head = next(n for n, m in reference.named_children() if n != reference.base_model_prefix and list(m.parameters()))
    getattr(pruned, head).load_state_dict(getattr(reference, head).state_dict())
    torch.testing.assert_close(logits(pruned), logits(reference), rtol=0, atol=1e-4)
    pruned.save_pretrained(tmp_path / "tuned")
    again = auto.from_pretrained(tmp_path / "tuned", trust_remote_code=True).eval()
    assert torch.equal(logits(again), logits(pruned))


@pytest.mark.parametrize("name", ("llama", "gemma3"))
def test_assisted_generation_is_greedy_generation(name, hf):
    """The export as the model, and as the assistant."""
    pruned, reference = hf(name)
    same = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    for model, assistant in ((pruned, reference), (reference, pruned)):
        plain = model.generate(IDS[:1, :5], **same)
        assert torch.equal(model.generate(IDS[:1, :5], assistant_model=assistant, **same), plain)


def test_an_adapter_trains_on_an_export_and_comes_back(hf, tmp_path, modules_cache):
    peft = pytest.importorskip("peft")
    pruned, reference = hf()
    adapted = peft.get_peft_model(
        pruned, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapted.train().gradient_checkpointing_enable()
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    trained = [p.grad for _, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all(grad.abs().sum() > 0 for grad in trained), "A and B of q_proj and v_proj"
    adapted.eval().save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(adapted)) and not torch.equal(logits(again), logits(reference))
    torch.testing.assert_close(logits(again.merge_and_unload()), logits(adapted), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ("llama-bias", "mixtral", "gpt-neox"))
def test_an_export_survives_save_pretrained(name, hf, reload, tmp_path, modules_cache):
    pruned, reference = hf(name)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(reload(tmp_path / "again")[0], logits(reference), rtol=0, atol=1e-4)
    base = transformers.AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True)
    with torch.inference_mode():
        hidden = base(IDS).last_hidden_state
        expected = reference.base_model(IDS).last_hidden_state
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-4)
    fresh = AutoModelForCausalLM.from_config(loaded.config, trust_remote_code=True)
    assert fresh.state_dict().keys() == loaded.state_dict().keys()
    assert not any(p.isnan().any() or p.is_meta for p in fresh.parameters()), "weights of their own, ready to train"


def test_a_loader_without_the_code_refuses(saved, tmp_path):
    folder, _ = saved("llama")
    export(folder, blocks("mha0"), tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=False)
    (tmp_path / "out" / "modeling_blockpruned.py").unlink()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["auto_map"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="blockpruned_llama"):
        AutoConfig.from_pretrained(tmp_path / "out")


def test_lm_eval_runs_the_harnesss_own_hf_model_on_an_export(toy_folder, tmp_path, monkeypatch, modules_cache):
    pytest.importorskip("lm_eval.tasks")
    from lm_eval.models.huggingface import HFLM

    from lib import tasks
    from lm_eval import evaluate

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"goal": f"To count to {i}", "sol1": f"say {i}", "sol2": f"sing {7 * i}", "label": i % 2} for i in range(9)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    removed = blocks("mha0", "mlp1")
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy_folder())
    tokenizer.eos_token = "!"
    shutil.copytree(toy_folder(), tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", removed, tmp_path / "out")
    lm = HFLM(pretrained=str(tmp_path / "out"), trust_remote_code=True, device="cpu", dtype="float32", batch_size=4)
    task = tasks.task_manager(hub=False).load([tasks.local_task("piqa", tmp_path)])
    output = evaluate(lm, task, bootstrap_iters=1)
    model = AutoModelForCausalLM.from_pretrained(toy_folder())
    with Decoder(model.eval()).masked(removed):
        expected = tasks.harness_model(model, tokenizer, 1).loglikelihood(
            task["tasks"]["piqa"].instances, disable_tqdm=True
        )
    asked = [sample["filtered_resps"] for sample in output["samples"]["piqa"]]
    values = [float(pair[0]) for answers in asked for pair in answers]
    assert values == pytest.approx([value for value, _ in expected], abs=1e-3) and len(values) == 18


# ---- reading and writing -------------------------------------------------------------------------


def test_all_ways_to_store_a_checkpoint_give_the_same_export(saved, reload, tmp_path, monkeypatch):
    """One file, shards, .bin new and old; tied embeddings stay tied."""
    monkeypatch.setattr("lib.hub.PICKLED", True)
    folder, model = saved("llama-bias")
    removed = blocks("mlp0", "mha2")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for name, zipped in (("bin", True), ("old-bin", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((folder / "config.json").read_text())
        torch.save(state, tmp_path / name / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    reference = None
    for way in (folder, tmp_path / "sharded", tmp_path / "bin", tmp_path / "old-bin"):
        export(way, removed, tmp_path / f"{way.name}-out")
        got = reload(tmp_path / f"{way.name}-out")[0]
        reference = got if reference is None else reference
        assert torch.equal(got, reference)
        names = Source(way).names()
        assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
        with safe_open(tmp_path / f"{way.name}-out" / "model.safetensors", "pt") as file:
            assert "lm_head.weight" not in file.keys()


def test_shards_are_named_and_indexed_as_transformers_does(saved, tmp_path):
    folder, model = saved("llama")
    source = Source(folder)
    out = tmp_path / "out"
    out.mkdir()
    total = write_shards(out, [source.entry(name) for name in source.names()], shard_bytes=20_000)
    source.config.save_pretrained(out)
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((out / file).stat().st_size < 23_000 for file in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert total == index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
    again = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(again.eval()), logits(model))


def test_the_dtype_is_the_stored_one_or_the_one_asked_for(saved, tmp_path):
    folder, model = saved("llama")
    model.to(torch.bfloat16).save_pretrained(folder)
    for asked, dtype in ((None, torch.bfloat16), ("fp32", torch.float32), ("fp16", torch.float16)):
        out = tmp_path / str(asked)
        export(folder, blocks("mlp0"), out, compute_dtype=asked)
        with safe_open(out / "model.safetensors", "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {dtype}
        assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


MEMORY = """
from transformers import AutoModelForCausalLM
from lib.export.write import export
from lib.blocks import Block
_, small, big, out = sys.argv
load = lambda folder: [t.clone() for t in AutoModelForCausalLM.from_pretrained(folder).parameters()]
for folder in (small, big):  # the small one sets up whatever is set up once
    exporting = peak(lambda: export(folder, [Block("mha", 0)], f"{out}-{folder == big}"))
    loading = peak(lambda: load(folder))
print(exporting, loading)
"""


@linux_only
def test_memory_stays_far_below_the_models_size(toy_folder, tmp_path):
    model = toy("llama", hidden_size=1024, intermediate_size=8192, num_attention_heads=8)
    model.save_pretrained(tmp_path / "big")
    size = sum(4 * p.numel() for p in model.parameters())
    del model
    assert size > 300e6
    exporting, loading = in_fresh_process(MEMORY, toy_folder("llama"), tmp_path / "big", tmp_path / "out")
    assert exporting < size / 4
    assert loading > 0.9 * size, "the measure sees a model that is in memory"


def test_every_format_has_a_flag():
    from scripts.export import parse_args

    flags = ["--model-path", "m", "--output-dir", "d", "--del-block-num", "0"]
    for format in ("auto", *FORMATS):
        assert parse_args([*flags, "--format", format])[1].format == format
