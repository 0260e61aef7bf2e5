"""The sections of one model's page, made from its result files: tables, pictures and settings. No torch."""

import math
from pathlib import Path

from lib.blocks import parse_block
from lib.report import pictures, tables
from lib.report.results import comparison_tags, short_names, sizes_of


def model_sections(results):
    """Yield (title, {file name: Picture or HTML}) of one model's results, empty ones left out."""
    orders = [r for r in results if r.kind in ("order", "search")]
    rows, texts = result_rows(results)
    sections = {
        "results": dict(result_tables(results, rows)),
        "quality against size": dict(quality_curves(rows, texts)),
        "which blocks went": dict(removal_maps(results, rows)),
        "scores of the search": dict(score_maps(orders)),
        "angular distances": dict(distance_maps(r for r in results if r.kind == "distances")),
        "settings": {
            str(r.path): tables.settings_table(settings_of(r), str(r.path)) for r in results if r.kind != "search"
        },
    }
    return [(title, parts) for title, parts in sections.items() if parts]


def result_rows(results):
    """Return (rows as lib.report.tables has them, {text name: description}) of eval and compare results together.

    A row's `source` is the same for what compares with one dense model. Rows of eval.py have the `path` of their file.
    """
    rows, evaluated, texts = [], [], {}
    tags = comparison_tags(results)
    evals = [result.content for result in results if result.kind == "eval"]
    vary = [key for key in ("dtype", "num_fewshot") if len({content.get(key) for content in evals}) > 1]
    for result in results:
        if result.kind == "compare":
            names = {name: text_name(name, about, texts) for name, about in result.content.get("texts", {}).items()}
            for row in result.content["rows"]:
                perplexity = {names.get(name, name): value for name, value in row["perplexity"].items()}
                rows.append(tagged({**row, "perplexity": perplexity, "source": str(result.path)}, tags[result.path]))
        elif result.kind == "eval":
            tag = ", ".join(f"{key} {result.content.get(key)}" for key in vary)
            evaluated += [tagged({**row, "source": ("eval", tag)}, tag) for row in eval_rows(result, texts)]
    return rows + merge_files(evaluated), texts


def tagged(row, tag):
    """Return the row under a name of its own; "dense" stays a method of all."""
    method = row["method"] if row["method"] == "dense" or not tag else f"{row['method']}, {tag}"
    return {**row, "method": method, "label": ", ".join(filter(None, (row["label"], tag)))}


def merge_files(rows):
    """Return eval.py's rows with those that measure one model on several texts or tasks made one.

    Where files disagree on a measurement, rows are named by their files.
    """

    def agree(one, other):
        parts = [(one[part], other[part]) for part in ("perplexity", "tasks")]
        named = (one["label"], one["removed"]) == (other["label"], other["removed"])
        return named and all(a | b == b | a for a, b in parts)

    merged = []
    for row in rows:
        other = next((other for other in merged if agree(row, other)), None)
        if other is None:
            merged.append(row)
        else:
            other.update({part: other[part] | row[part] for part in ("perplexity", "tasks")})
    labels, names = [row["label"] for row in merged], short_names(row["path"] for row in merged)
    return [tagged(row, names[row["path"]] if labels.count(row["label"]) > 1 else "") for row in merged]


def text_name(name, about, texts):
    """Return the name under which a text's perplexities stand together, and keep it in texts.

    Perplexities compare on the same windows only: another cut of the same data set gets a number.
    """
    same = ("source", "split", "windows", "seqlen", "text_sha256")
    about = {key: about.get(key) for key in same}
    k, unique = 1, name
    while unique in texts and texts[unique] != about:
        k += 1
        unique = f"{name} ({k})"
    texts[unique] = about
    return unique


def eval_rows(result, texts):
    """Return the rows of one result of eval.py: what is left, and the dense model it started from."""
    content = result.content
    name = text_name(content["dataset"], {**content, "text_sha256": None}, texts)
    order = Path(content["order_file"] or "").name.removesuffix(".json").removesuffix("_del_order_list")
    method = order.removeprefix(f"{Path(content['model']).name.removesuffix('.gguf')}_") or "dense"
    shared = {"seed": None, "speed": None, "failed": None, "path": result.path}
    dense = {
        **shared,
        "method": "dense",
        "label": "dense",
        "ratio": 0,
        "removed": [],
        "removed_percent": 0.0,
        "perplexity": {name: {"value": content["dense_perplexity"], "error": None}},
        "tasks": {},
    }
    if not content["removed"]:
        return [{**dense, "tasks": content["tasks"]}]
    percent = content["pruning_ratio_percent"]
    label = f"{method}, {len(content['removed'])} blocks removed"
    pruned = {
        **shared,
        "method": method,
        "label": label,
        "ratio": 0,
        "removed": content["removed"],
        "removed_percent": percent,
        "tasks": content["tasks"],
        "perplexity": {name: {"value": content["perplexity"], "error": None}},
    }
    return [dense, pruned]


def result_tables(results, rows):
    """Yield the table of each compare result, and one of all eval results."""
    tags = comparison_tags(results)
    for result in results:
        if result.kind == "compare":
            table = tables.results_table(result.content["rows"])
            caption = ". ".join(filter(None, (tags[result.path], tables.LEGEND)))
            yield str(result.path), tables.html_table(table.header, tables.html_rows(table), caption)
    evaluated = [row for row in rows if row.get("path")]
    if evaluated:
        table = tables.results_table(evaluated)
        yield "eval", tables.html_table(table.header, tables.html_rows(table), "Results of eval.py")


def perplexity_panels(rows, texts):
    """Return ({title: {method: list of Point}}, methods) of perplexity on each text, as pictures.curves takes them."""
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"))
    rows = [row for row in tables.merge_seeds(rows) if not row.get("failed")]
    panels = {}
    for text, about in texts.items():
        lines = lines_of(rows, lambda row, t=text: measured_perplexity(row, t))
        if any(name != "dense" for name in lines):
            panels[f"perplexity, {text} ({about['windows']:,} windows of {about['seqlen']:,})"] = lines
    return panels, methods


def quality_curves(rows, texts):
    """Yield the pictures of perplexity, and of accuracy, against the parameters removed."""
    perplexity, methods = perplexity_panels(rows, texts)
    rows = [row for row in tables.merge_seeds(rows) if not row.get("failed")]
    if perplexity:
        yield "perplexity", picture_of_curves(perplexity, methods, "perplexity", percent=False)
    names = list(dict.fromkeys(name for row in rows for name in row["tasks"]))
    accuracy = {"average accuracy, %": lines_of(rows, lambda row: measured_average(row, names))} if names else {}
    accuracy |= {
        f"{tables.TITLES.get(name, name)}, %": lines_of(rows, lambda row, n=name: measured_task(row, n))
        for name in names
    }
    accuracy = {title: lines for title, lines in accuracy.items() if any(name != "dense" for name in lines)}
    if accuracy:
        yield "accuracy", picture_of_curves(accuracy, methods, "accuracy", percent=True)


def picture_of_curves(panels, methods, what, percent):
    ends = [
        f"{name} {points[-1].value:.2f} at {points[-1].removed:.1f} %"
        for name, points in next(iter(panels.values())).items()
    ]
    caption = (
        f"{what.capitalize()} against the share of parameters removed, one line a method, starting from the dense "
        "model. Bars are standard errors where known (lines of several seeds: standard deviations over seeds). "
        "The legend is in the order of the first panel's last points."
    )
    if not percent:
        caption += f" What is more than {pictures.OFF_SCALE} times a panel's lowest is off the scale."
    return pictures.draw(
        pictures.curves(panels, methods, percent), caption, f"Line chart. {next(iter(panels))}: {'; '.join(ends)}."
    )


def lines_of(rows, measure):
    """Return {method: list of Point}, each method's line starting at the dense model."""
    lines, dense = {}, {}
    for row in sorted(rows, key=lambda row: row["removed_percent"]):
        measured = measure(row)
        if measured is None or not math.isfinite(measured[0]):
            continue
        point = pictures.Point(row["removed_percent"], *measured)
        line = lines.setdefault(row["method"], [])
        if row["method"] == "dense":
            dense.setdefault(row["source"], point)
        elif not line and row["source"] in dense:
            line.append(dense[row["source"]]._replace(error=None))
        line.append(point)
    return lines


def measured_perplexity(row, text):
    measured = row["perplexity"].get(text)
    return measured and (float(measured["value"]), None if measured["error"] is None else float(measured["error"]))


def measured_task(row, name):
    task = row["tasks"].get(name)
    return task and (100 * task["score"], None if task.get("stderr") is None else 100 * task["stderr"])


def measured_average(row, names):
    if set(names) - row["tasks"].keys():
        return None
    score, error = tables.average(row)
    return 100 * score, None if error is None else 100 * error


def removal_maps(results, rows):
    """Yield the layer stacks: one of all order files, one for each ratio of results."""
    layers = max((size for r in results for what, size in sizes_of(r).items() if what == "layers"), default=None)
    groups = {"orders": {}}
    for result in results:
        if result.kind == "order" and result.content[0]:
            groups["orders"][label_of(result, groups["orders"])] = result.content[0]
    for row in sorted(rows, key=lambda row: row["ratio"]):
        if row["removed"]:
            group = groups.setdefault(f"at least {row['ratio']:g} %" if not row.get("path") else "results", {})
            name = row["label"] if row.get("seed") is None else f"{row['label']}, seed {row['seed']}"
            group[name] = [parse_block(name) for name in row["removed"]]
    for title, orders in groups.items():
        if not orders:
            continue
        L = layers or 1 + max(block.layer for order in orders.values() for block in order)
        caption = f"What each method removes, {title}: the number is the step. Layer 0, nearest to the text, is on top."
        caption += " LaCo merges what is marked into the layer before." * any("laco" in name for name in orders)
        gone = "; ".join(f"{name}: {' '.join(map(str, order))}" for name, order in orders.items())
        picture = pictures.draw(pictures.removal_map(orders, L), caption, f"Layer stack of {L} layers. {gone}.")
        yield f"removed_{title.replace('at least ', '').replace(' %', '')}", picture


def label_of(result, taken):
    """Return a short name for an order file, not yet in `taken`."""
    meta = result.content[1]
    name = meta.get("label") or result.path.name.removesuffix(".json").removesuffix("_del_order_list")
    name = name.removeprefix(f"{Path(str(result.model)).name.removesuffix('.gguf')}_")
    return name if name not in taken else f"{name} ({len(taken) + 1})"


def score_maps(orders):
    for k, result in enumerate(orders, 1):
        order, meta = result.content
        windows = meta.get("window_scores")
        scored = sum(bool(step.get("scores")) for step in meta.get("steps", ())) or bool(windows)
        if scored < (1 if result.kind == "order" else 2):  # a comparison's one-shot methods have a single column
            continue
        figure = pictures.score_map(meta)
        what = "every window of layers by its first" if windows else "every candidate at every iteration"
        caption = (
            f"{result.path}: {pictures.score_name(meta)}, {what}. A dot marks what was removed, "
            "white what was gone before, a cross what was not finite."
        )
        if meta.get("approximate"):
            caption += " Approximate: a candidate that fell behind was scored on its first windows only."
        alt = f"Line chart of {len(windows)}" if windows else f"Heat map of candidate scores over {len(order)}"
        alt += f" {'window scores' if windows else 'iterations'}. Removed: {' '.join(map(str, order))}."
        yield f"scores_{k}", pictures.draw(figure, caption, alt)


def distance_maps(results):
    for k, result in enumerate(results, 1):
        best = {}
        for n, i, distance in result.content:
            if math.isfinite(distance) and distance < best.get(n, (math.inf,))[0]:
                best[n] = distance, i
        caption = (
            f"{result.path}: angular distance between the states entering and leaving n consecutive "
            "layers. A dot marks the nearest pair of each n, the window to remove."
        )
        nearest = "; ".join(f"n {n}: layers {i} to {i + n - 1}, {d:.3f}" for n, (d, i) in best.items())
        yield f"distances_{k}", pictures.draw(pictures.distance_map(result.content), caption, f"Heat map. {nearest}.")


def settings_of(result):
    """Return what a result file says about how it was made, without its numbers."""
    if result.kind == "compare":
        content = result.content
        return {
            "model": content["model"],
            "layers": content["layers"],
            "parameters": content["parameters"],
            **{name: value for name, value in content["settings"].items() if name != "methods"},
            **{f"method {name}": about for name, about in content["settings"].get("methods", {}).items()},
            **{f"text {name}": about for name, about in content.get("texts", {}).items()},
            "versions": content.get("versions"),
        }
    if result.kind == "distances":
        return {"windows": len(result.content)}
    content = result.content[1] if result.kind == "order" else result.content
    return {key: value for key, value in content.items() if key not in ("steps", "tasks", "failed")} or {
        "settings": "the file says nothing about them"
    }
