"""Checkpoints of a run, evaluated one after another by one process: a curve over its steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megacode.data.planning import plan_with_data
from megacode.errors import UserError
from megacode.evaluate.model import LoadedModel, open_model
from megacode.evaluate.scoring import TaskResult, score_tasks
from megacode.evaluate.tasks import OpenTask
from megacode.evaluate.validation import BitsPerByte, Validation, by_domain
from megacode.megatron.checkpoint import load_checkpoint
from megacode.megatron.rotary import set_rotary
from megacode.recipe.load import load_recipe
from megacode.recipe.schema import Recipe
from megacode.run.checkpoints import read_info

Record = dict[str, Any]


def evaluate_checkpoints(
    checkpoints: Sequence[Path], tasks: Sequence[OpenTask], samples: int | None
) -> Iterator[tuple[Record, list[TaskResult]]]:
    """Validation losses and scores of each checkpoint of one run, in the order given.

    Args:
        samples: sequences of each held-out set; None is the recipe's number.

    Raises:
        UserError: the recipe has no held-out set and there are no tasks, or they cannot be read.
    """
    model = open_model(checkpoints[0])
    recipe = load_recipe(checkpoints[-1] / "recipe.yaml")
    validation = None
    if any(source.validation_paths for source in recipe.sources.values()):
        recipe = _with_samples(recipe, samples) if samples else recipe
        recipe = recipe.model_copy(update={"parallel": model.recipe.parallel})
        plan = plan_with_data(recipe, checkpoints[-1] / "recipe.yaml")
        validation = Validation.open(plan, model.world, model.tokenizer)
    elif not tasks:
        raise UserError(
            f"{checkpoints[-1]}: its recipe gives no source a `validation` set; there is nothing "
            "to evaluate on but --tasks"
        )
    for number, checkpoint in enumerate(checkpoints):
        info = read_info(checkpoint)
        if number:
            load_checkpoint(checkpoint, model.chunks, None)
            own = recipe.model_in(info.get("phase"))
            set_rotary(model.chunks, own)
            length = own.context_length or model.context_length
            model = LoadedModel(model.recipe, model.tokenizer, model.chunks, model.world, length)
        step = int(info["step"])
        record: Record = {"step": step, "phase": info.get("phase"), "tokens": info.get("tokens")}
        if validation:
            losses = validation.losses(model.chunks, step)
            bits = BitsPerByte.of(validation, losses)
            record |= {
                "loss_by_source": {name: loss for name, (loss, _) in losses.items()},
                "tokens_by_source": {name: tokens for name, (_, tokens) in losses.items()},
                "loss_by_domain": by_domain(recipe, losses),
                "bits_per_byte_by_source": bits.by_source,
                "bits_per_byte_by_domain": bits.by_domain,
            }
        results = score_tasks(model, tasks)
        if results:
            record["tasks"] = {result.task.task.name: result.summary() for result in results}
        yield record, results


def _with_samples(recipe: Recipe, samples: int) -> Recipe:
    """The recipe with this number of validation samples for each source."""
    evaluation = recipe.evaluation.model_copy(update={"samples": samples})
    sources = {
        name: source.model_copy(update={"validation_samples": None})
        for name, source in recipe.sources.items()
    }
    return recipe.model_copy(update={"evaluation": evaluation, "sources": sources})
