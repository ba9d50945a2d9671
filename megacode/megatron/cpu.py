"""Megatron-Core on a machine without CUDA: the one place that redirects it.

Megatron-Core names CUDA throughout (`device="cuda"`, `torch.cuda.current_device()`, tensor types
spelled `torch.cuda.FloatTensor`). `install()` makes those names mean the CPU, so that the
unmodified library trains on gloo and every parallel layout can be tested anywhere. It must run
before the first import of `megatron`, and only where `torch.cuda.is_available()` is false; on CUDA
nothing here is ever used.

What Megatron-Core assumes, and what replaces it:

- factory calls and `.to()` with a CUDA device, `Tensor.cuda()`, `Tensor.type()`: wrappers that put
  the tensor on the CPU;
- `torch.cuda.*` functions for the device, streams, events, synchronisation, random state, and the
  default generators that tensor parallelism saves and sets for dropout: plain replacements;
- `torch.cuda.FloatTensor([...])`: types that construct on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections import defaultdict
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
    "arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones",
    "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "scalar_tensor",
    "tensor", "zeros", "zeros_like",
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
    """Wrap torch's factories and conversions in place.

    Not a TorchFunctionMode: that costs every call of every operation, and is not active where
    recomputed layers run, inside backward.
    """
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _METHODS:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    to, type_ = _on_cpu(torch.Tensor.to), torch.Tensor.type

    def tensor_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return to(self, *(_CPU if _names_cuda(a) else a for a in args), **kwargs)

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_(self, *args, **kwargs)
        # Megatron-Core's optimizers compare the name of a parameter's type with CUDA's.
        return _CUDA_TYPE_NAMES.get(answer, answer) if isinstance(answer, str) else answer

    for kind, name, function in (
        (torch.Tensor, "to", tensor_to),
        (torch.Tensor, "type", tensor_type),
        (torch.Tensor, "cuda", lambda self, *_, **__: self),
        (torch.nn.Module, "cuda", lambda self, *_, **__: self),
    ):
        setattr(kind, name, function)


class _Inert:
    """A stream or event where nothing is asynchronous: takes every call, and all work is done."""

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


def _tensor_type(dtype: torch.dtype) -> type:
    """In place of `torch.cuda.FloatTensor` and its like: constructs, and answers isinstance()."""

    class Meta(type):
        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, torch.Tensor) and value.dtype == dtype

        def __call__(cls, data: Any = (), *_: Any) -> torch.Tensor:
            return torch.tensor(data, dtype=dtype)

    return Meta(f"Cpu{dtype}", (), {})


def _hide_kernels() -> None:
    """Make imports of Transformer Engine and Apex fail, as where they are not installed.

    Upstream fault: Megatron-Core uses their CUDA kernels wherever they import, device or not.
    Versions: Megatron-Core 0.16 to 0.19.
    Remove when: Megatron-Core asks for a device too. Test: `test_kernels_without_a_device`.
    """
    for package in ("transformer_engine", "apex"):
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # makes an import fail


def _uncompiled(model: Any = None, **_: Any) -> Any:
    """`torch.compile` as a function and as a decorator with options, compiling nothing."""
    return (lambda function: function) if model is None else model


def _current_device() -> torch.device:
    return _CPU


def installed() -> bool:
    """Whether this process runs Megatron-Core on the CPU."""
    return torch.cuda.current_device is _current_device


def prepare() -> None:
    """Call before Megatron-Core is imported: quiet logs, and without a device the CPU instead."""
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
    cuda.current_device = _current_device
    # Every name gets a function of its own: torch's compiler tells functions apart by identity.
    for name in ("synchronize", "set_device", "empty_cache", "manual_seed_all", "set_stream"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.nvtx.range_push = lambda *args, **kwargs: None
    cuda.nvtx.range_pop = lambda *args, **kwargs: None
    for module in (cuda, cuda.random):
        module.manual_seed = lambda value: torch.manual_seed(int(value))
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # Megatron-Core's random tracker sets these, through a call that waits for CUDA to start.
    cuda.default_generators = defaultdict(lambda: torch.default_generator)
    cuda._lazy_call = lambda function, **kwargs: function()
    cuda.Stream = cuda.Event = _Inert
    cuda.current_stream = lambda *args, **kwargs: _Inert()
    cuda.default_stream = lambda *args, **kwargs: _Inert()
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    for name, dtype in {
        "FloatTensor": torch.float32, "HalfTensor": torch.float16, "BFloat16Tensor": torch.bfloat16,
        "DoubleTensor": torch.float64, "IntTensor": torch.int32, "LongTensor": torch.int64,
        "ByteTensor": torch.uint8, "BoolTensor": torch.bool,
    }.items():  # fmt: skip
        setattr(cuda, name, _tensor_type(dtype))
    _hide_kernels()
    # Megatron-Core compiles its fused functions at import; there may be no compiler here.
    torch.compile = cast(Any, _uncompiled)
    _redirect_tensors()


def quiet() -> None:
    """Silence warnings of imported libraries that mean nothing to a user of this project."""
    for message in (
        r"(Transformer Engine and )?Apex (is|are) not installed",
        r"Failed to import.*Transformer Engine",
        r".*expandable_segments.*",
        r".*(is|will be) deprecated.*",
        r"Please use the new API settings to control TF32.*",
        r"Please use DTensor instead",
        r"The \.grad attribute of a Tensor that is not a leaf",
        # They ask for one value of a variable that `hardware.cuda_environment` sets by the device.
        r"When using (async grad allreduce|sequence parallelism) it is recommended",
        r"To guarantee overlapping TP and SP",
        r".*torch\.distributed\._.*_base.*",
        r"No device id is provided via `init_process_group`.*",
        r".*barrier\(\): using the device under current context.*",
        r"You are using quantized weights without quantized compute",  # of `compare_every`: meant
        r"window_size should be \(-1, -1\)",  # Transformer Engine, of a single cached query
    ):
        warnings.filterwarnings("ignore", message=message)
    # Megatron-Core 0.19 announces GPTModel's successor at every start.
    _silence("megatron.core.models.gpt.gpt_model", "IS DEPRECATED")
    # An export with remote code of which only the tokenizer is loaded.
    _silence("transformers.configuration_utils", "You are using a model of type")


def _silence(logger: str, words: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: words not in record.getMessage())
