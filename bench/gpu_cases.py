"""What bench/gpu.py trains: Crystal-7B's and Llama-3.1-8B's shapes, in full or with as many layers as a device holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megacode.plan.memory import memory_per_rank
from megacode.recipe.schema import (
    Checkpoints,
    Fusion,
    LearningRate,
    Logging,
    Mixture,
    Model,
    Optimizer,
    Parallel,
    Phase,
    Precision,
    Recipe,
    Recompute,
    Source,
)

PRECISIONS = (
    "bf16",
    "delayed",
    "tensorwise",
    "blockwise",
    "mxfp8",
    "delayed-params",
    "tensorwise-params",
)
_FULL = 0.97
"""Share of a device's memory that a full model may take by the plan's arithmetic: what does not fit is not tried."""
_REDUCED = 0.90
"""Share that a model reduced to fit may take: nobody mends its number of layers where the arithmetic is a little off."""


def crystal(layers: int) -> Model:
    return Model(
        layers=layers, hidden_size=4096, heads=32, ffn_size=10922, normalization="layernorm", linear_bias=True,
        rotary_fraction=0.25, rotary_interleaved=True, tie_embeddings=True, vocab_size=32032,
    )  # fmt: skip


def llama(layers: int) -> Model:
    return Model(
        layers=layers,
        hidden_size=4096,
        heads=32,
        kv_heads=8,
        ffn_size=14336,
        rotary_base=500_000,
        vocab_size=128_256,
    )


def tiny(layers: int) -> Model:
    """No measurement: to see that this script runs."""
    return Model(layers=layers, hidden_size=256, heads=4, ffn_size=512, vocab_size=1024)


@dataclass(frozen=True)
class Case:
    """A model and the shape of its batches. On one device an update of all weights weighs more than on many that share
    it, so a step has several micro-batches."""

    model: Callable[[int], Model]
    layers: int
    length: int
    micro_batch: int
    batch: int
    """Sequences in a step."""
    reduced: bool = False
    """As many of the layers as fit the device in every precision asked for, the same for all."""
    recomputed: int = 0
    """Layers whose forward pass is repeated in the backward pass; what that costs is not counted as work done."""
    lean: bool = False
    """Both sides with Megatron-Core's precision-aware optimizer, which keeps 16 bits of the master copy: the same
    numbers, 12 GiB less for 7B."""

    def describe(self, layers: int) -> str:
        again = f", {self.recomputed} layers recomputed" if self.recomputed else ""
        again += ", precision-aware optimizer" if self.lean else ""
        of = f" of {self.layers}" if layers != self.layers else ""
        return (
            f"{layers}{of} layers, {self.batch} sequences of {self.length:,} tokens a step in micro-batches of "
            f"{self.micro_batch}{again}"
        )


CASES: dict[str, Case] = {
    "crystal-7b": Case(crystal, 32, 2048, 2, 32),
    "crystal-7b-lean": Case(crystal, 32, 2048, 4, 32, lean=True),
    "crystal-7b-8k": Case(crystal, 32, 8192, 1, 8, recomputed=14),
    "crystal-7b-8k-lean": Case(crystal, 32, 8192, 1, 8, lean=True),
    "crystal-7b-reduced": Case(crystal, 32, 2048, 4, 32, reduced=True),
    "crystal-7b-8k-reduced": Case(crystal, 32, 8192, 1, 8, reduced=True),
    "llama-8b-8k-lean": Case(llama, 32, 8192, 1, 8, recomputed=26, lean=True),
    "llama-8b-8k-reduced": Case(llama, 32, 8192, 1, 8, reduced=True),
    "tiny": Case(tiny, 2, 128, 2, 4),
}
DEFAULT_CASES = ("crystal-7b", "crystal-7b-8k-lean", "crystal-7b-reduced", "llama-8b-8k-reduced")


def recipe_of(
    case: Case, layers: int, precision: str, folder: Path = Path("."), fused: bool = True
) -> Recipe:
    """The recipe of one measurement; its corpus is `folder`/a."""
    kind, _, params = precision.partition("-")
    phase = Phase(
        name="p", steps=100_000, batch_size=case.batch, sequence_length=case.length, mixture=Mixture(sources={"a": 1.0}),
        learning_rate=LearningRate(peak=3e-4, warmup=100),
    )  # fmt: skip
    return Recipe(
        name="bench",
        model=case.model(layers),
        sources={"a": Source(path=str(folder / "a"))},
        phases=[phase],
        precision=Precision(compute="bf16")
        if kind == "bf16"
        else Precision(compute="fp8", fp8_recipe=kind, fp8_params=bool(params)),
        parallel=Parallel(
            micro_batch_size=case.micro_batch,
            recompute=Recompute(granularity="full", method="block", layers=case.recomputed)
            if case.recomputed
            else Recompute(),
        ),
        fusion=Fusion() if fused else Fusion(gradient_accumulation=False),
        optimizer=Optimizer(megatron={"use_precision_aware_optimizer": True} if case.lean else {}),
        checkpoints=Checkpoints(keep_phase_ends=False),
        logging=Logging(every=4),
    )


def needed(case: Case, layers: int, precision: str) -> float:
    """Bytes of the device, by the plan's arithmetic."""
    recipe = recipe_of(case, layers, precision)
    return memory_per_rank(recipe, recipe.model.vocab_size or 0, 1).total


def fitting_layers(case: Case, precisions: Sequence[str], memory: int) -> int:
    """The layers to measure: all, or with `reduced` the largest even number that fits `memory` bytes in every precision (2
    where none does: then nothing is tried)."""
    if not case.reduced:
        return case.layers
    fits = (
        n
        for n in range(case.layers, 2, -2)
        if all(needed(case, n, p) <= _REDUCED * memory for p in precisions)
    )
    return next(fits, 2)


def refusal(case: Case, layers: int, precision: str, memory: int) -> str | None:
    """Why a measurement is not tried, if it is not."""
    size, share = needed(case, layers, precision), _REDUCED if case.reduced else _FULL
    if size <= share * memory:
        return None
    return f"would take {size / 2**30:.0f} GiB of {memory / 2**30:.0f}"
