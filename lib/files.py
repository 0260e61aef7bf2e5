"""Files that are complete or as they were, with one owner at a time, and strict JSON.

    with own("ppls/order.json"):             # another run on the same file is refused
        write_json("ppls/order.json", {...})  # the old file or the new one, whatever happens

What a killed run leaves beside its output is cleared away by the next run that owns or writes it.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import socket
import stat
import zlib
from pathlib import Path

LARGEST = 2**30  # bytes of a JSON file that is read; a result has thousands
LEFT = re.compile(r"\.([0-9a-f]{8})-(\d+)(\.\w+)?\.(tmp|old)")  # host, process, anything, what it was
LONGEST = 32  # characters that temporary names add
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class NotWritten(OSError):
    """A file could not be written; what was there before still is."""

    def __str__(self):
        return f"{self.filename}: {self.strerror}"


def write_json(path, value):
    """Write JSON as `write_file` does."""
    write_file(path, (_lines(value) + "\n").encode())


def write_file(path, data):
    """Write bytes under a temporary name beside `path`, then rename it: a crash, also of the machine, leaves the old
    file or the new one. A link is followed. Raises ValueError where `path` is no regular file."""
    path = place(path)
    temporary = beside(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise NotWritten(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # the first error counts
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder):
    """Make renames in a folder last over a crash of the machine, where the file system can."""
    with contextlib.suppress(OSError):  # some refuse to open or sync a folder
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def read_bytes(path):
    """Return the content of a regular file. Raises OSError, or ValueError for what may never end: a pipe, a device."""
    with open(expand(path), "rb", opener=_without_waiting) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise ValueError(f"{path}: not a regular file; give a file, not a pipe or a device")
        return file.read()


def read_json(path):
    """Return what a JSON file holds. Raises ValueError, one line without the path, or OSError."""
    if Path(expand(path)).stat().st_size > LARGEST:
        raise ValueError(f"larger than {LARGEST >> 20} MiB")
    try:
        return json.loads(read_bytes(path).decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("lists within lists without end") from None


def expand(path):
    """Return a path whose ~ is replaced. Raises ValueError, one line, for a name that no file can have."""
    try:
        str(path).encode()
        if "\0" in str(path):
            raise ValueError
        return Path(path).expanduser()
    except ValueError:
        raise ValueError(f"{ascii(str(path))}: no name of a file: it must be UTF-8 without zero bytes") from None
    except RuntimeError:
        raise ValueError(f"{path}: there is no such user's home; write ./{path} for a file of that name") from None


def place(path):
    """Return where `path` leads, behind links. Raises ValueError, one line, where no file can be written under it."""
    found = Path(os.path.realpath(expand(path)))
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(found.with_name(found.name + "x" * LONGEST))
        if not stat.S_ISREG(found.stat().st_mode):
            kind = "a folder" if found.is_dir() else "a pipe, a socket or a device"
            raise ValueError(f"{path}: {kind}, where a file belongs; give another name")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give another name") from None
    return found


@contextlib.contextmanager
def own(path):
    """Hold a file or folder that is going to be written; a second owner gets a ValueError, one line.

    The lock, on PATH.lock, ends with its process, however that ends. Gives None, or one line for people where the file
    system has no locks. What dead owners left beside `path` is cleared away.
    """
    path = Path(os.path.realpath(expand(path)))
    lock = path.with_name(f"{path.name}.lock")
    new = [folder for folder in path.parents if not folder.exists()]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file, note = _locked(lock)
    except BlockingIOError:
        try:
            who = lock.read_text(errors="replace").strip()[:99]
        except OSError:
            who = ""
        raise ValueError(
            f"{path}: another run writes it ({who or 'it does not say which'}); wait for its end, or give another name"
        ) from None
    try:
        sweep(path)
        yield note
    finally:
        with contextlib.suppress(OSError):
            if file:
                os.unlink(lock)  # while it is still ours
        if file:
            file.close()
        with contextlib.suppress(OSError):  # not empty: something was written
            for folder in new:
                folder.rmdir()


def _locked(lock):
    """Return (open file, None) of a lock that is ours now, (None, note) where there are no locks; raise
    BlockingIOError where another has it."""
    note = f"{lock.parent}: this file system has no locks; see to it that no other run writes {lock.stem}"
    try:
        import fcntl
    except ImportError:
        return None, note
    while True:
        file = open(lock, "a+", encoding="utf-8", opener=_without_waiting)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(lock) and os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
                return file, None
            file.close()  # its owner has just removed it
        except OSError as error:
            file.close()
            if error.errno in NO_LOCKS:
                with contextlib.suppress(OSError):
                    os.unlink(lock)
                return None, note
            if error.errno == errno.EACCES:  # what some network file systems say
                raise BlockingIOError from None
            raise


def beside(path, end):
    """Return a name beside `path` that tells which process made it; end: "tmp", or "old" for what is replaced."""
    path = path.with_name(f"{path.name}.{_host()}-{os.getpid()}.{end}")
    _ours.add(path)
    return path


def sweep(path):
    """Clear away what dead processes of this machine left beside `path`: .tmp goes, .old comes back where `path` is
    gone."""
    path = Path(path)
    if not path.parent.is_dir():
        return
    for entry in sorted(path.parent.iterdir()):
        left = entry.name.startswith(path.name) and LEFT.fullmatch(entry.name[len(path.name) :])
        if not left or left[1] != _host() or entry in _ours or _alive(int(left[2])):
            continue
        with contextlib.suppress(OSError):  # another user's
            if left[4] == "old" and not os.path.lexists(path):
                entry.rename(path)
            elif entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


_ours = set()  # temporary names that this process has made


def _host():
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _alive(pid):
    """Whether another process of this machine has this number."""
    if pid == os.getpid():  # in a container every run may have the same
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _without_waiting(path, flags):
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)  # a pipe's open would wait for its other end


def to_json(value):
    """Return strict JSON on one line: NaN and infinities, which JSON lacks, as the strings "nan", "inf", "-inf"."""
    return json.dumps(strict(value), allow_nan=False)


def _lines(value, indent=""):
    """Return JSON with a line for each item of what holds dicts or lists of dicts; the rest stays compact."""
    inner = indent + " "
    if isinstance(value, dict) and any(isinstance(item, (dict, list)) for item in value.values()):
        items = [f"{json.dumps(str(key))}: {_lines(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(inner + item for item in items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(inner + _lines(item, inner) for item in value) + f"\n{indent}]"
    return to_json(value)


def strict(value):
    """Return a value as JSON has it: keys are strings, tuples lists, NaN and infinities strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    return [strict(item) for item in value] if isinstance(value, (list, tuple)) else value
