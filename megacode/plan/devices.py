"""What a device could do at most: peak FLOP/s, the denominator of MFU and of a plan's time, and
memory.

All figures are *dense*: vendors' data sheets print many of them "with sparsity", which is twice
what a dense matrix product can reach (H100 SXM: bf16 1,979 printed, 989 dense). Tensor-core figures
are those with fp32 accumulation. `fp32` is the rate without tensor cores: torch multiplies fp32
matrices in full precision unless TF32 is asked for. No torch here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """Dense peaks of one device in TFLOP/s; None where the device has no such arithmetic."""

    fp32: float
    bf16: float | None
    fp8: float | None = None
    fp16: float | None = None
    """Only where it is not bf16's."""
    memory: int = 0
    """GiB as sold, of the largest version; drivers show about as many."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability (NVIDIA's table "CUDA GPUs: compute capability"); None for AMD."""

    @property
    def usable(self) -> float:
        """Bytes for a run's own tensors: without the CUDA context, NCCL's buffers and what
        fragmentation costs."""
        return 0.92 * self.memory * 2**30

    @property
    def sixteen_bit(self) -> float:
        """The rate of 16-bit matrix products, whichever of the two formats there is."""
        return self.bf16 or self.fp16 or self.fp32


# Short name (`megacode plan --device`): (pattern of the names that drivers report, peaks). The
# first match wins, so that `H100 PCIe` stands before `H100`.
DEVICES: dict[str, tuple[str, Peak]] = {
    # Blackwell: product pages of GB200 NVL72 and GB300 NVL72 (72 devices: 360 PFLOP/s bf16 and 720
    # fp8, sparse), and of HGX B200 and B300 (8 devices: 36 and 72, sparse; 600 TFLOP/s fp32).
    "gb300": (r"\bGB300\b", Peak(80, 2500, 5000, memory=279, capability=(10, 3))),
    "gb200": (r"\bGB200\b", Peak(80, 2500, 5000, memory=186, capability=(10, 0))),
    "b300": (r"\bB300\b", Peak(75, 2250, 4500, memory=270, capability=(10, 3))),
    "b200": (r"\bB200\b", Peak(75, 2250, 4500, memory=180, capability=(10, 0))),
    # Hopper: white paper "NVIDIA H100 Tensor Core GPU Architecture" (tables of H100 SXM5 and PCIe,
    # dense beside sparse); data sheets of H100 (its NVL column: 1,671 and 3,341 sparse), H200, H20
    # and the GH200 superchip. H800 computes as H100.
    "gh200": (r"\bGH200\b", Peak(66.9, 989.4, 1978.9, memory=96, capability=(9, 0))),
    "h200-nvl": (r"\bH200 NVL\b", Peak(60, 835.5, 1670.5, memory=141, capability=(9, 0))),
    "h200": (r"\bH200\b", Peak(66.9, 989.4, 1978.9, memory=141, capability=(9, 0))),
    "h100-pcie": (r"\bH[18]00 PCIe\b", Peak(51.2, 756, 1513, memory=80, capability=(9, 0))),
    "h100-nvl": (r"\bH[18]00 NVL\b", Peak(60, 835.5, 1670.5, memory=94, capability=(9, 0))),
    "h100": (r"\bH[18]00\b", Peak(66.9, 989.4, 1978.9, memory=80, capability=(9, 0))),
    "h20": (r"\bH20\b", Peak(44, 148, 296, memory=96, capability=(9, 0))),
    # Ampere, data centre: data sheets of A100 (80 GB; SXM and PCIe alike), A30, A40 and A10, which
    # print dense and sparse. No fp8. A800 computes as A100.
    "a100": (r"\bA[18]00\b", Peak(19.5, 312, memory=80, capability=(8, 0))),
    "a30": (r"\bA30\b", Peak(10.3, 165, memory=24, capability=(8, 0))),
    "a40": (r"\bA40\b", Peak(37.4, 149.7, memory=48, capability=(8, 6))),
    "a10": (r"\bA10\b", Peak(31.2, 125, memory=24, capability=(8, 6))),
    # Ada, data centre: data sheets of L40S, L40 (dense and sparse) and L4 (sparse only: 242 and
    # 485).
    "l40s": (r"\bL40S\b", Peak(91.6, 362, 733, memory=48, capability=(8, 9))),
    "l40": (r"\bL40\b", Peak(90.5, 181, 362, memory=48, capability=(8, 9))),
    "l4": (r"\bL4\b", Peak(30.3, 121, 242.5, memory=24, capability=(8, 9))),
    # Workstation and GeForce: appendix tables of the white papers "NVIDIA Ampere GA102", "NVIDIA
    # Ada GPU Architecture" and "NVIDIA RTX Blackwell GPU Architecture", rows "with FP32
    # accumulate".
    "rtx-6000-ada": (r"\bRTX 6000 Ada\b", Peak(91.1, 364.2, 728.5, memory=48, capability=(8, 9))),
    "rtx-a6000": (r"\bRTX A6000\b", Peak(38.7, 154.8, memory=48, capability=(8, 6))),
    "rtx-5090": (
        r"\bRTX 5090(?! D| Laptop)\b",
        Peak(104.8, 209.5, 419, memory=32, capability=(12, 0)),
    ),
    "rtx-4090": (
        r"\bRTX 4090(?! D| Laptop)\b",
        Peak(82.6, 165.2, 330.3, memory=24, capability=(8, 9)),
    ),
    "rtx-3090-ti": (r"\bRTX 3090 Ti\b", Peak(40, 80, memory=24, capability=(8, 6))),
    "rtx-3090": (r"\bRTX 3090\b", Peak(35.6, 71, memory=24, capability=(8, 6))),
    # Volta and Turing: data sheets of V100 (columns SXM2, PCIe, V100S) and T4. Tensor cores of fp16
    # only.
    "v100s": (r"\bV100S\b", Peak(16.4, None, fp16=130, memory=32, capability=(7, 0))),
    "v100-pcie": (r"\bV100.*PCIE", Peak(14, None, fp16=112, memory=32, capability=(7, 0))),
    "v100": (r"\bV100\b", Peak(15.7, None, fp16=125, memory=32, capability=(7, 0))),
    "t4": (r"\bT4\b", Peak(8.1, None, fp16=65, memory=16, capability=(7, 5))),
    # AMD: data sheets of Instinct MI300X and MI250X, matrix rates. torch shows an MI250X as two
    # devices, and this is one of them.
    "mi300x": (r"\bMI300X\b", Peak(163.4, 1307.4, 2614.9, memory=192)),
    "mi250x": (r"\bMI250X\b", Peak(47.9, 191.5, memory=64)),
}


def device_peak(device_name: str) -> Peak | None:
    """The table's row for a device as CUDA names it (`NVIDIA H100 80GB HBM3`).

    None if it is not known, a CPU, or a MIG slice (which has only a part of the device).
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    rows = DEVICES.values()
    return next((p for name, p in rows if re.search(name, device_name, re.IGNORECASE)), None)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak in FLOP/s (not TFLOP/s) of one device.

    Args:
        device_name: as CUDA reports it; `cpu` has no known peak.
        precision: of the matrix products: `fp32`, `bf16` or `fp8` (a recipe's `precision.compute`).

    Returns:
        None where the device or its rate in this precision is not known: then there is no MFU.
    """
    peak = device_peak(device_name)
    rate = getattr(peak, precision, None) if precision in ("fp32", "bf16", "fp8") else None
    return None if rate is None else rate * 1e12
