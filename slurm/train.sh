#!/usr/bin/env bash
#SBATCH --job-name=megacode
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8        # one task a GPU
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300        # five minutes before the limit: save and stop; submit again to go on
#SBATCH --output=%x-%j.log
# Trains a recipe, or goes on with its run:  sbatch slurm/train.sh RECIPE RUN [--set KEY=VALUE ...]
# For your cluster, edit the lines above (account, partition, nodes) and the next one (a venv, a module, or a container).
set -euo pipefail
activate() { source "${SLURM_SUBMIT_DIR:-.}/.venv/bin/activate"; }

recipe="${1:?usage: sbatch slurm/train.sh RECIPE RUN [--set KEY=VALUE ...]}"
run="${2:?usage: sbatch slurm/train.sh RECIPE RUN [--set KEY=VALUE ...]}"
activate
# megacode reads rank, size and the first host from Slurm's own variables.
srun --kill-on-bad-exit=1 python -m megacode.cli train "$recipe" --run "$run" "${@:3}" &
step=$!
trap 'kill -USR1 "$step"' USR1     # srun hands the signal on to every task
wait "$step" || wait "$step"       # the first wait ends when the trap has run
