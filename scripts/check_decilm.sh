#!/usr/bin/env bash
# mlx-lm's logits of a decilm export against transformers' (scripts/check_decilm.py); arguments as there.
# mlx-lm goes into an environment of its own, .venv/mlx, on the first run: CPU wheels, Linux.
set -euo pipefail
cd "$(dirname "$0")/.."
mlx=${MLX_VENV:-.venv/mlx}
if [ ! -x "$mlx/bin/mlx_lm.generate" ]; then
    .venv/bin/python -m venv "$mlx"
    "$mlx/bin/pip" install --quiet "mlx[cpu]==0.32.4" mlx-lm==0.32.2
fi
exec .venv/bin/python -m scripts.check_decilm --mlx-python "$mlx/bin/python" "$@"
