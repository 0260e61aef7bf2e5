#!/usr/bin/env bash
# Qwen1.5-7B, 21.83 % of the parameters pruned; flags as in paper.sh.
# K = 18 = 11 mha + 7 mlp: the only combination that gives 21.83 %.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper.sh" Qwen/Qwen1.5-7B 18 "$@"
