#!/usr/bin/env bash
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Validation losses of a run's latest checkpoint (or of RUN/checkpoints/step_...), and the run's page of plots:
#   sbatch slurm/evaluate.sh [RUN [megacode evaluate's options]]
source "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/slurm/job.sh"
run="${1:-runs/crystal-7b}"
srun "${srun_flags[@]}" python -m megacode.cli evaluate "$run" "${@:2}"
[ ! -f "$run/metrics.jsonl" ] || python -m megacode.cli report "$run"
