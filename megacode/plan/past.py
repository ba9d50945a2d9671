"""What a recipe says of the steps that a run has already taken, and where two recipes differ in it.

Each key of a recipe has one of four kinds (`kind_of`):

* *data*: decides the batches. `megacode.plan.fingerprint` compares these, by what they come to.
* *function*: decides what the model computes from its weights.
* *training*: decides how weights were updated, or which weights the run began with.
* *free*: may change between two starts of a run (`FREE`).

A run goes on only where no fact of its past has changed. What lies in the future (later phases,
later rates) is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from megacode.errors import UserError
from megacode.plan.plan import PhasePlan, Plan, phase_steps
from megacode.recipe.compose import did_you_mean
from megacode.recipe.megatron_fields import EFFECT
from megacode.recipe.objectives import objective_at
from megacode.recipe.schedules import BatchSizes, learning_rate
from megacode.recipe.schema import LearningRate, Objective, Phase, Recipe, all_keys

Kind = Literal["data", "function", "training", "free"]

_FREE = {
    "names": "name description phases.*.name",
    "where files are (what is in them is compared)": """
        sources.*.path sources.*.tokens sources.*.documents tokenizer.path data.pack_cache
    """,
    "layout of the ranks and memory": """
        parallel model.pad_multiple optimizer.megatron.use_precision_aware_optimizer
        optimizer.megatron.store_param_remainders optimizer.megatron.*offload*
        optimizer.megatron.pin_cpu_* optimizer.megatron.overlap_*
    """,
    "kernels and order of communication": "fusion data.prefetch",
    "fields of Megatron-Core for memory and speed": " ".join(
        f"model.megatron.{name}" for name, effect in EFFECT.items() if effect == "layout"
    ),
    "saves, evaluation and logs": """
        checkpoints evaluation logging phases.*.checkpoint_every sources.*.validation
        sources.*.validation_samples precision.compare_every optimizer.megatron.log_*
        optimizer.megatron.config_logger_dir
    """,
    "limits that only refuse": "phases.*.mixture.*.max_epochs",
    "how shares of blocks to come are decided": """
        phases.*.mixture.online.algorithm phases.*.mixture.online.warmup
        phases.*.mixture.online.decay
    """,
    "what the vocabulary and the longest sequence are compared by": """
        model.vocab_size model.context_length
    """,
}
FREE = {why: tuple(keys.split()) for why, keys in _FREE.items()}
"""Keys that may change in a run that has begun, by why; shell patterns, each with all
that is below it."""

_PAST: dict[Kind, str] = {
    "training": """
        model_seed initialize_from initialize_new_rows optimizer precision phases.*.learning_rate
        phases.*.optimizer_state phases.*.rotary_base phases.*.rotary_scaling phases.*.objective
        model.dropout model.attention_dropout model.init_std model.init_distribution
        model.embedding_init_std model.output_init_std
    """
    + " ".join(f"model.megatron.{name}" for name, effect in EFFECT.items() if effect == "training"),
    "data": """
        seed data_seed data sources.* phases.*.steps phases.*.tokens phases.*.epochs
        phases.*.epochs_of phases.*.budget phases.*.batch_size
        phases.*.sequence_length phases.*.mixture phases.*.fim_rate phases.*.fim_level
        phases.*.cursor phases.*.reset_at_eod phases.*.within
    """,
    "function": "model tokenizer",
}
_KINDS: dict[Kind, tuple[str, ...]] = {
    "free": tuple(key for keys in FREE.values() for key in keys),
    **{kind: tuple(keys.split()) for kind, keys in _PAST.items()},
}


def kind_of(key: str) -> Kind | None:
    """The kind of a dotted key of a recipe (names and numbers of entries as they are, or `*`); None
    if it has none."""
    for kind, patterns in _KINDS.items():
        if any(fnmatchcase(key, one) or fnmatchcase(key, one + ".*") for one in patterns):
            return kind
    return None


@dataclass(frozen=True)
class Change:
    """A fact of the past that two recipes have differently. `key` is the recipe's;
    phases by name."""

    key: str
    before: Any
    now: Any
    note: str = ""

    def __str__(self) -> str:
        before, now = self.before, self.now
        if isinstance(before, dict) and isinstance(now, dict):  # only what differs
            before, now = (
                {k: v for k, v in a.items() if b.get(k) != v}
                for a, b in ((before, now), (now, before))
            )
        return f"{self.key}: {_shown(before)} before, {_shown(now)} now{self.note}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} = {item}" for name, item in value.items()) or "none"
    if value is None:
        return "not given"
    return f"{value:.9g}" if isinstance(value, float) else str(value)[:200]


def changed_past(before: Recipe, now: Plan, step: int) -> list[Change]:
    """Facts of function and training, in the first `step` steps, that the recipe of `now` has
    otherwise than `before`.

    The batches are `fingerprint`'s to compare, and are taken to be equal here: phases have the same
    borders up to `step`.
    """
    changes = _flat_changes(before, now.recipe, ("function", "training"))
    changes += _origin(before, now.recipe)
    for plan, old, new in zip(now.phases, before.phases, now.recipe.phases, strict=False):
        if plan.first_step >= step:
            break
        key, state = f"phases.{new.name}", (old.optimizer_state, new.optimizer_state)
        if state[0] != state[1] and plan.first_step:
            changes.append(Change(f"{key}.optimizer_state", *state))
        models = (before.model_in(old.name), now.recipe.model_in(new.name))
        for name in ("rotary_base", "rotary_scaling"):
            was, is_now = (getattr(model, name) for model in models)
            if was != is_now and (getattr(old, name) or getattr(new, name)):
                changes.append(Change(f"{key}.{name}", was, is_now))
        changes += _rates(key, old, new, plan, min(step - plan.first_step, plan.steps))
    return changes


def changed_function(before: Recipe, now: Recipe) -> list[Change]:
    """Where a model with the weights of one recipe would compute something else under the other.
    Tokenizers are not compared."""
    return _flat_changes(before, now, ("function",))


def accepts(keys: Iterable[str], change: Change) -> bool:
    """Whether one of `keys` names what changed: its key, a section above it, or a key of a schedule
    that changed."""
    return any(
        f"{change.key}.".startswith(f"{key}.") or key.startswith(f"{change.key}.") for key in keys
    )


def check_accepted(keys: Iterable[str]) -> None:
    """UserError for a key of `--accept-change` that no recipe has, or whose change
    cannot be accepted."""
    known = [key.replace("NAME", "*") for key in all_keys()]
    for key in keys:
        passed_on = key.rpartition(".")[0] in ("model.megatron", "optimizer.megatron")
        patterns = [pattern for pattern in known if pattern.count(".") == key.count(".")]
        if not passed_on and not any(fnmatchcase(key, pattern) for pattern in patterns):
            why = f"a recipe has no such key{did_you_mean(key, known)}"
        elif kind_of(key) == "free":
            why = "may change freely; leave it out"
        elif kind_of(key) in (None, "data"):
            why = (
                "decides which data the past steps read, and that cannot be changed after them; "
                "start from the weights with `initialize_from`, or fork the run (`megacode fork`)"
            )
        else:
            continue
        raise UserError(f"--accept-change {key}: {why}")


def _flat_changes(before: Recipe, now: Recipe, kinds: tuple[Kind, ...]) -> list[Change]:
    old, new = _facts(before), _facts(now)
    return [
        Change(key, old.get(key), new.get(key))
        for key in dict.fromkeys([*old, *new])
        if kind_of(key) in kinds and old.get(key) != new.get(key)
    ]


def _facts(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value of the sections that hold for the whole run, with defaults worked out,
    without what has no effect."""
    model, precision = recipe.model, recipe.precision.model_dump()
    facts = model.model_dump() | {
        "kv_heads": model.resolved_kv_heads,
        "head_dim": model.resolved_head_dim,
        "ffn_size": model.resolved_ffn_size,
        "softmax_scale": model.resolved_softmax_scale,
        "embedding_init_std": model.resolved_embedding_init_std,
        "output_init_std": model.residual_init_std,
    }
    if model.position_embedding != "rotary":
        facts = {key: value for key, value in facts.items() if not key.startswith("rotary_")}
    if recipe.precision.compute != "fp8":
        precision = {"compute": recipe.precision.compute}
    sections = {
        "model_seed": recipe.resolved_model_seed,
        "model": facts,
        "optimizer": recipe.optimizer.model_dump(),
        "precision": precision,
    }
    return {key: value for key, value in _flattened(sections) if value is not None}


def _flattened(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _origin(before: Recipe, now: Recipe) -> Iterator[Change]:
    """`initialize_from`, unless it is the same folder or one that was moved, and its new rows."""
    if before.initialize_new_rows != now.initialize_new_rows:
        rows = before.initialize_new_rows, now.initialize_new_rows
        yield Change("initialize_new_rows", *rows)
    old, new = before.initialize_from, now.initialize_from
    if old == new:
        return
    if old and new and not (Path(old).exists() and Path(new).exists()):
        return  # moved
    if not (old and new and Path(old).samefile(new)):
        yield Change("initialize_from", old, new)


def _rates(key: str, old: Phase, new: Phase, plan: PhasePlan, steps: int) -> Iterator[Change]:
    """The first step of a phase whose objective differs, and whose learning rate; `steps` of the
    phase are past."""
    longer = old.epochs / new.epochs if old.epochs and new.epochs else 1
    rate, (first, length) = _rate(old, round(plan.steps * longer))
    new_rate, (new_first, new_length) = _rate(new, plan.steps)
    if (old.objective, first, length) != (new.objective, new_first, new_length):
        losses = [one.objective or Objective() for one in (old, new)]
        for step in range(steps):
            before_then, now_then = (
                objective_at(losses[0], step + first, length),
                objective_at(losses[1], step + new_first, new_length),
            )
            if before_then != now_then:
                note = f" in step {plan.first_step + step + 1:,}"
                yield Change(f"{key}.objective", vars(before_then), vars(now_then), note)
                break
    if (rate, first, length) == (new_rate, new_first, new_length):
        return
    for step in range(steps):
        before = learning_rate(rate, step + first, length)
        now = learning_rate(new_rate, step + new_first, new_length)
        if before != now:
            note = f" in step {plan.first_step + step + 1:,}"
            if rate == new_rate:
                note += (
                    " (it decays over the phase's own steps: state `decay_steps` as it was, or "
                    "add a phase)"
                )
            yield Change(f"{key}.learning_rate", before, now, note)
            return


def _rate(phase: Phase, of_epochs: int) -> tuple[LearningRate, tuple[int, int]]:
    """A phase's rate, and where in how many steps it begins. `of_epochs`: its steps if it has
    `epochs`."""
    batch = BatchSizes.of(phase.batch_size).after(phase.placed("batch_size", 0)[0])
    steps = phase_steps(phase, batch) or of_epochs
    return phase.learning_rate, phase.placed("learning_rate", steps)
