"""Peak anonymous memory of a process: what it cannot give back, unlike the pages of the files it reads (Linux)."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads its own memory as Linux shows it")


def anonymous():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def peak(run):
    """Return the bytes that run() adds at most, its result included."""
    before, most, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = run()
    done.set()
    watcher.join()
    del kept
    return most[0] - before


def in_fresh_process(code, *arguments):
    """Run code, which sees peak() and a torch of one thread; return the integers it prints.

    Only a process that has freed nothing yet shows all that is taken; toy tensors are small enough for glibc to keep
    once freed, where real ones always go back to the system, hence its threshold.
    """
    head = "import sys, torch\ntorch.set_num_threads(1)\nsys.path.insert(0, 'tests')\nfrom memory import peak\n"
    done = subprocess.run(
        [sys.executable, "-c", head + code, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"},
        check=True,
    )
    return [int(word) for word in done.stdout.split()]
