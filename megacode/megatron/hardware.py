"""This process's device: what it can compute with, and what is set up for it before layers are."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from typing import Any

import torch

from megacode.errors import UserError
from megacode.plan.hardware import Hardware, Version
from megacode.recipe.schema import Parallel, Recipe

_NORM_MARGIN = "16"


def detect() -> Hardware:
    """What this process can compute with."""
    if not torch.cuda.is_available():
        return Hardware()
    return Hardware(
        name=torch.cuda.get_device_name(),
        capability=torch.cuda.get_device_capability(),
        cuda=_version(torch.version.cuda or ""),
        engine=_engine(),
        apex_gradients=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
    )


def transformer_engine_available() -> bool:
    """Whether this process can use Transformer Engine's layers: CUDA, and the package imports."""
    return torch.cuda.is_available() and _engine() is not None


@cache
def _engine() -> Version | None:
    """Transformer Engine's version, if it imports. Cached: asked for every micro-batch."""
    try:
        import transformer_engine.pytorch
    except (ImportError, OSError):
        return None
    try:
        return _version(metadata.version("transformer-engine"))
    except metadata.PackageNotFoundError:  # built in place, as in some containers
        import transformer_engine

        return _version(getattr(transformer_engine, "__version__", "0"))


def _version(text: str) -> Version | None:
    """`2.12.0+abc` -> (2, 12, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else None


def cuda_environment(
    parallel: Parallel, world_size: int, capability: tuple[int, int]
) -> dict[str, str]:
    """Variables for this layout on devices of a compute capability, before a process touches one.

    As NVIDIA's published configurations have them (Megatron-Bridge,
    `scripts/performance/perf_plugins.py`). Kernels of a process reach its device through a number
    of queues (8 by default). Up to Hopper, tensor- and context-parallel exchanges overlap with
    products only if they begin in the order in which the host sent them: one queue. Later devices
    keep that order by themselves, and streams that share a queue would wait for each other. Where
    ranks exchange anything, norms leave some multiprocessors to the exchange.
    """
    variables = {}
    if capability >= (10, 0):
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
    elif parallel.tensor > 1 or parallel.context > 1:
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if world_size > 1:
        variables["NVTE_FWD_LAYERNORM_SM_MARGIN"] = _NORM_MARGIN
        variables["NVTE_BWD_LAYERNORM_SM_MARGIN"] = _NORM_MARGIN
    return variables


@contextlib.contextmanager
def userbuffers(recipe: Recipe, wanted: bool) -> Iterator[None]:
    """Inside, Transformer Engine has its userbuffers, if `parallel.overlap.tensor` is on.

    They are the memory through which tensor-parallel ranks exchange during their matrix products,
    and have to exist before layers are built. Collective.

    Raises:
        UserError: Transformer Engine cannot set them up on these devices (with its own words).
    """
    if not wanted:
        yield
        return
    from transformer_engine.pytorch.module import base

    try:
        base.initialize_ub(**userbuffer_arguments(recipe, base.UserBufferQuantizationMode))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            "parallel.overlap.tensor: Transformer Engine cannot set up its buffers here: "
            f"{str(error).splitlines()[0]}; without multicast between the GPUs set the environment "
            "variable UB_SKIPMC=1 (its own), or turn the key off"
        ) from error
    try:
        yield
    finally:
        base.destroy_ub()


def userbuffer_arguments(recipe: Recipe, modes: Any) -> dict[str, Any]:
    """Arguments of `initialize_ub` (Transformer Engine 2.7 and later).

    The shape is that of one micro-batch's activations.
    """
    parallel, precision = recipe.parallel, recipe.precision
    fp8 = precision.compute == "fp8"
    rows = recipe.phases[0].sequence_length * parallel.micro_batch_size // parallel.context
    bf16_layers = not fp8 or precision.bf16_first_layers or precision.bf16_last_layers
    return dict(
        shape=[rows, recipe.model.hidden_size],
        tp_size=parallel.tensor,
        quantization_modes=[*([modes.FP8] if fp8 else []), *([modes.NONE] if bf16_layers else [])],
        bootstrap_backend="nccl",
    )
