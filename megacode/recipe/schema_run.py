"""How a recipe is run: optimizer, precision, layout of the ranks, overlap and fusion, checkpoints,
evaluation, logging."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from megacode.recipe.section import Count, CountOrZero, Section


class ParameterGroup(Section):
    """Parameters whose Megatron-Core name matches `match` (a shell pattern) get these multipliers;
    later groups win."""

    match: str
    lr_mult: float = Field(default=1.0, ge=0)
    weight_decay_mult: float = Field(default=1.0, ge=0)


class Ema(Section):
    """An exponential moving average of the weights, beside them: in every step
    average = `decay` x average + (1 - `decay`) x weights, in fp32, from the run's first weights on.

    Training does not read it. Checkpoints hold it, and `megacode average --weights ema` makes one
    of it."""

    short_for: ClassVar[str | None] = "decay"

    decay: float = Field(gt=0, lt=1)
    every: Count = 1
    """Steps between updates, each with `decay` to the power of these steps."""


class Optimizer(Section):
    """AdamW as Megatron-Core runs it. `megatron` reaches every other field of its OptimizerConfig
    that is of use for it."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    """Skips biases and norms."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Global L2 norm; 0 turns clipping off."""
    loss_denominator: Literal["tokens", "positions"] = "tokens"
    """Mean over unmasked tokens, or over all positions of the batch (Crystal)."""
    groups: list[ParameterGroup] = Field(default_factory=list)
    ema: Ema | None = None
    """Takes 4 bytes a parameter. `ema: 0.999` is short for `ema: {decay: 0.999}`."""
    megatron: dict[str, Any] = Field(default_factory=dict)


class Precision(Section):
    """`precision: bf16` is short for `precision: {compute: bf16}`. Master weights and gradients are
    fp32.

    FP8 is for the matrix products of the transformer layers; embeddings, norms, attention scores
    and the output layer stay in bf16. `fp8_recipe` is how values are scaled into FP8's range: by a
    history of maxima (delayed), by each tensor's own maximum (tensorwise), by blocks of 128
    (blockwise: Hopper), by blocks of 32 (mxfp8: Blackwell).
    """

    short_for: ClassVar[str | None] = "compute"

    compute: Literal["fp32", "bf16", "fp8"] = "bf16"
    fp8_format: Literal["hybrid", "e4m3"] = "hybrid"
    """`hybrid`: e4m3 forward, e5m2 for gradients."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    fp8_amax_history: int = Field(default=1024, gt=0)
    """Steps of maxima that `delayed` looks back on; their largest sets the scale."""
    fp8_params: bool = False
    """Keep the layers' matrices in FP8 and gather them so; needs parallel.distributed_optimizer."""
    bf16_first_layers: int = Field(default=0, ge=0)
    bf16_last_layers: int = Field(default=0, ge=0)
    """Layers that stay in bf16; not with `delayed`."""
    compare_every: Count | None = None
    """Every so many steps, the batch also goes forward in bf16 before the step; the log has the
    difference (`drift`)."""

    @property
    def mxfp8_params(self) -> bool:
        """Whether weights are kept in mxfp8."""
        return self.compute == "fp8" and self.fp8_recipe == "mxfp8" and self.fp8_params


class Recompute(Section):
    """Activation recomputation: Megatron-Core's granularity, method and layer count."""

    short_for: ClassVar[str | None] = "granularity"

    granularity: Literal["none", "selective", "full"] = "none"
    method: Literal["uniform", "block"] = "uniform"
    layers: int = Field(default=1, gt=0)


class Overlap(Section):
    """Communication behind computation. Each is on where it is valid (the plan says where, and why
    not); `false` turns it off."""

    grad_reduce: bool | None = None
    """Reduce gradients over data-parallel ranks while backward goes on."""
    param_gather: bool | None = None
    """Gather new weights of the distributed optimizer while the next forward goes on."""
    tensor: bool | None = None
    """Tensor-parallel exchanges during the matrix products (Transformer Engine's userbuffers);
    needs `sequence`."""
    pipeline: bool | None = None
    """Exchanges between stages during other chunks' work; interleaved pipelines only."""


class Fusion(Section):
    """Several operations as one kernel. Each is on where it is valid, on CUDA; `false`
    turns it off."""

    rope: bool | None = None
    """One kernel rotates queries and keys."""
    cross_entropy: bool | None = None
    """One kernel for the loss and its gradient, in the logits' place."""
    activation: bool | None = None
    """Bias, gate and product of SwiGLU."""
    bias_dropout: bool | None = None
    """Bias, dropout and residual."""
    gradient_accumulation: bool | None = None
    """Matrix products add weight gradients to the fp32 sums themselves."""
    cuda_graphs: bool | None = None
    """Each layer's kernels launched as one recorded graph, for models whose kernels are short;
    default: off. Takes memory."""


class Parallel(Section):
    """Layout of the ranks. Data parallel is what is left: world size / (tensor x
    pipeline x context)."""

    tensor: int = Field(default=1, gt=0)
    pipeline: int = Field(default=1, gt=0)
    virtual_pipeline: int | None = Field(default=None, gt=1)
    """Model chunks per pipeline stage (interleaved 1F1B)."""
    context: int = Field(default=1, gt=0)
    sequence: bool = False
    """Sequence parallel: norms and dropout split along the sequence among tensor-parallel ranks."""
    micro_batch_size: int = Field(default=1, gt=0)
    distributed_optimizer: bool = True
    overlap: Overlap = Overlap()
    recompute: Recompute = Recompute()
    ddp: dict[str, Any] = Field(default_factory=dict)
    """Further DistributedDataParallelConfig fields by their own names."""
    timeout_minutes: float = Field(default=30.0, gt=0)
    """A collective that takes longer ends the run."""


class Checkpoints(Section):
    """When to save and what to keep. `latest` always names a complete one."""

    every: Count | None = None
    """Steps."""
    keep_last: int = Field(default=2, gt=0)
    keep_every: Count | None = None
    """Steps whose checkpoints are kept for good."""
    keep_phase_ends: bool = True
    """Save at the end of every phase, and keep those."""
    asynchronous: bool = True


class HarnessTasks(Section):
    """Tasks of lm-evaluation-harness (the extra `harness`)."""

    tasks: list[str] = Field(min_length=1)
    folder: str | None = None
    """Further tasks as the harness' YAML files."""
    shots: CountOrZero | None = None
    """Examples before each question; default: the task's."""
    limit: Count | None = None
    """Questions of each task; default: all."""


class Evaluation(Section):
    """Validation loss on every source that has `validation`, and tasks."""

    every: Count | None = None
    at_start: bool = False
    """Also before the first step."""
    at_phase_end: bool = True
    tasks: list[str] = Field(default=[])
    """Tasks that the model is scored on: YAML files, or folders of them (docs/tasks.md)."""
    tasks_every: Count | None = None
    """Steps between scores; default: `every`. At the start and at a phase's end as validation."""
    harness: HarnessTasks | None = None
    """On the same steps as `tasks`."""
    samples: Count = 64
    """Sequences per source, the first of its validation set; a source's own
    `validation_samples` go first."""


class WandbLogging(Section):
    """Weights & Biases (`pip install 'megacode[wandb]'`)."""

    project: str = Field(min_length=1)
    entity: str | None = None
    """Team or user; default: that of the login."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes to RUN/wandb, for `wandb sync` later."""


class MlflowLogging(Section):
    """MLflow (`pip install 'megacode[mlflow]'`)."""

    tracking_uri: str = Field(min_length=1)
    """A server (`http://host:5000`) or a database in a file (`sqlite:///mlflow.db`)."""
    experiment: str = Field(default="megacode", min_length=1)


class Logging(Section):
    """A logger that fails while it trains is said once and dropped; training goes on."""

    every: Count = 10
    """Steps between exchanges of numbers between the ranks, and between lines in a log."""
    tensorboard: bool = True
    wandb: WandbLogging | None = None
    """Also log to Weights & Biases."""
    mlflow: MlflowLogging | None = None
    """Also log to MLflow."""
