#!/usr/bin/env bash
# A search over several nodes of a Slurm cluster, one process a GPU: sbatch scripts/slurm.sh MODEL BLOCKS [more flags of
# block_search.py]. The folder of the order file must be one that all nodes see. A job that is preempted, or ends at its
# time limit, is sent SIGTERM a minute before, saves after the batch it is at, and is queued again: it goes on from there.
#SBATCH --job-name=blockpruner
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
model=$1 blocks=$2
shift 2
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
code=0
srun --kill-on-bad-exit=1 .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
  block_search.py --model-path "$model" --device cuda --del-block-num "$blocks" "$@" || code=$?
if [ "$code" = 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
