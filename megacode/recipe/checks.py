"""Checks across keys. A problem is a sentence that begins with its key (phases by name) and ends
with a remedy.

Checks of one key alone stand in the schema. Where a rule is Megatron-Core's, it is the one of its
TransformerConfig, ModelParallelConfig or schedules (0.16). Nothing here imports torch or
Megatron-Core.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from megacode.errors import UserError
from megacode.recipe.compose import did_you_mean
from megacode.recipe.megatron_fields import check_pass_through
from megacode.recipe.mixtures import mixture_entries, mixture_weights
from megacode.recipe.schedules import BatchSizes, Weights
from megacode.recipe.schema import MixtureDomain, Phase, Recipe, Schedule

_MOST_SEQUENCES = 1 << 22
_ROTARY = ("rotary_interleaved", "rotary_fraction", "rotary_scaling", "no_rope_layer_interval")


def check_recipe(recipe: Recipe) -> list[str]:
    """Every problem that can be known without files and without the number of ranks."""
    return [
        *_model(recipe),
        *_origin(recipe),
        *_parallel(recipe),
        *_precision(recipe),
        *_ema(recipe),
        *_packing(recipe),
        *(problem for phase in recipe.phases for problem in _phase(recipe, phase)),
        *check_pass_through(recipe),
    ]


def check_layout(recipe: Recipe, world_size: int, path: Path | None = None) -> None:
    """Refuse a number of ranks that the recipe's layout and batch sizes do not fit.

    Raises:
        UserError: a line for each mistake; `path` (of the recipe) begins each.
    """
    parallel = recipe.parallel
    needed = parallel.tensor * parallel.pipeline * parallel.context
    problems: list[str | None] = []
    if world_size % needed:
        ranks = f"{world_size} rank{'s' if world_size != 1 else ''}"
        problems.append(
            f"parallel: {ranks} cannot hold tensor {parallel.tensor} x pipeline "
            f"{parallel.pipeline} x context {parallel.context} = {needed} ranks a replica; start a "
            f"multiple of {needed} (`megacode train --processes {needed}`, torchrun, srun) or "
            "change these keys"
        )
    else:
        problems += [_batch_size(recipe, phase, world_size // needed) for phase in recipe.phases]
    _raise(problems, path)


def check_files(recipe: Recipe, path: Path | None = None) -> None:
    """Refuse a recipe whose sources, validation sets, tokenizer or initial checkpoint are not on
    disk.

    Raises:
        UserError: a line for each missing file.
    """
    problems: list[str | None] = []
    read = {entry.source for phase in recipe.phases for entry in mixture_entries(recipe, phase)}
    for name, source in recipe.sources.items():
        key = f"sources.{name}"
        if name in read and not source.paths:
            problems.append(f"{key}.path: is missing; give the prefix of its .bin and .idx files")
        prefixes = [("path", prefix) for prefix in source.paths if name in read]
        prefixes += [("validation", prefix) for prefix in source.validation_paths]
        problems += [
            f"{key}.{kind}: there is no {missing}; correct the path, or make the corpus with "
            "`megacode preprocess`"
            for kind, prefix in prefixes
            if (missing := _missing(prefix))
        ]
    if recipe.tokenizer and not Path(recipe.tokenizer.path).exists():
        problems.append(f"tokenizer.path: there is no {recipe.tokenizer.path}; correct the path")
    if recipe.initialize_from and not Path(recipe.initialize_from).is_dir():
        problems.append(
            f"initialize_from: there is no folder {recipe.initialize_from}; give a run, a "
            "checkpoint or a Hugging Face folder, or take the key out to start from fresh weights"
        )
    _raise(problems, path)


def _missing(prefix: str) -> str | None:
    stem = prefix.removesuffix(".bin").removesuffix(".idx")
    if glob.has_magic(stem) and not Path(stem + ".idx").exists():
        found = glob.glob(stem + ".idx") or glob.glob(stem)
        return None if found else f"file that matches {stem}.idx"
    files = (stem + ".idx", stem + ".bin")
    return next((file for file in files if not Path(file).is_file()), None)


def _raise(problems: list[str | None], path: Path | None) -> None:
    where = f"{path}: " if path else ""
    if found := [where + problem for problem in problems if problem]:
        raise UserError("\n".join(found))


def _model(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if model.head_dim is None and model.hidden_size % model.heads:
        yield (
            f"model.heads: {model.heads} does not divide hidden_size {model.hidden_size}; change "
            "one of them or set head_dim"
        )
        return
    if model.heads % model.resolved_kv_heads:
        yield (
            f"model.kv_heads: {model.kv_heads} does not divide heads {model.heads}; use a divisor "
            "of it"
        )
    if model.position_embedding == "rotary":
        rotated = model.rotated_dimensions
        if rotated % 2 or rotated == 0:
            yield (
                f"model.rotary_fraction: rotates {rotated} of {model.resolved_head_dim} dimensions "
                "of a head, and they go in pairs; change it or head_dim"
            )
    else:
        for phase in recipe.phases:
            for key in ("rotary_base", "rotary_scaling"):
                if getattr(phase, key):
                    yield (
                        f"phases.{phase.name}.{key}: has no effect with position_embedding "
                        f"{model.position_embedding!r}; take it out or use 'rotary'"
                    )
        for key in _ROTARY:
            if getattr(model, key) != type(model).model_fields[key].default:
                yield (
                    f"model.{key}: has no effect with position_embedding "
                    f"{model.position_embedding!r}; take it out or use 'rotary'"
                )
    if model.sliding_window_pattern and not model.sliding_window:
        yield "model.sliding_window_pattern: needs model.sliding_window; add it or take the key out"
    for key in ("sliding_window_pattern", "no_rope_layer_interval"):
        if (getattr(model, key) or 0) > model.layers:
            yield (
                f"model.{key}: {getattr(model, key)} is more than model.layers {model.layers}, so "
                "that it has no effect; lower it or take it out"
            )
    for phase in recipe.phases:
        scaling = phase.rotary_scaling or model.rotary_scaling
        if scaling and scaling.kind == "yarn":
            longest = recipe.model_in(phase.name).context_length
            if longest and phase.sequence_length > longest:
                yield (
                    f"phases.{phase.name}.sequence_length: {phase.sequence_length} is longer than "
                    f"yarn stretches to, factor {scaling.factor:g} x original_context_length "
                    f"{scaling.original_length} = {longest}; raise one of them"
                )
        if model.context_length and phase.sequence_length > model.context_length:
            yield (
                f"phases.{phase.name}.sequence_length: {phase.sequence_length} is longer than "
                f"model.context_length {model.context_length}; raise the latter or shorten the "
                "phase's sequences"
            )


def _origin(recipe: Recipe) -> Iterator[str]:
    if recipe.initialize_new_rows != "mean" and not recipe.initialize_from:
        yield (
            "initialize_new_rows: has no effect without initialize_from; take it out, or name the "
            "weights that the run starts from"
        )


# ------------------------------------------------------------------------------------------- layout


def _parallel(recipe: Recipe) -> Iterator[str]:
    model, parallel = recipe.model, recipe.parallel
    tensor, pipeline, virtual = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline
    heads, kv_heads = model.heads, model.resolved_kv_heads
    if heads % tensor:
        divisors = [d for d in range(1, heads + 1) if heads % d == 0]
        near = sorted(sorted(divisors, key=lambda divisor: abs(divisor - tensor))[:2])
        yield (
            f"parallel.tensor: {tensor} does not divide model.heads {heads}; use "
            f"{' or '.join(map(str, near))}"
        )
    if model.kv_heads and kv_heads % tensor and tensor % kv_heads:
        yield (
            f"parallel.tensor: {tensor} is neither a divisor nor a multiple of model.kv_heads "
            f"{kv_heads}; change one of them"
        )
    chunks = pipeline * (virtual or 1) if pipeline > 1 else 1
    if model.layers % chunks and not any("pipeline" in key for key in model.megatron):
        product = f"{pipeline} x virtual_pipeline {virtual} = {chunks}" if virtual else pipeline
        yield (
            f"model.layers: {model.layers} cannot be split over parallel.pipeline {product}; use a "
            f"multiple of {chunks}, or fewer stages"
        )
    if virtual and pipeline == 1:
        yield (
            "parallel.virtual_pipeline: needs parallel.pipeline of 2 or more; raise pipeline or "
            "take the key out"
        )
    if parallel.sequence and tensor == 1:
        yield (
            "parallel.sequence: needs parallel.tensor of 2 or more; set `sequence: false` or "
            "raise tensor"
        )
    ring = model.megatron.get("cp_comm_type") in (None, "p2p")
    if "a2a+p2p" in str(model.megatron.get("cp_comm_type")):
        yield (
            "model.megatron.cp_comm_type: a2a+p2p needs groups of ranks that megacode does not "
            "make; use p2p, a2a or all_gather"
        )
    if parallel.context > 1 and model.sliding_window and ring:
        yield (
            f"model.sliding_window: with parallel.context {parallel.context} Transformer Engine "
            "takes no window around its ring; set model.megatron.cp_comm_type to a2a"
        )
    recompute, layers = parallel.recompute, model.layers // chunks
    if recompute.granularity == "full" and recompute.layers > layers:
        yield (
            f"parallel.recompute.layers: {recompute.layers} is more than the {layers} layers of a "
            "pipeline stage; lower it"
        )
    for phase in recipe.phases:
        if parallel.context > 1 and recipe.resets(phase) and not ring:
            yield (
                f"phases.{phase.name}.reset_at_eod: with parallel.context {parallel.context} "
                "Transformer Engine knows documents around its ring only; take "
                "model.megatron.cp_comm_type out, or set one of the two otherwise"
            )
        parts = (
            {f"parallel.tensor {tensor} (sequence parallel)": tensor} if parallel.sequence else {}
        )
        if parallel.context > 1:
            parts[f"2 x parallel.context {parallel.context}"] = 2 * parallel.context
        pieces = math.prod(parts.values())
        if phase.sequence_length % pieces:
            yield (
                f"phases.{phase.name}.sequence_length: {phase.sequence_length} cannot be split "
                f"over {' x '.join(parts)}; use a multiple of {pieces}"
            )


def _batch_size(recipe: Recipe, phase: Phase, data: int) -> str | None:
    """The first of a phase's batch sizes that `data` data-parallel ranks cannot share,
    as a problem."""
    parallel = recipe.parallel
    micro = parallel.micro_batch_size * data
    for size in BatchSizes.of(phase.batch_size).sizes.tolist():
        stair = "" if isinstance(phase.batch_size, int) else " (a stair of the ramp)"
        start = f"phases.{phase.name}.batch_size: {size}{stair}"
        if size % micro:
            return (
                f"{start} is no multiple of parallel.micro_batch_size {parallel.micro_batch_size} "
                f"x {data} data-parallel rank{'s' if data != 1 else ''} = {micro}; use "
                f"{max(size // micro, 1) * micro} or another micro_batch_size"
            )
        if parallel.virtual_pipeline and size // micro % parallel.pipeline:
            return (
                f"{start} gives {size // micro} micro-batches, and an interleaved pipeline takes a "
                f"multiple of parallel.pipeline {parallel.pipeline}; use a multiple of "
                f"{micro * parallel.pipeline}"
            )
    return None


# ---------------------------------------------------------------------------- optimizer, precision


def _ema(recipe: Recipe) -> Iterator[str]:
    if recipe.optimizer.ema and recipe.optimizer.megatron.get("optimizer_cpu_offload"):
        yield (
            "optimizer.ema: is kept on the device, from weights there, and "
            "optimizer.megatron.optimizer_cpu_offload keeps these on the host; take one of the two "
            "out"
        )


def _precision(recipe: Recipe) -> Iterator[str]:
    model, precision, parallel = recipe.model, recipe.precision, recipe.parallel
    if precision.compute != "fp8":
        for key in ("fp8_params", "compare_every"):
            if getattr(precision, key):
                yield f"precision.{key}: needs `compute: fp8`; take it out or change compute"
        return
    if precision.fp8_params and not parallel.distributed_optimizer:
        yield (
            "precision.fp8_params: needs parallel.distributed_optimizer: true; change one of the "
            "two"
        )
    tensor, side = parallel.tensor, 32 if precision.fp8_recipe == "mxfp8" else 16
    sizes = (
        ("hidden_size: ", model.hidden_size, "change it"),
        (
            "ffn_size: ",
            model.stored_ffn_size(tensor) / tensor,
            f"set model.pad_multiple to {side * tensor}",
        ),
        ("heads: x head_dim ", model.heads * model.resolved_head_dim / tensor, "change it"),
    )
    for start, size, remedy in sizes:
        if size % side:
            yield (
                f"model.{start}gives FP8 matrices a side of {size:g} on each tensor-parallel rank, "
                f"and they need multiples of {side}; {remedy} or use `precision: bf16`"
            )
    pieces = parallel.context * (tensor if parallel.sequence else 1)
    for phase in recipe.phases:
        rows = phase.sequence_length * parallel.micro_batch_size / pieces
        if rows % side:
            yield (
                f"phases.{phase.name}.sequence_length: gives FP8 matrices {rows:g} rows (sequence "
                f"length x micro-batch on each rank), and they need multiples of {side}; change "
                "it, or use `precision: bf16`"
            )
    first, last = precision.bf16_first_layers, precision.bf16_last_layers
    if (first or last) and precision.fp8_recipe == "delayed":
        yield (
            f"precision.bf16_{'first' if first else 'last'}_layers: does not go with `fp8_recipe: "
            "delayed`; use tensorwise, blockwise or mxfp8, or take the key out"
        )
    if max(first, last) > model.layers // parallel.pipeline:
        yield (
            f"precision.bf16_first_layers: {max(first, last)} bf16 layers are more than a pipeline "
            "stage has; lower it or the last ones"
        )


# ------------------------------------------------------------------------------- sources and phases


def _packing(recipe: Recipe) -> Iterator[str]:
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


def _phase(recipe: Recipe, phase: Phase) -> Iterator[str]:
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
        yield from chain(_weights(recipe, phase), _conversations(recipe, phase))


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
    empty = weights.at(corners).sum(axis=1) <= 0
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
