"""Which parallel layouts fit a number of devices, fastest first, by a model of a step's time.

The model is simple; its assumptions are printed with the proposals (`ASSUMPTIONS`). Use it to
choose what to try first. The time of a step on one rank is the sum of

    matrix products at a share of the peak, with recomputed forwards; small ones are slower
    tensor-parallel exchange, not hidden: 8 all-reduce halves a layer (arXiv 2104.04473)
    the pipeline's bubble: (stages - 1) / (micro-batches x chunks) of the above (same paper, 2.2)
    what backward cannot hide of the gradients' exchange, and forward of the parameters' gathering
    the optimizer's pass over its share of the state
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megacode.errors import UserError
from megacode.plan.devices import Peak
from megacode.plan.estimate import flops_per_token
from megacode.plan.memory import Memory, memory_per_rank
from megacode.recipe.checks import check_layout, check_recipe
from megacode.recipe.schedules import BatchSizes
from megacode.recipe.schema import Parallel, Recipe, Recompute

BEST = 8
"""How many are proposed."""
_MFU = 0.56
"""Share of the dense 16-bit peak that a rank reaches on its own: measured on one H200
(docs/results/gpu-nvidia-h200.md)."""
_FP8 = 1.4
"""Rate of FP8 against bf16, measured there too."""
_NODE = 300e9
_NETWORK = 45e9
_MEMORY_RATE = 2e12
ASSUMPTIONS = (
    f"a rank alone at {_MFU:.0%} of the dense 16-bit peak ({_FP8} times that with FP8), 3 % slower "
    "for each halving by tensor parallelism and 4 % for a micro-batch of under 4,096 tokens; "
    f"{_NODE / 1e9:.0f} GB/s to a neighbour within a node, {_NETWORK / 1e9:.0f} GB/s between nodes "
    "a device (one 400 Gbit/s port); tensor-parallel exchange not hidden; gradients reduced "
    "behind the last backward, parameters gathered behind the first forward"
)


@dataclass(frozen=True)
class Proposal:
    """A layout that fits, with what the model expects of it at the recipe's largest batch and
    longest sequences."""

    parallel: Parallel
    data: int
    micro_batches: int
    """In a step, for each data-parallel rank."""
    memory: Memory
    seconds: float
    tokens_per_second: float
    """A device."""
    mfu: float
    """By the standard count of FLOPs, against the dense 16-bit peak."""

    def settings(self) -> list[str]:
        """What to give to `--set`."""
        p, r = self.parallel, self.parallel.recompute
        full = f"{{granularity: {r.granularity}, method: {r.method}, layers: {r.layers}}}"
        return [
            f"parallel.tensor={p.tensor}",
            f"parallel.pipeline={p.pipeline}",
            f"parallel.virtual_pipeline={p.virtual_pipeline or 'null'}",
            f"parallel.sequence={str(p.sequence).lower()}",
            f"parallel.micro_batch_size={p.micro_batch_size}",
            f"parallel.recompute={'none' if r.granularity == 'none' else full}",
        ]


def suggest(
    recipe: Recipe, vocab_size: int, devices: int, peak: Peak, devices_per_node: int = 8
) -> list[Proposal]:
    """Layouts for `devices` that the recipe's checks accept and that fit the device's usable
    memory, fastest first.

    Context parallelism stays as the recipe has it.

    Raises:
        UserError: nothing fits; the sentence names the layout that comes nearest.
    """
    found: list[Proposal] = []
    too_large: list[tuple[float, Parallel]] = []
    for parallel in _layouts(recipe, devices, devices_per_node):
        candidate = recipe.model_copy(update={"parallel": parallel})
        memory = memory_per_rank(candidate, vocab_size, devices)
        if memory.total > peak.usable:
            too_large.append((memory.total, parallel))
        else:
            found.append(_expected(candidate, vocab_size, devices, peak, devices_per_node, memory))
    # Of equals the simplest: fewer stages, less tensor parallelism, no recomputation.
    found.sort(
        key=lambda p: (round(p.seconds, 6), p.parallel.pipeline, p.parallel.tensor, p.memory.total)
    )
    shapes: dict[tuple[int, int, int], Proposal] = {}  # the fastest of each, to show choices
    for proposal in found:
        p = proposal.parallel
        shapes.setdefault((p.tensor, p.pipeline, p.micro_batch_size), proposal)
    accepted = [p for p in shapes.values() if _accepted(recipe, p.parallel, devices)]
    if accepted:
        return accepted[:BEST]
    if not too_large:
        raise UserError(
            f"--suggest: no tensor x pipeline layout divides {devices} devices, the model's heads "
            "and layers, and every batch size of the recipe; try another --gpus, or a batch size "
            "with more divisors"
        )
    total, parallel = min(too_large, key=lambda pair: pair[0])
    raise UserError(
        f"--suggest: nothing fits {devices} devices of {peak.usable / 2**30:.0f} usable GiB; the "
        f"nearest, tensor {parallel.tensor} x pipeline {parallel.pipeline} with recomputation, "
        f"takes {total / 2**30:.0f} GiB a rank; give more devices or larger ones, or shorten the "
        "sequences"
    )


def _layouts(recipe: Recipe, devices: int, devices_per_node: int) -> Iterator[Parallel]:
    """Every layout worth looking at whose batches divide."""
    model, given = recipe.model, recipe.parallel
    batches = [s for p in recipe.phases for s in BatchSizes.of(p.batch_size).sizes.tolist()]
    tensors = [t for t in (1, 2, 4, 8, 16) if t <= devices_per_node and model.heads % t == 0]
    stages = [p for p in range(1, min(model.layers, 64) + 1) if model.layers % p == 0]
    for tensor, pipeline, micro in product(tensors, stages, (1, 2, 4, 8)):
        ranks, per_stage = tensor * pipeline * given.context, model.layers // pipeline
        share = micro * devices // ranks  # sequences of all ranks' micro-batches
        if devices % ranks or any(size % share for size in batches):
            continue
        for virtual in (None, *(v for v in (2, 4, 8) if pipeline > 1 and per_stage % v == 0)):
            if virtual and any(size // share % pipeline for size in batches):
                continue
            for recompute in _recomputations(per_stage // (virtual or 1)):
                layout = {
                    "tensor": tensor,
                    "pipeline": pipeline,
                    "virtual_pipeline": virtual,
                    "sequence": tensor > 1,
                    "micro_batch_size": micro,
                    "recompute": recompute,
                    "distributed_optimizer": True,
                }
                yield given.model_copy(update=layout)


def _recomputations(layers: int) -> Iterator[Recompute]:
    yield Recompute()
    for share in (4, 2):
        if layers % share == 0:
            yield Recompute(granularity="full", method="block", layers=layers // share)
    yield Recompute(granularity="full", method="uniform", layers=1)


def _expected(
    recipe: Recipe, vocab_size: int, devices: int, peak: Peak, per_node: int, memory: Memory
) -> Proposal:
    parallel, model = recipe.parallel, recipe.model
    tensor, stages, chunks = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline or 1
    data = devices // (tensor * stages * parallel.context)
    phase = max(recipe.phases, key=lambda p: p.sequence_length)
    length, batch = phase.sequence_length, int(BatchSizes.of(phase.batch_size).sizes.max())
    micro_batches = batch // (parallel.micro_batch_size * data)
    tokens = length * parallel.micro_batch_size / parallel.context  # of a micro-batch on a rank
    flops = flops_per_token(model, vocab_size, length)

    rate = peak.sixteen_bit * 1e12 * _MFU * (_FP8 if recipe.precision.compute == "fp8" else 1.0)
    rate *= 0.97 ** (tensor.bit_length() - 1) * (0.96 if tokens < 4096 else 1.0)
    repeated = 1 + _recomputed(parallel, model.layers // stages) / 3
    compute = flops * tokens / (tensor * stages) / rate * repeated
    exchange = 0.0
    if tensor > 1:
        layer = 8 * (tensor - 1) / tensor * tokens * model.hidden_size * 2
        exchange = model.layers / stages * layer / (_NODE if tensor <= per_node else _NETWORK)
    if stages > 1:
        exchange += 2 * chunks * tokens * model.hidden_size * 2 / tensor / _NETWORK
    each = compute + exchange
    step = each * micro_batches * (1 + (stages - 1) / (micro_batches * chunks))

    link = _NODE if devices <= per_node else _NETWORK
    share = (data - 1) / data / link
    reduced, gathered = memory.parameters * 4 * share, memory.parameters * 2 * share
    step += max(0.0, reduced - each * 2 / 3) + max(0.0, gathered - each / 3)
    step += (memory.optimizer * 2 + memory.parameters * 6 / data) / _MEMORY_RATE
    per_device = batch * length / step / devices
    mfu = per_device * flops / (peak.sixteen_bit * 1e12)
    return Proposal(parallel, data, micro_batches, memory, step, per_device, mfu)


def _recomputed(parallel: Parallel, layers: int) -> float:
    """Share of the layers whose forward runs twice."""
    recompute = parallel.recompute
    if recompute.granularity != "full":
        return 0.0
    if recompute.method == "uniform":
        return 1.0
    return min(1.0, recompute.layers * (parallel.virtual_pipeline or 1) / layers)


def _accepted(recipe: Recipe, parallel: Parallel, devices: int) -> bool:
    candidate = recipe.model_copy(update={"parallel": parallel})
    if any(problem.startswith(("parallel", "phases")) for problem in check_recipe(candidate)):
        return False
    try:
        check_layout(candidate, devices)
    except UserError:
        return False
    return True
