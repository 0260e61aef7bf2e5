"""Packages and networks that are not there: what needs none works, the rest is refused in one line."""

import contextlib
import http.server
import shutil
import sys
import sysconfig
import threading
from pathlib import Path

import pytest
import transformers
from command_line import SMALL, assert_refused, flags, scores, shell, tree, write_gguf


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Return options for shell() under which the optional packages are not installed."""
    folder = tmp_path_factory.mktemp("site")
    absent = ("accelerate", "datasets", "gguf", "lm_eval", "matplotlib", "lm-eval")
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site).iterdir():
            if entry.name.split("-")[0].split(".")[0].lower() not in absent:
                with contextlib.suppress(FileExistsError):
                    (folder / entry.name).symlink_to(entry)
    names = {path.name.split("-")[0] for path in folder.glob("*.dist-info")}
    assert "torch" in names and "datasets" not in names
    return {"python": ("-S",), "PYTHONPATH": str(folder)}  # -S: no other site-packages


def test_a_search_on_local_text_needs_no_optional_package(bare, toy_folder, text, tmp_path, searched):
    words = flags(model_path=toy_folder(), cal_dataset=text, ppl_search_path=tmp_path, del_block_num=3, **SMALL)
    run = shell("block_search.py", *words, **bare)
    assert run.code == 0, run
    assert scores(tmp_path / searched[2].name) == scores(searched[2])
    assert run.out.count("no pictures: pip install matplotlib") == 1 and not list(tmp_path.glob("*.png"))


def test_a_gguf_file_without_the_gguf_package_is_refused(bare, toy_folder, text, tmp_path):
    pytest.importorskip("gguf")
    path, out = tmp_path / "model.gguf", tmp_path / "out"
    folder = toy_folder(vocab_size=257, num_key_value_heads=4)
    write_gguf(path, transformers.AutoModelForCausalLM.from_pretrained(folder))
    run = shell("block_search.py", *flags(model_path=path, cal_dataset=text, ppl_search_path=out, **SMALL), **bare)
    assert_refused(run, str(path), "'gguf'", "install")
    assert not out.exists()


def test_tasks_without_lm_eval_are_refused(bare, toy_folder, text, tmp_path):
    output = tmp_path / "new" / "result.json"
    words = flags(model_path=toy_folder(), cal_dataset=text, do_eval=True, output_path=output, **SMALL)
    assert_refused(shell("eval.py", *words, **bare), "lm_eval", "pip install")
    assert tree(tmp_path) == {}


def test_a_named_data_set_without_datasets_is_refused(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails
    refused("--cal-dataset wikitext2", "datasets", "--data-dir", cal_dataset="wikitext2")


def test_a_hub_name_without_network_is_refused_without_retries(text, tmp_path):
    home, out = tmp_path / "home", tmp_path / "out"
    words = flags(model_path="owner/model", cal_dataset=text, ppl_search_path=out, **SMALL)
    run = shell("block_search.py", *words, HF_HOME=str(home))
    assert_refused(run, "owner/model", "cannot be reached", "local path", "config.json", ".gguf")
    assert not out.exists()


def test_a_name_that_the_hub_does_not_know_is_refused(text, tmp_path):
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        words = flags(model_path="owner/modle", cal_dataset=text, ppl_search_path=tmp_path / "out", **SMALL)
        address = f"http://127.0.0.1:{hub.server_port}"
        run = shell(
            "block_search.py", *words, HF_HOME=str(tmp_path / "home"), HF_ENDPOINT=address, NO_PROXY="127.0.0.1"
        )
        hub.shutdown()
    assert_refused(run, "owner/modle", "404", "check the name")
    assert not (tmp_path / "out").exists()


def test_tasks_whose_rows_are_out_of_reach_are_refused_before_the_model_is_read(toy_folder, text, tmp_path):
    pytest.importorskip("lm_eval.tasks")
    model = tmp_path / "model"
    shutil.copytree(toy_folder(), model)
    (model / "model.safetensors").write_bytes(b"")
    words = flags(model_path=model, cal_dataset=text, do_eval=True, tasks="piqa", **SMALL)
    run = shell("eval.py", *words, HF_HOME=str(tmp_path / "home"))
    assert_refused(run, "--tasks piqa", "cannot be reached", "--task-data", ".jsonl")


def test_a_named_data_set_without_network_is_refused_without_retries(toy_folder, tmp_path):
    pytest.importorskip("datasets")
    home, out = tmp_path / "home", tmp_path / "out"
    words = flags(model_path=toy_folder(), cal_dataset="alpaca", ppl_search_path=out, **SMALL)
    run = shell("block_search.py", *words, HF_HOME=str(home))
    assert_refused(run, "--cal-dataset alpaca", "tatsu-lab/alpaca", "--data-dir", "alpaca-test.jsonl")
    assert not out.exists()


def test_a_cached_hub_model_is_searched_without_network(toy_folder, text, tmp_path):
    revision = "0123456789" * 4
    cache = tmp_path / "home" / "hub" / "models--owner--model"
    shutil.copytree(toy_folder(), cache / "snapshots" / revision)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(revision)
    words = flags(
        model_path="owner/model", cal_dataset=text, ppl_search_path=tmp_path / "out", del_block_num=1, **SMALL
    )
    run = shell("block_search.py", *words, HF_HOME=str(tmp_path / "home"))
    assert run.code == 0 and "Retrying" not in run.err, run
    assert run.result["order_file"].endswith("model_mix_text_ns_20_del_order_list.json")
