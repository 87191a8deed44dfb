#!/usr/bin/env bash
# An experiment on the nodes of a SLURM job, one process for each GPU, to be sent again until it ends:
#   sbatch --nodes 2 --gpus-per-node 4 --ntasks-per-node 4 experiments/cluster/slurm.sh digits
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x_%j.log
set -euo pipefail
experiment=$1
shift
# JAX numbers the ports of jobs by one, and a run has two.
export JAX_COORDINATOR_PORT=$((20000 + SLURM_JOB_ID % 10000 * 2))
srun --kill-on-bad-exit=1 python -m "experiments.$experiment" --executor sharded \
  --out "runs/${experiment}_slurm" --resume "$@"
