"""Checkpoints: Megatron-Core's distributed format, written whole or not at all.

A checkpoint is a folder `checkpoints/step_00000020` with Megatron-Core's shards and a `megacode.json` that says what it is.
It is written under a hidden name (asynchronously, by a forked copy of each process that holds the tensors as they were),
made durable, and only then renamed and named by the file `latest`. So a folder with its final name is complete, and
`latest` always names one. What a killed run leaves half-written or half-removed keeps its hidden name; the next start clears
it away.

Tensors are stored by their place in the whole model ("fully reshardable"), so that any tensor x pipeline x data layout loads
them whose tensor-parallel size divides the padded sizes.
"""

from __future__ import annotations

import inspect
import json
import os
import pickle
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch.distributed.checkpoint.api import CheckpointException

from megacode.errors import UserError
from megacode.files import sync_folder, write_text
from megacode.megatron.checkpoint_index import read_index
from megacode.megatron.master_weights import make_remainders, make_whole
from megacode.megatron.optimizer import OTHER_GROUPS, load_optimizer_state, other_multipliers
from megacode.megatron.results_queue import ApartQueue
from megacode.recipe.load import load_recipe
from megacode.recipe.schema import Checkpoints
from megacode.recipe.schema_model import padded
from megacode.run.checkpoints import (
    INFO,
    LATEST,
    checkpoint_name,
    complete_checkpoints,
    find_checkpoint,
    latest_checkpoint,
    read_info,
    remove_unfinished,
)

__all__ = [
    "Checkpointer",
    "find_checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "read_info",
    "remove_unfinished",
]

# ------------------------------------------------------------------------------------------------ state of a run


def _metadata() -> dict[str, Any]:
    alone = parallel_state.get_data_parallel_world_size(with_context_parallel=True) == 1
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        # By gloo on the host, to one rank that then writes everything; else by NCCL, to all, through the device's memory. A rank
        # alone writes everything anyhow, and its gradients are one bucket: for 7B the device would need 53 GB more.
        "distrib_optim_fully_reshardable_mem_efficient": alone,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _sharded_state(
    model_chunks: Sequence[Any], optimizer: Any | None, loading: bool
) -> dict[str, Any]:
    metadata = _metadata()
    modules = [getattr(chunk, "module", chunk) for chunk in model_chunks]
    if len(modules) == 1:
        state = {"model": modules[0].sharded_state_dict(metadata=metadata)}
    else:
        state = {
            f"model{i}": module.sharded_state_dict(metadata=metadata)
            for i, module in enumerate(modules)
        }
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            dict(state), is_loading=loading, metadata=metadata
        )
        if not loading:
            make_whole(optimizer, state["optimizer"])
    if not loading:
        _leave_fp8(state)
    return state


def _leave_fp8(state: dict[str, Any]) -> None:
    """FP8 parameters as 16-bit ones, on the host: others continue, export and evaluate from them, and only Transformer Engine
    could read its own. Megatron-Core does so when it loads."""
    for entry in nested_values(state):
        if hasattr(entry, "data") and is_float8tensor(entry.data):
            entry.data = dequantize_fp8_tensor(entry.data).cpu()


def _load_strategy() -> Any:
    return FullyParallelLoadStrategyWrapper(
        TorchDistLoadShardedStrategy(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )


def _without_foreign_extras(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """`state` without what only layers of another kind would have left in the checkpoint.

    Modules of Transformer Engine ask for an `_extra_state` (scales, maxima), norms and attention too; Megatron-Core's local
    ones leave none there. A module without one starts as it does in a new run.
    """
    stored = TorchDistLoadShardedStrategy().load_sharded_metadata(str(checkpoint))
    keys = {entry.key for entry in stored.values()}

    def foreign(entry: Any) -> bool:
        return (
            isinstance(entry, ShardedObject)
            and entry.key.endswith("_extra_state")
            and entry.key not in keys
        )

    return extract_matching_values(state, foreign)[1]


def load_checkpoint(
    checkpoint: Path, model_chunks: Sequence[Any], optimizer: Any | None
) -> dict[str, Any]:
    """Load weights, and with an `optimizer` its state too, into this rank's model chunks, in whatever layout this run has.

    Returns:
        the checkpoint's info.

    Raises:
        UserError: shapes or names differ from this recipe's model, or its optimizer's groups do, or the folder is damaged.
    """
    info = read_info(checkpoint)
    read_index(checkpoint)  # before anything else opens it: it may hold code
    state = _sharded_state(model_chunks, optimizer, loading=True)
    try:
        state = _without_foreign_extras(state, checkpoint)
        loaded = dist_checkpointing.load(state, str(checkpoint), _load_strategy())
    except (Exception, CheckpointException) as error:  # torch derives the latter from BaseException
        raise UserError(
            _other_padding(checkpoint, info, model_chunks) or _why_not(checkpoint, error)
        ) from error
    modules = [getattr(chunk, "module", chunk) for chunk in model_chunks]
    for index, module in enumerate(modules):
        module.load_state_dict(
            loaded["model" if len(modules) == 1 else f"model{index}"], strict=False
        )
    if optimizer is not None:
        if why := other_multipliers(optimizer, loaded["optimizer"]):
            raise UserError(f"{checkpoint}: {why}")
        make_remainders(optimizer, loaded["optimizer"])
        load_optimizer_state(optimizer, loaded["optimizer"])
    return info


def _other_padding(
    checkpoint: Path, info: dict[str, Any], model_chunks: Sequence[Any]
) -> str | None:
    """What is wrong where the checkpoint's model is this one, but for the zeros that its tensor-parallel size took to split the
    feed-forward (3, 5, 6 ... do not divide the usual `pad_multiple`). Megatron-Core reshapes vocabularies only."""
    before = info.get("layout", {}).get("tensor")
    if before is None or not (checkpoint / "recipe.yaml").is_file():
        return None
    model, config = load_recipe(checkpoint / "recipe.yaml").model, model_chunks[0].config
    here = config.tensor_model_parallel_size
    stored, wanted = model.stored_ffn_size(before), config.ffn_hidden_size
    if wanted == stored or wanted != model.stored_ffn_size(here):
        return None
    text = (
        f"{checkpoint}: parallel.tensor was {before}, which stores model.ffn_size {model.resolved_ffn_size} as {stored}, and "
        f"{here} stores it as {wanted}; "
    )
    multiples = (*range(model.pad_multiple, stored + 1, model.pad_multiple), *range(1, stored + 1))
    fitting = (
        number for number in multiples if padded(model.resolved_ffn_size, number, here) == stored
    )
    if (multiple := next(fitting, None)) is None:
        return f"{text}{stored} cannot be split over {here} ranks: use a parallel.tensor that divides it"
    return f"{text}set `model.pad_multiple: {multiple}`, with which it is {stored} here too"


def _why_not(checkpoint: Path, error: BaseException) -> str:
    """One sentence: the files are damaged, or they are another model's."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    if (
        isinstance(error, OSError | EOFError | pickle.UnpicklingError)
        or "PytorchStreamReader" in message
    ):
        others = [
            path.name for _, path in complete_checkpoints(checkpoint.parent) if path != checkpoint
        ]
        remedy = "copy it here anew from where the run was"
        if others:
            remedy += f", or write the name of another ({', '.join(others[-3:])}) into {checkpoint.parent / LATEST}"
        return (
            f"{checkpoint}: a file in it is missing or damaged ({message.split('. ')[0]}); {remedy}"
        )
    if (
        "'param_groups'" in message
    ):  # without the distributed optimizer their number is compared while loading
        return f"{checkpoint}: {OTHER_GROUPS}"
    return (
        f"{checkpoint}: cannot be loaded into this recipe's model: {type(error).__name__}: {message[:300]}; the model section "
        "must be the one the checkpoint was made with (its recipe.yaml stands beside it)"
    )


# --------------------------------------------------------------------------------------------------- writing


@dataclass
class Checkpointer:
    """Writes a run's checkpoints and forgets the old ones.

    Attributes:
        folder: `RUN/checkpoints`.
        settings: cadence and what to keep.
        kept: steps that are kept for good (phase ends); `keep_every` adds to them.
        announce: called on rank 0 with (step, path) once a checkpoint is complete.
        may_write: called on rank 0 before one gets its name; raises if it must not.
        is_own: whether a checkpoint is of this run's history; others are never removed.
    """

    folder: Path
    settings: Checkpoints
    kept: frozenset[int] = frozenset()
    announce: Callable[[int, Path], None] = lambda step, path: None
    may_write: Callable[[], None] = lambda: None
    is_own: Callable[[Path], bool] = lambda path: True
    _queue: AsyncCallsQueue = field(default_factory=AsyncCallsQueue)

    def save(
        self,
        step: int,
        model_chunks: Sequence[Any],
        optimizer: Any,
        info: dict[str, Any],
        recipe_text: str,
    ) -> None:
        """Start writing the state after `step` finished steps. Collective; returns before it is on disk when asynchronous."""
        self.wait()
        final = self.folder / checkpoint_name(step)
        main = torch.distributed.get_rank() == 0
        # A name of its own: a writer that outlived its killed run must not write among this one's files.
        temporary = self.folder / f".{final.name}.{_agreed(secrets.token_hex(4))}.tmp"
        if main:
            temporary.mkdir(parents=True)
        torch.distributed.barrier()
        strategy = FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy("torch_dist", 1),
            parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        state = _sharded_state(model_chunks, optimizer, loading=False)
        _results_outlive_signals()
        request = dist_checkpointing.save(
            state,
            str(temporary),
            strategy,
            async_sharded_save=True,
            content_metadata=_content_metadata(),
            **_own_writers(),
        )

        def finish() -> None:
            if main:
                _sync_small_files(temporary)
                write_text(temporary / "recipe.yaml", recipe_text)
                write_text(temporary / INFO, json.dumps({"step": step, **info}, indent=1))
                self.may_write()
                if final.exists():
                    _remove(final)
                os.replace(temporary, final)
                sync_folder(self.folder)
                write_text(self.folder / LATEST, final.name + "\n")
                self._forget_old(step)
                self.announce(step, final)
            torch.distributed.barrier()

        request.finalize_fns.append(finish)
        if self.settings.asynchronous:
            self._queue.schedule_async_request(request)
        else:
            request.execute_sync()

    def poll(self) -> None:
        """Complete a checkpoint whose files are written. Collective; cheap when none is under way."""
        if self._queue.get_num_unfinalized_calls():
            self._queue.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Complete every checkpoint under way. Collective."""
        if self._queue.get_num_unfinalized_calls():
            self._queue.maybe_finalize_async_calls(blocking=True)

    def _forget_old(self, newest: int) -> None:
        every = self.settings.keep_every

        def for_good(step: int) -> bool:
            return step in self.kept or bool(every and step % every == 0)

        passing = [
            (s, path)
            for s, path in complete_checkpoints(self.folder)
            if s <= newest and not for_good(s)
        ]
        for _, path in passing[: -self.settings.keep_last]:
            if self.is_own(path):
                _remove(path)


def _remove(checkpoint: Path) -> None:
    """Under a hidden name first: a folder with its final name is complete."""
    gone = checkpoint.with_name(f".{checkpoint.name}.{secrets.token_hex(4)}.old")
    os.replace(checkpoint, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _sync_small_files(folder: Path) -> None:
    """Onto the disk, what Megatron-Core does not sync itself (it does its shards, not the state they have in common)."""
    for path in folder.iterdir():
        if path.suffix != ".distcp":
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _own_writers() -> dict[str, str]:
    """From 0.17 on Megatron-Core would hand asynchronous saves to another package unless told to do them itself."""
    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}


def _results_outlive_signals() -> None:
    """Give Megatron-Core's writers a queue for their results that outlives a signal to the whole job: the one it would make
    itself ends with it, and the save that the signal asked for fails."""
    if getattr(filesystem_async, "_results_queue", "unknown") is None:
        filesystem_async._results_queue = ApartQueue()


def _agreed(text: str) -> str:
    """Rank 0's text on every rank. Collective."""
    texts = [text]
    torch.distributed.broadcast_object_list(texts, src=0)
    return texts[0]


def _content_metadata() -> dict[str, Any]:
    return {key: value for key, value in _metadata().items() if key != "dp_cp_group"}
