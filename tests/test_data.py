"""Documents, draws and windows, against the standard library and the datasets package."""

import builtins
import json
import random
from pydoc_data.topics import topics

import pytest
import torch

from lib.data import check_dataset, cut_windows, draw, load_documents, read_text, resolve_bos, sample_documents

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


# ---- files as people have them -------------------------------------------------------------------


def save(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("name", ["a.JSONL", "a.jsonl.gz", "a.csv", "a.CSV.GZ", "a.json.gz", "a.txt.gz", "b.Txt"])
def test_capitals_csv_and_gz_are_read(tmp_path, name):
    import csv
    import gzip
    import io

    lower = name.lower()
    texts = ['first, "quoted"\nof two lines', "naïve 北京"]
    if ".csv" in lower:
        out = io.StringIO()
        csv.writer(out).writerows([["id", "text"], *enumerate(texts)])
        content = out.getvalue()
    elif ".txt" in lower:
        content = "\n\n".join(texts)
    else:
        records = [{"text": t} for t in texts]
        content = (
            json.dumps(records) if ".json" in lower and "jsonl" not in lower else "\n".join(map(json.dumps, records))
        )
    content = content.encode()
    path = save(tmp_path / name, gzip.compress(content) if lower.endswith("gz") else content)
    check_dataset(path)
    assert load_documents(path).documents == texts


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv"])
def test_a_mark_that_windows_puts_in_front_of_utf8_is_no_text(tmp_path, name):
    content = {"jsonl": '{"text": "é"}', "json": '[{"text": "é"}]', "txt": "é", "csv": "text\né\n"}[name[2:]]
    assert load_documents(save(tmp_path / name, b"\xef\xbb\xbf" + content.encode())).documents == ["é"]


def test_half_a_surrogate_pair_is_mended_and_counted(tmp_path):
    path = save(tmp_path / "a.jsonl", '{"text": "a \\ud83d b"}\n{"text": "\\ud83d\\ude00"}\n')
    corpus = load_documents(path)
    assert corpus.documents == ["a \ufffd b", "\U0001f600"] and corpus.mended == 1
    "".join(corpus.documents).encode()  # what every tokenizer does


def test_records_without_a_text_are_skipped_and_counted(tmp_path):
    path = save(tmp_path / "a.jsonl", '{"id": 1}\n{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
    corpus = load_documents(path)
    assert (corpus.documents, corpus.skipped) == (["a", "b"], 2)
    with pytest.raises(ValueError, match="record 2 has no text in column text but int"):
        load_documents(save(tmp_path / "b.jsonl", '{"text": null}\n{"text": 3}\n'))


def test_a_text_without_blank_lines_is_a_document_a_line(tmp_path):
    content = "one\ntwo\n \n = Title = \n \nthree\n"
    corpus = load_documents(save(tmp_path / "a.txt", content))
    assert corpus.documents == ["one\n", "two\n \n", " = Title = \n \n", "three\n"]
    assert corpus.joint.join(corpus.documents) == content, "taken whole it is the file"


# ---- records as people have them -----------------------------------------------------------------


def test_alpaca_records_without_text_give_the_prompt_of_those_with(tmp_path, data_dir):
    """On the published prompts themselves, taken apart at their headings."""
    import re

    published = load_documents("alpaca", data_dir=data_dir).documents
    form = re.compile(r".*?### Instruction:\n(.*?)\n\n(?:### Input:\n(.*?)\n\n)?### Response:\n(.*)", re.DOTALL)
    parts = [form.fullmatch(text).groups(default="") for text in published]
    records = [dict(zip(("instruction", "input", "output"), part, strict=True)) for part in parts]
    for name, content in (("a.json", json.dumps(records)), ("a.jsonl", "\n".join(map(json.dumps, records)))):
        assert load_documents(save(tmp_path / name, content)).documents == published


class ChatTokenizer:
    bos_token = "<s>"
    chat_template = "of its own"

    def apply_chat_template(self, messages, tokenize):
        assert tokenize is False
        if messages[0]["role"] not in ("user", "system"):
            raise RuntimeError("roles must alternate")
        return "<s>" + "".join(f"[{m['role']}]{m['content']}" for m in messages)


def test_chats_go_through_the_chat_template(tmp_path):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    shared = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    alpaca = {"instruction": "hello", "input": "", "output": "hi"}
    for record in ({"messages": messages}, {"conversations": shared}, alpaca):
        path = save(tmp_path / "a.jsonl", json.dumps(record))
        assert load_documents(path, chat=ChatTokenizer()).documents == ["[user]hello[assistant]hi"]
    path = save(tmp_path / "b.jsonl", json.dumps({"messages": messages}))
    with pytest.raises(ValueError, match="no column text; the columns are messages; ask for the chat template"):
        load_documents(path)
    with pytest.raises(ValueError, match="the chat template refuses .*roles must alternate"):
        load_documents(save(tmp_path / "c.jsonl", json.dumps({"messages": messages[1:]})), chat=ChatTokenizer())
    with pytest.raises(ValueError, match="a chat template needs a column messages"):
        load_documents(save(tmp_path / "d.jsonl", '{"text": "a"}'), chat=ChatTokenizer())
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        load_documents(path, chat=Letters())


def test_any_set_of_the_hub_by_name_split_and_column(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((*args, kwargs["split"]))
        return datasets.Dataset.from_dict({"body": ["a", None, "b"], "text": ["c", "d", "e"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = load_documents("owner/name:validation:body")
    assert (corpus.documents, corpus.split, corpus.source, corpus.skipped) == (
        ["a", "b"],
        "validation",
        "owner/name",
        1,
    )
    assert load_documents("owner/name").documents == ["c", "d", "e"]
    assert load_documents("owner/name/v1-raw:test[:10%]:text", text_column="body").documents == ["a", "b"]
    assert asked == [("owner/name", "validation"), ("owner/name", "train"), ("owner/name", "v1-raw", "test[:10%]")]
    check_dataset("owner/name:test:body")
    with pytest.raises(ValueError, match="neither a data set"):
        check_dataset("folder/absent.jsonl")


def test_a_mix_draws_shares_by_weight_each_as_alone(tmp_path):
    one = write(tmp_path, "one.jsonl", [f"one {i}" for i in range(50)])
    two = write(tmp_path, "two.jsonl", [f"two {i}" for i in range(50)])
    corpus = load_documents(f"{one}*2+{two}")
    assert len(corpus.documents) == 100
    drawn = draw(corpus, 10, 42)
    for name, share, path in (("one", 7, one), ("two", 3, two)):
        alone = sample_documents(load_documents(path).documents, share, 42)
        assert sorted(d for d in drawn if d.startswith(name)) == sorted(alone)
    assert [d[:3] for d in drawn] != ["one"] * 7 + ["two"] * 3, "mixed, so that a batch holds both"
    assert draw(load_documents(one), 10, 42) == sample_documents(load_documents(one).documents, 10, 42)
    check_dataset(f"{one}+pydoc")
    with pytest.raises(ValueError, match="two.jsonl: the split has 50 documents; 60 were asked for"):
        draw(load_documents(f"{one}+{two}*60"), 61, 42)
    for wrong in (f"{one}*0+{two}", f"{one}*x+{two}", f"{one}+"):
        with pytest.raises(ValueError, match="no data set with a weight above 0"):
            check_dataset(wrong)


# ---- windows -------------------------------------------------------------------------------------


class WithBos(Letters):
    bos_token_id = 1

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}


def test_bos_stands_in_front_of_every_window():
    windows = cut_windows(["abcd", "e"], WithBos(), 3, bos="every-window")
    assert windows.tolist() == [[1, *map(ord, w)] for w in ("ab", "cd", "\n\n")]
    assert windows.dtype == torch.int64
    assert cut_windows(["abcd", "e"], WithBos(), 3, bos="text").tolist()[0] == [1, ord("a"), ord("b")]


def test_bos_is_the_familys_and_the_tokenizers():
    assert resolve_bos("auto", WithBos(), needed=True) == "every-window"
    assert resolve_bos("auto", WithBos(), needed=False) == resolve_bos("auto", Letters(), needed=True) == "text"
    assert resolve_bos("text", WithBos(), needed=True) == "text"
    with pytest.raises(ValueError, match="the tokenizer has no BOS token"):
        resolve_bos("every-window", Letters())


def test_no_more_windows_than_wanted():
    assert cut_windows(["abcdefgh"], WithBos(), 3, most=2).tolist() == [[1, *b"ab"], [*b"cde"]]
    assert len(cut_windows(["abcdefgh"], WithBos(), 3, most=9)) == 3


def test_a_text_says_what_it_was_made_of(tmp_path):
    path = save(tmp_path / "a.jsonl", '{"text": "abcd"}\n{"text": null}\n{"text": "e\\ud800"}\n')
    text = read_text(path, WithBos(), 3, bos="auto", needs_bos=True)
    assert (
        text.name == "a"
        and text.windows.tolist() == cut_windows(["abcd", "e\ufffd"], WithBos(), 3, bos="every-window").tolist()
    )
    assert text.about["bos"] == "every-window"
    assert (text.about["records_without_text"], text.about["texts_mended"]) == (1, 1)
    plain = read_text(path, WithBos(), 3)
    assert (
        plain.about["bos"] == "text"
        and plain.windows.tolist() == cut_windows(["abcd", "e\ufffd"], WithBos(), 3).tolist()
    )
    assert read_text(path, WithBos(), 3, limit=1).windows.tolist() == plain.windows[:1].tolist()
    chat = save(tmp_path / "c.jsonl", json.dumps({"messages": [{"role": "user", "content": "hello"}]}))

    class Chatty(WithBos, ChatTokenizer):
        pass

    text = read_text(chat, Chatty(), 3, chat_template=True)
    assert text.about["chat_template"] and bytes(text.windows.flatten().tolist()[1:]) == b"[user]hello"
