"""Training: the loop reads like the algorithm; everything it calls has a file of its own.

with Trainer(recipe, "runs/mine") as trainer:
    trainer.train()
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor

from megacode.data.loader import StepBatch, StepReader, batches
from megacode.data.mixture import open_mixture
from megacode.data.packing_report import packing_line, packing_losses
from megacode.data.planning import plan_with_data
from megacode.data.tokenizer_check import unknown_makers
from megacode.errors import UserError
from megacode.evaluate.generate import Sampling, continuation, continue_tokens
from megacode.evaluate.validation import Validation, validate
from megacode.megatron.checkpoint import Checkpointer, load_checkpoint
from megacode.megatron.config import megatron_config
from megacode.megatron.distributed import initialize, read_launch, seed_step, shutdown
from megacode.megatron.hardware import detect, userbuffers
from megacode.megatron.initialize import fill_new_rows
from megacode.megatron.model import build_model, global_parameter_names
from megacode.megatron.optimizer import adam_of, build_optimizer, set_lr, wrap_data_parallel
from megacode.megatron.optimizer_state import reset_optimizer_state
from megacode.megatron.step import (
    forward_backward,
    gathered_weights,
    prepare_model_for_training,
    train_step,
    without_fp8,
)
from megacode.plan.fingerprint import fingerprint
from megacode.plan.plan import Plan
from megacode.recipe.checks import check_layout
from megacode.recipe.load import dump_recipe
from megacode.recipe.schema import Recipe
from megacode.run.checkpoints import complete_checkpoints, find_checkpoint, remove_unfinished
from megacode.run.folder import (
    Resume,
    checkpoint_to_resume,
    lock_run,
    start_over,
    write_start,
)
from megacode.run.history import came_with_weights, initial_changes, is_own, put_other_futures_aside
from megacode.run.profile_steps import ProfileSteps
from megacode.tokenizer.tokenizer import load_tokenizer, model_vocab_size
from megacode.train import garbage
from megacode.train.profile import Profiler
from megacode.train.report_steps import StepReports
from megacode.train.stop import StopRequest


class Trainer:
    """A run and what trains it on this rank: model chunks, optimizer, checkpoints, reports.

    A context: entered, it holds the run's folder, joins the other ranks and stands where the run's latest checkpoint is (or at
    step 0). One process trains alone; under torchrun, srun or `megacode train --processes` each rank makes its own.

    Args:
        recipe: or a plan that `plan_with_data` made of one.
        run: folder; it goes on there if it holds a run.
        restart: put a run that is there aside, and start over.
        accept_changes: keys of the recipe whose change in the run's past is accepted.

    Raises:
        UserError: on entering, where the recipe, its data, the layout or what the run starts from do not fit.

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _open(self, stack: contextlib.ExitStack) -> None:
        recipe, plan, run = self.recipe, self.plan, self.run
        launch = read_launch()
        check_layout(recipe, launch.world_size)
        may_write: Callable[[], None] = _anyone
        if launch.rank == 0:
            may_write = stack.enter_context(lock_run(run)).check
            if self._restart and (aside := start_over(run)):
                print(f"starting over; the earlier run is kept as {aside}", flush=True)
        self.world = world = initialize(
            recipe.parallel, recipe.seed, launch, bool(recipe.fusion.cuda_graphs)
        )
        stack.push(_leave)
        self.tokenizer = load_tokenizer(recipe.tokenizer) if recipe.tokenizer else None
        self.vocab_size = model_vocab_size(recipe, self.tokenizer)
        if world.is_main:
            print(packing_line(packing_losses(plan)), flush=True)
            if note := unknown_makers(recipe):
                print(note, flush=True)

        resume = checkpoint_to_resume(run, plan, self._accept_changes)
        self.done = resume.step if resume else 0
        changes = resume.changes if resume else initial_changes(recipe, self._accept_changes)
        accepted = [
            *(resume.info.get("accepted", []) if resume else []),
            *({"step": self.done, **asdict(c)} for c in changes),
        ]
        self.history = {
            "tokenizer": self.tokenizer.facts() if self.tokenizer else None,
            "accepted": accepted,
            **came_with_weights(recipe, resume.info if resume else None),
        }
        """What every checkpoint says of the run so far."""
        if world.is_main:
            remove_unfinished(run / "checkpoints")
            if resume and (line := put_other_futures_aside(run, plan, resume.step, accepted)):
                print(line, flush=True)
            write_start(run, plan, world.size, self.vocab_size)
        self.reports = stack.enter_context(
            StepReports.open(plan, run, world, first_step=self.done, vocab_size=self.vocab_size)
        )

        decided = megatron_config(recipe, detect(), world.data_size)
        stack.enter_context(userbuffers(recipe, decided.transformer.tp_comm_overlap))
        self.model_chunks = wrap_data_parallel(
            decided, build_model(recipe, self.vocab_size, decided)
        )
        self.optimizer = build_optimizer(recipe, self.model_chunks)
        prepare_model_for_training(self.model_chunks, self.optimizer)
        self.reports.machine(decided.hardware, adam_of(self.optimizer), decided.overlaps)
        self.checkpointer = Checkpointer(
            run / "checkpoints",
            recipe.checkpoints,
            kept=plan.kept_checkpoints(),
            announce=self.reports.checkpoint,
            may_write=may_write,
            is_own=lambda checkpoint: is_own(checkpoint, plan, accepted),
        )
        self.validation = Validation.open(plan, world, self.tokenizer)
        self._restore(resume)
        self.reports.accepted(self.done, changes)

    # --------------------------------------------------------------------------------------------------- training

    def train(self, end_step: int | None = None, profile: ProfileSteps | None = None) -> int:
        """Train to `end_step` finished steps (default: the recipe's end). A checkpoint is there afterwards.

        Args:
            profile: steps to profile into `RUN/profile`.

        Returns:
            0, or the signal that asked to stop before (SIGTERM, SIGINT, SIGUSR1): the state is saved then, too.

        Raises:
            UserError: a gradient is not finite; nothing is saved after it.
        """
        end = self.plan.total_steps if end_step is None else end_step
        if profile:
            profile.check(self.done, end, self.world.size)
        reader = StepReader(
            open_mixture(self.plan),
            rank=self.world.data_rank,
            world=self.world.data_size,
            tokenizer=self.tokenizer,
        )
        step_batches = batches(reader, self.done)
        profiler = Profiler(profile, self.run / "profile", self.world, self.reports.say)
        with (
            contextlib.closing(step_batches),
            StopRequest() as stop,
            contextlib.closing(profiler),
            garbage.held_off(),
        ):
            return self._loop(step_batches, end, stop, profiler)

    def _loop(
        self, step_batches: Iterator[StepBatch], end: int, stop: StopRequest, profiler: Profiler
    ) -> int:
        plan, recipe, world = self.plan, self.recipe, self.world
        checkpoint_steps, last_saved = set(plan.checkpoints()), self.done
        clock = time.perf_counter()
        for step in range(self.done, end):
            phase = plan.phase_at(step)
            if step == phase.first_step:
                self.reports.phase(phase)
                if phase.fresh_optimizer:
                    reset_optimizer_state(self.optimizer)
            profiler.before(step)
            batch = next(step_batches)
            seed_step(recipe, step, world)
            reference = self._bf16_sums(batch, step)
            set_lr(self.optimizer, phase.learning_rate(step), recipe.optimizer.weight_decay)
            sums, norm = train_step(
                self.model_chunks,
                self.optimizer,
                batch.micro_batches,
                len(phase.streams),
                recipe,
                world,
            )
            garbage.collect_after(step + 1)
            # From the end of one step to the end of the next, reporting included; evaluation and saving are not training.
            now = time.perf_counter()
            self.reports.step(step, sums, norm, batch, now - clock, reference)
            clock = now
            profiler.after(step)
            self.checkpointer.poll()

            self.done = step + 1
            if norm is not None and not math.isfinite(norm):
                self._diverged(norm)
            at_phase_end = self.done == phase.first_step + phase.steps
            if _due(self.done, recipe.evaluation.every) or (
                at_phase_end and recipe.evaluation.at_phase_end
            ):
                self.evaluate()
                clock = time.perf_counter()
            stopped_by = stop.should_stop() if self.done < end else 0
            if self.done in checkpoint_steps or stopped_by:
                self.save()
                last_saved = self.done
                clock = time.perf_counter()
            if stopped_by:
                self.checkpointer.wait()
                self.reports.stopped(self.done, stopped_by)
                return stopped_by
        if last_saved < end:
            self.save()
        self.checkpointer.wait()
        if end < plan.total_steps:
            self.reports.paused(end)
        else:
            self.reports.finished()
        return 0

    # ------------------------------------------------------------------------------------- what the model is asked

    def evaluate(self) -> dict[str, tuple[float, int]]:
        """Validation loss (nats a token) and tokens of every source that has a `validation` set. Collective."""
        if self.validation is None:
            return {}
        self.reports.flush()
        with gathered_weights(self.model_chunks):
            losses = validate(self.validation, self.model_chunks, self.plan, self.done, self.world)
        self.reports.validated(self.done, losses)
        gc.collect()
        return losses

    def generate(self, prompt: str, tokens: int = 64, sampling: Sampling | None = None) -> str:
        """Text that goes on from `prompt`; greedy without `sampling`. On one process (`megacode generate` reads any layout's).

        Raises:
            UserError: there are several ranks, or the recipe names no tokenizer.
        """
        tokenizer = self.tokenizer
        if self.world.size > 1 or tokenizer is None or self.recipe.tokenizer is None:
            why = "several ranks hold the model" if tokenizer else "the recipe names no tokenizer"
            raise UserError(
                f"{self.run}: cannot generate here: {why}; use `megacode generate {self.run}` on a checkpoint"
            )
        ids = tokenizer.encode(prompt)
        start = [tokenizer.bos_id] if self.recipe.tokenizer.bos else []
        stop = tokenizer.eod_id if self.recipe.tokenizer.eod else None
        model = getattr(self.model_chunks[0], "module", self.model_chunks[0])
        model.eval()
        try:
            with gathered_weights(self.model_chunks):
                written = list(
                    continue_tokens(
                        model,
                        [*start, *ids],
                        tokens,
                        stop,
                        sampling or Sampling(),
                        tokenizer.vocab_size,
                    )
                )
        finally:
            model.train()
        return continuation(tokenizer, ids, written)

    def _bf16_sums(self, batch: StepBatch, step: int) -> Tensor | None:
        """The batch's sums of loss as bf16 has them, where FP8 is to be compared with it in this step."""
        if not _due(step + 1, self.recipe.precision.compare_every):
            return None
        streams = len(self.plan.phase_at(step).streams)
        with without_fp8(self.model_chunks), torch.no_grad():
            sums = forward_backward(
                self.model_chunks,
                batch.micro_batches,
                streams,
                self.recipe,
                self.world,
                forward_only=True,
            )
        seed_step(self.recipe, step, self.world)  # the step itself drops what this one dropped
        return sums

    # ------------------------------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Start writing a checkpoint of `done` steps. Collective; `checkpointer.wait()` waits for it."""
        plan, recipe = self.plan, self.recipe
        self.reports.sync()
        info = {
            "recipe": recipe.name,
            "phase": plan.phase_at(self.done - 1).name,
            "tokens": plan.tokens_before(self.done),
            "facts": fingerprint(plan, self.done),
            "vocab_size": self.vocab_size,
            **self.history,
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
                self.done, self.model_chunks, self.optimizer, info, dump_recipe(recipe)
            )
        gc.collect()  # its copies of tensors are not to wait for the next time that this is due

    def _restore(self, resume: Resume | None) -> None:
        """Load what the run starts from."""
        recipe = self.recipe
        if resume:
            checkpoint, info = resume.checkpoint, resume.info
            if info["distributed_optimizer"] != recipe.parallel.distributed_optimizer:
                raise UserError(
                    f"{checkpoint}: was saved with parallel.distributed_optimizer: {info['distributed_optimizer']}; set it so, "
                    "or start a new run from its weights with `initialize_from`"
                )
            load_checkpoint(checkpoint, self.model_chunks, self.optimizer)
            self.reports.resumed(checkpoint, resume.step, resume.note)
        elif recipe.initialize_from:
            checkpoint = find_checkpoint(recipe.initialize_from, self.reports.say)
            info = load_checkpoint(checkpoint, self.model_chunks, None)
            old, new = int(info.get("vocab_size") or self.vocab_size), self.vocab_size
            if old < new:
                fill_new_rows(global_parameter_names(list(self.model_chunks)), old, new)
                self.reports.say(
                    f"{checkpoint} has {old:,} tokens, the tokenizer {new:,}: rows of the {new - old:,} new ones start as the "
                    "mean of the others, in the embedding and in the output layer"
                )
            self.optimizer.reload_model_params()
            self.reports.initialized(checkpoint)
        else:
            self.reports.started()

    def _diverged(self, norm: float) -> NoReturn:
        """End a run whose update spoilt its weights, before they replace a good checkpoint. Collective: the norm is
        everybody's."""
        self.reports.flush()
        self.checkpointer.wait()  # one from before may be under way
        done, folder = self.done, self.checkpointer.folder
        phase = self.plan.phase_at(done - 1).name
        lower = f"lower phases.{phase}.learning_rate.peak"
        before = complete_checkpoints(folder)
        if not before:
            remedy = f"there is no checkpoint from before: {lower} and start again"
        else:
            last, path = before[-1]
            doubtful = (
                last == done - 1 and len(before) > 1
            )  # the update that it holds may be the one that went wrong
            remedy = (
                f"the last checkpoint is {path}: {lower} and train on from there, or "
                + (
                    "leave it, for its weights may be spoilt already, with"
                    if doubtful
                    else "change more with"
                )
                + f" `megacode fork {folder.parent} --at {before[-2 if doubtful else -1][0]}`"
            )
        raise UserError(
            f"{folder.parent}: the gradient of step {done} (phase {phase}) has the norm {norm}, so the run ends there and saves "
            f"nothing more; {remedy} (`megacode trace {folder.parent} --step {done}` shows what the step read)"
        )


def _anyone() -> None:
    """May write: ranks other than the first write no names."""


def _leave(kind: type[BaseException] | None, *_: Any) -> None:
    """Leave the other ranks in good order; after an error they may wait in a collective for this one, which then just goes."""
    if kind is None:
        shutdown()


def _due(done: int, every: int | None) -> bool:
    return bool(every and done % every == 0)
