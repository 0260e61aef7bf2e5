"""Kills, failing disks and damaged files, as many as asked for, against toys on a CPU; prints what came of them.

Every command is first run undisturbed; then it is killed at random moments and given again until it ends, or its disk
fails at a random write and it is given again. What it leaves must be what the undisturbed one left, apart from what it
cost, and nothing beside it. Files of every kind are damaged at random and read.

    python tests/campaign.py --kills 200 --faults 100 --files 10000
"""

import argparse
import builtins
import contextlib
import errno
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

COSTS = {"seconds", "block_forwards", "head_forwards", "checksum"}
SMALL = "--device cpu --compute-dtype fp32 --ppl-eval-seqlen 64".split()
FAULTS = (errno.ENOSPC, errno.EIO, errno.EACCES)
PATIENCE = 5  # seconds for a file


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--files", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, counts, start = random.Random(args.seed), Counter(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        commands = make(Path(folder))
        truth = {name: undisturbed(command) for name, command in commands.items()}
        for k in range(args.kills):
            counts.update(killed(rng, commands, truth, name=list(commands)[k % len(commands)]))
        for k in range(args.faults):
            counts.update(failing(rng, commands, truth, name=list(commands)[k % len(commands)]))
        counts.update(damaged(rng, Path(folder), commands, args.files))
    bad = {name: n for name, n in counts.items() if name.startswith("BAD") and n}
    for name in sorted(counts):
        print(f"{counts[name]:8,}  {name}")
    print(f"{time.perf_counter() - start:8.0f}  seconds, seed {args.seed}")
    print(json.dumps({**counts, "seconds": round(time.perf_counter() - start), "seed": args.seed}))
    sys.exit(1 if bad else 0)


# ---- commands ----------------------------------------------------------------------------------------------------


class Command:
    """A command line, its output folder, and the undisturbed seconds it takes. make(out): the words for a folder."""

    def __init__(self, main, make, folder):
        self.main, self.make, self.folder, self.seconds = main, make, folder, 0.0

    @property
    def words(self):
        return [str(word) for word in self.make(self.folder)]

    def run(self, stop_after=None, number=signal.SIGKILL, before=lambda: None):
        """Run in a child of its own; return (exit code, -9 where killed, what it said on stderr)."""
        with tempfile.TemporaryFile("w+") as said:
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                self._child(said, before)
            start = time.perf_counter()
            while True:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    break
                if stop_after is not None and time.perf_counter() - start > stop_after:
                    os.kill(pid, number)
                    _, status = os.waitpid(pid, 0)
                    break
                time.sleep(0.002)
            said.seek(0)
            return os.waitstatus_to_exitcode(status), said.read()

    def _child(self, said, before):
        code = 70
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(said.fileno(), 2)
            sys.argv[0] = self.main.__module__
            from scripts import ending

            before()
            ending.run(lambda: self.main(self.words))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        except BaseException:
            import traceback

            with contextlib.suppress(Exception):
                traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(code)


def make(folder):
    """Return {name: Command} on a toy model, its text and an order, which are made now."""
    import families
    from conftest import byte_tokenizer

    import block_search
    import eval as evaluation
    import lib.cells  # noqa: F401  the children, forked, have it already
    import lib.export.write  # noqa: F401
    from scripts import compare, export

    block_search.draw = lambda *_, **__: None  # pictures take longer than all the rest
    compare.write_tables = lambda bench, summary: write_sums(bench, summary)
    model, text, order = folder / "toy", folder / "text.txt", folder / "order"
    with contextlib.redirect_stderr(io.StringIO()):
        families.toy("llama", vocab_size=256).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    text.write_text("\n\n".join(f"Document {i}: {i * 37 % 101} quick foxes jump over {i * 7} dogs." for i in range(60)))
    common = ["--model-path", model, *SMALL, "--cal-dataset", text, "--ppl-eval-batch-size", 2]
    search = [*common, "--cal-nsamples", 20, "--del-block-num", 3]

    def searching(*more):
        return lambda out: [*search, "--ppl-search-path", out, *more]

    commands = {
        "search cached": Command(block_search.main, searching(), folder / "cached"),
        "search exhaustive": Command(block_search.main, searching("--search", "exhaustive"), folder / "exhaustive"),
        "search race": Command(block_search.main, searching("--search", "race"), folder / "race"),
        "search kl": Command(block_search.main, searching("--metric", "kl"), folder / "kl"),
    }
    assert Command(block_search.main, searching(), order).run()[0] == 0
    (file,) = order.glob("*.json")
    replay = ["--model-path", model, "--ppl-search-file", file, "--del-block-num", 2]
    commands["eval"] = Command(
        evaluation.main,
        lambda out: [*common, "--ppl-search-file", file, "--del-block-num", 2, "--output-path", out / "result.json"],
        folder / "eval",
    )
    commands["compare"] = Command(
        compare.main,
        lambda out: [
            *common,
            "--cal-nsamples",
            10,
            "--eval-datasets",
            text,
            "--methods",
            "sleb",
            "bi",
            "--ratios",
            0.1,
            0.3,
            "--tasks",
            "--output-dir",
            out,
        ],
        folder / "compare",
    )
    commands["export"] = Command(export.main, lambda out: [*replay, "--output-dir", out / "model"], folder / "export")
    return commands


def write_sums(bench, summary):
    """What scripts.compare writes at its end, without the pictures."""
    from lib.schema import write

    write(bench.folder / "compare.json", "compare", summary)


def undisturbed(command):
    start = time.perf_counter()
    code, said = command.run()
    assert code == 0, said
    command.seconds = time.perf_counter() - start
    return left_by(command)


def left_by(command):
    """Return {file: what it says apart from costs} of a command's folder, which is deleted."""
    found = {}
    for path in sorted(p for p in command.folder.rglob("*") if p.is_file()):
        name = path.relative_to(command.folder).as_posix()
        found[name] = without_costs(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()
    shutil.rmtree(command.folder, ignore_errors=True)
    return found


def without_costs(value):
    if isinstance(value, dict):
        return {key: without_costs(item) for key, item in value.items() if key not in COSTS}
    return [without_costs(item) for item in value] if isinstance(value, list) else value


# ---- kills -------------------------------------------------------------------------------------------------------


def killed(rng, commands, truth, name):
    """Kill a command once at a random moment, give it again until it ends; return counts."""
    command, counts, number = commands[name], Counter(), rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
    code, said = command.run(rng.uniform(0, 1.1) * command.seconds, number)
    if code == 0:
        counts["ended before the kill"] += 1
    elif number == signal.SIGTERM and code not in (143, -signal.SIGTERM):
        counts[f"BAD: SIGTERM, exit {code}"] += 1
    counts["BAD: traceback after a kill"] += "Traceback" in said
    counts[f"killed: {name}"] += 1
    damaged_now = [p for p in command.folder.rglob("*.json") if not reads(p)]
    counts["BAD: damaged files after a kill"] += len(damaged_now)
    counts.update(again(command, truth[name], "kill"))
    return counts


def again(command, truth, what):
    """Give a command again, which must now leave what the undisturbed one left."""
    counts = Counter()
    finished = command.folder.name == "export" and (command.folder / "model").exists()
    code, said = (0, "") if finished else command.run()
    counts["BAD: did not end when given again"] += code != 0
    counts["BAD: traceback when given again"] += "Traceback" in said
    if code != 0:
        print(said, file=sys.stderr)
    left = left_by(command)
    counts[f"resumed to the undisturbed result after a {what}"] += left == truth
    counts[f"BAD: another result after a {what}"] += left != truth and set(left) <= set(truth)
    counts[f"BAD: leftovers after a {what} and the next run"] += len(set(left) - set(truth))
    return counts


def reads(path):
    """Whether a JSON file is whole; files in unfinished folders are not yet anybody's."""
    from lib.schema import kind_of, read

    if ".tmp" in str(path) or path.name.endswith(("config.json", "tokenizer.json", "generation_config.json")):
        return True
    try:
        return kind_of(json.loads(path.read_text())) is None or bool(read(path))
    except ValueError:
        return False


# ---- a disk that fails -------------------------------------------------------------------------------------------


def failing(rng, commands, truth, name):
    """Let one write of a command fail, or all from one on; return counts."""
    command, number, nth, once = commands[name], rng.choice(FAULTS), rng.randrange(1, 25), rng.random() < 0.5
    code, said = command.run(before=lambda: break_writes(command.folder, number, nth, once))
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.strip() and "it/s" not in line]
    lines = [line for line in lines if "window" not in line]
    counts = Counter({f"failing writes: {name}": 1})
    counts["ended in spite of the failing write"] += code == 0
    counts["BAD: traceback from a failing write"] += "Traceback" in said
    if "Traceback" in said:
        print(name, errno.errorcode[number], said, file=sys.stderr)
    counts["BAD: a failing write without one line"] += code != 0 and len(lines) != 1
    counts["BAD: damaged files after a failing write"] += sum(not reads(p) for p in command.folder.rglob("*.json"))
    counts.update(again(command, truth[name], "failing write"))
    return counts


def break_writes(folder, number, nth, once):
    """Let the nth call that writes below `folder` fail, and unless `once` all that follow; for a child process."""
    seen = [0]

    def failing(call, path_at=0):
        def wrapped(*args, **kwargs):
            about = args[path_at] if len(args) > path_at else ""
            path = os.readlink(f"/proc/self/fd/{about}") if isinstance(about, int) else str(about)
            if path.startswith(str(folder)):
                seen[0] += 1
                if seen[0] == nth or (seen[0] > nth and not once):
                    raise OSError(number, os.strerror(number), path)
            return call(*args, **kwargs)

        return wrapped

    def opening(call):
        breaking = failing(call)

        def wrapped(file, mode="r", *args, **kwargs):
            return (breaking if set(mode) & set("wax+") else call)(file, mode, *args, **kwargs)

        return wrapped

    os.fsync, os.replace, os.rename, os.mkdir = map(failing, (os.fsync, os.replace, os.rename, os.mkdir))
    builtins.open = opening(builtins.open)
    io.open = builtins.open


# ---- damaged files -----------------------------------------------------------------------------------------------


def damaged(rng, folder, commands, n):
    """Damage files of every kind n times and read them; return counts."""
    from test_orders import damage, damage_bytes
    from test_report import searched
    from test_schema import CONTENTS
    from test_tasks import toy_rows

    from lib import schema
    from lib.journal import read_journal
    from lib.orders import read_order, save_order
    from lib.task_rows import ROWS, check_rows

    counts, made, path = Counter(), {}, folder / "damaged.json"
    save_order(path, *searched())
    made["order"] = path.read_bytes()
    for kind, content in CONTENTS.items():
        schema.write(path, kind, content)
        made[kind] = path.read_bytes()
    for kind in (*CONTENTS, "order"):
        bare = json.loads(made[kind])
        for name in schema.MARKS[1:]:
            (bare["meta"] if kind == "order" else bare).pop(name)
        made[f"{kind} without checksum"] = json.dumps(bare).encode()
    rows = toy_rows(4)
    for task in ROWS:
        made[f"rows of {task}"] = "".join(json.dumps(row) + "\n" for row in rows[task]).encode()
    made["journal"] = journal_of(commands)
    kinds = list(made)
    for k in range(n):
        kind = kinds[k % len(kinds)]
        whole, content = made[kind], made[kind]
        if rng.random() < 0.5 or kind == "journal":
            content = damage_bytes(whole, rng)
        else:
            with contextlib.suppress(ValueError):
                lines = whole.splitlines() if kind.startswith("rows") else [whole]
                i = rng.randrange(len(lines))
                lines[i] = json.dumps(damage(json.loads(lines[i]), rng)).encode()
                content = b"\n".join(lines)
        path.write_bytes(content)
        os.utime(path, ns=(k, k))  # rows are read anew
        signal.signal(signal.SIGALRM, hanging)
        signal.alarm(PATIENCE)
        try:
            if kind == "journal":
                head, entries, _ = read_journal(path)
                true = read_entries(whole)
                counts["BAD: a journal's line that was not written"] += any(e not in true for e in entries)
            elif kind.startswith("rows"):
                check_rows(kind.split()[-1], path)
            elif kind.startswith("order"):
                read_order(path)
            else:
                schema.read(path, kind.split()[0])
        except ValueError as error:
            counts["damaged files refused in one line"] += 1
            counts["BAD: more than one line"] += "\n" in str(error)
        except Hang:
            counts["BAD: hangs"] += 1
        except Exception as error:
            counts["BAD: tracebacks from damaged files"] += 1
            print(kind, repr(error), content[:300], file=sys.stderr)
        else:
            counts[
                f"damaged files read as they are: {kind.split()[-1] if 'checksum' in kind else kind.split()[0]}"
            ] += 1
            counts["BAD: damage accepted though a checksum tells"] += sealed_and_changed(kind, whole, content)
        finally:
            signal.alarm(0)
        counts["damaged files"] += 1
    return counts


class Hang(BaseException):
    pass


def hanging(number, frame):
    raise Hang


def sealed_and_changed(kind, whole, content):
    """Whether what was accepted still carries its checksum, and says something else than what was sealed."""
    if kind not in ("order", "result", "compare", "cell"):
        return False
    before, now = json.loads(whole), json.loads(content.decode("utf-8-sig"))
    marks = now.get("meta", {}) if kind == "order" else now
    return before != now and bool({"schema", "checksum"} & marks.keys())


def journal_of(commands):
    """Return the journal that a search leaves which is killed half way."""
    command = commands["search cached"]
    for part in range(40, 100, 3):
        command.run(command.seconds * part / 100)
        found = list(command.folder.glob("*.journal"))
        content = found[0].read_bytes() if found else b""
        shutil.rmtree(command.folder, ignore_errors=True)
        if content.count(b"\n") > 3:
            return content
    raise AssertionError("no journal was found at any moment")


def read_entries(content):
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        from lib.journal import read_journal

        return read_journal(file.name)[1]


if __name__ == "__main__":
    main()
