# What the scripts of this folder have in common; they source it. docs/slurm.md tells what happens when.

set -euo pipefail

# Outside of a job a script submits itself: `slurm/phase1.sh ARGUMENTS` is `sbatch FLAGS slurm/phase1.sh ARGUMENTS`.
if [ -z "${SLURM_JOB_ID:-}" ]; then
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    source slurm/cluster.sh
    case "$(basename "$0")" in
        preprocess.sh | evaluate.sh) ;;
        *) sbatch_flags+=("${train_flags[@]}") ;;
    esac
    exec sbatch "${sbatch_flags[@]}" "slurm/$(basename "$0")" "$@"
fi
source slurm/cluster.sh
activate

# train RECIPE RUN [megacode train's options]: one start of a run; saves before the time limit and comes back by itself.
train() {
    local recipe="$1" run="$2" code=0
    local logs="$run/logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
    local tasks_of_a_node=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    local processes="${processes_per_task:-$((${SLURM_GPUS_ON_NODE:-1} / tasks_of_a_node))}"
    local before step="" signal="" cancelled=""
    before="$(latest "$run")"

    trap 'signal=1; kill -USR1 $step' USR1 # srun hands it on to every task: save and stop
    trap 'signal=1; cancelled=1' TERM      # scancel: Slurm has told the tasks itself
    srun --kill-on-bad-exit=1 --wait=20 "${srun_flags[@]}" python -m megacode.cli train "$recipe" --run "$run" \
        --processes "$((processes > 1 ? processes : 1))" --logs "$logs" "${@:3}" &
    step=$!
    while :; do
        wait $step && code=0 || code=$?
        [ -n "$signal" ] || break # else the signal ended the wait, not the step
        signal=""
    done

    trap - USR1 TERM
    # srun's code is the largest of all tasks', and those that it ended itself count.
    [ ! -e "$logs/mistake" ] || code=2
    case $code in
        0) exit 0 ;;
        2) # a mistake, which starting again would not mend; told here if rank 0 was ended before it could
            [ -e "$logs/told" ] || cat "$logs/mistake" 2>/dev/null || true
            exit 2
            ;;
        75) echo "stopped by a signal and saved" ;;
        *) echo "failed with code $code" && first_failure "$logs" ;;
    esac
    if [ -n "$cancelled" ]; then
        echo "cancelled: not started again"
    elif [ "$(latest "$run")" = "$before" ]; then
        echo "not started again: this start brought the run no further than ${before:-its beginning}"
    else
        echo "the job starts again and goes on from $(latest "$run")"
        scontrol requeue "$SLURM_JOB_ID" && sleep 60 # Slurm ends this script
    fi
    exit "$code"
}

latest() { cat "$1/checkpoints/latest" 2>/dev/null || true; }

# The end of the log of the rank that failed first: the others' failures came of it, and later.
first_failure() {
    local log
    for log in $(ls -tr "$1" 2>/dev/null); do
        if grep -qE 'Error|rank [0-9]+:' "$1/$log"; then
            echo "--- $1/$log:"
            tail -n 20 "$1/$log"
            return
        fi
    done
}
