"""Text -> documents -> token windows, for calibration and evaluation.

Documents are drawn without replacement, joined with a blank line, tokenized once and cut into
windows of equal length, the tail dropped (as the paper's scripts do). A few dozen Alpaca documents
are only a handful of windows, which is why every script prints how many it really uses.

    corpus = load_documents("alpaca", data_dir="data")
    windows = cut_windows(sample_documents(corpus.documents, 128, seed=42), tokenizer, 2048)
"""

import json
import random
from pathlib import Path
from typing import NamedTuple

import torch

from lib.hub import hub_error

PYDOC_LENGTH = 1000  # characters: a document is about as long as an Alpaca record
SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")


class Source(NamedTuple):
    """Where a named data set lives on the hub, and which split serves what when none is asked for."""

    hub: tuple  # arguments of datasets.load_dataset
    column: str
    cal_split: str
    eval_split: str
    splits: tuple
    kwargs: dict = {}


# Script-free sources only. The reference calibrates on test splits; so does the default here.
DATASETS = {
    "alpaca": Source(("tatsu-lab/alpaca",), "text", "test", "test", ("train", "validation", "test")),
    "wikitext2": Source(
        ("Salesforce/wikitext", "wikitext-2-raw-v1"), "text", "test", "test", ("train", "validation", "test")
    ),
    "ptb": Source(
        ("ptb-text-only/ptb_text_only", "penn_treebank"),
        "sentence",
        "test",
        "test",
        ("train", "validation", "test"),
        {"revision": "refs/convert/parquet"},
    ),
    "c4": Source(
        ("allenai/c4",),
        "text",
        "validation",
        "validation",
        ("validation",),
        {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
    ),
    "pydoc": Source((), "text", "train", "test", ("train", "test")),
}


class Corpus(NamedTuple):
    """documents: list of str; split: its name or None; source: hub id or file they came from."""

    documents: list
    split: str | None
    source: str


def load_documents(dataset, split=None, text_column=None, data_dir=None, held_out=False):
    """Return the Corpus of a named data set or of a .txt/.jsonl/.json/.parquet file.

    dataset: a key of DATASETS, looked up in data_dir first (NAME-SPLIT or NAME with one of SUFFIXES;
    a file without a split in its name is taken whole), else on the hub; or a path. pydoc needs
    neither: it is the documentation that ships inside CPython, even topics for calibration ("train"),
    odd ones held out ("test"). split: None takes the set's calibration split, or with held_out its
    evaluation split. text_column: None means "text", or the named set's own column.
    Raises ValueError, one line, naming what was given and what is allowed.
    """
    known = DATASETS.get(dataset)
    if known is None:
        return _load_path(dataset, split, text_column)
    wanted = split or (known.eval_split if held_out else known.cal_split)
    if wanted not in known.splits:
        raise ValueError(f"--cal-split {wanted}: {dataset} has {', '.join(known.splits)}")
    if dataset == "pydoc":
        _check_no_column(dataset, text_column or "text")
        return _load_pydoc(wanted)
    if data_dir is not None:
        path, of_split = _find_local(dataset, wanted, data_dir, explicit=split is not None)
        columns = (text_column,) if text_column else ("text", known.column)
        return Corpus(_read_file(path, *columns), wanted if of_split else None, str(path))
    return _load_hub(dataset, known, wanted, text_column)


def check_dataset(dataset, split=None, data_dir=None, held_out=False):
    """Raise ValueError where load_documents would, as far as can be told without reading or network."""
    known = DATASETS.get(dataset)
    if known is None:
        _check_path(dataset, split)
    elif split is not None and split not in known.splits:
        raise ValueError(f"--cal-split {split}: {dataset} has {', '.join(known.splits)}")
    elif data_dir is not None and dataset != "pydoc":
        _find_local(dataset, split or (known.eval_split if held_out else known.cal_split), data_dir, split is not None)


def sample_documents(documents, n, seed):
    """Return n documents drawn without replacement; seed 42 draws the reference's.

    The reference calls random.sample after transformers.set_seed(42), which seeds Python's generator.
    """
    if n > len(documents):
        raise ValueError(f"--cal-nsamples {n}: the split has {len(documents)} documents; use 1..{len(documents)}")
    return [documents[i] for i in random.Random(seed).sample(range(len(documents)), n)]


def cut_windows(documents, tokenizer, seqlen):
    """Return token windows (N, seqlen), int64: documents joined by a blank line, tokenized once, tail dropped."""
    ids = tokenizer("\n\n".join(documents))["input_ids"]
    n = len(ids) // seqlen
    if n == 0:
        raise ValueError(
            f"--ppl-eval-seqlen {seqlen}: the text has only {len(ids)} tokens, less than one window; "
            "use shorter windows or more documents"
        )
    return torch.tensor(ids[: n * seqlen], dtype=torch.long).view(n, seqlen)


def _load_pydoc(split):
    """Return the topics of one part, cut at blank lines into documents of about PYDOC_LENGTH characters."""
    from pydoc_data.topics import topics

    documents = []
    for name in sorted(topics)[0 if split == "train" else 1 :: 2]:
        parts = [""]
        for paragraph in topics[name].split("\n\n"):
            if len(parts[-1]) >= PYDOC_LENGTH:
                parts.append(paragraph)
            else:
                parts[-1] += "\n\n" + paragraph if parts[-1] else paragraph
        documents += parts
    return Corpus(documents, split, "pydoc_data.topics of this Python")


def _load_path(dataset, split, text_column):
    _check_path(dataset, split)
    path = Path(dataset).expanduser()
    return Corpus(_read_file(path, text_column or "text"), None, str(path))


def _check_path(dataset, split):
    path = Path(dataset).expanduser()
    if not path.is_file():
        raise ValueError(
            f"--cal-dataset {dataset}: neither a data set ({', '.join(DATASETS)}) nor a file; "
            f"files may end in {', '.join(SUFFIXES)}"
        )
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--cal-dataset {dataset}: a file must end in {', '.join(SUFFIXES)}")
    if split is not None:
        raise ValueError(f"--cal-split {split}: {dataset} is one file without splits; drop --cal-split")


def _find_local(dataset, split, data_dir, explicit):
    """Return (path, whether it holds only `split`) of a named data set below data_dir."""
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise ValueError(f"--data-dir {data_dir}: no such folder")
    for stem, of_split in ((f"{dataset}-{split}", True), (dataset, False)):
        for suffix in SUFFIXES:
            path = folder / (stem + suffix)
            if path.is_file():
                if explicit and not of_split:
                    raise ValueError(
                        f"--cal-split {split}: {path.name} has no split in its name; "
                        f"name it {dataset}-{split}{suffix}, or drop --cal-split to take it whole"
                    )
                return path, of_split
    raise ValueError(f"--data-dir {data_dir}: holds neither {dataset}-{split} nor {dataset} with {', '.join(SUFFIXES)}")


def _read_file(path, column, other_column=None):
    """Return the documents of a file: a column of its records, or the blank-line-separated parts of a .txt."""
    if path.suffix == ".parquet":
        return _parquet_column(path, column, other_column)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            records = [part for part in text.split("\n\n") if part.strip()]
        else:
            records = _json_lines(text) if path.suffix == ".jsonl" else json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); convert it to UTF-8") from None
    except (json.JSONDecodeError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from None
    if isinstance(records, list) and all(isinstance(r, str) for r in records):
        _check_no_column(path, column)
        return _texts(path, records)
    if not (isinstance(records, list) and all(isinstance(r, dict) for r in records)):
        raise ValueError(f"{path}: must hold records with a text column, or strings")
    name = _pick_column(path, list(records[0]), column, other_column)
    return _texts(path, [r.get(name) for r in records], name)


def _json_lines(text):
    """Return the values of JSON lines; an error names the line of the file."""
    records, start = [], 0
    for line in text.split("\n"):
        try:
            records += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise json.JSONDecodeError(error.msg, text, start + error.pos) from None
        start += len(line) + 1
    return records


def _parquet_column(path, column, other_column):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow; pip install pyarrow, or give .jsonl") from None
    import pyarrow

    try:
        name = _pick_column(path, pyarrow.parquet.read_schema(path).names, column, other_column)
        values = pyarrow.parquet.read_table(path, columns=[name])[name].to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from None
    return _texts(path, values, name)


def _texts(path, values, name="text"):
    """Return `values`, all strings; raise ValueError where one is none, or there are none at all."""
    wrong = next((i for i, value in enumerate(values) if not isinstance(value, str)), None)
    if wrong is not None:
        raise ValueError(f"{path}: record {wrong + 1} has no text in column {name}")
    if not values:
        raise ValueError(f"{path}: holds no text")
    return values


def _pick_column(path, names, column, other_column=None):
    for name in (column, other_column):
        if name in names:
            return name
    raise ValueError(f"--text-column {column}: {path} has the columns {', '.join(names)}")


def _check_no_column(source, column):
    if column != "text":
        raise ValueError(f"--text-column {column}: {source} holds texts without columns; drop --text-column")


def _load_hub(dataset, known, split, text_column):
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"--cal-dataset {dataset}: needs the datasets package, or --data-dir with a local copy"
        ) from None
    derived = dataset == "alpaca"  # published as one split; the paper's is a tenth of it
    hub_error()  # without a hub only what is cached: asking for more would take half a minute
    try:
        rows = datasets.load_dataset(*known.hub, split="train" if derived else split, **known.kwargs)
    except Exception as error:  # offline, gated, gone: every layer below raises classes of its own
        raise ValueError(
            f"--cal-dataset {dataset}: {known.hub[0]} cannot be read from the hub ({type(error).__name__}); "
            f"give a local file, or --data-dir with {dataset}-{split}.jsonl or .parquet in it"
        ) from None
    if derived:
        rows = _alpaca_split(rows, split)
    name = _pick_column(known.hub[0], rows.column_names, text_column or known.column)
    return Corpus(list(rows[name]), split, known.hub[0])


def _alpaca_split(rows, split):
    """Return the paper's split of Alpaca: 20 % set aside with seed 42, its first half test, its second validation."""
    parts = rows.train_test_split(test_size=0.2, seed=42)
    if split == "train":
        return parts["train"]
    return parts["test"].train_test_split(test_size=0.5, seed=42)["train" if split == "test" else "test"]
