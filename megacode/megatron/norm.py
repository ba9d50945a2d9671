"""LayerNorm and RMSNorm for layer specs without Transformer Engine.

Megatron-Core's own wrapper around torch's norms refuses sequence parallelism; all that sequence parallelism asks of a norm is
that its parameters carry `sequence_parallel`, so that their gradients are summed over the tensor-parallel ranks.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class Norm(nn.Module):
    """Normalises the last dimension of a `[..., hidden_size]` tensor; `config.normalization` says which way."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> None:
        super().__init__()
        self.shape = (hidden_size,)
        self.eps = eps
        self.rms = config.normalization == "RMSNorm"
        self.zero_centered = config.layernorm_zero_centered_gamma
        start = torch.zeros if self.zero_centered else torch.ones
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(start(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.bias: nn.Parameter | None = None
        if not self.rms:
            self.bias = nn.Parameter(
                torch.zeros(hidden_size, dtype=config.params_dtype, device=device)
            )
            self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 1 if self.zero_centered else self.weight
        if self.rms:
            return nn.functional.rms_norm(x, self.shape, weight, self.eps)
        return nn.functional.layer_norm(x, self.shape, weight, self.bias, self.eps)
