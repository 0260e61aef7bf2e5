"""Recovery: the loss against torch's own, what is trained and what stays, kills and resumes, the folder left."""

import json
import math
import os
import signal
import time

import pytest
import torch
from command_line import assert_refused, flags, start, tree
from conftest import byte_tokenizer
from families import toy
from torch.nn import functional as F

from lib import recover
from lib.blocks import Block, parse_block
from lib.export.trained import write_trained
from lib.export.write import export
from lib.model import load_model, skeleton
from lib.recover import Recipe, Teacher
from lib.recover_text import shared_runs, split
from scripts import recover as script

REMOVED = [Block("mlp", 1), Block("mha", 0)]  # leaves mlp0, mha1 mlp2's layer, ...: format hf
RECIPE = Recipe(steps=12, batch_size=2, lr=3e-3, bf16=False)
GENERATOR = torch.Generator().manual_seed(1)
WINDOWS = torch.randint(1, 256, (24, 32), generator=GENERATOR)
WATCHED = {"text": torch.randint(1, 256, (3, 32), generator=GENERATOR)}


@pytest.fixture(autouse=True)
def modules_cache(tmp_path_factory, monkeypatch):
    """Keep remote code out of the user's cache."""
    folder = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
    monkeypatch.syspath_prepend(folder)


@pytest.fixture
def pruned(toy_folder, tmp_path):
    """Return a function that exports a toy without some of its blocks: (name, removed) -> folder."""

    def run(name="llama", removed=REMOVED, **overrides):
        folder = tmp_path / f"{name}-pruned"
        export(str(toy_folder(name, **overrides)), removed, folder)
        return folder

    return run


def load(folder):
    return load_model(str(folder), "fp32", trust_remote_code=True)


def trained(folder, teacher, work, recipe=RECIPE, report=lambda line: None, every=4, save_every=None):
    """Train an export towards a teacher and return (the model merged, history)."""
    student = recover.set_trainable(load(folder), recipe.train)
    state, history = recover.train(
        student,
        teacher,
        WINDOWS,
        WATCHED,
        recipe,
        work,
        every=every,
        save_every=save_every,
        report=report,
        use_cpu=True,
    )
    return recover.merge(load(folder), state, recipe.train), history


def mean_loss(history, steps):
    return sum(line["loss"] for line in history if line.get("step") in steps and "loss" in line) / len(steps)


# ---- the loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_its_gradient_are_torchs(temperature):
    student = torch.randn(3, 200, 50, dtype=torch.float32, generator=GENERATOR, requires_grad=True)  # several slices
    teacher = torch.randn(3, 200, 50, generator=GENERATOR)
    loss = recover.divergence(student, teacher, temperature)
    (loss * 1.5).backward()
    own = student.detach().double().requires_grad_()
    log_q, log_p = ((x.double() / temperature).log_softmax(-1).flatten(0, 1) for x in (own, teacher))
    wanted = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * temperature**2
    (wanted * 1.5).backward()
    torch.testing.assert_close(loss.double(), wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(student.grad.double(), own.grad, atol=1e-8, rtol=1e-4)


def test_top_divergence_bounds_the_full_one_and_meets_it():
    student, teacher = torch.randn(2, 5, 7, 40, generator=GENERATOR)
    full = recover.divergence(student, teacher)
    bounds = [recover.top_divergence(student, *recover.top(teacher, k)) for k in (1, 8, 39)]
    assert 0 < bounds[0] < bounds[1] < bounds[2]
    torch.testing.assert_close(bounds[2], full, atol=1e-5, rtol=1e-4)


def test_cached_teacher_gives_the_loss_of_the_teacher_itself(pruned, toy_folder, tmp_path):
    teacher, student = load(toy_folder()), load(pruned())
    recipe = RECIPE._replace(top_k=20, temperature=1.5)
    cache = recover.fill_cache(teacher, WINDOWS, recipe, tmp_path / "cache")
    index = torch.tensor([5, 17])
    losses = [
        recover.distillation_loss(student, answers, WINDOWS[index], index, recipe).item()
        for answers in (Teacher(teacher), Teacher(cache=cache))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # 16 bits
    before = [part.clone() for part in cache]
    again = recover.fill_cache(None, WINDOWS, recipe, tmp_path / "cache")  # complete: nobody is asked
    assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))


# ---- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt2", "mixtral"])
def test_loss_falls_and_the_folder_holds_what_was_in_memory(name, pruned, toy_folder, tmp_path):
    folder, teacher = pruned(name), load(toy_folder(name))
    model, history = trained(folder, Teacher(teacher), tmp_path / "work", RECIPE._replace(lr=1e-2))
    assert mean_loss(history, [11, 12]) < 0.8 * mean_loss(history, [1, 2])
    with torch.no_grad():
        wanted = model(input_ids=WINDOWS[:2]).logits
        facts = {"tokens": 768, "train": "full", "text": ["text"], "teacher": name, "perplexity": {}}
        write_trained(folder, model, tmp_path / "out", facts)
        again = load(tmp_path / "out")
        torch.testing.assert_close(again(input_ids=WINDOWS[:2]).logits, wanted, atol=1e-4, rtol=0)
    assert again.config.pruning_info["recovered"] == facts
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in folder.iterdir()}
    config, before = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", folder))
    del config["pruning_info"]["recovered"]
    assert config == before


@pytest.mark.parametrize("part", recover.PARTS)
def test_only_the_chosen_part_changes(part, pruned, toy_folder, tmp_path):
    """Of four layers mlp1 and mha0 are gone: next to gaps are mlp0, mha1 and mha2."""
    folder = pruned(num_hidden_layers=4)
    before = load(folder).state_dict()
    teacher = Teacher(load(toy_folder(num_hidden_layers=4)))
    model, _ = trained(folder, teacher, tmp_path / "work", RECIPE._replace(train=part))
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if part == "full":
        assert changed == set(before)
    elif part == "lora":
        linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {
            "lm_head.weight"
        }
        assert changed == linear
    elif part == "last-layers":
        layers = load(folder).config.num_hidden_layers
        last = {f"model.layers.{i}." for i in range(layers - 3, layers)}
        assert changed == {n for n in before if n.startswith((*last, "lm_head", "model.norm"))}
    else:
        near = {"mlp0", "mha1", "mha2"}
        wanted = set()
        for k, chain in enumerate(model.config.source_blocks):
            steps = chain.split(", ")
            for j, step in enumerate(steps):
                prefix = f"model.layers.{k}." + (f"steps.step{j}." if len(steps) > 1 else "")
                for block in near & set(step.split()):
                    parts = ("self_attn.", "input_layernorm.") if block[:3] == "mha" else ("mlp.", "post_attention")
                    wanted |= {n for n in before if n.startswith(tuple(prefix + p for p in parts))}
        assert changed == wanted and wanted


def test_blocks_near_gaps_are_the_neighbours_on_both_sides():
    kept = [parse_block(n) for n in "mha0 mlp0 mlp1 mha4 mlp4 mha5 mlp5".split()]
    removed = [parse_block(n) for n in "mha1 mha2 mlp2 mha3 mlp3 mha6 mlp6".split()]
    assert list(map(str, recover.blocks_near_gaps(removed, kept))) == ["mlp0", "mlp1", "mha4", "mlp5"]


def test_merged_adapters_compute_what_they_did_beside_the_weights(pruned, toy_folder, tmp_path):
    folder, teacher = pruned(), Teacher(load(toy_folder()))
    recipe = RECIPE._replace(train="lora", lr=3e-2)
    student = recover.set_trainable(load(folder), "lora")
    state, history = recover.train(student, teacher, WINDOWS, WATCHED, recipe, tmp_path / "work", every=6, use_cpu=True)
    assert mean_loss(history, [11, 12]) < mean_loss(history, [1, 2])
    with torch.no_grad():
        beside = student.eval()(input_ids=WINDOWS[:2]).logits
        plain = load(folder)(input_ids=WINDOWS[:2]).logits
        merged = recover.merge(load(folder), state, "lora")(input_ids=WINDOWS[:2]).logits
    torch.testing.assert_close(merged, beside, atol=1e-5, rtol=1e-5)
    assert (merged - plain).abs().max() > 1e-2


@pytest.mark.parametrize(("part", "step"), [("full", 2), ("full", 5), ("full", 9), ("full", 11), ("lora", 9)])
def test_a_stopped_training_goes_on_to_the_same_weights(part, step, pruned, toy_folder, tmp_path):
    folder, teacher = pruned(), Teacher(load(toy_folder()))
    recipe = RECIPE._replace(train=part)
    whole, history = trained(folder, teacher, tmp_path / "whole", recipe)

    def stop(line):
        if line["step"] == step and "loss" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(folder, teacher, tmp_path / "cut", recipe, stop)
    steps = []
    resumed, again = trained(folder, teacher, tmp_path / "cut", recipe, lambda line: steps.append(line["step"]))
    assert min(steps) == (step - 1) // 4 * 4 + 1  # it did go on, from the checkpoint before
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    assert [line["loss"] for line in again if "loss" in line] == [line["loss"] for line in history if "loss" in line]


def test_a_checkpoint_cut_short_is_passed_over(pruned, toy_folder, tmp_path):
    trained(pruned(), Teacher(load(toy_folder())), tmp_path)
    assert recover.last_checkpoint(tmp_path).endswith("checkpoint-12")
    state = tmp_path / "checkpoint-12" / "trainer_state.json"
    state.write_text(state.read_text()[:40])
    assert recover.last_checkpoint(tmp_path).endswith("checkpoint-8")
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
    assert recover.last_checkpoint(tmp_path) is None


def test_accumulated_forwards_and_checkpointed_activations_are_the_same_training(pruned, toy_folder, tmp_path):
    folder, teacher = pruned(), Teacher(load(toy_folder()))
    _, one = trained(folder, teacher, tmp_path / "1")
    _, two = trained(folder, teacher, tmp_path / "2", RECIPE._replace(batch_size=1, accumulate=2))
    _, three = trained(folder, teacher, tmp_path / "3", RECIPE._replace(activation_checkpointing=True))
    for other in (two, three):
        for a, b in zip(one, other, strict=True):
            assert ("loss" not in a) or a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_a_loss_that_is_no_number_stops_and_leaves_a_good_checkpoint(pruned, toy_folder, tmp_path):
    folder, calls = pruned(), []

    class Broken(Teacher):
        def __call__(self, ids, index, recipe):
            calls.append(1)
            logits, *rest = super().__call__(ids, index, recipe)
            return logits * (math.nan if len(calls) == 7 else 1), *rest

    with pytest.raises(recover.Diverged, match="nan in step 7"):
        trained(folder, Broken(load(toy_folder())), tmp_path / "work", save_every=2)  # what step 6 left is bad
    kept = recover.last_checkpoint(tmp_path / "work")
    assert kept.endswith("checkpoint-4")
    from safetensors.torch import load_file

    assert all(t.isfinite().all() for t in load_file(f"{kept}/model.safetensors").values())


# ---- text ----------------------------------------------------------------------------------------------------


def test_held_out_documents_are_whole_and_nowhere_in_training():
    documents = [f"Number {i % 30}: " + "word " * (i % 30) for i in range(90)]  # each three times
    part = split("text", documents, byte_tokenizer(), 32, 4, documents[:2])
    assert part.watched.shape == (4, 32)
    held = "\n\n".join(documents[2:])[: 4 * 32]
    assert part.watched.flatten().tolist() == byte_tokenizer()(held)["input_ids"]
    gone = documents[:2] + documents[2 : 2 + part.held]
    assert len(gone) > 3 and not set(gone) & set(part.documents)
    assert set(part.documents) == set(documents) - set(gone)


def test_shared_runs_counts_what_occurs_in_both():
    windows, watched = torch.arange(400).view(4, 100), 1000 + torch.arange(200).view(2, 100)
    assert shared_runs(windows, watched, 10) == 0
    watched[1, 20:35] = windows[2, 50:65]  # 15 tokens: six runs of ten
    assert shared_runs(windows, watched, 10) == 6


# ---- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def given(pruned, toy_folder, text, tmp_path):
    """The flags of a small recovery of the toy."""
    pruned()
    return {
        "teacher": toy_folder(),
        "output_dir": tmp_path / "out",
        "cal_dataset": text,
        "tokens": 3072,
        "seqlen": 64,
        "batch_size": 2,
        "held_out": 2,
        "lr": 3e-3,
        "compute_dtype": "fp32",
        "device": "cpu",
        "eval_every": 6,
        "trust_remote_code": True,
    }


@pytest.fixture
def refuses(call, given, tmp_path):
    """Return a function that runs scripts.recover on bad input and finds one line, and nothing left."""

    def run(*says, folder=None, **changes):
        before = tree(tmp_path)
        assert_refused(
            call(script.main, str(folder or tmp_path / "llama-pruned"), *flags(**{**given, **changes})), *says
        )
        assert tree(tmp_path) == before

    return run


@pytest.mark.parametrize(
    "changes",
    [{}, {"train": "lora"}, {"cache_teacher": True, "top_k": 20}, {"self_text": 12, "cal_dataset": None}],
    ids=["full", "lora", "cached", "own text"],
)
def test_the_command_leaves_a_better_export(changes, call, given, tmp_path):
    pytest.importorskip("peft")
    run = call(script.main, str(tmp_path / "llama-pruned"), *flags(**{**given, **changes}))
    assert run.code == 0, run
    name = "self" if "self_text" in changes else "text"
    assert run.result["tokens"] == 3072 and run.result["runs_shared_with_held_out"] == {name: 0}
    assert f"{run.result['text_about'][name]['held_out_documents']} others held out" in run.out
    recovered = load(tmp_path / "out").config.pruning_info["recovered"]
    assert recovered.items() <= run.result.items() and recovered["seed"] == 42
    assert sorted(f.name for f in tmp_path.glob("out*")) == ["out", "out.loss.png"]


def test_a_killed_command_goes_on_to_the_same_weights(given, tmp_path):
    folder, work = tmp_path / "llama-pruned", tmp_path / "out.training"
    words = [str(folder), *flags(**{**given, "eval_every": 2})]
    process = start("scripts.recover", *words, python=("-m",))
    while not (work / "checkpoint-4" / "trainer_state.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert work.is_dir() and not (tmp_path / "out").exists()
    outputs = []
    for name in ("out", "again"):
        words = [str(folder), *flags(**{**given, "eval_every": 2, "output_dir": tmp_path / name})]
        process = start("scripts.recover", *words, python=("-m",))
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        outputs.append(out)
    assert "resumed" in outputs[0] and "resumed" not in outputs[1]
    one, two = (load(tmp_path / name).state_dict() for name in ("out", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_learning_rate_that_breaks_the_loss_is_told_in_one_line(call, given, tmp_path):
    run = call(script.main, str(tmp_path / "llama-pruned"), *flags(**{**given, "lr": 1e30, "eval_every": 1}))
    assert run.code == 2 and len(run.err.splitlines()) == 1, run.err
    assert "--lr 1e+30" in run.err and "take a smaller one" in run.err
    assert not (tmp_path / "out").exists()


def test_other_settings_than_the_training_began_with_are_refused(refuses, given, tmp_path):
    script.begin(tmp_path / "out.training", {"lr": 5.0})
    refuses("begun with", "delete that folder")


def test_bad_input_is_refused_in_one_line(refuses, toy_folder, text, tmp_path, monkeypatch):
    refuses("vocabulary has 300 entries", teacher=toy_folder("llama", vocab_size=300))
    other = tmp_path / "other"
    toy("llama", vocab_size=256).save_pretrained(other)
    tokenizer = json.loads((toy_folder() / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    for name in ("tokenizer_config.json",):
        (other / name).write_text((toy_folder() / name).read_text())
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refuses("tokenizer is not the export's", teacher=other)
    refuses("are too few to hold out", held_out=1000)
    refuses("not an export", folder=toy_folder())
    refuses("not an export", folder=tmp_path / "nowhere")
    refuses("quantised", folder=tmp_path / "model.gguf")
    refuses("--seqlen 1000", seqlen=1000)
    refuses("--top-k 256", top_k=256)
    refuses("--cal-dataset is missing", cal_dataset=None)
    refuses("not a number of tokens", tokens="lots")
    refuses("logits only", cache_teacher=True, hidden_weight=1)
    refuses("occurs twice", cal_dataset=f"{text}+{text}")
    config = tmp_path / "llama-pruned" / "config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"quantization_config": {"bits": 4}}))
    refuses("quantised")
    config.write_text(before)
    find = script.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name != "peft" and find(name, *rest) or None)
    refuses("--train lora: needs the peft package", train="lora")
    monkeypatch.setattr(recover, "free_bytes", lambda device: (1000, 0))
    monkeypatch.setattr("lib.model.load_model", lambda *args: pytest.fail("weights were read"))
    refuses("training needs at least 0.0 GiB", "are free")


def test_needed_bytes_counts_states_of_what_is_trained_only(pruned, toy_folder):
    student, teacher = skeleton(str(pruned()), True), skeleton(str(toy_folder()))
    total = sum(p.numel() for p in student.parameters())
    logits = 3 * 2 * 2 * 32 * 256
    dense = 2 * sum(p.numel() for p in teacher.parameters())
    recipe = RECIPE._replace(bf16=True)
    assert recover.needed_bytes(student, None, recipe, 32) == 16 * total + logits
    assert recover.needed_bytes(student, teacher, recipe, 32) == 16 * total + logits + dense
    needed = [recover.needed_bytes(student, None, recipe._replace(train=part), 32) for part in recover.PARTS]
    assert max(needed) == needed[0] and min(needed) > 4 * total


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_train_as_one_does(given, tmp_path):
    """accelerate launch on the CPU, half the batch each: the same losses, within float error."""
    folder, curves, port = tmp_path / "llama-pruned", [], str(29000 + os.getpid() % 2000)
    for n, batch in ((1, 2), (2, 1)):
        changes = {**given, "batch_size": batch, "output_dir": tmp_path / f"of{n}", "tokens": 1024}
        words = [
            "launch",
            *(["--multi_gpu"] if n > 1 else []),
            "--num_processes",
            str(n),
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
        ]
        words += ["--dynamo_backend", "no", "--main_process_port", port, "-m", "scripts.recover", str(folder)]
        process = start("accelerate.commands.accelerate_cli", *words, *flags(**changes), python=("-m",))
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        curves.append(load(tmp_path / f"of{n}").state_dict())
        perplexity = json.loads(out.splitlines()[-1])["perplexity"]["text"]["recovered"]
        curves[-1]["perplexity"] = torch.tensor(perplexity)
    for name in curves[0]:
        torch.testing.assert_close(curves[0][name], curves[1][name], atol=2e-4, rtol=1e-3)
