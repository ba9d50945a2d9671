"""Where Megatron-Core keeps each weight of the dense GPT, and how a Hugging Face model cuts it.
 A checkpoint stacks the layers: `decoder.layers.mlp.linear_fc1.weight` is [layers, 2 x inner,
hidden]. A *slot* is one such tensor (of one layer) and the Hugging Face tensors it becomes; its
*form* takes it apart and puts it together, on tensors without padding. Everything here also runs on
meta tensors, which is how shapes are known before anything is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megacode.recipe.schema import Model

LAYER = "decoder.layers."
EMBEDDING = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class Form:
    """`split` takes a Megatron-Core tensor without padding apart, `join` undoes it."""

    split: Callable[[Model, Tensor], list[Tensor]]
    join: Callable[[Model, Sequence[Tensor]], Tensor]


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


# ------------------------------------------------------------------------------- Megatron's tensors


def shape(model: Model, vocab_size: int, key: str, length: int = 0) -> tuple[int, ...]:
    """Shape of a tensor (of one layer) without padding; `length` of learned positions."""
    hidden, inner, dim = model.hidden_size, model.resolved_ffn_size, model.resolved_head_dim
    attention = model.heads * dim
    qkv = attention + 2 * model.resolved_kv_heads * dim
    wide = inner * (2 if model.gated else 1)
    shapes = {
        EMBEDDING: (vocab_size, hidden),
        OUTPUT: (vocab_size, hidden),
        POSITIONS: (length, hidden),
        f"{LAYER}self_attention.linear_qkv.weight": (qkv, hidden),
        f"{LAYER}self_attention.linear_qkv.bias": (qkv,),
        f"{LAYER}self_attention.linear_proj.weight": (hidden, attention),
        f"{LAYER}self_attention.q_layernorm.weight": (dim,),
        f"{LAYER}self_attention.k_layernorm.weight": (dim,),
        f"{LAYER}mlp.linear_fc1.weight": (wide, hidden),
        f"{LAYER}mlp.linear_fc1.bias": (wide,),
        f"{LAYER}mlp.linear_fc2.weight": (hidden, inner),
    }
    return shapes.get(key, (hidden,))


def unpadded(model: Model, vocab_size: int, key: str, tensor: Tensor) -> Tensor:
    """Without the zeros at the end of the vocabulary and of the feed-forward's inner size."""
    return _resized(model, key, tensor, vocab_size, model.resolved_ffn_size)


def padded(model: Model, key: str, tensor: Tensor) -> Tensor:
    """With them, as `model.pad_multiple` says."""
    return _resized(model, key, tensor, model.stored(tensor.shape[0], 1), model.stored_ffn_size(1))


def _resized(model: Model, key: str, tensor: Tensor, vocab_size: int, inner: int) -> Tensor:
    """A tensor cut or filled with zeros to these sizes; one that has neither of them as it is."""
    if key in (EMBEDDING, OUTPUT):
        return _to_size(tensor, 0, vocab_size)
    if key in (f"{LAYER}mlp.linear_fc1.weight", f"{LAYER}mlp.linear_fc1.bias"):
        parts = tensor.reshape(2 if model.gated else 1, -1, *tensor.shape[1:])
        return _to_size(parts, 1, inner).reshape(-1, *tensor.shape[1:])
    if key == f"{LAYER}mlp.linear_fc2.weight":
        return _to_size(tensor, 1, inner)
    return tensor


def _to_size(tensor: Tensor, dimension: int, size: int) -> Tensor:
    missing = list(tensor.shape)
    missing[dimension] = size - tensor.shape[dimension]
    if missing[dimension] <= 0:
        return tensor.narrow(dimension, 0, size)
    return torch.cat((tensor, tensor.new_zeros(missing)), dimension)


# -------------------------------------------------------------------------------------------- forms


def split_qkv(model: Model, tensor: Tensor) -> list[Tensor]:
    """linear_qkv [groups x (queries a group + 2) x head_dim, ...] -> queries, keys, values."""
    groups, dim = model.resolved_kv_heads, model.resolved_head_dim
    rest = tensor.shape[1:]
    rows = tensor.reshape(groups, model.heads // groups + 2, dim, *rest)
    return [part.reshape(-1, *rest) for part in (rows[:, :-2], rows[:, -2], rows[:, -1])]


def join_qkv(model: Model, tensors: Sequence[Tensor]) -> Tensor:
    """Undoes `split_qkv`."""
    groups, dim = model.resolved_kv_heads, model.resolved_head_dim
    rest = tensors[0].shape[1:]
    parts = [tensor.reshape(groups, -1, dim, *rest) for tensor in tensors]
    return torch.cat(parts, 1).reshape(-1, *rest)


def _rotary_order(model: Model, tensor: Tensor, interleaved: bool, back: bool = False) -> Tensor:
    """Rows of heads in the model's rotary order -> in the wanted one, or back.

    Interleaved: neighbouring pairs (x0, x1), (x2, x3) ...; else halves: x0, x2 ... | x1, x3 ...
    Queries and keys permuted alike have the same scores.
    """
    if model.position_embedding != "rotary" or model.rotary_interleaved == interleaved:
        return tensor
    dim, rotated = model.resolved_head_dim, model.rotated_dimensions
    ranges = (range(0, rotated, 2), range(1, rotated, 2), range(rotated, dim))
    order = torch.tensor([i for part in ranges for i in part], device=tensor.device)
    if interleaved != back:
        order = torch.argsort(order)
    heads = tensor.reshape(-1, dim, *tensor.shape[1:])
    return heads.index_select(1, order).reshape(tensor.shape)


def _qkv(interleaved: bool) -> Form:
    def split(model: Model, tensor: Tensor) -> list[Tensor]:
        q, k, v = split_qkv(model, tensor)
        return [_rotary_order(model, q, interleaved), _rotary_order(model, k, interleaved), v]

    def join(model: Model, tensors: Sequence[Tensor]) -> Tensor:
        *rotated, v = tensors
        q, k = (_rotary_order(model, part, interleaved, back=True) for part in rotated)
        return join_qkv(model, [q, k, v])

    return Form(split, join)


def transposed(form: Form) -> Form:
    """The same with matrices as [in, out]; biases have one dimension and stay as they are."""
    return Form(
        lambda model, tensor: [part.t() for part in form.split(model, tensor)],
        lambda model, tensors: form.join(model, [tensor.t() for tensor in tensors]),
    )


SAME = Form(lambda model, tensor: [tensor], lambda model, tensors: tensors[0])
GATE_UP = Form(
    lambda model, tensor: list(tensor.chunk(2)), lambda model, tensors: torch.cat(list(tensors))
)
"""linear_fc1 of gated feed-forwards: the gate's rows, then the other's."""
QKV = _qkv(interleaved=False)
"""Queries, keys and values apart, rotated in halves as transformers' models do."""
QKV_BY_HEAD = Form(
    lambda model, tensor: [join_qkv(model, QKV.split(model, tensor))],
    lambda model, tensors: QKV.join(model, split_qkv(model, tensors[0])),
)
"""One tensor, head by head (GPT-NeoX), rotated in halves."""
_PAIRS = _qkv(interleaved=True)
QKV_STACKED = Form(
    lambda model, tensor: [torch.cat(_PAIRS.split(model, tensor))],
    lambda model, tensors: _PAIRS.join(model, tensors[0].chunk(3)),
)
"""One tensor, queries | keys | values (CrystalCoder, without groups), in neighbouring pairs."""
HEAD_NORM = Form(
    lambda model, tensor: [_rotary_order(model, tensor, False)],
    lambda model, tensors: _rotary_order(model, tensors[0], False, back=True),
)
"""Weights of a norm over a head's dimensions, which follow the rotary order, here in halves."""
