"""Fused attention (bf16 and fp16, any length), the softmax of the unfused one, and packed rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from engine_kernels.enums import DType, NVTE_Fused_Attn_Backend, NVTE_Mask_Type, NVTE_QKV_Layout

_Backend = NVTE_Fused_Attn_Backend


def get_fused_attn_backend(
    training: bool,
    q_type: Any,
    kv_type: Any,
    layout: Any,
    bias: Any,
    mask: Any,
    softmax: Any,
    dropout: float,
    *_: Any,
) -> NVTE_Fused_Attn_Backend:
    """As cuDNN has it: 16 bits. Dropout would need its random numbers, so it goes unfused here."""
    half = DType(q_type) in (DType.kBFloat16, DType.kFloat16)
    return _Backend.NVTE_F16_arbitrary_seqlen if half and not dropout else _Backend.NVTE_No_Backend


def _sequences(
    layout: Any, q: Tensor, k: Tensor, edges: tuple[Tensor, Tensor], starts: Any, padded: bool
) -> Iterator[Any]:
    """Where each sequence's queries and keys lie: an index of `q` and one of `k`, giving `[s, h, d]`."""
    name = NVTE_QKV_Layout(layout).name.removeprefix("NVTE_")
    lengths = [(edge[1:] - edge[:-1]).tolist() for edge in edges]
    if name.startswith("T"):
        begins = [
            (edge if start is None else start).tolist()
            for edge, start in zip(edges, starts, strict=True)
        ]
        for i in range(len(lengths[0])):
            yield tuple(
                (slice(begin[i], begin[i] + length[i]),)
                for begin, length in zip(begins, lengths, strict=True)
            )
        return
    batch = 1 if name.startswith("S") else 0
    for i in range(q.shape[batch]):
        sizes = (
            [length[i] for length in lengths]
            if padded
            else [q.shape[1 - batch], k.shape[1 - batch]]
        )
        yield tuple((slice(0, size), i) if batch else (i, slice(0, size)) for size in sizes)


def _hidden(mask: Any, queries: int, keys: int) -> Tensor | None:
    name = NVTE_Mask_Type(mask).name
    if "CAUSAL" not in name:
        return None
    return torch.ones(queries, keys, dtype=torch.bool).triu(
        1 + (keys - queries if "BOTTOM_RIGHT" in name else 0)
    )


def _heads(x: Tensor, index: Any, heads: int) -> Tensor:
    """float32 `[heads, s, d]`; keys and values repeated for the queries that share them."""
    x = x[index].detach().float().transpose(0, 1)
    return x.repeat_interleave(heads // x.shape[0], 0)


def fused_attn_fwd(
    longest_q: int, longest_k: int, training: bool, scale: float, dropout: float, zero: bool, layout: Any, bias: Any,
    mask: Any, softmax: Any, window: Any, bottom_right: bool, edges_q: Tensor, edges_k: Tensor, q: Tensor, k: Tensor,
    v: Tensor, dtype: Any, starts_q: Tensor | None, starts_k: Tensor | None, *_: Any,
) -> list[Tensor]:  # fmt: skip
    """Output, logarithm of the softmax's sums (`[b, h, s, 1]`, packed `[tokens, h, 1]`), state of the random numbers."""
    assert dropout == 0 and tuple(window) in ((-1, -1), (-1, 0))
    packed, heads = q.dim() == 3, q.shape[-2]
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    batch = 1 if NVTE_QKV_Layout(layout).name.startswith("NVTE_S") else 0
    stats = (
        torch.zeros(len(q), heads, 1)
        if packed
        else torch.zeros(q.shape[batch], heads, q.shape[1 - batch], 1)
    )
    padded = "PADDING" in NVTE_Mask_Type(mask).name
    for i, (at_q, at_k) in enumerate(
        _sequences(layout, q, k, (edges_q, edges_k), (starts_q, starts_k), padded)
    ):
        queries, keys, values = (
            _heads(q, at_q, heads),
            _heads(k, at_k, heads),
            _heads(v, at_k, heads),
        )
        if not queries.shape[1]:
            continue
        scores = queries @ keys.transpose(1, 2) * scale
        if (hidden := _hidden(mask, *scores.shape[1:])) is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        sums = torch.logsumexp(scores, -1, keepdim=True)
        out[at_q] = (torch.exp(scores - sums) @ values).transpose(0, 1).to(out.dtype)
        if packed:
            stats[at_q] = sums.transpose(0, 1)
        else:
            stats[i, :, : queries.shape[1]] = sums
    return [out, stats, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    longest_q: int, longest_k: int, scale: float, dropout: float, zero: bool, layout: Any, bias: Any, mask: Any, softmax: Any,
    window: Any, bottom_right: bool, deterministic: bool, edges_q: Tensor, edges_k: Tensor, q: Tensor, k: Tensor, v: Tensor,
    o: Tensor, d_o: Tensor, dtype: Any, d_dtype: Any, saved: list[Tensor], starts_q: Tensor | None, starts_k: Tensor | None,
    *_: Any,
) -> list[Tensor]:  # fmt: skip
    """With the sums that are given: of a part of the keys (context parallel) they are those of all."""
    packed, heads, groups = q.dim() == 3, q.shape[-2], k.shape[-2]
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    padded = "PADDING" in NVTE_Mask_Type(mask).name
    for i, (at_q, at_k) in enumerate(
        _sequences(layout, q, k, (edges_q, edges_k), (starts_q, starts_k), padded)
    ):
        queries, keys, values = (
            _heads(q, at_q, heads),
            _heads(k, at_k, heads),
            _heads(v, at_k, heads),
        )
        out, d_out = _heads(o, at_q, heads), _heads(d_o, at_q, heads)
        if not queries.shape[1]:
            continue
        sums = saved[0][at_q].transpose(0, 1) if packed else saved[0][i, :, : queries.shape[1]]
        weights = torch.exp(queries @ keys.transpose(1, 2) * scale - sums)
        if (hidden := _hidden(mask, *weights.shape[1:])) is not None:
            weights = weights.masked_fill(hidden, 0.0)
        d_scores = (
            weights * (d_out @ values.transpose(1, 2) - (d_out * out).sum(-1, keepdim=True)) * scale
        )
        dq[at_q] = (d_scores @ keys).transpose(0, 1).to(dq.dtype)
        for target, found in (
            (dk, d_scores.transpose(1, 2) @ queries),
            (dv, weights.transpose(1, 2) @ d_out),
        ):
            shared = found.view(groups, heads // groups, *found.shape[1:]).sum(1)
            target[at_k] = shared.transpose(0, 1).to(target.dtype)
    return [dq, dk, dv, torch.zeros(0), torch.zeros(0)]


# ------------------------------------------------------------------------------------------------- softmax, packed rows


def _softmax(x: Tensor, hidden: Tensor | None, scale: Any) -> Tensor:
    scores = x.detach().float() * float(scale)
    return torch.softmax(scores if hidden is None else scores.masked_fill(hidden, -10000.0), -1).to(
        x.dtype
    )


def scaled_softmax_forward(x: Tensor, scale: Any) -> Tensor:
    return _softmax(x, None, scale)


def scaled_masked_softmax_forward(x: Tensor, mask: Tensor, scale: Any) -> Tensor:
    return _softmax(x, mask.bool(), scale)


def scaled_upper_triang_masked_softmax_forward(x: Tensor, scale: Any) -> Tensor:
    return _softmax(x, _hidden(NVTE_Mask_Type.NVTE_CAUSAL_BOTTOM_RIGHT_MASK, *x.shape[-2:]), scale)


scaled_aligned_causal_masked_softmax_forward = scaled_upper_triang_masked_softmax_forward


def scaled_softmax_backward(gradient: Tensor, weights: Tensor, scale: Any) -> Tensor:
    g, w = gradient.float(), weights.float()
    return (float(scale) * w * (g - (g * w).sum(-1, keepdim=True))).to(gradient.dtype)


scaled_masked_softmax_backward = scaled_upper_triang_masked_softmax_backward = (
    scaled_softmax_backward
)
scaled_aligned_causal_masked_softmax_backward = scaled_softmax_backward


def convert_thd_to_bshd(x: Tensor, edges: Tensor, batch: int, longest: int) -> Tensor:
    out, at = x.new_zeros((batch, longest, *x.shape[1:])), edges.tolist()
    for i in range(batch):
        out[i, : at[i + 1] - at[i]] = x[at[i] : at[i + 1]]
    return out


def convert_bshd_to_thd(x: Tensor, edges: Tensor, tokens: int) -> Tensor:
    out, at = x.new_zeros((tokens, *x.shape[2:])), edges.tolist()
    for i in range(len(at) - 1):
        out[at[i] : at[i + 1]] = x[i, : at[i + 1] - at[i]]
    return out
