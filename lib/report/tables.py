"""The paper's table: rows of results as Markdown, LaTeX and HTML, best in bold, errors beside the numbers. No torch.

A result row, as scripts/compare.py writes and keeps it:

    {"method": "sleb", "label": "SLEB", "ratio": 20.0, "seed": None, "removed": ["layer7", ...], "removed_percent":
     20.4, "perplexity": {"wikitext2": {"value": 30.1, "error": 0.4, "level": False}}, "tasks": {"piqa": {"score": 0.6,
     "stderr": 0.01}}, "speed": {...} or None, "failed": None or the reason}

Of merge_seeds they have `blocks` and `several` as well, and means over seeds `average`: (mean of the seeds' averages,
standard deviation).

`ratio` is what was asked for, in percent of the parameters, 0 for the dense model; `level` says that the paired
difference to the best of its ratio is within two standard errors.
"""

import html
import math
import statistics
import textwrap
from typing import NamedTuple

from lib.tasks import TITLES

LEGEND = (
    "Best of each ratio in bold, means over seeds apart. Perplexity: ± is the standard error of the paired difference "
    "to the dense model over windows (for the dense model, of its own mean), in units of perplexity; ≈ marks what is "
    "within two paired standard errors of the best. Accuracy in percent, ± as the harness gives it. Over several "
    "seeds: mean ± standard deviation."
)


class Cell(NamedTuple):
    """A number as it is printed, its error as it is printed, or "", and how it compares with its column."""

    text: str
    error: str = ""
    best: bool = False
    level: bool = False


class Table(NamedTuple):
    """header: list of str; groups: [(title, rows)], a row being (name, list of Cell) or (name, why it failed)."""

    header: list
    groups: list


def merge_seeds(rows):
    """Return rows with those that differ only by seed made one: means, and standard deviations over seeds as errors.

    Seeds that failed are left out and named in the label; where all failed the row is the first one's.
    """
    groups = {}
    for k, row in enumerate(rows):
        groups.setdefault(k if row["seed"] is None else (row["method"], row["ratio"]), []).append(row)
    merged = []
    for same in groups.values():
        good = [row for row in same if not row.get("failed")]
        row = (good or same)[0]
        row = _mean(good) if len(good) > 1 else {"blocks": len(row["removed"]), **row}
        row["several"] = len(same) > 1
        if good and len(same) > 1:
            reasons = [bad["failed"] for bad in same if bad.get("failed")]
            why = f" of {len(same)} seeds failed: {textwrap.shorten(reasons[0], 60)}" if reasons else " seeds"
            row["label"] += f" ({len(reasons or same)}{why})"
        merged.append(row)
    return merged


def average(row):
    """Return (mean score, its standard error or None) of a row's tasks, taken as independent; or its own `average`."""
    if "average" in row:
        return row["average"]
    tasks = row["tasks"]
    scores, errors = [t["score"] for t in tasks.values()], [t.get("stderr") for t in tasks.values()]
    error = None if None in errors else math.sqrt(sum(e * e for e in errors)) / len(errors)
    return statistics.fmean(scores), error


def results_table(rows):
    """Return the Table of result rows: the dense model, then a group for each ratio with its best numbers marked."""
    rows = merge_seeds(rows)
    texts = list(dict.fromkeys(name for row in rows for name in row["perplexity"]))
    found = {name for row in rows for name in row["tasks"]}
    tasks = [*(t for t in TITLES if t in found), *sorted(found - TITLES.keys())]
    speeds = list(dict.fromkeys(name for row in rows for name in row.get("speed") or {}))
    header = ["method", "blocks", "ratio %", *(f"{name} PPL" for name in texts), *(TITLES.get(t, t) for t in tasks)]
    header += (["average"] if tasks else []) + speeds
    groups = []
    for ratio in sorted({row["ratio"] for row in rows}):
        group = [row for row in rows if row["ratio"] == ratio]
        columns = [None if row.get("failed") else _cells(row, texts, tasks, speeds) for row in group]
        if ratio:
            # perplexities, the lower the better; scores and their average, the higher; speeds are not ranked
            signs = [None, None] + [1] * len(texts) + [-1] * (len(tasks) + bool(tasks)) + [None] * len(speeds)
            # a mean over seeds is no model of its own: nothing is compared with it window by window
            _mark_best([c for c, row in zip(columns, group, strict=True) if c and not row["several"]], signs)
        title = f"at least {ratio:g} % removed" if ratio else ""
        lines = [(row["label"], cells or str(row["failed"])) for row, cells in zip(group, columns, strict=True)]
        groups.append((title, lines))
    return Table(header, groups)


def markdown(table):
    """Return the table as GitHub's Markdown."""
    lines = [_bar(map(_md, table.header)), _bar(["---"] * len(table.header))]
    empty = [""] * (len(table.header) - 1)
    for title, rows in table.groups:
        if title:
            lines.append(_bar([f"*{_md(title)}*", *empty]))
        for name, cells in rows:
            if isinstance(cells, str):
                lines.append(_bar([_md(name), f"failed: {_md(cells)}", *empty[1:]]))
            else:
                lines.append(_bar([_md(name), *(_md_cell(cell) for cell in cells)]))
    return "\n".join(lines) + "\n"


def latex(table):
    """Return the table as a LaTeX tabular; needs booktabs."""
    n = len(table.header)
    lines = [rf"\begin{{tabular}}{{l{'r' * (n - 1)}}}", r"\toprule"]
    lines.append(" & ".join(map(escape_latex, table.header)) + r" \\")
    for title, rows in table.groups:
        lines.append(r"\midrule")
        if title:
            lines.append(rf"\multicolumn{{{n}}}{{l}}{{\emph{{{escape_latex(title)}}}}} \\")
        for name, cells in rows:
            if isinstance(cells, str):
                row = rf"\multicolumn{{{n - 1}}}{{l}}{{failed: {escape_latex(cells)}}}"
            else:
                row = " & ".join(map(_latex_cell, cells))
            lines.append(rf"{escape_latex(name)} & {row} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def html_rows(table):
    """Return the table's rows as HTML, for html_table."""
    n, lines = len(table.header), []
    for title, rows in table.groups:
        if title:
            lines.append(f'<tr><th scope="rowgroup" colspan="{n}">{html.escape(title)}</th></tr>')
        for name, cells in rows:
            if isinstance(cells, str):
                row = f'<td class="text" colspan="{n - 1}">failed: {html.escape(cells)}</td>'
            else:
                row = "".join(f"<td>{_html_cell(cell)}</td>" for cell in cells)
            lines.append(f'<tr><th scope="row">{html.escape(name)}</th>{row}</tr>')
    return lines


def html_table(header, rows, caption="", kind="numbers"):
    """Return a table that scrolls sideways on a narrow screen. rows: strings of HTML, each a whole <tr>."""
    head = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in header)
    caption = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}">{caption}<thead><tr>{head}</tr></thead>\n<tbody>'
        + "\n".join(rows)
        + "</tbody></table></div>"
    )


def settings_table(settings, caption=""):
    """Return a table of names and values; a value may be a dict, shown as its own names and values."""

    def text(value):
        if isinstance(value, dict):
            return ", ".join(f"{key} {text(item)}" for key, item in value.items() if item is not None)
        if isinstance(value, (list, tuple)):
            return " ".join(map(text, value))
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

    rows = [
        f'<tr><th scope="row">{html.escape(str(key))}</th><td>{html.escape(text(value))}</td></tr>'
        for key, value in settings.items()
        if value not in (None, "", {}, [])
    ]
    return html_table(("setting", "value"), rows, caption, kind="settings")


def escape_latex(text):
    """Return text with LaTeX's special characters escaped."""
    special = {c: "\\" + c for c in "&%$#_{}"}
    special |= {
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "≈": r"$\approx$",
    }
    return "".join(special.get(c, c) for c in text)


# ---- from rows to cells --------------------------------------------------------------------------


def _mean(rows):
    """Return one row for several seeds."""

    def over(values):
        values = [float(value) for value in values]  # JSON has "nan" and "inf"
        error = statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
        return {"value": statistics.fmean(values), "error": error, "level": False}

    row = {**rows[0], "seed": None}
    row["blocks"] = round(statistics.fmean(len(r["removed"]) for r in rows), 1)
    row["removed_percent"] = statistics.fmean(r["removed_percent"] for r in rows)
    row["perplexity"] = {name: over(r["perplexity"][name]["value"] for r in rows) for name in rows[0]["perplexity"]}
    shared = [name for name in rows[0]["tasks"] if all(name in r["tasks"] for r in rows)]
    row["tasks"] = {}
    for name in shared:
        score = over(r["tasks"][name]["score"] for r in rows)
        row["tasks"][name] = {"score": score["value"], "stderr": score["error"]}
    if shared:
        mean = over(statistics.fmean(r["tasks"][name]["score"] for name in shared) for r in rows)
        row["average"] = mean["value"], mean["error"]
    speeds = [r.get("speed") or {} for r in rows]
    row["speed"] = {
        name: over(speed[name] for speed in speeds)["value"]
        for name in speeds[0]
        if all(name in speed for speed in speeds)
    }
    return row


def _cells(row, texts, tasks, speeds):
    cells = [Cell(f"{row['blocks']:g}"), Cell(f"{row['removed_percent']:.2f}")]
    for name in texts:
        measured = row["perplexity"].get(name)
        cells.append(_number(measured["value"], measured["error"], measured.get("level")) if measured else Cell("-"))
    scores = [row["tasks"].get(name) for name in tasks]
    cells += [_percent(s["score"], s.get("stderr")) if s else Cell("-") for s in scores]
    if tasks:
        cells.append(_percent(*average(row)) if all(scores) else Cell("-"))
    return cells + [_number((row.get("speed") or {}).get(name)) for name in speeds]


def _percent(score, error):
    return _number(100 * score, None if error is None else 100 * error)


def _number(value, error=None, level=False):
    if value is None:
        return Cell("-")
    return Cell(_text(float(value)), "" if error is None else _text(float(error)), level=bool(level))


def _text(number):
    """Return a number as tables show it; it may come from JSON as "nan" or "inf"."""
    return f"{number:.2f}" if abs(number) < 1e4 else f"{number:.0f}" if abs(number) < 1e8 else f"{number:.2e}"


def _mark_best(rows, signs):
    """Mark the best of each column, in place; numbers that print alike are alike."""
    for k, sign in enumerate(signs):
        values = [sign * _value(cells[k]) if sign else math.nan for cells in rows]
        best = min(filter(math.isfinite, values), default=None)
        for cells, value in zip(rows, values, strict=True):
            if value == best:
                cells[k] = cells[k]._replace(best=True, level=False)


def _value(cell):
    return math.nan if cell.text == "-" else float(cell.text)


# ---- marks ---------------------------------------------------------------------------------------


def _bar(cells):
    return "| " + " | ".join(cells) + " |"


def _md(text):
    return "".join("\\" + c if c in "\\|*_<>`" else c for c in " ".join(text.split()))


def _md_cell(cell):
    text = f"**{cell.text}**" if cell.best else cell.text + "≈" * cell.level
    return f"{text} ± {cell.error}" if cell.error else text


def _latex_cell(cell):
    text = rf"\textbf{{{cell.text}}}" if cell.best else cell.text + r"$\approx$" * cell.level
    return rf"{text} {{\scriptsize$\pm${cell.error}}}" if cell.error else text


def _html_cell(cell):
    text = f"<b>{cell.text}</b>" if cell.best else cell.text + "≈" * cell.level
    return f"{text} <small>± {cell.error}</small>" if cell.error else text
