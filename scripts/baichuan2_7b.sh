#!/usr/bin/env bash
# Baichuan2-7B, 22.45 % of the parameters pruned; flags as in paper.sh.
# K = 18 = 11 mha + 7 mlp: the only combination that gives 22.45 %.
# The model brings its own Python code, and pickled weights; read it before running this.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper.sh" baichuan-inc/Baichuan2-7B-Base 18 "$@" --trust-remote-code --allow-pickled
