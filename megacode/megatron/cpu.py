"""Megatron-Core on a machine without CUDA: the one place that redirects it.

Megatron-Core names CUDA throughout (`device="cuda"`, `torch.cuda.current_device()`, tensor types spelled
`torch.cuda.FloatTensor`). `install()` makes those names mean the CPU, so that the unmodified library trains on gloo and
every parallel layout can be tested anywhere. It must run before the first import of `megatron`, and only where
`torch.cuda.is_available()` is false; on CUDA nothing here is ever used.

What Megatron-Core assumes, and what stands in for it:

- factory calls and `.to()` with a CUDA device, `Tensor.cuda()`, `Tensor.type()`: wrappers that say CPU;
- `torch.cuda.*` functions for the device, streams, events, synchronisation, random state: plain replacements;
- `torch.cuda.FloatTensor([...])`: constructors on the CPU;
- the dropout generators of tensor parallelism, which save and set CUDA random states: the CPU generator.

`apply_to_megatron()` follows after the import: the few names that Megatron-Core bound at import time.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from typing import Any, cast

import torch

_CPU = torch.device("cpu")
_CUDA_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}


def _names_cuda(value: Any) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like", "rand",
    "rand_like", "randint", "randn", "randn_like", "randperm", "scalar_tensor", "tensor", "zeros", "zeros_like",
)  # fmt: skip
_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def _on_cpu(function: Any) -> Any:
    """`function`, with a CUDA device among its keywords meaning the CPU."""

    @functools.wraps(function)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        if kwargs and _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return function(*args, **kwargs)

    return redirected


def _redirect_tensors() -> None:
    """Plain wrappers rather than a TorchFunctionMode: a mode costs every call of every operation, and is not active where
    recomputed layers run, inside backward."""
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _METHODS:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    to, type_ = _on_cpu(torch.Tensor.to), torch.Tensor.type

    def tensor_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return to(self, *(_CPU if _names_cuda(a) else a for a in args), **kwargs)

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_(self, *args, **kwargs)
        # Optimizers compare the name of a parameter's type with CUDA's.
        return _CUDA_TYPE_NAMES.get(answer, answer) if isinstance(answer, str) else answer

    for kind, name, function in (
        (torch.Tensor, "to", tensor_to),
        (torch.Tensor, "type", tensor_type),
        (torch.Tensor, "cuda", lambda self, *_, **__: self),
        (torch.nn.Module, "cuda", lambda self, *_, **__: self),
    ):
        setattr(kind, name, function)


class _Inert:
    """A stream or event where nothing is asynchronous: accepts every call and answers that all work is done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Inert:
        return self

    def __exit__(self, *exc: Any) -> None:
        return None

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = wait = record = record_event = synchronize = _nothing


def _cpu_constructor(dtype: torch.dtype) -> Any:
    return lambda data=(), *_: torch.tensor(data, dtype=dtype)


def installed() -> bool:
    """Whether this process runs Megatron-Core on the CPU."""
    return torch.cuda.current_device is _current_device


def _current_device() -> torch.device:
    return _CPU


def prepare() -> None:
    """What a process does before it imports Megatron-Core: quiet logs, and without a device the CPU in its place."""
    quiet()
    if not torch.cuda.is_available():
        install()


def install() -> None:
    """Redirect CUDA names to the CPU for the rest of this process. Idempotent.

    Raises:
        RuntimeError: CUDA is available, where redirecting it would be wrong.
    """
    if installed():
        return
    if torch.cuda.is_available():
        raise RuntimeError("megacode.megatron.cpu.install() is for machines without CUDA")
    cuda: Any = torch.cuda

    # A function of its own for every name, here and below: torch's compiler tells functions by identity.
    def nothing() -> Any:
        return lambda *args, **kwargs: None

    def get_state() -> Any:
        return lambda *args, **kwargs: torch.get_rng_state()

    def set_state() -> Any:
        return lambda state, *args, **kwargs: torch.set_rng_state(state)

    def seed() -> Any:
        return lambda value: torch.manual_seed(int(value))

    cuda.current_device = _current_device
    for name in ("synchronize", "set_device", "empty_cache", "manual_seed_all", "set_stream"):
        setattr(cuda, name, nothing())
    cuda.nvtx.range_push, cuda.nvtx.range_pop = nothing(), nothing()
    for module in (cuda, cuda.random):
        module.manual_seed, module.get_rng_state, module.set_rng_state = (
            seed(),
            get_state(),
            set_state(),
        )
    cuda.Stream = cuda.Event = _Inert
    cuda.current_stream = lambda *a, **k: _Inert()
    cuda.default_stream = lambda *a, **k: _Inert()
    cuda.stream = lambda *a, **k: contextlib.nullcontext()
    for name, dtype in {
        "FloatTensor": torch.float32, "HalfTensor": torch.float16, "BFloat16Tensor": torch.bfloat16,
        "DoubleTensor": torch.float64, "IntTensor": torch.int32, "LongTensor": torch.int64,
        "ByteTensor": torch.uint8, "BoolTensor": torch.bool,
    }.items():  # fmt: skip
        setattr(cuda, name, _cpu_constructor(dtype))
    # A type, not a constructor, where Megatron-Core asks isinstance(): these three are compared against tensors only.
    cuda.FloatTensor, cuda.HalfTensor, cuda.BFloat16Tensor = (
        _instance_of(torch.float32), _instance_of(torch.float16), _instance_of(torch.bfloat16),
    )  # fmt: skip
    # Where these are installed but no device is there, Megatron-Core would call their CUDA kernels.
    for package in ("transformer_engine", "apex"):
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # None makes an import of it fail
    # Megatron-Core wraps its fused functions in torch.compile at import; a machine without CUDA may have no compiler.
    torch.compile = cast(Any, _uncompiled)
    _redirect_tensors()


def _uncompiled(model: Any = None, **_: Any) -> Any:
    """`torch.compile` as a function and as a decorator with options, compiling nothing."""
    return (lambda function: function) if model is None else model


def _instance_of(dtype: torch.dtype) -> type:
    class Meta(type):
        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, torch.Tensor) and value.dtype == dtype

        def __call__(cls, data: Any = (), *_: Any) -> torch.Tensor:
            return torch.tensor(data, dtype=dtype)

    return Meta(f"Cpu{dtype}", (), {})


def apply_to_megatron() -> None:
    """Replace what Megatron-Core bound at import time. Call once, after the first import of `megatron.core`."""
    from megatron.core.tensor_parallel import random as mcore_random

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    def get_state(
        device: Any = "cuda", clone: bool = False, graph_safe: bool = False
    ) -> torch.Tensor:
        state = torch.get_rng_state()
        return state.clone() if clone else state

    mcore_random._set_cuda_rng_state = set_state
    mcore_random._get_cuda_rng_state = get_state


def quiet() -> None:
    """Silence, once and centrally, warnings of imported libraries that mean nothing to a user of this project."""
    for message in (
        r"Transformer Engine and Apex are not installed",
        r"Apex is not installed",
        r"Failed to import.*Transformer Engine",
        r".*expandable_segments.*",
        r".*is deprecated.*",
        r".*will be deprecated.*",
        r"Please use the new API settings to control TF32.*",
        r"TypedStorage is deprecated",
        r"Please use DTensor instead",
        r"The \.grad attribute of a Tensor that is not a leaf",
        # The variable for it is set where it matters (`cuda.py`); these ask for one value on any device.
        r"When using (async grad allreduce|sequence parallelism) it is recommended",
        r"To guarantee overlapping TP and SP",
        r".*torch\.distributed\._.*_base.*",
        r"No device id is provided via `init_process_group`.*",
        r".*barrier\(\): using the device under current context.*",
        r"You are using quantized weights without quantized compute",  # in bf16 on purpose: `precision.compare_every`
        r"window_size should be \(-1, -1\)",  # Transformer Engine, of a single token that looks back
    ):
        warnings.filterwarnings("ignore", message=message)
    # Megatron-Core 0.19 says of GPTModel, at every start, that its successor will be another class.
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(
        lambda record: "IS DEPRECATED" not in record.getMessage()
    )
    # Of an export with remote code that only its tokenizer is loaded from.
    logging.getLogger("transformers.configuration_utils").addFilter(
        lambda record: "You are using a model of type" not in record.getMessage()
    )
