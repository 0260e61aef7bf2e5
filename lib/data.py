"""Text -> documents -> token windows, for calibration and evaluation.

Documents are drawn without replacement, joined with a blank line, tokenized once and cut into
windows of equal length, the tail dropped (as the paper's scripts do). A few dozen Alpaca documents
are only a handful of windows, which is why every script prints how many it really uses.

    corpus = load_documents("alpaca", data_dir="data")
    windows = cut_windows(sample_documents(corpus.documents, 128, seed=42), tokenizer, 2048)
"""

import hashlib
import math
import random
import re
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import torch

from lib.hub import hub_error
from lib.pieces import tokenize
from lib.records import ENDINGS, no_columns, read_file, reader, short_name, suffix_of, texts_of

PYDOC_LENGTH = 1000  # characters: a document is about as long as an Alpaca record
HUB_ID = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[^:\[]+(\[[^\]]*\])?)(:(?P<column>[^:]+))?)?",
    re.ASCII,
)


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
    """documents: list of str; split: its name or None; source: hub id or file they came from. joint: what stands
    between documents that are joined. skipped, mended: see lib.records. parts: of a mix, (weight, Corpus) each."""

    documents: list
    split: str | None
    source: str
    joint: str = "\n\n"
    skipped: int = 0
    mended: int = 0
    parts: tuple = ()


def load_documents(dataset, split=None, text_column=None, data_dir=None, held_out=False, chat=None):
    """Return the Corpus of a data set or of a file that ends in one of lib.records.ENDINGS.

    dataset: a key of DATASETS, looked up in data_dir first (NAME-SPLIT or NAME with one of ENDINGS; a file without a
    split in its name is taken whole), else on the hub; owner/name:split:column of the hub (split train, column text;
    a configuration after a second slash); a path; or several of these, "alpaca*2+c4", with weights for the draw.
    pydoc is the documentation that ships inside CPython, even topics for calibration ("train"), odd ones held out
    ("test"). split: None takes the set's calibration split, or with held_out its evaluation split. text_column: None
    means "text", or the named set's own column. chat: a tokenizer, whose chat template makes the texts.
    Raises ValueError, one line, naming what was given and what is allowed.
    """
    if mix := _mixed(dataset):
        parts = [(weight, load_documents(name, split, text_column, data_dir, held_out, chat)) for name, weight in mix]
        documents = [document for _, corpus in parts for document in corpus.documents]
        source = "+".join(corpus.source for _, corpus in parts)
        skipped, mended = (sum(getattr(c, count) for _, c in parts) for count in ("skipped", "mended"))
        return Corpus(documents, split, source, "\n\n", skipped, mended, tuple(parts))
    known = DATASETS.get(dataset)
    if known is None and (found := _hub_source(dataset)):
        source, column = found
        columns = (text_column or column or "text",)
        return _load_hub(dataset, source, split or source.cal_split, columns, chat)
    if known is None:
        return _load_path(dataset, split, text_column, chat)
    wanted = split or (known.eval_split if held_out else known.cal_split)
    if wanted not in known.splits:
        raise ValueError(f"{dataset} has no split {wanted}; it has {', '.join(known.splits)}")
    if dataset == "pydoc":
        no_columns(dataset, (text_column or "text",), chat)
        return _load_pydoc(wanted)
    if data_dir is not None:
        path, of_split = _find_local(dataset, wanted, data_dir, explicit=split is not None)
        columns = (text_column,) if text_column else ("text", known.column)
        return _corpus(read_file(path, columns, chat), wanted if of_split else None, str(path))
    return _load_hub(dataset, known, wanted, (text_column or known.column,), chat)


def check_dataset(dataset, split=None, data_dir=None, held_out=False):
    """Raise ValueError where load_documents would, as far as can be told without reading or network."""
    if mix := _mixed(dataset):
        for name, _ in mix:
            check_dataset(name, split, data_dir, held_out)
        return
    known = DATASETS.get(dataset)
    if known is None:
        if not _hub_source(dataset):
            _check_path(dataset, split)
    elif split is not None and split not in known.splits:
        raise ValueError(f"{dataset} has no split {split}; it has {', '.join(known.splits)}")
    elif data_dir is not None and dataset != "pydoc":
        _find_local(dataset, split or (known.eval_split if held_out else known.cal_split), data_dir, split is not None)


def draw(corpus, n, seed):
    """Return n documents of a Corpus: of a mix its parts' shares by weight, each drawn as alone, then shuffled."""
    if not corpus.parts:
        return sample_documents(corpus.documents, n, seed)
    total = sum(weight for weight, _ in corpus.parts)
    ends, sofar = [0], 0.0
    for weight, _ in corpus.parts:
        sofar += weight
        ends.append(round(n * sofar / total))
    documents = []
    for (_, part), start, end in zip(corpus.parts, ends, ends[1:], strict=False):
        try:
            documents += sample_documents(part.documents, end - start, seed)
        except ValueError as error:
            raise ValueError(f"{part.source}: {error}") from None
    random.Random(seed).shuffle(documents)
    return documents


def sample_documents(documents, n, seed):
    """Return n documents drawn without replacement; seed 42 draws the reference's.

    The reference calls random.sample after transformers.set_seed(42), which seeds Python's generator.
    """
    if n > len(documents):
        raise ValueError(f"the split has {len(documents)} documents; {n} were asked for; use 1..{len(documents)}")
    return [documents[i] for i in random.Random(seed).sample(range(len(documents)), n)]


def resolve_bos(bos, tokenizer, needed=False):
    """Return "every-window" or "text" for a choice of BOS; "auto" takes the first where the model's family needs it
    (lib.families.needs_bos) and the tokenizer has such a token."""
    there = getattr(tokenizer, "bos_token_id", None) is not None
    if bos == "every-window" and not there:
        raise ValueError("the tokenizer has no BOS token to put in front of every window; leave BOS to the text")
    return bos if bos != "auto" else "every-window" if needed and there else "text"


def cut_windows(documents, tokenizer, seqlen, *, bos="text", joint="\n\n", most=None, progress=None):
    """Return token windows (N, seqlen), int64: documents joined, tokenized as one text, tail dropped.

    bos: "text" leaves special tokens to the tokenizer, which puts its BOS, if any, in front of the whole text;
    "every-window" puts it in front of every window, where it is the first of the seqlen tokens and never a target.
    most: windows wanted, None for all. progress: called with the number of characters tokenized, after each piece.
    """
    text, start = joint.join(documents), []
    if bos == "every-window":
        start = [tokenizer.bos_token_id]
    room = seqlen - len(start)
    wanted = math.inf if most is None else most * room
    ids = []
    for piece in tokenize(text, tokenizer, special=not start, progress=progress):
        ids += piece
        if len(ids) >= wanted:
            break
    n = min(len(ids), wanted) // room
    if n == 0:
        raise ValueError(
            f"the text has only {len(ids)} tokens, less than one window of {seqlen}; "
            "use shorter windows or more documents"
        )
    windows = torch.tensor(ids[: n * room], dtype=torch.long).view(n, room)
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(n, len(start)), windows], dim=1)


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


def _load_path(dataset, split, text_column, chat=None):
    _check_path(dataset, split)
    path = Path(dataset).expanduser()
    return _corpus(read_file(path, (text_column or "text",), chat), None, str(path))


def _corpus(documents, split, source):
    return Corpus(documents.texts, split, source, documents.joint, documents.skipped, documents.mended)


def _check_path(dataset, split):
    path = Path(dataset).expanduser()
    if not path.is_file():
        raise ValueError(
            f"{dataset}: neither a data set ({', '.join(DATASETS)}) nor a file, nor owner/name:split:column of the "
            f"hub; files may end in {', '.join(ENDINGS)}"
        )
    if suffix_of(path) is None:
        raise ValueError(f"{dataset}: a file must end in {', '.join(ENDINGS)}")
    if split is not None:
        raise ValueError(f"{dataset}: one file without splits, so it has none called {split}; name no split")


def _find_local(dataset, split, data_dir, explicit):
    """Return (path, whether it holds only `split`) of a named data set below data_dir."""
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{data_dir}: no such folder of data")
    for stem, of_split in ((f"{dataset}-{split}", True), (dataset, False)):
        for ending in ENDINGS:
            path = folder / (stem + ending)
            if path.is_file():
                if explicit and not of_split:
                    raise ValueError(
                        f"{path}: has no split in its name, {split} is asked for; call it "
                        f"{dataset}-{split}{ending}, or name no split to take it whole"
                    )
                return path, of_split
    raise ValueError(f"{data_dir}: holds neither {dataset}-{split} nor {dataset} with {', '.join(ENDINGS)}")


def _load_hub(dataset, known, split, columns, chat=None):
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{dataset}: needs the datasets package, or a folder with a local copy") from None
    derived = dataset == "alpaca"  # published as one split; the paper's is a tenth of it
    hub_error()  # without a hub only what is cached: asking for more would take half a minute
    try:
        rows = datasets.load_dataset(*known.hub, split="train" if derived else split, **known.kwargs)
    except Exception as error:  # offline, gated, gone: every layer below raises classes of its own
        local = f"or a folder of data with {dataset}-{split}.jsonl or .parquet in it" if dataset in DATASETS else ""
        raise ValueError(
            f"{dataset}: {known.hub[0]} cannot be read from the hub ({type(error).__name__}: "
            f"{shorten(str(error), 120, placeholder=' ...')}); give a local file, {local}".rstrip(", ")
        ) from None
    if derived:
        rows = _alpaca_split(rows, split)
    read, name, needed = reader(known.hub[0], rows.column_names, columns, chat)
    if needed == [name] and chat is None:
        return _corpus(texts_of(known.hub[0], rows[name], name), split, known.hub[0])
    return _corpus(texts_of(known.hub[0], map(read, rows.select_columns(needed)), name), split, known.hub[0])


def _hub_source(dataset):
    """Return (Source, column or None) of owner/name:split:column, a configuration after a second slash; else None."""
    found = HUB_ID.fullmatch(str(dataset))
    if not found or suffix_of(found["name"]) or Path(dataset).expanduser().exists():
        return None
    hub = (found["name"], found["config"]) if found["config"] else (found["name"],)
    split = found["split"] or "train"
    return Source(hub, found["column"] or "text", split, split, ()), found["column"]


def _mixed(dataset):
    """Return [(data set, weight)] of "alpaca*2+c4", None for a single data set."""
    if "+" not in str(dataset) or Path(dataset).expanduser().exists():
        return None
    parts = []
    for part in str(dataset).split("+"):
        name, _, weight = part.partition("*")
        try:
            parts.append((name.strip(), float(weight or 1)))
        except ValueError:
            parts.append((name, 0.0))
        if not 0 < parts[-1][1] < math.inf or not parts[-1][0]:
            raise ValueError(f"{dataset}: {part!r} is no data set with a weight above 0; write alpaca*2+wikitext2")
    return parts


def _alpaca_split(rows, split):
    """Return the paper's split of Alpaca: 20 % set aside with seed 42, its first half test, its second validation."""
    parts = rows.train_test_split(test_size=0.2, seed=42)
    if split == "train":
        return parts["train"]
    return parts["test"].train_test_split(test_size=0.5, seed=42)["train" if split == "test" else "test"]


class Text(NamedTuple):
    """Windows (N, T) of a text under a short name, and what result files say about them."""

    name: str
    windows: torch.Tensor
    about: dict


def read_text(
    dataset,
    tokenizer,
    seqlen,
    *,
    documents=None,
    split=None,
    text_column=None,
    data_dir=None,
    seed=42,
    held_out=False,
    chat_template=False,
    bos="text",
    needs_bos=False,
    limit=None,
    progress=None,
):
    """Return the Text of a data set or file: so many of its documents, all when None, cut into windows of seqlen.

    chat_template: whether the tokenizer's makes the texts. bos, needs_bos: as in resolve_bos. Arguments and errors are
    else those of load_documents, draw and as_text.
    """
    chat = tokenizer if chat_template else None
    corpus = load_documents(dataset, split, text_column, data_dir, held_out=held_out, chat=chat)
    drawn = corpus.documents if documents is None else draw(corpus, documents, seed)
    bos = resolve_bos(bos, tokenizer, needs_bos)
    text = as_text(
        dataset,
        corpus,
        drawn,
        tokenizer,
        seqlen,
        limit=limit,
        text_column=text_column,
        seed=seed,
        bos=bos,
        progress=progress,
    )
    return text._replace(about=text.about | ({"chat_template": True} if chat_template else {}))


def as_text(
    dataset, corpus, documents, tokenizer, seqlen, *, limit=None, text_column=None, seed=None, bos="text", progress=None
):
    """Return the Text of some documents of a Corpus, its first `limit` windows only where one is given.

    bos, progress: as in cut_windows.
    """
    windows = cut_windows(documents, tokenizer, seqlen, bos=bos, joint=corpus.joint, most=limit, progress=progress)
    about = {
        "dataset": dataset,
        "source": corpus.source,
        "split": corpus.split,
        "text_column": text_column,
        "seed": seed,
        "documents": len(documents),
        "windows": len(windows),
        "seqlen": seqlen,
        "bos": bos,
        "tokens": windows.numel(),
        "text_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
    }
    odd = {"records_without_text": corpus.skipped, "texts_mended": corpus.mended}
    return Text(short_name(dataset), windows, about | {name: count for name, count in odd.items() if count})


def same_origin(one, other):
    """Whether two Corpora are of the same documents: of one file, however its path is spelled, or of one split."""
    first, second = (
        Path(c.source).resolve() if Path(c.source).is_file() else (c.source, c.split) for c in (one, other)
    )
    return first == second
