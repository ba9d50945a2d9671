#!/usr/bin/env bash
#SBATCH --job-name=megacode-sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1        # a cell: one GPU here; for larger models as in train.sh
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300        # five minutes before the limit: save, and start again by itself
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
# Trains one cell of a sweep. `megacode sweep SWEEP --sbatch slurm/sweep.sh` submits it as an array: SWEEP LIST, a cell's name a line
[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || { echo "submit it with: megacode sweep SWEEP.yaml --sbatch slurm/sweep.sh" >&2 && exit 2; }
source "$SLURM_SUBMIT_DIR/slurm/job.sh"
name="$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$2")"
logs="$(dirname "$2")/logs"

# `megacode sweep --list` reads this file. 75 and 143 (SIGTERM) are of a cell that was stopped.
failed() {
    local code=$?
    case $code in
        0 | 75 | 143) ;;
        *) mkdir -p "$logs" && echo "exit code $code in Slurm job $SLURM_JOB_ID" >"$logs/$name.failed" ;;
    esac
}
trap failed EXIT

arguments="$(python -m megacode.cli sweep "$1" --cell "$name")" # makes the cell ready
mapfile -t arguments <<<"$arguments"
train "${arguments[0]}" "${arguments[2]}" "${arguments[@]:3}" # RECIPE --run RUN ...
