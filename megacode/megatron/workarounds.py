"""Workarounds of faults in Megatron-Core, torch and Transformer Engine.

Each states three things: `Upstream fault`, the `Versions` that have it, and `Remove when`; and the
test of tests/megatron/test_upstream.py that fails once the installed version has mended the fault.
A few stand where they act, in the same form: `grep -rn "Upstream fault" megacode` lists all.

The file follows a step through the library: layers, gradients, what is not training, checkpoints.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import queue
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.fp8_utils import (
    dequantize_fp8_tensor,
    is_float8tensor,
    post_all_gather_processing,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.utils import get_sliding_window_causal_mask
from megatron.core.utils import get_batch_on_this_cp_rank, is_te_min_version
from torch import Tensor, nn

from megacode.errors import UserError
from megacode.recipe.schema import Model, Parallel

# ------------------------------------------------------------------------------------------ layers


class Norm(nn.Module):
    """LayerNorm or RMSNorm of the last dimension of `[..., hidden_size]`, for the local layers.

    Upstream fault: Megatron-Core's wrapper of torch's norms refuses sequence parallelism, which
        only needs parameters marked `sequence_parallel`: their gradients are then summed over the
        tensor-parallel ranks.
    Versions: Megatron-Core 0.16 to 0.19.
    Remove when: `WrappedTorchNorm` takes it. Test: `test_norm`.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> None:
        super().__init__()
        self.shape, self.eps = (hidden_size,), eps
        self.rms = config.normalization == "RMSNorm"
        self.zero_centered = config.layernorm_zero_centered_gamma
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = nn.Parameter(start(hidden_size, dtype=config.params_dtype, device=device))
        self.bias = None if self.rms else nn.Parameter(torch.zeros_like(self.weight))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 1 if self.zero_centered else self.weight
        if self.rms:
            return nn.functional.rms_norm(x, self.shape, weight, self.eps)
        return nn.functional.layer_norm(x, self.shape, weight, self.bias, self.eps)


class Attention(DotProductAttention):
    """Attention of the local layers, whose sliding window and mask both hide.

    Upstream fault: where a layer has a window, its mask is used instead of the one that is given,
        and document boundaries are lost without a word.
    Versions: Megatron-Core 0.16 to 0.19.
    Remove when: `FusedScaleMaskSoftmax` joins the two. Test: `test_a_window_replaces_the_mask`.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
    ) -> Tensor:
        """As upstream; `attention_mask` is bool `[b, 1, queries, keys]`, True where hidden."""
        window, self.scale_mask_softmax.window_size = self.scale_mask_softmax.window_size, None
        if window:
            outside = get_sliding_window_causal_mask(len(query), len(key), window)
            attention_mask = outside if attention_mask is None else outside | attention_mask
        try:
            return super().forward(query, key, value, attention_mask, **more)
        finally:
            self.scale_mask_softmax.window_size = window


class Gpt(GPTModel):
    """GPTModel; only how Transformer Engine's fused loss is called differs, not what it computes.

    Upstream fault: unless told that a CUDA graph may record it, the backward pass of the loss
        copies a number to the device (transformer_engine/pytorch/triton/cross_entropy.py), and in
        every micro-batch the host waits there until the forward pass is done. Megatron-Core tells
        it so for graphs of a whole iteration only.
    Versions: Megatron-Core 0.16 to 0.19, Transformer Engine from 2.7 on.
    Remove when: the loss is told so always, or no longer copies. Test: `test_loss`.
    """

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy of every token.

        Args:
            labels: int64 `[b, s]`.
            logits: `[s, b, vocabulary / tensor-parallel size]`; overwritten with their gradient
                where the loss is fused.

        Returns:
            float32 `[b, s]`.
        """
        config = self.config
        fused = config.cross_entropy_loss_fusion and config.cross_entropy_fusion_impl == "te"
        if not (fused and is_te_min_version("2.7.0")):
            return super().compute_language_model_loss(labels, logits)
        from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy

        columns = labels.transpose(0, 1).contiguous()
        # The kernel asks for this stride, also where a side is 1.
        columns = torch.as_strided(columns, columns.size(), (columns.size(1), 1))
        losses = te_parallel_cross_entropy(logits, columns, self.pg_collection.tp, True)
        return losses.transpose(0, 1).contiguous()


MUP_IS_UPSTREAM = "use_mup" in TransformerConfig.__dataclass_fields__


def tell_attention_factor(config: TransformerConfig, factor: float) -> None:
    """Let attention multiply rotated queries and keys by YaRN's 0.1 ln(`factor`) + 1.

    Upstream fault: Megatron-Core's attention reads that factor from a field of the configuration
        that TransformerConfig does not declare, so that no constructor takes it.
    Versions: Megatron-Core 0.16 to 0.19.
    Remove when: the field is declared. Test: `test_yarn_is_not_declared`.
    """
    config.yarn_rotary_scaling_factor = factor


def scale_embedding_and_logits(chunk: GPTModel, model: Model) -> None:
    """Multiply a chunk's embedding output and logits by muP's factors, unless Megatron-Core does.

    Upstream fault: Megatron-Core has no field for these factors.
    Versions: Megatron-Core 0.16 (`config.transformer_fields` hands them to later ones).
    Remove when: 0.16 is no longer supported. Test: `test_mup`.
    """
    if MUP_IS_UPSTREAM:
        return
    if chunk.pre_process and model.embedding_scale != 1.0:
        # Word and position embeddings together; dropout after it commutes.
        chunk.embedding.register_forward_hook(lambda *call: call[2] * model.embedding_scale)
    if chunk.post_process and model.logit_scale != 1.0:
        chunk.output_layer.register_forward_hook(
            lambda *call: (call[2][0] * model.logit_scale, call[2][1])
        )


# --------------------------------------------------------------------------------------- gradients


def accumulate_in_products(chunk: GPTModel) -> None:
    """Let Transformer Engine's layers add weight gradients to `main_grad` in the matrix product.

    Upstream fault: Megatron-Core's key turns this on for all layers or none, and its output layer
        refuses without Apex, though Transformer Engine's layers bring a kernel of their own.
    Versions: Megatron-Core 0.16 to 0.19.
    Remove when: `gradient_accumulation_fusion` works without Apex. Test: `test_fusion_needs_apex`.
    """
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def refuse_odd_sizes(chunks: Sequence[Any], names: dict[str, nn.Parameter]) -> None:
    """UserError where gathered mxfp8 weights would be read from another weight's place.

    Upstream fault: Megatron-Core reads gathered mxfp8 weights as if they lay close together in
        their buffer, but starts each at a multiple of 64 numbers.
    Versions: Megatron-Core 0.16.
    Remove when: 0.16 is no longer supported. Test: `test_places_in_a_bucket`.

    Args:
        chunks: wrapped in DistributedDataParallel.
        names: parameters by their names in the whole model.
    """
    by_id = {id(parameter): name for name, parameter in names.items()}
    buffers = [b for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    for bucket, places in ((k, b.param_index_map) for b in buffers for k in b.buckets):
        if any(
            places[parameter][0] - bucket.offset != start
            for parameter, (start, _) in bucket.param_to_index.items()
        ):
            odd = next(p for p in bucket.param_to_index if p.numel() % 64)
            raise UserError(
                "precision.fp8_params: with `fp8_recipe: mxfp8` every parameter needs a multiple "
                f"of 64 numbers on each rank, and {by_id[id(odd)]} has {odd.numel()}; set it to "
                "false, or change the model's sizes"
            )


def two_stages_interleaved(parallel: Parallel) -> bool:
    """Whether stages must not exchange in one batch (`batch_p2p_comm`). On the CPU they never do.

    Upstream fault: messages between two ranks are matched in their order. Where the stage before is
        also the one behind, a batch in both directions swaps them: gradients are silently wrong.
    Versions: Megatron-Core 0.16 to 0.19 (Megatron-LM's command line refuses such a layout).
    Remove when: `_batched_p2p_ops` orders them by direction. Test: `test_a_batch_of_two_stages`.
    """
    return parallel.pipeline == 2 and parallel.virtual_pipeline is not None


def slices_of_context_rank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Megatron-Core's `get_batch_on_this_cp_rank`: two slices of every sequence `[n, S]`.

    Upstream fault: an argument without a default was added, for ranks whose share of a sequence
        depends on its length, which is not used here.
    Versions: Megatron-Core 0.18 and 0.19.
    Remove when: `is_hybrid_cp` has a default. Test: `test_context_slices_want_an_argument`.
    """
    wants = "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters
    return get_batch_on_this_cp_rank(tensors, **({"is_hybrid_cp": False} if wants else {}))


# --------------------------------------------------------------------------- what is not training


def renew_second_copies(chunk: Any) -> None:
    """Renew the copies of FP8 weights that the backward pass reads, after a forced gather.

    Upstream fault: Megatron-Core renews them after a gather, but not after the one that
        `disable_forward_pre_hook` forces: the next step's gradients would be of older weights.
    Versions: Megatron-Core 0.16 and 0.17.
    Remove when: 0.17 is no longer supported. Test: `test_a_forced_gather`.

    Args:
        chunk: wrapped in DistributedDataParallel.
    """
    if in_fp8 := [parameter for parameter in chunk.parameters() if is_float8tensor(parameter)]:
        post_all_gather_processing(in_fp8)


@contextlib.contextmanager
def without_graphs(model_chunks: Sequence[Any]) -> Iterator[None]:
    """Inside, layers run as they are written, not as recorded CUDA graphs.

    Upstream fault: Megatron-Core replays the graphs recorded in training also for an evaluation,
        and ends the run where its shapes or precision differ.
    Versions: Megatron-Core 0.16 to 0.19.
    Remove when: an evaluation runs without them. Test: `test_graphs_are_replayed_in_evaluation`.
    """
    held = [
        (module, module._modules.pop("cudagraph_manager"))
        for chunk in model_chunks
        for module in chunk.modules()
        if "cudagraph_manager" in module._modules
    ]
    try:
        yield
    finally:
        for module, manager in held:
            module._modules["cudagraph_manager"] = manager


# ------------------------------------------------------------------------------------- checkpoints


def leave_fp8(state: dict[str, Any]) -> None:
    """Turn FP8 parameters in what is to be saved into 16-bit ones on the host, in place.

    Others continue, export and evaluate from them.

    Upstream fault: Megatron-Core turns them so when it loads, but not when it saves. Transformer
        Engine did on the way to the host; from 2.16 on it keeps its own type, which no safe load
        reads.
    Versions: Megatron-Core 0.16 to 0.19 with Transformer Engine from 2.16 on.
    Remove when: `dist_checkpointing.save` turns them too. Test: `test_save_keeps_fp8`.
    """
    for entry in nested_values(state):
        if hasattr(entry, "data") and is_float8tensor(entry.data):
            entry.data = dequantize_fp8_tensor(entry.data).cpu()


def without_foreign_extras(state: dict[str, Any], stored: Any) -> dict[str, Any]:
    """`state`, to be loaded, without the `_extra_state`s that the checkpoint does not have.

    A module without one starts as it does in a new run.

    Upstream fault: modules of Transformer Engine ask for an `_extra_state` (scales, maxima), norms
        and attention too; Megatron-Core's local ones leave none in a checkpoint.
    Versions: Megatron-Core 0.16 to 0.19.
    Remove when: both kinds of layers write the same. Test: `test_extra_states`.

    Args:
        stored: the checkpoint's index (`checkpoint_index.read_index`).
    """
    keys = {name.partition("/shard_")[0] for name in stored.state_dict_metadata}

    def foreign(entry: Any) -> bool:
        extra = isinstance(entry, ShardedObject) and entry.key.endswith("_extra_state")
        return extra and entry.key not in keys

    return extract_matching_values(state, foreign)[1]


def save_options() -> dict[str, str]:
    """Arguments with which Megatron-Core's `save` writes asynchronously itself.

    Upstream fault: by default it hands asynchronous saves to a package of its own (`nvrx`).
    Versions: Megatron-Core 0.17 to 0.19.
    Remove when: the default is "mcore". Test: `test_asynchronous_saves_go_elsewhere`.
    """
    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}


def sync_small_files(folder: Path) -> None:
    """Put a checkpoint's files onto the disk that Megatron-Core has not.

    Upstream fault: Megatron-Core syncs its shards, not the state that they have in common.
    Versions: Megatron-Core 0.16 to 0.19.
    Remove when: `common.pt` is synced. Test: `test_common_state_is_not_synced`.
    """
    for path in folder.iterdir():
        if path.suffix != ".distcp":
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def let_results_outlive_signals() -> None:
    """Give Megatron-Core's checkpoint writers a `ResultsQueue`.

    Upstream fault: their own queue's process ends at a signal to the whole job, and the save that
        the signal asked for fails. Slurm sends signals to every process of a step, a terminal to
        every process of a job.
    Versions: Megatron-Core 0.16 to 0.19.
    Remove when: that process ignores signals. Test: `test_a_signal_ends_the_queue`.
    """
    filesystem_async._results_queue = ResultsQueue()


class ResultsQueue:
    """A queue in an unnamed file: forked copies of this process put results in, it takes them out.

    One copy writes at a time. No process holds it, so no signal ends it.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # closed with this object
        self._taken = 0

    def put(self, item: Any) -> None:
        # By position: copies share the file's offset with this process.
        data, number = pickle.dumps(item), self._file.fileno()
        os.pwrite(number, len(data).to_bytes(8, "little") + data, os.fstat(number).st_size)

    def get_nowait(self) -> Any:
        """The oldest item.

        Raises:
            queue.Empty: there is none.
        """
        number = self._file.fileno()
        size = int.from_bytes(os.pread(number, 8, self._taken), "little")
        if not size:
            raise queue.Empty
        data = os.pread(number, size, self._taken + 8)
        self._taken += 8 + size
        return pickle.loads(data)
