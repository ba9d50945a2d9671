"""A phase's `budget` -> the weights of its mixture and its `tokens`.

Tokens are worked out as fractions of the decimals in the recipe, so that they are exact; a phase
has as many whole steps as it takes to see their sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction

from megacode.recipe.compose import did_you_mean
from megacode.recipe.schema import Budget, BudgetPart, Phase, Recipe, Schedule

Weights = Mapping[str, float | Schedule | None]


def budget_tokens(budget: Budget, weights: Weights) -> dict[str, Fraction]:
    """Tokens of every domain (or source) of a mixture.

    Args:
        weights: the mixture's; those that are not given are 1. Only a competitive or additive
            budget asks for them, of all but `of`.
    """
    if budget.split is not None:
        given = {name: _weight(part) for name, part in budget.split.items()}
        total = Fraction(budget.total) if budget.total else sum(given.values(), Fraction(0))
        return dict(_shared(budget.split, total))
    form = budget.competitive or budget.additive
    assert form is not None
    m = _exact(form.m)
    if budget.competitive:
        rest = budget.competitive.total * (1 - m)
        own = budget.competitive.total * m
    else:
        assert budget.additive is not None
        rest = Fraction(budget.additive.language)
        own = rest * m / (1 - m)
    others = {name: 1.0 if w is None else w for name, w in weights.items() if name != form.of}
    return {form.of: own, **dict(_shared(others, rest))}


def _shared(
    parts: Mapping[str, float | Schedule | BudgetPart], total: Fraction
) -> Iterator[tuple[str, Fraction]]:
    """Tokens of each name, also of those below."""
    given = {name: _weight(part) for name, part in parts.items()}
    whole = sum(given.values(), Fraction(0))
    for name, part in parts.items():
        share = total * given[name] / whole if whole else Fraction(0)
        if isinstance(part, BudgetPart):
            yield from _shared(part.split, share)
        else:
            yield name, share


def _weight(part: float | Schedule | BudgetPart) -> Fraction:
    return _exact(part.weight if isinstance(part, BudgetPart) else part)  # type: ignore[arg-type]


def _exact(number: float) -> Fraction:
    """The decimal that a float was written as."""
    return Fraction(repr(number))


def with_budgets(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with weights and `tokens` in place of its budgets; problems, each beginning with
    its key, where that cannot be done."""
    phases, problems = [], []
    for phase in recipe.phases:
        found = list(_problems(phase))
        problems += found
        phases.append(phase if found or not phase.budget else _resolved(phase))
    return recipe.model_copy(update={"phases": phases}), problems


def _weights(phase: Phase) -> dict[str, float | Schedule | None]:
    domains, sources = phase.mixture.domains or {}, phase.mixture.sources or {}
    return {name: part.ratio for name, part in domains.items()} | {
        name: part.weight for name, part in sources.items()
    }


def _resolved(phase: Phase) -> Phase:
    assert phase.budget is not None
    tokens = budget_tokens(phase.budget, _weights(phase))
    mixture = phase.mixture
    kind, key = ("domains", "ratio") if mixture.domains else ("sources", "weight")
    parts = {
        name: part.model_copy(update={key: float(tokens[name])})
        for name, part in getattr(mixture, kind).items()
    }
    update = {
        "budget": None,
        "tokens": math.ceil(sum(tokens.values())),
        "mixture": mixture.model_copy(update={kind: parts}),
    }
    return phase.model_copy(update=update)


def _problems(phase: Phase) -> Iterator[str]:
    budget, key, weights = phase.budget, f"phases.{phase.name}.budget", _weights(phase)
    if budget is None:
        return
    if given := [name for name in ("steps", "tokens", "epochs") if getattr(phase, name)]:
        yield f"{key}: decides the phase's length; take `{given[0]}` or the budget out"
    if budget.split is not None:
        names = [name for name, _ in _shared(budget.split, Fraction(1))]
        place, weights = f"{key}.split", weights | dict.fromkeys(weights)
        for name in {name for name in names if names.count(name) > 1}:
            yield f"{place}: {name} is there twice; name everything once"
        for name in weights.keys() - set(names):
            yield f"{place}: says nothing of {name}, which the mixture has; add it, with 0 for none"
        if not any(budget_tokens(budget, weights).values()):
            yield f"{place}: all tokens are zero; give one of its parts more"
        used = names
    else:
        form = budget.competitive or budget.additive
        assert form is not None
        place, used = f"{key}.{'competitive' if budget.competitive else 'additive'}.of", [form.of]
        others = [weight for name, weight in weights.items() if name != form.of]
        if any(isinstance(weight, Schedule) for weight in others):
            yield f"{key}: the ratios of the others are schedules; give numbers, or no budget"
        elif form.m < 1 and not any(weight is None or weight for weight in others):
            yield f"{key}: nothing beside {form.of} has a ratio above zero; give one, or set m: 1"
    for name in used:
        if name not in weights:
            hint = did_you_mean(name, list(weights))
            yield f"{place}: the mixture has no {name}; add it there{hint}"
