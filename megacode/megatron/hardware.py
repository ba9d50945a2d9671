"""This process's device and the libraries that can use it."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from importlib import metadata

import torch

from megacode.plan.hardware import Hardware, Version


def detect() -> Hardware:
    """What this process can compute with."""
    if not torch.cuda.is_available():
        return Hardware()
    return Hardware(
        name=torch.cuda.get_device_name(),
        capability=torch.cuda.get_device_capability(),
        cuda=_version(torch.version.cuda or ""),
        engine=_engine(),
        apex_gradients=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
    )


def transformer_engine_available() -> bool:
    """Whether this process can use Transformer Engine's layers: CUDA, and the package imports."""
    return torch.cuda.is_available() and _engine() is not None


@cache
def _engine() -> Version | None:
    """Transformer Engine's version, if it imports. Asked for every micro-batch, and looking it up reads the disk."""
    try:
        import transformer_engine.pytorch
    except (ImportError, OSError):
        return None
    try:
        return _version(metadata.version("transformer-engine"))
    except metadata.PackageNotFoundError:  # built in place, as in some containers
        import transformer_engine

        return _version(getattr(transformer_engine, "__version__", "0"))


def _version(text: str) -> Version | None:
    """`2.12.0+abc` -> (2, 12, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else None
