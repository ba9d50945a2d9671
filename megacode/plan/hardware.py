"""What a configuration depends on besides the recipe: a process's device and the libraries that can
use it.

`megacode.megatron.hardware.detect` fills it in for this process; a plan fills it in for a device of
the table. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

from megacode.plan.devices import DEVICES

Version = tuple[int, ...]

_OLDEST_ENGINE: dict[str, Version] = {
    "delayed": (1, 0),
    "tensorwise": (2, 2),
    "blockwise": (2, 3),
    "mxfp8": (2, 1),
}
"""`precision.fp8_recipe`: the first Transformer Engine that has it."""


@dataclass(frozen=True)
class Hardware:
    """The device of one process, and what is installed to use it. The default is a CPU."""

    name: str = "CPU"
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None: no CUDA device."""
    cuda: Version | None = None
    """Version of CUDA that torch is built for."""
    engine: Version | None = None
    """Version of Transformer Engine; None where it cannot be used."""
    apex_gradients: bool = False
    """Whether Apex's kernel for gradient accumulation inside matrix products is installed."""

    @property
    def on_cuda(self) -> bool:
        return self.capability is not None


def assumed(device: str) -> Hardware:
    """A device of `megacode.plan.devices.DEVICES` with everything that NVIDIA's
    containers install."""
    capability = DEVICES[device][1].capability
    if (
        capability is None
    ):  # AMD: torch calls it CUDA, and Transformer Engine is another project there
        return Hardware(name=device, capability=(9, 0), cuda=None, engine=None)
    return Hardware(device, capability, cuda=(13, 0), engine=(2, 12), apex_gradients=True)


def fp8_refusal(recipe_name: str, hardware: Hardware) -> str | None:
    """Why this hardware cannot train in FP8 by a recipe of Transformer Engine; None if it can.

    The rules are those of Transformer Engine's own support checks (`check_fp8_support`,
    `check_mxfp8_support`, `check_fp8_block_scaling_support`, 2.12) and of Megatron-Core's
    `get_fp8_recipe` (0.16).
    """
    have, engine, oldest = hardware.capability, hardware.engine, _OLDEST_ENGINE[recipe_name]
    if have is None:
        return "this machine shows no CUDA device"
    said = f"{hardware.name} has compute capability {have[0]}.{have[1]}"
    if have < (8, 9):
        return f"{said}, and FP8 begins with 8.9 (Ada, Hopper)"
    if engine is None:
        return "this machine has no Transformer Engine"
    if engine < oldest:
        return (
            f"fp8_recipe {recipe_name} came with Transformer Engine {_dotted(oldest)}, and this "
            f"machine has {_dotted(engine)}"
        )
    if recipe_name == "blockwise" and have < (9, 0):
        return f"{said}, and fp8_recipe blockwise needs 9.0 (Hopper) or later"
    if recipe_name == "blockwise" and hardware.cuda is not None and hardware.cuda < (12, 9):
        return (
            "fp8_recipe blockwise needs CUDA 12.9 or later, and torch here is built for "
            f"{_dotted(hardware.cuda)}"
        )
    if recipe_name == "mxfp8" and not (10, 0) <= have < (12, 0):
        return f"{said}, and fp8_recipe mxfp8 needs 10.0 (data-centre Blackwell)"
    return None


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
