"""The training loop. What it calls has files of its own.

with Trainer(recipe, "runs/mine") as trainer:
    trainer.train()
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacode.convert.origin import as_checkpoint, open_origin
from megacode.data.loader import StepBatch, StepReader, batches
from megacode.data.mixture import OpenMixture
from megacode.data.packing_report import packing_line, packing_losses
from megacode.data.planning import plan_with_data
from megacode.data.source import open_sources
from megacode.data.tokenizer_check import unknown_makers
from megacode.errors import UserError
from megacode.evaluate.generate import Sampling, write_on
from megacode.evaluate.model import LoadedModel
from megacode.evaluate.scoring import RunTasks, write_results
from megacode.evaluate.validation import BitsPerByte, Validation
from megacode.megatron.checkpoint import Checkpointer, load_checkpoint
from megacode.megatron.config import megatron_config
from megacode.megatron.distributed import initialize, read_launch, seed_step, shutdown
from megacode.megatron.hardware import detect, userbuffers
from megacode.megatron.inference import for_inference
from megacode.megatron.initialize import fill_new_rows
from megacode.megatron.model import build_model, global_parameter_names
from megacode.megatron.optimizer import adam_of, build_optimizer, set_lr, wrap_data_parallel
from megacode.megatron.optimizer_state import reset_optimizer_state
from megacode.megatron.rotary import set_rotary
from megacode.megatron.step import (
    forward_backward,
    gathered_weights,
    prepare_model_for_training,
    train_step,
    without_fp8,
)
from megacode.megatron.weight_ema import WeightEma
from megacode.plan.fingerprint import fingerprint
from megacode.plan.plan import PhasePlan, Plan
from megacode.plan.trajectory import continued, next_boundary
from megacode.recipe.checks import check_layout
from megacode.recipe.load import dump_recipe
from megacode.recipe.schema import Recipe
from megacode.run.checkpoints import complete_checkpoints, remove_unfinished
from megacode.run.evaluations import items_folder
from megacode.run.folder import lock_run, put_other_futures_aside, start_over, write_start
from megacode.run.history import Start, find_start, is_own, recipe_of
from megacode.tokenizer.tokenizer import load_tokenizer, model_vocab_size
from megacode.train import garbage
from megacode.train.online import OnlineMixing
from megacode.train.profile import Profiler, ProfileSteps
from megacode.train.report_steps import FinishedStep, StepReports
from megacode.train.stop import StopRequest


class Trainer:
    """A run and what trains it on this rank: model chunks, optimizer, checkpoints, reports.

    A context manager: entered, it holds the run's folder, has joined the other ranks and loaded the
    latest checkpoint, or what a new run begins with. One process trains alone; under torchrun, srun
    or `megacode train --processes` each rank makes its own.

    Args:
        recipe: or a plan that `plan_with_data` made of one.
        run: folder; it goes on there if it holds a run.
        restart: put a run that is there aside, and start over.
        accept_changes: keys of the recipe whose change in the run's past is accepted.

    Raises:
        UserError: on entering, where the recipe, its data, the layout or what the run starts from
            do not fit.

    Attributes:
        done: finished steps.
    """

    def __init__(
        self,
        recipe: Recipe | Plan,
        run: str | Path,
        *,
        restart: bool = False,
        accept_changes: Sequence[str] = (),
    ) -> None:
        self.plan = recipe if isinstance(recipe, Plan) else plan_with_data(recipe)
        self.recipe, self.run = self.plan.recipe, Path(run)
        self.done = 0
        self._restart, self._accept_changes = restart, accept_changes

    def __enter__(self) -> Trainer:
        with contextlib.ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _open(self, stack: contextlib.ExitStack) -> None:
        recipe, plan, run = self.recipe, self.plan, self.run
        launch = read_launch()
        check_layout(recipe, launch.world_size)
        lock = stack.enter_context(lock_run(run)) if launch.rank == 0 else None
        if lock and self._restart and (aside := start_over(run)):
            print(f"starting over; the earlier run is kept as {aside}", flush=True)
        self.world = world = initialize(
            recipe.parallel, recipe.resolved_model_seed, launch, bool(recipe.fusion.cuda_graphs)
        )
        stack.push(_leave)
        self.tokenizer = load_tokenizer(recipe.tokenizer) if recipe.tokenizer else None
        self.vocab_size = model_vocab_size(recipe, self.tokenizer)
        start = find_start(run, plan, self._accept_changes, open_origin)
        self.done = start.step
        if start.step and start.checkpoint:
            self.plan = plan = continued(plan, recipe_of(start.checkpoint))
            self.recipe = recipe = plan.recipe
        tokenizer_facts = self.tokenizer.facts() if self.tokenizer else None
        self.facts = {"tokenizer": tokenizer_facts, **start.facts()}
        """What every checkpoint says of the run so far."""
        self.tasks = RunTasks.open(recipe)
        accepted = self.facts["accepted"]
        if world.is_main:
            remove_unfinished(run / "checkpoints")
            for line in (
                packing_line(packing_losses(plan)),
                unknown_makers(recipe),
                put_other_futures_aside(run, plan, self.done, accepted),
            ):
                if line:
                    print(line, flush=True)
            write_start(run, plan, world.size, self.vocab_size)
        self.reports = stack.enter_context(
            StepReports(plan, run, world, self.done, self.vocab_size)
        )
        self.mixing = OnlineMixing(
            run, plan, world, self.done, start.info.get("online") if start.step else None
        )

        decided = megatron_config(recipe, detect(), world.data_size)
        stack.enter_context(userbuffers(recipe, decided.transformer.tp_comm_overlap))
        model = build_model(recipe, self.vocab_size, decided)
        self.model_chunks = wrap_data_parallel(decided, model)
        self.optimizer = build_optimizer(recipe, self.model_chunks)
        self.ema = None
        if recipe.optimizer.ema:
            self.ema = WeightEma(recipe.optimizer.ema, self.optimizer, self.model_chunks)
        prepare_model_for_training(self.model_chunks, self.optimizer)
        self.reports.machine(decided.hardware, adam_of(self.optimizer), decided.overlaps)
        self.checkpointer = Checkpointer(
            run / "checkpoints",
            recipe.checkpoints,
            kept=plan.kept_checkpoints(),
            announce=self.reports.checkpoint,
            may_write=lock.check if lock else lambda: None,
            is_own=lambda checkpoint: is_own(checkpoint, plan, accepted),
        )
        self.validation = Validation.open(plan, world, self.tokenizer)
        self._load(start)
        trained_in = plan.phase_at(max(self.done - 1, 0)).name
        set_rotary(self.model_chunks, recipe.model_in(trained_in))

    # ------------------------------------------------------------------------------------ training

    def train(self, end_step: int | None = None, profile: ProfileSteps | None = None) -> int:
        """Train to `end_step` finished steps (default: the recipe's end), and save there.

        Args:
            profile: steps to profile into `RUN/profile`.

        Returns:
            0, or the signal (SIGTERM, SIGINT, SIGUSR1) that stopped it before; the state is saved.

        Raises:
            UserError: a gradient is not finite; nothing is saved after it.
        """
        end = self.plan.total_steps if end_step is None else end_step
        if profile:
            profile.check(self.done, end, self.world.size)
        step_batches = self._batches()
        profiler = Profiler(profile, self.run / "profile", self.world, self.reports.say)
        with (
            contextlib.closing(step_batches),
            StopRequest() as stop,
            contextlib.closing(profiler),
            garbage.held_off(),
        ):
            return self._loop(step_batches, end, stop, profiler)

    def _batches(self) -> Generator[StepBatch, None, None]:
        """This rank's batches after `done` steps. They are read ahead as far as shares are
        known, and on from there once the step before is finished."""
        sources = open_sources(self.plan)
        while self.done < self.plan.total_steps:
            reader = StepReader(
                OpenMixture(self.plan, sources),
                rank=self.world.data_rank,
                world=self.world.data_size,
                tokenizer=self.tokenizer,
            )
            end = next_boundary(self.plan, self.done)
            with batches(reader, self.done, end_step=end) as some:
                yield from some

    def _loop(
        self, step_batches: Iterator[StepBatch], end: int, stop: StopRequest, profiler: Profiler
    ) -> int:
        """Train until `end` or a stop signal; returns the signal's number, or 0."""
        checkpoint_steps, stopped_by = {*self.plan.checkpoints(), end}, 0
        first = self.done
        clock = time.perf_counter()
        for step in range(self.done, end):
            phase = self.plan.phase_at(step)
            if step in (first, phase.first_step):
                set_rotary(self.model_chunks, self.recipe.model_in(phase.name))
            if step == 0 and self.recipe.evaluation.at_start:
                self.evaluate()
                self.score()
                clock = time.perf_counter()
            if step == phase.first_step:
                self.reports.phase(phase)
                self.mixing.begin(self.plan, phase)
                if phase.fresh_optimizer:
                    reset_optimizer_state(self.optimizer)
            profiler.before(step)
            batch = next(step_batches)
            sums, norm, bf16_sums = self._update(step, phase, batch)
            if self.ema:
                self.ema.update(step + 1)
            garbage.collect_after(step + 1)
            # From the end of one step to the end of the next; without evaluation and saving.
            before, clock = clock, time.perf_counter()
            self.mixing.add(self.plan, phase, sums[:, : len(phase.streams)])
            self.reports.step(
                FinishedStep(step, sums, norm, batch.digest, clock - before, bf16_sums)
            )
            profiler.after(step)
            self.checkpointer.poll()

            self.done = step + 1
            if norm is not None and not math.isfinite(norm):
                self.reports.flush()
                self.checkpointer.wait()  # one from before may be under way
                raise UserError(_divergence(self.checkpointer.folder, phase.name, self.done, norm))
            self.reports.plan = self.plan = self.mixing.decide(self.plan, self.done)
            self.recipe = self.plan.recipe
            evaluation = self.recipe.evaluation
            at_end = step == phase.last_step and evaluation.at_phase_end
            if at_end or _due(self.done, evaluation.every):
                self.evaluate()
                clock = time.perf_counter()
            if at_end or _due(self.done, evaluation.tasks_every or evaluation.every):
                self.score()
                clock = time.perf_counter()
            stopped_by = stop.should_stop() if self.done < end else 0
            if self.done in checkpoint_steps or stopped_by:
                self.save()
                clock = time.perf_counter()
            if stopped_by:
                break
        self.checkpointer.wait()
        self.reports.end(self.done, stopped_by)
        return stopped_by

    def _update(
        self, step: int, phase: PhasePlan, batch: StepBatch
    ) -> tuple[Tensor, float | None, Tensor | None]:
        """Train one step.

        Returns:
            (sums and gradient norm as `train_step` gives them, the sums of the same batch and
            weights forward in bf16 where `precision.compare_every` asks for them).
        """
        recipe, world, model = self.recipe, self.world, self.model_chunks
        streams, bf16_sums = len(phase.streams), None
        seed_step(recipe, step, world)
        if _due(step + 1, recipe.precision.compare_every):
            with without_fp8(model), torch.no_grad():
                bf16_sums = forward_backward(
                    model, batch.micro_batches, streams, recipe, world, forward_only=True
                )
            seed_step(recipe, step, world)  # both drop the same units
        set_lr(self.optimizer, phase.learning_rate(step), recipe.optimizer.weight_decay)
        sums, norm = train_step(
            model,
            self.optimizer,
            batch.micro_batches,
            streams,
            recipe,
            world,
            phase.loss_weights,
            phase.objective_at(step),
        )
        return sums, norm, bf16_sums

    # --------------------------------------------------------------------- what the model is asked

    def evaluate(self) -> dict[str, tuple[float, int]]:
        """Validation loss (nats a token) and tokens of every source that has a `validation` set.

        Collective.
        """
        if self.validation is None:
            return {}
        self.reports.flush()
        with gathered_weights(self.model_chunks):
            losses = self.validation.losses(self.model_chunks, self.done)
        self.reports.validated(self.done, losses, BitsPerByte.of(self.validation, losses))
        gc.collect()
        return losses

    def score(self) -> dict[str, dict[str, Any]]:
        """Numbers of every task of `evaluation.tasks` and `evaluation.harness`, by name; the items'
        scores go to `RUN/evaluations`. Collective."""
        if self.tasks is None:
            return {}
        self.reports.flush()
        model = self.recipe.model_in(self.plan.phase_at(max(self.done - 1, 0)).name)
        assert model.context_length and self.tokenizer
        loaded = LoadedModel(
            self.recipe, self.tokenizer, self.model_chunks, self.world, model.context_length
        )
        with gathered_weights(self.model_chunks), for_inference(self.model_chunks):
            numbers, results = self.tasks.score(loaded)
        if self.world.is_main:
            write_results(items_folder(self.run, self.done), results)
        self.reports.scored(self.done, numbers)
        gc.collect()
        return numbers

    def generate(self, prompt: str, tokens: int = 64, sampling: Sampling | None = None) -> str:
        """Text that goes on from `prompt`; greedy without `sampling`.

        On one process; `megacode generate` reads checkpoints of any layout.

        Raises:
            UserError: there are several ranks, or the recipe names no tokenizer.
        """
        tokenizer = self.tokenizer
        if self.world.size > 1 or tokenizer is None or self.recipe.tokenizer is None:
            why = "several ranks hold the model" if tokenizer else "the recipe names no tokenizer"
            raise UserError(
                f"{self.run}: cannot generate here: {why}; use `megacode generate {self.run}` on a "
                "checkpoint"
            )
        ids = tokenizer.encode(prompt)
        bos = [tokenizer.bos_id] if self.recipe.tokenizer.bos else []
        model = getattr(self.model_chunks[0], "module", self.model_chunks[0])
        model.eval()
        try:
            with gathered_weights(self.model_chunks):
                return write_on(
                    model, self.recipe, tokenizer, [*bos, *ids], tokens, sampling or Sampling(), ids
                )
        finally:
            model.train()

    # --------------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Start writing a checkpoint of `done` steps; `checkpointer.wait()` waits. Collective."""
        plan, recipe, online = self.plan, self.recipe, self.mixing.facts()
        self.reports.sync()
        info = {
            "recipe": recipe.name,
            "phase": plan.phase_at(self.done - 1).name,
            "tokens": plan.tokens_before(self.done),
            "facts": fingerprint(plan, self.done),
            "vocab_size": self.vocab_size,
            **self.facts,
            **({"ema": True} if self.ema else {}),
            **({"online": online} if online else {}),
            "distributed_optimizer": recipe.parallel.distributed_optimizer,
            "layout": {
                "tensor": recipe.parallel.tensor,
                "pipeline": recipe.parallel.pipeline,
                "context": recipe.parallel.context,
                "data": self.world.data_size,
            },
        }
        with gathered_weights(self.model_chunks):
            self.checkpointer.save(
                self.done, self.model_chunks, self.optimizer, info, dump_recipe(recipe), self.ema
            )
        gc.collect()  # free its copies of tensors now

    def _load(self, start: Start) -> None:
        """Load what the run goes on from, or begins with."""
        plan, recipe, reports, size = self.plan, self.recipe, self.reports, self.world.size
        checkpoint = start.checkpoint
        if start.note:
            reports.say(start.note)
        if start.step and checkpoint:
            saved = start.info["distributed_optimizer"]
            if saved != recipe.parallel.distributed_optimizer:
                raise UserError(
                    f"{checkpoint}: was saved with parallel.distributed_optimizer: {saved}; set it "
                    "so, or start a new run from its weights with `initialize_from`"
                )
            load_checkpoint(checkpoint, self.model_chunks, self.optimizer, self.ema)
            if self.ema and not start.info.get("ema"):
                reports.say(f"optimizer.ema: {checkpoint} has none; it begins with these weights")
            if start.info.get("ema") and not self.ema:
                reports.say(f"optimizer.ema: the one in {checkpoint} is dropped")
            line = f"continuing from {checkpoint}: step {self.done:,} of {plan.total_steps:,}"
            reports.event(self.done, "resume", line, checkpoint=str(checkpoint), world_size=size)
        else:
            if checkpoint:
                self._load_weights(checkpoint)
            if self.ema:
                self.ema.restart()
            scope = f"{plan.total_steps:,} steps, {plan.total_tokens:,} tokens"
            line = f"starting {recipe.name}: {scope}, {size} process{'es' * (size > 1)}"
            reports.event(0, "start", line, world_size=size)
            if checkpoint:
                line = f"weights from {checkpoint}"
                reports.event(0, "initialize", line, checkpoint=str(checkpoint))
        for change in start.changes:
            # An event of the first step that has it: a start again at `done` writes it anew.
            line = f"accepted: {change}"
            reports.event(self.done + 1, "accepted change", line, **asdict(change))

    def _load_weights(self, checkpoint: Path) -> None:
        """Load weights only, of a checkpoint or a Hugging Face folder, and fill rows it lacks."""
        recipe, world, say = self.recipe, self.world, self.reports.say
        with as_checkpoint(
            checkpoint, self.run, recipe, self.tokenizer, world.is_main, say
        ) as folder:
            info = load_checkpoint(folder, self.model_chunks, None)
        old, new = int(info.get("vocab_size") or self.vocab_size), self.vocab_size
        if old < new:
            fill_new_rows(global_parameter_names(list(self.model_chunks)), recipe, old, new)
            rows = {
                "mean": "start as the mean of the others",
                "init": "are drawn as the recipe draws a new model's",
            }[recipe.initialize_new_rows]
            say(
                f"{checkpoint} has {old:,} tokens, the tokenizer {new:,}: rows of the "
                f"{new - old:,} new ones {rows}, in the embedding and in the output layer"
            )
        self.optimizer.reload_model_params()


def _divergence(folder: Path, phase: str, done: int, norm: float) -> str:
    """Why a run ends whose last update spoilt its weights, and what to do.

    Args:
        folder: RUN/checkpoints.
        done: finished steps.
        norm: of the last step's gradient.
    """
    run, lower = folder.parent, f"lower phases.{phase}.learning_rate.peak"
    if before := complete_checkpoints(folder):
        last, path = before[-1]
        # The update that the last checkpoint holds may be the one that went wrong.
        doubtful = last == done - 1 and len(before) > 1
        leave = "leave it, for its weights may be spoilt already," if doubtful else "change more"
        remedy = (
            f"the last checkpoint is {path}: {lower} and train on from there, or {leave} with "
            f"`megacode fork {run} --at {before[-2 if doubtful else -1][0]}`"
        )
    else:
        remedy = f"there is no checkpoint from before: {lower} and start again"
    return (
        f"{run}: the gradient of step {done} (phase {phase}) has the norm {norm}, so the run ends "
        f"there and saves nothing more; {remedy} (`megacode trace {run} --step {done}` shows what "
        "the step read)"
    )


def _leave(kind: type[BaseException] | None, *_: Any) -> None:
    """Leave the process groups; not after an error, when others may wait in a collective."""
    if kind is None:
        shutdown()


def _due(done: int, every: int | None) -> bool:
    return bool(every and done % every == 0)
