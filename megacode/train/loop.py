"""Training: the loop reads like the algorithm; everything it calls has a file of its own."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from megacode.data.loader import StepBatch, batches
from megacode.data.mixture import Mixture
from megacode.data.source import open_sources
from megacode.errors import UserError
from megacode.evaluate.validation import Validation, validate
from megacode.launch import STOPPED
from megacode.megatron.checkpoint import Checkpointer, load_checkpoint
from megacode.megatron.config import transformer_config
from megacode.megatron.distributed import World, seed_step
from megacode.megatron.hardware import detect
from megacode.megatron.initialize import fill_new_rows
from megacode.megatron.model import build_model, global_parameter_names
from megacode.megatron.optimizer import adam_of, build_optimizer, forget_state, set_rates, wrap_data_parallel
from megacode.megatron.step import (
    forward_backward,
    gathered_weights,
    prepare_model_for_training,
    train_step,
    without_fp8,
)
from megacode.megatron.userbuffers import userbuffers
from megacode.plan.fingerprint import fingerprint
from megacode.plan.plan import Plan
from megacode.recipe.load import dump_recipe
from megacode.run.checkpoints import complete_checkpoints, find_checkpoint, remove_unfinished
from megacode.run.folder import Resume, checkpoint_to_resume, write_start
from megacode.run.history import came_with_weights, initial_changes, is_own, put_other_futures_aside
from megacode.run.profile_steps import ProfileSteps
from megacode.tokenizer.tokenizer import Tokenizer
from megacode.train import garbage
from megacode.train.profile import Profiler
from megacode.train.report_steps import StepReports
from megacode.train.stop import StopRequest


@dataclass(frozen=True)
class Trainer:
    """What the loop works with on this rank."""

    plan: Plan
    world: World
    chunks: Sequence[Any]
    optimizer: Any
    checkpointer: Checkpointer
    validation: Validation | None
    reports: StepReports
    profiler: Profiler
    vocab_size: int
    history: dict[str, Any]
    """What every checkpoint says of the run so far: tokenizer, accepted changes, what came with imported weights."""


def train(
    plan: Plan,
    run: Path,
    world: World,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    until: int | None = None,
    may_write: Callable[[], None] = lambda: None,
    profile: ProfileSteps | None = None,
    accept: Sequence[str] = (),
) -> int:
    """Train `plan` in the folder `run`, from its latest checkpoint if it has one.

    Args:
        until: finished steps to end at; default: the plan's. A checkpoint is there afterwards.
        may_write: called on rank 0 before a checkpoint becomes one; raises if another process has the run by now.
        profile: steps to profile into `RUN/profile`.
        accept: keys of the recipe whose change in a run's past is accepted.

    Returns:
        0 when all is done, `STOPPED` when a signal asked to stop before (state saved); errors are raised.

    Raises:
        UserError: what the run starts from or how it is to train does not fit, or a gradient is not finite.
    """
    recipe = plan.recipe
    resume = checkpoint_to_resume(run, plan, accept)
    done = resume.step if resume else 0
    changes = resume.changes if resume else initial_changes(recipe, accept)
    accepted = [*(resume.info.get("accepted", []) if resume else []), *({"step": done, **asdict(c)} for c in changes)]
    end = plan.total_steps if until is None else until
    if profile:
        profile.check(done, end, world.size)
    if world.is_main:
        remove_unfinished(run / "checkpoints")
        if resume and (line := put_other_futures_aside(run, plan, resume.step, accepted)):
            print(line, flush=True)
        write_start(run, plan, world.size, vocab_size)
    reports = StepReports.open(plan, run, world, first_step=done, vocab_size=vocab_size)

    hardware = detect()
    config = transformer_config(recipe, hardware, world.data_size)
    with contextlib.ExitStack() as held:
        held.enter_context(userbuffers(recipe, config.tp_comm_overlap))
        model = build_model(recipe, vocab_size, config, hardware)
        chunks = wrap_data_parallel(recipe, config, model, world.data_size, hardware)
        optimizer = build_optimizer(recipe, chunks)
        prepare_model_for_training(chunks, optimizer)
        reports.machine(hardware, adam_of(optimizer))
        trainer = Trainer(
            plan=plan,
            world=world,
            chunks=chunks,
            optimizer=optimizer,
            checkpointer=Checkpointer(
                run / "checkpoints",
                recipe.checkpoints,
                kept=plan.kept_checkpoints(),
                announce=reports.checkpoint,
                may_write=may_write,
                is_own=lambda checkpoint: is_own(checkpoint, plan, accepted),
            ),
            validation=Validation.open(plan, world, tokenizer),
            reports=reports,
            profiler=Profiler(profile, run / "profile", world, reports.say),
            vocab_size=vocab_size,
            history={
                "tokenizer": tokenizer.facts() if tokenizer else None,
                "accepted": accepted,
                **came_with_weights(recipe, resume.info if resume else None),
            },
        )
        _restore(trainer, resume)
        reports.accepted(done, changes)
        mixture = Mixture(plan, open_sources(plan))
        stream = batches(mixture, rank=world.data_rank, world=world.data_size, first_step=done, tokenizer=tokenizer)
        held.enter_context(contextlib.closing(stream))
        stop = held.enter_context(StopRequest())
        held.enter_context(reports)
        held.enter_context(contextlib.closing(trainer.profiler))
        held.enter_context(garbage.held_off())
        return _loop(trainer, stream, done, end, stop)


def _loop(trainer: Trainer, stream: Iterator[StepBatch], first: int, until: int, stop: StopRequest) -> int:
    plan, recipe, world = trainer.plan, trainer.plan.recipe, trainer.world
    saves, last_saved = set(plan.checkpoints()), first
    clock = time.perf_counter()
    for step in range(first, until):
        phase = plan.phase_at(step)
        if step == phase.first_step:
            trainer.reports.phase(phase)
            if phase.fresh_optimizer:
                forget_state(trainer.optimizer)
        trainer.profiler.before(step)
        batch = next(stream)
        seed_step(recipe, step, world)
        reference = _bf16_sums(trainer, batch, step)
        set_rates(trainer.optimizer, phase.learning_rate(step), recipe.optimizer.weight_decay)
        sums, norm = train_step(
            trainer.chunks, trainer.optimizer, batch.micro_batches, len(phase.streams), recipe, world
        )
        garbage.collect_after(step + 1)
        # From the end of one step to the end of the next, reporting included; evaluation and saving are not training.
        now = time.perf_counter()
        trainer.reports.step(step, sums, norm, batch, now - clock, reference)
        clock = now
        trainer.profiler.after(step)
        trainer.checkpointer.poll()

        done = step + 1
        if norm is not None and not math.isfinite(norm):
            _diverged(trainer, done, norm)
        at_phase_end = done == phase.first_step + phase.steps
        if _due(done, recipe.evaluation.every) or (at_phase_end and recipe.evaluation.at_phase_end):
            _evaluate(trainer, done)
            clock = time.perf_counter()
        stopping = stop.agreed() if done < until else 0
        if done in saves or stopping:
            _save(trainer, done)
            last_saved = done
            clock = time.perf_counter()
        if stopping:
            trainer.checkpointer.wait()
            trainer.reports.stopped(done, stopping)
            return STOPPED
    if last_saved < until:
        _save(trainer, until)
    trainer.checkpointer.wait()
    if until < plan.total_steps:
        trainer.reports.paused(until)
    else:
        trainer.reports.finished()
    return 0


def _diverged(trainer: Trainer, done: int, norm: float) -> NoReturn:
    """End a run whose update spoilt its weights, before they replace a good checkpoint. Collective: the norm is everybody's."""
    trainer.reports.flush()
    trainer.checkpointer.wait()  # one from before may be under way
    folder = trainer.checkpointer.folder
    phase = trainer.plan.phase_at(done - 1).name
    lower = f"lower phases.{phase}.learning_rate.peak"
    before = complete_checkpoints(folder)
    if not before:
        remedy = f"there is no checkpoint from before: {lower} and start again"
    else:
        last, path = before[-1]
        doubtful = last == done - 1 and len(before) > 1  # the update that it holds may be the one that went wrong
        remedy = (
            f"the last checkpoint is {path}: {lower} and train on from there, or "
            + ("leave it, for its weights may be spoilt already, with" if doubtful else "change more with")
            + f" `megacode fork {folder.parent} --at {before[-2 if doubtful else -1][0]}`"
        )
    raise UserError(
        f"{folder.parent}: the gradient of step {done} (phase {phase}) has the norm {norm}, so the run ends there and saves "
        f"nothing more; {remedy} (`megacode trace {folder.parent} --step {done}` shows what the step read)"
    )


def _bf16_sums(trainer: Trainer, batch: StepBatch, step: int) -> Tensor | None:
    """The batch's sums of loss as bf16 has them, where FP8 is to be compared with it in this step."""
    recipe = trainer.plan.recipe
    if not _due(step + 1, recipe.precision.compare_every):
        return None
    streams = len(trainer.plan.phase_at(step).streams)
    with without_fp8(trainer.chunks), torch.no_grad():
        sums = forward_backward(trainer.chunks, batch.micro_batches, streams, recipe, trainer.world, forward_only=True)
    seed_step(recipe, step, trainer.world)  # the step itself drops what this one dropped
    return sums


def _due(done: int, every: int | None) -> bool:
    return bool(every) and done % every == 0


def _restore(trainer: Trainer, resume: Resume | None) -> None:
    """Load what the run starts from."""
    recipe = trainer.plan.recipe
    if resume:
        checkpoint, info = resume.checkpoint, resume.info
        if info["distributed_optimizer"] != recipe.parallel.distributed_optimizer:
            raise UserError(
                f"{checkpoint}: was saved with parallel.distributed_optimizer: {info['distributed_optimizer']}; set it so, or "
                "start a new run from its weights with `initialize_from`"
            )
        load_checkpoint(checkpoint, trainer.chunks, trainer.optimizer)
        trainer.reports.resumed(checkpoint, resume.step, resume.note)
    elif recipe.initialize_from:
        checkpoint = find_checkpoint(recipe.initialize_from, trainer.reports.say)
        info = load_checkpoint(checkpoint, trainer.chunks, None)
        old, new = int(info.get("vocab_size") or trainer.vocab_size), trainer.vocab_size
        if old < new:
            fill_new_rows(global_parameter_names(list(trainer.chunks)), old, new)
            trainer.reports.say(
                f"{checkpoint} has {old:,} tokens, the tokenizer {new:,}: rows of the {new - old:,} new ones start as the mean "
                "of the others, in the embedding and in the output layer"
            )
        trainer.optimizer.reload_model_params()
        trainer.reports.initialized(checkpoint)
    else:
        trainer.reports.started()


def _save(trainer: Trainer, done: int) -> None:
    plan, recipe = trainer.plan, trainer.plan.recipe
    trainer.reports.sync()
    info = {
        "recipe": recipe.name,
        "phase": plan.phase_at(done - 1).name,
        "tokens": plan.tokens_before(done),
        "facts": fingerprint(plan, done),
        "vocab_size": trainer.vocab_size,
        **trainer.history,
        "distributed_optimizer": recipe.parallel.distributed_optimizer,
        "layout": {
            "tensor": recipe.parallel.tensor,
            "pipeline": recipe.parallel.pipeline,
            "context": recipe.parallel.context,
            "data": trainer.world.data_size,
        },
    }
    with gathered_weights(trainer.chunks):
        trainer.checkpointer.save(done, trainer.chunks, trainer.optimizer, info, dump_recipe(recipe))
    gc.collect()  # its copies of tensors are not to wait for the next time that this is due


def _evaluate(trainer: Trainer, done: int) -> None:
    if trainer.validation is None:
        return
    trainer.reports.flush()
    with gathered_weights(trainer.chunks):
        losses = validate(trainer.validation, trainer.chunks, trainer.plan, done, trainer.world)
    trainer.reports.validated(done, losses)
    gc.collect()
