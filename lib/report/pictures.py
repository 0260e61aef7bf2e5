"""Pictures of pruning orders and of results, as matplotlib figures and PNG files. No display, no torch.

Every picture is a function from plain data to a matplotlib Figure, so that a test can ask the figure what it shows.
Colours are safe for colour-blind readers; where lines or blocks differ, a marker or a number differs too.

    figure = score_map(read_order("ppls/..._del_order_list.json")[1])
    save(draw(figure), "scores.png")
"""

import io
import math
import textwrap
from pathlib import Path
from typing import NamedTuple

from lib.blocks import KINDS, parse_block
from lib.files import write_file

DPI = 144
# Okabe and Ito's colours without yellow, which vanishes on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*<>ph"
LINES = ("-", "--", ":")
KIND_COLOURS = {"mha": "#0072B2", "mlp": "#D55E00"}
LOG_FROM = 3  # scores that spread by more than this factor get a logarithmic scale
OFF_SCALE = 100  # times the lowest of a panel: lines of models destroyed leave it there, or the others would be flat


class Point(NamedTuple):
    """A model with something removed. removed: percent of the parameters; error: a standard error, or None."""

    removed: float
    value: float
    error: float | None = None


class Picture(NamedTuple):
    """A PNG of (width, height) inches, and what it shows in words: the caption, and the text for who cannot see it."""

    png: bytes
    size: tuple
    caption: str
    alt: str


# ---- what a search saw and did -------------------------------------------------------------------


def score_map(meta):
    """Return the heat map of every candidate's score, blocks by iterations, or None where no step has scores.

    meta: an order file's, whose steps hold the `block` removed and `scores` {"mha0": number}. One panel a kind, a row
    a layer, a column an iteration; a dot marks what an iteration removed, white is what was gone before it. Where
    whole layers are searched the last of a layer's steps holds the scores. Of a metric that scores windows of layers
    instead, return the line of these scores.
    """
    import numpy as np
    from matplotlib.cm import ScalarMappable

    if meta.get("window_scores"):
        return _window_line(meta)
    scored = [step for step in meta.get("steps", ()) if step.get("scores")]
    steps = [{str(name): score for name, score in step["scores"].items()} for step in scored]
    names = {name for scores in steps for name in scores}
    if not names:
        return None
    kinds = [kind for kind in (*KINDS, "layer") if any(parse_block(name).kind == kind for name in names)]
    L = meta.get("layers") or 1 + max(parse_block(name).layer for name in names)
    values = {kind: np.full((L, len(steps)), np.nan) for kind in kinds}
    for column, scores in enumerate(steps):
        for kind in kinds:
            for i in range(L):
                values[kind][i, column] = float(scores.get(f"{kind}{i}", math.nan))
    norm, beyond = _scale(np.concatenate([v.ravel() for v in values.values()]))
    cell = 0.2
    figure, axes = _figure(1.3 + len(kinds) * (0.5 + cell * max(4, len(steps))), 1.5 + cell * L, 1, len(kinds))
    for axis, kind in zip(axes, kinds, strict=True):
        _cells(axis, values[kind], norm)
        broken = [
            (x, i)
            for x, scores in enumerate(steps)
            for i in range(L)
            if f"{kind}{i}" in scores and not math.isfinite(float(scores[f"{kind}{i}"]))
        ]
        if broken:
            axis.plot(*zip(*broken, strict=True), "x", color="#777777", markersize=4)
        removed = [step.get("block", (None, None)) for step in scored]
        chosen = [(x, layer) for x, (which, layer) in enumerate(removed) if kind in (which, "layer")]
        if chosen:
            axis.plot(*zip(*chosen, strict=True), "o", color="white", markeredgecolor="black", markersize=6.5)
        axis.set_title(kind)
        axis.set_xlabel("iteration")
        axis.set_xticks(*_ticks(len(steps), 1))
        axis.set_yticks(*_ticks(L, 0))
    axes[0].set_ylabel("layer")
    bar = figure.colorbar(ScalarMappable(norm, _colours()), ax=axes, extend=beyond, fraction=0.05, pad=0.02, aspect=30)
    _plain_numbers(bar.ax.yaxis)
    bar.set_label(score_name(meta))
    return figure


def score_name(meta):
    """Return what an order's scores are, in words."""
    metric = meta.get("metric") or "ppl"
    return "perplexity without the block" if metric == "ppl" else f"{metric}, lowest is removed"


def removal_map(orders, n_layers):
    """Return the layer stack with what each order removes, {name: list of Block}; the number is that of the step.

    A block ("layer", i) takes both halves of its layer. Layer 0, the first to see the text, is on top.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    names = 0.045 * max(map(len, orders)) if len(orders) > 1 else 0  # inches that turned names reach up and right
    width = max(3.2, 0.9 + names + 0.75 * len(orders))
    figure, (axis,) = _figure(width, max(1.6, 0.8 + names) + 0.2 * n_layers, 1, 1)
    cells, colours, ticks = [], [], {}
    for k, (name, order) in enumerate(orders.items()):
        gone = {}
        for step, block in enumerate(order, 1):
            for kind in KINDS if block.kind == "layer" else (block.kind,):
                gone[kind, block.layer] = step
        left = 2.3 * k  # two columns and a gap
        for x, kind in zip((left, left + 1), KINDS, strict=True):
            ticks[x] = kind
            for i in range(n_layers):
                step = gone.get((kind, i))
                cells.append(Rectangle((x - 0.5, i - 0.5), 1, 1))
                colours.append(KIND_COLOURS[kind] if step else "#eeeeee")
                if step:
                    axis.text(x, i, str(step), color="white", ha="center", va="center", fontsize=6.5, weight="bold")
        turn = 40 if len(orders) > 1 else 0
        title = _literal(name if turn else textwrap.fill(name, 36))
        axis.text(left - 0.4, -0.8, title, rotation=turn, rotation_mode="anchor", va="bottom", fontsize=8)
    axis.add_collection(PatchCollection(cells, facecolors=colours, edgecolors="white", linewidths=1))
    axis.set_xlim(-0.5, max(ticks) + 0.5)
    axis.set_ylim(n_layers - 0.5, -0.5)
    axis.set_xticks(list(ticks), ticks.values())
    axis.set_yticks(*_ticks(n_layers, 0))
    axis.set_ylabel("layer")
    axis.tick_params(length=0, labelsize=6.5)
    for side in axis.spines.values():
        side.set_visible(False)
    return figure


# ---- results -------------------------------------------------------------------------------------


def curves(panels, methods, percent=False):
    """Return one panel a measure, {title: {method: list of Point}}: the measure against the parameters removed.

    methods: all that any picture of these results shows, for a method's colour, marker and line are those of its place
    among them. The legend follows the first panel's right ends from the top; the method called "dense" is a horizontal
    line. percent: higher is better, on a linear scale; else the scale is logarithmic where values spread, and ends at
    OFF_SCALE times the lowest.
    """
    panels = {
        title: {
            name: sorted((p for p in points if math.isfinite(p.value)), key=lambda p: p[:2])
            for name, points in lines.items()
        }
        for title, lines in panels.items()
    }
    shown = {name for lines in panels.values() for name in lines if name != "dense"}
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure, axes = _figure(4.8 * columns + 2, max(4.2 * rows, 0.2 * len(shown) + 0.4), rows, columns)
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        values = [p.value for points in lines.values() for p in points if p.value > 0]
        highest = math.inf if percent else OFF_SCALE * min(values, default=1)
        for name, points in lines.items():
            if name == "dense":
                for point in points[:1]:
                    axis.axhline(point.value, color="#777777", linewidth=1, zorder=0)
                    axis.annotate(
                        "dense",
                        (1, point.value),
                        xycoords=("axes fraction", "data"),
                        fontsize=8,
                        xytext=(-3, 3 if percent else -3),
                        textcoords="offset points",
                        ha="right",
                        va="bottom" if percent else "top",
                        color="#555555",
                    )
                continue
            k = methods.index(name)
            errors = [p.error or 0 if p.value <= highest else 0 for p in points]  # nor bars that come from beyond it
            axis.errorbar(
                [p.removed for p in points],
                [p.value for p in points],
                errors,
                label=_literal(name),
                color=COLOURS[k % len(COLOURS)],
                marker=MARKERS[k % len(MARKERS)],
                linestyle=LINES[k // len(COLOURS) % len(LINES)],
                linewidth=1.4,
                markersize=5,
                capsize=2.5,
            )
        if not percent and values and max(values) > LOG_FROM * min(values):
            axis.set_yscale("log")
            _plain_numbers(axis.yaxis)
            if max(values) > highest:
                axis.set_ylim(min(values) / 1.3, highest)
        axis.set_title(_literal(title), fontsize=10)
        axis.set_xlabel("parameters removed, %")
        axis.set_xlim(left=-0.03 * axis.get_xlim()[1])
        axis.grid(True, color="#dddddd", linewidth=0.6, which="both")
        axis.set_axisbelow(True)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles = {}
    for axis in axes[: len(panels)]:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    last = {name: points[-1] for lines in reversed(panels.values()) for name, points in lines.items() if points}
    ends = {_literal(name): point.value for name, point in last.items()}
    order = sorted(handles, key=ends.get, reverse=True)  # as the lines end in the first panel, from the top
    if order:
        figure.legend([handles[n] for n in order], order, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def distance_map(rows):
    """Return PruneMe's heat map of (n, i, distance): how far the state moves over the n layers from i.

    A row a window length, a column a first layer; a dot marks each length's nearest window.
    """
    import numpy as np
    from matplotlib.cm import ScalarMappable

    most, last = max(n for n, _, _ in rows), max(i for _, i, _ in rows)
    values = np.full((most, last + 1), np.nan)
    for n, i, distance in rows:
        values[n - 1, i] = distance
    norm, beyond = _scale(values.ravel(), log=False)
    figure, (axis,) = _figure(2 + 0.24 * (last + 1), 1.3 + 0.22 * most, 1, 1)
    _cells(axis, values, norm)
    for n in range(most):
        if not np.isnan(values[n]).all():
            axis.plot(np.nanargmin(values[n]), n, "o", color="white", markeredgecolor="black", markersize=6)
    axis.set_xlabel("first layer of the window")
    axis.set_ylabel("layers in the window")
    axis.set_xticks(*_ticks(last + 1, 0))
    axis.set_yticks(*_ticks(most, 1))
    bar = figure.colorbar(ScalarMappable(norm, _colours()), ax=axis, extend=beyond, fraction=0.05, pad=0.02)
    bar.set_label("angular distance, in units of π")
    return figure


def speeds(summary):
    """Return bars of scripts.bench_model's medians, prefill and decode tokens/s, with the lowest and the highest."""
    models = summary["models"]
    figure, panels = _figure(10, 4, 1, 2)
    width = 0.8 / len(models)
    for axis, what in zip(panels, ("prefill", "decode"), strict=True):
        for m, model in enumerate(models):
            spreads = [speed[f"{what}_tokens_per_second"] for speed in model["speed"]]
            medians = [s["median"] for s in spreads]
            errors = [[s["median"] - s["low"] for s in spreads], [s["high"] - s["median"] for s in spreads]]
            at = [i + (m - (len(models) - 1) / 2) * width for i in range(len(spreads))]
            axis.bar(at, medians, width, yerr=errors, capsize=3, label=_literal(model["name"]))
        settings = [f"{s['batch_size']} x {s['prompt_length']}" for s in models[0]["speed"]]
        axis.set_xticks(range(len(settings)), settings)
        axis.set_xlabel("prompts x tokens")
        axis.set_ylabel("tokens/s")
        axis.set_title(f"{what}, {summary['dtype']} on {summary['device']}")
    axis.legend()
    return figure


# ---- files ---------------------------------------------------------------------------------------


def draw(figure, caption="", alt=""):
    """Return the Picture of a figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, facecolor="white")
    return Picture(stream.getvalue(), tuple(figure.get_size_inches()), caption, alt)


def save(picture, path):
    """Write a Picture as a .png file, atomically."""
    write_file(path, picture.png)


def save_figure(figure, path):
    """Write a figure as the .svg, .pdf or .png file that its name asks for; equal figures give equal .svg files."""
    import matplotlib

    stream, kind = io.BytesIO(), Path(path).suffix[1:]
    undated = {"Date": None} if kind == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "blockpruner", "svg.fonttype": "none"}):
        figure.savefig(stream, format=kind, dpi=DPI, facecolor="white", metadata=undated)
    write_file(path, stream.getvalue())


def draw_order(path, order, meta):
    """Write the pictures of an order file beside it, (a) scores and (c) what went; return their paths.

    Raises ImportError where matplotlib is absent.
    """
    if not order:
        return []
    L = meta.get("layers") or 1 + max(block.layer for block in order)
    figures = {"scores": score_map(meta), "removed": removal_map({meta.get("block_type", "order"): order}, L)}
    written = []
    for name, figure in figures.items():
        if figure is not None:
            written.append(_picture_path(path, name))
            save(draw(figure), written[-1])
    return written


def pictures_of(path, meta):
    """Return the paths of the pictures that `draw_order` draws."""
    scored = meta.get("window_scores") or any(step.get("scores") for step in meta.get("steps", ()))
    return [_picture_path(path, name) for name in ("scores", "removed") if name == "removed" or scored]


def _picture_path(path, name):
    path = Path(path).expanduser()
    return path.with_name(f"{path.name.removesuffix('.json').removesuffix('_del_order_list')}_{name}.png")


# ---- drawing -------------------------------------------------------------------------------------


def _window_line(meta):
    """Return the scores of windows of layers, over each window's first layer; marks are those of score_map."""
    scores = {int(i): float(score) for i, score in meta["window_scores"].items()}
    good = {i: score for i, score in sorted(scores.items()) if math.isfinite(score)}
    figure, (axis,) = _figure(max(4.5, 1 + 0.22 * len(scores)), 3.4, 1, 1)
    axis.plot(list(good), list(good.values()), ".-", color=COLOURS[0])
    broken = [i for i in scores if i not in good]
    axis.plot(broken, [0.03] * len(broken), "x", color="#777777", transform=axis.get_xaxis_transform())
    gone = [step["block"][1] for step in meta["steps"]]
    if gone:
        axis.plot(min(gone), good[min(gone)], "o", color="white", markeredgecolor="black", markersize=7)
        axis.set_title(f"layers {min(gone)} to {max(gone)} go", fontsize=10)
    if good and 0 < LOG_FROM * min(good.values()) < max(good.values()):
        axis.set_yscale("log")
        _plain_numbers(axis.yaxis)
    axis.set_xticks(*_ticks(1 + max(scores), 0))
    axis.tick_params(labelsize=7)
    axis.set_xlabel("first layer of the window")
    axis.set_ylabel(score_name(meta))
    axis.grid(True, color="#dddddd", linewidth=0.6)
    return figure


def _figure(width, height, rows, columns):
    """Return (Figure, list of its axes); made without pyplot, so no display and no global state."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    figure.get_layout_engine().set(wspace=0.04)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _colours():
    """Return the colour map: viridis is safe for colour-blind readers and prints in grey."""
    import matplotlib

    return matplotlib.colormaps["viridis"]


def _literal(text):
    """Return text that matplotlib writes as it is, not as formulas between dollar signs."""
    return text.replace("$", r"\$")


def _cells(axis, values, norm):
    import numpy as np

    axis.imshow(np.ma.masked_invalid(values), norm=norm, cmap=_colours(), aspect="equal", interpolation="nearest")
    axis.set_xticks([x - 0.5 for x in range(1, values.shape[1])], minor=True)
    axis.set_yticks([y - 0.5 for y in range(1, values.shape[0])], minor=True)
    axis.grid(which="minor", color="white", linewidth=0.5)
    axis.tick_params(which="minor", length=0)
    axis.tick_params(labelsize=7)


def _scale(values, log=True):
    """Return (norm, which end of the colour bar goes on): a few huge scores must not make the rest one colour.

    Beyond Tukey's fence, 1.5 interquartile ranges above the upper quartile, everything has the last colour.
    """
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    values = values[np.isfinite(values)]
    if not len(values):
        return Normalize(0, 1), "neither"
    positive = log and values.min() > 0
    scaled = np.log(values) if positive else values
    low, high = scaled.min(), scaled.max()
    quarter, three_quarters = np.percentile(scaled, (25, 75))
    fence = three_quarters + 1.5 * (three_quarters - quarter)
    beyond = "max" if low < fence < high else "neither"
    high = fence if beyond == "max" else high
    if low == high:
        low, high = low - 0.5, high + 0.5
    if positive:
        spread = high - low > math.log(LOG_FROM)
        return (LogNorm if spread else Normalize)(math.exp(low), math.exp(high)), beyond
    return Normalize(low, high), beyond


def _ticks(n, first):
    """Return (positions, labels) for n cells numbered from `first`: every one, or every so many of a long row."""
    step = 1 if n <= 40 else 5
    shown = [x for x in range(n) if step == 1 or (x + first) % step == 0]
    return shown, [str(x + first) for x in shown]


def _plain_numbers(axis):
    """Write 20 and 300 on a logarithmic axis, not powers of ten."""
    from matplotlib.ticker import LogFormatter

    if axis.get_scale() == "log":
        axis.set_major_formatter(LogFormatter(labelOnlyBase=False))
        axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.7)))
