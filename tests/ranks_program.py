"""Searches in one process of several, for tests/test_ranks.py: `torchrun ... ranks_program.py JSON`.

JSON: {"runs": [words of block_search.py, ...], "dies": [rank, after so many answers] or absent}.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import block_search
from scripts import ending

given = json.loads(sys.argv[1])
torch.set_num_threads(1)
block_search.draw = lambda *_, **__: None
if given.get("dies") and int(os.environ.get("RANK", 0)) == given["dies"][0]:
    left = [given["dies"][1]]

    def check():
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    ending.check = check


def main():
    for words in given["runs"]:
        block_search.main(words)


ending.run(main)
