"""The scripts of slurm/ on a real Slurm of two nodes: what a run comes to is the same, bit for bit, whatever befell its jobs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, megacode, steps_of
from tests.slurm.conftest import FLAGS, Checkout, Cluster, sh, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def straight(checkout: Checkout) -> Path:
    """The run that nothing befell, without Slurm."""
    run = checkout.run("straight")
    megacode(
        "train", checkout.path / "tiny.yaml", "--run", run, "--processes", "2", OMP_NUM_THREADS="1"
    )
    assert len(steps_of(run).losses) == 40
    return run


def state(job: int) -> str:
    return (re.findall(r"JobState=(\w+)", sh(f"scontrol show job {job}")) or ["GONE"])[0]


def exit_code(job: int) -> int:
    return int(re.findall(r"ExitCode=(\d+):", sh(f"scontrol show job {job}"))[0])


def wait_for_steps(checkout: Checkout, run: Path, steps: int, job: int) -> None:
    metrics = run / "metrics.jsonl"
    wait_for(
        lambda: metrics.exists() and metrics.read_text().count('"kind":"train"') >= steps,
        150,
        lambda: checkout.log(job),
    )


def wait_for_end(checkout: Checkout, job: int, seconds: float = 200) -> str:
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "GONE")
    wait_for(lambda: state(job) in ended, seconds, lambda: f"{state(job)}\n{checkout.log(job)}")
    return state(job)


def slow_down(checkout: Checkout, name: str, samples: int = 24) -> str:
    """A recipe that evaluates after every step, so that there is time to interfere."""
    path = checkout.path / f"{name}.yaml"
    path.write_text(f"extends: tiny.yaml\nevaluation: {{every: 1, samples: {samples}}}\n")
    return path.name


def test_all_phases_in_a_chain(checkout: Checkout, straight: Path) -> None:
    """Two nodes, four jobs; the last phase's job is asked to stop, saves and starts again by itself."""
    run = checkout.run("chain")
    last = checkout.submit("slurm/submit-all.sh tiny.yaml runs/chain")
    assert wait_for_end(checkout, last, 120) == "COMPLETED", checkout.log(last - 1) + checkout.log(
        last
    )
    assert steps_of(run) == steps_of(straight)
    assert "phase1 is finished: step 12 of 40" in checkout.log(last - 3)
    assert "all" in checkout.log(last) and (run / "report.html").exists()
    assert {path.name for path in run.glob("logs/*/*")} == {"rank-1.log"}
    assert not (run / "lock").exists()


def test_a_finished_phase_ends_at_once(checkout: Checkout, straight: Path) -> None:
    job = checkout.submit(f"sbatch {FLAGS} slurm/phase2.sh tiny.yaml {straight}")
    assert wait_for_end(checkout, job) == "COMPLETED"
    assert "nothing to do: phase2 ends at step 28" in checkout.log(job)


def test_one_task_a_node_starts_the_nodes_processes(checkout: Checkout, straight: Path) -> None:
    """Two nodes of one task of two processes each; four ranks read the same tokens as two do."""
    cluster = checkout.path / "slurm/cluster.sh"
    one = cluster.read_text()
    cluster.write_text(one.replace('processes_per_task=""', "processes_per_task=2"))
    job = checkout.submit("slurm/phase1.sh tiny.yaml runs/tasks")
    assert wait_for_end(checkout, job) == "COMPLETED", checkout.log(job)
    cluster.write_text(one)
    run = checkout.run("tasks")
    assert steps_of(run).batches == steps_of(straight).batches[:12]
    assert {path.name for path in run.glob("logs/*/*")} == {
        "rank-1.log",
        "rank-2.log",
        "rank-3.log",
    }


def test_a_signal_saves_and_the_job_starts_again(checkout: Checkout, straight: Path) -> None:
    """`scancel --signal`; meanwhile a second submission of the run refuses and takes nothing away."""
    run = checkout.run("signalled")
    recipe = slow_down(checkout, "signalled")
    job = checkout.submit(f"sbatch {FLAGS} slurm/train.sh {recipe} {run}")
    wait_for_steps(checkout, run, 2, job)
    os.kill(task(job, 1), signal.SIGSTOP)  # the first job stays where it is meanwhile
    try:
        second = checkout.submit(f"sbatch {FLAGS} slurm/train.sh {recipe} {run}")
        assert wait_for_end(checkout, second) == "FAILED" and exit_code(second) == 2, checkout.log(
            second
        )
    finally:
        os.kill(task(job, 1), signal.SIGCONT)
    told = [
        line for line in checkout.log(second).splitlines() if line.startswith("megacode train:")
    ]
    assert len(told) == 1 and f"this run is being trained by Slurm job {job}, process" in told[0]
    assert "not started again" not in checkout.log(second)
    sh(f"scancel --signal=USR1 {job}")
    assert wait_for_end(checkout, job) == "COMPLETED", checkout.log(job)
    log = checkout.log(job)
    assert (
        f"stopped by signal {signal.SIGUSR1.value} after step" in log
        and "the job starts again" in log
    )
    assert "continuing from" in log and "Restarts=1" in sh(f"scontrol show job {job}")
    assert (
        steps_of(run).losses == steps_of(straight).losses
        and steps_of(run).norms == steps_of(straight).norms
    )


def test_the_time_limit_saves_and_the_job_starts_again(checkout: Checkout, straight: Path) -> None:
    run = checkout.run("limited")
    job = checkout.submit(
        f"sbatch {FLAGS} slurm/train.sh {slow_down(checkout, 'limited', 1600)} {run}"
    )
    wait_for_steps(checkout, run, 1, job)
    sh(f"scontrol update JobId={job} TimeLimit=5")  # five minutes left: the script's --signal
    wait_for(lambda: "the job starts again" in checkout.log(job), 60, lambda: checkout.log(job))
    wait_for(lambda: state(job) == "PENDING", 30)
    sh(f"scontrol update JobId={job} TimeLimit=60")
    slow_down(checkout, "limited", 4)  # it was for Slurm, which looks at limits every 30 s
    assert wait_for_end(checkout, job) == "COMPLETED", checkout.log(job)
    assert "stopped by a signal and saved" in checkout.log(job)
    assert steps_of(run).losses == steps_of(straight).losses


def test_a_killed_task_ends_the_job_which_starts_again(checkout: Checkout, straight: Path) -> None:
    """kill -9 of the first node's task, which holds the run's lock, once there is a checkpoint to go on from."""
    run = checkout.run("killed")
    job = checkout.submit(f"sbatch {FLAGS} slurm/train.sh {slow_down(checkout, 'killed')} {run}")
    wait_for_steps(checkout, run, 9, job)
    os.kill(task(job, 0), signal.SIGKILL)
    assert wait_for_end(checkout, job) == "COMPLETED", checkout.log(job)
    log = checkout.log(job)
    assert "failed with code" in log and "the job starts again and goes on from step_" in log
    assert "left over by Slurm job" in log, "the killed start's lock"
    assert steps_of(run).losses == steps_of(straight).losses


def test_a_failed_node_brings_the_job_back(
    checkout: Checkout, slurm: Cluster, straight: Path
) -> None:
    """The second node falls silent: Slurm itself finds it down, ends the job and requeues it; it waits for a node and goes on."""
    run = checkout.run("node")
    job = checkout.submit(f"sbatch {FLAGS} slurm/train.sh {slow_down(checkout, 'node', 200)} {run}")
    wait_for((run / "checkpoints" / "latest").exists, 150, lambda: checkout.log(job))
    lost = task(job, 1)
    slurm.kill_node("n2")
    os.kill(lost, signal.SIGSTOP)  # nothing is heard of its process either
    try:
        wait_for(
            lambda: "Restarts=1" in sh(f"scontrol show job {job}"), 120, lambda: checkout.log(job)
        )
        assert "down" in sh("sinfo -h -N -n n2 -o %T")
    finally:
        os.kill(lost, signal.SIGKILL)
        slurm.start_node("n2")
    slow_down(checkout, "node", 4)
    assert wait_for_end(checkout, job) == "COMPLETED", checkout.log(job)
    log = checkout.log(job)
    assert "Node failure on n2" in log or "NODE FAILURE" in log
    assert "the job starts again" not in log, "Slurm brought it back, not its script"
    assert "continuing from" in log
    assert (
        steps_of(run).losses == steps_of(straight).losses
        and steps_of(run).batches == steps_of(straight).batches
    )


def test_a_start_that_gets_nowhere_is_not_repeated(checkout: Checkout) -> None:
    """Killed before the first checkpoint; and a user's mistake, which no repetition would mend."""
    run = checkout.run("nowhere")
    job = checkout.submit(
        f"sbatch {FLAGS} slurm/train.sh tiny.yaml {run} --set checkpoints.every=1000 --set evaluation.every=1"
    )
    wait_for_steps(checkout, run, 1, job)
    os.kill(task(job, 1), signal.SIGKILL)
    assert wait_for_end(checkout, job) == "FAILED"
    assert "this start brought the run no further than its beginning" in checkout.log(job)
    mistaken = checkout.submit(f"sbatch {FLAGS} slurm/train.sh tiny.yaml {run} --set seed=none")
    assert wait_for_end(checkout, mistaken) == "FAILED" and exit_code(mistaken) == 2
    assert "seed: expected a whole number" in checkout.log(mistaken)


def test_a_mistake_is_told_also_when_another_rank_sees_it_first(checkout: Checkout) -> None:
    """Its exit ends the step, and rank 0 before it could speak."""
    late = checkout.path / "late.sh"
    late.write_text('#!/bin/sh\n[ "$SLURM_PROCID" != 0 ] || sleep 20\n')
    late.chmod(0o755)
    cluster = checkout.path / "slurm/cluster.sh"
    before = cluster.read_text()
    try:
        cluster.write_text(before.replace("srun_flags=()", f"srun_flags=(--task-prolog={late})"))
        job = checkout.submit(
            f"sbatch {FLAGS} slurm/train.sh tiny.yaml runs/mistaken --set seed=none"
        )
        assert wait_for_end(checkout, job) == "FAILED" and exit_code(job) == 2
    finally:
        cluster.write_text(before)
    assert checkout.log(job).count("seed: expected a whole number") == 1


def test_a_cancelled_job_stays_away(checkout: Checkout) -> None:
    run = checkout.run("cancelled")
    job = checkout.submit(f"sbatch {FLAGS} slurm/train.sh {slow_down(checkout, 'cancelled')} {run}")
    wait_for_steps(checkout, run, 5, job)
    sh(f"scancel {job}")
    assert wait_for_end(checkout, job, 60) == "CANCELLED"
    wait_for(lambda: not sh("squeue -h").strip(), 40)
    assert state(job) == "CANCELLED"


def task(job: int, rank: int) -> int:
    """The process of one task of a job's step."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        wanted = {
            f"SLURM_JOB_ID={job}".encode(),
            f"SLURM_PROCID={rank}".encode(),
            b"SLURM_STEP_ID=0",
        }
        if wanted <= set(environment) and b"megacode.cli" in command:
            return int(folder.name)
    raise AssertionError(f"job {job} has no task {rank}")


def test_a_sweep_is_an_array_of_its_unfinished_cells(checkout: Checkout) -> None:
    """Two arms share their first phases: an array of one prefix, then one of two cells; then one cell again."""
    path = checkout.path / "sweep.yaml"
    path.write_text(
        "name: array\nrecipe: tiny.yaml\ngrid:\n  rate: {phases.phase3.learning_rate.peak: [0.001, 0.003]}\n"
    )
    submit = f"PYTHONPATH={ROOT} {sys.executable} -m megacode.cli sweep sweep.yaml"

    def submitted() -> list[int]:
        out = subprocess.run(
            ["bash", "-c", f"{submit} --sbatch slurm/sweep.sh"],
            cwd=checkout.path,
            capture_output=True,
            text=True,
        )
        assert out.returncode == 0, out.stderr
        return [int(job) for job in re.findall(r"^job (\d+): ", out.stdout, re.MULTILINE)]

    def ended(jobs: list[int]) -> str:
        wait_for(lambda: not any(sh(f"squeue -h -j {job}").strip() for job in jobs), 300, logs)
        return logs()

    def logs() -> str:
        return "".join(
            log.read_text() for log in sorted(checkout.path.glob("megacode-sweep-*.log"))
        )

    jobs = submitted()
    assert len(jobs) == 2, "the prefix first"
    log = ended(jobs)
    runs = checkout.path / "runs/array"
    cells = sorted(runs.glob("rate-*"))
    assert len(cells) == 2 and [len(steps_of(cell).losses) for cell in cells] == [40, 40], log
    straight = checkout.run("sweep-straight")
    megacode(
        "train", runs / f"recipes/{cells[0].name}.yaml", "--run", straight, OMP_NUM_THREADS="1"
    )
    assert steps_of(straight) == steps_of(cells[0])
    assert not list(runs.glob("logs/*.failed"))
    shutil.rmtree(cells[1])
    (again,) = submitted()
    ended([again])
    assert len(steps_of(cells[1]).losses) == 40
    told = sh(f"cd {checkout.path} && {submit} --sbatch slurm/sweep.sh && {submit} --results")
    assert "nothing to do: every cell is finished" in told and "2 of 2 cells finished" in told
    assert "one seed" in told and (runs / "sweep.html").is_file()
