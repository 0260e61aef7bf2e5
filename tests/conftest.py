import logging
import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from command_line import SMALL, Run, assert_refused, flags, shell, tree

torch.set_num_threads(1)  # toys gain nothing from more, and wait long for each other on a busy machine
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


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """60 documents of some 60 bytes."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    documents = [f"Document {i}: {i * 37 % 101} quick foxes jump over {i * 7} lazy dogs and back." for i in range(60)]
    path.write_text("\n\n".join(documents))
    return path


@pytest.fixture
def call(capfd, tmp_path, monkeypatch):
    """Return a function that runs main() here, as a process of its own would end: (main, *words) -> Run."""
    monkeypatch.chdir(tmp_path)  # whatever a default path would write shows up

    def run(main, *words):
        code, threads = 0, torch.get_num_threads()
        capfd.readouterr()
        torch.set_num_threads(1)  # as shell(): sums in another order would be other numbers
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            warnings.simplefilter("always", FutureWarning)
            for name in ("transformers", "huggingface_hub"):
                for handler in logging.getLogger(name).handlers:
                    if type(handler) is logging.StreamHandler:  # made at import, for the stderr of then
                        monkeypatch.setattr(handler, "stream", sys.stderr)
            try:
                main(list(words))
            except SystemExit as error:
                code = error.code
            finally:
                torch.set_num_threads(threads)
        out, err = capfd.readouterr()
        if isinstance(code, str):  # the interpreter prints it
            code, err = 1, err + code + "\n"
        err += "".join(f"{warning.category.__name__}: {warning.message}\n" for warning in caught)
        return Run(code, out, err)

    return run


@pytest.fixture
def search(call, toy_folder, text, tmp_path):
    """Return a function that runs block_search.main on the toy, its order going to tmp_path/out."""
    import block_search

    def run(**changes):
        given = {"model_path": toy_folder(), "cal_dataset": text, "ppl_search_path": tmp_path / "out", **SMALL}
        return call(block_search.main, *flags(**{**given, "del_block_num": 2, **changes}))

    return run


@pytest.fixture
def evaluate(call, toy_folder, text):
    """Return a function that runs eval.main on the toy."""
    import eval as evaluation  # the builtin keeps its name

    def run(**changes):
        return call(evaluation.main, *flags(**{"model_path": toy_folder(), "cal_dataset": text, **SMALL, **changes}))

    return run


@pytest.fixture
def refused(search, evaluate, tmp_path):
    """Return a function that expects a refusal, in one line with `says` in it, with nothing written."""

    def run(*says, script="search", **changes):
        before = tree(tmp_path)
        assert_refused({"search": search, "eval": evaluate}[script](**changes), *says)
        assert tree(tmp_path) == before

    return run


@pytest.fixture(scope="session")
def searched(toy_folder, text, tmp_path_factory):
    """A search of 3 blocks by a real process: (Run, folder, order file)."""
    folder = tmp_path_factory.mktemp("searched")
    run = shell(
        "block_search.py",
        *flags(
            model_path=toy_folder(), cal_dataset=text, ppl_search_path=folder / "new" / "ppls", del_block_num=3, **SMALL
        ),
    )
    name = f"{toy_folder().name}_mix_text_ns_20_del_order_list.json"
    return run, folder / "new" / "ppls", folder / "new" / "ppls" / name


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Keep remote code that this process loads out of the user's cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.fixture
def damaged(toy_folder, tmp_path):
    """Return a function that copies the toy and edits one of its files: (name, edit bytes) -> folder."""

    def copy(name=None, edit=None):
        folder = tmp_path / "damaged"
        shutil.copytree(toy_folder(), folder)
        if edit:
            (folder / name).write_bytes(edit((folder / name).read_bytes()))
        elif name:
            for path in folder.glob(name):
                path.unlink()
        return folder

    return copy
