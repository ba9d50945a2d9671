"""Checks of a recipe across keys: what its phases read, and how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import numpy as np

from megacode.recipe.compose import did_you_mean
from megacode.recipe.mixtures import mixture_entries, mixture_weights
from megacode.recipe.schedules import BatchSizes, Weights
from megacode.recipe.schema import OF_PAIRS, MixtureDomain, Phase, Recipe, Schedule

_MOST_SEQUENCES = 1 << 22


def check_packing(recipe: Recipe) -> Iterator[str]:
    packed = [name for name in recipe.sources if recipe.packing(name) != "concatenate"]
    for name in packed:
        if recipe.sources[name].window:
            yield (
                f"sources.{name}.window: has no effect with `packing: {recipe.packing(name)}`, "
                "which shuffles packs; take it out, or set `packing: concatenate`"
            )
    if recipe.data.pack_cache and not packed:
        yield (
            "data.pack_cache: has no effect without `packing: best_fit`; take it out, or pack a "
            "source"
        )
    for name, source in recipe.sources.items():
        packing = recipe.packing(name)
        if source.order == "file" and packing == "best_fit":
            yield (
                f"sources.{name}.order: `packing: best_fit` puts documents together in an order of "
                "its own; set `packing: one_document` or `concatenate`, or take `order` out"
            )
        if source.loss_on != "all" and packing == "concatenate":
            yield (
                f"sources.{name}.loss_on: `packing: concatenate` would cut conversations; set "
                f"sources.{name}.packing to best_fit or one_document"
            )


def check_phase(recipe: Recipe, phase: Phase) -> Iterator[str]:
    key, rate = f"phases.{phase.name}", phase.learning_rate
    given = [name for name in ("steps", "tokens", "epochs") if getattr(phase, name) is not None]
    if len(given) != 1:
        yield (
            f"{key}: has {' and '.join(f'`{name}`' for name in given) or 'no length'}; give "
            "exactly one of `steps`, `tokens`, `epochs` and `budget` to say how long the phase is"
        )
    largest = int(BatchSizes.of(phase.batch_size).sizes[-1])
    if largest > _MOST_SEQUENCES:
        yield (
            f"{key}.batch_size: {largest:,} is more than {_MOST_SEQUENCES:,} sequences; lower it"
        )
    if rate.schedule == "constant":
        for name in ("final", "decay_steps"):
            if getattr(rate, name):
                yield (
                    f"{key}.learning_rate.{name}: has no effect on a constant rate; take it out or "
                    "choose another schedule"
                )
    elif rate.final > rate.peak:
        yield (
            f"{key}.learning_rate.final: {rate.final:g} is above the peak {rate.peak:g}; lower it"
        )
    if problems := list(_names(recipe, phase)) or list(_online(phase)):
        yield from problems
    else:
        yield from chain(
            _weights(recipe, phase), _conversations(recipe, phase), _objective(recipe, phase)
        )


def _online(phase: Phase) -> Iterator[str]:
    """What shares that are decided while training need of a phase."""
    mixture, key = phase.mixture, f"phases.{phase.name}.mixture.online"
    if (online := mixture.online) is None:
        return
    weights = mixture.group_weights
    inner = [one.weight for part in (mixture.domains or {}).values()
             for one in (part.sources or {}).values()]  # fmt: skip
    if any(isinstance(weight, Schedule) for weight in (*weights.values(), *inner)):
        yield f"{key}: the shares move by themselves; give weights as numbers, not schedules"
        return
    if phase.budget or None in weights.values():
        yield f"{key}: a `budget` settles the shares before; give weights, or take `online` out"
        return
    if mixture.over_epochs == "clip":
        yield f"{key}: cannot be clipped to epochs; set mixture.over_epochs to error"
    if len(weights) < 2:
        yield f"{key}: needs two domains or sources at least; add one, or take `online` out"
    elif min(weights.values()) < max(0.001 * sum(weights.values()), 1e-300):
        yield f"{key}: every domain or source needs a share of 0.001 at least; raise the weights"
    if mixture.weight_by == "tokens":
        yield f"{key}: decides shares of sequences; set `weight_by: sequences`"
    if phase.epochs is not None:
        yield f"{key}: `epochs` needs shares that are known before; give the phase `steps`"
    shares = online.shares
    if shares is None:
        if online.algorithm == "fixed":
            yield (
                f"{key}.shares: `algorithm: fixed` needs them; `megacode plan RUN --fixed-mixture "
                "FILE` writes those of a run"
            )
    elif (
        list(shares) != list(weights)
        or len(set(map(len, shares.values()))) != 1
        or [] in list(shares.values())
    ):
        yield (
            f"{key}.shares: expected one list for each of {', '.join(weights)} in this order, all "
            "of one length; correct them, or take the key out"
        )


def _objective(recipe: Recipe, phase: Phase) -> Iterator[str]:
    """What losses of pairs need of a phase and of the model."""
    key, objective = f"phases.{phase.name}.objective", phase.objective
    if objective is None or not objective.numbers:
        return
    entries = mixture_entries(recipe, phase)
    if all(recipe.sources[entry.source].loss_on not in OF_PAIRS for entry in entries):
        yield (
            f"{key}: the phase reads no pairs; give it a source that `megacode preprocess --pairs` "
            "made, with `loss_on: query` or `equivalent`"
        )
    how, model = objective.contrastive, recipe.model
    if objective.weighted_tokens and any(entry.given.loss_weight != 1 for entry in entries):
        yield f"{key}.weighted_tokens: needs a `loss_weight` of 1 of every source of the phase"
    if how is None:
        return
    if not recipe.resets(phase):
        yield (
            f"phases.{phase.name}.reset_at_eod: members of a pair would see each other; set it to "
            "true"
        )
    if model.dropout or model.attention_dropout:
        yield (
            f"{key}.contrastive: a step runs forward twice, and dropout would differ; set "
            "model.dropout and model.attention_dropout to 0"
        )
    if how.layer == "last":
        return
    stages = recipe.parallel.pipeline * (recipe.parallel.virtual_pipeline or 1)
    if not 1 <= how.layer <= model.layers:
        yield f"{key}.contrastive.layer: {how.layer} is no layer of 1 to {model.layers}; correct it"
    elif stages > 1:
        yield f"{key}.contrastive.layer: with pipeline stages only `last` can be had; set it so"
    elif recipe.parallel.recompute.granularity == "full":
        yield (
            f"{key}.contrastive.layer: recomputed layers keep no hidden states; set it to last, or "
            "parallel.recompute.granularity to selective"
        )


def _conversations(recipe: Recipe, phase: Phase) -> Iterator[str]:
    """What conversations and epochs need of a phase."""
    key, entries = f"phases.{phase.name}", mixture_entries(recipe, phase)
    for name in dict.fromkeys(entry.source for entry in entries):
        packed = recipe.packing(name) == "best_fit" and recipe.sources[name].loss_on != "all"
        if packed and not recipe.resets(phase):
            yield (
                f"{key}.reset_at_eod: conversations of {name} share a sequence (best_fit) and "
                "would see each other; set it to true, or sources."
                + name
                + ".packing: one_document"
            )
    if phase.epochs_of is not None and (
        phase.epochs is None or all(entry.source != phase.epochs_of for entry in entries)
    ):
        yield (
            f"{key}.epochs_of: {phase.epochs_of} is no source of the phase, or it has no `epochs`; "
            "correct it, or take it out"
        )
    mixture = phase.mixture
    weights = [
        *(entry.given.weight for entry in entries),
        *(part.ratio for part in (mixture.domains or {}).values()),
    ]
    if entries and not any(entry.given.loss_weight for entry in entries):
        yield f"{key}.mixture: every loss_weight is 0; give a source more"
    if mixture.over_epochs == "clip":
        moving = any(isinstance(one, Schedule) for one in weights)
        if moving or phase.epochs or (phase.within and phase.within.mixture):
            yield (
                f"{key}.mixture.over_epochs: clip takes weights that do not move, in a phase of "
                "`steps`, `tokens` or a `budget` that is whole; change these or set it to error"
            )
    if phase.epochs and any(isinstance(one, Schedule) and one.over is None for one in weights):
        yield (
            f"{key}.mixture: a schedule over the phase needs its length, which `epochs` takes from "
            "the mixture; give the schedule `over`, or the phase `steps`"
        )


def _names(recipe: Recipe, phase: Phase) -> Iterator[str]:
    """Names in a mixture: sources that exist, domains that have sources."""
    key = f"phases.{phase.name}.mixture"
    for name, entry in (phase.mixture.sources or {}).items():
        if name not in recipe.sources:
            yield _unknown(recipe, f"{key}.sources", name)
        if entry.weight is None:
            yield (
                f"{key}.sources.{name}: needs a weight (natural weights exist inside `domains` "
                "only); add one, or give the phase a `budget`"
            )
    for domain, part in (phase.mixture.domains or {}).items():
        if part.ratio is None:
            yield (
                f"{key}.domains.{domain}.ratio: is missing; add it, or give the phase a `budget`"
            )
        yield from _domain(recipe, f"{key}.domains.{domain}", domain, part)


def _unknown(recipe: Recipe, key: str, name: str) -> str:
    hint = did_you_mean(name, list(recipe.sources))
    return f"{key}.{name}: is no source of the recipe; add it under `sources:`{hint}"


def _domain(recipe: Recipe, key: str, domain: str, part: MixtureDomain) -> Iterator[str]:
    domains = list(dict.fromkeys(source.domain for source in recipe.sources.values()))
    if part.sources is None:
        if domain not in domains:
            hint = did_you_mean(domain, domains)
            yield f"{key}: no source has this domain; set `domain: {domain}` on a source{hint}"
        return
    if not part.sources:
        yield (
            f"{key}.sources: is empty; name sources, or take the key out to read all of the "
            "domain's"
        )
    for name in part.sources:
        if name not in recipe.sources:
            yield _unknown(recipe, f"{key}.sources", name)
        elif (other := recipe.sources[name].domain) != domain:
            yield (
                f"{key}.sources.{name}: has domain {other!r}, not {domain!r}; list it under its "
                f"own domain or change sources.{name}.domain"
            )
    if len({entry.weight is None for entry in part.sources.values()}) > 1:
        yield (
            f"{key}.sources: some have a weight and some have none; give all of them one, or none "
            "(natural weights)"
        )


def _weights(recipe: Recipe, phase: Phase) -> Iterator[str]:
    """Weights that leave a step, or a domain in a step, without any source; FIM without
    a tokenizer."""
    key, entries, steps = (
        f"phases.{phase.name}.mixture",
        mixture_entries(recipe, phase),
        phase.steps,
    )
    first, length = phase.placed("mixture", steps or 1 << 40)
    weights = mixture_weights(phase, entries, dict.fromkeys(recipe.sources, 1), length)
    weights = replace(weights, first=first)
    # Between these steps every schedule is constant or positive: a sum of zero shows at one of
    # them.
    corners = _corners(weights, steps or 1 << 40)
    with np.errstate(over="ignore"):
        sums = weights.at(corners).sum(axis=1)
    if not np.isfinite(sums).all():
        yield f"{key}: the weights add up to more than a number holds; give smaller ones"
        return
    empty = sums <= 0
    if empty.any():
        at = f"at the phase's step {corners[empty][0]:,} " if weights.settled else ""
        yield (
            f"{key}: {at}all weights are zero; every step needs at least one source with a weight "
            "above zero"
        )
    for group, domain in enumerate(phase.mixture.domains or {}):
        inside = tuple((0, weight) for number, weight in weights.inner if number == group)
        alone = replace(weights, ratios=(1.0,), inner=inside)
        if (alone.at(corners).sum(axis=1) <= 0).any():
            yield (
                f"{key}.domains.{domain}: the weights of its sources are all zero in some step; "
                "give one of them more than zero"
            )
    fim = next((entry for entry in entries if entry.fim_rate > 0), None)
    if fim and recipe.tokenizer is None:
        yield (
            f"{fim.key}.fim_rate: {fim.fim_rate:g} needs `tokenizer:`, whose fill-in-the-middle "
            "tokens it uses; add it, or set the rate to 0"
        )


def _corners(weights: Weights, steps: int) -> np.ndarray:
    """Steps of the phase at which a schedule begins, ends or jumps, and those beside them."""
    corners = {0, steps - 1}
    for weight in (*weights.ratios, *(weight for _, weight in weights.inner)):
        if isinstance(weight, Schedule):
            over = weight.over or weights.steps
            parts = len(weight.values or [0])
            for part in range(parts + 1):
                edge = -(-part * over // parts) - weights.first
                corners.update((edge - 1, edge, edge + 1))
    return np.array(sorted(step for step in corners if 0 <= step < steps), dtype=np.int64)
