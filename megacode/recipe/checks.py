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
from pathlib import Path

from megacode.errors import UserError
from megacode.recipe.checks_phases import check_packing, check_phase
from megacode.recipe.megatron_fields import check_pass_through
from megacode.recipe.mixtures import mixture_entries
from megacode.recipe.schedules import BatchSizes
from megacode.recipe.schema import Phase, Recipe

_ROTARY = ("rotary_interleaved", "rotary_fraction", "rotary_scaling", "no_rope_layer_interval")


def check_recipe(recipe: Recipe) -> list[str]:
    """Every problem that can be known without files and without the number of ranks."""
    return [
        *_model(recipe),
        *_origin(recipe),
        *_parallel(recipe),
        *_precision(recipe),
        *_ema(recipe),
        *_evaluation(recipe),
        *check_packing(recipe),
        *(problem for phase in recipe.phases for problem in check_phase(recipe, phase)),
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
    """Refuse a recipe whose sources, validation sets, tasks, tokenizer or initial checkpoint are
    not on disk.

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
    problems += [
        f"evaluation.tasks: there is no {task}; correct the path, or make it with `megacode tasks "
        "make`"
        for task in recipe.evaluation.tasks
        if not Path(task).exists()
    ]
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


# ----------------------------------------------------------------- optimizer, evaluation, precision


def _evaluation(recipe: Recipe) -> Iterator[str]:
    evaluation = recipe.evaluation
    if (evaluation.tasks or evaluation.harness) and recipe.tokenizer is None:
        yield "evaluation: tasks are text and need `tokenizer:`; add it, or take the tasks out"
    if evaluation.tasks_every and not (evaluation.tasks or evaluation.harness):
        yield (
            "evaluation.tasks_every: has no effect without `tasks` or `harness`; take it out, or "
            "name tasks"
        )


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
