"""Updates of many tensors at once: norms, scaling, Adam."""

from __future__ import annotations

import torch
from torch import Tensor

Lists = list[list[Tensor]]


def multi_tensor_scale(chunk: int, noop: Tensor, lists: Lists, scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * scale)


def multi_tensor_l2norm(
    chunk: int, noop: Tensor, lists: Lists, per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    norms = (
        torch.stack([tensor.float().norm() for tensor in lists[0]]) if lists[0] else torch.zeros(1)
    )
    return norms.norm().reshape(1), norms if per_tensor else torch.zeros(0)


def _updated(
    g: Tensor, p: Tensor, m: Tensor, v: Tensor, lr: float, beta1: float, beta2: float, epsilon: float, step: int, decoupled: int,
    corrected: int, decay: float,
) -> Tensor:  # fmt: skip
    assert isinstance(step, int), "the kernel takes a whole number of steps"
    g = g.float() if decoupled else g.float() + decay * p
    first, second = beta1 * m.float() + (1 - beta1) * g, beta2 * v.float() + (1 - beta2) * g * g
    m.copy_(first)
    v.copy_(second)
    c1, c2 = (1 - beta1**step, 1 - beta2**step) if corrected else (1.0, 1.0)
    update = first / c1 / ((second / c2).sqrt() + epsilon)
    return p - lr * (update + decay * p if decoupled else update)


def multi_tensor_adam(chunk: int, noop: Tensor, lists: Lists, *settings: float) -> None:
    """Gradients, weights, first and second moments, and master weights if there are any."""
    for g, p, m, v, *master in zip(
        *(map(Tensor.detach, tensors) for tensors in lists), strict=True
    ):
        new = _updated(g, (master[0] if master else p).float(), m, v, *settings)
        for target in (p, *master):
            target.copy_(new)


def multi_tensor_adam_param_remainder(
    chunk: int, noop: Tensor, lists: Lists, *settings: float
) -> None:
    """bf16 weights, whose master weights' lower 16 bits are the last list."""
    for g, p, m, v, remainder in zip(
        *(map(Tensor.detach, tensors) for tensors in lists), strict=True
    ):
        assert p.dtype == torch.bfloat16 and remainder.dtype == torch.int16
        upper, lower = p.view(torch.int16).to(torch.int32), remainder.to(torch.int32)
        upper = torch.where(lower < 0, upper - 1, upper)  # the weight was rounded up
        master = ((upper << 16) | (lower & 0xFFFF)).view(torch.float32)
        bits = _updated(g, master, m, v, *settings).contiguous().view(torch.int32)
        lower = bits.to(torch.int16)
        p.copy_(((bits >> 16) + (lower < 0)).to(torch.int16).view(torch.bfloat16))
        remainder.copy_(lower)


def multi_tensor_adam_fp8(*_: object) -> None:
    raise NotImplementedError


multi_tensor_adam_capturable = multi_tensor_adam_capturable_master = multi_tensor_sgd = (
    multi_tensor_adam_fp8
)
