"""What a run holds: bytes on each rank's device, and on disk. Plain arithmetic on the recipe's
keys.

Compared with the highest allocation that torch reported on one H200 (docs/planning.md): within 2 %.
What a device needs beside that, for the CUDA context, NCCL and what the allocator cannot use, is
the `usable` share in `devices`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megacode.plan.estimate import parameter_parts
from megacode.plan.plan import Plan
from megacode.recipe.schema import Recipe


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank of pipeline stage `stage`."""

    stage: int
    parameters: int
    weights: float
    """In 16 bit (4 bytes in fp32); in FP8 also the copies that matrix products read."""
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_per_rank(recipe: Recipe, vocab_size: int, world_size: int) -> Memory:
    """Memory of the fullest pipeline stage's ranks; see `stage_memory`."""
    ends = sorted({0, recipe.parallel.pipeline - 1})
    stages = [stage_memory(recipe, vocab_size, world_size, stage) for stage in ends]
    return max(stages, key=lambda memory: memory.total)


def stage_memory(recipe: Recipe, vocab_size: int, world_size: int, stage: int) -> Memory:
    """Memory of the ranks of one pipeline stage.

    Weights take 2 bytes (4 in fp32), gradients 4, Adam 8 and another 4 for the master copy of
    16-bit weights (less with Megatron-Core's precision-aware optimizer), an EMA of weights 4; the
    distributed optimizer divides Adam's share and the EMA over the data (x context) parallel ranks.
    FP8 keeps two more bytes of every matrix, itself and its transpose; with `fp8_params` only
    these. Activations follow Korthikanti et al. (arXiv 2205.05198), with this model's own widths
    instead of 4h and without attention scores, which flash attention never stores; 1F1B keeps as
    many micro-batches as stages follow.
    Sizes are those stored, padding included.
    """
    parallel, precision, stages = recipe.parallel, recipe.precision, recipe.parallel.pipeline
    parts = _stored_parts(recipe, vocab_size)
    last = stage == stages - 1
    edge = parts["output"] if last else 0
    edge += parts["embedding"] + parts["positions"] if stage == 0 else 0
    if last and stages > 1 and recipe.model.tie_embeddings:
        edge += parts["embedding"]  # the tied matrix stands on both ends
    matrices = (parts["attention"] + parts["feed-forward"]) / stages / parallel.tensor
    parameters = round(matrices + edge / parallel.tensor + parts["norms"] / stages)
    full = precision.compute == "fp32"
    data = max(world_size // (parallel.tensor * parallel.pipeline), 1)
    ema = 4.0 if recipe.optimizer.ema else 0.0
    adam = (_adam_bytes(recipe) + ema) / (data if parallel.distributed_optimizer else 1)
    weights = parameters * (4.0 if full else 2.0)
    if precision.compute == "fp8":
        weights += matrices * (0.0 if precision.fp8_params else 2.0)
    return Memory(
        stage=stage,
        parameters=parameters,
        weights=weights,
        gradients=parameters * 4.0,
        optimizer=parameters * adam,
        activations=_activations(recipe, vocab_size, stage),
    )


def _stored_parts(recipe: Recipe, vocab_size: int) -> dict[str, int]:
    """Parameters by part as they are stored, padding included."""
    model, tensor = recipe.model, recipe.parallel.tensor
    padded = model.model_copy(update={"ffn_size": model.stored_ffn_size(tensor)})
    return parameter_parts(padded, model.stored(vocab_size, tensor), _longest(recipe))


def _longest(recipe: Recipe) -> int:
    return max(phase.sequence_length for phase in recipe.phases)


def _adam_bytes(recipe: Recipe) -> float:
    """Moments and master copy of a weight.

    Megatron-Core's precision-aware optimizer keeps the moments in the types given to it. Of an fp32
    master copy it keeps only the 16 bits that the bf16 weight lacks. This loses nothing; FP8's
    tensorwise and finer scales do not allow it.
    """
    if recipe.precision.compute == "fp32":
        return 8.0
    given = recipe.optimizer.megatron
    if not given.get("use_precision_aware_optimizer"):
        return 12.0
    size = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0}
    moments = sum(size[given.get(name, "fp32")] for name in ("exp_avg_dtype", "exp_avg_sq_dtype"))
    master = size[given.get("main_params_dtype", "fp32")]
    shared = recipe.precision.compute == "bf16" or recipe.precision.fp8_recipe == "delayed"
    remainders = given.get("store_param_remainders", not recipe.precision.fp8_params)
    return moments + (2.0 if master == 4.0 and shared and remainders else master)


def _activations(recipe: Recipe, vocab_size: int, stage: int) -> float:
    """Bytes that a rank keeps between forward and backward, at the run's longest sequences."""
    model, parallel, length = recipe.model, recipe.parallel, _longest(recipe)
    width = 4 if recipe.precision.compute == "fp32" else 2
    product = 1 if recipe.precision.compute == "fp8" else width  # inputs of matrix products
    tensor, stages = parallel.tensor, parallel.pipeline
    tokens = length / parallel.context * parallel.micro_batch_size
    whole = tensor if parallel.sequence else 1  # what is not split by tensor parallelism alone
    hidden, dim, inner = model.hidden_size, model.resolved_head_dim, model.stored_ffn_size(tensor)
    # Per token and layer: inputs of two norms, of QKV and of the feed-forward; two dropout masks of
    # a byte.
    layer = (2 * hidden * (width + product) + (2 * hidden if model.dropout else 0)) / whole
    # Then q, k, v, and the inputs of the attention's and the feed-forward's output.
    heads, kv_heads = model.heads, model.resolved_kv_heads
    layer += ((heads + 2 * kv_heads) * width + heads * product) * dim / tensor
    layer += inner * ((2 if model.gated else 1) * width + product) / tensor
    layers, recompute = model.layers / stages, parallel.recompute
    per_stage = layers * layer
    if recompute.granularity == "full":
        kept, every = hidden * width / whole, recompute.layers
        if recompute.method == "uniform":
            per_stage = layers / every * kept + every * layer
        else:
            recomputed = min(every, layers)
            per_stage = recomputed * kept + (layers - recomputed + 1) * layer
    in_flight = float(stages - stage)
    if parallel.virtual_pipeline:
        in_flight += (stages - 1) / parallel.virtual_pipeline  # section 4.2.3 of the paper
    total = per_stage * tokens * in_flight
    if stage == stages - 1:  # logits, and their fp32 copy for the loss
        total += tokens * model.stored(vocab_size, tensor) * (4 + width) / tensor
    return total


# ------------------------------------------------------------------------------------------ on disk


def checkpoint_bytes(recipe: Recipe, vocab_size: int) -> int:
    """Size of one checkpoint: weights as trained, fp32 master weights, two moments and the EMA, if
    there is one, of every stored parameter.

    Megatron-Core's reshardable format holds master weights also where they are the weights (fp32).
    """
    stored = sum(_stored_parts(recipe, vocab_size).values())
    return stored * (_gathered_each(recipe) + (4 if recipe.precision.compute == "fp32" else 2))


def gathered_bytes(recipe: Recipe, parameters: int, world_size: int) -> float:
    """Host memory that every process takes while Megatron-Core gathers a checkpoint: fp32 master
    weights, two moments and the EMA, if there is one, of all its `parameters`, and its own share
    of them once more. Without the distributed optimizer nothing is gathered."""
    if not recipe.parallel.distributed_optimizer:
        return 0.0
    data = max(world_size // (recipe.parallel.tensor * recipe.parallel.pipeline), 1)
    return _gathered_each(recipe) * parameters * (1 + 1 / data)


def _gathered_each(recipe: Recipe) -> int:
    """Bytes of fp32 state of a parameter in a checkpoint."""
    return 16 if recipe.optimizer.ema else 12


def corpus_bytes(plan: Plan, vocab_size: int) -> int:
    """Tokens of every source that a phase reads, in Megatron-Core's type for the vocabulary;
    without their indexes."""
    return sum(plan.token_counts.values()) * (2 if vocab_size < 65500 else 4)
