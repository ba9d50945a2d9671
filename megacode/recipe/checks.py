"""Checks across keys, each a sentence with the key and a remedy. Checks of one key alone stand in the schema.

Nothing here imports torch or Megatron-Core; where a rule is Megatron-Core's, it is the one of its TransformerConfig,
ModelParallelConfig or schedules (0.16).
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megacode.errors import UserError
from megacode.recipe import megatron_fields
from megacode.recipe.compose import did_you_mean
from megacode.recipe.mixtures import mixture_entries, mixture_weights
from megacode.recipe.schedules import BatchSizes, Weights
from megacode.recipe.schema import Phase, Recipe, Schedule

_MOST_SEQUENCES = 1 << 22


@dataclass(frozen=True)
class Problem:
    """A mistake: the dotted key (phases by name) and what to say about it."""

    key: str
    text: str
    at: str = ""
    """The key that a line number is wanted for, where it is another one."""

    def __str__(self) -> str:
        return f"{self.key}: {self.text}"


def check_recipe(recipe: Recipe) -> list[Problem]:
    """Everything that can be known without files and without the number of ranks."""
    problems = [
        *_model(recipe),
        *_parallel(recipe),
        *_precision(recipe),
        *_sources(recipe),
        *_phases(recipe),
    ]
    problems += [Problem(key, text) for key, text in megatron_fields.check_pass_through(recipe)]
    return problems


def check_layout(recipe: Recipe, world_size: int, path: Path | None = None) -> None:
    """Refuse a number of ranks that the recipe's layout and batch sizes do not fit.

    Raises:
        UserError: a line for each mistake; `path` (of the recipe) begins each.
    """
    where = f"{path}: " if path else ""
    parallel = recipe.parallel
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    product = (
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
    )
    if world_size % model_ranks:
        raise UserError(
            f"{where}parallel: {world_size} rank{'s' if world_size != 1 else ''} cannot hold {product} = {model_ranks} "
            f"ranks a replica; start a multiple of {model_ranks} (`megacode train --processes {model_ranks}`, torchrun, srun) "
            "or change these keys"
        )
    data = world_size // model_ranks
    problems = []
    for phase in recipe.phases:
        for size in BatchSizes.of(phase.batch_size).sizes.tolist():
            problem = _batch_size(recipe, phase, size, data)
            if problem:
                problems.append(f"{where}{problem}")
                break
    if problems:
        raise UserError("\n".join(problems))


def check_files(recipe: Recipe, path: Path | None = None) -> None:
    """Refuse a recipe whose sources, validation sets, tokenizer or initial checkpoint are not on disk.

    Raises:
        UserError: a line for each missing file.
    """
    where = f"{path}: " if path else ""
    problems = []
    read = {entry.source for phase in recipe.phases for entry in mixture_entries(recipe, phase)}
    for name, source in recipe.sources.items():
        if name in read and not source.paths:
            problems.append(
                f"sources.{name}.path: is missing; give the prefix of its .bin and .idx files"
            )
        for key, prefixes in (
            ("path", source.paths if name in read else []),
            ("validation", source.validation_paths),
        ):
            for prefix in prefixes:
                missing = _missing(prefix)
                if missing:
                    problems.append(
                        f"sources.{name}.{key}: there is no {missing}; correct the path, or make the corpus with "
                        "`megacode preprocess`"
                    )
    if recipe.tokenizer and not Path(recipe.tokenizer.path).exists():
        problems.append(f"tokenizer.path: there is no {recipe.tokenizer.path}; correct the path")
    if recipe.initialize_from and not Path(recipe.initialize_from).is_dir():
        problems.append(
            f"initialize_from: there is no folder {recipe.initialize_from}; give a checkpoint folder, or take the "
            "key out to start from fresh weights"
        )
    if problems:
        raise UserError("\n".join(where + problem for problem in problems))


def _missing(prefix: str) -> str | None:
    stem = prefix.removesuffix(".bin").removesuffix(".idx")
    if glob.has_magic(stem) and not Path(stem + ".idx").exists():
        return (
            None if glob.glob(stem + ".idx") or glob.glob(stem) else f"file that matches {stem}.idx"
        )
    return next(
        (stem + ending for ending in (".idx", ".bin") if not Path(stem + ending).is_file()), None
    )


# ---------------------------------------------------------------------------------------------------------- model


def _model(recipe: Recipe) -> Iterator[Problem]:
    model = recipe.model
    if model.head_dim is None and model.hidden_size % model.heads:
        yield Problem(
            "model.heads",
            f"{model.heads} does not divide hidden_size {model.hidden_size}; change one of them or set head_dim",
        )
        return
    if model.heads % model.resolved_kv_heads:
        yield Problem(
            "model.kv_heads",
            f"{model.kv_heads} does not divide heads {model.heads}; use a divisor of it",
        )
    if model.position_embedding == "rotary":
        rotated = int(model.resolved_head_dim * model.rotary_fraction)
        if rotated % 2 or rotated == 0:
            yield Problem(
                "model.rotary_fraction",
                f"rotates {rotated} of {model.resolved_head_dim} dimensions of a head, and they go in pairs; change it "
                "or head_dim",
            )
    else:
        keys = {
            "rotary_interleaved": model.rotary_interleaved,
            "rotary_fraction": model.rotary_fraction != 1.0,
            "rotary_scaling": model.rotary_scaling is not None,
        }
        for key in (key for key, given in keys.items() if given):
            yield Problem(
                f"model.{key}",
                f"has no effect with position_embedding {model.position_embedding!r}; take it out or use 'rotary'",
            )
    for phase in recipe.phases:
        if model.context_length and phase.sequence_length > model.context_length:
            yield Problem(
                f"phases.{phase.name}.sequence_length",
                f"{phase.sequence_length} is longer than model.context_length {model.context_length}; raise the "
                "latter or shorten the phase's sequences",
            )


# ------------------------------------------------------------------------------------------------------- parallel


def _parallel(recipe: Recipe) -> Iterator[Problem]:
    model, parallel = recipe.model, recipe.parallel
    tensor, pipeline, virtual = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline
    if model.heads % tensor:
        yield Problem(
            "parallel.tensor",
            f"{tensor} does not divide model.heads {model.heads}; use {_divisors(model.heads, tensor)}",
        )
    kv_heads = model.resolved_kv_heads
    if model.kv_heads and kv_heads % tensor and tensor % kv_heads:
        yield Problem(
            "parallel.tensor",
            f"{tensor} is neither a divisor nor a multiple of model.kv_heads {kv_heads}; change one of them",
        )
    chunks = pipeline * (virtual or 1) if pipeline > 1 else 1
    if model.layers % chunks and not any("pipeline" in key for key in model.megatron):
        product = f"pipeline {pipeline}" + (
            f" x virtual_pipeline {virtual} = {chunks}" if virtual else ""
        )
        yield Problem(
            "model.layers",
            f"{model.layers} cannot be split over parallel.{product}; use a multiple of {chunks}, or fewer stages",
        )
    if virtual and pipeline == 1:
        yield Problem(
            "parallel.virtual_pipeline",
            "needs parallel.pipeline of 2 or more; raise pipeline or take the key out",
        )
    if parallel.sequence and tensor == 1:
        yield Problem(
            "parallel.sequence",
            "needs parallel.tensor of 2 or more; set `sequence: false` or raise tensor",
        )
    if (
        parallel.recompute.granularity == "full"
        and parallel.recompute.layers > model.layers // chunks
    ):
        yield Problem(
            "parallel.recompute.layers",
            f"{parallel.recompute.layers} is more than the {model.layers // chunks} layers of a pipeline stage; lower "
            "it",
        )
    for phase in recipe.phases:
        resets = recipe.data.reset_at_eod if phase.reset_at_eod is None else phase.reset_at_eod
        if parallel.context > 1 and resets:
            yield Problem(
                f"phases.{phase.name}.reset_at_eod",
                f"parallel.context {parallel.context} would cut a sequence across its documents; set one of the two otherwise",
            )
        pieces = (tensor if parallel.sequence else 1) * (
            2 * parallel.context if parallel.context > 1 else 1
        )
        if phase.sequence_length % pieces:
            why = [f"parallel.tensor {tensor} (sequence parallel)"] if parallel.sequence else []
            why += [f"2 x parallel.context {parallel.context}"] if parallel.context > 1 else []
            yield Problem(
                f"phases.{phase.name}.sequence_length",
                f"{phase.sequence_length} cannot be split over {' x '.join(why)}; use a multiple of {pieces}",
            )


def _divisors(number: int, near: int) -> str:
    fitting = [d for d in range(1, number + 1) if number % d == 0]
    return " or ".join(str(d) for d in sorted(sorted(fitting, key=lambda d: abs(d - near))[:2]))


def _batch_size(recipe: Recipe, phase: Phase, size: int, data: int) -> Problem | None:
    parallel = recipe.parallel
    micro = parallel.micro_batch_size * data
    key = f"phases.{phase.name}.batch_size"
    stair = f"{size} (a stair of the ramp)" if not isinstance(phase.batch_size, int) else str(size)
    ranks = f"{data} data-parallel rank{'s' if data != 1 else ''}"
    product = f"parallel.micro_batch_size {parallel.micro_batch_size} x {ranks}"
    nearest = max(size // micro, 1) * micro
    if size % micro:
        return Problem(
            key,
            f"{stair} is no multiple of {product} = {micro}; use {nearest} or another micro_batch_size",
        )
    if parallel.virtual_pipeline and size // micro % parallel.pipeline:
        return Problem(
            key,
            f"{stair} gives {size // micro} micro-batches, and an interleaved pipeline takes a multiple of "
            f"parallel.pipeline {parallel.pipeline}; use a multiple of {micro * parallel.pipeline}",
        )
    return None


# ------------------------------------------------------------------------------------------------------ precision


def _precision(recipe: Recipe) -> Iterator[Problem]:
    model, precision = recipe.model, recipe.precision
    if precision.compute != "fp8":
        for key in ("fp8_params", "compare_every"):
            if getattr(precision, key):
                yield Problem(
                    f"precision.{key}", "needs `compute: fp8`; take it out or change compute"
                )
        return
    if precision.fp8_params and not recipe.parallel.distributed_optimizer:
        yield Problem(
            "precision.fp8_params",
            "needs parallel.distributed_optimizer: true; change one of the two",
        )
    tensor = recipe.parallel.tensor
    side = 32 if precision.fp8_recipe == "mxfp8" else 16
    sizes = {
        "hidden_size": model.hidden_size,
        "ffn_size": model.stored_ffn_size(tensor) / tensor,
        "heads": model.heads * model.resolved_head_dim / tensor,
    }
    for key, size in sizes.items():
        if size % side:
            what = "x head_dim " if key == "heads" else ""
            remedy = (
                f"set model.pad_multiple to {side * tensor}" if key == "ffn_size" else "change it"
            )
            yield Problem(
                f"model.{key}",
                f"{what}gives FP8 matrices a side of {size:g} on each tensor-parallel rank, and they need multiples of {side}; "
                f"{remedy} or use `precision: bf16`",
            )
    pieces = recipe.parallel.context * (tensor if recipe.parallel.sequence else 1)
    for phase in recipe.phases:
        rows = phase.sequence_length * recipe.parallel.micro_batch_size / pieces
        if rows % side:
            yield Problem(
                f"phases.{phase.name}.sequence_length",
                f"gives FP8 matrices {rows:g} rows (sequence length x micro-batch on each rank), and they need multiples of "
                f"{side}; change it, or use `precision: bf16`",
            )
    edges = precision.bf16_first_layers, precision.bf16_last_layers
    if any(edges) and precision.fp8_recipe == "delayed":
        key = "bf16_first_layers" if edges[0] else "bf16_last_layers"
        yield Problem(
            f"precision.{key}",
            "does not go with `fp8_recipe: delayed`; use tensorwise, blockwise or mxfp8, or take the key out",
        )
    if max(edges) > model.layers // recipe.parallel.pipeline:
        yield Problem(
            "precision.bf16_first_layers",
            f"{max(edges)} bf16 layers are more than a pipeline stage has; lower it or the last ones",
        )


# --------------------------------------------------------------------------------------------------------- sources


def _sources(recipe: Recipe) -> Iterator[Problem]:
    for name, source in recipe.sources.items():
        if source.window and recipe.packing(name) == "best_fit":
            yield Problem(
                f"sources.{name}.window",
                "has no effect with `packing: best_fit`, which shuffles packs; take it out, or set `packing: concatenate`",
            )
    if recipe.data.pack_cache and not any(
        recipe.packing(name) == "best_fit" for name in recipe.sources
    ):
        yield Problem(
            "data.pack_cache",
            "has no effect without `packing: best_fit`; take it out, or pack a source",
        )


# ---------------------------------------------------------------------------------------------------------- phases


def _phases(recipe: Recipe) -> Iterator[Problem]:
    seen: set[str] = set()
    for number, phase in enumerate(recipe.phases):
        key = f"phases.{phase.name}"
        if phase.name in seen:
            yield Problem(
                f"{key}.name",
                "is given to two phases; name each differently",
                at=f"phases.{number}.name",
            )
        seen.add(phase.name)
        if (phase.steps is None) == (phase.tokens is None):
            both = "both" if phase.steps else "neither"
            yield Problem(
                key,
                f"has {both} of `steps` and `tokens`; give exactly one to say how long the phase is",
            )
        for size in BatchSizes.of(phase.batch_size).sizes.tolist()[-1:]:
            if size > _MOST_SEQUENCES:
                yield Problem(
                    f"{key}.batch_size",
                    f"{size:,} is more than {_MOST_SEQUENCES:,} sequences; lower it",
                )
        yield from _rate(phase, key)
        mixture_problems = list(_mixture(recipe, phase, key))
        yield from mixture_problems or _weights(recipe, phase, key)


def _rate(phase: Phase, key: str) -> Iterator[Problem]:
    rate = phase.learning_rate
    if rate.schedule == "constant":
        for name in ("final", "decay_steps"):
            if name in rate.model_fields_set and getattr(rate, name):
                yield Problem(
                    f"{key}.learning_rate.{name}",
                    "has no effect on a constant rate; take it out or choose another schedule",
                )
    elif rate.final > rate.peak:
        yield Problem(
            f"{key}.learning_rate.final",
            f"{rate.final:g} is above the peak {rate.peak:g}; lower it",
        )


def _mixture(recipe: Recipe, phase: Phase, key: str) -> Iterator[Problem]:
    """Names in a mixture: sources that exist, domains that have sources."""
    domains = list(dict.fromkeys(source.domain for source in recipe.sources.values()))

    def unknown(name: str) -> str:
        return f"is no source of the recipe; add it under `sources:`{did_you_mean(name, list(recipe.sources))}"

    for name in phase.mixture.sources or {}:
        if name not in recipe.sources:
            yield Problem(f"{key}.mixture.sources.{name}", unknown(name))
    for domain, part in (phase.mixture.domains or {}).items():
        here = f"{key}.mixture.domains.{domain}"
        if part.sources is None and domain not in domains:
            hint = did_you_mean(domain, domains)
            yield Problem(
                here, f"no source has this domain; set `domain: {domain}` on a source{hint}"
            )
        if part.sources is not None and not part.sources:
            yield Problem(
                f"{here}.sources",
                "is empty; name sources, or take the key out to read all of the domain's",
            )
        for name in part.sources or {}:
            if name not in recipe.sources:
                yield Problem(f"{here}.sources.{name}", unknown(name))
            elif recipe.sources[name].domain != domain:
                yield Problem(
                    f"{here}.sources.{name}",
                    f"has domain {recipe.sources[name].domain!r}, not {domain!r}; list it under its own domain or change "
                    f"sources.{name}.domain",
                )
        given = [entry.weight is not None for entry in (part.sources or {}).values()]
        if any(given) and not all(given):
            yield Problem(
                f"{here}.sources",
                "some have a weight and some have none; give all of them one, or none (natural weights)",
            )


def _weights(recipe: Recipe, phase: Phase, key: str) -> Iterator[Problem]:
    """Weights that leave a step, or a domain in a step, without any source; FIM without a tokenizer."""
    entries = mixture_entries(recipe, phase)
    steps = phase.steps or 1 << 40
    first, length = phase.placed("mixture", steps)
    weights = replace(
        mixture_weights(phase, entries, dict.fromkeys(recipe.sources, 1), length), first=first
    )
    where = f"{key}.mixture"
    # Between two such steps every schedule is constant or positive, so a sum that is zero anywhere is zero at one of
    # them.
    corners = _corners(weights, steps)
    totals = weights.at(corners).sum(axis=1)
    if (totals <= 0).any():
        step = int(corners[np.flatnonzero(totals <= 0)[0]])
        at = (
            "all weights are zero"
            if not weights.settled
            else f"at the phase's step {step:,} all weights are zero"
        )
        yield Problem(where, f"{at}; every step needs at least one source with a weight above zero")
    for group, (domain, _) in enumerate((phase.mixture.domains or {}).items()):
        inside = [inner for inner in weights.inner if inner[0] == group]
        alone = replace(weights, ratios=(1.0,), inner=tuple((0, weight) for _, weight in inside))
        if (alone.at(corners).sum(axis=1) <= 0).any():
            yield Problem(
                f"{where}.domains.{domain}",
                "the weights of its sources are all zero in some step; give one of them more than zero",
            )
    if recipe.tokenizer is None:
        for entry in entries:
            if entry.fim_rate > 0:
                yield Problem(
                    f"{entry.key}.fim_rate",
                    f"{entry.fim_rate:g} needs `tokenizer:`, whose fill-in-the-middle tokens it uses; add it, or set "
                    "the rate to 0",
                )
                break


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
