#!/usr/bin/env bash
#SBATCH --job-name=megacode
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8        # one task a GPU; or 1, and each task starts its node's processes
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300        # five minutes before the limit: save, and start again by itself
#SBATCH --requeue                  # a node failed: start again, from the last checkpoint
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Trains a recipe, or goes on with its run:  sbatch slurm/train.sh RECIPE RUN [--set KEY=VALUE ...] [--until-phase NAME]
source "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/slurm/job.sh"
[ $# -ge 2 ] || { echo "usage: sbatch slurm/train.sh RECIPE RUN [--set KEY=VALUE ...]" >&2 && exit 2; }
train "$@"
