"""lib/report/tables.py: the best in bold, failures with their reasons, seeds as means, marks escaped."""

import math
import re
import statistics

import pytest

from lib.report import tables


def row(method, ratio, ppl, score=None, **changes):
    tasks = {"piqa": {"score": score, "stderr": 0.03}, "arc_easy": {"score": 0.5, "stderr": 0.04}} if score else {}
    return {
        "method": method,
        "label": method,
        "ratio": ratio,
        "seed": None,
        "removed": [],
        "removed_percent": ratio + 0.4,
        "perplexity": {"text": {"value": ppl, "error": 0.125, "level": False}},
        "tasks": tasks,
        "speed": None,
        "failed": None,
        **changes,
    }


def test_table_puts_the_best_of_each_ratio_in_bold_and_says_why_a_cell_failed():
    rows = [
        row("dense", 0, 8.0, 0.7),
        row("a_b", 10, 12.0, 0.6),
        row("c", 10, 11.0, 0.5),
        row("d", 10, math.nan, perplexity={}, failed="cannot reach 10 %: a|b"),
        row("a_b", 20, 15.0),
        row("c", 20, 15.0),
    ]
    rows[1]["perplexity"]["text"]["level"] = True
    lines = tables.markdown(tables.results_table(rows)).splitlines()
    assert lines[0] == "| method | blocks | ratio % | text PPL | PIQA | ARC-e | average |"
    assert lines[2] == "| dense | 0 | 0.40 | 8.00 ± 0.12 | 70.00 ± 3.00 | 50.00 ± 4.00 | 60.00 ± 2.50 |"
    assert lines[4:7] == [
        "| a\\_b | 0 | 10.40 | 12.00≈ ± 0.12 | **60.00** ± 3.00 | **50.00** ± 4.00 | **55.00** ± 2.50 |",
        "| c | 0 | 10.40 | **11.00** ± 0.12 | 50.00 ± 3.00 | **50.00** ± 4.00 | 50.00 ± 2.50 |",
        "| d | failed: cannot reach 10 %: a\\|b |  |  |  |  |  |",
    ]
    assert lines[8:] == [
        "| a\\_b | 0 | 20.40 | **15.00** ± 0.12 | - | - | - |",
        "| c | 0 | 20.40 | **15.00** ± 0.12 | - | - | - |",
    ]


def test_latex_table_escapes_what_latex_would_obey():
    rows = [row("dense", 0, 8.0), row("a_b", 10, 12.0)]
    rows.append(row("d", 10, 1.0, perplexity={}, failed=r"50 % of $x_1 & {y}~\z^#"))
    text = tables.latex(tables.results_table(rows))
    assert r"a\_b & 0 & 10.40 & \textbf{12.00} {\scriptsize$\pm$0.12} \\" in text
    assert r"failed: 50 \% of \$x\_1 \& \{y\}\textasciitilde{}\textbackslash{}z\textasciicircum{}\#}" in text
    body = re.sub(r"\\[&%$#_{}]", "", text)
    for line in body.splitlines():
        if line.endswith(r"\\"):
            columns = line.count("&") + 1 + sum(int(n) - 1 for n in re.findall(r"multicolumn{(\d+)}", line))
            assert columns == 4, line
    assert text.count(r"\midrule") == 2 and text.startswith(r"\begin{tabular}{lrrr}")


def test_seeds_become_a_mean_and_a_standard_deviation():
    values, scores = (10.0, 13.0, 17.0), (0.5, 0.6, 0.4)
    rows = [row("random", 10, v, s, seed=k) for k, (v, s) in enumerate(zip(values, scores, strict=True))]
    rows += [row("x", 10, 9.0), row("x", 10, 9.5)]
    merged = tables.merge_seeds(rows)
    assert [r["label"] for r in merged] == ["random (3 seeds)", "x", "x"]
    text, piqa = merged[0]["perplexity"]["text"], merged[0]["tasks"]["piqa"]
    assert (text["value"], text["error"]) == (pytest.approx(40 / 3), pytest.approx(statistics.stdev(values)))
    assert (piqa["score"], piqa["stderr"]) == (pytest.approx(0.5), pytest.approx(0.1))
    failed = [row("random", 10, 10.0, seed=0), row("random", 10, 1.0, seed=1, perplexity={}, failed="why")]
    lines = tables.markdown(tables.results_table([row("x", 10, 20.0, 0.3), *rows[:3]])).splitlines()
    assert lines[-2].count("**") == 8, "the one model is best, though the draws' means are better"
    # each draw's average counts, so what tasks gain and lose together in a draw is in the deviation
    assert lines[-1] == "| random (3 seeds) | 0 | 10.40 | 13.33 ± 3.51 | 50.00 ± 10.00 | 50.00 ± 0.00 | 50.00 ± 5.00 |"
    (one,) = tables.merge_seeds(failed)
    assert one["label"] == "random (1 of 2 seeds failed: why)" and one["perplexity"]["text"]["error"] == 0.125
    (two,) = tables.merge_seeds([*failed, row("random", 10, 12.0, seed=2)])
    assert two["label"] == "random (1 of 3 seeds failed: why)" and two["perplexity"]["text"]["value"] == 11
    assert tables.merge_seeds(failed[1:])[0]["failed"] == "why"


def test_seeds_that_are_not_finite_say_so_and_speeds_are_averaged():
    for values, mean in (((1.0, math.nan, 2.0), "nan"), (("inf", 1.0, 2.0), "inf")):  # as JSON has them
        draws = [row("random", 10, v, seed=k, speed={"decode x": 1.0 + 2 * k}) for k, v in enumerate(values)]
        lines = tables.markdown(tables.results_table([row("dense", 0, 8.0), *draws])).splitlines()
        assert lines[-1] == f"| random (3 seeds) | 0 | 10.40 | {mean} ± nan | 3.00 |"
