#!/usr/bin/env bash
# The whole run: phases 1 to 3, each after the one before has ended well, and then its evaluation.
#   slurm/submit-all.sh [RECIPE [RUN [--set KEY=VALUE ...]]]
# Submit it again after a change or a failure: phases that are finished end at once. Your cluster: slurm/cluster.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/cluster.sh
recipe="${1:-recipes/crystal-7b.yaml}" run="${2:-runs/crystal-7b}"
[ -f "$recipe" ] || { echo "submit-all: there is no recipe $recipe" >&2 && exit 2; }

submit() { # AFTER FLAGS-SCRIPT-AND-ARGUMENTS: the job's number
    local after="${1:+--dependency=afterok:$1 --kill-on-invalid-dep=yes}"
    sbatch --parsable "${sbatch_flags[@]}" $after "${@:2}"
}
after=""
for phase in phase1 phase2 phase3; do
    after="$(submit "$after" "${train_flags[@]}" "slurm/$phase.sh" "$recipe" "$run" "${@:3}")"
    after="${after%%;*}" # a federation adds the cluster's name
    echo "$phase: job $after"
done
echo "evaluate: job $(submit "$after" slurm/evaluate.sh "$run")"
