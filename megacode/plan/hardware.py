"""What a configuration depends on besides the recipe: the device a process has and the libraries that can use it.

`megacode.megatron.hardware.detect` fills it in for this process; a plan fills it in for a device of the table. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

Version = tuple[int, ...]

# Compute capabilities by short name in `megacode.plan.devices` (NVIDIA's table "CUDA GPUs: compute capability").
_CAPABILITIES: dict[tuple[int, int], tuple[str, ...]] = {
    (12, 0): ("rtx-5090",),
    (10, 3): ("gb300", "b300"),
    (10, 0): ("gb200", "b200"),
    (9, 0): ("gh200", "h200-nvl", "h200", "h100-pcie", "h100-nvl", "h100", "h20"),
    (8, 9): ("l40s", "l40", "l4", "rtx-6000-ada", "rtx-4090"),
    (8, 6): ("a40", "a10", "rtx-a6000", "rtx-3090-ti", "rtx-3090"),
    (8, 0): ("a100", "a30"),
    (7, 5): ("t4",),
    (7, 0): ("v100s", "v100-pcie", "v100"),
}


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
    """Whether Apex's kernel for gradient accumulation inside matrix products is there."""

    @property
    def on_cuda(self) -> bool:
        return self.capability is not None


def assumed(device: str) -> Hardware:
    """A device of `megacode.plan.devices.DEVICES` with everything installed that NVIDIA's containers carry."""
    capability = next((c for c, names in _CAPABILITIES.items() if device in names), None)
    if (
        capability is None
    ):  # AMD's: torch calls them CUDA, and Transformer Engine is another project there
        return Hardware(name=device, capability=(9, 0), cuda=None, engine=None)
    return Hardware(
        name=device, capability=capability, cuda=(13, 0), engine=(2, 12), apex_gradients=True
    )


def fp8_refusal(recipe_name: str, hardware: Hardware) -> str | None:
    """Why this hardware cannot train in FP8 by a recipe of Transformer Engine; None if it can.

    The rules are those of Transformer Engine's own support checks (`check_fp8_support`, `check_mxfp8_support`,
    `check_fp8_block_scaling_support`, 2.12) and of Megatron-Core's `get_fp8_recipe` (0.16).
    """
    have = hardware.capability
    if have is None:
        return "this machine shows no CUDA device"
    said = f"{hardware.name} has compute capability {have[0]}.{have[1]}"
    if have < (8, 9):
        return f"{said}, and FP8 begins with 8.9 (Ada, Hopper)"
    if hardware.engine is None:
        return "this machine has no Transformer Engine"
    oldest: dict[str, Version] = {
        "delayed": (1, 0),
        "tensorwise": (2, 2),
        "blockwise": (2, 3),
        "mxfp8": (2, 1),
    }
    if hardware.engine < oldest[recipe_name]:
        return (
            f"fp8_recipe {recipe_name} came with Transformer Engine {_dotted(oldest[recipe_name])}, and this machine has "
            f"{_dotted(hardware.engine)}"
        )
    if recipe_name == "blockwise":
        if have < (9, 0):
            return f"{said}, and fp8_recipe blockwise needs 9.0 (Hopper) or later"
        if hardware.cuda is not None and hardware.cuda < (12, 9):
            return f"fp8_recipe blockwise needs CUDA 12.9 or later, and torch here is built for {_dotted(hardware.cuda)}"
    if recipe_name == "mxfp8" and not (10, 0) <= have < (12, 0):
        return f"{said}, and fp8_recipe mxfp8 needs 10.0 (data-centre Blackwell)"
    return None


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
