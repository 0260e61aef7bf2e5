"""scripts/export.py and eval.py --export-path: what they write, and bad input refused in one line with nothing left."""

import json
import os
import resource
import shutil

import pytest
import torch
from command_line import assert_refused, flags, shell, tree, write_gguf
from conftest import byte_tokenizer
from families import toy
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import lib.export.checkpoint
import lib.export.folder
from lib.blocks import Block
from lib.decoder import Decoder
from lib.orders import read_order, save_order
from scripts import export

ORDER = [Block("mlp", 1), Block("mha", 0), Block("mha", 2), Block("mlp", 0), Block("mha", 1), Block("mlp", 2)]
WEIGHTS = "model.safetensors"
IDS = torch.arange(40).view(2, 20) + 32


@pytest.fixture(autouse=True)
def modules_cache(tmp_path_factory, monkeypatch):
    """Keep remote code out of the user's cache."""
    folder = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
    monkeypatch.syspath_prepend(folder)


@pytest.fixture
def order(tmp_path_factory, toy_folder):
    """An order that removes every block of the toy."""
    path = tmp_path_factory.mktemp("orders") / "order.json"
    steps = [{"block": b, "perplexity": 20.0 + k, "removed_percent": k, "seconds": 1} for k, b in enumerate(ORDER, 1)]
    meta = {"model": str(toy_folder()), "layers": 3, "dense_perplexity": 20.0, "dataset": "alpaca", "steps": steps}
    save_order(path, ORDER, meta)
    return path


@pytest.fixture
def write(call, toy_folder, order, tmp_path):
    """Return a function that runs scripts.export.main on the toy, without its first three blocks."""

    def run(**changes):
        given = {"model_path": toy_folder(), "ppl_search_file": order, "output_dir": tmp_path / "out"}
        how_many = {} if {"target_ratio", "remove"} & changes.keys() else {"del_block_num": 3}
        given = {k: v for k, v in {**given, **how_many, **changes}.items() if v is not None}
        return call(export.main, *flags(**given))

    return run


@pytest.fixture
def refuses(write, tmp_path):
    def run(*says, **changes):
        before = tree(tmp_path)
        assert_refused(write(**changes), *says)
        assert tree(tmp_path) == before, "something was left behind"

    return run


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(input_ids=ids).logits


# ---- what is written -----------------------------------------------------------------------------


def test_one_command_makes_a_folder_that_transformers_loads(toy_folder, order, tmp_path):
    """A real process; the model is a hub's, in the cache of a machine without network."""
    out, revision = tmp_path / "new" / "out", "0123456789" * 4
    cache = tmp_path / "home" / "hub" / "models--owner--model"
    shutil.copytree(toy_folder(), cache / "snapshots" / revision)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(revision)
    words = flags(model_path="owner/model", ppl_search_file=order, del_block_num=3, output_dir=out)
    run = shell("scripts.export", *words, python=("-m",), HF_HOME=str(tmp_path / "home"))
    assert run.code == 0 and run.err == f"warning: the order was searched on {toy_folder().name}\n", run
    assert os.listdir(out.parent) == ["out"]
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    dense = AutoModelForCausalLM.from_pretrained(toy_folder()).eval()
    with Decoder(dense).masked(ORDER[:3]):
        torch.testing.assert_close(logits(model), logits(dense))
    text = "Nothing but words."
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert tokenizer(text) == AutoTokenizer.from_pretrained(toy_folder())(text)
    result, info = run.result, model.config.pruning_info
    assert info["base_model"] == "owner/model"
    assert result["export"] == str(out) and result["format"] == "hf" and result["perplexity"] == 23.0
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert result["dense_parameters"] == sum(p.numel() for p in dense.parameters())
    assert result["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    assert info.items() <= result.items() and info["removed"] == ["mlp1", "mha0", "mha2"]
    assert info["search"] == {"dataset": "alpaca"} and info["versions"]["torch"] == torch.__version__
    assert model.config.source_blocks == ["mlp0, mha1 mlp2"]


def test_the_card_names_base_blocks_figures_and_licence(toy_folder, write, tmp_path):
    model = tmp_path / "base"
    shutil.copytree(toy_folder(), model)
    (model / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- text\n---\n# Base\n")
    (model / "LICENSE").write_text("Do as you like.")
    (model / "generation_config.json").write_text('{"max_length": 7, "transformers_version": "5.0.0"}')
    run = write(model_path=model)
    assert run.code == 0 and "order was searched on" in run.err
    header, text = (tmp_path / "out" / "README.md").read_text().split("---\n")[1:]
    assert 'license: "apache-2.0"' in header and 'base_model: "base"' in header
    for words in ("mlp1 mha0 mha2", "20.0000 | 23.0000", "alpaca", "trust_remote_code=True"):
        assert words in text
    assert (tmp_path / "out" / "LICENSE").read_text() == "Do as you like."
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_length"] == 7
    shutil.rmtree(tmp_path / "out")
    write(model_path=model, format="zeroed")
    assert "as large and as slow" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_names_another_metric_than_the_papers_and_every_licence(toy_folder, write, order, tmp_path):
    blocks, meta = read_order(order)
    how = {"metric": "angular", "block_type": "layer", "window": 2, "protect_first": 1, "protect_last": 0}
    save_order(tmp_path / "runs.json", blocks, meta | how)
    shutil.copytree(toy_folder(), tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense:\n- apache-2.0\n- mit\nlanguage: en\n---\n# Base\n")
    run = write(ppl_search_file=tmp_path / "runs.json", model_path=tmp_path / "base", del_block_num=2)
    assert run.result["search"] == {"dataset": "alpaca", **how}
    text = (tmp_path / "out" / "README.md").read_text()
    assert "chosen by angular, block type layer" in text and 'license: ["apache-2.0", "mit"]' in text
    write(output_dir=tmp_path / "paper")
    assert "found by BlockPruner" in (tmp_path / "paper" / "README.md").read_text()


@pytest.mark.parametrize(
    "dense, step",
    (
        (None, {"perplexity": 9.0}),
        (8.0, {"perplexity": None}),
        ("inf", {"perplexity": 9.0}),
        (8.0, {"perplexity": "nan"}),
        (8.0, 9.0),
        (8.0, {}),
    ),
)
def test_perplexities_that_are_no_numbers_are_left_out_of_the_card(write, tmp_path, dense, step):
    save_order(tmp_path / "o.json", ORDER[:1], {"layers": 3, "dense_perplexity": dense, "steps": [step]})
    run = write(ppl_search_file=tmp_path / "o.json", del_block_num=1)
    assert run.code == 0 and run.result["dense_perplexity"] == dense
    assert "| perplexity" not in (tmp_path / "out" / "README.md").read_text()


def test_what_is_stored_is_told_where_it_is_more(write, toy_folder, tmp_path):
    """decilm has a head of its own and pads: its file is larger than the pruned model."""
    run = write(format="decilm", model_path=toy_folder(tie_word_embeddings=True), del_block_num=1)
    stored = sum(tensor.numel() for tensor in load_file(tmp_path / "out" / WEIGHTS).values())
    assert run.result["stored_parameters"] == stored > run.result["dense_parameters"]
    info = json.loads((tmp_path / "out" / "config.json").read_text())["pruning_info"]
    assert info["stored_parameters"] == stored and f"{stored:,}" in run.out
    assert f"| parameters in the file | | {stored:,} |" in (tmp_path / "out" / "README.md").read_text()
    assert "stored_parameters" not in write(output_dir=tmp_path / "hf").result


@pytest.mark.parametrize("format", ("hf", "zeroed", "decilm"))
def test_settings_for_generation_are_found_in_an_old_configuration(write, damaged, format, tmp_path):
    def old(config):
        return json.dumps(json.loads(config) | {"temperature": 0.6, "max_length": 50, "do_sample": False}).encode()

    model = damaged("config.json", old)
    (model / "generation_config.json").unlink()
    assert write(model_path=model, format=format).code == 0
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.temperature, settings.max_length, settings.eos_token_id) == (0.6, 50, 2)


def test_a_tokenizer_of_two_files_is_found_beside_the_new_model_type(write, tmp_path):
    """GPT-2 as it was published: vocab.json and merges.txt, and the class by the model type."""
    toy("gpt2", vocab_size=256).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().backend_tokenizer.model.save(str(tmp_path / "gpt2"))
    wanted = AutoTokenizer.from_pretrained(tmp_path / "gpt2")("some words")["input_ids"]
    assert write(model_path=tmp_path / "gpt2").result["format"] == "hf"
    found = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)("some words")["input_ids"]
    assert found == wanted and len(wanted) == 10


def test_a_pruned_model_may_be_pruned_again_and_says_so(write, toy_folder, tmp_path):
    for format in ("stock", "zeroed"):
        once, twice = tmp_path / f"{format}-1", tmp_path / f"{format}-2"
        save_order(tmp_path / "layer.json", [Block("mha", 1), Block("mlp", 1)], {})
        given = dict(ppl_search_file=tmp_path / "layer.json", del_block_num=2, format=format)
        first = write(output_dir=once, **given).result
        second = write(model_path=once, output_dir=twice, **given).result
        config = json.loads((twice / "config.json").read_text())
        assert second["base_model"] == once.name and config["pruning_info"]["pruned_before"] == second["pruned_before"]
        assert all(second["pruned_before"][key] == first[key] for key in ("removed", "parameters", "versions"))
        assert second["pruned_before"]["base_model"] == toy_folder().name
        assert f"{once.name} was pruned before" in (twice / "README.md").read_text()


def test_a_zeroed_export_says_that_it_saves_nothing(write):
    assert "not gone" in write(format="zeroed").out


def test_a_ratio_takes_the_fewest_removals_that_reach_it(write, evaluate, toy_folder, order, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(toy_folder())
    names = {"mha": ("self_attn", "input_layernorm"), "mlp": (".mlp.", "post_attention_layernorm")}
    sizes = dict(model.named_parameters())
    total, gone, shares = sum(p.numel() for p in sizes.values()), 0, []
    for kind, i in ORDER[:5]:  # hf needs an attention
        mine = [n for n in sizes if f"layers.{i}." in n and any(part in n for part in names[kind])]
        gone += sum(sizes[n].numel() for n in mine)
        shares.append(gone / total)
    for k, ratio in ((0, 0), (1, shares[0] / 2), (1, shares[0]), (2, shares[0] + 1e-9), (4, shares[3] - 1e-9)):
        run = write(target_ratio=ratio, output_dir=tmp_path / str(ratio))
        assert len(run.result["removed"]) == k, run
    run = evaluate(ppl_search_file=order, target_ratio=shares[1])
    assert run.result["removed"] == ["mlp1", "mha0"]


def test_a_list_of_blocks_stands_for_an_order(write, evaluate, order, tmp_path):
    """The same blocks give the same files and the same perplexity."""
    given = {"remove": "mlp1,mha0", "ppl_search_file": None}
    named, ordered = write(**given, output_dir=tmp_path / "a"), write(del_block_num=2, output_dir=tmp_path / "b")
    assert named.result["removed"] == ordered.result["removed"] == ["mlp1", "mha0"]
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    assert "named one by one" in (tmp_path / "a" / "README.md").read_text()
    assert write(**given | {"remove": "layer0-1"}, output_dir=tmp_path / "c").result["removed"] == [
        "mha0",
        "mlp0",
        "mha1",
        "mlp1",
    ]
    one, other = evaluate(**given), evaluate(ppl_search_file=order, del_block_num=2)
    assert one.result["perplexity"] == other.result["perplexity"] != one.result["dense_perplexity"]


def test_a_list_that_is_none_of_this_model_is_refused(refuses, refused, order):
    for refuse in (refuses, lambda *says, **given: refused(*says, script="eval", **given)):
        none = {"ppl_search_file": None}
        refuse("--remove 'mha3': the model has layers 0 to 2", remove="mha3", **none)
        refuse("--remove 'attn'", "allowed are mha5", remove="attn", **none)
        refuse("--remove mha1", "leave out --ppl-search-file", remove="mha1", ppl_search_file=order)
        refuse("--del-block-num", "not allowed with", "--remove", remove="mha1", del_block_num=1, **none)


def test_a_gguf_file_becomes_a_pruned_checkpoint(toy_folder, write, tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    dense = AutoModelForCausalLM.from_pretrained(toy_folder(vocab_size=257, num_key_value_heads=4)).eval()
    write_gguf(path, dense)
    assert write(model_path=path, compute_dtype="fp32").code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with Decoder(dense).masked(ORDER[:3]):
        torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)("some words")["input_ids"]
    assert write(model_path=path, format="zeroed", output_dir=tmp_path / "zeroed").code == 0
    config = json.loads((tmp_path / "zeroed" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"], "other programs choose by it"


@pytest.mark.parametrize("script", ("stock", "gguf", "eval", "laco"))
def test_a_gguf_file_is_parsed_once_a_command(script, write, call, evaluate, toy_folder, text, tmp_path, monkeypatch):
    reader = pytest.importorskip("gguf.gguf_reader").GGUFReader
    path, parsed, init = tmp_path / "model.gguf", [], reader.__init__
    write_gguf(path, AutoModelForCausalLM.from_pretrained(toy_folder(vocab_size=257, num_key_value_heads=4)))
    monkeypatch.setattr(reader, "__init__", lambda self, *args: parsed.append(args) or init(self, *args))
    if script == "eval":
        assert evaluate(model_path=path).code == 0
    elif script == "laco":
        from command_line import SMALL

        from scripts import laco

        given = {**SMALL, "model_path": path, "cal_dataset": text, "output_dir": tmp_path / "out"}
        assert call(laco.main, *flags(**given, del_layer_num=1)).code == 0
    else:
        run = write(model_path=path, format=script, del_block_num=0 if script == "stock" else 3)
        assert run.code == 0, run
    assert len(parsed) == 1


def test_eval_exports_what_it_has_measured(evaluate, write, order, toy_folder, tmp_path):
    run = evaluate(ppl_search_file=order, del_block_num=3, export_path=tmp_path / "short")
    assert run.code == 0, run
    write(compute_dtype="fp32")
    short, long = load_file(tmp_path / "short" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert short.keys() == long.keys() and all(torch.equal(short[key], long[key]) for key in short)
    info = json.loads((tmp_path / "short" / "config.json").read_text())["pruning_info"]
    assert info["evaluated"]["perplexity"] == run.result["perplexity"]
    again = evaluate(model_path=tmp_path / "short", trust_remote_code=True)
    assert again.result["perplexity"] == pytest.approx(run.result["perplexity"], rel=1e-5)


def test_a_reduced_run_is_no_result_on_the_card_either(evaluate, order, tmp_path):
    run = evaluate(ppl_search_file=order, del_block_num=3, export_path=tmp_path / "out", limit=2)
    assert run.result["export"]["evaluated"]["limit"] == "NOT A RESULT, --limit: all=2"
    assert "NOT A RESULT, --limit: all=2) |" in (tmp_path / "out" / "README.md").read_text()


def test_what_was_measured_is_not_lost_with_the_export(evaluate, order, monkeypatch, tmp_path):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lib.export.checkpoint, "write_shards", full)
    given = dict(ppl_search_file=order, del_block_num=3, output_path=tmp_path / "result.json")
    run = evaluate(export_path=tmp_path / "out", **given)
    assert run.code == 2 and run.err.count("\n") == 1 and "No space left on device; nothing was left" in run.err
    assert run.result["perplexity"] == json.loads((tmp_path / "result.json").read_text())["perplexity"] > 1
    assert "3 blocks removed" in run.out and os.listdir(tmp_path) == ["result.json"]


# ---- bad input -----------------------------------------------------------------------------------


def test_an_order_of_another_model_is_refused(refuses, write, tmp_path):
    path = tmp_path / "order.json"
    save_order(path, [Block("mha", 3)], {})
    refuses("mha 3 does not exist", "3 layers", ppl_search_file=path, del_block_num=1)
    save_order(path, [Block("mha", 0)], {"layers": 32})
    refuses("made for a model of 32 layers", ppl_search_file=path, del_block_num=1)
    save_order(path, [Block("mha", 0)], {"layers": 3, "model": "models/Other-7b"})
    run = write(ppl_search_file=path, del_block_num=1)
    assert run.code == 0 and "warning: the order was searched on Other-7b" in run.err


def test_removals_that_the_order_does_not_hold_are_refused(refuses, refused, order):
    refuses("--del-block-num 7", "holds 6 removals", "0..6", del_block_num=7)
    refuses("--del-block-num 1", "--ppl-search-file", ppl_search_file=None, del_block_num=1)
    refuses("--target-ratio 0.5", "--ppl-search-file", ppl_search_file=None, target_ratio=0.5)
    refused("6 removals", "--del-block-num or --target-ratio", script="eval", ppl_search_file=order)
    for refuse in (refuses, lambda *says, **given: refused(*says, script="eval", ppl_search_file=order, **given)):
        refuse("--target-ratio 0.99", "all 6 removals", "0..0.", target_ratio=0.99)
        refuse("--target-ratio", "'10'", "0 to 1", target_ratio=10)
        refuse("--target-ratio", "'much'", target_ratio="much")
        refuse("--target-ratio", "not allowed with", "--del-block-num", target_ratio=0.1, del_block_num=2)


def test_what_is_not_given_is_asked_for(refuses):
    refuses("--del-block-num", "--target-ratio", del_block_num=None)
    refuses("--output-dir is missing", output_dir="")
    refuses("--model-path is missing", model_path="")
    refuses("--format", "'onnx'", format="onnx")


@pytest.mark.parametrize(
    "name, format, k, says",
    (
        ("llama", "stock", 3, ("LlamaForCausalLM", "mlp0 is left without its other half", "nearest format is hf")),
        ("llama", "stock", 6, ("no layer is left", "nearest format is zeroed")),
        ("llama", "hf", 5, ("no attention of LlamaForCausalLM", "nearest format is zeroed")),
        ("llama", "auto", 5, ("no attention of LlamaForCausalLM", "nearest format is zeroed")),
        ("cohere", "stock", 2, ("CohereForCausalLM", "nearest format is hf")),
        ("opt-post-norm", "zeroed", 1, ("OPTDecoderLayer", "nearest format is hf")),
        ("bloom-post-norm", "zeroed", 1, ("BloomBlock", "nearest format is hf")),
    ),
)
def test_a_format_that_the_model_cannot_have_is_refused_by_name(refuses, toy_folder, name, format, k, says):
    refuses(*says, model_path=toy_folder(name), format=format, del_block_num=k)


def test_eval_refuses_an_export_before_it_reads_weights(refused, order, damaged, monkeypatch, tmp_path):
    folder = damaged(WEIGHTS, lambda b: b"")
    same = dict(script="eval", model_path=folder, ppl_search_file=order)
    refused("no attention", del_block_num=5, export_path=tmp_path / "out", **same)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
        refused("GiB free", "another disk", del_block_num=1, export_path=tmp_path / "out", **same)
    refused("not empty", str(folder), del_block_num=1, export_path=folder, **same)
    refused("--export-path", "not a folder", del_block_num=1, export_path=folder / WEIGHTS / "out", **same)


def test_a_target_that_is_taken_is_refused(refuses, write, toy_folder, text, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert write().code == 0, "an empty folder is free"
    refuses(str(out), "not empty", "overwrite")
    assert write(overwrite=True, del_block_num=1).result["removed"] == ["mlp1"]
    assert json.loads((out / "config.json").read_text())["pruning_info"]["removed"] == ["mlp1"]
    refuses("--output-dir", "not a folder", output_dir=text)
    refuses("--output-dir", "not a folder", output_dir=text / "out")
    for name in ("results.json", "training_args.bin", "optimizer.safetensors"):
        (out / name).write_text("of somebody's")
        refuses(name, "other things", output_dir=out, overwrite=True)
        (out / name).unlink()
    (out / "checkpoint-100").mkdir()
    refuses("checkpoint-100", "other things", output_dir=out, overwrite=True)
    (out / "checkpoint-100").rmdir()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    refuses("other things than an export", output_dir=foreign, overwrite=True)
    refuses("holds the model itself", model_path=out, output_dir=out, overwrite=True)
    refuses("holds the model itself", output_dir=toy_folder().parent, overwrite=True)


def test_a_link_is_followed_to_its_disk_and_stays(write, tmp_path):
    for name in ("disk/full", "disk/empty"):
        (tmp_path / name).mkdir(parents=True)
    assert write(output_dir=tmp_path / "disk" / "full", del_block_num=1).code == 0
    for target, overwrite in (("disk/full", True), ("disk/empty", None), ("disk/new", None)):
        (tmp_path / "link").symlink_to(tmp_path / target, target_is_directory=True)
        run = write(output_dir=tmp_path / "link", overwrite=overwrite)
        assert run.code == 0 and len(run.result["removed"]) == 3
        assert (tmp_path / "link").is_symlink() and (tmp_path / target / WEIGHTS).is_file()
        (tmp_path / "link").unlink()
    assert os.listdir(tmp_path) == ["disk"] and sorted(os.listdir(tmp_path / "disk")) == ["empty", "full", "new"]


def test_a_mount_point_is_refused_before_anything_is_written():
    with pytest.raises(ValueError, match="a mount point.*give a folder in it"):
        lib.export.folder.check_target("/", "model")
    with pytest.raises(ValueError, match="a mount point"), lib.export.folder.complete_or_nothing("/"):
        raise AssertionError("a folder was made")


def test_a_full_disk_leaves_nothing_behind(refuses, write, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
        refuses(str(tmp_path / "out"), "GiB free", "another disk")
    write(del_block_num=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # the system refuses to let a file grow
    try:
        refuses("too large", "nothing was left", overwrite=True)
        refuses("too large", "nothing was left", output_dir=tmp_path / "other")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_interrupted_export_leaves_the_old_one(write, monkeypatch, tmp_path):
    assert write(del_block_num=1).code == 0
    before = tree(tmp_path)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("lib.export.checkpoint.config_json", interrupted)  # the last thing written
    with pytest.raises(KeyboardInterrupt):
        write(overwrite=True)
    assert tree(tmp_path) == before


def test_a_tokenizer_that_cannot_be_read_is_refused_before_weights_are_written(refuses, damaged, monkeypatch):
    def written(*args):
        raise AssertionError("weights were written")

    monkeypatch.setattr(lib.export.checkpoint, "write_shards", written)
    refuses("tokenizer", model_path=damaged("tokenizer.json", lambda b: b"{}"))


def test_a_damaged_source_is_refused(refuses, damaged):
    folder = damaged(WEIGHTS, lambda b: b[: len(b) // 2])
    refuses(str(folder), "weights", "download it again", model_path=folder)


def test_a_sharded_source_without_one_of_its_files_is_refused(refuses, tmp_path):
    folder = tmp_path / "sharded"
    toy("llama", vocab_size=256).save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()
    refuses("a file is missing", "model-00002-of", model_path=folder)


def test_a_source_without_one_of_its_tensors_is_refused(refuses, toy_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(toy_folder(), folder)
    weights = load_file(folder / WEIGHTS)
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    refuses("BlockPrunedLlamaForCausalLM", "mlp.up_proj.weight", "complete source", model_path=folder)
    weights = {k: v for k, v in weights.items() if ".layers.2." not in k}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    refuses("weights of 2 layers", "config.json says 3", model_path=folder)


def test_a_quantised_source_is_refused_by_name(refuses, damaged):
    def quantise(config):
        return json.dumps(json.loads(config) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}).encode()

    refuses("quantised (gptq)", "dense checkpoint", model_path=damaged("config.json", quantise))


def test_a_pruned_export_can_be_measured_but_not_pruned_again(write, refuses, refused, order, tmp_path):
    write()
    pruned = dict(model_path=tmp_path / "out", trust_remote_code=True)
    refuses("pruned export (blockpruned_llama)", "base model", **pruned, output_dir=tmp_path / "again")
    refused("pruned export (blockpruned_llama)", "base model", **pruned)
    refused("pruned export", script="eval", ppl_search_file=order, del_block_num=1, **pruned)


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_code_of_its_own_keeps_it_or_is_refused(refuses, write, toy_folder, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(toy_folder(), folder)
    (folder / "modeling_own.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config))
    refuses("code of its own", "--trust-remote-code", model_path=folder)
    own = dict(model_path=folder, trust_remote_code=True)
    refuses("OwnForCausalLM is code of the checkpoint's own", "nearest format is stock", **own, format="hf")
    save_order(tmp_path / "stock.json", [Block("mha", 1), Block("mlp", 1)], {"layers": 3, "model": "own"})
    run = write(**own, ppl_search_file=tmp_path / "stock.json", del_block_num=2)
    assert run.code == 0 and run.result["format"] == "stock", run
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    dense = AutoModelForCausalLM.from_pretrained(toy_folder()).eval()
    with Decoder(dense).masked([("mha", 1), ("mlp", 1)]):
        torch.testing.assert_close(logits(model), logits(dense))
    assert type(model).__name__ == "OwnForCausalLM" and model.config.num_hidden_layers == 2
