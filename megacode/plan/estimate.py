"""What a run computes: parameters, FLOPs, time. Plain arithmetic on the recipe's keys; memory and
disk are in `memory`.
"""

from __future__ import annotations

from megacode.plan.plan import Plan
from megacode.recipe.schema import Model


def parameter_parts(model: Model, vocab_size: int, context_length: int = 0) -> dict[str, int]:
    """Parameters by part, without padding: embedding, positions (learned ones), attention,
    feed-forward, norms, output."""
    hidden, heads, dim, inner = (
        model.hidden_size,
        model.heads,
        model.resolved_head_dim,
        model.resolved_ffn_size,
    )
    queries, keys = heads * dim, model.resolved_kv_heads * dim
    attention = hidden * (queries + 2 * keys) + queries * hidden
    attention += queries + 2 * keys if model.linear_bias or model.qkv_bias else 0
    attention += hidden if model.linear_bias else 0
    attention += heads if model.megatron.get("softmax_type") == "learnable" else 0
    wide = inner * (2 if model.gated else 1)
    feed_forward = hidden * wide + inner * hidden + (wide + hidden if model.linear_bias else 0)
    per_norm = 2 if model.normalization == "layernorm" else 1
    norms = model.layers * (2 * hidden + (2 * dim if model.qk_norm else 0)) + hidden
    length = model.context_length or context_length
    return {
        "embedding": vocab_size * hidden,
        "positions": length * hidden if model.position_embedding == "learned" else 0,
        "attention": model.layers * attention,
        "feed-forward": model.layers * feed_forward,
        "norms": per_norm * norms,
        "output": 0 if model.tie_embeddings else vocab_size * hidden,
    }


def parameter_count(model: Model, vocab_size: int, context_length: int = 0) -> int:
    """Unique parameters, without the padding of the vocabulary; tied embeddings count once.

    Args:
        context_length: for learned positions, where the model gives none.
    """
    return sum(parameter_parts(model, vocab_size, context_length).values())


def flops_per_token(model: Model, vocab_size: int, sequence_length: int) -> float:
    """FLOPs of forward and backward for one token, as in PaLM's appendix B (arXiv 2204.02311).

    6 for every weight of a matrix multiplication (with the output layer, without the embedding's
    look-up, biases and norms), plus 12 x layers x heads x head_dim x sequence_length for the
    attention scores and their sums: causal attention counts in full, though half of it is masked.
    A layer with a sliding window counts its window. Recomputation is not counted.
    """
    hidden, dim = model.hidden_size, model.resolved_head_dim
    attention = 2 * hidden * dim * (model.heads + model.resolved_kv_heads)
    feed_forward = hidden * model.resolved_ffn_size * (3 if model.gated else 2)
    weights = model.layers * (attention + feed_forward) + vocab_size * hidden
    windows = model.windowed_layers * min(model.sliding_window or 0, sequence_length)
    keys = (model.layers - model.windowed_layers) * sequence_length + windows
    return 6.0 * weights + 12.0 * model.heads * dim * keys


def run_flops(plan: Plan, vocab_size: int) -> float:
    """FLOPs of the whole run."""
    model = plan.recipe.model
    return sum(
        phase.tokens * flops_per_token(model, vocab_size, phase.sequence_length)
        for phase in plan.phases
    )


def days(flops: float, devices: int, peak: float, mfu: float) -> float:
    """Days that a number of devices take at a share `mfu` of their peak."""
    return flops / (devices * peak * mfu) / 86_400
