"""Where Megatron-Core keeps each weight of the dense GPT, and how a Hugging Face model cuts it.

A checkpoint stacks the layers: `decoder.layers.mlp.linear_fc1.weight` is [layers, 2 x inner, hidden]. A *slot* is one such
tensor (of one layer) and the Hugging Face tensors it becomes; its *form* takes it apart and puts it together, on tensors
without padding. Everything here also runs on meta tensors, which is how shapes are known before anything is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megacode.recipe.schema import Model

Split = Callable[[Model, Tensor], list[Tensor]]
Join = Callable[[Model, Sequence[Tensor]], Tensor]

LAYER = "decoder.layers."
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class Form:
    """`split` takes a Megatron-Core tensor without padding apart, `join` undoes it."""

    split: Split
    join: Join


@dataclass(frozen=True)
class Slot:
    """One Megatron-Core tensor and the Hugging Face tensors that hold the same numbers.

    Attributes:
        key: its name in a checkpoint, `decoder.layers.` without the number.
        layer: which of the stack; None for tensors outside the layers.
        names: of the Hugging Face tensors, in the order of the form.
    """

    key: str
    layer: int | None
    names: tuple[str, ...]
    form: Form


# --------------------------------------------------------------------------------------------------- Megatron's tensors


def shape(model: Model, vocab_size: int, key: str, length: int = 0) -> tuple[int, ...]:
    """Shape of a tensor (of one layer) without padding; `length` of learned positions."""
    hidden, inner, dim = model.hidden_size, model.resolved_ffn_size, model.resolved_head_dim
    attention = model.heads * dim
    qkv = attention + 2 * model.resolved_kv_heads * dim
    wide = inner * (2 if model.gated else 1)
    name = key.removeprefix(LAYER)
    shapes = {
        EMBEDDING: (vocab_size, hidden),
        OUTPUT: (vocab_size, hidden),
        "embedding.position_embeddings.weight": (length, hidden),
        "self_attention.linear_qkv.weight": (qkv, hidden),
        "self_attention.linear_qkv.bias": (qkv,),
        "self_attention.linear_proj.weight": (hidden, attention),
        "mlp.linear_fc1.weight": (wide, hidden),
        "mlp.linear_fc1.bias": (wide,),
        "mlp.linear_fc2.weight": (hidden, inner),
    }
    if name in shapes:
        return shapes[name]
    return (dim,) if "q_layernorm" in name or "k_layernorm" in name else (hidden,)


def unpadded(model: Model, vocab_size: int, key: str, tensor: Tensor) -> Tensor:
    """Without the zeros at the end of the vocabulary and of the feed-forward's inner size."""
    if key in (EMBEDDING, OUTPUT):
        return tensor[:vocab_size]
    inner = model.resolved_ffn_size
    if ".mlp.linear_fc1." in key and "layer_norm" not in key:
        parts = tensor.reshape(2 if model.gated else 1, -1, *tensor.shape[1:])
        return parts[:, :inner].reshape(-1, *tensor.shape[1:])
    if key.endswith(".mlp.linear_fc2.weight"):
        return tensor[:, :inner]
    return tensor


def padded(model: Model, key: str, tensor: Tensor, tensor_parallel: int = 1) -> Tensor:
    """With them, as `model.pad_multiple` says."""
    if key in (EMBEDDING, OUTPUT):
        return _grown(tensor, 0, model.stored(tensor.shape[0], tensor_parallel))
    inner = model.stored_ffn_size(tensor_parallel)
    if ".mlp.linear_fc1." in key and "layer_norm" not in key:
        parts = tensor.reshape(2 if model.gated else 1, -1, *tensor.shape[1:])
        return _grown(parts, 1, inner).reshape(-1, *tensor.shape[1:])
    if key.endswith(".mlp.linear_fc2.weight"):
        return _grown(tensor, 1, inner)
    return tensor


def _grown(tensor: Tensor, dimension: int, size: int) -> Tensor:
    missing = list(tensor.shape)
    missing[dimension] = size - tensor.shape[dimension]
    return (
        torch.cat((tensor, tensor.new_zeros(missing)), dimension) if missing[dimension] else tensor
    )


# --------------------------------------------------------------------------------------------------------------- forms


def _one(model: Model, tensor: Tensor) -> list[Tensor]:
    return [tensor]


SAME = Form(_one, lambda model, tensors: tensors[0])
TRANSPOSED = Form(lambda model, tensor: [tensor.t()], lambda model, tensors: tensors[0].t())


def _split_gate(model: Model, tensor: Tensor) -> list[Tensor]:
    return list(tensor.chunk(2))


GATE_UP = Form(_split_gate, lambda model, tensors: torch.cat(list(tensors)))
"""linear_fc1 of gated feed-forwards: the gate's rows, then the other's."""


def split_qkv(model: Model, tensor: Tensor) -> list[Tensor]:
    """linear_qkv [groups x (queries a group + 2) x head_dim, ...] -> queries, keys, values, each in order of its heads."""
    groups, dim = model.resolved_kv_heads, model.resolved_head_dim
    rest = tensor.shape[1:]
    rows = tensor.reshape(groups, model.heads // groups + 2, dim, *rest)
    return [
        rows[:, :-2].reshape(-1, *rest),
        rows[:, -2].reshape(-1, *rest),
        rows[:, -1].reshape(-1, *rest),
    ]


def join_qkv(model: Model, tensors: Sequence[Tensor]) -> Tensor:
    """Undoes `split_qkv`."""
    groups, dim = model.resolved_kv_heads, model.resolved_head_dim
    rest = tensors[0].shape[1:]
    parts = [tensor.reshape(groups, -1, dim, *rest) for tensor in tensors]
    return torch.cat(parts, 1).reshape(-1, *rest)


def _halves(model: Model, tensor: Tensor, back: bool) -> Tensor:
    """Rows of heads with interleaved rotary pairs (x0, x1), (x2, x3) ... to halves (x0, x2 ...), (x1, x3 ...), or back.

    Queries and keys permuted alike have the same scores.
    """
    if not model.rotary_interleaved:
        return tensor
    dim = model.resolved_head_dim
    rotated = int(dim * model.rotary_fraction)
    order = torch.cat(
        (torch.arange(0, rotated, 2), torch.arange(1, rotated, 2), torch.arange(rotated, dim))
    )
    order = torch.argsort(order) if back else order
    heads = tensor.reshape(-1, dim, *tensor.shape[1:])
    return heads.index_select(1, order.to(tensor.device)).reshape(tensor.shape)


def _split_qkv_halves(model: Model, tensor: Tensor) -> list[Tensor]:
    q, k, v = split_qkv(model, tensor)
    return [_halves(model, q, False), _halves(model, k, False), v]


def _join_qkv_halves(model: Model, tensors: Sequence[Tensor]) -> Tensor:
    q, k, v = tensors
    return join_qkv(model, [_halves(model, q, True), _halves(model, k, True), v])


QKV = Form(_split_qkv_halves, _join_qkv_halves)
"""Queries, keys and values apart, rotated in halves as transformers' models do."""
HEAD_NORM = Form(
    lambda model, t: [_halves(model, t, False)], lambda model, t: _halves(model, t[0], True)
)
"""Weights of a norm over a head's dimensions, which follow the rotary order."""


def _split_fused(model: Model, tensor: Tensor) -> list[Tensor]:
    q, k, v = _split_qkv_halves(model, tensor)
    return [join_qkv(model, [q, k, v])]


def _join_fused(model: Model, tensors: Sequence[Tensor]) -> Tensor:
    return _join_qkv_halves(model, split_qkv(model, tensors[0]))


QKV_FUSED = Form(_split_fused, _join_fused)
"""One tensor, head by head (GPT-NeoX), rotated in halves."""
