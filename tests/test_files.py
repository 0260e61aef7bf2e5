"""lib/files.py: one owner, nothing half written, nothing left behind; other processes are the truth for locks."""

import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from command_line import ROOT

from lib import files
from lib.export.folder import check_target, complete_or_nothing


def python(code, *words):
    """Start Python code in another process; the test waits until it has printed a line."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys\nfrom pathlib import Path\nfrom lib import files\n{code}",
            *map(str, words),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def other_owner():
    """Return a function that starts a process which owns a path until it is killed."""
    started = []

    def start(path):
        code = "import time\nwith files.own(sys.argv[1]):\n    print('ready', flush=True)\n    time.sleep(600)"
        started.append(python(code, path))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# ---- one owner ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", (signal.SIGKILL, signal.SIGTERM))
def test_a_second_owner_is_refused_by_name_until_the_first_is_dead(other_owner, tmp_path, how):
    path = tmp_path / "order.json"
    first = other_owner(path)
    with pytest.raises(ValueError, match=rf"order\.json: another run writes it \(process {first.pid} on "):
        with files.own(path):
            raise AssertionError("two owners")
    first.send_signal(how)
    first.wait()
    with files.own(path) as note:
        assert note is None
        with pytest.raises(ValueError, match=f"process {os.getpid()} on "), files.own(path):
            pass
    assert names(tmp_path) == []


def test_a_link_and_what_it_names_have_one_owner(other_owner, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "order.json")
    other_owner(tmp_path / "order.json")
    with pytest.raises(ValueError, match="another run"), files.own(tmp_path / "link"):
        pass


def test_many_processes_have_one_winner(tmp_path):
    """An owner that ends while another looks at its lock must not leave two behind."""
    code = """
import time
path = Path(sys.argv[1])
print('ready', flush=True)
for _ in range(60):
    try:
        with files.own(path):
            other = Path(str(path) + '.mark')
            with open(other, 'x'):
                time.sleep(0.001)
            other.unlink()
    except ValueError:
        pass
"""
    processes = [python(code, tmp_path / "order.json") for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", files.NO_LOCKS)
def test_a_file_system_without_locks_says_so(tmp_path, monkeypatch, number):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with files.own(tmp_path / "order.json") as note:
        assert "has no locks" in note and "order.json" in note
    assert names(tmp_path) == []


# ---- whole files ----------------------------------------------------------------------------------------------


def test_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, path = [], tmp_path / "order.json"
    synced = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.path.exists(path)), synced(file)))
    files.write_file(path, b"new")
    assert done[:1] == [False] and len(done) == 2  # the file, then its folder


@pytest.mark.parametrize("call", ("fsync", "replace"))
@pytest.mark.parametrize("number", (errno.ENOSPC, errno.EIO, errno.EACCES))
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call, number):
    path = tmp_path / "order.json"
    files.write_file(path, b"old")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError) as error:
            files.write_file(path, b"new")
    assert error.value.errno == number
    assert path.read_bytes() == b"old" and names(tmp_path) == ["order.json"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.json").symlink_to("there/order.json")
    for content in (b"first", b"second"):
        files.write_file(tmp_path / "link.json", content)
        assert (tmp_path / "there" / "order.json").read_bytes() == content
    assert (tmp_path / "link.json").is_symlink() and names(tmp_path / "there") == ["order.json"]


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    path, host = tmp_path / "order.json", files.beside(tmp_path / "x", "tmp").name.split(".")[1].split("-")[0]
    left = tmp_path / f"order.json.{host}-{dead_process()}.tmp"
    left.write_bytes(b"half")
    alive = tmp_path / f"order.json.{host}-{os.getppid()}.tmp"
    alive.write_bytes(b"of a process that lives")
    elsewhere = tmp_path / f"order.json.00000000-{dead_process()}.tmp"
    elsewhere.write_bytes(b"of another machine")
    same_number = tmp_path / f"order.json.{host}-{os.getpid()}.tmp"
    same_number.write_bytes(b"half, by a process that had our number")
    files.write_file(path, b"new")
    assert names(tmp_path) == sorted(["order.json", alive.name, elsewhere.name])


ODD_NAMES = {
    "too long": ("x" * 250, "File name too long"),
    "a loop": ("loop", "Too many levels of symbolic links"),
    "a folder": ("folder", "a folder, where a file belongs"),
    "a pipe": ("pipe", "a pipe, a socket or a device"),
    "below a file": ("file/x", "Not a directory"),
    "half a surrogate pair": ("\ud800", "no name of a file"),
    "a byte that is no UTF-8": (os.fsdecode(b"\xff"), "no name of a file"),
    "a zero byte": ("a\0b", "no name of a file"),
}


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_that_cannot_be_written_are_refused_in_one_line(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    before = names(tmp_path)
    given, says = ODD_NAMES[name]
    for write in (files.place, lambda path: files.write_file(path, b"")):
        with pytest.raises(ValueError, match=says) as error:
            write(f"{tmp_path}/{given}")
        assert len(str(error.value).splitlines()) == 1 and str(error.value).isascii()
    assert names(tmp_path) == before


def test_a_home_that_is_not_there_is_refused_in_one_line():
    with pytest.raises(ValueError, match="~nobody-of-this-name/x: there is no such user's home"):
        files.write_file("~nobody-of-this-name/x", b"")


@pytest.mark.parametrize("name", ("pipe", "/dev/zero"))
def test_only_regular_files_are_read(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        files.read_bytes(tmp_path / name)


# ---- folders --------------------------------------------------------------------------------------------------

EXPORT = """
import os, signal
from lib.export import folder
rename, left = Path.rename, [int(sys.argv[2])]
def killed(self, target):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return rename(self, target)
Path.rename = killed
print('ready', flush=True)
with folder.complete_or_nothing(sys.argv[1]) as new:
    (new / 'config.json').write_text('{"pruning_info": 2}')
"""


@pytest.mark.parametrize("renames", (0, 1))
def test_an_export_killed_between_its_renames_comes_back(tmp_path, renames):
    target = tmp_path / "pruned"
    target.mkdir()
    (target / "config.json").write_text('{"pruning_info": 1}')
    process = python(EXPORT, target, renames)
    assert process.wait() == -signal.SIGKILL
    assert len(names(tmp_path)) > 1 and target.exists() == (renames == 0)
    with pytest.raises(ValueError, match="is not empty"):  # the next run, before it reads any weight
        check_target(target, tmp_path / "model")
    assert (target / "config.json").read_text() == '{"pruning_info": 1}'
    with complete_or_nothing(target) as new:
        (new / "config.json").write_text('{"pruning_info": 3}')
    assert names(tmp_path) == ["pruned"] and names(target) == ["config.json"]
    assert (target / "config.json").read_text() == '{"pruning_info": 3}'


def test_a_folder_that_another_run_writes_is_refused(other_owner, tmp_path):
    other_owner(tmp_path / "pruned")
    with pytest.raises(ValueError, match="another run writes it"), complete_or_nothing(tmp_path / "pruned"):
        pass


def test_offloaded_weights_of_killed_runs_go(tmp_path, monkeypatch):
    from lib.model import _offload_folder

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = """
import tempfile, time
from lib.model import _offload_folder
tempfile.tempdir = sys.argv[1]
Path(_offload_folder(), 'weights').write_text('')
print('ready', flush=True)
time.sleep(600)
"""
    process = python(code, tmp_path)
    (theirs,) = tmp_path.iterdir()
    mine = Path(_offload_folder.__wrapped__())
    assert theirs.exists() and stat.S_IMODE(mine.stat().st_mode) == 0o700
    process.kill()
    process.wait()
    time.sleep(0.01)
    another = Path(_offload_folder.__wrapped__())
    assert not theirs.exists() and another.exists()


def test_an_owner_that_writes_nothing_leaves_no_folder(tmp_path):
    with files.own(tmp_path / "new" / "deep" / "order.json"):
        pass
    assert names(tmp_path) == []
    with files.own(tmp_path / "new" / "order.json"):
        files.write_file(tmp_path / "new" / "order.json", b"")
    assert names(tmp_path / "new") == ["order.json"]
