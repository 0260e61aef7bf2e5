"""What this project's JSON files hold, and whether they still do: orders, results, cells and tables of comparisons.

A file that this version writes carries its `kind`, the `schema`'s version and a `checksum` of all the rest; an order
carries them under "meta", so that the paper's scripts read it. Every reader goes through `read`, which raises
ValueError, one line, for a file that was changed, cut short or made up. Files without these three, written before they
were introduced or by the paper's scripts, are held against the schema alone. docs/formats.md describes the fields.

    write("results/half.json", "result", {...})
    content = read("results/half.json", "result")
"""

import hashlib
import json
import math
from collections.abc import Callable
from reprlib import repr as brief
from typing import NamedTuple

from lib.blocks import MOST_LAYERS, UNITS, parse_block
from lib.files import place, read_json, strict, write_json

VERSION = 1
MARKS = ("kind", "schema", "checksum")
MOST = 10**15  # of whatever is counted


def write(path, kind, content):
    """Write a file of one of KINDS, sealed, as lib.files.write_json does."""
    write_json(path, seal(kind, content))


def read(path, kind=None):
    """Return the content of a file of that kind, any of KINDS where it is None, without schema and checksum.

    Raises ValueError, one line, where the file is missing, of another kind or damaged.
    """
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None
    return opened(path, content, kind)


def opened(path, content, kind=None):
    """Return what `read` does of a file's JSON."""
    found = kind_of(content)
    if found is None or kind not in (None, found):
        what = f"it is {KINDS[found].title}" if found else f"it is none of {', '.join(KINDS)}"
        wanted = f"not {KINDS[kind].title}" if kind else "no file of this project"
        raise ValueError(f"{path}: {wanted}: {what}")
    where = content["meta"] if found == "order" and isinstance(content.get("meta"), dict) else content
    if "schema" in where or "checksum" in where:
        version = where.get("schema")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1 or "checksum" not in where:
            raise ValueError(f"{path}: damaged: its schema or its checksum is gone; take a copy, or make it again")
        if version > VERSION:
            raise ValueError(
                f"{path}: of schema {brief(version)}, written by a newer version; this one reads {VERSION}"
            )
        if where["checksum"] != checksum(found, content):
            raise ValueError(
                f"{path}: damaged: its content does not have the checksum that it names; take a copy, or make it again"
            )
        bare = {key: value for key, value in where.items() if key not in (MARKS if found == "order" else MARKS[1:])}
        content = {**content, "meta": bare} if where is not content else bare
    try:
        wrong = problem(content, KINDS[found].fields) or KINDS[found].rule(content)
    except RecursionError:
        wrong = "holds lists within lists without end"
    if wrong:
        raise ValueError(f"{path}: looks like {KINDS[found].title}, but {wrong}; make it again")
    return content


def seal(kind, content):
    """Return the content with kind, schema and checksum."""
    marks = {"kind": kind, "schema": VERSION}
    content = {**content, "meta": {**content["meta"], **marks}} if kind == "order" else {**marks, **content, **marks}
    marks["checksum"] = checksum(kind, content)
    return {**content, "meta": {**content["meta"], **marks}} if kind == "order" else {**content, **marks}


def checksum(kind, content):
    """Return the SHA-256, in hex, of the content as sorted JSON without its checksum."""
    if kind == "order":
        content = {**content, "meta": {k: v for k, v in content["meta"].items() if k != "checksum"}}
    else:
        content = {k: v for k, v in content.items() if k != "checksum"}
    try:
        return hashlib.sha256(json.dumps(strict(content), sort_keys=True).encode()).hexdigest()
    except RecursionError:
        return "none: lists within lists without end"


def kind_of(content):
    """Return the key of KINDS that a file's JSON belongs to, None where it is none of them."""
    if not isinstance(content, dict):
        return None
    if isinstance(kind := content.get("kind"), str) and kind in KINDS and kind != "order":
        return kind
    if "pruning_ratio_percent" in content:
        return "result"
    if {"settings", "measured", "seconds"} <= content.keys():
        return "cell"
    return "order" if content and all(key == "meta" or key.isdecimal() for key in content) else None


def check_output(path, kind):
    """Raise ValueError unless a file of that kind can be written at `path`: none is there, or one of its own kind."""
    found = place(path)
    if not found.exists() or not found.stat().st_size:
        return
    try:
        there = kind_of(read_json(found))
    except (OSError, ValueError):
        there = None
    if there != kind:
        what = KINDS[there].title if there else "something else"
        raise ValueError(f"{path}: holds {what}, which {KINDS[kind].title} would replace; give another name")


# ---- the language of schemas -------------------------------------------------------------------------------------


def problem(value, fields, where=""):
    """Return what is wrong with a value, None where nothing is.

    fields: a function that returns whether a value is right, its name saying what would be; [fields] of each item;
    {"*": fields} of each value of a dict, its keys unknown; {name: fields} of those named, others being free, where
    "name?" may be absent or null.
    """
    if isinstance(fields, list):
        if not isinstance(value, list):
            return f"{where or 'it'} holds {brief(value)}, not a list"
        return next(filter(None, (problem(x, fields[0], f"{where}[{i}]") for i, x in enumerate(value))), None)
    if not isinstance(fields, dict):
        return None if fields(value) else f"{where} holds {brief(value)}, not {fields.__doc__}"
    if not isinstance(value, dict):
        return f"{where or 'it'} holds {brief(value)}, not {{...}}"
    if "*" in fields:
        named = ((f"{where} {brief(key)}".strip(), x, fields["*"]) for key, x in value.items())
    else:
        missing = [name for name in fields if not name.endswith("?") and name not in value]
        if missing:
            return f"{where + ' ' if where else ''}has no {', '.join(missing)}"
        names = ((name.removesuffix("?"), name) for name in fields)
        named = (
            (f"{where} {name}".strip(), value[name], fields[full])
            for name, full in names
            if name in value and not (full != name and value[name] is None)
        )
    return next(filter(None, (problem(x, inner, place) for place, x, inner in named)), None)


def anything(value):
    """anything"""
    return True


def text(value):
    """a string"""
    return isinstance(value, str)


def flag(value):
    """true or false"""
    return isinstance(value, bool)


def number(value):
    """a number"""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def measured(value):
    """a number, "nan", "inf" or "-inf" """
    return number(value) or value in ("nan", "inf", "-inf") or (isinstance(value, float) and not math.isfinite(value))


def percent(value):
    """a number from 0 to 100"""
    return number(value) and 0 <= value <= 100


def share(value):
    """a number from 0 to 1"""
    return number(value) and 0 <= value <= 1


def count(value):
    """a whole number from 0"""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def layers(value):
    """a number of layers"""
    return count(value) and 0 < value <= MOST_LAYERS


def block(value):
    """the name of a block, such as mha25"""
    try:
        kind, layer = parse_block(value) if isinstance(value, str) and len(value) < 20 else (None, 0)
    except ValueError:
        return False
    return kind in UNITS and layer < MOST_LAYERS


def pair(value):
    """a block, such as ["mha", 25]"""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], int) and block(f"{value[0]}{value[1]}")


def mean(value):
    """a number and its error"""
    return isinstance(value, list) and len(value) == 2 and number(value[0]) and (value[1] is None or measured(value[1]))


# ---- the kinds ---------------------------------------------------------------------------------------------------

SCORE = {"score": number, "stderr?": number}
ORDER = {  # its entries are read by lib.orders
    "meta?": {
        **dict.fromkeys(("model?", "weights?", "metric?", "block_type?", "dataset?", "source?", "label?"), text),
        **dict.fromkeys(("documents?", "windows?", "seqlen?", "tokens?", "batch_size?", "window?"), count),
        "layers?": layers,
        "approximate?": flag,
        "dense_perplexity?": measured,
        "window_scores?": {"*": measured},
        "steps?": [
            {
                "block?": pair,
                **dict.fromkeys(("perplexity?", "score?", "seconds?", "removed_percent?"), measured),
                "scores?": {"*": measured},
                "windows?": {"*": count},
            }
        ],
    }
}
RESULT = {
    **dict.fromkeys(("model", "dataset"), text),
    **dict.fromkeys(("dense_parameters", "windows", "seqlen"), count),
    **dict.fromkeys(("perplexity", "dense_perplexity"), measured),
    "pruning_ratio_percent": percent,
    "removed": [block],
    "tasks": {"*": SCORE},
    **dict.fromkeys(("order_file?", "limit?"), text),
}
CELL = {"settings": {"*": anything}, "measured": {"*": anything}, "seconds": {"*": number}, "removed?": [block]}
COMPARE = {
    "model": text,
    "layers": layers,
    "parameters": count,
    "settings": {"methods?": {"*": anything}},
    "texts?": {"*": {"windows": count, "seqlen": count}},
    "reduced?": [text],
    "weights?": text,
    "rows": [
        {
            **dict.fromkeys(("method", "label"), text),
            "ratio": percent,
            "seed?": number,
            "removed": [block],
            "removed_percent?": percent,
            "perplexity": {"*": {"value": measured, "error?": measured, "level?": flag}},
            "tasks": {"*": SCORE},
            "speed?": {"*": number},
            "blocks?": number,
            "average?": mean,
            **dict.fromkeys(("failed?", "order_file?"), text),
        }
    ],
}


def order_rule(content):
    """Return how an order contradicts what else the file says."""
    meta = content.get("meta") or {}
    depth, steps = meta.get("layers") or MOST_LAYERS, meta.get("steps") or []
    names = [name for step in steps for name in step.get("scores") or {}]
    if odd := next((name for name in names if not block(name) or parse_block(name).layer >= depth), None):
        return f"a step scores {brief(odd)}, no block of a model of {depth} layers"
    starts = meta.get("window_scores") or {}
    if odd := next((i for i in starts if not (i.isdecimal() and len(i) < 6 and int(i) < depth)), None):
        return f"it scores a run of layers from {brief(odd)}"
    before = set()
    for k, step in enumerate(steps, 1):
        entry = content.get(str(k))
        if entry is None or step.get("block") is None:
            break
        now = {tuple(item) for item in entry if isinstance(item, list) and all(isinstance(x, (str, int)) for x in item)}
        if now - before != {tuple(step["block"])}:
            return f'its step {k} removed {"".join(map(str, step["block"]))}, but entry "{k}" adds another'
        before = now
    return None


def cell_rule(content):
    """Return what is wrong with a cell's measurements, whose keys say what they are."""
    for key, value in content["measured"].items():
        fields = {"losses": [measured], "task": SCORE, "speed": {"*": number}}.get(key.split()[0] if key else "")
        if fields and (wrong := problem(value, fields, brief(key))):
            return wrong
    return None


def compare_rule(content):
    """Return what is wrong between the fields of a comparison."""
    for k, row in enumerate(content["rows"]):
        if not row.get("failed") and row.get("removed_percent") is None:
            return f"rows[{k}] has no removed_percent"
        if any(parse_block(name).layer >= content["layers"] for name in row["removed"]):
            return f"rows[{k}] removes what a model of {content['layers']} layers does not have"
        if unknown := row["perplexity"].keys() - content.get("texts", row["perplexity"]).keys():
            return f"rows[{k}] measures the text {brief(min(unknown))}, which texts does not name"
    return None


class Kind(NamedTuple):
    """title: what an error calls it; fields: see `problem`; rule: a function of the content, what else is wrong."""

    title: str
    fields: dict
    rule: Callable = lambda content: None


KINDS = {
    "order": Kind("an order file", ORDER, order_rule),
    "result": Kind("a result of eval.py", RESULT),
    "cell": Kind("a cell of a comparison", CELL, cell_rule),
    "compare": Kind("compare.json", COMPARE, compare_rule),
    "bench": Kind("measurements of a benchmark", {}),
}
