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


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """Return a function that saves a toy of tests/families.py, once, and returns its folder: (name, **overrides).

    A byte-level tokenizer lies beside the weights; it needs a vocabulary of 256, which is the default here.
    """
    import families

    saved = {}

    def folder(name="llama", **overrides) -> Path:
        key = (name, *sorted(overrides.items()))
        if key not in saved:
            saved[key] = tmp_path_factory.mktemp("models") / f"{name}-{len(saved)}"
            families.toy(name, **{"vocab_size": 256, **overrides}).save_pretrained(saved[key])
            byte_tokenizer().save_pretrained(saved[key])
        return saved[key]

    return folder


def byte_tokenizer():
    """Return a tokenizer whose 256 tokens are the bytes, made without any file."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
