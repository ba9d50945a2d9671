"""Matrix products, norms, rotary embeddings."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from engine_kernels.enums import NVTE_QKV_Format, torch_dtype
from engine_kernels.fp8 import is_fp8, operand, quantize


def generic_gemm(
    A: Any, transA: bool, B: Any, transB: bool, D: Tensor | None, quantizer: Any, output_dtype: Any, bias: Tensor | None,
    bias_type: Any, gelu: bool, gelu_in: Any, grad: bool, workspace: Any, workspace_size: int, accumulate: bool,
    use_split_accumulator: bool, comm_overlap: Any = None, comm_type: Any = None, extra_output: Any = None,
    bulk_overlap: bool = False, alpha: float = 1.0, beta: float | None = None,
) -> tuple[Any, Tensor | None, None, Any]:  # fmt: skip
    """op(B) @ op(A), row by row: T N is input @ weight^T, N N gradient @ weight, N T gradient^T @ input. Summed in fp32."""
    assert comm_overlap is None and not gelu
    assert is_fp8(A) == is_fp8(B), f"a product of {type(A)} and {type(B)}"
    a, b = operand(A, second_copy=not transA), operand(B, second_copy=transB)
    if is_fp8(A):
        assert all(side % 16 == 0 for side in a.shape), (
            f"FP8 cannot multiply {tuple(b.shape)} and {tuple(a.shape)}"
        )
    else:
        assert a.dtype == b.dtype, f"a product of {a.dtype} and {b.dtype}"
    out = (b.t() if transB else b).float() @ (a.t() if transA else a).float() * alpha
    if not transB:
        out = out.reshape(*tuple(B.size())[:-1], out.shape[-1])
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = b.float().sum(0).to(torch_dtype(bias_type))
    elif bias is not None:
        out = out + bias.float()
    if D is not None:
        D.add_(out.reshape(D.shape)) if accumulate else D.copy_(out.reshape(D.shape))
        return D, bias_gradient, None, extra_output
    half = torch.bfloat16 if is_fp8(A) else a.dtype
    out = out.to(half if output_dtype is None else torch_dtype(output_dtype))
    return (
        (out if quantizer is None else quantize(out, quantizer)),
        bias_gradient,
        None,
        extra_output,
    )


def _normed(y: Tensor, out: Any, quantizer: Any, dtype: Any) -> Any:
    y = y.to(torch_dtype(dtype))
    if quantizer is not None:
        return quantize(y, quantizer, out)
    return y if out is None else out.copy_(y.reshape(out.shape))


def layernorm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, out: Any, quantizer: Any, dtype: Any, margin: int,
    zero_centered: bool,
) -> tuple[Any, Tensor, Tensor]:  # fmt: skip
    x = x.detach().float()
    mean, inverse = x.mean(-1), torch.rsqrt(x.var(-1, unbiased=False) + epsilon)
    y = (x - mean[..., None]) * inverse[..., None] * (
        weight.detach().float() + zero_centered
    ) + bias.detach().float()
    return _normed(y, out, quantizer, dtype), mean, inverse


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    out: Any,
    quantizer: Any,
    dtype: Any,
    margin: int,
    zero_centered: bool,
) -> tuple[Any, None, Tensor]:
    x = x.detach().float()
    inverse = torch.rsqrt((x * x).mean(-1) + epsilon)
    return (
        _normed(
            x * inverse[..., None] * (weight.detach().float() + zero_centered),
            out,
            quantizer,
            dtype,
        ),
        None,
        inverse,
    )


def layernorm_bwd(
    dz: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    margin: int,
    zero_centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dy, (mean, inverse) = (
        dz.float().reshape(x.shape),
        (t.reshape(*x.shape[:-1], 1) for t in (mean, inverse)),
    )
    normed = (x.detach().float() - mean) * inverse
    w = dy * (weight.detach().float() + zero_centered)
    dx = inverse * (w - w.mean(-1, keepdim=True) - normed * (w * normed).mean(-1, keepdim=True))
    d_weight, d_bias = (
        (t.reshape(-1, t.shape[-1]).sum(0)).to(weight.dtype) for t in (dy * normed, dy)
    )
    return dx.to(dz.dtype), d_weight, d_bias


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    dy, inverse = dz.float().reshape(x.shape), inverse.reshape(*x.shape[:-1], 1)
    normed = x.detach().float() * inverse
    w = dy * (weight.detach().float() + zero_centered)
    dx = inverse * (w - normed * (w * normed).mean(-1, keepdim=True))
    return dx.to(dz.dtype), (dy * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)


# ------------------------------------------------------------------------------------------------------------- rotary


def _turned(x: Tensor, angles: Tensor, interleaved: bool, sign: float) -> Tensor:
    rotated, rest = x[..., : angles.shape[-1]].float(), x[..., angles.shape[-1] :]
    if interleaved:
        across = torch.stack((-rotated[..., 1::2], rotated[..., 0::2]), -1).reshape(rotated.shape)
    else:
        first, second = rotated.chunk(2, -1)
        across = torch.cat((-second, first), -1)
    return torch.cat(
        ((rotated * angles.cos() + across * (sign * angles.sin())).to(x.dtype), rest), -1
    )


def _rope(
    x: Tensor, angles: Tensor, starts: Any, layout: Any, interleaved: bool, ends: Tensor | None, size: int, rank: int,
    sign: float,
) -> Tensor:  # fmt: skip
    """`[s, b, h, d]`, `[b, s, h, d]` or `[tokens, h, d]`; of a context-parallel rank, its two slices of every sequence."""
    assert starts is None

    def turned(part: Tensor) -> Tensor:
        length = part.shape[0]
        if size == 1:
            return _turned(part, angles[:length], interleaved, sign)
        half, last = length // 2, 2 * size - rank - 1
        own = torch.cat(
            (angles[rank * half : (rank + 1) * half], angles[last * half : (last + 1) * half])
        )
        return _turned(part, own, interleaved, sign)

    x, angles = x.detach(), angles.float()
    if layout == NVTE_QKV_Format.NVTE_THD:
        edges = (ends // size).tolist()
        return torch.cat([turned(x[i:j].unsqueeze(1)).squeeze(1) for i, j in pairwise(edges)])
    if layout == NVTE_QKV_Format.NVTE_BSHD:
        return turned(x.transpose(0, 1)).transpose(0, 1)
    return turned(x)


def fused_rope_forward(*arguments: Any) -> Tensor:
    return _rope(*arguments, sign=1.0)


def fused_rope_backward(*arguments: Any) -> Tensor:
    return _rope(*arguments, sign=-1.0)
