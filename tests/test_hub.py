"""What lies at a path that is no model, and what a model is called."""

import json

import pytest

from lib.hub import locate, model_name
from lib.orders import order_path


def put(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def test_a_folder_of_the_hubs_cache_has_the_models_name(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = put(tmp_path / "models--owner--some-name" / "snapshots" / commit, config__json="{}", model__safetensors="")
    assert model_name(cache) == model_name(f"{cache}/") == "owner/some-name"
    assert order_path("ppls", cache, "mix", "alpaca", 8).name == "some-name_mix_alpaca_ns_8_del_order_list.json"
    (tmp_path / "link").symlink_to(cache)
    assert model_name(tmp_path / "link") == "owner/some-name"
    put(cache, small__gguf="")
    assert model_name(cache / "small.gguf") == "small.gguf"
    with pytest.raises(
        ValueError, match=f"the hub's cache of owner/some-name; give that name, or .*snapshots/{commit}"
    ):
        locate(tmp_path / "models--owner--some-name")


def test_other_models_keep_their_names(tmp_path, monkeypatch):
    folder = put(tmp_path / "snapshots" / "mine")
    assert model_name(folder) == "mine"
    assert model_name("owner/name") == "owner/name"
    monkeypatch.chdir(folder)
    assert model_name(".") == "mine"


def test_an_adapter_is_named_with_its_base(tmp_path):
    settings = json.dumps({"base_model_name_or_path": "owner/base"})
    folder = put(tmp_path / "lora", adapter_config__json=settings, adapter_model__safetensors="", config__json="{}")
    with pytest.raises(ValueError, match="an adapter of owner/base: .*merge_and_unload"):
        locate(folder)
    put(folder, model__safetensors="")
    assert locate(folder) == (str(folder), None), "merged already"


def test_a_part_of_a_split_gguf_says_how_to_merge_it(tmp_path):
    for name in ("big-00002-of-00003.gguf", "big-00002-of-00003.GGUF"):
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(ValueError, match="part 2 of a .gguf in 3 parts.*--merge big-00001-of-00003.gguf"):
            locate(tmp_path / name)
    (tmp_path / "small-00001-of-00001.gguf").write_bytes(b"GGUF")
    assert locate(tmp_path / "small-00001-of-00001.gguf")[1] == "small-00001-of-00001.gguf"


def test_capitals_do_not_matter_to_a_gguf(tmp_path):
    (tmp_path / "SMALL.GGUF").write_bytes(b"GGUF")
    assert locate(tmp_path / "SMALL.GGUF") == (str(tmp_path), "SMALL.GGUF")
    with pytest.raises(ValueError, match="it holds SMALL.GGUF: give that file"):
        locate(tmp_path)
    assert order_path("p", tmp_path / "SMALL.GGUF", "mix", "pydoc", 8).name.startswith("SMALL_mix_")


@pytest.mark.parametrize("name", ["consolidated.00.pth", "openvino_model.bin", "tf_model.h5"])
def test_weights_of_another_format_are_named(tmp_path, name, monkeypatch):
    folder = put(tmp_path / "model", config__json="{}")
    (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"folder without weights .*{name} is of another format"):
        locate(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="weights are pickled .pytorch_model.bin.*or allow pickled weights"):
        locate(folder)
    monkeypatch.setattr("lib.hub.PICKLED", True)
    assert locate(folder) == (str(folder), None)


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("alpaca", "alpaca"),
        ("data/my text.txt", "my text"),
        ("a.b/c.d.JSONL.gz", "c.d"),
        ("owner/name/v1:test[:10%]:body", "owner-name-v1-test-10-body"),
        ("alpaca*2+data/c4.jsonl", "alpacax2+c4"),
    ],
)
def test_a_data_set_has_a_name_that_a_file_can_have(dataset, name):
    assert order_path("p", "m", "mix", dataset, 8).name == f"m_mix_{name}_ns_8_del_order_list.json"


def test_an_order_file_from_windows_is_read(tmp_path):
    from lib.orders import read_order

    path = tmp_path / "order.json"
    path.write_bytes(b'\xef\xbb\xbf{"1": [["mha", 3]]}')
    assert read_order(path) == ([("mha", 3)], {})
