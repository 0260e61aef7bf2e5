"""Rules, costs and budgets from Settings to the order file: what is written, continued, refused."""

import json

import pytest
from command_line import unsealed

from lib.costs import BlockSeconds
from lib.data import read_text
from lib.decoder import Decoder
from lib.job import Settings, Taken, open_job, steps
from lib.model import load_model, load_tokenizer, skeleton


@pytest.fixture
def opened(toy_folder, text, tmp_path):
    """Return a function that opens the job of some Settings of the toy."""
    folder = toy_folder()
    words = read_text(str(text), load_tokenizer(str(folder)), 32, documents=20)

    def run(overwrite=False, **changes):
        settings = Settings(str(folder), dtype="fp32", **changes)
        return open_job(settings, words, skeleton(str(folder)), tmp_path / "out", overwrite)

    run.decoder = lambda: Decoder(load_model(str(folder), "fp32", "cpu"))
    return run


def finish(job, decoder):
    return [unit for unit, _ in steps(job, decoder, dense=1.0)]


def test_the_papers_order_lies_beside_that_of_another_rule(opened):
    paper, other, kv = (
        opened(number=3),
        opened(number=3, rule="per-parameter"),
        opened(ratio=0.6, rule="per-parameter", cost="kv"),
    )
    assert [job.path.name.split("_text")[0].split("_mix")[1] for job in (paper, other, kv)] == [
        "",
        "_per-parameter",
        "_per-kv",
    ]
    assert finish(other, opened.decoder()) and finish(paper, opened.decoder())
    assert {block.kind for block in finish(kv, opened.decoder())} == {"mha"} and len(kv.order) == 2
    written = json.loads(other.path.read_text())["meta"]
    assert (written["rule"], written["cost"], written["budgets"]) == ("per-parameter", "parameters", None)
    assert all(step["prices"].keys() == step["scores"].keys() for step in written["steps"])
    plain = json.loads(paper.path.read_text())["meta"]
    assert plain["rule"] == "lowest" and all("prices" not in step for step in plain["steps"])


def test_a_rule_is_continued_and_gives_the_order_of_one_run(opened):
    whole = finish(opened(number=5, rule="per-parameter"), opened.decoder())
    finish(opened(number=2, rule="per-parameter", overwrite=True), opened.decoder())
    job = opened(number=5, rule="per-parameter")
    assert len(job.order) == 2
    finish(job, opened.decoder())
    assert job.order == whole


def test_budgets_end_the_search_when_all_are_met(opened):
    job = opened(budgets=(("kv", 0.3), ("parameters", 0.3)), rule="per-parameter")
    finish(job, opened.decoder())
    kinds = [block.kind for block in job.order]
    assert "mha" in kinds and job.finished == len(job.order)
    assert job.meta["steps"][-1]["removed_percent"] >= 30
    shorter = job.order[:-1]
    assert "mha" not in [b.kind for b in shorter] or job.candidates.enough(shorter) is None


def test_an_order_of_other_budgets_or_another_rule_is_not_continued(opened):
    finish(opened(budgets=(("kv", 0.3), ("parameters", 0.3))), opened.decoder())
    with pytest.raises(Taken, match="budgets"):
        opened(budgets=(("kv", 0.3), ("parameters", 0.4)))
    with pytest.raises(Taken, match="budgets"):
        opened(number=2)


def test_seconds_of_other_blocks_are_another_search(opened):
    one = BlockSeconds("f", "cpu", "fp32", 3, (1, 8), mha=2.0, mlp=3.0, rest=5.0)
    job = opened(ratio=0.3, rule="per-parameter", cost="latency", seconds=one)
    finish(job, opened.decoder())
    assert sum(2 if block.kind == "mha" else 3 for block in job.order) >= 6
    with pytest.raises(Taken, match="seconds"):
        opened(ratio=0.3, rule="per-parameter", cost="latency", seconds=one._replace(mha=4.0))


@pytest.mark.parametrize(
    "changes, says",
    (
        ({"rule": "per-parameter", "metric": "bi", "block_type": "layer"}, "the rule per-parameter: bi judges once"),
        ({"rule": "per-parameter", "cost": "latency", "number": 1}, "the cost latency needs a file of seconds"),
        ({"budgets": (("kv", 0.5),), "block_type": "mlp"}, "a share of 0.5 of kv to remove: .* hold 0.0 of it"),
    ),
)
def test_what_cannot_be_searched_is_refused_in_one_line(opened, changes, says):
    with pytest.raises(ValueError, match=says) as error:
        opened(**changes)
    assert "\n" not in str(error.value)


def test_files_without_a_rule_are_the_papers_and_go_on(opened):
    job = opened(number=1)
    finish(job, opened.decoder())
    held = unsealed(job.path)
    for key in ("rule", "cost", "seconds", "budgets"):
        del held["meta"][key]
    job.path.write_text(json.dumps(held))
    assert opened(number=2).order == job.order
