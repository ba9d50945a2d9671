"""Initial weights as a function of (seed, parameter name, shape): the same in every layout.

Megatron-Core draws from a generator whose state depends on the order of the layers and on the
layout. Here each matrix of the dense GPT has a generator of its own, the whole unpadded matrix is
drawn on the parameter's device, and each rank keeps its share; what is padding is zero. CPU and
CUDA draw different numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import torch
from megatron.core import parallel_state
from torch import Tensor

from megacode.recipe.schema import Model, Recipe


@dataclass(frozen=True)
class _Matrix:
    """A weight of the whole model: `[parts, rows, columns]` before padding, and how it is cut.

    Attributes:
        name: under which its numbers are drawn.
        shape: parts are matrices stacked in one (gate and up).
        split: dimension that tensor parallelism cuts (1 rows, 2 columns), None for none.
        padded: whether that dimension is stored with padding.
    """

    name: str
    shape: tuple[int, ...]
    std: float
    split: int | None
    padded: bool = False


def initialize_weights(
    names: dict[str, torch.nn.Parameter], model: Model, seed: int, vocab_size: int
) -> None:
    """Fill this rank's parameters in place.

    Args:
        names: parameters by their names in the whole model (`model.global_parameter_names`).
        vocab_size: unpadded.
    """
    for name, parameter in names.items():
        if name.endswith(".softmax_offset"):  # of `softmax_type: learnable`
            torch.nn.init.zeros_(parameter)
        share = _initial(name, parameter, model, seed, vocab_size)
        if share is None:
            continue
        with torch.no_grad():
            parameter.copy_(share)
        if hasattr(parameter, "_high_precision_init_val"):
            # Master weights of FP8 parameters start from this one.
            parameter._high_precision_init_val = share.cpu()


def fill_new_rows(
    names: dict[str, torch.nn.Parameter], recipe: Recipe, old_vocab: int, vocab_size: int
) -> None:
    """Fill rows [old_vocab, vocab_size) of embedding and output layer: `initialize_new_rows`.

    For weights of a smaller vocabulary, whose new rows are zeros after loading: with these, a
    norm's gradient explodes. Sums of a mean are float64, so that every layout rounds to the same
    rows. Collective over tensor-parallel ranks.

    Args:
        names: parameters by their names in the whole model (`model.global_parameter_names`).
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    group = parallel_state.get_tensor_model_parallel_group()
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if (rows := names.get(name)) is None:
            continue
        first = rank * len(rows)
        old, new = (min(max(size - first, 0), len(rows)) for size in (old_vocab, vocab_size))
        drawn = None
        if recipe.initialize_new_rows == "init":
            drawn = _initial(name, rows, recipe.model, recipe.resolved_model_seed, vocab_size)
        with torch.no_grad():
            if drawn is None:
                total = rows[:old].double().sum(0)
                torch.distributed.all_reduce(total, group=group)
                rows[old:new] = (total / old_vocab).to(rows.dtype)
            else:
                rows[old:new] = drawn[old:new]


def _initial(
    name: str, parameter: Tensor, model: Model, seed: int, vocab_size: int
) -> Tensor | None:
    """float32, this rank's share of a matrix that is drawn; None for other parameters."""
    matrix = _matrix(name, parameter.shape, model, vocab_size)
    if matrix is None:
        return None
    whole = _draw(matrix, model, seed, parameter.device)
    return _share(whole, matrix, model).reshape(parameter.shape)


def _matrix(name: str, local: torch.Size, model: Model, vocab_size: int) -> _Matrix | None:
    hidden, inner = model.hidden_size, model.resolved_ffn_size
    attention = model.heads * model.resolved_head_dim
    qkv = attention + 2 * model.resolved_kv_heads * model.resolved_head_dim
    embedding, std = "embedding.word_embeddings.weight", model.resolved_embedding_init_std
    if name == embedding or (name == "output_layer.weight" and model.tie_embeddings):
        return _Matrix(embedding, (1, vocab_size, hidden), std, 1, padded=True)
    if name == "output_layer.weight":
        return _Matrix(name, (1, vocab_size, hidden), model.head_init_std, 1, padded=True)
    if name == "embedding.position_embeddings.weight":
        return _Matrix(name, (1, *local), std, None)
    if name.endswith(".self_attention.linear_qkv.weight"):
        return _Matrix(name, (1, qkv, hidden), model.hidden_init_std, 1)
    if name.endswith(".self_attention.linear_proj.weight"):
        return _Matrix(name, (1, hidden, attention), model.residual_init_std, 2)
    if name.endswith(".mlp.linear_fc1.weight"):
        parts = 2 if model.gated else 1
        return _Matrix(name, (parts, inner, hidden), model.hidden_init_std, 1, padded=True)
    if name.endswith(".mlp.linear_fc2.weight"):
        return _Matrix(name, (1, hidden, inner), model.residual_init_std, 2, padded=True)
    return None


def _draw(matrix: _Matrix, model: Model, seed: int, device: torch.device) -> Tensor:
    """float32 `[parts, rows, columns]`, without padding."""
    key = blake2b(f"{seed} {matrix.name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(key, "little") % 2**63)
    whole = torch.empty(matrix.shape, dtype=torch.float32, device=device)
    std = matrix.std
    if model.init_distribution == "truncated_normal":
        return torch.nn.init.trunc_normal_(whole, 0.0, std, -2 * std, 2 * std, generator=generator)
    return whole.normal_(0.0, std, generator=generator)


def _share(whole: Tensor, matrix: _Matrix, model: Model) -> Tensor:
    """This tensor-parallel rank's slice of every part, with zeros where it is padding."""
    if matrix.split is None:
        return whole
    size, there = parallel_state.get_tensor_model_parallel_world_size(), whole.shape[matrix.split]
    each = (model.stored(there, size) if matrix.padded else there) // size
    first = min(parallel_state.get_tensor_model_parallel_rank() * each, there)
    share = whole.narrow(matrix.split, first, min(each, there - first))
    missing = each - share.shape[matrix.split]
    return torch.nn.functional.pad(share, (0, 0, 0, missing) if matrix.split == 1 else (0, missing))
