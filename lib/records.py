"""A file -> its documents: .txt, .jsonl, .json, .csv or .parquet, all but the last also gzipped (.jsonl.gz).

A record is a text by its column, by the Alpaca prompt where it has an instruction and an output instead, or, where a
chat template is asked for, by that of a tokenizer. Records without a text are skipped and counted; one whose text is
of another type is an error that names it.
"""

import csv
import gzip
import io
import json
import re
from pathlib import Path
from typing import NamedTuple

from lib.files import read_bytes

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".csv")
ENDINGS = (*SUFFIXES, *(suffix + ".gz" for suffix in SUFFIXES if suffix != ".parquet"))
ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{context}### Response:\n{output}"
)
SHAREGPT = {"human": "user", "gpt": "assistant"}  # its names of the roles


class Documents(NamedTuple):
    """texts: list of str. joint: what stood between them in the file. skipped: records without a text. mended: texts
    that held half a surrogate pair, which no tokenizer takes; U+FFFD stands in its place."""

    texts: list
    joint: str = "\n\n"
    skipped: int = 0
    mended: int = 0


def suffix_of(path):
    """Return the one of SUFFIXES that tells how a file is read, or None; capitals and .gz do not matter."""
    name = str(path).lower()
    return next((s for s in SUFFIXES if name.endswith((s, s + ".gz") if s != ".parquet" else s)), None)


def short_name(dataset):
    """Return the name of a data set, a file or a mix as results and file names have it."""
    names = []
    for part in [str(dataset)] if Path(dataset).exists() else str(dataset).split("+"):
        name, star, weight = part.partition("*")
        if suffix := suffix_of(name):
            name = Path(name).name
            name = name[: name.lower().rindex(suffix)]
        names.append(re.sub(r"[/:\[\]%]+", "-", name).strip("-") + (f"x{weight}" if star else ""))
    return "+".join(names)


def read_file(path, columns=("text",), chat=None):
    """Return the Documents of a file. columns: the first that is there counts. chat: a tokenizer whose chat template
    makes the texts, or None. Raises ValueError, one line."""
    path, suffix = Path(path), suffix_of(path)
    if suffix == ".parquet":
        return _parquet(path, columns, chat)
    try:
        content = read_bytes(path)
        if path.name.lower().endswith(".gz"):
            content = gzip.decompress(content)
        text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()  # Windows puts a mark in front
        if suffix == ".txt":
            return _parts(path, text, columns, chat)
        if suffix == ".csv":
            records = list(csv.DictReader(io.StringIO(text), strict=True))
        else:
            records = _json_lines(text) if suffix == ".jsonl" else json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); convert it to UTF-8") from None
    except (json.JSONDecodeError, csv.Error, RecursionError, EOFError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as {suffix[1:]}: {error}") from None
    if isinstance(records, list) and all(isinstance(r, str) for r in records):
        no_columns(path, columns, chat)
        return texts_of(path, records)
    if not (isinstance(records, list) and all(isinstance(r, dict) for r in records)):
        raise ValueError(f"{path}: must hold records with a text column, or strings")
    names = list(dict.fromkeys(name for record in records for name in record))
    read, name, _ = reader(path, names, columns, chat)
    return texts_of(path, map(read, records), name)


def reader(source, names, columns, chat=None):
    """Return (function from a record to its text, what an error calls that, the columns it reads), for records with
    the columns `names`."""
    if chat is not None:
        column = next((name for name in ("messages", "conversations") if name in names), None)
        if column:
            return lambda record: _chat(chat, _messages(record.get(column))), column, [column]
        if {"instruction", "output"} <= set(names):
            return lambda record: _chat(chat, _turns(record)), "output", _alpaca_columns(names)
        raise ValueError(
            f"{source}: a chat template needs a column messages, conversations, or instruction and output; the "
            f"columns are {', '.join(map(str, names))}"
        )
    column = next((name for name in columns if name in names), None)
    if column:
        return lambda record: record.get(column), column, [column]
    if "text" in columns and {"instruction", "output"} <= set(names):
        return _alpaca, "output", _alpaca_columns(names)
    hint = "; ask for the chat template of the model" if {"messages", "conversations"} & set(names) else ""
    raise ValueError(f"{source}: no column {columns[0]}; the columns are {', '.join(map(str, names))}{hint}")


def texts_of(source, values, name="text", joint="\n\n"):
    """Return the Documents of texts, None where a record has none."""
    texts, skipped, mended = [], 0, 0
    for i, value in enumerate(values):
        if value is None:
            skipped += 1
        elif not isinstance(value, str):
            raise ValueError(f"{source}: record {i + 1} has no text in column {name} but {type(value).__name__}")
        else:
            whole = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            mended += whole != value
            texts.append(whole)
    if not texts:
        empty = f" in column {name} of its {skipped} records" if skipped else ""
        raise ValueError(f"{source}: holds no text{empty}")
    return Documents(texts, joint, skipped, mended)


def no_columns(source, columns, chat=None):
    """Raise ValueError where a column or a chat template is asked of a source of plain texts."""
    if columns[0] != "text":
        raise ValueError(f"{source}: holds texts without columns, so none is called {columns[0]}; name no column")
    if chat is not None:
        raise ValueError(f"{source}: holds texts, not chats; ask for no chat template")


def _parts(path, text, columns, chat):
    """Return the parts of a text between blank lines, or its lines where there is no blank line."""
    no_columns(path, columns, chat)
    parts = [part for part in text.split("\n\n") if part.strip()]
    if len(parts) != 1:
        return texts_of(path, parts)
    lines = re.split(r"(?<=\n)(?=[^\n]*\S)", parts[0])  # a line that is all spaces stays with the one before
    return texts_of(path, lines if lines[0].strip() else [lines[0] + lines[1], *lines[2:]], joint="")


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


def _parquet(path, columns, chat):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow; pip install pyarrow, or give .jsonl") from None
    import pyarrow

    try:
        read, name, needed = reader(path, pyarrow.parquet.read_schema(path).names, columns, chat)
        records = pyarrow.parquet.read_table(path, columns=needed).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from None
    return texts_of(path, map(read, records), name)


def _alpaca_columns(names):
    return [name for name in ("instruction", "input", "output") if name in names]


def _alpaca(record):
    """Return the prompt that Alpaca was trained on, with its answer; None where a part is missing."""
    instruction, context, output = (record.get(name) for name in ("instruction", "input", "output"))
    if instruction is None or output is None:
        return None
    return ALPACA.format(
        paired=", paired with an input that provides further context" if context else "",
        instruction=instruction,
        context=f"### Input:\n{context}\n\n" if context else "",
        output=output,
    )


def _turns(record):
    """Return the messages of an Alpaca record."""
    instruction, context, output = (record.get(name) for name in ("instruction", "input", "output"))
    if instruction is None or output is None:
        return None
    asked = f"{instruction}\n\n{context}" if context else instruction
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]


def _messages(value):
    """Return a record's messages under the names of OpenAI's, which the templates know; ShareGPT has others."""
    if isinstance(value, list) and all(isinstance(m, dict) and "from" in m for m in value):
        return [{"role": SHAREGPT.get(m["from"], m["from"]), "content": m.get("value")} for m in value] or None
    return value or None


def _chat(tokenizer, messages):
    """Return messages as the tokenizer's chat template writes them, without the BOS token in front, which belongs to
    the windows; None for none."""
    if messages is None:
        return None
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template; give a chat model, or texts without one")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template raises what its writer chose, jinja2's classes among them
        shown = json.dumps(messages, ensure_ascii=False, default=str)[:80]
        raise ValueError(f"the chat template refuses {shown} ({error}); mend or leave out that record") from None
    return text.removeprefix(tokenizer.bos_token or "")
