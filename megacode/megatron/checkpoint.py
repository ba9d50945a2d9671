"""Checkpoints: Megatron-Core's distributed format, written whole or not at all.

A checkpoint is a folder `checkpoints/step_00000020` with Megatron-Core's shards and a
`megacode.json` that says what it is. It is written under a hidden name (asynchronously, by a forked
copy of each process that holds the tensors as they were), made durable, and only then renamed and
named by the file `latest`. So a folder with its final name is complete, and `latest` always names
one. What a killed run leaves half-written or half-removed keeps its hidden name; the next start
clears it away.

Tensors are stored by their place in the whole model ("fully reshardable"), so that any tensor x
pipeline x data layout loads them whose tensor-parallel size divides the padded sizes.
"""

from __future__ import annotations

import json
import math
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
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from torch.distributed.checkpoint.api import CheckpointException

from megacode.errors import UserError
from megacode.files import sync_folder, write_text
from megacode.megatron.checkpoint_index import read_index
from megacode.megatron.optimizer_state import (
    OTHER_GROUPS,
    load_optimizer_state,
    other_multipliers,
    remainders_to_masters,
)
from megacode.megatron.weight_ema import WeightEma
from megacode.megatron.workarounds import (
    leave_fp8,
    let_results_outlive_signals,
    save_options,
    sync_small_files,
    without_foreign_extras,
)
from megacode.recipe.load import load_recipe
from megacode.recipe.schema import Checkpoints
from megacode.run.checkpoints import INFO, LATEST, checkpoint_name, complete_checkpoints, read_info

# ---------------------------------------------------------------------------------- state of a run


def _data_parallel_group() -> Any:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _format() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        # Whether gradients go by gloo over the host, to one rank that then writes everything, or by
        # NCCL through the devices' memory, to all. A rank alone writes everything anyhow, and its
        # gradients are one bucket: for 7B the device would need 53 GB more.
        "distrib_optim_fully_reshardable_mem_efficient": _data_parallel_group().size() == 1,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }


def _modules(model_chunks: Sequence[Any]) -> dict[str, Any]:
    """The chunks' modules by their names in the state: `model`, or `model0`, `model1`, ..."""
    return {
        f"model{i}" if len(model_chunks) > 1 else "model": getattr(chunk, "module", chunk)
        for i, chunk in enumerate(model_chunks)
    }


def _sharded_state(
    model_chunks: Sequence[Any],
    optimizer: Any | None,
    loading: bool,
    ema: WeightEma | None = None,
) -> dict[str, Any]:
    metadata = {**_format(), "dp_cp_group": _data_parallel_group()}
    state = {
        name: module.sharded_state_dict(metadata=metadata)
        for name, module in _modules(model_chunks).items()
    }
    averages = ema.sharded_state(state, loading) if ema else None
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            dict(state), is_loading=loading, metadata=metadata
        )
    if averages is not None:
        state["ema"] = averages
    if not loading:
        if optimizer is not None:
            remainders_to_masters(optimizer, state["optimizer"])
        leave_fp8(state)
    return state


# ----------------------------------------------------------------------------------------- loading


def load_checkpoint(
    checkpoint: Path,
    model_chunks: Sequence[Any],
    optimizer: Any | None,
    ema: WeightEma | None = None,
) -> dict[str, Any]:
    """Load weights, and with an `optimizer` its state too, into this rank's model chunks.

    An `ema` begins with the loaded weights where the checkpoint has none.

    Returns:
        the checkpoint's info.

    Raises:
        UserError: shapes or names differ from this recipe's model, or its optimizer's groups do, or
            the folder is damaged.
    """
    info = read_info(checkpoint)
    stored = read_index(checkpoint)  # before anything else opens it: it may hold code
    stored_ema = ema if info.get("ema") else None
    state = _sharded_state(model_chunks, optimizer, loading=True, ema=stored_ema)
    strategy = FullyParallelLoadStrategyWrapper(
        TorchDistLoadShardedStrategy(), _data_parallel_group()
    )
    try:
        loaded = dist_checkpointing.load(
            without_foreign_extras(state, stored), str(checkpoint), strategy
        )
    except (Exception, CheckpointException) as error:
        # Upstream fault: torch derives CheckpointException from BaseException, not Exception.
        # Versions: torch 2.6 to 2.13.
        # Remove when: it is an Exception. Test: `test_checkpoint_exception`.
        other_padding = _other_padding(checkpoint, info, model_chunks)
        raise UserError(other_padding or _why_not(checkpoint, error)) from error
    for name, module in _modules(model_chunks).items():
        module.load_state_dict(loaded[name], strict=False)
    if optimizer is not None:
        if why := other_multipliers(optimizer, loaded["optimizer"]):
            raise UserError(f"{checkpoint}: {why}")
        load_optimizer_state(optimizer, loaded["optimizer"])
    if stored_ema:
        stored_ema.load(loaded["ema"])
    elif ema:
        ema.restart()
    return info


def _other_padding(
    checkpoint: Path, info: dict[str, Any], model_chunks: Sequence[Any]
) -> str | None:
    """What is wrong where the checkpoint's model is this one, but for the feed-forward's padding.

    Tensor-parallel sizes such as 3, 5 and 6 do not divide the usual `pad_multiple`, and take more
    zeros to split it. Megatron-Core reshapes vocabularies only.
    """
    before = info.get("layout", {}).get("tensor")
    if before is None or not (checkpoint / "recipe.yaml").is_file():
        return None
    model, config = load_recipe(checkpoint / "recipe.yaml").model, model_chunks[0].config
    here = config.tensor_model_parallel_size
    stored, wanted = model.stored_ffn_size(before), config.ffn_hidden_size
    if wanted == stored or wanted != model.stored_ffn_size(here):
        return None
    if stored % here:
        remedy = (
            f"{stored} cannot be split over {here} ranks: use a parallel.tensor that divides it"
        )
    else:
        multiple = math.lcm(model.pad_multiple, before)
        remedy = f"set `model.pad_multiple: {multiple}`, with which it is {stored} here too"
    return (
        f"{checkpoint}: parallel.tensor was {before}, which stores model.ffn_size "
        f"{model.resolved_ffn_size} as {stored}, and {here} stores it as {wanted}; {remedy}"
    )


def _why_not(checkpoint: Path, error: BaseException) -> str:
    """One sentence: the files are damaged, or they are another model's."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    damaged = isinstance(error, OSError | EOFError | pickle.UnpicklingError)
    if damaged or "PytorchStreamReader" in message:
        folder, remedy = checkpoint.parent, "copy it here anew from where the run was"
        others = [path.name for _, path in complete_checkpoints(folder) if path != checkpoint]
        if others:
            names = ", ".join(others[-3:])
            remedy += f", or write the name of another ({names}) into {folder / LATEST}"
        what = message.split(". ")[0]
        return f"{checkpoint}: a file in it is missing or damaged ({what}); {remedy}"
    if "'param_groups'" in message:
        # Without the distributed optimizer their number is compared while loading.
        return f"{checkpoint}: {OTHER_GROUPS}"
    return (
        f"{checkpoint}: cannot be loaded into this recipe's model: {type(error).__name__}: "
        f"{message[:300]}; the model section must be the one the checkpoint was made with (its "
        "recipe.yaml stands beside it)"
    )


# ----------------------------------------------------------------------------------------- writing


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
        ema: WeightEma | None = None,
    ) -> None:
        """Start writing the state after `step` finished steps. Collective.

        Returns before it is on disk when asynchronous.
        """
        self.wait()
        final = self.folder / checkpoint_name(step)
        main = torch.distributed.get_rank() == 0
        # A name of its own, rank 0's: a writer that outlived its killed run must not write among
        # this one's files.
        names = [f".{final.name}.{secrets.token_hex(4)}.tmp"]
        torch.distributed.broadcast_object_list(names, src=0)
        temporary = self.folder / names[0]
        if main:
            temporary.mkdir(parents=True)
        torch.distributed.barrier()
        let_results_outlive_signals()
        request = dist_checkpointing.save(
            _sharded_state(model_chunks, optimizer, loading=False, ema=ema),
            str(temporary),
            FullyParallelSaveStrategyWrapper(
                TorchDistSaveShardedStrategy("torch_dist", 1), _data_parallel_group()
            ),
            async_sharded_save=True,
            content_metadata=_format(),
            **save_options(),
        )

        def finish() -> None:
            if main:
                sync_small_files(temporary)
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
        """Complete a checkpoint whose files are written. Collective; cheap when there is none."""
        self._queue.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Complete every checkpoint under way. Collective."""
        self._queue.maybe_finalize_async_calls(blocking=True)

    def _forget_old(self, newest: int) -> None:
        every = self.settings.keep_every
        passing = [
            path
            for step, path in complete_checkpoints(self.folder)
            if step <= newest and step not in self.kept and not (every and step % every == 0)
        ]
        for path in passing[: -self.settings.keep_last]:
            if self.is_own(path):
                _remove(path)


def _remove(checkpoint: Path) -> None:
    """Under a hidden name first: a folder with its final name is complete."""
    gone = checkpoint.with_name(f".{checkpoint.name}.{secrets.token_hex(4)}.old")
    os.replace(checkpoint, gone)
    shutil.rmtree(gone, ignore_errors=True)
