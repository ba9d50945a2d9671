"""Megatron-Core's GPTModel with a loss for which the host does not wait."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import is_te_min_version
from torch import Tensor


class Gpt(GPTModel):
    """GPTModel; only how Transformer Engine's fused loss is called differs, not what it computes.

    Unless it is told that a CUDA graph may record it, that loss's backward pass copies a number from the host to the device to
    compare its gradient with it (transformer_engine/pytorch/triton/cross_entropy.py): in every micro-batch the host would
    wait there until the whole forward pass is done. Megatron-Core says so for graphs of a whole iteration only.
    """

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy of every token.

        Args:
            labels: int64 `[b, s]`.
            logits: `[s, b, vocabulary / tensor-parallel size]`; overwritten with their gradient where the loss is fused.

        Returns:
            float32 `[b, s]`.
        """
        fused = (
            self.config.cross_entropy_loss_fusion and self.config.cross_entropy_fusion_impl == "te"
        )
        if not (fused and is_te_min_version("2.7.0")):
            return super().compute_language_model_loss(labels, logits)
        from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy

        columns = labels.transpose(0, 1).contiguous()
        columns = torch.as_strided(
            columns, columns.size(), (columns.size(1), 1)
        )  # also where a side is 1
        losses = te_parallel_cross_entropy(logits, columns, self.pg_collection.tp, True)
        return losses.transpose(0, 1).contiguous()
