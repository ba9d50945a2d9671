"""FP8 as the recipes define it: one scale for a tensor (delayed, current), or for blocks of 128 and 128 x 128.

FP8 numbers are stored as bytes. A tensor's second copy is its transpose (`[last, ...others]`), with scales of its own where
blocks are one-dimensional.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine_kernels.enums import TORCH_DTYPES, DType, torch_dtype

_LARGEST = {DType.kFloat8E4M3: 448.0, DType.kFloat8E5M2: 57344.0}


def _bytes(x: Tensor, dtype: Any) -> Tensor:
    largest = _LARGEST[DType(dtype)]
    return x.float().clamp(-largest, largest).to(TORCH_DTYPES[DType(dtype)]).view(torch.uint8)


def _numbers(data: Tensor, dtype: Any) -> Tensor:
    return data.view(TORCH_DTYPES[DType(dtype)]).float()


def _transposed(data: Tensor) -> Tensor:
    return data.reshape(-1, data.shape[-1]).t().contiguous().view(data.shape[-1], *data.shape[:-1])


def _scales(amax: Tensor, largest: float, powers_of_two: bool, epsilon: float) -> Tensor:
    amax = amax.clamp_min(epsilon) if epsilon else amax
    scale = torch.where(amax > 0, largest / amax, torch.ones_like(amax))
    scale = torch.where(
        torch.isfinite(scale), scale, torch.full_like(scale, torch.finfo(torch.float32).max)
    )
    return torch.exp2(torch.floor(torch.log2(scale))) if powers_of_two else scale


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """`tensor` in the quantizer's format, in `output` if given."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import (
        Float8CurrentScalingQuantizer,
        Float8Quantizer,
    )

    if noop is not None and noop.numel() and float(noop) != 0:
        return output
    if quantizer is None:
        return tensor if output is None else output.copy_(tensor)
    if isinstance(quantizer, Float8CurrentScalingQuantizer):
        _measure(tensor, quantizer)
    elif isinstance(quantizer, Float8BlockQuantizer):
        return _in_blocks(tensor.detach(), quantizer, output)
    elif not isinstance(quantizer, Float8Quantizer):
        raise NotImplementedError(type(quantizer))
    elif quantizer.amax.numel():
        quantizer.amax.copy_(
            torch.maximum(quantizer.amax, _amax(tensor).reshape(quantizer.amax.shape))
        )
    return _with_one_scale(tensor.detach(), quantizer, output)


def _amax(tensor: Tensor) -> Tensor:
    return tensor.detach().float().abs().max().reshape(1) if tensor.numel() else torch.zeros(1)


def _measure(tensor: Tensor, quantizer: Any) -> None:
    amax = _amax(tensor)
    if quantizer.with_amax_reduction:
        torch.distributed.all_reduce(
            amax, op=torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group
        )
    largest = _LARGEST[DType(quantizer.dtype)]
    quantizer.amax.copy_(amax)
    quantizer.scale.copy_(
        _scales(amax, largest, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    )


def _with_one_scale(x: Tensor, quantizer: Any, output: Any) -> Any:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    data = _bytes(x.float() * quantizer.scale, quantizer.dtype)
    inverse = (1.0 / quantizer.scale).reshape(1)
    if output is None:
        parts = {
            "data": data if quantizer.rowwise_usage else None,
            "fp8_scale_inv": inverse,
            "fp8_dtype": quantizer.dtype,
            "data_transpose": _transposed(data) if quantizer.columnwise_usage else None,
            "quantizer": quantizer,
        }
        return (
            Float8TensorStorage(**parts)
            if quantizer.internal
            else Float8Tensor(shape=x.shape, dtype=x.dtype, **parts)
        )
    if output._data is not None:
        output._data.copy_(data.reshape(output._data.shape))
    if output._transpose is not None and data.dim() > 1:
        output._transpose.copy_(_transposed(data).reshape(output._transpose.shape))
        output._transpose_invalid = False
    output._scale_inv.copy_(inverse.reshape(output._scale_inv.shape))
    return output


def _rows_of_128(x: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    """Bytes `[r, c]`, and inverse scales as products take them: `[blocks of c, r rounded up to 4]`."""
    rows, columns = x.shape
    blocks = torch.nn.functional.pad(x.float(), (0, -columns % 128)).view(rows, -1, 128)
    scale = _scales(
        blocks.abs().amax(-1),
        _LARGEST[DType(quantizer.dtype)],
        quantizer.force_pow_2_scales,
        quantizer.amax_epsilon,
    )
    inverse = torch.zeros(scale.shape[1], rows + -rows % 4)
    inverse[:, :rows] = (1 / scale).t()
    return _bytes(
        x.float() * scale.repeat_interleave(128, 1)[:, :columns], quantizer.dtype
    ), inverse


def _spread(blocks: Tensor, rows: int, columns: int) -> Tensor:
    return blocks.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]


def _block_amax(x: Tensor) -> Tensor:
    rows, columns = x.shape
    x = torch.nn.functional.pad(x.float(), (0, -columns % 128, 0, -rows % 128))
    return x.view(x.shape[0] // 128, 128, x.shape[1] // 128, 128).abs().amax((1, 3))


def _squares_of_128(x: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    """Bytes `[r, c]`, and inverse scales `[blocks of r, blocks of c rounded up to 4]`."""
    largest = _LARGEST[DType(quantizer.dtype)]
    scale = _scales(_block_amax(x), largest, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    inverse = torch.zeros(scale.shape[0], scale.shape[1] + -scale.shape[1] % 4)
    inverse[:, : scale.shape[1]] = 1 / scale
    return _bytes(x.float() * _spread(scale, *x.shape), quantizer.dtype), inverse


def _in_blocks(x: Tensor, quantizer: Any, output: Any) -> Any:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
        Float8BlockwiseQTensorStorage,
    )

    flat = x.reshape(-1, x.shape[-1])
    blocks = _rows_of_128 if quantizer.block_scaling_dim == 1 else _squares_of_128
    wanted = (quantizer.rowwise_usage, quantizer.columnwise_usage)
    if output is not None:
        wanted = (output._rowwise_data is not None, output._columnwise_data is not None)
    rows = row_scales = columns = column_scales = None
    if wanted[0]:
        rows, row_scales = blocks(flat, quantizer)
        rows = rows.view(x.shape)
    if wanted[1]:
        columns, column_scales = blocks(flat.t().contiguous(), quantizer)
        columns = columns.view(x.shape[-1], *x.shape[:-1])
    if output is None:
        parts = {
            "rowwise_data": rows,
            "rowwise_scale_inv": row_scales,
            "columnwise_data": columns,
            "columnwise_scale_inv": column_scales,
            "fp8_dtype": quantizer.dtype,
            "quantizer": quantizer,
            "is_2D_scaled": quantizer.block_scaling_dim == 2,
        }
        if quantizer.internal:
            return Float8BlockwiseQTensorStorage(**parts)
        return Float8BlockwiseQTensor(shape=x.shape, dtype=x.dtype, **parts)
    for target, source in (
        (output._rowwise_data, rows),
        (output._rowwise_scale_inv, row_scales),
        (output._columnwise_data, columns),
        (output._columnwise_scale_inv, column_scales),
    ):
        if target is not None:
            target.copy_(source.reshape(target.shape))
    return output


def is_fp8(operand: Any) -> bool:
    return hasattr(operand, "_fp8_dtype")


def operand(tensor: Any, second_copy: bool) -> Tensor:
    """A product's operand as `[rows, columns]`, from the copy that the device's kernel would read: it must be there."""
    if hasattr(tensor, "_transpose"):
        data = tensor._transpose if second_copy else tensor._data
        there = data is not None and not (second_copy and tensor._transpose_invalid)
        assert there, (
            f"the product wants the {'transpose' if second_copy else 'data'}, which is not there"
        )
        x = _numbers(data, tensor._fp8_dtype) * tensor._scale_inv
        return x.reshape(x.shape[0], -1).t() if second_copy else x.reshape(-1, x.shape[-1])
    if hasattr(tensor, "_rowwise_data"):
        data = tensor._columnwise_data if second_copy else tensor._rowwise_data
        scales = tensor._columnwise_scale_inv if second_copy else tensor._rowwise_scale_inv
        assert data is not None, (
            f"the product wants the data by {'columns' if second_copy else 'rows'}, which is not there"
        )
        flat = data.reshape(data.shape[0], -1) if second_copy else data.reshape(-1, data.shape[-1])
        rows, columns = flat.shape
        if tensor._is_2D_scaled:
            full = _spread(scales, rows, columns)
        else:
            full = scales.t()[:rows].repeat_interleave(128, 1)[:, :columns]
        x = _numbers(flat, tensor._fp8_dtype) * full
        return x.t() if second_copy else x
    return tensor.detach().reshape(-1, tensor.shape[-1])


def dequantize(tensor: Any, otype: Any) -> Tensor:
    return (_numbers(tensor._data, tensor._fp8_dtype) * tensor._scale_inv).to(torch_dtype(otype))


def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    made = _transposed(data)
    return made if out is None else out.copy_(made.reshape(out.shape))


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    return gradient.reshape(-1, gradient.shape[-1]).sum(0), quantize(gradient, quantizer)


# -------------------------------------------------------------------------------- master weights into FP8 parameters


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    amax.copy_(_amax(tensor).reshape(amax.shape))


def multi_tensor_compute_scale_and_scale_inv(
    chunk: int,
    noop: Tensor,
    lists: list[list[Tensor]],
    largest: float,
    powers_of_two: bool,
    epsilon: float,
) -> None:
    for amax, scale, inverse in zip(*lists, strict=True):
        found = _scales(amax, largest, powers_of_two, epsilon)
        scale.copy_(found.reshape(scale.shape))
        inverse.copy_((1 / found).reshape(inverse.shape))


def fp8_block_scaling_compute_partial_amax(
    master: Tensor, amax: Tensor, h: int, w: int, start: int, block: int
) -> None:
    whole = torch.zeros(h * w)
    whole[start : start + master.numel()] = master.detach().float().reshape(-1)
    found = _block_amax(whole.view(h, w))
    amax[:, : found.shape[1]].copy_(torch.maximum(amax[:, : found.shape[1]], found))


def fp8_block_scaling_partial_cast(
    master: Tensor, out: Tensor, scale: Tensor, h: int, w: int, start: int, block: int, dtype: Any
) -> None:
    full = _spread(scale, h, w).reshape(-1)[start : start + master.numel()]
    out.copy_(_bytes(master.detach().float().reshape(-1) * full, dtype))


def fused_amax_and_scale_update_after_reduction(
    amaxes: Tensor,
    histories: list[Tensor],
    scales: list[Tensor],
    algorithm: str,
    dtype: Any,
    margin: float,
) -> None:
    """Delayed scaling's step: the histories roll by one, and the scales follow their largest or latest value."""
    largest, at = _LARGEST[DType(dtype)] * 2.0**-margin, 0
    for history, scale in zip(histories, scales, strict=True):
        for column in range(history.shape[1]):
            last = amaxes[at + column] if float(amaxes[at + column]) else history[0, column].clone()
            if float(last) == 0:
                continue
            rolled = torch.cat((history[1:, column], last.reshape(1)))
            amax = float(rolled.max() if algorithm == "max" else last)
            history[:, column] = rolled
            history[0, column] = 0
            scale[column] = min(largest / amax, torch.finfo(torch.float32).max)
        at += history.shape[1]
