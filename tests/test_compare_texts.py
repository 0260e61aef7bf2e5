"""scripts/compare.py: the same text under other names is the same text; LaCo's removals; names as they are."""

import os

from test_compare import comparison, model, texts, words  # noqa: F401 - fixtures


def test_a_file_that_is_calibrated_on_is_left_out_however_its_path_is_spelled(comparison, texts, tmp_path):  # noqa: F811
    text = texts[0]
    (tmp_path / "linked.txt").symlink_to(text)
    for spelled in (f"{text.parent}/./text.txt", os.path.relpath(text), tmp_path / "linked.txt"):
        run, summary = comparison("last", cal_dataset=spelled)
        assert summary["texts"]["text"]["left_out"] == 8, spelled
        assert summary["texts"]["other"]["left_out"] is None


def test_a_named_set_and_its_file_are_one_text(comparison, texts, tmp_path):  # noqa: F811
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "alpaca-test.txt").write_text(texts[0].read_text())
    run, summary = comparison(
        "last", cal_dataset=tmp_path / "data" / "alpaca-test.txt", data_dir=tmp_path / "data", eval_datasets="alpaca"
    )
    assert summary["texts"]["alpaca"]["left_out"] == 8, "of that set's test split"


def test_another_spelling_of_the_calibration_text_goes_on(comparison, texts, tmp_path):  # noqa: F811
    comparison("bi", "0.1")
    run, summary = comparison("bi", "0.1 0.4", cal_dataset=f"{texts[0].parent}/./text.txt", text_column="text")
    assert [row["failed"] for row in summary["rows"]] == [None] * 3
    assert run.out.count("(kept)") == 2, "the dense model and the first ratio: the windows are the same"


def test_another_spelling_of_the_model_goes_on(comparison, model):  # noqa: F811
    comparison("bi", "0.1")
    run, summary = comparison("bi", "0.1 0.4", model_path=f"{model.parent}/./{model.name}")
    assert [row["failed"] for row in summary["rows"]] == [None] * 3
    assert run.out.count("(kept)") == 2, "the weights are the same"


def test_laco_removes_in_the_order_of_its_merges(comparison):  # noqa: F811
    _, summary = comparison("laco", "0.35")
    row = summary["rows"][1]
    C, merges, removed = row["laco"]["merge_layers"], row["laco"]["merges"], row["removed"]
    layers = [int(name[3:]) for name in removed[::2]]
    left, gone = [[i] for i in range(8)], []
    for place, _ in merges:  # each layer of what is there, with those that went into it
        merged = left[place : place + C]
        gone += [group[0] for group in merged[1:]]
        left[place : place + C] = [sum(merged, [])]
    assert len(merges) > 1 and layers == gone
    assert len(set(layers)) == len(layers) == 8 - len(left)


def test_a_name_with_dollars_is_no_formula(comparison, texts, tmp_path):  # noqa: F811
    other = tmp_path / "a_b$50%&#{x}$~^.txt"
    other.write_text(texts[1].read_text())
    run, _ = comparison("last bi", "0.1 0.2", eval_datasets=str(other), pictures=True)
    assert "a_b$50%&amp;#{x}$~^" in open(run.result["page"]).read() and r"a\_b$50%&#{x}$~^ PPL" in run.out
