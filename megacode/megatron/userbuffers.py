"""Transformer Engine's userbuffers: memory through which tensor-parallel ranks exchange during their matrix products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megacode.errors import UserError
from megacode.recipe.schema import Recipe


@contextlib.contextmanager
def userbuffers(recipe: Recipe, wanted: bool) -> Iterator[None]:
    """Set them up, where `parallel.overlap.tensor` is on, before layers are built; give them back at the end. Collective.

    Raises:
        UserError: Transformer Engine cannot set them up on these devices (with its own words).
    """
    if not wanted:
        yield
        return
    from transformer_engine.pytorch.module import base

    try:
        base.initialize_ub(**arguments(recipe, base.UserBufferQuantizationMode))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"parallel.overlap.tensor: Transformer Engine cannot set up its buffers here: {str(error).splitlines()[0]}; without "
            "multicast between the GPUs set the environment variable UB_SKIPMC=1 (its own), or turn the key off"
        ) from error
    try:
        yield
    finally:
        base.destroy_ub()


def arguments(recipe: Recipe, modes: Any) -> dict[str, Any]:
    """What `initialize_ub` takes (Transformer Engine 2.7 and later): the shape is that of one micro-batch's activations."""
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
