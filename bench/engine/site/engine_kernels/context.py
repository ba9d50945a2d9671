"""Packed rows under context parallelism: a rank holds an early and a late piece of each sequence, its two halves here.

`edges` are cumulative lengths of the sequences on this rank, so that every length is even.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def _half(edges: Tensor, which: int) -> Tensor:
    """Indices of the tokens in the first (0) or second (1) halves, in order."""
    at = edges.tolist()
    pieces = []
    for start, end in itertools.pairwise(at):
        half = (end - start) // 2
        pieces.append(torch.arange(start + which * half, start + (which + 1) * half))
    return torch.cat(pieces)


def thd_read_half_tensor(x: Tensor, edges: Tensor, which: int) -> Tensor:
    """`[tokens, ...]`, or two of them stacked, to the half of the tokens."""
    return x.index_select(1 if x.dim() == 4 else 0, _half(edges, which))


def thd_read_second_half_lse(sums: Tensor, edges: Tensor, packed: bool, longest: int) -> Tensor:
    """Logarithms of sums, `[heads, tokens]`."""
    assert packed, "as cuDNN 9.6 has it"
    return sums[:, _half(edges, 1)].contiguous()


def thd_second_half_lse_correction(sums: Tensor, more: Tensor, edges: Tensor, packed: bool) -> None:
    assert packed, "as cuDNN 9.6 has it"
    late = _half(edges, 1)
    sums[:, late] = torch.logaddexp(sums[:, late], more.to(sums.dtype))


def thd_out_correction(
    out: Tensor, part: Tensor, sums: Tensor, sums_of_part: Tensor, edges: Tensor, late_only: bool, packed: bool,
) -> None:  # fmt: skip
    """Adds a part's output by its share of the sums."""
    assert packed, "as cuDNN 9.6 has it"
    at = _half(edges, 1) if late_only else slice(None)
    share = torch.exp(sums_of_part.float() - sums[:, at].float()).transpose(0, 1).unsqueeze(-1)
    flat = out.view(out.shape[0], *part.shape[1:])
    flat[at] = (flat[at].float() + part.float() * share).to(out.dtype)


def thd_grad_correction(grad: Tensor, part: Tensor, edges: Tensor, early: str, late: str) -> None:
    """Each half is copied, added to, or left; a part without one of the halves has the other alone."""
    whole = "none" not in (early, late)
    for which, how in enumerate((early, late)):
        if how == "none":
            continue
        at = _half(edges, which)
        given = part[at] if whole else part
        grad[at] = given.to(grad.dtype) if how == "copy" else grad[at] + given.to(grad.dtype)
