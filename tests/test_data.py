"""Documents, draws and windows, against the standard library and the datasets package."""

import builtins
import json
import random
from pydoc_data.topics import topics

import pytest
import torch

from lib.data import check_dataset, cut_windows, load_documents, sample_documents

TEXTS = ["first document", "second\nof two lines", "third: naïve 北京", "", "fifth"]


class Letters:
    """A tokenizer of one token a character, with a first token of its own as Llama's has."""

    def __call__(self, text):
        return {"input_ids": [1] + [ord(c) for c in text]}


def write(folder, name, texts=TEXTS, column="text"):
    path = folder / name
    if name.endswith(".txt"):
        path.write_text("\n\n".join(t for t in texts if t), encoding="utf-8")
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps({"id": 1, column: t}) + "\n" for t in texts), encoding="utf-8")
    elif name.endswith(".json"):
        path.write_text(json.dumps([{column: t} for t in texts]), encoding="utf-8")
    else:
        import datasets

        datasets.Dataset.from_dict({column: texts}).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_files_of_records_give_their_text_column(tmp_path, suffix):
    assert load_documents(write(tmp_path, "a" + suffix)).documents == TEXTS
    other = write(tmp_path, "b" + suffix, column="body")
    assert load_documents(other, text_column="body").documents == TEXTS
    with pytest.raises(ValueError, match="no column text; the columns are .*body"):
        load_documents(other)


def test_a_text_file_is_its_parts_between_blank_lines(tmp_path):
    path = write(tmp_path, "a.txt")
    documents = load_documents(path).documents
    assert documents == [t for t in TEXTS if t]
    assert "\n\n".join(documents) == open(path, encoding="utf-8").read(), "joining gives the file back"


def test_a_local_text_file_needs_torch_only(tmp_path, monkeypatch):
    plain = builtins.__import__

    def refuse(name, *args, **kwargs):
        assert name.split(".")[0] not in ("datasets", "pyarrow", "pandas"), name
        return plain(name, *args, **kwargs)

    paths = [write(tmp_path, "a" + suffix) for suffix in (".txt", ".jsonl", ".json")]
    monkeypatch.setattr(builtins, "__import__", refuse)
    for path in paths:
        assert load_documents(path).documents


def test_the_draw_is_the_references():
    import transformers

    documents = [str(i) for i in range(999)]
    transformers.set_seed(42)
    expected = random.sample(range(999), 4)
    assert sample_documents(documents, 4, 42) == [str(i) for i in expected]
    with pytest.raises(ValueError, match="the split has 999 documents; 1000 were asked for"):
        sample_documents(documents, 1000, 42)


def test_windows_are_cut_from_one_text_and_the_tail_is_dropped():
    windows = cut_windows(["ab", "cd"], Letters(), 3)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [[1, ord("a"), ord("b")], [ord("\n"), ord("\n"), ord("c")]]
    with pytest.raises(ValueError, match="the text has only 7 tokens, less than one window of 8"):
        cut_windows(["ab", "cd"], Letters(), 8)


def test_pydoc_has_two_disjoint_parts_of_real_text():
    calibration, held_out = load_documents("pydoc"), load_documents("pydoc", held_out=True)
    assert (calibration.split, held_out.split) == ("train", "test")
    assert sum(map(len, calibration.documents)) > 100_000
    names = sorted(topics)
    for corpus, its_names in ((calibration, names[::2]), (held_out, names[1::2])):
        assert "\n\n".join(corpus.documents) == "\n\n".join(topics[name] for name in its_names)
        assert 1000 < sum(map(len, corpus.documents)) / len(corpus.documents) < 2000
    with pytest.raises(ValueError, match="pydoc has no split validation; it has train, test"):
        load_documents("pydoc", "validation")


def test_named_sets_come_from_the_data_folder(tmp_path):
    write(tmp_path, "wikitext2.jsonl")
    write(tmp_path, "wikitext2-train.jsonl", ["training text"])
    write(tmp_path, "ptb.parquet", column="sentence")
    whole = load_documents("wikitext2", data_dir=tmp_path)
    assert (whole.documents, whole.split) == (TEXTS, None), "a file without a split in its name is taken whole"
    train = load_documents("wikitext2", "train", data_dir=tmp_path)
    assert (train.documents, train.split) == (["training text"], "train")
    assert load_documents("ptb", data_dir=tmp_path).documents == TEXTS, "the set's own column name is known"
    with pytest.raises(ValueError, match="wikitext2-validation.jsonl"):
        load_documents("wikitext2", "validation", data_dir=tmp_path)
    with pytest.raises(ValueError, match="holds neither alpaca-test nor alpaca"):
        check_dataset("alpaca", data_dir=tmp_path)


def test_alpacas_test_split_is_the_first_half_of_the_fifth_set_aside(monkeypatch):
    """Counted on the datasets package itself: 20 % of train with seed 42, halved with seed 42."""
    import datasets

    rows = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(100)]})
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    got = {split: load_documents("alpaca", split).documents for split in ("train", "test", "validation")}
    assert asked[0] == (("tatsu-lab/alpaca",), {"split": "train"})
    assert [len(got[s]) for s in ("train", "test", "validation")] == [80, 10, 10]
    assert sorted(sum(got.values(), [])) == sorted(rows["text"])
    fifth = rows.train_test_split(test_size=0.2, seed=42)["test"]
    assert got["test"] == list(fifth.train_test_split(test_size=0.5, seed=42)["train"]["text"])


@pytest.mark.parametrize("name", ["alpaca", "wikitext2", "ptb", "c4"])
def test_without_network_the_error_names_the_local_way(name, monkeypatch):
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=f"{name}: .*ConnectionError.*folder of data") as caught:
        load_documents(name)
    assert "\n" not in str(caught.value)


def test_real_files_are_read(data_dir):
    alpaca = load_documents("alpaca", data_dir=data_dir).documents
    assert len(alpaca) == 999 and alpaca[0].startswith("Below is an instruction")
    assert len(load_documents("wikitext2", data_dir=data_dir).documents) == 4303
