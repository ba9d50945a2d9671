"""Metrics are on the disk before a checkpoint speaks of their steps, and a phase's beginning is written once."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from megacode.plan.plan import Plan, make_plan
from megacode.recipe.schema import Recipe
from tests.processes import run_on


def two_phases() -> Plan:
    phase = {"steps": 3, "batch_size": 2, "sequence_length": 8, "mixture": {"sources": {"a": 1}},
             "learning_rate": {"schedule": "constant", "peak": 1e-3}}  # fmt: skip
    recipe = Recipe.model_validate(
        {
            "name": "t",
            "model": {"layers": 1, "hidden_size": 8, "heads": 1, "vocab_size": 10},
            "sources": {"a": {}},
            "phases": [{"name": "first", **phase}, {"name": "second", **phase}],
            "precision": "fp32",
            "logging": {"every": 10},
        }
    )
    return make_plan(recipe, {"a": 1000})


class Checkpoints:
    """Stands in for the checkpointer: what of the metrics is on the disk when it is called."""

    def __init__(self, run: Path, synced: dict[int, int]) -> None:
        self.run, self.synced = run, synced
        self.found: list[tuple[list[int], bool, list[int]]] = []

    def save(self, done: int, *_: Any) -> None:
        path = self.run / "metrics.jsonl"
        status = path.stat()
        steps = [
            record["step"]
            for record in map(json.loads, path.read_text().splitlines())
            if record["kind"] == "train"
        ]
        self.found.append(
            (steps, self.synced.get(status.st_ino) == status.st_size, board_steps(self.run))
        )


def board_steps(run: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return [event.step for event in board.Scalars("loss/train")] if board.Tags()["scalars"] else []


def steps(reports: Any, plan: Plan, first: int, end: int) -> None:
    import torch

    from megacode.train.report_steps import FinishedStep

    for step in range(first, end):
        phase = plan.phase_at(step)
        if step == phase.first_step:
            reports.phase(phase)
        sums = torch.ones(2, 1, dtype=torch.float64)
        reports.step(FinishedStep(step, sums, 1.0, 1, 0.1))


def save_in_the_middle(world: Any, folder: str) -> list[tuple[list[int], bool, list[int]]]:
    from megacode.train.report_steps import StepReports

    synced: dict[int, int] = {}
    fsync = os.fsync

    def recorded(handle: int) -> None:
        fsync(handle)
        synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size

    os.fsync = recorded
    plan, run = two_phases(), Path(folder)
    checkpoints: Any = Checkpoints(run, synced)
    with StepReports(plan, run, world, first_step=0, vocab_size=10) as reports:
        steps(reports, plan, 0, 2)
        bare(plan, world, reports, checkpoints, done=2).save()
    return checkpoints.found


def bare(
    plan: Any, world: Any, reports: Any, checkpointer: Any, optimizer: Any = None, done: int = 0
) -> Any:
    """A trainer without a model."""
    from megacode.train.online import OnlineMixing
    from megacode.train.trainer import Trainer

    made: Any = object.__new__(Trainer)
    vars(made).update(
        plan=plan, recipe=plan.recipe, world=world, reports=reports, checkpointer=checkpointer, optimizer=optimizer, done=done,
        model_chunks=[], ema=None, validation=None, tasks=None, tokenizer=None, vocab_size=10, facts={},
        mixing=OnlineMixing(Path("nowhere"), plan, world, done),
    )  # fmt: skip
    return made


def test_metrics_are_synced_before_a_checkpoint_is_saved(tmp_path: Path) -> None:
    """Also those of steps that `logging.every` would still have kept back."""
    ((found,),) = run_on(1, save_in_the_middle, str(tmp_path))
    assert found == ([1, 2], True, [1, 2])


def resume_at_the_boundary(world: Any, folder: str) -> None:
    from megacode.train.report_steps import StepReports

    plan, run = two_phases(), Path(folder)
    for first, end in (
        (0, 4),
        (3, 4),
        (3, 6),
    ):  # killed twice in step 4; the checkpoint is the one of the boundary
        with StepReports(plan, run, world, first_step=first, vocab_size=10) as reports:
            if first:
                reports.event(first, "resume")
            steps(reports, plan, first, end)


def test_a_phase_begins_once_also_when_resumed_at_its_start(tmp_path: Path) -> None:
    run_on(1, resume_at_the_boundary, str(tmp_path))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    phases = [
        (record["step"], record["phase"]) for record in records if record.get("event") == "phase"
    ]
    assert phases == [(1, "first"), (4, "second")]
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if record.get("event") == "resume"] == [3, 3]


def compared_with_bf16(world: Any, folder: str) -> str:
    """What is said."""
    import torch

    from megacode.train.report_steps import FinishedStep, StepReports

    plan = two_phases()
    said = io.StringIO()
    with (
        redirect_stdout(said),
        StepReports(plan, Path(folder), world, first_step=0, vocab_size=10) as reports,
    ):
        fp8, bf16 = (torch.tensor([[loss], [2.0]], dtype=torch.float64) for loss in (4.04, 4.0))
        reports.step(FinishedStep(0, fp8, 1.0, 1, 0.1, bf16))
        reports.step(FinishedStep(1, fp8, 1.0, 1, 0.1))
        reports.flush()
    return said.getvalue()


def test_a_step_compared_with_bf16_tells_the_drift(tmp_path: Path) -> None:
    (said,) = run_on(1, compared_with_bf16, str(tmp_path))
    first, second = [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert (
        abs(first["loss"] - 2.02) < 1e-9
        and abs(first["loss_bf16"] - 2.0) < 1e-9
        and abs(first["drift"] - 0.01) < 1e-9
    )
    assert "drift" not in second
    assert "step 1: the loss in FP8 differs from bf16's by +1.000%" in said


def test_mfu_comes_with_the_peak_and_the_convention() -> None:
    from megacode.plan.hardware import Hardware
    from megacode.train.report_steps import StepReports

    said: list[str] = []
    reports: Any = object.__new__(StepReports)
    device = "NVIDIA H100 80GB HBM3"
    vars(reports).update(plan=two_phases(), peak=989.4e12, device=device, say=said.append)
    reports.machine(Hardware(device), "torch's Adam", {})
    assert said[0].startswith(f"{device}: Megatron-Core's local layers, torch's Adam, fp32")
    assert f"989 TFLOP/s, the dense fp32 peak of {device}" in said[1]
    assert "causal attention counted in full" in said[1]


def told_late(world: Any, folder: str) -> list[int]:
    """Records on file after each of four steps, with `logging.every: 2`."""
    from megacode.train.report_steps import StepReports

    plan, run = two_phases(), Path(folder)
    recipe = plan.recipe.model_copy(
        update={"logging": plan.recipe.logging.model_copy(update={"every": 2})}
    )
    found = []
    with StepReports(
        dataclasses.replace(plan, recipe=recipe), run, world, first_step=0, vocab_size=10
    ) as reports:
        for step in range(4):
            steps(reports, plan, step, step + 1)
            records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            found.append(sum(record["kind"] == "train" for record in records))
    return found


def test_what_was_gathered_is_read_a_step_later_but_at_a_phases_end(tmp_path: Path) -> None:
    ((found,),) = [run_on(1, told_late, str(tmp_path))]
    assert found == [0, 0, 3, 3]  # gathered after step 2, written with step 3, which ends the phase


def diverge(world: Any, folder: str) -> list[str]:
    """What is said when the fourth step's gradient is not a number, with and without a checkpoint; saves that were made."""
    import torch

    from megacode.errors import UserError
    from megacode.train import trainer
    from megacode.train.report_steps import StepReports

    plan = two_phases()
    batch: Any = type("Batch", (), {"digest": 1, "micro_batches": ()})()
    idle: Any = type(
        "Idle",
        (),
        {"before": lambda *_: None, "after": lambda *_: None, "should_stop": lambda *_: 0},
    )()
    adam: Any = type("Adam", (), {"param_groups": ()})()
    said = []
    for name, saves in (("saved", True), ("unsaved", False), ("twice", True)):
        run = Path(folder, name)
        (run / "checkpoints").mkdir(parents=True)
        if name == "twice":
            checkpoint(run / "checkpoints", 2)
        made: Any = Saving(run / "checkpoints", saves)
        norms = iter([1.0, None, 1.0, float("nan"), 1.0, 1.0])
        trainer.train_step = lambda *_, norms=norms: (
            torch.ones(2, 1, dtype=torch.float64),
            next(norms),
        )
        with StepReports(plan, run, world, first_step=0, vocab_size=10) as reports:
            try:
                bare(plan, world, reports, made, adam)._loop(iter([batch] * 6), 6, idle, idle)
            except UserError as error:
                said.append(str(error))
        assert made.steps == [3], "the phase's end, and nothing after it"
    return said


class Saving:
    """Stands in for the checkpointer: a checkpoint appears once it is waited for."""

    def __init__(self, folder: Path, saves: bool) -> None:
        self.folder, self.saves = folder, saves
        self.steps: list[int] = []

    def save(self, done: int, *_: Any) -> None:
        self.steps.append(done)

    def poll(self) -> None:
        pass

    def wait(self) -> None:
        if self.saves:
            checkpoint(self.folder, self.steps[-1])


def checkpoint(folder: Path, step: int) -> None:
    path = folder / f"step_{step:08d}"
    path.mkdir()
    (path / "megacode.json").write_text(json.dumps({"step": step}))
    (folder / "latest").write_text(path.name)


def test_a_gradient_that_is_not_finite_ends_the_run_with_its_checkpoint(tmp_path: Path) -> None:
    """A skipped update, whose norm is None, does not: a loss scale is there to skip."""
    ((saved, unsaved, twice),) = run_on(1, diverge, str(tmp_path))
    assert (
        "gradient of step 4 (phase second) has the norm nan" in saved
        and "saves nothing more" in saved
    )
    assert (
        f"{tmp_path / 'saved/checkpoints/step_00000003'}: lower phases.second.learning_rate.peak"
        in saved
    )
    assert f"megacode fork {tmp_path / 'saved'} --at 3" in saved
    assert "there is no checkpoint from before" in unsaved
    assert f"may be spoilt already, with `megacode fork {tmp_path / 'twice'} --at 2`" in twice
    records = [
        json.loads(line) for line in (tmp_path / "saved/metrics.jsonl").read_text().splitlines()
    ]
    norms = [record["grad_norm"] for record in records if record["kind"] == "train"]
    assert norms == [1.0, None, 1.0, None]
