#!/usr/bin/env bash
# Install what is missing into .venv, look at the form of the code, then run the tests.
#
#     bash scripts/test.sh
#     bash scripts/test.sh tests/test_tasks.py -k piqa    # pytest's own flags
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
exec .venv/bin/python -m pytest "$@"
