import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # lib/ and the scripts are imported from the checkout


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data files; tests that ask for it skip where it is absent."""
    folder = Path(os.environ.get("BLOCKPRUNER_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}: name a folder in BLOCKPRUNER_DATA")
    return folder
