"""Result files: what each one is, whether it is whole, which model it belongs to and what to say about it. No torch.

Orders of block_search.py or of the paper's scripts, results of eval.py, compare.json of scripts.compare, and tables of
angular distances (.csv) all become Results.
"""

import csv
import io
import math
from pathlib import Path
from typing import NamedTuple

from lib.blocks import MOST_LAYERS
from lib.files import expand, read_bytes, read_json
from lib.orders import read_order
from lib.schema import kind_of, read


class Result(NamedTuple):
    """One file: kind "order", "search" (the order of a cell of a comparison), "eval", "compare" or "distances".

    model: what it names, None where it names none.
    """

    path: Path
    kind: str
    model: str | None
    content: object


def read_results(path):
    """Return the Results of a file: one, and for compare.json the orders that lie beside it as well."""
    path = expand(path)
    if path.suffix == ".csv":
        return [Result(path, "distances", None, read_distances(path))]
    try:
        kind = kind_of(read_json(path))
    except (OSError, ValueError):
        kind = None  # read_order says what is wrong
    if kind == "compare":
        content = read(path, kind)
        files = dict.fromkeys(row.get("order_file") for row in content["rows"])
        beside = [path.parent / name for name in files if name and (path.parent / name).is_file()]
        searches = [Result(p, "search", content["model"], read_order(p)) for p in beside]
        return [Result(path, kind, content["model"], content), *searches]
    if kind == "result":
        content = read(path, kind)
        return [Result(path, "eval", content["model"], content)]
    order, meta = read_order(path)
    return [Result(path, "order", meta.get("model"), (order, meta))]


def read_distances(path):
    """Return [(n, i, distance)] of a .csv file with these columns."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_bytes(path).decode(), newline="")))
        table = [(int(row["n"]), int(row["i"]), float(row["distance"])) for row in rows]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (KeyError, ValueError, TypeError, csv.Error):
        raise ValueError(f"{path}: not a table of angular distances; expected the columns n, i, distance") from None
    if not table or any(n < 1 or i < 0 or n + i > MOST_LAYERS or math.isinf(d) for n, i, d in table):
        raise ValueError(f"{path}: holds no windows of layers (n from 1, i from 0), or something else, too")
    return table


def by_model(results):
    """Return {model name: its Results}; results that name no model stand under None.

    Raises ValueError for files that name one model, but not its size, or other weights.
    """
    paths = {str(result.model): Path(str(result.model)).expanduser() for result in results if result.model}
    names, models, sizes = short_names(paths.values()), {}, {}
    for result in results:
        name = names[paths[str(result.model)]] if result.model else None
        models.setdefault(name, []).append(result)
        for what, value in sizes_of(result).items():
            spelled = Path(str(result.model)).name if what == "weights" else ""  # the name of a file is part of it
            path, before = sizes.setdefault((name, what, spelled), (result.path, value))
            if name and before != value:
                before, value = (f"{x:,}" if isinstance(x, int) else x for x in (before, value))
                raise ValueError(
                    f"{path} and {result.path}: both name the model {name}, with {before} and {value} {what}; "
                    "give files of one of them, or rename the model"
                )
    return dict(sorted(models.items(), key=lambda item: item[0] is None))


def short_names(paths):
    """Return {path: as much of its end, less .gguf, as tells it from the others}; names of one place are alike."""
    paths, ends, names = list(paths), {}, {}
    for path in paths:
        ends.setdefault(path.resolve(), Path(str(path.absolute()).removesuffix(".gguf")).parts)
    for place, end in ends.items():
        alone = (n for n in range(1, len(end)) if sum(other[-n:] == end[-n:] for other in ends.values()) == 1)
        n = next(alone, None)
        names[place] = "/".join(end[-n:]) if n else str(place)
    return {path: names[path.resolve()] for path in paths}


def sizes_of(result):
    """Return {what: value} of what is the same in all files of one model; weights as lib.model.fingerprint has them."""
    if result.kind in ("order", "search"):
        about, names = result.content[1], {"layers": int, "weights": str}
    elif result.kind == "eval":
        about, names = {"parameters": result.content["dense_parameters"]}, {"parameters": int}
    elif result.kind == "compare":
        about, names = result.content, {"layers": int, "parameters": int, "weights": str}
    else:
        return {}
    found = {what: about.get(what) for what, kind in names.items() if isinstance(about.get(what), kind)}
    return {what: value for what, value in found.items() if value != "not cached"}


def comparison_tags(results):
    """Return {path of a comparison: what tells it from the model's others, "" where it is the only one}."""
    paths = [result.path for result in results if result.kind == "compare"]
    places = {path: path.parent if path.name == "compare.json" else path for path in paths}
    names = short_names(places.values())
    return {path: names[place] if len(paths) > 1 else "" for path, place in places.items()}


def reductions(results, tags):
    """Return what a reader must know before reading any number. tags: of comparison_tags, of all models together."""
    lines = []
    for result in results:
        if result.kind == "eval" and result.content.get("limit"):
            lines.append(f"{result.path.name}: {result.content['limit']}")
        if result.kind == "compare":
            lines += [": ".join(filter(None, (tags[result.path], line))) for line in result.content.get("reduced", [])]
    return list(dict.fromkeys(lines))


def notices(results, models):
    """Return what a reader must know before the first number. models: as by_model returns them."""
    lines = reductions(results, comparison_tags(results))
    names = [name for name in models if name]
    if len(names) > 1:
        lines.insert(
            0,
            f"Results of {len(names)} models, each in sections of its own: {', '.join(names)}. "
            "Numbers of different models do not compare.",
        )
    nameless = models.get(None, ())
    if len(names) + len(nameless) > 1 and nameless:
        files = ", ".join(str(result.path) for result in nameless)
        lines.append(f"Of which model these are is not in the files, it may be several: {files}.")
    return lines
