"""BOS in every window of a model that needs it, from the command line to the files."""

import json

import pytest


@pytest.mark.parametrize(("family", "bos"), [("gemma3", "every-window"), ("llama", "text")])
def test_a_search_gives_gemma_a_bos_in_every_window(search, toy_folder, monkeypatch, family, bos):
    from lib import data, model

    seen, cut, load = [], data.cut_windows, model.load_tokenizer

    def with_bos(*args, **kwargs):
        tokenizer = load(*args, **kwargs)
        tokenizer.add_special_tokens({"bos_token": "Q"})
        return tokenizer

    monkeypatch.setattr(model, "load_tokenizer", with_bos)
    monkeypatch.setattr(data, "cut_windows", lambda *args, **kwargs: seen.append(cut(*args, **kwargs)) or seen[-1])
    found = search(model_path=toy_folder(family))
    first = set(seen[0][:, 0].tolist())
    assert (len(first) == 1) == (bos == "every-window")
    meta = json.loads(open(found.result["order_file"]).read())["meta"]
    assert meta["bos"] == bos
