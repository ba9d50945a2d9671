#!/usr/bin/env bash
#SBATCH --job-name=preprocess
#SBATCH --array=0-7                # eight machines, each an eighth of the work; any number will do
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue                  # finished parts are kept, so a job that starts again goes on
#SBATCH --output=%x-%A-%a.log
# Tokenizes a corpus on several machines with a common disk. Everything after the script's name goes to the tool:
#   sbatch slurm/preprocess.sh 'corpus/*.jsonl.zst' --tokenizer tokenizer.model --output data/corpus --validation 0.01
# The last job to finish puts the dataset together. Your cluster: slurm/cluster.sh.
source "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/slurm/job.sh"
[ $# -gt 0 ] || { echo "usage: sbatch slurm/preprocess.sh INPUT... --tokenizer FILE --output PREFIX [...]" >&2 && exit 2; }
first=${SLURM_ARRAY_TASK_MIN:-0}
exec python -m megacode.cli preprocess "$@" --workers "${SLURM_CPUS_PER_TASK:-1}" \
    --shard "$((${SLURM_ARRAY_TASK_ID:-0} - first))/${SLURM_ARRAY_TASK_COUNT:-1}"
