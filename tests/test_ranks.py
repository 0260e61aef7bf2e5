"""lib/ranks.py: as many processes as one likes, the same file. The truth is one process without any of this."""

import json
import os
import subprocess
import sys

import pytest
import torch
from command_line import ROOT, SMALL, flags
from test_journal import COSTS

from lib import ranks
from lib.journal import files_of

WAYS = {
    "cached": {},
    "race": dict(search="race", ppl_eval_batch_size=3),
    "kl": dict(metric="kl", search="exhaustive", block_type="layer"),
    "few": dict(ppl_eval_batch_size=32),  # one batch: the other processes have none
}


def content(path):
    """What an order file says apart from times: every number, and how many forwards it took."""
    whole = json.loads(path.read_text())
    for step in whole["meta"]["steps"]:
        del step["seconds"]
    del whole["meta"]["checksum"]
    return whole


def launch(size, runs, dies=None):
    """Run searches in `size` processes; return the finished process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    given = json.dumps({"runs": runs, "dies": dies})
    return subprocess.run(
        [*command, "--master-port", "0", "tests/ranks_program.py", given]
        if size > 1
        else [sys.executable, "tests/ranks_program.py", given],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def words(toy_folder, text, tmp_path):
    def make(folder, **changes):
        given = {**SMALL, "ppl_eval_batch_size": 2, "del_block_num": 2, **changes}
        return flags(model_path=toy_folder(), cal_dataset=text, ppl_search_path=tmp_path / folder, **given)

    return make


def orders(folder):
    return {path.name: content(path) for path in sorted(folder.glob("*.json"))}


def test_any_number_of_processes_writes_the_same_file(words, tmp_path):
    for size in (1, 2, 3):
        runs = [words(f"{size}/{way}", **changes) for way, changes in WAYS.items()]
        run = launch(size, runs)
        assert run.returncode == 0, run.stderr
        assert run.stdout.count('{"order_file"') == len(WAYS), "one process prints"
    for way in WAYS:
        alone = orders(tmp_path / "1" / way)
        assert len(alone) == 1
        for size in (2, 3):
            assert orders(tmp_path / str(size) / way) == alone, (way, size)
            assert len(list((tmp_path / str(size) / way).iterdir())) == 1, "no journal is left"


def test_a_process_that_dies_ends_all_and_another_number_goes_on(words, tmp_path):
    run = launch(2, [words("died")], dies=[1, 30])
    assert run.returncode != 0 and "Traceback" not in run.stderr.split("torch.distributed.elastic")[0], run.stderr
    (kept,) = {p.name.split(".journal")[0] for p in (tmp_path / "died").glob("*.journal*")}
    assert files_of(tmp_path / "died" / kept)
    run = launch(3, [words("died")])
    assert run.returncode == 0 and "resuming" in run.stdout, run.stderr
    assert launch(1, [words("whole")]).returncode == 0
    (died,), (whole,) = (orders(tmp_path / name).values() for name in ("died", "whole"))
    for step in died["meta"]["steps"] + whole["meta"]["steps"]:
        for name in COSTS:
            step.pop(name, None)
    assert died == whole and not files_of(tmp_path / "died" / kept)


@pytest.mark.parametrize("size", (1, 2, 3, 5))
def test_shares_are_all_of_it_and_even(monkeypatch, size):
    for n in range(12):
        taken = []
        for rank in range(size):
            monkeypatch.setattr(ranks, "join", lambda rank=rank: (rank, size))
            taken.append(list(ranks.share(n)))
        assert sum(taken, []) == list(range(n))
        assert max(map(len, taken)) - min(map(len, taken)) <= 1


def test_alone_nothing_is_met_and_nothing_changes(monkeypatch):
    assert ranks.join.__wrapped__() == (0, 1) and ranks.gather("x") == ["x"]
    assert not torch.distributed.is_initialized()
