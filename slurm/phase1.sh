#!/usr/bin/env bash
#SBATCH --job-name=phase1
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8        # one task a GPU; or 1, and each task starts its node's processes
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300        # five minutes before the limit: save, and start again by itself
#SBATCH --requeue                  # a node failed: start again, from the last checkpoint
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# A run's first phase:  sbatch slurm/phase1.sh [RECIPE [RUN [--set KEY=VALUE ...]]]
# Phases are one run: the same RECIPE and RUN for phase2.sh and phase3.sh, which go on where this one ends
# (slurm/submit-all.sh submits all three). If the phase is finished, the job ends at once. Your cluster: slurm/cluster.sh.
source "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/slurm/job.sh"
train "${1:-recipes/crystal-7b.yaml}" "${2:-runs/crystal-7b}" --until-phase phase1 "${@:3}"
