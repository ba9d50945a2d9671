"""Every fault that megacode works around is there still: a test here shows one without its workaround.

It fails once the installed version has mended its fault; the workaround's docstring says when it can go. Where a fault needs a
device, stand-ins take the device's place.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load, save
from torch.distributed.checkpoint.api import CheckpointException

from megacode.errors import UserError
from megacode.recipe.schema import Checkpoints, Overlap, Parallel, Recipe
from tests.megatron.test_adams import losses as losses_of_three_adams
from tests.megatron.test_engine_layers import loaded_into_engine_modules
from tests.megatron.test_step import VOCAB, small
from tests.processes import run_on

ROOT = Path(__file__).parents[2]
FORM = re.compile(
    r"Upstream fault: .+?Versions: (.+?)Remove when: .+?Test:\s+`(test_\w+)`", re.DOTALL
)


def test_every_fault_has_its_versions_its_end_and_a_test() -> None:
    named, tests = set(), {name for name in globals() if name.startswith("test_")}
    for path in (ROOT / "megacode").rglob("*.py"):
        parts = path.read_text().split("Upstream fault:")[1:]
        for part in parts:
            found = FORM.search("Upstream fault:" + part[:900])
            assert found, f"{path.name}: not in the form: {part[:60]}"
            assert re.search(r"(Megatron-Core|Transformer Engine|torch) (from )?\d", found[1]), part
            named.add(found[2])
    assert named == tests - {"test_every_fault_has_its_versions_its_end_and_a_test"}


def of_a_rank(function: Callable[..., Any], *arguments: Any, ranks: int = 1) -> Any:
    """What `function` gives in a process of its own (with several ranks: on each)."""
    found = run_on(ranks, function, *arguments)
    return found[0] if ranks == 1 else found


def optimizer_of(recipe: Recipe, ranks: int = 1) -> tuple[Any, Any]:
    from megacode.megatron.config import megatron_config
    from megacode.megatron.hardware import detect
    from megacode.megatron.model import build_model
    from megacode.megatron.optimizer import build_optimizer, wrap_data_parallel

    decided = megatron_config(recipe, detect(), ranks)
    chunks = wrap_data_parallel(decided, build_model(recipe, VOCAB, decided))
    return chunks, build_optimizer(recipe, chunks)


# ------------------------------------------------------------------------------------------------ layers


TAKEN = """
import sys
from types import ModuleType
from megacode.megatron import cpu
sys.modules["apex"], sys.modules["apex.optimizers"] = ModuleType("apex"), ModuleType("apex.optimizers")
sys.modules["apex.optimizers"].FusedAdam = sys.modules["apex.optimizers"].FusedSGD = type("FusedAdam", (), {})
cpu.prepare()
from megatron.core import optimizer
print(optimizer.Adam.__name__)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a device")
def test_kernels_without_a_device() -> None:
    done = subprocess.run([sys.executable, "-c", TAKEN], capture_output=True, text=True, check=True)
    assert done.stdout == "FusedAdam\n"


def norm(world: object) -> str:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, tensor_model_parallel_size=2, sequence_parallel=True
    )  # fmt: skip
    with pytest.raises(AssertionError) as refusal:
        WrappedTorchNorm(config, 8)
    return str(refusal.value)


def test_norm() -> None:
    assert "sequence parallel not supported" in of_a_rank(norm)


def hidden_twice(world: object) -> list[torch.Tensor]:
    """Attention of a layer with a window: without a mask, and with one that hides the first token."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, window_size=(2, 0), masked_softmax_fusion=False
    )  # fmt: skip
    attention = DotProductAttention(config, 1, AttnMaskType.causal, "self").eval()
    made = torch.randn(3, 4, 1, 2, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    mask[1:, 0] = True
    return [attention(*made, one) for one in (None, mask[None, None])]


def test_a_window_replaces_the_mask() -> None:
    without, with_mask = of_a_rank(hidden_twice)
    assert torch.equal(without, with_mask), "the mask counts: `workarounds.Attention` can go"


def test_yarn_is_not_declared() -> None:
    assert of_a_rank(declared_for_yarn) == []


def declared_for_yarn(world: object) -> list[str]:
    from megatron.core.transformer import TransformerConfig

    return [name for name in TransformerConfig.__dataclass_fields__ if name.startswith("yarn_")]


def told_of_packed_documents(world: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What Megatron-Core hands the kernel for packed documents, of yarn's factor and of interleaved pairs."""
    from megatron.core.models.common.embeddings import rope_utils

    told: list[Any] = []
    config = SimpleNamespace(
        apply_rope_fusion=True, rotary_interleaved=True, multi_latent_attention=False, mrope_section=None
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            rope_utils, "fused_apply_rotary_pos_emb_thd", lambda *a, **k: told.append((a, k))
        )
        group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
        rope_utils.apply_rotary_pos_emb("queries", "freqs", config, "edges", 1.3, cp_group=group)
    return told[0]


def test_packed_rotary_kernel_is_told_less() -> None:
    positional, named = of_a_rank(told_of_packed_documents)
    assert positional == ("queries", "edges", "freqs")
    assert named == {"cp_size": 1, "cp_rank": 0}


def told_capturable(world: object) -> list[bool]:
    from megatron.core import tensor_parallel
    from megatron.core.models.common.language_module import language_module

    told = []

    def stand_in(logits: Any, labels: Any, group: Any, is_cg_capturable: bool = False) -> Any:
        told.append(is_cg_capturable)
        return tensor_parallel.vocab_parallel_cross_entropy(logits, labels)

    config = SimpleNamespace(
        cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="te", cuda_graph_impl="none", cuda_graph_scope=[]
    )  # fmt: skip
    model = SimpleNamespace(config=config, pg_collection=SimpleNamespace(tp=None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_module, "te_parallel_cross_entropy", stand_in)
        patch.setattr(language_module, "is_te_min_version", lambda version: True)
        language_module.LanguageModule.compute_language_model_loss(
            model,  # type: ignore[arg-type]
            torch.zeros(3, 4, dtype=torch.int64),
            torch.zeros(4, 3, VOCAB),
        )
    return told


def test_loss() -> None:
    assert of_a_rank(told_capturable) == [False]


def mup_fields(world: object) -> list[str]:
    from megatron.core.transformer import TransformerConfig

    names = [field.name for field in dataclasses.fields(TransformerConfig)]
    return [name for name in names if name.startswith(("use_mup", "mup_"))]


def test_mup() -> None:
    assert of_a_rank(mup_fields) == []


def members(world: object) -> Any:
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, attention_backend="flash"
    )
    return config.attention_backend


def test_names_of_members() -> None:
    assert of_a_rank(members) == "flash"


# --------------------------------------------------------------------------------------------- gradients


def fused_without_apex(world: object) -> str:
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, gradient_accumulation_fusion=True
    )
    with pytest.raises(RuntimeError) as refusal:
        ColumnParallelLinear(8, 8, config=config, init_method=torch.nn.init.zeros_)
    return str(refusal.value)


@pytest.mark.skipif(
    importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None, reason="Apex is here"
)
def test_fusion_needs_apex() -> None:
    assert "fused_weight_gradient_mlp_cuda" in of_a_rank(fused_without_apex)


def misplaced(world: object) -> int:
    chunks, _ = optimizer_of(small())
    return sum(
        buffer.param_index_map[parameter][0] - bucket.offset != start
        for buffer in chunks[0].buffers
        for bucket in buffer.buckets
        for parameter, (start, _) in bucket.param_to_index.items()
    )


def test_places_in_a_bucket() -> None:
    assert of_a_rank(misplaced) > 0


def exchanged(world: Any) -> tuple[float, float]:
    """Of two stages, each sends 10 + its rank to the one before and 20 + its rank to the one behind."""
    from megatron.core.pipeline_parallel.p2p_communication import _batched_p2p_ops

    sent = [torch.full((1,), float(number + world.rank)) for number in (10, 20)]
    received = [torch.zeros(1), torch.zeros(1)]
    other = 1 - world.rank
    requests = _batched_p2p_ops(
        tensor_send_prev=sent[0], tensor_recv_prev=received[0], tensor_send_next=sent[1], tensor_recv_next=received[1],
        group=torch.distributed.group.WORLD, prev_pipeline_rank=other, next_pipeline_rank=other,
    )  # fmt: skip
    for request in requests:
        request.wait()
    return float(received[0]), float(received[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on gloo")
def test_a_batch_of_two_stages() -> None:
    """From the one before comes what it sent behind it, 20 or 21; here what it sent before it."""
    assert of_a_rank(exchanged, ranks=2) == [(11.0, 21.0), (10.0, 20.0)]


def argument_without_default(world: object) -> bool | None:
    from megatron.core.utils import get_batch_on_this_cp_rank

    known = inspect.signature(get_batch_on_this_cp_rank).parameters.get("is_hybrid_cp")
    return None if known is None else known.default is inspect.Parameter.empty


def test_context_slices_want_an_argument() -> None:
    if (wanted := of_a_rank(argument_without_default)) is None:
        pytest.skip("Megatron-Core has this argument from 0.18 on")
    assert wanted


# ---------------------------------------------------------------------------------- what is not training


def renewed(world: object) -> list[int]:
    """FP8 weights that are made ready for the backward pass by a forced gather."""
    from megatron.core.distributed import distributed_data_parallel, param_and_grad_buffer

    from megacode.megatron.config import megatron_config
    from megacode.megatron.model import build_model
    from megacode.megatron.optimizer import wrap_data_parallel

    decided = megatron_config(small())
    decided.data_parallel.overlap_grad_reduce = decided.data_parallel.overlap_param_gather = True
    (chunk,) = wrap_data_parallel(decided, build_model(small(), VOCAB, decided))
    found: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (distributed_data_parallel, param_and_grad_buffer):
            patch.setattr(module, "is_float8tensor", lambda weight: True, raising=False)
            patch.setattr(
                module, "post_all_gather_processing", lambda weights: found.append(len(weights)), raising=False
            )  # fmt: skip
        chunk.start_param_sync()
        chunk.disable_forward_pre_hook(param_sync=True)
    return found


def test_a_forced_gather() -> None:
    assert of_a_rank(renewed) == []


def replayed(world: object) -> list[str]:
    """By a layer in evaluation mode, with tokens of another shape than the graph has."""
    from megatron.core.transformer import cuda_graphs

    calls = []
    runner = SimpleNamespace(replay_graph_capture=lambda *_: calls.append("replayed"), status=None)
    manager = SimpleNamespace(
        training=False, reuse_cudagraphs=False, is_first_microbatch=False, func=None,
        get_cudagraph_runner=lambda *_: runner,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(cuda_graphs._CudagraphGlobalRecord, "cudagraph_created", True)
        layer = torch.nn.Linear(2, 2).eval()
        cuda_graphs.CudaGraphManager.__call__(manager, layer, (torch.ones(3, 2),), {})  # type: ignore[arg-type]
    return calls


def test_graphs_are_replayed_in_evaluation() -> None:
    assert of_a_rank(replayed) == ["replayed"]


# ------------------------------------------------------------------------------------- optimizer's state


def before_the_first_step(world: object) -> None:
    from megacode.megatron import optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "allocate_state", lambda optimizer: None)
        _, built = optimizer_of(small())
    with pytest.raises((AssertionError, KeyError)):
        built.state_dict()


def test_state_before_the_first_step() -> None:
    of_a_rank(before_the_first_step)


def loaded_as_it_is(world: object, folder: str) -> str:
    """A checkpoint, handed to Megatron-Core as it was read."""
    from megacode.megatron import checkpoint

    chunks, optimizer = optimizer_of(small())
    checkpoint.Checkpointer(Path(folder), Checkpoints(asynchronous=False)).save(
        0, chunks, optimizer, {}, ""
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            checkpoint, "load_optimizer_state", lambda optimizer, state: optimizer.load_state_dict(state)
        )  # fmt: skip
        with pytest.raises(KeyError) as missing:
            checkpoint.load_checkpoint(Path(folder, "step_00000000"), chunks, optimizer)
    return str(missing.value)


def test_step_among_the_tensors(tmp_path: Path) -> None:
    assert of_a_rank(loaded_as_it_is, str(tmp_path)) == "'step'"


def not_adapted(world: object, folder: str) -> None:
    from megacode.megatron import optimizer_state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer_state, "_as_kept_by", lambda adam, state: None)
        with pytest.raises((KeyError, AssertionError)):
            losses_of_three_adams(world, folder, True, "bf16")


def test_another_adam(tmp_path: Path) -> None:
    of_a_rank(not_adapted, str(tmp_path))


def gathered(world: object) -> tuple[int, int]:
    """How many masters Megatron-Core gathers from padded buckets, and up to where it cuts parameters out of them."""
    parallel = Parallel(overlap=Overlap(grad_reduce=True), ddp={"bucket_size": 3000})
    _, optimizer = optimizer_of(small().model_copy(update={"parallel": parallel}), ranks=2)
    part = optimizer.chained_optimizers[0]
    state = type(part).get_parameter_state_dp_zero(part, return_on_all_ranks=True)
    (tensors,) = state[0].values()
    return len(tensors["param"]), max(end for _, end, _ in part.buffers[0].param_index_map.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on gloo")
def test_padding_between_buckets() -> None:
    there, needed = of_a_rank(gathered, ranks=2)[0]
    assert there < needed


def saved_masters(world: object) -> torch.dtype:
    """Of what Megatron-Core calls a weight's `param`, where Adam keeps the remainder only."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    weight, remainder = torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.int16)
    adam = SimpleNamespace(
        param_groups=[{"params": [weight]}], state={weight: {"master_param": remainder}},
        get_unscaled_state=lambda parameter, key: remainder,
    )  # fmt: skip
    optimizer = SimpleNamespace(
        config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=True, store_param_remainders=True),
        model_param_group_index_map={weight: (0, 0)}, optimizer=adam,
    )  # fmt: skip
    found = DistributedOptimizer._get_main_param_and_optimizer_states(optimizer, weight)  # type: ignore[arg-type]
    return found["param"].dtype


def test_remainders_are_saved_as_masters() -> None:
    assert of_a_rank(saved_masters) == torch.int16


# ------------------------------------------------------------------------------------------- checkpoints


def saving(world: object, folder: str) -> tuple[list[str], int]:
    """Files that Megatron-Core syncs in a save, and how often it turns FP8 tensors in one."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import serialization

    synced, turned = [], []
    sync = os.fsync

    def recorded(number: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        sync(number)

    state = {
        "w": dist_checkpointing.ShardedTensor.from_rank_offsets("w", torch.ones(2)), "common": 1
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", recorded)
        patch.setattr(serialization, "force_all_tensors_to_non_fp8", turned.append)
        dist_checkpointing.save(state, folder)
    assert {"common.pt", "metadata.json"} <= set(os.listdir(folder))
    return synced, len(turned)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="files are told by Linux's /proc")
def test_common_state_is_not_synced(tmp_path: Path) -> None:
    synced, _ = of_a_rank(saving, str(tmp_path))
    assert "common.pt" not in synced


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="files are told by Linux's /proc")
def test_save_keeps_fp8(tmp_path: Path) -> None:
    _, turned = of_a_rank(saving, str(tmp_path))
    assert turned == 0


def asked_for_states(world: Any, folder: str) -> str:
    from megacode.megatron import checkpoint

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "without_foreign_extras", lambda state, stored: state)
        with pytest.raises(UserError) as refusal:
            loaded_into_engine_modules(world, folder)
    return str(refusal.value)


def test_extra_states(tmp_path: Path) -> None:
    assert "_extra_state" in of_a_rank(asked_for_states, str(tmp_path))


def writer_by_default(world: object) -> Any:
    from megatron.core import dist_checkpointing

    known = inspect.signature(dist_checkpointing.save).parameters.get("async_strategy")
    return None if known is None else known.default


def test_asynchronous_saves_go_elsewhere() -> None:
    if (default := of_a_rank(writer_by_default)) is None:
        pytest.skip("Megatron-Core has this argument from 0.17 on")
    assert default != "mcore"


def queue_after_a_signal(world: object) -> bool:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    names = ("get_write_results_queue", "_get_write_results_queue")
    get = next(getattr(filesystem_async, n) for n in names if hasattr(filesystem_async, n))
    results = get()  # kept: the process ends with it
    (process,) = multiprocessing.active_children()
    os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    return process.is_alive() and results is not None


def test_a_signal_ends_the_queue() -> None:
    assert not of_a_rank(queue_after_a_signal)


class Planted:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_runs_code_in_a_checkpoint(tmp_path: Path) -> None:
    save({"entry": Planted(tmp_path / "by an entry")}, checkpoint_id=tmp_path / "one", no_dist=True)
    load({"entry": None}, checkpoint_id=tmp_path / "one", no_dist=True)
    assert (tmp_path / "by an entry").is_dir()
    (tmp_path / "one/.metadata").write_bytes(pickle.dumps(Planted(tmp_path / "by the index")))
    with pytest.raises(AttributeError):  # what it made is no index
        FileSystemReader(tmp_path / "one").read_metadata()
    assert (tmp_path / "by the index").is_dir()


def test_checkpoint_exception() -> None:
    assert not issubclass(CheckpointException, Exception)
