"""Files that were made to harm: nothing is built, run or written for them, and one line says why."""

import json
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from command_line import SMALL, flags, shell
from safetensors.torch import load_file

from lib import hub
from lib.model import load_model, load_tokenizer, skeleton


def edited(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("changes", (dict(num_hidden_layers=10**6), dict(num_hidden_layers=10**30), dict(n_layer=1e9)))
def test_layers_without_end_are_refused_before_they_are_built(damaged, changes):
    folder, start = edited(damaged(), **changes), time.perf_counter()
    with pytest.raises(ValueError, match="cannot read its configuration .*, more than 1024"):
        skeleton(folder)
    assert time.perf_counter() - start < 5


def test_experts_without_end_are_refused(damaged):
    with pytest.raises(ValueError, match="num_local_experts is 10000000, more than 4096"):
        skeleton(edited(damaged(), num_local_experts=10**7))


def test_layers_without_end_in_a_gguf_are_refused(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "toy.gguf", "llama")
    writer.add_block_count(10**6)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="layers is 1000000, more than 1024"):
        skeleton(tmp_path / "toy.gguf")


def test_a_configuration_far_larger_than_its_weights_is_refused_before_they_are_made(damaged):
    folder = edited(damaged(), intermediate_size=2**24)
    with pytest.raises(ValueError, match="describes .* parameters, its weight files hold .* bytes"):
        load_model(folder, "fp32")


@pytest.mark.parametrize("name", ("config.json", "model.safetensors", "tokenizer.json"))
@pytest.mark.parametrize("kind", ("pipe", "device", "loop", "link to nothing"))
def test_only_regular_files_are_read_of_a_model(damaged, name, kind):
    folder = damaged(name)
    path = folder / name
    {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(name),
        "link to nothing": lambda: path.symlink_to("nowhere"),
    }[kind]()
    with pytest.raises(ValueError, match=f"{name} in it is (no regular file|a link to nothing)"):
        hub.locate(folder)


@pytest.mark.parametrize("name", ("pipe", "loop", "nothing"))
def test_a_model_path_that_is_no_folder_and_no_file_is_one_line(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="neither a folder nor a regular file|no such file"):
        hub.locate(tmp_path / name)


class Code:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_weights_need_to_be_asked_for_and_run_no_code_then(damaged, tmp_path, monkeypatch):
    folder, mark = damaged(), tmp_path / "code ran"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    monkeypatch.setattr(hub, "PICKLED", False)  # as a process begins
    with pytest.raises(ValueError, match="pickled"):
        load_model(folder, "fp32")
    monkeypatch.setattr(hub, "PICKLED", True)
    state = load_model(folder, "fp32").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    torch.save({**weights, "more": Code(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot read its weights"):
        load_model(folder, "fp32")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Code(mark)))
    assert mark.exists()  # the test could fail


def test_a_models_own_code_is_not_run_unless_asked(damaged, tmp_path):
    folder, mark = damaged(), tmp_path / "code ran"
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
    code += "from transformers import LlamaConfig, LlamaForCausalLM\nclass C(LlamaConfig):\n    model_type = 'own'\n"
    code += "class M(LlamaForCausalLM):\n    config_class = C\n"
    (folder / "own.py").write_text(code)
    edited(folder, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    with pytest.raises(ValueError, match="it runs code of its own"):
        skeleton(folder)
    assert not mark.exists()
    load_tokenizer(folder)
    assert not mark.exists()
    skeleton(folder, trust_remote_code=True)
    assert mark.exists()  # the test could fail


WATCH = """
import os, runpy, sys
out, found = sys.argv.pop(1), []
sys.argv.pop(0)
def watch(event, args):
    if event == "open":
        path, mode, how = args
        writes = set(mode) & set("wax+") if isinstance(mode, str) else how & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        path, writes = args[0] if args else None, event in ("os.mkdir", "os.rename", "os.remove", "os.symlink")
    if writes and isinstance(path, (str, os.PathLike)):
        path = os.path.abspath(path)
        found.extend([path] if not path.startswith((out, "/dev/", "/proc/")) else [])
sys.addaudithook(watch)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(*dict.fromkeys(found), sep="\\n", file=sys.stderr)
"""


@pytest.mark.parametrize("script", ("block_search.py", "eval.py"))
def test_nothing_is_written_outside_the_output(toy_folder, text, tmp_path, script):
    out, given = tmp_path / "out", dict(model_path=toy_folder(), cal_dataset=text, **SMALL)
    given |= (
        dict(ppl_search_path=out, del_block_num=1) if script == "block_search.py" else dict(output_path=out / "r.json")
    )
    (tmp_path / "home").mkdir()  # of the libraries' caches and temporary files, torch's among them
    environment = {
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "home"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "home"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "MPLCONFIGDIR": str(out / "fonts"),
    }
    run = shell("-c", WATCH, str(out), script, *flags(**given), **environment)
    assert run.code == 0
    said = [line for line in run.err.replace("\r", "\n").splitlines() if line.startswith("/")]
    assert [path for path in said if not path.startswith(str(tmp_path / "home"))] == [], said
    assert not [path for path in said if "blockpruner" in path.lower()], "nothing of ours in the caches"
