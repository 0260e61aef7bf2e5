"""lib/report/ and scripts/report.py: pictures that show the data, a page that needs nothing else."""

import base64
import html.parser
import io
import json
import math
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from command_line import assert_refused, shell, tree
from test_tables import row

from lib.blocks import Block
from lib.orders import save_order
from lib.report import pictures as report
from lib.report import tables

L = 6
GREEDY = [Block("mha", 4), Block("mlp", 2), Block("mha", 1)]


def searched(order=None, **changes):
    """Return (order, meta) of a search over 6 layers whose scores are all different."""
    order, gone, steps = order or GREEDY, [], []
    for k, block in enumerate(order):
        scores = {
            f"{kind}{i}": 10.0 + k + i / 8 + (kind == "mlp") / 16
            for kind in ("mha", "mlp")
            for i in range(L)
            if (kind, i) not in gone
        }
        scores[str(block)] = 9.0 + k
        steps.append({"block": block, "perplexity": 9.0 + k, "scores": scores, "seconds": 1.0, "removed_percent": k})
        gone.append(block)
    return order, {"model": "models/Toy-1", "layers": L, "block_type": "mix", "steps": steps, **changes}


@pytest.fixture
def files(tmp_path):
    """Return a function that writes result files of a model and returns their paths: an order and two of eval.py."""

    def write(model="models/Toy-1", folder="results", **changes):
        here = tmp_path / folder
        order, meta = searched(model=model)
        name = model.split("/")[-1]
        save_order(here / f"{name}_mix_text_ns_9_del_order_list.json", order, meta)
        shared = {
            "model": model,
            "order_file": f"ppls/{name}_mix_text_ns_9_del_order_list.json",
            "dense_parameters": 1000,
            "dataset": "text",
            "source": "text.txt",
            "split": None,
            "windows": 7,
            "seqlen": 64,
            "dense_perplexity": 8.0,
            "limit": None,
            **changes,
        }
        for k, score in ((1, 0.6), (3, 0.5)):
            result = {
                **shared,
                "removed": [str(b) for b in order[:k]],
                "pruning_ratio_percent": 4.0 * k,
                "perplexity": 8.0 + 2 * k,
                "tasks": {"piqa": {"score": score, "stderr": 0.02}},
            }
            (here / f"{name}_{k}.json").write_text(json.dumps(result))
        return sorted(here.glob("*.json"))

    return write


@pytest.fixture
def drawn(call, tmp_path, monkeypatch):
    """Return a function that runs scripts.report on files, and returns the Run, the page's text and its folder."""
    from scripts import report as script

    monkeypatch.setattr(report, "DPI", 50)  # small pictures are sooner drawn

    def run(*paths):
        done = call(script.main, *map(str, paths), "--output-dir", str(tmp_path / "page"))
        assert done.code == 0, done
        return done, (tmp_path / "page" / "index.html").read_text(encoding="utf-8"), tmp_path / "page"

    return run


# ---- pictures react to the data --------------------------------------------------------------------------------


def test_score_map_shows_every_score_and_marks_what_went():
    order, meta = searched()
    meta["steps"][1]["scores"]["mlp5"] = "nan"
    figure = report.score_map(meta)
    panels = {axis.get_title(): axis for axis in figure.axes}
    for kind in ("mha", "mlp"):
        shown = panels[kind].images[0].get_array()
        assert shown.shape == (L, len(order))
        for k, step in enumerate(meta["steps"]):
            for i in range(L):
                score = float(step["scores"].get(f"{kind}{i}", "nan"))
                assert shown[i, k] == score if math.isfinite(score) else np.ma.is_masked(shown[i, k])
    dots = {
        (kind, *point)
        for kind in ("mha", "mlp")
        for line in panels[kind].lines
        if line.get_marker() == "o"
        for point in line.get_xydata()
    }
    assert dots == {(block.kind, k, block.layer) for k, block in enumerate(order)}
    crosses = [tuple(point) for line in panels["mlp"].lines if line.get_marker() == "x" for point in line.get_xydata()]
    assert crosses == [(1, 5)]


def test_score_map_keeps_its_colours_for_the_many_when_a_few_scores_explode():
    order, meta = searched()
    for step in meta["steps"]:
        step["scores"]["mlp0"] = 5e5
    norm = report.score_map(meta).axes[0].images[0].norm
    assert norm.vmax < 20
    for step in meta["steps"]:
        step["scores"] = {name: score**3 for name, score in step["scores"].items()}
    norm = report.score_map(meta).axes[0].images[0].norm
    assert type(norm).__name__ == "LogNorm" and 900 < norm.vmax < 1e5


def test_score_map_takes_layers_and_orders_without_scores():
    steps = [{"scores": {f"layer{i}": i + 1.5 for i in range(L)}}, {"scores": {f"layer{i}": 2.5 for i in (0, 4)}}]
    figure = report.score_map({"steps": steps, "layers": L, "metric": "bi"})
    assert figure.axes[0].get_title() == "layer"
    assert figure.axes[0].images[0].get_array()[2, 0] == 3.5
    assert any("bi" in axis.get_ylabel() for axis in figure.axes)
    assert report.score_map({}) is None
    assert report.score_map({"steps": [{"block": ["mha", 1]}]}) is None


def test_scores_of_windows_are_drawn_with_the_chosen_one_and_those_not_finite_marked(drawn, tmp_path):
    steps = [{"block": [kind, i]} for i in (2, 3) for kind in ("mha", "mlp")]
    scores = {"1": 9.0, "2": 7.0, "3": 90.0, "4": "inf"}
    meta = {"metric": "window_ppl", "window": 2, "window_scores": scores, "steps": steps, "layers": L, "model": "toy"}
    (axis,) = report.score_map(meta).axes
    line, crosses, chosen = (one.get_xydata().tolist() for one in axis.lines)
    assert line == [[1, 9], [2, 7], [3, 90]] and chosen == [[2, 7]] and [x for x, _ in crosses] == [4]
    assert axis.get_title() == "layers 2 to 3 go" and axis.get_yscale() == "log"
    path, order = tmp_path / "toy_layer_window_ppl2_text_ns_4_del_order_list.json", [Block(*s["block"]) for s in steps]
    save_order(path, order, meta)
    beside = report.draw_order(path, order, {**meta, "window_scores": {int(i): float(scores[i]) for i in scores}})
    assert [p.name.removeprefix("toy_layer_window_ppl2_text_ns_4_") for p in beside] == ["scores.png", "removed.png"]
    _, text, folder = drawn(path)
    assert (folder / "scores_1.png").is_file() and "Line chart of 4 window scores. Removed: mha2 mlp2" in text


def test_removal_map_writes_each_step_where_it_belongs():
    orders = {"greedy": GREEDY, "layers": [Block("layer", 5), Block("layer", 0)]}
    (axis,) = report.removal_map(orders, L).axes
    columns = [label.get_text() for label in axis.get_xticklabels()]
    assert columns == ["mha", "mlp"] * 2
    numbers, titles = {}, []
    for text in axis.texts:
        x, y = text.get_position()
        if y < 0:
            titles.append((text.get_text(), x < axis.get_xticks()[2] - 0.6))
        else:
            numbers[list(axis.get_xticks()).index(x), y] = text.get_text()
    assert titles == [("greedy", True), ("layers", False)]
    assert numbers == {(0, 4): "1", (1, 2): "2", (0, 1): "3", (2, 5): "1", (3, 5): "1", (2, 0): "2", (3, 0): "2"}
    colours = axis.collections[0].get_facecolors()
    assert len(colours) == 4 * L and sum(tuple(c) != tuple(colours[0]) for c in colours) == len(numbers)
    bottom, top = axis.get_ylim()
    assert bottom > top, "layer 0 is on top"


def test_curves_draw_every_point_with_its_error():
    P = report.Point
    panels = {
        "text": {"dense": [P(0, 8)], "a": [P(20, 40.0, 3.0), P(10, 12.0, 1.0)], "b": [P(10, 9.0), P(20, math.inf)]},
        "other": {"b": [P(10, 9.0)], "a": [P(10, 11.0), P(10, 11.0, 1.0)]},
    }
    figure = report.curves(panels, ["c", "a", "b"])
    text, other = figure.axes
    lines = {c.get_label(): c for c in text.containers}
    assert lines["a"].lines[0].get_xydata().tolist() == [[10, 12], [20, 40]]
    assert [segment.tolist() for segment in lines["a"].lines[2][0].get_segments()] == [
        [[10, 11], [10, 13]],
        [[20, 37], [20, 43]],
    ]
    assert lines["b"].lines[0].get_xydata().tolist() == [[10, 9]]
    assert [line.get_ydata()[0] for line in text.lines if line.get_label().startswith("_child")][:1] == [8]
    assert (text.get_yscale(), other.get_yscale()) == ("log", "linear")
    colours = [{c.get_label(): c.lines[0].get_color() for c in axis.containers} for axis in (text, other)]
    assert colours[0] == colours[1] == {"a": report.COLOURS[1], "b": report.COLOURS[2]}, "of its place among all"
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a", "b"]
    wrecked = {"a": [P(0, 2), P(1, 90, 3)], "b": [P(0, 2), P(1, 5e6, 6e6)]}
    (axis,) = report.curves({"x": wrecked}, ["a", "b"]).axes
    assert axis.get_ylim()[1] == 200, "else the line of a would look flat"
    bars = {c.get_label(): c.lines[2][0].get_segments()[1].tolist() for c in axis.containers}
    assert bars == {"a": [[1, 87], [1, 93]], "b": [[1, 5e6], [1, 5e6]]}, "b's would cross the picture"
    assert report.curves({"x": {"a": [P(0, 1), P(1, 90)]}}, ["a"], percent=True).axes[0].get_yscale() == "linear"


def test_twenty_methods_can_be_told_apart():
    P = report.Point
    lines = {f"method {k}": [P(0, 1.0), P(1, 2.0 + k)] for k in range(20)}
    figure = report.curves({"x": lines}, list(lines))
    looks = {
        (line.get_color(), line.get_marker(), line.get_linestyle())
        for c in figure.axes[0].containers
        for line in [c.lines[0]]
    }
    assert len(looks) == 20


def test_distance_map_marks_the_nearest_window_of_each_length():
    rows = [(n, i, abs(i - 2) / 10 + n / 5) for n in range(1, L) for i in range(L - n + 1)]
    axis = report.distance_map(rows).axes[0]
    shown = axis.images[0].get_array()
    for n, i, distance in rows:
        assert shown[n - 1, i] == distance
    assert np.ma.is_masked(shown[4, 3])
    dots = [tuple(point) for line in axis.lines for point in line.get_xydata()]
    assert dots == [(min(2, L - n), n - 1) for n in range(1, L)]


def test_pictures_are_pngs_whose_pixels_follow_the_data(tmp_path):
    order, meta = searched()
    pixels = []
    for score in (9.5, 11.5, 11.5):
        meta["steps"][0]["scores"]["mha0"] = score
        report.save(report.draw(report.score_map(meta)), tmp_path / "new" / "map.png")
        pixels.append(matplotlib.image.imread(tmp_path / "new" / "map.png"))
    assert min(pixels[0].shape[:2]) > 200
    assert not np.array_equal(pixels[0], pixels[1])
    assert np.array_equal(pixels[1], pixels[2])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["map.png"]


# ---- the page --------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """What a browser would ask for, and what it would show."""

    VOID = {"meta", "link", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.images, self.links, self.text = [], [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data
        else:
            assert "url(" not in data and "@import" not in data


def test_page_is_self_contained_and_says_what_its_pictures_show(files, drawn):
    run, text, folder = drawn(*files())
    page = Page(text)
    assert all(link.startswith("data:") for link in page.links)
    assert "script" not in page.tags and "http" not in text
    assert 'name="viewport" content="width=device-width' in text
    written = sorted(folder.glob("*.png"))
    assert len(page.images) == len(written) == 5
    inlined = {base64.b64decode(image["src"].partition("base64,")[2]) for image in page.images}
    assert inlined == {path.read_bytes() for path in written}
    for image in page.images:
        pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(image["src"].partition("base64,")[2])))
        width, height = int(image["width"]), int(image["height"])
        assert pixels.shape[0] / pixels.shape[1] == pytest.approx(height / width, rel=0.02)
        assert len(image["alt"]) > 40
    assert any("mha4 mlp2 mha1" in image["alt"] for image in page.images)
    for words in ("models/Toy-1", "3 blocks removed", "14.00", "50.00", "± 2.00", "block_type"):
        assert words in page.text, words
    assert run.result["page"] == str(folder / "index.html")
    assert "NOT A RESULT" not in page.text and "notice" not in text.partition("<body>")[2]


def test_page_escapes_what_files_say(files, drawn):
    _, text, _ = drawn(*files(model="models/<b>&Toy", dataset="a$5%_{x}^$"))  # between dollars no formula either
    assert "<b>&Toy" not in text and "&lt;b&gt;&amp;Toy" in text
    Page(text)


def test_reduced_results_are_labelled_at_the_top(files, drawn):
    run, text, _ = drawn(*files(limit="NOT A RESULT, --limit: all=5"))
    assert text.index("NOT A RESULT, --limit: all=5") < text.index("<h2>")
    assert "NOT A RESULT" in run.out


def test_results_of_two_models_stand_apart_and_the_page_says_so(files, drawn):
    run, text, folder = drawn(*files(), *files("other/Toy-2", folder="more"))
    page = Page(text)
    notice = "Results of 2 models, each in sections of its own: Toy-1, Toy-2."
    assert notice in page.text and notice in run.out
    assert page.text.index(notice) < page.text.index("Toy-1: results") < page.text.index("Toy-2: results")
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert len(titles) == len(set(titles)) == 10 and all(t.startswith(("Toy-1: ", "Toy-2: ")) for t in titles)
    for name in ("Toy-1", "Toy-2"):  # no table holds both
        parts = [part for part in text.split("<section>")[1:] if part.startswith(f"<h2>{name}")]
        assert "3 blocks removed" in "".join(parts)
    assert len(list(folder.glob("1_*.png"))) == len(list(folder.glob("2_*.png"))) == 5


def test_files_that_name_no_model_stand_apart(files, drawn, tmp_path):
    table = tmp_path / "distances.csv"
    table.write_text("n,i,distance\n" + "".join(f"{n},{i},{(n + i) / 99}\n" for n in (1, 2, 3) for i in range(6 - n)))
    _, text, _ = drawn(*files(), table)
    assert f"Of which model these are is not in the files, it may be several: {table}." in text
    assert "<h2>model not named: angular distances</h2>" in text
    _, text, _ = drawn(table)
    assert "<title>BlockPruner: results</title>" in text
    assert "n 2: layers 0 to 1, 0.020" in Page(text).images[0]["alt"] and "it may be several" not in text
    paper = [tmp_path / f"{name}_mix_alpaca_ns_4_del_order_list.json" for name in ("Llama", "Qwen")]
    for path in paper:
        path.write_text('{"1": [["mha", 5]]}')
    assert f"it may be several: {paper[0]}, {paper[1]}." in drawn(*paper)[1]


def test_the_papers_order_files_can_be_drawn(drawn, tmp_path):
    path = tmp_path / "Llama_mix_alpaca_ns_4_del_order_list.json"
    path.write_text('{"1": [["mha", 5]], "2": [["mha", 5], ["mlp", 6]]}')
    _, text, folder = drawn(path)
    assert [p.name for p in folder.glob("*.png")] == ["removed_orders.png"]
    assert "mha5 mlp6" in text


def table_rows(text, name):
    """Return [text of each cell] of the page's table rows whose name starts so."""
    rows = [re.findall("<t[hd].*?</t[hd]>", row) for row in re.findall("<tr>.*?</tr>", text)]
    rows = [[re.sub("<.*?>", "", cell) for cell in row] for row in rows]
    return [row for row in rows if row[0].startswith(name)]


def test_perplexities_of_different_windows_have_panels_and_columns_of_their_own(files, drawn):
    first = files()
    second = files(folder="more", windows=9, dense_perplexity=4.0)
    for path in second[:2]:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"perplexity": 5.5}))
    _, text, folder = drawn(*first, *second)
    chart = next(image["alt"] for image in Page(text).images if "perplexity" in image["alt"])
    assert "7 windows" in chart
    headers = re.findall('<th scope="col">(text.*?PPL)</th>', text)
    assert headers == ["text PPL", "text (2) PPL"]
    assert [row[3:5] for row in table_rows(text, "dense")[:1]] == [["8.00", "4.00"]]
    assert [row[:5] for row in table_rows(text, "mix_")] == [
        ["mix_text_ns_9, 1 blocks removed", "1", "4.00", "10.00", "5.50"],
        ["mix_text_ns_9, 3 blocks removed", "3", "12.00", "14.00", "5.50"],
    ]


def test_the_same_order_measured_otherwise_has_rows_and_lines_of_its_own(files, drawn):
    def names(**changes):
        folder = changes.pop("folder")
        _, text, _ = drawn(*files(dtype="fp32"), *files(folder=folder, **changes))
        chart = next(image["alt"] for image in Page(text).images if "perplexity" in image["alt"])
        return [row[0] for row in table_rows(text, ("dense", "mix_")) if len(row) > 2], chart

    rows, chart = names(folder="more", dtype="bf16", dense_perplexity=8.5)
    assert len(rows) == 6 and "mix_text_ns_9, 3 blocks removed, dtype bf16" in rows and "dense, dtype fp32" in rows
    assert "mix_text_ns_9, dtype fp32 14.00 at 12.0 %; mix_text_ns_9, dtype bf16 14.00 at 12.0 %" in chart
    rows, _ = names(folder="again", dtype="fp32", dense_perplexity=8.7)
    assert sorted(row for row in rows if "dense" in row) == ["dense, again/Toy-1_1.json", "dense, results/Toy-1_1.json"]
    assert len(rows) == 4, "what came out alike is one measurement"


def test_models_that_share_a_name_but_not_a_path_stand_apart(files, drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [*files("run1/final"), *files("run2/final", folder="more"), *files(f"{tmp_path}/run2/final", "again")]
    _, text, _ = drawn(*paths)
    assert "Results of 2 models, each in sections of its own: run1/final, run2/final." in text
    assert {title.split(":")[0] for title in re.findall("<h2>(.*?)</h2>", text)} == {"run1/final", "run2/final"}


def test_a_gguf_under_two_names_is_one_model(drawn, tmp_path):
    (tmp_path / "model.gguf").write_text("")
    (tmp_path / "link.gguf").symlink_to("model.gguf")
    for name in ("model", "link"):  # its fingerprint holds its name
        save_order(tmp_path / f"{name}.json", *searched(model=str(tmp_path / f"{name}.gguf"), weights=name * 4))
    _, text, _ = drawn(tmp_path / "model.json", tmp_path / "link.json")
    assert "Results of 2 models" not in text


def test_two_comparisons_of_a_model_are_not_blended(drawn, tmp_path):
    paths = []
    for folder, worse in (("cal8", 0.0), ("cal64", 5.0)):
        rows = [row("dense", 0, 8.0), row("bi", 10, 20 + worse, removed=[f"mha{int(worse)}"])]
        rows += [row("random", 10, 10 + seed + worse, seed=seed, removed=["mlp1"]) for seed in (0, 1)]
        about = {"source": "text.txt", "split": None, "windows": 7, "seqlen": 64, "text_sha256": "x"}
        summary = {"kind": "compare", "model": "Toy", "layers": L, "parameters": 1000, "rows": rows, "settings": {}}
        summary["reduced"] = ["FEW WINDOWS"] * (folder == "cal8")
        paths.append(tmp_path / folder / "compare.json")
        paths[-1].parent.mkdir()
        paths[-1].write_text(json.dumps({**summary, "texts": {"text": about}}))
    _, text, _ = drawn(*paths, paths[0])
    assert [line[3] for line in table_rows(text, "random (2 seeds)")] == ["10.50 ± 0.71", "15.50 ± 0.71"]
    assert ">cal8: FEW WINDOWS<" in text and "cal64: FEW" not in text
    assert "<caption>cal8. " in text and "<caption>cal64. " in text
    alts = " ".join(image["alt"] for image in Page(text).images)
    for words in (
        "bi, cal8 20.00",
        "bi, cal64 25.00",
        "random, cal8 10.50",
        "random, cal64 15.50",
        "bi, cal8: mha0;",
        "bi, cal64: mha5;",
        "random, cal64, seed 1: mlp1",
    ):
        assert words in alts, words
    _, text, _ = drawn(paths[1])
    assert "cal64 " not in Page(text).images[0]["alt"], "alone it needs no other name"


# ---- where it runs ---------------------------------------------------------------------------------------------


def test_nothing_here_imports_torch_or_needs_a_display(files, tmp_path):
    paths = [str(path) for path in files()]
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from scripts.report import main\n"
        f"main({paths!r} + ['--output-dir', {str(tmp_path / 'page')!r}])\n"
        "assert not {'tkinter', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    run = shell("-c", code, DISPLAY="", MPLBACKEND="")
    assert run.code == 0, run
    assert (tmp_path / "page" / "index.html").is_file()


def test_report_refuses_in_one_line(files, call, tmp_path, monkeypatch):
    from scripts import report as script

    good = files()
    bad, table = tmp_path / "bad.json", tmp_path / "bad.csv"
    bad.write_text('{"hello": 1}')
    table.write_text("layer,score\n1,2\n")
    half = tmp_path / "half.json"
    half.write_text(json.dumps({"kind": "compare", "model": "x"}))
    other = files(folder="other", dense_parameters=2000)
    trained = tmp_path / "trained"
    for name in ("a", "b"):
        save_order(trained / f"{name}.json", *searched(weights=name * 16))
    before = tree(tmp_path)
    for paths, says in (
        ([tmp_path / "none.json"], ("none.json", "no such order file")),
        ([tmp_path / "none.csv"], ("none.csv", "no such file")),
        ([bad], ("bad.json",)),
        ([table], ("bad.csv", "n, i, distance")),
        ([half], ("half.json", "layers", "rows")),
        ([*good, *other], ("Toy-1", "1,000", "2,000", "parameters")),
        (trained.glob("*.json"), ("Toy-1", "a" * 16, "b" * 16, "weights")),
    ):
        run = call(script.main, *map(str, paths), "--output-dir", str(tmp_path / "page"))
        assert_refused(run, *says)
    assert_refused(call(script.main, str(good[0]), "--output-dir", str(bad)), "--output-dir", "not a folder")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert_refused(call(script.main, str(good[0]), "--output-dir", str(tmp_path / "page")), "pip install matplotlib")
    assert tree(tmp_path) == before


def test_one_picture_of_quality_against_size(files, call, tmp_path):
    from scripts import report as script

    drawn, paths = [], files()
    for name in ("a.svg", "b.svg", "c.png", "d.pdf"):
        run = call(script.main, *map(str, paths), "--picture", str(tmp_path / name))
        assert run.code == 0 and run.result == {"picture": str(tmp_path / name)}, run
        drawn.append((tmp_path / name).read_bytes())
    assert drawn[0] == drawn[1] and b"mix_text_ns_9" in drawn[0] and b"7 windows of 64" in drawn[0]
    assert drawn[2].startswith(b"\x89PNG") and drawn[3].startswith(b"%PDF")
    before = tree(tmp_path)
    order = next(str(path) for path in paths if "order_list" in path.name)
    for given, name, says in (
        (paths, "x.jpg", ("--picture", ".svg, .pdf or .png")),
        ([order], "x.svg", ("no perplexity of a pruned model",)),
    ):
        assert_refused(call(script.main, *map(str, given), "--picture", str(tmp_path / name)), *says)
    assert tree(tmp_path) == before
    other = files("other/Toy-2", folder="more")
    run = call(script.main, *map(str, [*paths, *other]), "--picture", str(tmp_path / "x.svg"))
    assert_refused(run, "results of 2 models")


def test_the_committed_results_make_the_committed_picture_and_table(call, tmp_path):
    from scripts import report as script

    docs = Path(__file__).parent.parent / "docs"
    run = call(script.main, str(docs / "results" / "smollm2.json"), "--picture", str(tmp_path / "quality.svg"))
    assert run.code == 0, run
    text, committed = ((folder / "quality.svg").read_text() for folder in (tmp_path, docs))
    words = [re.findall(r"<text[^>]*>(.*?)</text>", svg) for svg in (text, committed)]
    assert words[0] == words[1] and "blockpruner" in words[0]
    table = tables.markdown(tables.results_table(json.loads((docs / "results" / "smollm2.json").read_text())["rows"]))
    assert "| blockpruner | 19 | 20.40 | 175.37 ± 4.34 | 24.04 ± 0.91 | 58.25 ± 2.47 |" in table
    assert "| sleb | 16 | 21.05 | **142.86** ± 4.92 | **20.75** ± 0.50 |" in table


def test_report_prints_help_without_importing_matplotlib():
    code = (
        "import sys\nfrom scripts.report import main\n"
        "try: main(['--help'])\nfinally: assert not {'matplotlib', 'numpy', 'torch'} & set(sys.modules)"
    )
    assert shell("-c", code).code == 0


def test_a_search_draws_its_order_beside_it(searched_by_process):
    run, path, meta = searched_by_process
    stem = path.name.removesuffix("_del_order_list.json")
    pictures = [path.with_name(f"{stem}_{name}.png") for name in ("scores", "removed")]
    for picture in pictures:
        assert min(matplotlib.image.imread(picture).shape[:2]) > 100
        assert f"picture       {picture}" in run.out
    assert pictures[0].read_bytes() == report.draw(report.score_map(meta)).png


@pytest.fixture
def searched_by_process(request):
    from lib.orders import read_order

    run, _, path = request.getfixturevalue("searched")
    return run, path, read_order(path)[1]
