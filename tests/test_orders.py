"""lib/orders.py: names, what is read and refused, and that a write is whole or never happened."""

import json
import math
import os
import random
from pathlib import Path

import pytest

from lib.blocks import Block, parse_blocks
from lib.files import to_json, write_json
from lib.orders import check_order, order_path, read_order, save_order

ORDER = [Block("mlp", 3), Block("mha", 0), Block("mha", 3), Block("mlp", 1)]


@pytest.mark.parametrize(
    "model, dataset, name",
    (
        ("meta-llama/Llama-2-7b-hf", "alpaca", "Llama-2-7b-hf_mix_alpaca_ns_8"),
        ("models/Qwen1.5-7B/", "wikitext2", "Qwen1.5-7B_mix_wikitext2_ns_8"),
        ("/models/small.Q4_1.gguf", "data/my text.txt", "small.Q4_1_mix_my text_ns_8"),
        ("../other/model", "a.b.jsonl", "model_mix_a.b_ns_8"),
    ),
)
def test_the_file_is_named_as_the_papers_scripts_name_it(model, dataset, name):
    assert order_path("ppls", model, "mix", dataset, 8) == Path("ppls") / f"{name}_del_order_list.json"


def test_the_current_folder_has_a_name_too(tmp_path, monkeypatch):
    (tmp_path / "toy" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "toy")
    assert order_path("ppls", ".", "mha", "c4", 1).name == "toy_mha_c4_ns_1_del_order_list.json"
    monkeypatch.chdir(tmp_path / "toy" / "deeper")
    assert order_path("ppls", "..", "mha", "c4", 1).name == "toy_mha_c4_ns_1_del_order_list.json"


def test_home_is_expanded_alike_by_writer_and_reader(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = order_path("~/ppls", "toy", "mix", "c4", 1)
    save_order(path, ORDER, {})
    assert path == tmp_path / "ppls" / "toy_mix_c4_ns_1_del_order_list.json"
    assert read_order("~/ppls/toy_mix_c4_ns_1_del_order_list.json")[0] == ORDER


def test_what_is_saved_is_read_again(tmp_path):
    path = tmp_path / "new" / "folder" / "order.json"
    step = {"block": ORDER[0], "scores": {Block("mha", 1): math.nan, "mlp3": 2.5}}
    meta = {"model": "toy", "layers": 4, "steps": [step]}
    for k in range(len(ORDER) + 1):
        save_order(path, ORDER[:k], meta)
        order, read = read_order(path)
        assert order == ORDER[:k]
        assert read["steps"] == [{"block": ["mlp", 3], "scores": {"mha1": "nan", "mlp3": 2.5}}]
    assert [p.name for p in path.parent.iterdir()] == ["order.json"]


def test_entry_k_is_the_first_k_removals_sorted_by_layer(tmp_path):
    save_order(tmp_path / "order.json", ORDER, {})
    entries = json.loads((tmp_path / "order.json").read_text())
    for k in range(1, 5):
        blocks = [tuple(block) for block in entries[str(k)]]
        assert set(blocks) == set(ORDER[:k]) and [i for _, i in blocks] == sorted(i for _, i in blocks)


def test_the_order_within_an_entry_does_not_matter(tmp_path):
    path = tmp_path / "order.json"
    path.write_text('{"2": [["mlp", 3], ["mha", 3]], "1": [["mha", 3]], "3": [["mlp", 0], ["mlp", 3], ["mha", 3]]}')
    assert read_order(path) == ([("mha", 3), ("mlp", 3), ("mlp", 0)], {})


def test_an_order_is_checked_against_the_depth_of_the_model(tmp_path):
    check_order(ORDER, 4, "order.json")
    check_order(ORDER, 4, "order.json", {"layers": 4})
    with pytest.raises(ValueError, match=r"order.json: mlp 3 does not exist in a model of 3 layers \(0..2\)"):
        check_order(ORDER, 3, "order.json")
    with pytest.raises(ValueError, match="order.json: made for a model of 32 layers; this one has 4"):
        check_order(ORDER, 4, "order.json", {"layers": 32})


def test_json_is_strict_and_one_line():
    value = {"a": [math.inf, -math.inf, math.nan, 1.5], "b": (Block("mha", 1),), 3: None, "c": "line\nend"}
    text = to_json(value)
    assert "\n" not in text
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": ["inf", "-inf", "nan", 1.5],
        "b": [["mha", 1]],
        "3": None,
        "c": "line\nend",
    }


def test_scores_keep_every_digit(tmp_path):
    values = [math.pi, 1 / 3, 1e-300, 123456789.123456789]
    write_json(tmp_path / "result.json", {"values": values})
    assert json.loads((tmp_path / "result.json").read_text())["values"] == values


def refused(*_):
    raise PermissionError("not now")


@pytest.mark.parametrize("name", ("replace", "fsync"))
def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch, name):
    path = tmp_path / "order.json"
    save_order(path, ORDER[:2], {"model": "toy"})
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, name, refused)
        with pytest.raises(OSError):
            save_order(path, ORDER, {"model": "toy"})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["order.json"]
    save_order(path, ORDER, {"model": "toy"})
    assert read_order(path)[0] == ORDER


# ---- random damage -------------------------------------------------------------------------------

ODD = (
    None,
    True,
    0,
    -1,
    3,
    10**30,
    1.0,
    math.nan,
    1e400,
    "",
    "mha",
    "mlp",
    "meta",
    "1",
    "\ud800",
    "\0",
    [],
    {},
    [[]],
    ["mha", 1],
    [["mha", 0]],
    [["mha", 0], ["mlp", 0]],
    {"layers": 3},
    {"layers": None},
)


def damage(value, rng, depth=0):
    """Return a copy of nested lists and dicts with one item dropped, doubled, moved or replaced by something odd."""
    if not isinstance(value, (list, dict)) or not value or depth > 3 or rng.random() < 0.1:
        return rng.choice(ODD)
    value = value.copy()
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    action = rng.choice(("drop", "double", "inside", "inside"))
    if action == "drop":
        del value[key]
    elif action == "inside":
        value[key] = damage(value[key], rng, depth + 1)
    elif isinstance(value, dict):
        value[str(rng.choice(ODD))] = value[key]
    else:
        value.append(value[key])
    return value


def damage_bytes(content, rng):
    """Return bytes with one place cut, overwritten, or filled with brackets, digits or a part of themselves."""
    i = rng.randrange(len(content) + 1)
    filling = rng.choice((b"[" * 50_000, b"9" * 5000, b"\xff", b"", bytes([rng.randrange(256)]), content[i:][:30]))
    return content[:i] + rng.choice((filling + content[i:], filling + content[i + 1 :], b""))


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_read_whole_or_refused_in_one_line(tmp_path, seed):
    rng, path, accepted = random.Random(seed), tmp_path / "order.json", 0
    every = [Block(kind, i) for kind in ("mha", "mlp") for i in range(4)]
    for _ in range(400):
        order = rng.sample(every, rng.randrange(6))
        entries = {str(k): [list(block) for block in order[:k]] for k in range(1, len(order) + 1)}
        if rng.random() < 0.3:
            entries["meta"] = {"layers": 4}
        for _ in range(rng.randrange(3)):
            entries = damage(entries, rng)
        content = json.dumps(entries).encode()
        for _ in range(rng.choice((0, 0, 1, 2))):
            content = damage_bytes(content, rng)
        path.write_bytes(content)
        try:
            order, meta = read_order(path)
            check_order(order, 4, path, meta)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            assert len(str(error)) < 300 + len(str(path))
            continue
        accepted += 1
        assert isinstance(meta, dict) and len(set(order)) == len(order) and set(order) <= set(every)
        save_order(path, order, meta)
        assert read_order(path)[0] == order
    assert 40 < accepted < 360, "the damage should be neither harmless nor always fatal"


# ---- a list instead of an order ------------------------------------------------------------------


def test_a_list_of_blocks_is_read_in_its_order():
    assert parse_blocks("mha5, mlp7,layer2-3,mlp0-1", 8) == [
        Block("mha", 5),
        Block("mlp", 7),
        Block("mha", 2),
        Block("mlp", 2),
        Block("mha", 3),
        Block("mlp", 3),
        Block("mlp", 0),
        Block("mlp", 1),
    ]


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "'' names no blocks"),
        ("mha1,", "'' names no blocks"),
        ("attn5", "'attn5' names no blocks; allowed are mha5"),
        ("mha-5", "'mha-5' names no blocks"),
        ("mha１", "names no blocks"),
        ("mlp3-1", "'mlp3-1': the model has layers 0 to 7, and ranges run upwards"),
        ("layer8", "'layer8': the model has layers 0 to 7"),
        ("layer0-99999999999999999999", "the model has layers 0 to 7"),
        ("mha1,layer1", "'layer1': mha1 is named before"),
        ("mlp1-3,mlp2", "'mlp2': mlp2 is named before"),
    ],
)
def test_a_list_that_names_no_blocks_of_the_model_is_refused_by_its_part(text, says):
    with pytest.raises(ValueError) as error:
        parse_blocks(text, 8)
    assert says in str(error.value) and "\n" not in str(error.value)
