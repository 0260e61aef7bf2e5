#!/usr/bin/env bash
# Llama2-13B, 25.12 % of the parameters pruned; flags as in paper.sh.
# K = 24 = 17 mha + 7 mlp: the only combination that gives 25.12 %.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper.sh" meta-llama/Llama-2-13b-hf 24 "$@"
