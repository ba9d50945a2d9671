"""What a run costs: parameters, FLOPs, memory of the fullest rank, time. Plain arithmetic on the recipe's keys.

Fields passed through in `model.megatron` (experts, multi-token prediction, another attention) are not part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from megacode.recipe.plan import Plan
from megacode.recipe.schema import Model, Recipe


def parameter_parts(model: Model, vocab_size: int, context_length: int = 0) -> dict[str, int]:
    """Parameters by part, without padding: embedding, positions (learned ones), attention, feed-forward, norms, "
    "output."""
    hidden, heads, dim, inner = model.hidden_size, model.heads, model.resolved_head_dim, model.resolved_ffn_size
    queries, keys = heads * dim, model.resolved_kv_heads * dim
    attention = hidden * (queries + 2 * keys) + queries * hidden
    attention += queries + 2 * keys if model.linear_bias or model.qkv_bias else 0
    attention += hidden if model.linear_bias else 0
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

    6 for every weight of a matrix multiplication (with the output layer, without the embedding's look-up, biases and
    norms), plus 12 x layers x heads x head_dim x sequence_length for the attention scores and their sums: causal
    attention counts in full, though half of it is masked. Recomputation is not counted.
    """
    hidden, dim = model.hidden_size, model.resolved_head_dim
    attention = 2 * hidden * dim * (model.heads + model.resolved_kv_heads)
    feed_forward = hidden * model.resolved_ffn_size * (3 if model.gated else 2)
    weights = model.layers * (attention + feed_forward) + vocab_size * hidden
    return 6.0 * weights + 12.0 * model.layers * model.heads * dim * sequence_length


def run_flops(plan: Plan, vocab_size: int) -> float:
    """FLOPs of the whole run."""
    model = plan.recipe.model
    return sum(phase.tokens * flops_per_token(model, vocab_size, phase.sequence_length) for phase in plan.phases)


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank (`stage` is its pipeline stage), without the framework's own and without "
    "fragmentation."""

    stage: int
    parameters: int
    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_per_rank(recipe: Recipe, vocab_size: int, world_size: int, flash_attention: bool = True) -> Memory:
    """Memory of the fullest pipeline stage's ranks.

    Weights take 2 bytes (4 in fp32), gradients 4, Adam 8 and another 4 for the master copy of 16-bit weights; the
    distributed optimizer divides Adam's share over the data (x context) parallel ranks. Activations follow Korthikanti
    et al. (arXiv 2205.05198), with this model's own widths instead of 4h; 1F1B keeps as many micro-batches as stages
    follow.

    Args:
        flash_attention: the scores are never stored (Transformer Engine on CUDA); else they are, unless recomputed.
    """
    parallel = recipe.parallel
    stages = parallel.pipeline
    candidates = sorted({0, stages - 1})
    return max(
        (_stage_memory(recipe, vocab_size, world_size, s, flash_attention) for s in candidates), key=lambda m: m.total
    )


def _stage_memory(recipe: Recipe, vocab_size: int, world_size: int, stage: int, flash: bool) -> Memory:
    model, parallel = recipe.model, recipe.parallel
    stages = parallel.pipeline
    length = max(phase.sequence_length for phase in recipe.phases)
    parts = parameter_parts(model, vocab_size, length)
    last = stage == stages - 1
    edge = (parts["embedding"] + parts["positions"] if stage == 0 else 0) + (parts["output"] if last else 0)
    if last and stages > 1 and model.tie_embeddings:
        edge += parts["embedding"]  # the tied matrix stands on both ends
    split = (parts["attention"] + parts["feed-forward"]) / stages + edge
    parameters = round(split / parallel.tensor + parts["norms"] / stages)
    full = recipe.precision.compute == "fp32"
    data = max(world_size // (parallel.tensor * parallel.pipeline), 1)
    adam = (8 if full else 12) / (data if parallel.distributed_optimizer else 1)
    return Memory(
        stage=stage,
        parameters=parameters,
        weights=parameters * (4 if full else 2),
        gradients=parameters * 4,
        optimizer=parameters * adam,
        activations=_activations(recipe, vocab_size, length, stage, flash),
    )


def _activations(recipe: Recipe, vocab_size: int, length: int, stage: int, flash: bool) -> float:
    """Bytes that one rank of a stage keeps between forward and backward, at the run's longest sequences."""
    model, parallel = recipe.model, recipe.parallel
    width = 4 if recipe.precision.compute == "fp32" else 2
    tensor, stages = parallel.tensor, parallel.pipeline
    tokens = length / parallel.context * parallel.micro_batch_size
    whole = tensor if parallel.sequence else 1  # what is not split by tensor parallelism alone
    hidden, dim, inner = model.hidden_size, model.resolved_head_dim, model.resolved_ffn_size
    # Per token and layer: inputs of two norms, of QKV and of the feed-forward; two dropout masks of a byte.
    layer = (4 * hidden * width + (2 * hidden if model.dropout else 0)) / whole
    layer += (2 * model.heads + 2 * model.resolved_kv_heads) * dim * width / tensor  # q, k, v and the output's input
    layer += inner * ((2 if model.gated else 1) + 1) * width / tensor
    scores = 0.0 if flash else model.heads * length / parallel.context * (2 * width + 1) / tensor
    granularity = parallel.recompute.granularity
    if granularity == "none":
        layer += scores
    layers = model.layers / stages
    if granularity == "full":
        kept = hidden * width / whole
        every = parallel.recompute.layers
        if parallel.recompute.method == "uniform":
            per_stage = layers / every * kept + every * (layer + scores)
        else:
            recomputed = min(every, layers)
            per_stage = recomputed * kept + (layers - recomputed) * (layer + scores) + layer + scores
    else:
        per_stage = layers * layer
    in_flight = stages - stage
    if parallel.virtual_pipeline:
        in_flight += (stages - 1) / parallel.virtual_pipeline  # section 4.2.3 of the paper
    total = per_stage * tokens * in_flight
    if stage == stages - 1:
        total += tokens * vocab_size * (4 + width) / tensor  # logits, and their fp32 copy for the loss
    return total


def days(flops: float, devices: int, peak: float, mfu: float) -> float:
    """Days that a number of devices take at a share `mfu` of their peak."""
    return flops / (devices * peak * mfu) / 86_400
