"""A short run of tests/campaign.py, and how scripts end when their output or their disk does."""

import json
import os
import subprocess
import sys

import pytest
from command_line import NO_NETWORK, ROOT, SMALL, flags, shell


def test_a_short_campaign_finds_nothing():
    command = [sys.executable, "tests/campaign.py", "--kills", "4", "--faults", "7", "--files", "400", "--seed", "1"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    counts = json.loads(run.stdout.splitlines()[-1])
    assert run.returncode == 0, (counts, run.stderr)
    assert counts["damaged files"] == 400 and counts["resumed to the undisturbed result after a kill"] == 4
    assert counts["resumed to the undisturbed result after a failing write"] == 7
    assert counts["damaged files refused in one line"] > 200


def piped(words, **pipes):
    env = os.environ | NO_NETWORK | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **pipes,
    )


def test_a_reader_that_goes_away_ends_a_script_quietly():
    process = piped(["-m", "scripts.check", *["nothing.json"] * 20_000], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 141


def test_a_full_output_is_one_line():
    with open("/dev/full", "w") as full:
        process = piped(["-m", "scripts.check", "nothing.json"], stdout=full)
        said = process.stderr.read()
    assert process.wait(60) == 1
    assert said == "check.py: error: No space left on device; what was finished before is kept\n"


def test_names_that_no_file_has_are_one_line(toy_folder, text):
    for name in ("~nobody-of-this-name/out", os.fsdecode(b"\xff"), "x" * 300):
        run = shell("block_search.py", *flags(model_path=toy_folder(), cal_dataset=text, ppl_search_path=name, **SMALL))
        assert run.code == 2 and len(run.err.splitlines()) == 1 and ": error: " in run.err, run


def test_pictures_that_have_no_room_are_a_note_and_drawn_later(search, monkeypatch, tmp_path):
    from lib.files import NotWritten

    pytest.importorskip("matplotlib")

    def full(*_):
        raise NotWritten(28, "No space left on device", "picture.png")

    with monkeypatch.context() as patch:
        patch.setattr("lib.report.pictures.save", full)
        run = search(del_block_num=1)
    assert run.code == 0 and "no pictures: picture.png: No space left on device" in run.out
    assert not list((tmp_path / "out").glob("*.png"))
    run = search(del_block_num=1)
    assert "nothing to do" in run.out and len(list((tmp_path / "out").glob("*.png"))) == 2
    assert "\npicture " not in search(del_block_num=1).out
