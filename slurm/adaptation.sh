#!/usr/bin/env bash
#SBATCH --job-name=adaptation
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8        # one task a GPU; or 1, and each task starts its node's processes
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300        # five minutes before the limit: save, and start again by itself
#SBATCH --requeue                  # a node failed: start again, from the last checkpoint
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Adapts a trained model to another mixture: a recipe with `initialize_from`, or a fork (`megacode fork --help`).
#   sbatch slurm/adaptation.sh [RECIPE [RUN [--set KEY=VALUE ...]]]
source "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/slurm/job.sh"
train "${1:-recipes/crystal-adaptation.yaml}" "${2:-runs/crystal-adaptation}" "${@:3}"
