"""What a step minimises: a phase's objective with its weights at that step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megacode.recipe.schedules import schedule_values
from megacode.recipe.schema import Contrastive, Objective, WeightedTokens
from megacode.recipe.schema_mixture import Weight


@dataclass(frozen=True)
class StepObjective:
    """Weights of the losses in one step. A loss that is None is not computed."""

    next_token: float
    contrastive: Contrastive | None
    contrastive_weight: float
    weighted_tokens: WeightedTokens | None
    weighted_tokens_weight: float
    numbers: tuple[str, ...]
    """Names of what the step reports beside the next-token loss."""


def objective_at(objective: Objective, step: int, steps: int) -> StepObjective:
    """Of step `step` (0 for the first) of a phase of `steps`."""

    def at(weight: Weight) -> float:
        return float(schedule_values(weight, np.array([step]), steps)[0])

    contrastive, weighted = objective.contrastive, objective.weighted_tokens
    return StepObjective(
        at(objective.next_token),
        contrastive,
        at(contrastive.weight) if contrastive else 0.0,
        weighted,
        at(weighted.weight) if weighted else 0.0,
        objective.numbers,
    )
