"""Rotary positions by base and scaling, set in a model that is built: phases differ in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megacode.megatron.workarounds import tell_attention_factor
from megacode.recipe.schema import Model

_BETAS = (32, 1)
"""YaRN's beta_fast and beta_slow (arXiv 2309.00071): frequencies that turn more often than the
first within the original context stay, those that turn less often than the second are divided."""


def set_rotary(model_chunks: Sequence[Any], model: Model) -> None:
    """Give this rank's chunks, wrapped or not, the rotary positions of `model`.

    Nothing else of a model depends on them: they have no parameters.
    """
    if model.position_embedding != "rotary":
        return
    scaling = model.rotary_scaling
    for chunk in model_chunks:
        gpt = getattr(chunk, "module", chunk)
        rotary = gpt.rotary_pos_emb
        linear = scaling is not None and scaling.kind == "linear"
        rotary.seq_len_interpolation_factor = scaling.factor if scaling and linear else None
        frequencies = _plain(model, rotary.inv_freq.device)
        if scaling and scaling.kind == "llama3":
            frequencies = rotary._apply_scaling(
                frequencies,
                factor=scaling.factor,
                original_max_position_embeddings=scaling.original_length,
            )
        elif scaling and scaling.kind == "yarn":
            frequencies = _yarn(model, frequencies)
        rotary.inv_freq = frequencies
        rotary.forward.cache_clear()
        yarn = scaling is not None and scaling.kind == "yarn"
        tell_attention_factor(gpt.config, scaling.factor if scaling and yarn else 1.0)


def _plain(model: Model, device: torch.device) -> Tensor:
    """float32 `[rotated dimensions / 2]`: radians per position of every pair."""
    dim = model.rotated_dimensions
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / (model.rotary_base**exponents)


def _yarn(model: Model, frequencies: Tensor) -> Tensor:
    """Frequencies divided by the factor from the pair on that turns `_BETAS[1]` times in the
    original context, left up to the one that turns `_BETAS[0]` times, and blended between."""
    scaling, dim = model.rotary_scaling, model.rotated_dimensions
    assert scaling is not None

    def pair(rotations: int) -> float:
        turns = scaling.original_length / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(model.rotary_base))

    first, last = max(math.floor(pair(_BETAS[0])), 0), min(math.ceil(pair(_BETAS[1])), dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=frequencies.device)
    divided = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies * (1 - divided) + frequencies / scaling.factor * divided
