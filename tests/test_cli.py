"""The two scripts as their users run them: an order is searched, written, continued and replayed.

Where the process itself matters a real one is started, elsewhere main() is called.
"""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import transformers
from command_line import SMALL, assert_refused, flags, scores, shell, start, tree, write_gguf
from safetensors.torch import load_file, save_file

import block_search
from lib.blocks import Block
from lib.decoder import Decoder
from lib.model import parameter_count
from lib.orders import check_order, read_order
from lib.schema import read

# What the paper's authors published for Llama-2-7b, by number of calibration documents.
PUBLISHED = {
    32: "mha27 mha25 mha28 mha23 mha24 mha29 mha7 mlp6 mha18 mha19 mlp26 mha30 mha21 mlp23 mlp24 mha12 mlp12 mlp9 "
    "mha10 mlp18",
    64: "mha25 mha27 mha24 mha23 mha28 mha29 mha8 mlp7 mha19 mha30 mlp22 mha21 mlp27 mha18 mlp21 mlp11 mha12 mha14 "
    "mlp14 mlp24",
}


# ---- the good path -------------------------------------------------------------------------------


def test_search_writes_an_order_that_the_papers_scripts_can_read(searched):
    run, folder, path = searched
    assert run.code == 0, run.err
    pictures = {path.name.replace("_del_order_list.json", f"_{name}.png") for name in ("scores", "removed")}
    assert {p.name for p in folder.iterdir()} == {path.name} | pictures, "the order, its pictures and nothing beside"
    with open(path) as f:
        entries = json.load(f)
    assert sorted(entries) == ["1", "2", "3", "meta"]
    for k in range(1, 4):
        blocks = entries[str(k)]
        assert len(blocks) == k and blocks == sorted(blocks, key=lambda block: block[1])
        assert all(block in entries[str(k + 1)] for block in blocks) if k < 3 else True
        assert all(kind in ("mha", "mlp") and 0 <= layer < 3 for kind, layer in blocks)


def test_search_ends_with_one_json_line(searched):
    run, _, path = searched
    order, meta = read_order(path)
    result = run.result
    assert result["order_file"] == str(path)
    assert result["order"] == [str(block) for block in order]
    assert result["perplexity"] == meta["steps"][-1]["perplexity"] == min(meta["steps"][-1]["scores"].values())
    assert result["dense_perplexity"] == meta["dense_perplexity"]
    assert not any(line.startswith("{") for line in run.out.splitlines()[:-1])


def test_the_step_chosen_is_the_lowest_of_all_candidates(searched):
    order, meta = read_order(searched[2])
    left = {f"{kind}{i}" for kind in ("mha", "mlp") for i in range(3)}
    for block, step in zip(order, meta["steps"], strict=True):
        assert set(step["scores"]) == left
        assert step["scores"][str(block)] == min(step["scores"].values()) == step["perplexity"]
        left.remove(str(block))


@pytest.mark.parametrize("k", (1, 2, 3))
def test_eval_of_the_pruned_model_gives_the_searchs_own_perplexity(searched, evaluate, k):
    _, meta = read_order(searched[2])
    run = evaluate(ppl_search_file=searched[2], del_block_num=k)
    assert run.code == 0 and run.err == "", run
    assert run.result["perplexity"] == pytest.approx(meta["steps"][k - 1]["perplexity"], rel=1e-6)
    assert run.result["dense_perplexity"] == pytest.approx(meta["dense_perplexity"], rel=1e-6)
    assert run.result["removed"] == [str(block) for block in read_order(searched[2])[0][:k]]


def test_eval_process_prints_and_writes_its_result(searched, toy_folder, text, tmp_path):
    output = tmp_path / "new" / "folder" / "result.json"
    words = flags(model_path=toy_folder(), cal_dataset=text, ppl_search_file=searched[2], del_block_num=2, **SMALL)
    run = shell("eval.py", *words, *flags(output_path=output))
    assert run.code == 0 and run.err == "", run
    written = read(output, "result")
    assert {**run.result, "kind": "result"} == written
    assert [p.name for p in output.parent.iterdir()] == ["result.json"]
    assert written["model"] == str(toy_folder()) and written["order_file"] == str(searched[2])
    assert written["parameters"] < written["dense_parameters"]
    ratio = 100 * (1 - written["parameters"] / written["dense_parameters"])
    assert written["pruning_ratio_percent"] == pytest.approx(ratio)
    assert {"versions", "seed", "windows", "seqlen", "dtype", "device", "limit"} <= set(written)
    assert f"pruning ratio {ratio:.2f} %" in run.out


def test_eval_of_the_dense_model_needs_no_order(evaluate):
    run = evaluate(del_block_num=0)
    assert run.code == 0 and run.err == "", run
    assert run.result["removed"] == [] and run.result["order_file"] is None
    assert run.result["perplexity"] == run.result["dense_perplexity"]
    assert run.result["pruning_ratio_percent"] == 0


def test_a_limited_evaluation_says_so(evaluate):
    run = evaluate(limit=2)
    assert run.result["windows"] == 2 and "NOT A RESULT" in run.result["limit"]
    assert run.out.count("NOT A RESULT") >= 2


@pytest.mark.parametrize("kind", ("mha", "mlp"))
def test_searching_one_kind_removes_only_that_kind(search, evaluate, tmp_path, toy_folder, kind):
    run = search(block_type=kind, del_block_num=3)
    path = tmp_path / "out" / f"{toy_folder().name}_{kind}_text_ns_20_del_order_list.json"
    assert run.code == 0 and run.result["order_file"] == str(path)
    order, _ = read_order(path)
    assert sorted(order) == [(kind, 0), (kind, 1), (kind, 2)]
    assert evaluate(ppl_search_file=path, del_block_num=3).result["parameters"] > 0


def test_dry_run_writes_nothing(search, tmp_path):
    before = tree(tmp_path)
    run = search(dry_run=True)
    assert run.code == 0 and run.result["dry_run"] and run.result["evaluations"] == 6 + 5
    assert tree(tmp_path) == before


def test_a_gguf_file_is_searched_and_replayed_like_the_folder_it_came_from(search, evaluate, tmp_path, toy_folder):
    pytest.importorskip("gguf")
    file = tmp_path / "models" / "toy.gguf"
    file.parent.mkdir()
    folder = toy_folder(vocab_size=257, num_key_value_heads=4)
    write_gguf(file, transformers.AutoModelForCausalLM.from_pretrained(folder))
    run = search(model_path=file)
    assert run.code == 0, run
    path = tmp_path / "out" / "toy_mix_text_ns_20_del_order_list.json"
    assert run.result["order_file"] == str(path)
    replay = evaluate(model_path=file, ppl_search_file=path, del_block_num=2).result
    assert replay["perplexity"] == pytest.approx(run.result["perplexity"], rel=1e-6)
    dense = evaluate(model_path=folder).result["dense_perplexity"]
    assert replay["dense_perplexity"] == pytest.approx(dense, rel=1e-4)


# ---- engines -------------------------------------------------------------------------------------


def test_every_exact_engine_writes_the_same_order_and_scores(search, tmp_path):
    given = {"del_block_num": 4, "ppl_eval_batch_size": 4}
    found = {}
    ways = {"cached": {}, "exhaustive": {"search": "exhaustive"}, "streamed": {"offload": True}}
    ways["tight"] = {"cache_gb": 0}
    for name, changes in ways.items():
        run = search(**given, **changes, ppl_search_path=tmp_path / name)
        found[name] = scores(run.result["order_file"])
        meta = read_order(run.result["order_file"])[1]
        assert meta["engine"] == {"tight": "cached"}.get(name, name) and not meta["approximate"]
    assert all(other == found["cached"] for other in found.values())


def test_a_race_says_so_sees_a_window_at_a_time_and_is_continued(search, tmp_path):
    race = {"search": "race", "ppl_eval_batch_size": None}
    whole = search(**race, del_block_num=4, ppl_search_path=tmp_path / "whole").result
    path = Path(search(**race, del_block_num=2).result["order_file"])
    run = search(**race, del_block_num=4)
    assert "resuming" in run.out and run.result["order"] == whole["order"]
    order, meta = read_order(path)
    assert scores(path) == scores(whole["order_file"])
    told = meta["engine"], meta["approximate"], meta["race_confidence"], meta["batch_size"]
    assert told == ("race", True, 3.0, 1)
    for block, step in zip(order, meta["steps"], strict=True):
        looked = {name for name, windows in step["windows"].items() if windows}  # 0: was far behind, not looked at
        assert looked == step["scores"].keys() and step["windows"][str(block)] == meta["windows"]
    assert any(n < meta["windows"] for step in meta["steps"] for n in step["windows"].values()), "somebody dropped out"
    exact = search(del_block_num=4, ppl_eval_batch_size=1, ppl_search_path=tmp_path / "exact").result
    assert scores(exact["order_file"])[1][0][str(order[0])] == meta["steps"][0]["perplexity"], "the winner saw all"


def test_a_model_that_was_spread_over_gpus_and_host_is_to_be_offloaded(search, monkeypatch):
    from lib.decoder import Decoder

    monkeypatch.setattr(Decoder, "offloaded", True)
    assert_refused(search(del_block_num=1), "the GPUs cannot hold the model", "--offload")


def test_a_gpu_that_is_full_while_measuring_is_one_line(evaluate, monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    rows, result = tmp_path / "rows", tmp_path / "result.json"
    rows.mkdir()
    (rows / "piqa.jsonl").write_text(json.dumps({"goal": "a", "sol1": "b", "sol2": "c", "label": 0}))
    monkeypatch.setattr("lib.tasks.zero_shot", full)
    monkeypatch.setattr("lib.tasks.check_tokenizer", lambda tokenizer: None)  # the toy's has no special tokens
    run = evaluate(do_eval=True, tasks="piqa", task_data=rows, output_path=result)
    assert run.code == 2 and run.err.endswith("the GPU's memory is full; take a smaller --batch-size\n"), run
    assert run.err.count("\n") == 1 and json.loads(result.read_text())["dense_perplexity"] > 1, "measured before"
    monkeypatch.setattr("lib.ranks.window_losses", full)
    run = evaluate()
    assert run.code == 2 and run.err.endswith("the GPU's memory is full; take a smaller --ppl-eval-batch-size\n"), run


def test_a_full_gpu_is_one_line_and_loses_nothing(search, monkeypatch, tmp_path):
    from lib.importance import METRICS
    from lib.search import greedy

    def full(*args, **more):
        yield next(greedy(*args, **more))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def never(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    whole = tmp_path / "whole"
    with monkeypatch.context() as patch:
        patch.setattr("lib.ranks.window_losses", never)
        run = search(del_block_num=3)
    assert run.code == 1 and "step 1: the GPU's memory is full; less is needed with --offload, or a sm" in run.err, run
    assert "cache-gb" not in run.err, "no states are kept yet"
    with monkeypatch.context() as patch:
        patch.setattr("lib.job.shared_losses", never)
        run = search(metric="bi", del_block_num=2)
    assert run.code == 1 and "removals before it" not in run.err, "judged at once: nothing is kept"
    with monkeypatch.context() as patch:
        patch.setitem(METRICS, "taylor", METRICS["taylor"]._replace(function=never))
        run = search(metric="taylor", del_block_num=2)
    assert run.code == 1 and "less is needed with a smaller --ppl-eval-seqlen" in run.err, "one window is its batch"
    monkeypatch.setattr("lib.job.greedy", full)
    run = search(del_block_num=3)
    assert run.code == 1 and "step 2: the GPU's memory is full; the 1 removals before it" in run.err, run
    monkeypatch.undo()
    run = search(del_block_num=3, offload=True)  # the way that the message shows
    assert "resuming      1 removals" in run.out and read_order(run.result["order_file"])[1]["engine"] == "streamed"
    straight = search(del_block_num=3, ppl_search_path=whole)
    assert scores(run.result["order_file"]) == scores(straight.result["order_file"])


# ---- resuming ------------------------------------------------------------------------------------


def test_a_killed_search_resumes_to_the_same_order_and_scores(call, toy_folder, text, tmp_path):
    model = toy_folder(num_hidden_layers=5)
    given = dict(SMALL, model_path=model, cal_dataset=text, cal_nsamples=60, ppl_eval_batch_size=1, del_block_num=4)
    name = f"{model.name}_mix_text_ns_60_del_order_list.json"
    path = tmp_path / "killed" / name
    process = start("block_search.py", *flags(**given, ppl_search_path=path.parent))
    try:
        deadline = time.monotonic() + 600
        while not path.exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done, _ = read_order(path)  # whatever the moment, the file is whole
    assert 1 <= len(done) < 4, "the toy is too fast to be killed in the middle"

    resumed = shell("block_search.py", *flags(**given, ppl_search_path=path.parent))
    straight = call(block_search.main, *flags(**given, ppl_search_path=tmp_path / "straight"))
    assert resumed.code == straight.code == 0, resumed
    assert scores(path) == scores(tmp_path / "straight" / name)
    assert read_order(path)[0][: len(done)] == done
    assert "resuming" in resumed.out and "resuming" not in straight.out
    for key in ("order", "perplexity", "removed_percent"):
        assert resumed.result[key] == straight.result[key]


def test_the_same_model_and_text_under_other_names_are_continued(search, toy_folder, text, monkeypatch):
    model = toy_folder()
    first = search(model_path=model, del_block_num=1).result
    monkeypatch.chdir(model.parent)
    spelled = {"model_path": f"./{model.name}", "cal_dataset": f"{text.parent}/./{text.name}", "text_column": "text"}
    run = search(**spelled, del_block_num=2)
    assert "resuming      1 removals" in run.out and run.result["order"][:1] == first["order"], run


def test_a_larger_k_continues_and_a_smaller_one_reads_what_is_there(search, tmp_path, searched):
    shutil.copytree(searched[1], tmp_path / "out")
    path = tmp_path / "out" / searched[2].name
    before = scores(path)
    more = search(del_block_num=5)
    order, steps = scores(path)
    assert (order[:3], steps[:3]) == before and len(order) == 5
    assert more.result["order"] == [str(block) for block in order]
    written = path.read_bytes()
    less = search(del_block_num=2)
    assert less.result["order"] == [str(block) for block in order[:2]]
    assert less.result["perplexity"] == steps[1][str(order[1])]
    assert path.read_bytes() == written


def test_another_setting_is_refused_naming_both_values_until_overwritten(search, refused, tmp_path, searched):
    shutil.copytree(searched[1], tmp_path / "out")
    path = tmp_path / "out" / searched[2].name
    refused(str(path), "batch_size 8 there, 4 now", "--overwrite", "--ppl-search-path", ppl_eval_batch_size=4)
    refused("seed 42 there, 7 now", "--overwrite", seed=7)
    run = search(ppl_eval_batch_size=4, overwrite=True)
    assert run.code == 0 and read_order(path)[1]["batch_size"] == 4 and len(read_order(path)[0]) == 2


def test_other_words_in_the_same_file_are_noticed(search, refused, tmp_path, text):
    copy = tmp_path / "text.txt"
    copy.write_text(text.read_text())
    search(cal_dataset=copy)
    copy.write_text(text.read_text().replace("foxes", "boxes"))
    refused("text_sha256", "--overwrite", cal_dataset=copy)


def test_other_weights_in_the_same_folder_are_noticed(search, refused, tmp_path, toy_folder):
    folder = tmp_path / "model"
    shutil.copytree(toy_folder(), folder)
    path = Path(search(model_path=folder).result["order_file"])
    written = path.read_bytes()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for K in (2, 3):  # nothing to do, and something to do
        refused(str(path), "weights", "--overwrite", model_path=folder, del_block_num=K)
    assert path.read_bytes() == written
    assert search(model_path=folder, del_block_num=3, overwrite=True).code == 0


@pytest.mark.parametrize(
    "content, says",
    (
        ("{", "not a readable JSON"),
        ('{"1": [["mha", 0]]}', "does not say how it was searched"),
        ('{"1": [["mha", 0]], "meta": 3}', "meta"),
        (None, "a folder"),
    ),
)
def test_a_file_that_cannot_be_continued_is_refused(search, refused, tmp_path, toy_folder, content, says):
    path = tmp_path / "out" / f"{toy_folder().name}_mix_text_ns_20_del_order_list.json"
    path.parent.mkdir()
    if content is None:
        path.mkdir()
        refused(str(path), says, "give another folder", overwrite=True)
        return
    path.write_text(content)
    refused(str(path), says)
    assert path.read_text() == content
    assert search(overwrite=True).code == 0 and len(read_order(path)[0]) == 2


@pytest.mark.parametrize(
    "break_it",
    (
        lambda meta: meta.pop("steps"),
        lambda meta: meta["steps"].pop(),
        lambda meta: meta["steps"][0].pop("removed_percent"),
        lambda meta: meta["steps"][0].pop("scores"),
        lambda meta: meta.pop("dense_perplexity"),
        lambda meta: meta.update(steps=3),
        lambda meta: meta.update(layers=4),
    ),
)
def test_meta_that_does_not_fit_its_order_is_refused(refused, tmp_path, searched, break_it):
    shutil.copytree(searched[1], tmp_path / "out")
    path = tmp_path / "out" / searched[2].name
    entries = json.loads(path.read_text())
    break_it(entries["meta"])
    path.write_text(json.dumps(entries))
    refused(str(path))


# ---- the paper's own files -----------------------------------------------------------------------


def paper_file(folder, documents):
    """Write a published order the way the paper's scripts do: entry k is the first k removals sorted by layer."""
    sequence = [(name[:3], int(name[3:])) for name in PUBLISHED[documents].split()]
    entries = {k: sorted(sequence[:k], key=lambda block: block[1]) for k in range(1, len(sequence) + 1)}
    path = folder / f"Llama-2-7b_mix_alpaca_ns_{documents}_del_order_list.json"
    path.write_text(json.dumps(entries))
    return path, sequence


def parameters_left(config, removed):
    """Count what a Llama of `config` keeps, from its shapes alone."""
    H, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    sizes = {"mha": 2 * H * H + 2 * H * kv + H, "mlp": 3 * H * config.intermediate_size + H}
    rest = 2 * config.vocab_size * H + H
    return rest + config.num_hidden_layers * sum(sizes.values()) - sum(sizes[kind] for kind, _ in removed)


@pytest.mark.parametrize("documents", PUBLISHED)
def test_a_published_order_replays_and_leaves_what_the_shapes_say(tmp_path, toy_folder, documents):
    path, sequence = paper_file(tmp_path, documents)
    order, meta = read_order(path)
    assert order == [Block(*block) for block in sequence] and meta == {}
    model = transformers.AutoModelForCausalLM.from_pretrained(toy_folder(num_hidden_layers=32))
    check_order(order, 32, path, meta)
    decoder = Decoder(model)
    for k in range(1, 21):
        decoder.remove(order[k - 1 : k])
        assert parameter_count(model) == parameters_left(model.config, sequence[:k])


def test_eval_replays_a_published_order(evaluate, tmp_path, toy_folder):
    path, sequence = paper_file(tmp_path, 64)
    model = toy_folder(num_hidden_layers=32)
    run = evaluate(model_path=model, ppl_search_file=path, del_block_num=17)
    assert run.code == 0 and run.err == "", run
    config = transformers.AutoConfig.from_pretrained(model)
    assert run.result["dense_parameters"] == parameters_left(config, [])
    assert run.result["parameters"] == parameters_left(config, sequence[:17])
    assert run.result["removed"] == PUBLISHED[64].split()[:17]
