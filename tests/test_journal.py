"""lib/journal.py: a search that is stopped anywhere goes on within its iteration, and ends as if it had not been.

The truth is the same search left alone.
"""

import json
import random
import signal
import time

import pytest
import torch
from command_line import SMALL, flags, shell, start

from lib.blocks import Block
from lib.journal import Journal, Kept, files_of, pack, read_journal, unpack
from scripts import ending

COSTS = {"seconds", "block_forwards", "head_forwards"}  # of a step that was computed in two runs, other ones


def content(path):
    """What an order file says, apart from what it cost."""
    whole = json.loads(path.read_text())
    for step in whole["meta"]["steps"]:
        for name in COSTS:
            step.pop(name, None)
    whole["meta"].pop("checksum")
    return whole


class Stopped(Exception):
    pass


WAYS = {
    "cached": {},
    "exhaustive": dict(search="exhaustive"),
    "race": dict(search="race", ppl_eval_batch_size=2),
    "kl": dict(metric="kl"),
    "layers": dict(block_type="layer"),
    "offload": dict(offload=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_search_stopped_anywhere_ends_as_if_it_had_not_been(search, tmp_path, monkeypatch, way):
    monkeypatch.setattr("block_search.draw", lambda *_, **__: None)  # takes longer than the search
    given = {"del_block_num": 2, "ppl_eval_batch_size": 4, **WAYS[way]}
    assert search(ppl_search_path=tmp_path / "whole", **given).code == 0
    (whole,) = (tmp_path / "whole").glob("*.json")
    folder, rng, stops, computed = tmp_path / "stopped", random.Random(way), 0, []
    while True:
        left = rng.randrange(*((1, 6) if way == "layers" else (6, 20)))

        def check():
            nonlocal left
            computed.append(1)
            left -= 1
            if not left:
                raise ending.Stopped(signal.SIGTERM)

        monkeypatch.setattr(ending, "check", check)
        run = search(ppl_search_path=folder, **given)
        if run.code == 0:
            break
        stops += 1
        assert run.code == 143 and len(files_of(folder / whole.name)) == 1, run
        if stops > 1:
            assert "resuming" in run.out
    assert stops > 1
    assert content(folder / whole.name) == content(whole)
    assert not list(folder.glob("*.journal*"))
    alone = []
    monkeypatch.setattr(ending, "check", lambda: alone.append(1))
    search(ppl_search_path=tmp_path / "again", **given)
    assert len(computed) == len(alone)  # nothing was computed twice


@pytest.fixture
def kept(tmp_path):
    """Return a function that makes a Kept engine, whose losses are those of batch and unit, and what it was asked."""

    class Engine:
        decoder = windows = score = None
        batches = range(3)

        def __init__(self):
            self.asked = []

        def losses(self, wanted, removed):
            for k, units in wanted.items():
                for unit in units:
                    self.asked.append((k, unit))
                    torch.manual_seed(hash((k, unit)))
                    yield k, unit, torch.rand(2, 5)

    def make(tokens=True, deciding="x", rank=0):
        engine = Engine()
        return Kept(engine, Journal(tmp_path / "order.json", deciding, rank), tokens), engine.asked

    return make


UNITS = [Block("mha", 0), Block("mlp", 2)]
WANTED = dict.fromkeys(range(3), UNITS)


def ask(kept, removed=(), wanted=WANTED):
    return {(k, unit): losses for k, unit, losses in kept.losses(wanted, removed)}


@pytest.mark.parametrize("tokens", (True, False))
def test_what_is_kept_is_not_asked_again(kept, tokens):
    first, asked = kept(tokens)
    answers = ask(first)
    assert len(asked) == 6
    again, asked = kept(tokens)
    same = ask(again)
    assert not asked and same.keys() == answers.keys()
    for key, losses in answers.items():
        assert torch.equal(losses.double().sum(1), same[key].double().sum(1)) and losses.shape == same[key].shape
        assert torch.equal(losses, same[key])


@pytest.mark.parametrize("change", (dict(deciding="y"), dict(tokens=False), "removed"))
def test_answers_of_another_search_are_not_taken(kept, change):
    ask(kept()[0])
    other, asked = kept(**(change if change != "removed" else {}))
    ask(other, (Block("mha", 1),) if change == "removed" else ())
    assert len(asked) == 6
    assert len(read_journal(other.journal.path)[1]) == 6  # of the new search only


def test_each_removal_begins_anew(kept):
    engine, asked = kept()
    ask(engine)
    ask(engine, [UNITS[0]])
    assert len(asked) == 12
    again, asked = kept()
    ask(again, [UNITS[0]])
    assert not asked


def test_a_line_cut_short_anywhere_or_changed_ends_the_file(kept, tmp_path):
    engine, _ = kept()
    answers = ask(engine)
    path = engine.journal.path
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        at = rng.randrange(len(whole))
        damaged = whole[:at] + rng.choice((b"", bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]))
        path.write_bytes(damaged)
        again, asked = kept()
        same = ask(again)
        assert all(torch.equal(same[key], answers[key]) for key in answers)
        before = whole[:at].count(b"\n")  # whole lines, the first says what they are of
        assert len(asked) == 6 - max(0, before - 1)
        assert path.read_bytes().count(b"\n") == 7
        again.journal.close()


def test_files_of_other_processes_are_read_and_one_removes_all(kept, tmp_path):
    one, _ = kept(rank=1)
    ask(one, wanted={1: UNITS})
    zero, asked = kept()
    ask(zero)
    assert {k for k, _ in asked} == {0, 2}
    assert len(files_of(tmp_path / "order.json")) == 2
    zero.journal.remove()
    assert not files_of(tmp_path / "order.json")


def test_a_full_disk_ends_the_journal_and_not_the_search(kept, tmp_path, monkeypatch):
    engine, _ = kept()
    engine.journal._open = lambda mode, end: setattr(engine.journal, "_file", open("/dev/full", "wb"))
    assert len(ask(engine)) == 6


@pytest.mark.parametrize("value", (float("nan"), float("inf"), 1e-300, 0.1))
def test_sums_are_kept_bit_for_bit(value):
    losses = torch.tensor([[value, 0.3], [0.1, 0.7]], dtype=torch.float64)
    packed = json.loads(json.dumps(pack(losses, tokens=False)))
    assert torch.equal(unpack(packed).sum(1), losses.sum(1)) or value != value and unpack(packed).sum(1)[0].isnan()


@pytest.mark.parametrize("number, code", ((signal.SIGTERM, 143), (signal.SIGINT, 130)))
def test_a_signal_ends_a_search_with_one_line_after_the_batch(toy_folder, text, tmp_path, number, code):
    words = flags(
        **{**SMALL, "ppl_eval_batch_size": 1},
        model_path=toy_folder(),
        cal_dataset=text,
        ppl_search_path=tmp_path / "out",
        del_block_num=6,
    )
    process = start("block_search.py", *words)
    while not list((tmp_path / "out").glob("*.journal")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("it was faster than the signal")
    assert process.returncode == code
    lines = [line for line in err.replace("\r", "\n").splitlines() if "window/s" not in line and line.strip()]
    assert len(lines) == 1 and f"stopped by {number.name}" in lines[0] and "goes on from there" in lines[0], err
    run = shell("block_search.py", *words)
    assert run.code == 0 and "resuming" in run.out and not list((tmp_path / "out").glob("*.journal*"))
