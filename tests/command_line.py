"""Running the two scripts from tests: real processes, and what their ends are compared with.

The fixtures call, search, evaluate and refused in conftest.py run main() in this process instead.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"device": "cpu", "compute_dtype": "fp32", "cal_nsamples": 20, "ppl_eval_seqlen": 64, "ppl_eval_batch_size": 8}
NO_NETWORK = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}  # nobody listens


class Run(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def result(self):
        """The last line of stdout, for machines."""
        return json.loads(self.out.splitlines()[-1])


def flags(**values):
    """{"del_block_num": 3, "overwrite": True, "seed": None} -> ["--del-block-num", "3", "--overwrite"]"""
    words = []
    for name, value in values.items():
        if value is None:
            continue
        words += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    return words


def start(script, *words, python=(), **environment):
    """Start `python script words` from the repository root, one thread, no network."""
    env = os.environ | NO_NETWORK | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *python, script, *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def shell(script, *words, **options):
    process = start(script, *words, **options)
    out, err = process.communicate(timeout=600)
    return Run(process.returncode, out, err)


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns if p.is_file() else None for p in folder.rglob("*")}


def scores(path):
    """Return (order, every candidate's score in every step) of an order file; what steps cost may differ by run."""
    from lib.orders import read_order

    order, meta = read_order(path)
    return order, [step["scores"] for step in meta["steps"]]


def unsealed(path):
    """Return what an order file holds without its checksum, as somebody edits one."""
    held = json.loads(path.read_text())
    for mark in ("schema", "checksum"):
        held["meta"].pop(mark, None)
    return held


def assert_refused(run, *says):
    assert run.code == 2, run
    assert run.out == "", run
    assert len(run.err.splitlines()) == 1 and ": error: " in run.err, run
    for words in says:
        assert words in run.err, run


def write_gguf(path, model):
    """Write a toy Llama with as many key-value heads as heads, and byte tokens plus one merge."""
    import gguf
    from tokenizers import pre_tokenizers

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ~"])
    writer.add_token_types([1] * 257)
    writer.add_token_merges(["Ġ ~"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp pairs neighbouring dimensions in its rotation
            heads, size = config.num_attention_heads, config.hidden_size
            tensor = tensor.view(heads, 2, size // heads // 2, size).transpose(1, 2).reshape(size, size)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
