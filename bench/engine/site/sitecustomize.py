"""On PYTHONPATH, this makes a machine without a GPU look like one with two H200 and Transformer Engine.

`torch.cuda` answers as there, tensors "on CUDA" lie in memory (`megacode.megatron.cpu`), NCCL is gloo, and Transformer Engine is
its own Python over the kernels of `engine_kernels`. A process with an empty CUDA_VISIBLE_DEVICES has no GPU, as it would there.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.util import spec_from_loader
from types import ModuleType, SimpleNamespace
from typing import Any

Change = Callable[[ModuleType], None]

os.environ["NVTE_PROJECT_BUILDING"] = "1"  # Transformer Engine then loads no CUDA libraries


class _Imports:
    """Changes a module right after its import, before others take names from it; or puts another in its place."""

    def __init__(self, changed: dict[str, Change], replaced: dict[str, Change]) -> None:
        self.changed, self.replaced = changed, replaced

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name in self.replaced:
            return spec_from_loader(name, _Instead(self.replaced[name]))
        spec = PathFinder.find_spec(name, path) if name in self.changed else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_change(module: ModuleType) -> None:
            run(module)
            self.changed[name](module)

        spec.loader.exec_module = run_and_change  # type: ignore[method-assign]
        return spec


class _Instead:
    """Loads a module with what `fill` puts into it; any other name is None."""

    def __init__(self, fill: Change) -> None:
        self.fill = fill

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = lambda name: None  # type: ignore[method-assign]
        self.fill(module)


def _change_common(module: ModuleType) -> None:
    module.load_framework_extension = lambda framework: (
        None
    )  # `transformer_engine_torch` lies beside this file


def _change_utils(module: ModuleType) -> None:
    import torch

    module.canonicalize_device = lambda device: torch.device("cpu")


def _fill_cross_entropy(module: ModuleType) -> None:
    """The Triton kernels of the loss: it, and in the logits' place its gradient for a gradient of 1."""
    import torch
    from torch import Tensor, distributed

    def forward(
        logits: Tensor, target: Tensor, smoothing: float, reduced: bool, group: Any, ignored: int
    ) -> Any:
        assert not smoothing and not reduced
        size, rank = (1, 0) if group is None else (group.size(), group.rank())
        share = logits.shape[-1]
        x = logits.detach().float()
        top = x.amax(-1)
        if size > 1:
            distributed.all_reduce(top, op=distributed.ReduceOp.MAX, group=group)
        weights = torch.exp(x - top[..., None])
        own = target - rank * share
        here = (own >= 0) & (own < share)
        own = own.clamp(0, share - 1)[..., None]
        total, chosen = weights.sum(-1), torch.where(here, x.gather(-1, own)[..., 0], 0.0)
        if size > 1:
            distributed.all_reduce(total, group=group)
            distributed.all_reduce(chosen, group=group)
        gradient = (weights / total[..., None]).scatter_add_(-1, own, -here.float()[..., None])
        counts = target != ignored
        logits.detach().copy_(gradient * counts[..., None])
        return (torch.log(total) + top - chosen) * counts, logits

    def backward(logits: Tensor, gradient: Tensor, is_cg_capturable: bool = False) -> Tensor:
        assert is_cg_capturable, "the host would wait here"
        logits.detach().mul_(gradient[..., None])
        return logits

    module.cross_entropy_forward, module.cross_entropy_backward = forward, backward


def _change_context_parallel(module: ModuleType) -> None:
    import torch
    from torch import Tensor, distributed

    def exchange(
        rank: int, sent: Tensor, to: int, received: Tensor, source: int, group: Any, batched: bool
    ) -> list[Any]:
        """By everyone to everyone: gloo mixes up messages that cross."""
        parts = [torch.empty_like(sent) for _ in range(group.size())]
        distributed.all_gather(parts, sent.contiguous(), group=group)
        received.copy_(parts[distributed.get_group_rank(group, source)])
        return []

    module.flash_attn_p2p_communicate = exchange


def _look_like_cuda() -> None:
    import torch

    from megacode.megatron import cpu

    cpu.install()
    for package in ("transformer_engine", "apex"):
        if sys.modules.get(package, "") is None:
            del sys.modules[package]
    hidden = cpu._names_cuda
    cpu._names_cuda = lambda value: type(value) is int or hidden(value)
    cuda: Any = torch.cuda
    device = SimpleNamespace(
        major=9,
        minor=0,
        total_memory=139 * 2**30,
        name="NVIDIA H200",
        multi_processor_count=132,
        gcnArchName="",
    )
    answers = {
        "is_available": True, "is_initialized": True, "is_bf16_supported": True, "device_count": 2, "current_device": 0,
        "get_device_properties": device, "get_device_capability": (9, 0), "get_device_name": device.name,
        "mem_get_info": (130 * 2**30, device.total_memory), "max_memory_allocated": 2**30, "memory_allocated": 2**30,
        "max_memory_reserved": 2**30, "memory_reserved": 2**30, "memory_stats": {}, "is_current_stream_capturing": False,
        "get_sync_debug_mode": 0, "init": None, "reset_peak_memory_stats": None, "reset_max_memory_allocated": None,
        "set_sync_debug_mode": None, "ipc_collect": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    cuda.device = lambda *_: contextlib.nullcontext()
    cuda._lazy_call = lambda function, **_: function()
    cuda.default_generators = _Generators()
    torch.version.cuda = "13.0"
    torch.Tensor.is_cuda = property(lambda self: True)
    torch.Tensor.pin_memory = lambda self, *_, **__: self
    torch.Tensor.record_stream = lambda self, *_: None
    made = torch.Tensor._make_wrapper_subclass
    torch.Tensor._make_wrapper_subclass = staticmethod(
        lambda *arguments, **options: made(
            *arguments, **(options | {"device": torch.device("cpu")})
        )
    )
    for owner, names in ((torch, cpu._FACTORIES), (torch.Tensor, cpu._METHODS)):
        for name in names:
            setattr(owner, name, _unpinned(getattr(owner, name)))
    _gloo_as_nccl()


class _Generators:
    def __getitem__(self, index: int) -> Any:
        import torch

        return torch.default_generator

    def __len__(self) -> int:
        return 2


def _unpinned(function: Any) -> Any:
    def call(*arguments: Any, pin_memory: bool = False, **options: Any) -> Any:
        return function(*arguments, **options)

    return call


class _Done:
    def wait(self, *_: Any) -> bool:
        return True


def _at_once(function: Any) -> Any:
    """A collective that is asked for asynchronously is finished when it returns."""

    def call(*arguments: Any, async_op: bool = False, **options: Any) -> Any:
        answer = function(*arguments, **options)
        return _Done() if async_op else answer

    return call


@contextlib.contextmanager
def _not_coalesced(*_: Any, **__: Any) -> Any:
    """One collective after another: gloo would put tensors of different types into one."""
    yield _Done()


def _gloo_as_nccl() -> None:
    from torch import distributed
    from torch.distributed import distributed_c10d as c10d

    start, group = distributed.init_process_group, distributed.new_group

    def init_process_group(
        backend: str | None = None, *arguments: Any, device_id: Any = None, **options: Any
    ) -> Any:
        return start("gloo", *arguments, **options)

    def new_group(
        ranks: Any = None,
        timeout: Any = None,
        backend: Any = None,
        pg_options: Any = None,
        **options: Any,
    ) -> Any:
        options.pop("device_id", None)
        return group(ranks, timeout, "gloo", None, **options)

    distributed.init_process_group = init_process_group
    distributed.new_group = c10d.new_group = new_group
    distributed._coalescing_manager = c10d._coalescing_manager = _not_coalesced
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"):
        setattr(distributed, name, _at_once(getattr(distributed, name)))


if os.environ.get("CUDA_VISIBLE_DEVICES") != "":
    engine = "transformer_engine.pytorch."
    changed = {
        "transformer_engine.common": _change_common,
        engine + "utils": _change_utils,
        engine + "attention.dot_product_attention.context_parallel": _change_context_parallel,
    }
    replaced = {
        engine + "triton.cross_entropy": _fill_cross_entropy,
        engine + "triton.pad": lambda module: None,
        engine + "triton.permutation": lambda module: None,  # of experts
        engine + "onnx_extensions": lambda module: None,
    }
    sys.meta_path.insert(0, _Imports(changed, replaced))
    _look_like_cuda()
