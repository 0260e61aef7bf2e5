"""Bad input to the two scripts: exit code 2, one line that says what was given and what to do, nothing written.

Packages and networks that are not there have tests/test_absent.py.
"""

import json
import os
import shutil

import pytest
import torch
import transformers
from command_line import SMALL, assert_refused, flags, shell, tree
from safetensors.torch import load_file, save_file

from lib.orders import read_order

WEIGHTS = "model.safetensors"


# ---- models that cannot be searched --------------------------------------------------------------


def edit_weights(folder, edit):
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("script", ("search", "eval"))
def test_a_missing_model_is_refused(refused, tmp_path, script):
    refused("--model-path", "nowhere", "no such file or folder", script=script, model_path=tmp_path / "nowhere")
    refused("nowhere.gguf", "no such file or folder", script=script, model_path="nowhere.gguf")
    refused("--model-path is missing", script=script, model_path="")


def test_a_file_that_is_no_model_is_refused(refused, text):
    refused(str(text), "model folder or a .gguf file", model_path=text)


@pytest.mark.parametrize(
    "name, edit, says",
    (
        ("config.json", lambda b: b[:40], ("configuration", "config.json")),
        ("config.json", lambda b: b"[]", ("configuration",)),
        ("config.json", lambda b: b"{}", ("configuration",)),
        ("config.json", None, ("without config.json",)),
        ("*.safetensors", None, ("without weights", "*.safetensors")),
        ("model.safetensors", lambda b: b[: len(b) // 2], ("weights", "download it again")),
        ("model.safetensors", lambda b: b"", ("weights", "download it again")),
        ("model.safetensors", lambda b: b"no tensors" * 9, ("weights", "download it again")),
        ("token*", None, ("tokenizer", "tokenizer.json")),
        ("tokenizer.json", lambda b: b[:99], ("tokenizer", "tokenizer.json")),
    ),
)
def test_an_incomplete_model_is_refused(refused, damaged, name, edit, says):
    folder = damaged(name, edit)
    refused(str(folder), *says, model_path=folder)


def test_a_checkpoint_with_a_missing_tensor_is_refused(toy_folder, damaged, text, tmp_path):
    folder = edit_weights(damaged(), lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    before = tree(tmp_path)
    words = flags(model_path=folder, cal_dataset=text, ppl_search_path=tmp_path / "out", del_block_num=2, **SMALL)
    assert_refused(
        shell("block_search.py", *words), str(folder), "model.layers.1.mlp.up_proj.weight", "complete checkpoint"
    )
    assert tree(tmp_path) == before


def test_a_checkpoint_with_other_shapes_than_its_config_is_refused(refused, damaged):
    def halve(weights):
        weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"][:24]

    folder = edit_weights(damaged(), halve)
    refused(str(folder), "model.layers.1.mlp.up_proj.weight", "(24, 32)", "(48, 32)", "config.json", model_path=folder)


def test_a_tokenizer_of_another_model_is_refused(refused, toy_folder, tmp_path):
    folder = tmp_path / "foreign"
    shutil.copytree(toy_folder(vocab_size=96), folder)
    for script in ("search", "eval"):
        refused(str(folder), "the model knows 0..95", "tokenizer", script=script, model_path=folder)


def test_a_checkpoint_without_one_of_its_files_is_refused(refused, damaged):
    folder = damaged()
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(load_file(folder / WEIGHTS))}
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    refused(str(folder), "model-00002-of-00002.safetensors", "a file is missing", model_path=folder)


SIZES = dict(vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
FOREIGN = {
    "encoder": ("BertForMaskedLM", "BertConfig", SIZES, ("BertForMaskedLM", "no causal language model")),
    "encoder-decoder": (
        "T5ForConditionalGeneration",
        "T5Config",
        dict(vocab_size=256, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        ("T5Config", "encoder-decoder"),
    ),
    "no transformer": (
        "MambaForCausalLM",
        "MambaConfig",
        dict(vocab_size=256, hidden_size=32, num_hidden_layers=2, state_size=4),
        ("MambaForCausalLM", "MambaBlock", "FAMILIES"),
    ),
    "unknown family": (
        "BertLMHeadModel",
        "BertConfig",
        dict(SIZES, is_decoder=True),
        ("BertLMHeadModel", "BertLayer", "FAMILIES"),
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_known_decoder_is_refused_by_name(refused, toy_folder, tmp_path, name):
    model, config, sizes, says = FOREIGN[name]
    folder = tmp_path / "foreign"
    getattr(transformers, model)(getattr(transformers, config)(**sizes)).save_pretrained(folder)
    for path in toy_folder().glob("token*"):
        shutil.copy(path, folder)
    (folder / WEIGHTS).write_bytes(b"")  # the configuration is enough to tell
    refused(*says, model_path=folder)
    refused(*says, model_path=folder, script="eval")


def test_a_damaged_gguf_is_refused(refused, tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "damaged.gguf"
    path.write_bytes(b"GGUF" + bytes(300))
    refused(str(path), model_path=path)
    path.write_bytes(b"")
    refused(str(path), model_path=path)


# ---- numbers of blocks ---------------------------------------------------------------------------


def test_more_blocks_than_there_are_is_refused(refused):
    refused("--del-block-num 7", "6 blocks (3 mha + 3 mlp)", "use 0..6", del_block_num=7)
    refused("--del-block-num 4", "3 blocks (all mha)", "use 0..3", del_block_num=4, block_type="mha")
    refused("--del-block-num 4", "3 blocks (all mlp)", "use 0..3", del_block_num=4, block_type="mlp")


@pytest.mark.parametrize("number", ("-1", "1.5", "many", ""))
def test_a_number_that_is_none_is_refused(refused, number):
    refused("--del-block-num", repr(number), "whole number from 0", del_block_num=number)
    refused("--del-block-num", repr(number), "whole number from 0", del_block_num=number, script="eval")


def test_unknown_words_are_refused(refused):
    refused("--block-type", "'attn'", "mha", "mlp", "mix", block_type="attn")
    refused("--compute-dtype", "'int8'", "bf16", compute_dtype="int8")
    refused("--del-blocks", del_blocks=3)
    refused("--cache-gb", "'inf'", cache_gb="inf")


def test_removals_that_the_order_does_not_hold_are_refused(refused, searched):
    refused(
        "--del-block-num 4", "holds 3 removals", "0..3", script="eval", ppl_search_file=searched[2], del_block_num=4
    )
    refused("--del-block-num 1", "--ppl-search-file", script="eval", del_block_num=1)


# ---- order files that are none -------------------------------------------------------------------

NO_ORDERS = {
    "empty": ("", "not a readable JSON"),
    "not json": ("mha 3", "not a readable JSON"),
    "truncated": ('{"1": [["mha", 0]], "2": [["mha', "not a readable JSON"),
    "deep": ("[" * 100_000, "not a readable JSON"),
    "endless number": ('{"1": [["mha", ' + "9" * 5000 + "]]}", "not a readable JSON"),
    "binary": (b"\x00\xff\xfe\x80" * 9, "not a readable JSON"),
    "a list": ('[["mha", 0]]', "not an order file"),
    "a string": ('"mha"', "not an order file"),
    "null": ("null", "not an order file"),
    "nothing": ("{}", "holds no removals"),
    "keys from 0": ('{"0": [["mha", 0]]}', 'no "1"'),
    "a gap": ('{"1": [["mha", 0]], "3": [["mha", 0], ["mha", 1], ["mha", 2]]}', 'no "2"'),
    "wrong keys": ('{"order": [["mha", 0]]}', 'no "1"'),
    "adds two": ('{"1": [["mha", 0], ["mlp", 1]]}', "exactly one block"),
    "adds none": ('{"1": [["mha", 0]], "2": [["mha", 0]]}', "exactly one block"),
    "repeats": ('{"1": [["mha", 0]], "2": [["mha", 0], ["mha", 0]]}', "exactly one block"),
    "forgets": ('{"1": [["mha", 0]], "2": [["mha", 1], ["mha", 1]]}', "exactly one block"),
    "out of range": ('{"1": [["mha", 3]]}', "3 layers (0..2)"),
    "far out of range": ('{"1": [["mha", ' + "9" * 4000 + "]]}", "no model has so many"),
    "negative": ('{"1": [["mha", -1]]}', "-1"),
    "unknown type": ('{"1": [["attn", 0]]}', "'attn'"),
    "float": ('{"1": [["mha", 1.0]]}', "1.0"),
    "nan": ('{"1": [["mha", NaN]]}', "nan"),
    "bool": ('{"1": [["mha", true]]}', "True"),
    "null layer": ('{"1": [["mha", null]]}', "None"),
    "text layer": ('{"1": [["mha", "0"]]}', "'0'"),
    "nested type": ('{"1": [[["mha"], 0]]}', "['mha']"),
    "nested layer": ('{"1": [["mha", [0]]]}', "[0]"),
    "triple": ('{"1": [["mha", 0, 0]]}', "expected a pair"),
    "bare pair": ('{"1": ["mha", 0]}', "expected a pair"),
    "null entry": ('{"1": null}', "expected a pair"),
    "long entry": ('{"1": [' + json.dumps("x" * 100_000) + "]}", "expected a pair"),
    "other layers": ('{"1": [["mha", 0]], "meta": {"layers": 32}}', "32 layers; this one has 3"),
    "odd layers": ('{"1": [["mha", 0]], "meta": {"layers": [3]}}', "layers holds [3], not a number of layers"),
    "a model that is no name": ('{"1": [["mha", 0]], "meta": {"model": 7}}', "model holds 7, not a string"),
    "odd meta": ('{"1": [["mha", 0]], "meta": [1]}', '"meta"'),
}


@pytest.mark.parametrize("name", NO_ORDERS)
def test_what_is_no_order_is_refused(refused, tmp_path, name):
    content, says = NO_ORDERS[name]
    path = tmp_path / "order.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(str(path), says, script="eval", ppl_search_file=path, del_block_num=1)


def test_an_order_that_is_not_there_is_refused(refused, tmp_path):
    refused("order.json: no such order file", script="eval", ppl_search_file=tmp_path / "order.json", del_block_num=1)
    refused(str(tmp_path), "not a readable JSON", script="eval", ppl_search_file=tmp_path, del_block_num=1)


def test_an_order_of_another_model_of_the_same_depth_is_warned_about(evaluate, tmp_path):
    path = tmp_path / "order.json"
    path.write_text(json.dumps({"1": [["mha", 0]], "meta": {"model": "models/Other-7b"}}))
    run = evaluate(ppl_search_file=path, del_block_num=1)
    assert run.code == 0 and len(run.err.splitlines()) == 1 and "warning: the order was searched on" in run.err


def test_a_model_larger_than_the_gpu_is_one_line(refused, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("lib.model.load_model", full)
    for script in ("search", "eval"):
        refused("the GPU's memory is full", "--device", "--offload", script=script)


def test_a_part_of_a_run_of_layers_is_warned_about(search, evaluate):
    path = search(metric="angular", block_type="layer", del_block_num=4).result["order_file"]
    run = evaluate(ppl_search_file=path, del_block_num=2)
    assert run.code == 0 and "warning: 2 of 4 blocks of a run of 2 layers" in run.err
    assert "warning" not in evaluate(ppl_search_file=path, del_block_num=4).err


# ---- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ("search", "eval"))
def test_text_that_is_too_short_is_refused(refused, text, script, tmp_path):
    refused("61 were asked for", "60 documents", "1..60", script=script, cal_nsamples=61)
    short = tmp_path / "short.txt"
    short.write_text("Just a few words.")
    refused("17 tokens", "less than one window of 64", script=script, cal_dataset=short, cal_nsamples=1)


def test_windows_that_the_model_cannot_hold_are_refused(refused):
    for script in ("search", "eval"):
        refused("--ppl-eval-seqlen 129", "128 positions", "2..128", script=script, ppl_eval_seqlen=129)
        refused("--ppl-eval-seqlen 1", script=script, ppl_eval_seqlen=1)


NO_TEXTS = {
    "latin1.txt": (b"caf\xe9", ("not UTF-8",)),
    "latin1.jsonl": (b'{"text": "caf\xe9"}', ("not UTF-8",)),
    "empty.txt": (b"\n\n \n\n", ("holds no text",)),
    "empty.jsonl": (b"", ("holds no text",)),
    "empty.json": (b"[]", ("holds no text",)),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n', ("line 3", "jsonl")),
    "broken.json": (b'[{"text": "a"},', ("json",)),
    "deep.json": (b"[" * 100_000, ("json",)),
    "deep.jsonl": (b"[" * 100_000, ("json",)),
    "number.jsonl": (b"3\n4\n", ("records",)),
    "object.json": (b'{"text": "a"}', ("records",)),
    "null.jsonl": (b'{"text": null}\n{"text": null}\n', ("no text in column text of its 2 records",)),
    "list.jsonl": (b'{"text": "a"}\n{"text": ["b"]}\n', ("record 2", "column text but list")),
    "column.jsonl": (b'{"title": "a", "body": "b"}\n', ("no column text", "title, body")),
    "chat.jsonl": (b'{"messages": [{"role": "user", "content": "a"}]}\n', ("no column text", "chat template")),
    "cut.jsonl.gz": (b"\x1f\x8b\x08", ("cannot be read as jsonl",)),
    "broken.parquet": (b"PAR1 and no more", ("parquet",)),
    "text.md": (b"text\na\n", ("must end in", ".jsonl")),
}


@pytest.mark.parametrize("name", NO_TEXTS)
def test_what_is_no_text_is_refused(refused, tmp_path, name):
    content, says = NO_TEXTS[name]
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    refused(str(path), *says, cal_dataset=path)


def test_parquet_without_text_is_refused(refused, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pa.table({"text": [None, None], "number": [1, 2]}), path)
    refused(str(path), "no text in column text", cal_dataset=path)
    refused(str(path), "record 1", "number", cal_dataset=path, text_column="number")
    refused("no column body", "text, number", cal_dataset=path, text_column="body")


def test_unknown_text_is_refused(refused, tmp_path, text):
    refused("absent.txt: neither", "alpaca, wikitext2", ".jsonl", cal_dataset="absent.txt")
    refused(f"{tmp_path}: neither", cal_dataset=tmp_path)
    refused("one file without splits", "none called test", cal_split="test")
    refused("no split dev", "train, validation, test", cal_dataset="alpaca", cal_split="dev")
    refused("no such folder of data", cal_dataset="alpaca", data_dir=tmp_path / "absent")
    refused(f"{tmp_path}: holds neither", "alpaca-test", ".jsonl", cal_dataset="alpaca", data_dir=tmp_path)


def test_texts_without_columns_take_no_text_column(refused, tmp_path, text):
    strings = tmp_path / "strings.json"
    strings.write_text('["a", "b"]')
    for given in (text, strings, "pydoc"):
        refused("none is called body", str(given), "name no column", cal_dataset=given, text_column="body")


def test_a_text_column_that_a_local_copy_lacks_is_refused(search, refused, tmp_path):
    rows = [{"sentence": f"number {i} and more words to fill a window of tokens"} for i in range(30)]
    (tmp_path / "ptb-test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused("no column body", "sentence", cal_dataset="ptb", data_dir=tmp_path, text_column="body")
    assert search(cal_dataset="ptb", data_dir=tmp_path).code == 0  # its own column needs no flag


# ---- places and devices --------------------------------------------------------------------------


def test_a_place_that_cannot_be_written_is_refused(refused, text):
    refused("--ppl-search-path", str(text), "not a folder", ppl_search_path=text / "ppls")
    refused("--ppl-search-path", str(text), "not a folder", ppl_search_path=text)
    refused("too long", ppl_search_path="x" * 300)
    refused("--output-path", str(text), "not a folder", script="eval", output_path=text / "result.json")
    refused("--output-path", "a folder", "file name", script="eval", output_path=text.parent)


def test_a_folder_without_permission_is_refused(refused, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("root may write everywhere")
    refused("--ppl-search-path", "not writable", ppl_search_path=locked / "ppls")
    refused("--output-path", "not writable", script="eval", output_path=locked / "result.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(refused):
    for script in ("search", "eval"):
        refused("--device cuda", "no CUDA GPU", "use cpu", script=script, device="cuda")
    refused("--device cuda:3", "no CUDA GPU", device="cuda:3")


def test_an_unknown_device_is_refused(refused):
    refused("--device tpu", "cpu, cuda or cuda:N", device="tpu")
    refused("--device mps", "cpu and cuda", device="mps")


def test_unknown_tasks_are_refused(refused, tmp_path):
    pytest.importorskip("lm_eval.tasks")
    given = dict(script="eval", do_eval=True, task_data=tmp_path)
    refused("'no_such_task'", "piqa", **given, tasks="no_such_task")
    refused("piqa.jsonl", **given, tasks="piqa")
    refused("--limit", "boolq", "piqa", script="eval", limit="boolq=3", tasks="piqa")


# ---- numbers that are none -----------------------------------------------------------------------


def overflow_in_layer_1(weights):
    """Make layer 1's MLP overflow at the letter e: only that letter has a value in the last dimension."""
    weights["model.embed_tokens.weight"][:, -1] = 0
    weights["model.embed_tokens.weight"][LETTER_E, -1] = 1
    for i in (0, 1):
        weights[f"model.layers.{i}.self_attn.o_proj.weight"][-1] = 0
    weights["model.layers.0.mlp.down_proj.weight"][-1] = 0
    for name in ("gate", "up"):
        weights[f"model.layers.1.mlp.{name}_proj.weight"][0, -1] = 1e30


def nan_in_layer_1(weights):
    weights["model.layers.1.mlp.up_proj.weight"][:] = float("nan")


def nan_at_a_letter(weights):
    weights["model.embed_tokens.weight"][LETTER_E] = float("nan")


def nan_in_the_last_norm(weights):
    weights["model.norm.weight"][:] = float("nan")


LETTER_E = ord("e") - ord("!")  # its token: the printable bytes come first


@pytest.mark.parametrize("damage", (overflow_in_layer_1, nan_in_layer_1))
def test_the_block_that_overflows_goes_first(search, damaged, tmp_path, damage):
    run = search(model_path=edit_weights(damaged(), damage))
    assert run.code == 0, run
    order, meta = read_order(tmp_path / "out" / "damaged_mix_text_ns_20_del_order_list.json")
    assert order[0] == ("mlp", 1) and len(order) == 2
    first, second = meta["steps"]
    assert {block for block, score in first["scores"].items() if score != "nan"} == {"mlp1"}
    assert all(isinstance(score, float) for score in second["scores"].values())
    warning = next(line for line in run.out.splitlines() if line.startswith("warning"))
    assert all(block in warning for block in ("mha0", "mha1", "mha2", "mlp0", "mlp2")) and "mlp1" not in warning
    assert "dense model's perplexity is nan" in run.err and "--compute-dtype" not in run.err, "it is fp32"


@pytest.mark.parametrize("damage", (nan_at_a_letter, nan_in_the_last_norm))
def test_a_model_without_any_finite_candidate_stops_after_saving_why(search, evaluate, damaged, tmp_path, damage):
    model = edit_weights(damaged(), damage)
    run = search(model_path=model)
    assert run.code == 1, run
    path = tmp_path / "out" / "damaged_mix_text_ns_20_del_order_list.json"
    last = run.err.splitlines()[-1]
    assert (
        "block_search.py: error: step 1: all 6 candidates" in last
        and str(path) in last
        and "--compute-dtype" not in last
    )
    assert "Traceback" not in run.err
    order, meta = read_order(path)
    assert order == [] and set(meta["failed"]["candidates"].values()) == {"nan"}
    assert search(model_path=model).code == 1, "it resumes, and fails again"
    assert_refused(evaluate(model_path=model, ppl_search_file=path, del_block_num=1), "holds 0 removals")
