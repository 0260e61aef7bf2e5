"""Files that are complete or as they were, and strict JSON."""

import json
import math
import os
from pathlib import Path


def write_json(path, value):
    """Write JSON as `write_file` does."""
    write_file(path, (_lines(value) + "\n").encode())


def write_file(path, data):
    """Write bytes under a temporary name beside `path`, then rename it: a crash leaves the old file."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(value):
    """Return strict JSON on one line: NaN and infinities, which JSON lacks, as the strings "nan", "inf", "-inf"."""
    return json.dumps(_strict(value), allow_nan=False)


def _lines(value, indent=""):
    """Return JSON with a line for each item of what holds dicts or lists of dicts; the rest stays compact."""
    inner = indent + " "
    if isinstance(value, dict) and any(isinstance(item, (dict, list)) for item in value.values()):
        items = [f"{json.dumps(str(key))}: {_lines(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(inner + item for item in items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(inner + _lines(item, inner) for item in value) + f"\n{indent}]"
    return to_json(value)


def _strict(value):
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, (list, tuple)) else value
