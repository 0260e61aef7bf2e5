#!/usr/bin/env bash
# What transformers 4.57.3 makes of exports, family by family (scripts/check_readers.py); arguments as there.
# It goes into an environment of its own, .venv/transformers4, on the first run, beside this one's torch.
set -euo pipefail
cd "$(dirname "$0")/.."
reader=${READER_VENV:-.venv/transformers4}
if ! "$reader/bin/python" -c 'import transformers' 2>/dev/null; then
    .venv/bin/python -m venv "$reader"
    .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        >"$(echo "$reader"/lib/python*/site-packages)/project.pth"
    "$reader/bin/python" -m pip install --quiet --no-deps \
        transformers==4.57.3 tokenizers==0.22.1 huggingface_hub==0.36.0
fi
exec .venv/bin/python -m scripts.check_readers --python "$reader/bin/python" "$@"
