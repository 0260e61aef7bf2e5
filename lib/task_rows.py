"""The rows of the zero-shot tasks' files: each is looked at before any weight is read, and named where it is wrong.

A label that no choice has, a gold answer in words or a sentence without its blank would be scored, as a wrong item or
another question, without a word.

    check_rows("piqa", "data/piqa.jsonl")
"""

import functools
import json
from reprlib import repr as brief

from lib.files import expand, read_bytes
from lib.schema import count, number, problem, text


def check_rows(task, path):
    """Raise ValueError, one line with file and line, unless every row is one of `task`'s, a key of ROWS."""
    about = expand(path).stat()
    _checked(task, str(path), about.st_mtime_ns, about.st_size)


@functools.lru_cache
def _checked(task, path, modified, size):
    fields, rule = ROWS[task]
    try:
        lines = read_bytes(path).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); convert it to UTF-8") from None
    kinds = {}
    for k, line in enumerate(lines, 1):
        if line.strip():
            if wrong := _row_problem(line, fields, rule, kinds):
                raise ValueError(f"{path}, line {k}: {wrong}; mend that row, or leave it out")
    if not kinds:
        raise ValueError(f"{path}: holds no rows of {task}")


def _row_problem(line, fields, rule, kinds):
    """Return what is wrong with a line, None where nothing is. kinds: {column: type} of the rows before."""
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "holds half a surrogate pair, which is no text"
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    if not isinstance(row, dict):
        return f"{brief(row)} is no row"
    if wrong := problem(row, fields) or rule(row):
        return wrong
    for name, kind in _kinds("", row):  # of the columns that nobody asks for, too: the file becomes one table
        if kind and kinds.setdefault(name, kind) != kind:
            return f"{name} holds {kind}, in the rows before {kinds[name]}"
        if kind in UNFIT:
            return f"{name} holds {kind}"
    return None


UNFIT = ("an empty {}", "too large a number", "a column whose name has a zero byte")


def _kinds(name, value):
    """Yield (place, type in words) of a value and what is in it; None of what is missing or may be anything."""
    if isinstance(value, dict):
        yield name or "the row", UNFIT[0] if not value else UNFIT[2] if any("\0" in key for key in value) else "a {...}"
        for key, item in value.items():
            yield from _kinds(f"{name}.{key}".lstrip("."), item)
    elif isinstance(value, list):
        yield name, "a list"
        for item in value:
            yield from _kinds(f"{name}[]", item)
    elif number(value):
        yield name, "a number" if abs(value) < 2**63 else UNFIT[1]
    elif isinstance(value, (str, bool)):
        yield name, "text" if text(value) else "true or false"
    else:
        yield name, None if value is None else UNFIT[1]


def words(value):
    """text, not only spaces"""
    return text(value) and bool(value.strip())


def choice(value):
    """1 or 0"""
    return count(value) and value < 2


def _lettered(key):
    """Return (fields, rule) of questions whose choices have labels, one of them the answer."""

    def rule(row):
        labels, n = row["choices"]["label"], len(row["choices"]["text"])
        answer = row["answerKey"].lstrip()
        if n < 2 or len(labels) != n or len(set(labels)) != n:
            return f"choices has {n} texts and the labels {brief(labels)}; two texts or more, each with its own label"
        return None if answer in labels else f"answerKey holds {brief(answer)}, not one of the labels {brief(labels)}"

    return {key: words, "choices": {"text": [words], "label": [text]}, "answerKey": text}, rule


def _gold(name, n=None):
    """Return the rule of a list of choices, n where that is fixed, and the index of the right one."""

    def rule(row):
        there = len(row["choices"])
        if there != n if n else there < 2:
            return f"choices has {there}, not {n or 'two or more'}"
        return None if row[name] < there else f"{name} holds {brief(row[name])}, not 0..{there - 1}"

    return rule


def _blank(row):
    before, blank, after = row["sentence"].partition("_")
    if not blank or not after.strip():
        return "sentence has no blank _ with text behind it"
    return None if row["answer"] in ("1", "2") else f'answer holds {brief(row["answer"])}, not "1" or "2"'


def _last_word(row):
    context, _, last = row["text"].rpartition(" ")
    return None if context.strip() and last.strip() else "text has no last word with others before it"


def _aliases(row):
    return None if row["answer"]["aliases"] else "answer has no aliases"


def _nothing(row):
    return None


ROWS = {  # task: (fields as lib.schema.problem takes them, function of a row: what else is wrong)
    "piqa": ({"goal": text, "sol1": words, "sol2": words, "label": choice}, _nothing),
    "winogrande": (dict.fromkeys(("sentence", "option1", "option2"), words) | {"answer": text}, _blank),
    "hellaswag": ({"query": words, "choices": [words], "gold": count}, _gold("gold")),
    "arc_easy": _lettered("question"),
    "arc_challenge": _lettered("question"),
    "boolq": ({"passage": text, "question": words, "label": choice}, _nothing),
    "openbookqa": _lettered("question_stem"),
    "mmlu": ({"question": words, "subject": words, "choices": [text], "answer": count}, _gold("answer", 4)),
    "lambada_openai": ({"text": words}, _last_word),
    "triviaqa": ({"question": words, "answer": {"aliases": [text]}}, _aliases),
}
