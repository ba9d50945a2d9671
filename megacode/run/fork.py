"""A new run that shares another's first steps and then takes a way of its own."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, Literal

from megacode.data.planning import plan_with_data
from megacode.errors import UserError
from megacode.files import write_json, write_text
from megacode.plan.plan import Plan
from megacode.plan.trajectory import FILE as MIXTURE
from megacode.plan.trajectory import continued, entry_line, read_entries
from megacode.recipe.load import dump_recipe, load_recipe
from megacode.recipe.mixtures import mixture_entries
from megacode.recipe.online import decides
from megacode.recipe.schema import (
    LearningRate,
    Mixture,
    MixtureSource,
    Phase,
    PhasePart,
    Recipe,
    Within,
)
from megacode.run.checkpoints import LATEST, complete_checkpoints, read_info
from megacode.run.history import past_changes, recipe_of, shown
from megacode.run.metrics import FILE as METRICS
from megacode.run.metrics import MetricsWriter, read_metrics

_Schedule = Literal["learning_rate", "batch_size", "mixture"]
_SCHEDULES: tuple[_Schedule, ...] = ("learning_rate", "batch_size", "mixture")
_NO_OTHER_LENGTH = {"tokens": None, "epochs": None, "epochs_of": None}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def fork(
    old: Path,
    step: int,
    new: Path,
    recipe_file: Path | None = None,
    overrides: list[str] | None = None,
    cool_down: int | None = None,
) -> list[str]:
    """Make the run folder `new`, whose first `step` steps are those of the run `old`.

    Args:
        recipe_file: of what follows, the old run's by default; `overrides` change it.
        cool_down: steps that follow, instead, with a rate that goes linearly to zero.

    Returns:
        lines that say what it will do.

    Raises:
        UserError: there is no checkpoint at `step`, `new` exists, nothing remains to be trained, or
            a change is to what lies before `step`.
    """
    there = dict(complete_checkpoints(old / "checkpoints"))
    if step not in there:
        steps = ", ".join(map(str, there)) or "none"
        raise UserError(f"{old}: has no checkpoint at step {step}; there are: {steps}")
    if new.exists():
        raise UserError(f"{new}: exists already; choose another folder with --to")
    checkpoint, own, overrides = there[step], old / "recipe.yaml", overrides or []
    source = recipe_file or own
    shares = recipe_of(checkpoint)
    before = continued(plan_with_data(load_recipe(own), own), shares)
    if cool_down:
        recipe, overrides = cooled(before, step, cool_down), [f"--cool-down {cool_down}"]
    else:
        after = plan_with_data(load_recipe(source, overrides), source)
        recipe = split(before, continued(after, shares), step)
    if _NAME.fullmatch(new.name) and recipe.name == before.recipe.name:
        recipe = recipe.model_copy(update={"name": new.name})
    plan = plan_with_data(recipe, source)
    batches, changes = past_changes(checkpoint, read_info(checkpoint), plan)
    # Keys of the whole run change where the fork's own steps begin; a phase's change at its split.
    asked = [change for change in changes if not change.key.startswith("phases.")]
    if past := [*batches, *(change for change in changes if change not in asked)]:
        raise UserError(
            f"{old}: its first {step:,} steps were not trained as this recipe says: {shown(past)}; "
            "a fork changes what follows"
        )
    facts = {
        "run": str(old.resolve()),
        "step": step,
        "changes": overrides,
        "accepted": [change.key for change in asked],
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    _write(old, checkpoint, new, plan, facts)
    return [
        f"{new}: {checkpoint.name} of {old}, then {plan.total_steps - step:,} steps of its own",
        *(f"  {change}, from step {step + 1:,} on" for change in asked),
        *_phases_to_come(plan, step),
        *([f"  the rate goes linearly from {plan.learning_rate(step):.6g} to 0"] * bool(cool_down)),
    ]


def _phases_to_come(plan: Plan, step: int) -> Iterator[str]:
    for phase, given in zip(plan.phases, plan.recipe.phases, strict=True):
        if phase.last_step < step:
            continue
        first = max(phase.first_step, step) + 1
        line = f"  {phase.name}: steps {first:,} to {phase.last_step + 1:,}"
        if phase.first_step == step and given.within:
            kept = [name.replace("_", " ") for name in _SCHEDULES if getattr(given.within, name)]
            goes = "goes" if len(kept) == 1 else "go"
            line += f"; {', '.join(kept)} {goes} on as in the phase it is a piece of"
        yield line


# -------------------------------------------------------------------------------------- the recipe


def split(before: Plan, after: Plan, step: int) -> Recipe:
    """The recipe that is `before`'s up to `step` and `after`'s from there on.

    Raises:
        UserError: `after` differs in what lies before `step`, or ends there.
    """
    old, new = before.recipe, after.recipe
    for key, name in (("model", "model"), ("tokenizer", "tokenizer"), ("seed", "seeds")):
        if getattr(old, name) != getattr(new, name):
            raise UserError(
                f"{key}: a fork goes on with the same {key}; leave it as it is, or start a run "
                "with `initialize_from`"
            )
    if after.total_steps <= step:
        raise UserError(
            f"--at {step}: the recipe ends there; lengthen the last phase or add one, and go on in "
            "the same folder"
        )
    phases = list(new.phases)
    for index, phase in enumerate(before.phases):
        if phase.first_step >= step:
            break
        key, end, done = f"phases.{phase.name}", phase.last_step + 1, step - phase.first_step
        given = phases[index] if index < len(phases) else None
        if given is None or given.name != phase.name:
            raise UserError(
                f"{key}: was trained before step {step:,} and is missing in the new recipe; keep it"
            )
        if given == old.phases[index]:
            continue
        if end <= step:
            raise UserError(
                f"{key}: ended at step {end:,}, and a fork at {step:,} changes what follows; leave "
                "it as it is"
            )
        steps = after.phases[index].steps
        if steps <= done:
            raise UserError(
                f"{key}: has {steps:,} steps and the fork is {done:,} into it; make it longer"
            )
        name = _free_name(phase.name, [p.name for p in phases])
        rest = given.model_copy(update={"name": name, "steps": steps - done, **_NO_OTHER_LENGTH})
        phases[index : index + 1] = _pieces(before, index, done, rest)
    return new.model_copy(update={"phases": phases})


def cooled(before: Plan, step: int, steps: int) -> Recipe:
    """The recipe that is `before`'s up to `step`, and then ends with a phase of `steps` steps.

    In it the rate goes linearly to zero from where it stands; all else goes on.

    Raises:
        UserError: the rate is zero there.
    """
    phase = before.phase_at(step - 1)
    old, done = before.recipe.phases[phase.index], step - phase.first_step
    rate = phase.learning_rate(min(step, phase.last_step))
    if not rate:
        raise UserError(
            f"--cool-down {steps}: the rate at step {step:,} is zero already; choose another --at"
        )
    changes = {
        "name": _free_name(old.name, [given.name for given in before.recipe.phases]),
        "steps": steps,
        "tokens": None,
        "learning_rate": LearningRate(schedule="linear", peak=rate),
    }
    first, rest = _pieces(before, phase.index, done, old.model_copy(update=changes))
    phases = [*before.recipe.phases[: phase.index], first if done < phase.steps else old, rest]
    return before.recipe.model_copy(update={"phases": phases})


def _pieces(before: Plan, index: int, done: int, rest: Phase) -> tuple[Phase, Phase]:
    """A phase of `before` up to its step `done`, and `rest` as what goes on after it.

    After the phase's end, its schedules stay where they ended.
    """
    old, steps = before.recipe.phases[index], before.phases[index].steps
    places = {name: old.placed(name, steps) for name in _SCHEDULES}
    whole = {name: PhasePart(first=at, steps=length) for name, (at, length) in places.items()}
    kept = {
        name: PhasePart(first=min(at + done, length - 1), steps=length)
        for name, (at, length) in places.items()
        if getattr(rest, name) == getattr(old, name)
    }
    read = {
        (entry.source, entry.given.subset_range) for entry in mixture_entries(before.recipe, old)
    }
    first = old.model_copy(update={"steps": done, **_NO_OTHER_LENGTH, "within": Within(**whole)})
    changes: dict[str, Any] = {
        "within": Within(**kept) if kept else None,
        "mixture": _continued(rest.mixture, read),
    }
    if (online := decides(rest)) and "mixture" not in kept:  # the algorithm starts anew
        fresh = online.model_copy(update={"shares": None})
        changes["mixture"] = changes["mixture"].model_copy(update={"online": fresh})
    # What happened at the old phase's first step does not happen again.
    if rest.optimizer_state == old.optimizer_state:
        changes["optimizer_state"] = "keep"
    if rest.cursor == old.cursor:
        changes["cursor"] = "continue"
    return first, rest.model_copy(update=changes)


def _continued(mixture: Mixture, read: set[tuple[str, tuple[float, float]]]) -> Mixture:
    """Without the restarts of streams that the old phase has restarted."""

    def sources(entries: Mapping[str, MixtureSource]) -> dict[str, MixtureSource]:
        return {
            name: entry.model_copy(update={"cursor": None})
            if (name, entry.subset_range) in read
            else entry
            for name, entry in entries.items()
        }

    if mixture.sources:
        return mixture.model_copy(update={"sources": sources(mixture.sources)})
    domains = {
        name: part.model_copy(update={"sources": sources(part.sources)}) if part.sources else part
        for name, part in (mixture.domains or {}).items()
    }
    return mixture.model_copy(update={"domains": domains})


def _free_name(name: str, taken: list[str]) -> str:
    """`NAME-fork`, `NAME-fork2`, ...: the first that no phase has."""
    base = re.sub(r"-fork\d*$", "", name)
    names = (f"{base}-fork{number if number > 1 else ''}" for number in count(1))
    return next(free for free in names if free not in taken)


# -------------------------------------------------------------------------------------- the folder


def _write(old: Path, checkpoint: Path, new: Path, plan: Plan, facts: Mapping[str, Any]) -> None:
    """The new run folder, there whole or not at all. `facts` go into fork.json."""
    partial = new.with_name(f".{new.name}.{secrets.token_hex(4)}.partial")
    try:
        shutil.copytree(checkpoint, partial / "checkpoints" / checkpoint.name, copy_function=_link)
        write_text(partial / "checkpoints" / LATEST, checkpoint.name + "\n")
        write_text(partial / "recipe.yaml", dump_recipe(plan.recipe))
        write_json(partial / "fork.json", facts)
        if (old / METRICS).exists():
            with MetricsWriter(partial, plan.recipe.logging.tensorboard) as metrics:
                for record in read_metrics(old):
                    ends = record.get("event") in ("end", "phase end")
                    if record["step"] <= facts["step"] and not ends:
                        metrics.write(record)
                metrics.event(facts["step"], "fork", run=str(old), changes=facts["changes"])
        entries = [entry for entry in read_entries(old) if entry["step"] <= facts["step"] + 1]
        if entries:
            write_text(partial / MIXTURE, "".join(map(entry_line, entries)))
        os.rename(partial, new)
    except OSError as error:
        raise UserError(
            f"{new}: cannot be made ({error.strerror}: {error.filename}); is the checkpoint there?"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _link(source: str, target: str) -> None:
    """A hard link: a checkpoint's files never change. A copy where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
