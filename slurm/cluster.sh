# The one place to edit for a cluster. Every other script here reads it, in the checkout that the job was submitted from.

# Flags for sbatch, stronger than the #SBATCH lines of a script: for every job, and more for those that train. They count
# where a script submits itself (`slurm/phase1.sh` instead of `sbatch slurm/phase1.sh`) and in slurm/submit-all.sh. With a
# plain `sbatch slurm/phase1.sh` say them there, or once in your environment (SBATCH_ACCOUNT, SBATCH_PARTITION; man sbatch).
sbatch_flags=()        # e.g. (--account=abc --partition=gpu)
train_flags=()         # e.g. (--nodes=32 --time=48:00:00 --exclusive)
sweep_flags=()         # for the cells of a sweep (megacode sweep --sbatch), e.g. (--time=2:00:00)

# Flags for srun, e.g. a container: (--container-image=/shared/megacode.sqsh --container-mounts=/shared --cpu-bind=none)
srun_flags=()

# Processes that each task starts. Empty: GPUs of a node / tasks of a node, which is 1 with one task a GPU, and all of a
# node's with --ntasks-per-node=1.
processes_per_task=""

# What it takes to have megacode's python: a venv, a module, conda.
activate() {
    source .venv/bin/activate
}
