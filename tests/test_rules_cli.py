"""block_search.py's rules, budgets, cost files and refinements from the command line, and what replays their files."""

import json

import pytest
from command_line import flags, unsealed

from lib.blocks import Block
from lib.files import write_json
from lib.hub import fingerprint
from lib.measure import device_name
from lib.orders import read_order, save_order
from scripts import bench_model, export, report

RULE = {"del_block_num": None, "rule": "per-parameter"}
SWAPS = {**RULE, "target_ratio": 0.3, "refine": "swaps"}


def written(folder):
    (path,) = folder.glob("*_del_order_list.json")
    return path, json.loads(path.read_text())


def test_a_rule_and_a_budget_reach_the_order_file(search, tmp_path):
    run = search(**RULE, target_ratio=0.2, budget="kv=0.5")
    path, _ = written(tmp_path / "out")
    order, meta = read_order(path)
    assert "_per-parameter_" in path.name and meta["rule"] == "per-parameter"
    assert meta["budgets"] == [["parameters", 0.2], ["kv", 0.5]]
    assert sum(block.kind == "mha" for block in order) >= 2 and meta["steps"][-1]["removed_percent"] >= 20
    assert "rule          per-parameter, cost parameters, 50 % of kv; refined by none; pass nothing" in run.out


def test_the_dry_run_says_what_is_reachable(search):
    run = search(dry_run=True)
    assert run.result["reachable"].keys() == {"parameters", "kv", "flops"}
    assert run.result["reachable"]["kv"] == 1 and 0 < run.result["reachable"]["parameters"] < 1
    assert "100.00 % of kv" in run.out


def test_swaps_leave_a_file_that_is_replayed_reported_exported_and_not_searched_twice(
    search, evaluate, call, toy_folder, tmp_path
):
    run = search(**SWAPS)
    assert run.code == 0 and "no exchange helps" in run.out
    path, held = written(tmp_path / "out")
    order, meta = read_order(path)
    refined = meta["refined"]
    assert refined["ended"] and refined["removed_percent"] >= 30
    assert refined["score"] <= meta["steps"][-1]["perplexity"]
    assert run.result["order"] == [f"{kind}{i}" for kind, i in refined["removed"]]
    assert sorted(map(tuple, held[str(len(order))])) == sorted(map(tuple, refined["removed"]))
    replayed = evaluate(ppl_search_file=path, del_block_num=len(order), cal_nsamples=20, seed=42).result
    assert sorted(replayed["removed"]) == sorted(run.result["order"])
    assert replayed["perplexity"] == pytest.approx(refined["perplexity"], rel=1e-6)
    again = search(**SWAPS)
    assert "nothing to do" in again.out and again.result == run.result
    words = flags(model_path=toy_folder(), ppl_search_file=path, target_ratio=0.3, output_dir=tmp_path / "export")
    assert sorted(call(export.main, *words).result["removed"]) == sorted(run.result["order"])
    assert call(report.main, str(path), "--output-dir", str(tmp_path / "page")).code == 0


def test_evolution_needs_no_order_and_is_seeded(search, tmp_path):
    words = {**RULE, "rule": None, "target_ratio": 0.3, "refine": "evolve", "refine_evaluations": 30}
    run = search(**words)
    path, held = written(tmp_path / "out")
    assert run.code == 0 and held["meta"]["steps"] == [] and held["meta"]["refined"]["removed_percent"] >= 30
    assert list(held) == [str(len(run.result["order"])), "meta"]
    assert search(**words, overwrite=True).result["order"] == run.result["order"]


def test_an_evaluation_limit_is_kept_and_a_higher_one_goes_on(search, tmp_path):
    assert "as many evaluations as allowed" in search(**SWAPS, refine_evaluations=1).out
    _, held = written(tmp_path / "out")
    assert not held["meta"]["refined"]["ended"]
    assert "no exchange helps" in search(**SWAPS).out


def nested_not(path, final=((("mlp", 0)), ("mha", 2), ("mlp", 2))):
    order = [Block("mha", 0), Block("mha", 1), Block("mlp", 1), Block("mha", 2)]
    save_order(path, order, {"steps": []}, [Block(*block) for block in final])
    return path


def test_smaller_sets_are_the_orders_and_sizes_that_are_not_there_are_refused(evaluate, refused, tmp_path):
    path = nested_not(tmp_path / "order.json")
    assert evaluate(ppl_search_file=path, del_block_num=2).result["removed"] == ["mha0", "mha1"]
    assert evaluate(ppl_search_file=path, del_block_num=3).result["removed"] == ["mlp0", "mha2", "mlp2"]
    refused("holds 3 removals; use 0..3", script="eval", ppl_search_file=path, del_block_num=4)
    save_order(path, [], {"steps": []}, [Block("mlp", 0), Block("mha", 2), Block("mlp", 2)])
    refused("a set of 3 removals and none of 2", "use 0..0 or 3", script="eval", ppl_search_file=path, del_block_num=2)


@pytest.mark.parametrize("spoil", ({"order": [["mha", 1]]}, {"order": None}, {"order": [["mha"]]}))
def test_a_damaged_file_of_sets_is_refused(refused, tmp_path, spoil):
    path = nested_not(tmp_path / "order.json")
    held = unsealed(path)
    held["meta"] |= spoil
    path.write_text(json.dumps(held))
    refused("order.json: not nested, and damaged", script="eval", ppl_search_file=path, del_block_num=3)


def cost_file(folder, model, **changes):
    seconds = {
        "weights": fingerprint(str(model)),
        "device_name": device_name("cpu"),
        "dtype": "fp32",
        "layers": 3,
        "tokens": [1, 8, 2],
        "mha": 2.0,
        "mlp": 3.0,
        "rest": 5.0,
    }
    write_json(folder / "cost.json", seconds | changes)
    return folder / "cost.json"


@pytest.mark.parametrize(
    "changes, says",
    (
        ({"weights": "abc"}, "measured of another model"),
        ({"device_name": "H1000"}, "measured of another device"),
        ({"dtype": "bf16"}, "measured of another dtype"),
        ({"mha": 0}, "does not hold the seconds"),
        ({"mlp": "fast"}, "does not hold the seconds"),
    ),
)
def test_a_cost_file_of_something_else_is_refused(refused, toy_folder, tmp_path, changes, says):
    path = cost_file(tmp_path, toy_folder(), **changes)
    refused("--cost-file", says, **RULE, target_ratio=0.2, cost="latency", cost_file=path)


def test_latency_is_searched_by_a_cost_file(search, toy_folder, tmp_path):
    run = search(**RULE, target_ratio=0.3, cost="latency", cost_file=cost_file(tmp_path, toy_folder()))
    assert sum({"mha": 2, "mlp": 3}[name[:3]] for name in run.result["order"]) >= 0.3 * (3 * 5 + 5)


@pytest.mark.parametrize(
    "changes, says",
    (
        ({"budget": "kv=2", "del_block_num": None}, "2"),
        ({"budget": "cake=0.5", "del_block_num": None}, "'cake=0.5' is not COST=SHARE"),
        ({"budget": "kv=0.5"}, "--del-block-num goes with no --budget"),
        ({"budget": "kv=0.5", "del_block_num": None, "block_type": "mlp"}, "hold 0.0 of it; use at most that"),
        ({"budget": "parameters=0.9", "del_block_num": None}, "of it; use at most that"),
        ({"cost": "latency", **RULE, "target_ratio": 0.2}, "latency needs --cost-file"),
        ({"cost_file": "x.json"}, "read for latency only"),
        ({"cost_file": "x.json", "cost": "latency", "rule": "per-parameter"}, "x.json: no such file"),
        ({"refine": "swaps", "del_block_num": None}, "--refine swaps: how much must go?"),
        ({"refine_evaluations": 5}, "nothing is refined"),
        ({"refine": "swaps", "metric": "bi"}, "--refine swaps: --metric bi does not search"),
        ({"rule": "per-parameter", "metric": "bi"}, "--rule per-parameter: --metric bi does not search"),
    ),
)
def test_what_does_not_go_together_is_refused(refused, changes, says):
    refused(says, **changes)


def test_an_order_of_another_model_is_not_refined(search, refused, toy_folder, tmp_path):
    search(**SWAPS)
    path, _ = written(tmp_path / "out")
    held = unsealed(path)
    held["meta"]["weights"] = "of another model"
    path.write_text(json.dumps(held))
    refused("exists with other settings (weights", "--overwrite", **SWAPS)


def test_swaps_leave_protected_layers_alone(search, tmp_path):
    run = search(**{**SWAPS, "target_ratio": 0.15}, protect_first=1, protect_last=1)
    assert run.code == 0 and {name[3:] for name in run.result["order"]} == {"1"}


def test_the_cost_file_of_bench_model_is_of_this_model_and_read_again(call, search, toy_folder, tmp_path, monkeypatch):
    path, timed = tmp_path / "cost.json", {}
    words = flags(batch_sizes=1, prompt_lengths=32, new_tokens=8, repeats=1, device="cpu", compute_dtype="fp32")

    def measured(runs, repeats):
        timed.update({name: run() for name, run in runs.items()})  # they run, and take what is said here
        return {"whole": [2.0, 9.0, 2.0], "mha": [1.8], "mlp": [1.7]}

    monkeypatch.setattr("lib.costs.interleaved", measured)
    run = call(bench_model.main, str(toy_folder()), *words, "--cost-file", str(path))
    held = json.loads(path.read_text())
    assert run.code == 0 and timed.keys() == {"whole", "mha", "mlp"} and min(timed.values()) > 0
    assert (held["mha"], held["mlp"], held["rest"]) == pytest.approx((0.2, 0.3, 2 - 3 * 0.5))
    assert held["layers"] == 3 and run.result["block_seconds"] == held
    assert search(**RULE, target_ratio=0.1, cost="latency", cost_file=path).code == 0
    monkeypatch.setattr("lib.costs.interleaved", lambda runs, repeats: {"whole": [2.0], "mha": [2.1], "mlp": [1.7]})
    run = call(bench_model.main, str(toy_folder()), *words, "--cost-file", str(path))
    assert run.code == 2 and "measure again with more repeats" in run.err and len(run.err.splitlines()) == 1
