"""lib/schema.py: damage is told, whatever wrote the file; what the project holds today still reads."""

import copy
import json
import random
import shutil

import pytest
from command_line import ROOT, tree
from test_orders import ODD, damage, damage_bytes
from test_report import searched

from lib import schema
from lib.files import write_json
from lib.orders import read_order, save_order

RESULT = {
    "model": "models/Toy-1",
    "order_file": "ppls/Toy-1_mix_text_ns_9_del_order_list.json",
    "dense_parameters": 1000,
    "dataset": "text",
    "windows": 7,
    "seqlen": 64,
    "dense_perplexity": 8.0,
    "limit": None,
    "removed": ["mha1"],
    "pruning_ratio_percent": 4.0,
    "perplexity": 10.0,
    "tasks": {"piqa": {"score": 0.5, "stderr": 0.02}},
}
ROW = {
    "method": "sleb",
    "label": "sleb",
    "ratio": 20.0,
    "seed": None,
    "removed": ["mha1", "mlp1"],
    "removed_percent": 21.0,
    "perplexity": {"text": {"value": 9.0, "error": 0.5, "level": False}},
    "tasks": {"piqa": {"score": 0.5, "stderr": 0.02}},
    "speed": None,
    "failed": None,
    "incomplete": None,
}
COMPARE = {
    "kind": "compare",
    "model": "models/Toy-1",
    "layers": 6,
    "parameters": 1000,
    "reduced": [],
    "settings": {"methods": {"sleb": "layers"}, "ratios": [0.2]},
    "texts": {"text": {"source": "text.txt", "split": None, "windows": 7, "seqlen": 64}},
    "rows": [{**ROW, "method": "dense", "label": "dense", "ratio": 0.0, "removed": [], "removed_percent": 0.0}, ROW],
    "versions": {"python": "3"},
}
CELL = {
    "settings": {"method": "sleb"},
    "measured": {"losses text 0123": [9.0, "nan"], "task piqa x": {"score": 0.5, "stderr": None}},
    "seconds": {"removal": 3.0},
    "removed": ["mha1", "mlp1"],
}
CONTENTS = {"result": RESULT, "compare": COMPARE, "cell": CELL}


def make(kind, path):
    """Write a file of a kind and return what its reader returns."""
    if kind == "order":
        save_order(path, *searched())
    else:
        schema.write(path, kind, CONTENTS[kind])
    return schema.read(path, kind)


@pytest.mark.parametrize("kind", schema.KINDS)
def test_what_is_written_is_read_again(tmp_path, kind):
    content, raw = make(kind, tmp_path / "file.json"), json.loads((tmp_path / "file.json").read_text())
    if kind == "order":
        assert raw["3"] == content["3"] and raw["meta"]["kind"] == "order" and "kind" not in content["meta"]
        assert read_order(tmp_path / "file.json")[1] == content["meta"]
    else:
        assert content == {**CONTENTS[kind], "kind": kind} and raw["schema"] == schema.VERSION


@pytest.mark.parametrize("kind", schema.KINDS)
def test_every_change_of_a_sealed_file_is_told(tmp_path, kind):
    """Every leaf is changed in turn, whatever it is; the checksum is not asked, it is the one under test."""
    path, changed = tmp_path / "file.json", 0
    make(kind, path)
    whole = json.loads(path.read_text())

    def leaves(value, keys=()):
        if isinstance(value, (dict, list)) and value:
            for key in value if isinstance(value, dict) else range(len(value)):
                yield from leaves(value[key], (*keys, key))
        else:
            yield keys

    for keys in leaves(whole):
        if keys[-1] == "kind":  # what a file is called is no content
            continue
        damaged = copy.deepcopy(whole)
        place = damaged
        for key in keys[:-1]:
            place = place[key]
        value = place[keys[-1]]
        place[keys[-1]] = {bool: not value, int: value}.get(type(value), "x") if not isinstance(value, float) else 0.5
        if isinstance(value, int) and not isinstance(value, bool):
            place[keys[-1]] = value + 1
        if place[keys[-1]] == value:
            continue
        path.write_text(json.dumps(damaged))
        with pytest.raises(ValueError) as error:
            read_order(path) if kind == "order" else schema.read(path, kind)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
        changed += 1
    assert changed > 8


@pytest.mark.parametrize("kind", schema.KINDS)
@pytest.mark.parametrize("sealed", (True, False))
def test_random_damage_is_one_line_and_never_accepted_where_a_checksum_tells(tmp_path, kind, sealed):
    rng, path, told, accepted = random.Random(f"{kind}{sealed}"), tmp_path / "file.json", 0, 0
    make(kind, path)
    whole = json.loads(path.read_text())
    if not sealed:
        for name in schema.MARKS[1:]:
            (whole["meta"] if kind == "order" else whole).pop(name)
    content = json.dumps(whole).encode()
    for _ in range(250):
        if rng.random() < 0.5:
            path.write_bytes(damage_bytes(content, rng))
        else:
            path.write_text(json.dumps(damage(copy.deepcopy(whole), rng)))
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            found = None
        try:
            read_order(path) if kind == "order" else schema.read(path, kind)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error), error
            assert len(str(error)) < 400 + len(str(path))
            told += 1
            continue
        accepted += 1
        marks = found.get("meta", {}) if kind == "order" else found
        assert found == whole or not {"schema", "checksum"} & marks.keys()
    assert told > 100 and (sealed or accepted)


def test_a_newer_schema_says_so(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {**schema.seal("result", RESULT), "schema": 2})
    with pytest.raises(ValueError, match="schema 2, written by a newer version"):
        schema.read(path)


WRONG = {  # of files without a checksum
    "a step that removed another block": ("order", lambda c: c["meta"]["steps"][1].update(block=["mlp", 5]), "step 2"),
    "layers without end": ("order", lambda c: c["meta"].update(layers=10**30), "not a number of layers"),
    "a score of no block": ("order", lambda c: c["meta"]["steps"][0]["scores"].update(mha9=1.0), "mha9"),
    "a score that is no number": ("order", lambda c: c["meta"]["steps"][0]["scores"].update(mha1=None), "not a number"),
    "a task without a score": ("result", lambda c: c["tasks"].update(piqa={}), "tasks 'piqa' has no score"),
    "a score that is a word": ("result", lambda c: c["tasks"]["piqa"].update(score="x"), "score holds 'x'"),
    "no windows": ("result", lambda c: c.pop("windows"), "has no windows"),
    "a block of no layer": ("compare", lambda c: c["rows"][1]["removed"].append("mha6"), "6 layers"),
    "a row without a ratio": ("compare", lambda c: c["rows"][1].pop("ratio"), "rows[1] has no ratio"),
    "windows without end": ("compare", lambda c: c["texts"]["text"].update(windows=10**30), "windows holds"),
    "a loss that is no number": ("cell", lambda c: c["measured"]["losses text 0123"].append("x"), "losses text 0123"),
    "measurements in a list": ("cell", lambda c: c.update(measured=[]), "measured holds []"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_contradicts_itself_is_refused(tmp_path, name):
    kind, change, says = WRONG[name]
    path = tmp_path / "file.json"
    content = copy.deepcopy(make(kind, path))
    change(content)
    write_json(path, content)
    with pytest.raises(ValueError) as error:
        read_order(path) if kind == "order" else schema.read(path, kind)
    assert says in str(error.value)


@pytest.mark.parametrize("kind", schema.KINDS)
def test_an_output_replaces_only_its_own_kind(toy_folder, text, tmp_path, kind):
    for other in schema.KINDS:
        make(other, tmp_path / f"{other}.json")
    shutil.copy(toy_folder() / "config.json", tmp_path)
    shutil.copy(text, tmp_path / "text.txt")
    (tmp_path / "empty.json").touch()
    (tmp_path / "link.json").symlink_to("config.json")
    before = tree(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        if path.stem in (kind, "empty"):
            schema.check_output(path, kind)
            continue
        with pytest.raises(ValueError, match="would replace; give another name"):
            schema.check_output(path, kind)
    schema.check_output(tmp_path / "new" / "file.json", kind)
    assert tree(tmp_path) == before


def test_files_of_the_repository_are_whole(call):
    from scripts import check

    paths = [*sorted((ROOT / "ppls").glob("*.json")), *sorted((ROOT / "docs" / "results").glob("*.json"))]
    run = call(check.main, *map(str, paths))
    assert run.code == 0 and run.result["damaged"] == 0 and run.result["files"] == len(paths) > 3


def test_the_check_names_what_is_damaged_and_exits_with_1(call, tmp_path):
    from scripts import check

    for kind in schema.KINDS:
        make(kind, tmp_path / f"{kind}.json")
    (tmp_path / "result.json").write_text((tmp_path / "result.json").read_text().replace("8.0", "7.0"))
    run = call(check.main, *(str(tmp_path / f"{kind}.json") for kind in schema.KINDS), str(tmp_path / "none.json"))
    assert run.code == 1 and run.result == {"files": 5, "whole": 3, "without_checksum": 0, "damaged": 2}
    lines = run.out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["whole", "damaged", "whole", "whole", "damaged"]
    assert "does not have the checksum" in lines[1] and lines[0].endswith("order, 3 removals")


def test_odd_values_of_the_schema_have_a_name():
    """Every check says what it wants, so that an error can."""
    for odd in ODD:
        for fields in (schema.number, schema.count, schema.block, schema.pair, schema.mean, schema.measured):
            assert fields(odd) in (True, False) and fields.__doc__
