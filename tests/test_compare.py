"""scripts/compare.py: the same numbers as the single commands, nothing computed twice, nothing lost, failures shown."""

import contextlib
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import SMALL, assert_refused, flags, start, tree

from lib.blocks import KINDS, parse_block
from lib.importance import METRICS
from lib.methods import LACO_WINDOWS, METHODS
from lib.orders import read_order
from scripts import compare

LAYERS = 8
EVERY = [m for m in METHODS if not m.endswith("-block") or m in ("bi-block", "ppl-plus-block", "random-block")]
BLOCKS = [f"{kind}{i}" for kind in ("mha", "mlp") for i in range(LAYERS)]


GIVEN = {**SMALL, "cal_nsamples": 8}  # a text of 16 documents: half for calibration, half for evaluation


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two files of different words: for calibration and evaluation, and for evaluation alone."""
    folder = tmp_path_factory.mktemp("text")
    text = [f"Document {i}: {i * 37 % 101} quick foxes jump over {i * 7} lazy dogs and back." for i in range(16)]
    other = [f"Line {i * 13 % 97}: the rain in {i} towns stays mainly there." for i in range(10)]
    (folder / "text.txt").write_text("\n\n".join(text))
    (folder / "other.txt").write_text("\n\n".join(other))
    return folder / "text.txt", folder / "other.txt"


@pytest.fixture(scope="module")
def model(toy_folder):
    return toy_folder(num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def words(model, texts):
    """Return a function that gives a command line: (folder, methods, ratios, **flags); spaces separate words."""

    def line(folder, methods, ratios="0.1", **changes):
        lists = {"methods": methods, "ratios": ratios, "tasks": "", "eval_datasets": f"{texts[1]} {texts[0]}"}
        given = {**GIVEN, "model_path": model, "cal_dataset": texts[0], "output_dir": folder, **changes}
        lists |= {name: given.pop(name) for name in (*lists, "cal_seeds") if name in given}
        return [*flags(**given), *(w for name, value in lists.items() for w in flags(**{name: True}) + value.split())]

    return line


@pytest.fixture
def comparison(call, words, monkeypatch, tmp_path):
    """Return a function that runs a comparison here: (methods, ratios, **flags) -> (Run, compare.json)."""
    from lib.report import page

    drawing = page.write_report

    def run(*args, pictures=False, **changes):
        monkeypatch.setattr(page, "write_report", drawing if pictures else lambda *_: (None, [], []))
        done = call(compare.main, *words(changes.pop("output_dir", tmp_path / "out"), *args, **changes))
        assert done.code == (1 if done.result["failed"] else 0), done
        return done, json.loads(Path(done.result["result"]).read_text())

    return run


def by_method(summary, ratio):
    return {row["method"]: row for row in summary["rows"] if row["ratio"] == pytest.approx(ratio)}


def cells(folder):
    """Return {(method, ratio, seed): content} of the kept cells."""
    kept = [json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")]
    return {(c["settings"]["method"], c["settings"]["ratio"], c["settings"]["seed"]): c for c in kept}


def parameters_without(folder, blocks):
    """Return (parameters left, all parameters) of a Llama whose blocks are taken out by hand."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    total = sum(p.numel() for p in model.parameters())
    for name in blocks:
        layer = model.model.layers[parse_block(name).layer]
        for part in ("self_attn", "input_layernorm") if name.startswith("mha") else ("mlp", "post_attention_layernorm"):
            delattr(layer, part)
    return sum(p.numel() for p in model.parameters()), total


# ---- the numbers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(words, tmp_path_factory):
    """Nearly every method at two ratios: (what was printed, compare.json, folder)."""
    folder, out = tmp_path_factory.mktemp("everything") / "out", io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.report.pictures.DPI", 40)
        patch.setattr("lib.cells.LACO_WINDOWS", 99)  # all of them, as scripts.laco takes
        compare.main(words(folder, " ".join(EVERY), "0.1 0.19"))
    return out.getvalue(), json.loads((folder / "compare.json").read_text()), folder


def test_every_method_removes_the_fewest_units_that_reach_each_ratio(everything, model):
    _, summary, _ = everything
    assert [row["failed"] for row in summary["rows"]] == [None] * len(summary["rows"])
    assert {row["method"] for row in summary["rows"]} == {"dense", *EVERY}
    sizes = {}
    for name in ("mha0", "mlp0"):
        left, total = parameters_without(model, [name])
        sizes[name[:3]] = total - left
    for row in summary["rows"]:
        order = row["removed"]
        gone = sum(sizes[name[:3]] for name in order)
        assert row["parameters"] == total - gone
        assert row["removed_percent"] == pytest.approx(100 * gone / total)
        if row["method"] == "dense":
            assert order == []
            continue
        if "refine" in METHODS[row["method"]].changes:  # sets, by depth
            assert gone >= row["ratio"] / 100 * total
            continue
        size = 1 if METHODS[row["method"]].changes.get("block_type") in ("mix", *KINDS) else 2
        fewest = next(
            k
            for k in range(0, len(BLOCKS) + 1, size)
            if sum(sizes[name[:3]] for name in order[:k]) >= row["ratio"] / 100 * total
        )
        assert len(order) == fewest
        if size == 2:
            assert order == [f"{kind}{parse_block(name).layer}" for name in order[::2] for kind in ("mha", "mlp")]
        if row["method"] in ("ppl-plus", "taylor-plus", "ppl-plus-block"):
            assert {parse_block(name).layer for name in order} <= {4, 5}
    assert parameters_without(model, summary["rows"][-1]["removed"])[0] == summary["rows"][-1]["parameters"]


def test_numbers_are_those_of_the_single_commands(everything, model, call, evaluate, texts, tmp_path):
    import block_search

    _, summary, out = everything
    mine = by_method(summary, 19)
    for method in ("blockpruner", "cost-greedy", "sleb", "bi", "window_ppl", "random-block"):
        row = mine[method]
        path = out / row["order_file"]
        assert [str(block) for block in read_order(path)[0]][: len(row["removed"])] == row["removed"]
        result = evaluate(
            model_path=model,
            cal_dataset=texts[1],
            cal_nsamples=None,
            ppl_search_file=path,
            del_block_num=len(row["removed"]),
        ).result
        assert result["perplexity"] == row["perplexity"]["other"]["value"]
        assert result["pruning_ratio_percent"] == pytest.approx(row["removed_percent"], abs=1e-9)
    for method in ("refined", "evopress", "compensated"):
        row = mine[method]
        words = {"model_path": model, "cal_dataset": texts[1], "cal_nsamples": None, "target_ratio": 0.19}
        result = evaluate(**words, ppl_search_file=out / row["order_file"]).result
        assert sorted(result["removed"]) == sorted(row["removed"])
        assert result["perplexity"] == pytest.approx(row["perplexity"]["other"]["value"], rel=1e-5)
    assert mine["refined"]["perplexity"] != mine["compensated"]["perplexity"]
    from scripts import laco

    checkpoint = call(
        laco.main,
        *flags(**GIVEN, model_path=model, cal_dataset=texts[0], target_ratio=0.19, output_dir=tmp_path / "laco"),
    ).result["checkpoint"]
    result, row = evaluate(model_path=checkpoint, cal_dataset=texts[1], cal_nsamples=None).result, mine["laco"]
    assert result["perplexity"] == pytest.approx(row["perplexity"]["other"]["value"], rel=1e-6)
    assert result["parameters"] == row["parameters"] < summary["parameters"]
    assert row["perplexity"] != mine["laco-last"]["perplexity"]
    mine = mine["blockpruner"]
    alone = call(
        block_search.main,
        *flags(**GIVEN, model_path=model, cal_dataset=texts[0], target_ratio=0.19, ppl_search_path=tmp_path),
    )
    assert alone.result["order"] == mine["removed"]
    again = call(
        block_search.main,
        *flags(
            **GIVEN,
            model_path=model,
            cal_dataset=texts[0],
            target_ratio=0.19,
            ppl_search_path=(out / mine["order_file"]).parent,
        ),
    )
    assert "nothing to do" in again.out, "an order of a comparison is an order of block_search.py"


def test_several_draws_of_the_calibration_text_are_rows_of_their_own_and_means_in_the_table(comparison, model):
    run, summary = comparison("blockpruner bi random", "0.1", cal_seeds="42 43", cal_nsamples=6)
    rows = [row for row in summary["rows"] if row["ratio"]]
    assert [(row["method"], row["seed"]) for row in rows] == [
        *(("blockpruner", 42), ("blockpruner", 43), ("bi", 42), ("bi", 43)),
        *(("random", seed) for seed in (0, 1, 2)),
    ]
    assert [row["failed"] for row in rows] == [None] * 7
    first, second = (row["perplexity"]["text"]["value"] for row in rows[:2])
    assert first != second and rows[0]["order_file"] != rows[1]["order_file"]
    assert summary["settings"]["cal_seeds"] == [42, 43] and "blockpruner (2 seeds)" in run.out
    texts = summary["texts"]["text"]
    assert texts["left_out"] > 6, "what any draw calibrates on is not evaluated on"


def test_errors_are_those_of_paired_differences(everything):
    _, summary, folder = everything
    kept, T = cells(folder), SMALL["ppl_eval_seqlen"]

    def losses(row, name):
        measured = kept[row["method"], row["ratio"] / 100, row["seed"]]["measured"]
        calibration = summary["settings"]["calibration"]["text_sha256"][:12]
        return next(
            np.array(v) for k, v in measured.items() if k.startswith(f"losses {name} ") and not k.endswith(calibration)
        ) / (T - 1)

    dense = summary["rows"][0]
    for name in ("other", "text"):
        base = losses(dense, name)
        N = len(base)
        assert N == summary["texts"][name]["windows"] > 2
        own = dense["perplexity"][name]
        assert own["value"] == pytest.approx(math.exp(base.mean()))
        assert own["error"] == pytest.approx(math.exp(base.mean()) * base.std(ddof=1) / math.sqrt(N))
        for ratio in (10, 19):
            rows = [row for row in by_method(summary, ratio).values() if row["seed"] is None]
            best = min(rows, key=lambda row, n=name: row["perplexity"][n]["value"])
            for row in rows:
                ours, mean = row["perplexity"][name], losses(row, name).mean()
                difference = losses(row, name) - base
                assert ours["value"] == pytest.approx(math.exp(mean))
                assert ours["error"] == pytest.approx(math.exp(mean) * difference.std(ddof=1) / math.sqrt(N))
                if row is best:
                    assert ours["level"] is False and "behind_best" not in ours
                    continue
                behind = losses(row, name) - losses(best, name)
                error = behind.std(ddof=1) / math.sqrt(N)
                assert ours["behind_best"]["nats"] == pytest.approx(behind.mean(), abs=1e-12)
                assert ours["behind_best"]["error"] == pytest.approx(error, abs=1e-12)
                assert ours["level"] == (ours["behind_best"]["nats"] <= 2 * ours["behind_best"]["error"])


def test_table_page_and_json_say_the_same(everything):
    printed, summary, out = everything
    markdown, latex = (out / "table.md").read_text(), (out / "table.tex").read_text()
    assert markdown.partition("\n\n")[2].strip() in printed
    for ratio in (10, 19):
        rows = [row for row in by_method(summary, ratio).values() if row["seed"] is None]
        best = min(rows, key=lambda row: row["perplexity"]["other"]["value"])
        bold = f"{best['perplexity']['other']['value']:.2f}"
        section = markdown.partition(f"*at least {ratio} % removed*")[2].partition("*at least")[0]
        assert f"**{bold}**" in section
        assert f"\\textbf{{{bold}}}" in latex
    draws = [
        row["perplexity"]["other"]["value"]
        for row in summary["rows"]
        if (row["method"], row["ratio"]) == ("random", pytest.approx(19))
    ]
    assert len(draws) == 3 and len(set(draws)) > 1
    line = next(line for line in markdown.partition("*at least 19")[2].splitlines() if line.startswith("| random (3"))
    assert re.sub(r"[*≈]", "", line).split(" | ")[3] == f"{np.mean(draws):.2f} ± {np.std(draws, ddof=1):.2f}"
    page = (out / "index.html").read_text()
    assert "random (3 seeds)" in page and "block influence" in page
    for words in (f"{summary['parameters']:,}", "fp32", "other.txt", "windows 7", "random (3 seeds)"):
        assert words in page, words
    names = {path.name for path in out.glob("*.png")}
    assert {"perplexity.png", "removed_10.png", "removed_19.png"} <= names and "accuracy.png" not in names
    searched = [m for m in EVERY if METRICS[METHODS[m].changes.get("metric", "last")].kind == "searched"]
    files = {"swaps": 2, "evolve": 0}  # refined orders are one of each ratio, an evolution scores no candidates
    expected = sum(files.get(METHODS[m].changes.get("refine"), 1) for m in searched)
    assert len([name for name in names if name.startswith("scores_")]) == expected
    assert "FEW WINDOWS" in printed and "FEW WINDOWS" in page and "FEW WINDOWS" in markdown


def test_documents_that_are_calibrated_on_are_not_evaluated_on(everything):
    _, summary, _ = everything
    about = summary["texts"]["text"]
    assert (about["documents"], about["left_out"]) == (8, 8)
    assert summary["texts"]["other"]["left_out"] is None


# ---- going on ------------------------------------------------------------------------------------------------


def test_a_killed_comparison_goes_on_and_recomputes_nothing(comparison, words, tmp_path):
    methods, out = "blockpruner random", tmp_path / "out"
    process = start("-m", "scripts.compare", *words(out, methods, "0.1 0.2"))
    for line in process.stdout:
        if line.startswith("   3/"):
            break
    process.kill()
    process.communicate()
    before = {name: time for name, time in tree(out).items() if name.startswith(("cells/", "orders/"))}
    kept = cells(out)
    assert len(kept) >= 3
    run, summary = comparison(methods, "0.1 0.2")
    after = tree(out)
    whole = {path.name for path in (out / "cells").glob("*.json")}
    assert len(whole) == run.result["cells"] == 1 + 2 * (1 + 3)
    measured = sum(len(cell["measured"]) for cell in kept.values())
    assert run.result["measurements"] == 2 * run.result["cells"] + 1 - measured, "the dense model's: calibration too"
    finished = [name for name, time in before.items() if time and len(kept_measured(out / name)) in (2, 3)]
    assert all(after[name] == before[name] for name in finished if name.startswith("cells/"))
    assert [row["failed"] for row in summary["rows"]] == [None] * run.result["cells"]
    straight, other = comparison(methods, "0.1 0.2", output_dir=tmp_path / "straight")
    assert other["rows"] != [] and [without_time(row) for row in other["rows"]] == [
        without_time(row) for row in summary["rows"]
    ]
    again, same = comparison(methods, "0.1 0.2")
    assert again.result["measurements"] == 0 and again.out.count("(kept)") == run.result["cells"]
    assert same["rows"] == summary["rows"]
    assert tree(out)["cells"] == after["cells"] and {n: t for n, t in tree(out).items() if n.startswith("cells/")} == {
        n: t for n, t in after.items() if n.startswith("cells/")
    }


def kept_measured(path):
    return json.loads(path.read_text()).get("measured", {}) if path.suffix == ".json" else {}


def without_time(row):
    return {name: value for name, value in row.items() if name not in ("seconds", "order_file")}


def test_new_ratios_and_texts_compute_only_themselves(comparison, texts):
    first, _ = comparison("sleb last", "0.2")
    assert first.result["measurements"] == 7
    more, summary = comparison("sleb last bi", "0.1 0.2")
    assert more.result["measurements"] == 2 * 4
    assert len(by_method(summary, 10)) == 3
    fewer, summary = comparison("sleb", "0.2", eval_datasets=str(texts[1]))
    assert fewer.result["measurements"] == 0 and list(summary["texts"]) == ["other"]


def test_what_another_method_left_the_same_is_not_measured_twice(comparison, tmp_path):
    both, summary = comparison("sleb ppl-oneshot laco", "0.05")  # a single layer, by the same perplexities
    _, sleb, oneshot, laco = summary["rows"]
    assert sleb["removed"] == oneshot["removed"] and len(sleb["removed"]) == 2
    assert both.result["measurements"] == 3 + 2 + 2 and both.out.count("(kept)") == 1
    alone, other = comparison("ppl-oneshot", "0.05", output_dir=tmp_path / "alone")
    assert alone.result["measurements"] == 3 + 2
    assert other["rows"][1]["perplexity"]["other"]["value"] == oneshot["perplexity"]["other"]["value"]
    merged = {name: laco["perplexity"][name]["value"] for name in laco["perplexity"]}
    assert all(merged[name] != sleb["perplexity"][name]["value"] for name in merged), "merged layers are other weights"
    assert comparison("ppl-oneshot", "0.05")[0].result["measurements"] == 0, "kept in its own file"


def test_other_settings_share_no_cell(comparison, tmp_path):
    first, _ = comparison("bi")
    kept = set(tree(tmp_path / "out" / "cells"))
    for changes in ({"cal_nsamples": 9}, {"ppl_eval_batch_size": 4}, {"compute_dtype": "bf16"}, {"seed": 1}):
        run, _ = comparison("bi", **changes)
        assert run.result["measurements"] >= 4, changes
    assert len(set(tree(tmp_path / "out" / "cells"))) == 5 * len(kept)
    assert comparison("bi")[0].result["measurements"] == 0


def test_laco_is_judged_on_the_first_few_windows(comparison, monkeypatch):
    from lib import laco

    given, collapse = [], laco.collapse

    def spied(decoder, windows, *args, **options):
        given.append(windows)
        return collapse(decoder, windows, *args, **options)

    monkeypatch.setattr(laco, "collapse", spied)
    _, summary = comparison("laco", "0.19")
    assert summary["settings"]["calibration"]["windows"] > LACO_WINDOWS == 4 == len(given[0])
    assert summary["rows"][1]["failed"] is None and len(given) == 1


def test_speed_is_measured_against_the_dense_model(comparison, tmp_path):
    run, summary = comparison("last laco", "0.5", measure=True)
    rows = {row["method"]: row["speed"] for row in summary["rows"]}
    assert rows.keys() == {"dense", "last", "laco"}
    for speed in rows.values():
        assert set(speed) == {"prefill x", "decode x"} and all(0 < times < 100 for times in speed.values())
    assert rows["last"]["decode x"] > rows["dense"]["decode x"], "half of the layers are gone"
    assert "| prefill x | decode x |" in (tmp_path / "out" / "table.md").read_text()
    assert comparison("last laco", "0.5", measure=True)[0].result["measurements"] == 0


# ---- failures ------------------------------------------------------------------------------------------------


def test_a_cell_that_fails_is_shown_with_its_reason_and_the_rest_goes_on(comparison, monkeypatch, tmp_path):
    from lib import importance

    def broken(*args, **kwargs):
        raise RuntimeError("out of luck_here:\nnobody knows why")

    healthy = importance.METRICS["bi"]
    monkeypatch.setitem(importance.METRICS, "bi", healthy._replace(function=broken))
    run, summary = comparison("mha bi last", "0.1 0.5", pictures=True)
    reasons = {(row["method"], row["ratio"]): row["failed"] for row in summary["rows"]}
    assert reasons["dense", 0] is reasons["last", 10] is reasons["last", 50] is reasons["mha", 10] is None
    assert "8 blocks (all mha) hold" in reasons["mha", 50]
    assert reasons["bi", 10] == reasons["bi", 50] == "RuntimeError: out of luck_here: nobody knows why"
    assert run.result["failed"] == 3
    out = tmp_path / "out"
    assert "| bi | failed: RuntimeError: out of luck\\_here: nobody knows why |" in (out / "table.md").read_text()
    assert "out of luck\\_here" in (out / "table.tex").read_text()
    assert "failed: RuntimeError: out of luck_here: nobody knows why" in (out / "index.html").read_text()
    monkeypatch.setitem(importance.METRICS, "bi", healthy)
    run, summary = comparison("mha bi last", "0.1 0.5")
    assert run.result["failed"] == 1 and run.result["measurements"] == 4


def test_a_cell_whose_file_is_damaged_fails_alone(comparison, tmp_path):
    _, before = comparison("mha last", "0.1")
    (damaged,) = (tmp_path / "out" / "cells").glob("mha_*.json")
    damaged.write_text("{")
    run, summary = comparison("mha last", "0.1")
    rows = {row["method"]: row for row in summary["rows"]}
    assert str(damaged) in rows["mha"]["failed"] and "remove it" in rows["mha"]["failed"]
    for row in before["rows"]:
        for name, ppl in row["perplexity"].items() if row["method"] != "mha" else ():
            assert rows[row["method"]]["perplexity"][name]["value"] == ppl["value"]
    assert run.result["failed"] == 1 and run.result["measurements"] == 0


def test_a_task_that_fails_hides_no_other_number(comparison, monkeypatch, task_data, tmp_path):
    from lib import cells as module

    def broken(bench, task, removed):
        if task == "piqa":
            raise RuntimeError("the hub is down")
        return {"score": 0.5, "stderr": 0.1}

    monkeypatch.setattr(module, "run_task", broken)
    plain = comparison("last", "0.1 0.3", output_dir=tmp_path / "plain")[1]
    run, summary = comparison("last", "0.1 0.3", tasks="piqa arc_easy", task_ratios=0.3, task_data=task_data)
    assert [row["perplexity"] for row in summary["rows"]] == [row["perplexity"] for row in plain["rows"]]
    tasks = [{name: task["score"] for name, task in row["tasks"].items()} for row in summary["rows"]]
    assert tasks == [{"arc_easy": 0.5}, {"arc_easy": 0.5}, {}]
    assert run.result["failed"] == 2
    assert "INCOMPLETE: last at 30 %: RuntimeError: the hub is down" in (tmp_path / "out" / "table.md").read_text()


def test_other_weights_at_the_same_path_are_measured_anew(comparison, damaged, tmp_path):
    from families import toy

    folder = damaged()
    first, before = comparison("last", "0.3", model_path=folder)
    toy("llama", seed=5, vocab_size=256).save_pretrained(folder)
    again, after = comparison("last", "0.3", model_path=folder)
    assert again.result["measurements"] == first.result["measurements"]
    assert [row["perplexity"] for row in after["rows"]] != [row["perplexity"] for row in before["rows"]]


def test_a_model_without_finite_numbers_fails_cell_by_cell(comparison, damaged, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = damaged()
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][:] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    run, summary = comparison("blockpruner last", "0.3", model_path=folder)
    rows = {row["method"]: row for row in summary["rows"]}
    assert "NoFiniteCandidate" in rows["blockpruner"]["failed"]
    assert rows["last"]["failed"] is None and rows["last"]["perplexity"]["other"]["value"] == "nan"
    assert "| last |" in (tmp_path / "out" / "table.md").read_text()


def test_a_random_draw_that_is_not_finite_stays_in_the_table_and_on_the_page(call, comparison, damaged, tmp_path):
    from safetensors.torch import load_file, save_file

    from scripts import report

    folder = damaged()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][:] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _, summary = comparison("random", "0.25", model_path=folder, pictures=True)
    values = [row["perplexity"]["other"]["value"] for row in summary["rows"] if row["method"] == "random"]
    assert "nan" in values and set(values) != {"nan"}, "some draws take the damaged block, some do not"
    out = tmp_path / "out"
    assert re.search(r"^\| random \(3 seeds\) \|.*\| nan ± nan \| nan ± nan \|$", (out / "table.md").read_text(), re.M)
    page = out / "index.html"
    page.unlink()
    assert call(report.main, str(out / "compare.json"), "--output-dir", str(out)).code == 0
    assert "random (3 seeds)" in page.read_text()


def test_bad_flags_are_refused_before_the_model_is_loaded(call, words, texts, tmp_path):
    before = tree(tmp_path)
    (tmp_path / "file").write_text("")
    shutil.copy(texts[1], tmp_path)
    out = tmp_path / "out"
    for line, says in (
        (words(out, "blockprune"), ("'blockprune'", "blockpruner")),
        (words(out, "last", "10"), ("'10'", "share from 0 to 1")),
        (words(out, "last", "0.1", task_ratios="0.2"), ("--task-ratios 0.2", "--ratios 0.1")),
        (words(out, "last", eval_datasets="nowhere.txt"), ("nowhere.txt",)),
        (words(tmp_path / "file", "last"), ("--output-dir", "not a folder")),
        (words(out, "last", limit="piqa=3"), ("--limit piqa", "--eval-datasets")),
        (words(out, "last", eval_datasets=f"{texts[1]} {tmp_path / 'other.txt'}"), ("two files are called other",)),
        (words(out, "last", tasks="nothing", task_data=tmp_path), ("nothing",)),
        (words(out, "last", model_path=""), ("--model-path is missing",)),
        (words(out, "last", model_path=tmp_path / "none"), ("no such file or folder",)),
    ):
        assert_refused(call(compare.main, *line), *says)
    (tmp_path / "file").unlink()
    (tmp_path / "other.txt").unlink()
    assert tree(tmp_path) == before


def test_limits_are_labelled_and_shorten_what_they_name(comparison, tmp_path):
    run, summary = comparison("last", limit="other=2", pictures=True)
    assert summary["texts"]["other"]["windows"] == 2 < summary["texts"]["text"]["windows"]
    assert "NOT A RESULT, --limit: other=2" in run.out
    assert "NOT A RESULT, --limit: other=2" in (tmp_path / "out" / "index.html").read_text()


# ---- tasks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def task_data(tmp_path, monkeypatch):
    """A folder with 12 rows of PIQA and 10 of ARC-e in the hub's form."""
    pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    piqa = [{"goal": f"Count to {i}", "sol1": f"say {i}", "sol2": f"say {i * i}", "label": i % 2} for i in range(12)]
    arc = [
        {
            "id": str(i),
            "question": f"What is {i}?",
            "answerKey": "AB"[i % 2],
            "choices": {"text": [f"number {i}", f"letter {i}"], "label": ["A", "B"]},
        }
        for i in range(10)
    ]
    for name, rows in (("piqa", piqa), ("arc_easy", arc)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def with_end_of_text(model, folder):
    """Return a copy of a toy whose tokenizer has the token that the harness puts before a text."""
    from transformers import AutoTokenizer

    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(folder)
    return folder


def test_tasks_are_scored_as_eval_does_and_kept_one_by_one(comparison, evaluate, model, texts, task_data, tmp_path):
    model = with_end_of_text(model, tmp_path / "model")
    given = {"model_path": model, "task_data": task_data, "task_ratios": "0.2", "eval_datasets": str(texts[1])}
    comparison("sleb", "0.1 0.2", tasks="piqa", **given)
    run, summary = comparison("sleb", "0.1 0.2", tasks="piqa arc_easy", **given)
    assert [row["failed"] for row in summary["rows"]] == [None] * 3
    assert run.result["measurements"] == 2, "ARC-e of two rows: PIQA and the perplexities are kept"
    dense, most, least = summary["rows"]
    assert least["tasks"] == {} and list(most["tasks"]) == list(dense["tasks"]) == ["piqa", "arc_easy"]
    result = evaluate(
        model_path=model,
        cal_dataset=texts[1],
        cal_nsamples=None,
        do_eval=True,
        task_data=task_data,
        tasks="piqa",
        ppl_search_file=tmp_path / "out" / most["order_file"],
        del_block_num=len(most["removed"]),
    ).result
    assert result["tasks"]["piqa"].items() > most["tasks"]["piqa"].items()  # and which rows they were
    score, table = most["tasks"]["piqa"], (tmp_path / "out" / "table.md").read_text()
    assert f"**{100 * score['score']:.2f}** ± {100 * score['stderr']:.2f}" in table
    assert "PIQA | ARC-e | average |" in table
