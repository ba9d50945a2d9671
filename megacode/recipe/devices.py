"""What a device could do at most: peak FLOP/s, the denominator of MFU. No torch here.

All figures are *dense*: NVIDIA's data sheets print many of them "with sparsity", which is twice what a dense matrix product
can reach (H100 SXM: bf16 1,979 printed, 989 dense). Tensor-core figures are those with fp32 accumulation. `fp32` is the rate
without tensor cores: torch multiplies fp32 matrices in full precision unless TF32 is asked for.

Sources, all NVIDIA: data sheets of A100, A30, A10, A40, H100, H200, GH200, L4, L40, L40S, V100, T4; "NVIDIA H100 Tensor Core GPU
Architecture" (white paper, table of H100 PCIe and SXM5); HGX and GB200 NVL72 product pages for Blackwell (B200: 36 PFLOP/s
sparse bf16 for eight); Ampere GA102, "Ada GPU Architecture" and RTX Blackwell white papers, appendix tables, for GeForce and
RTX cards.
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


# First match wins, so that `H100 PCIe` stands before `H100`. Names are those that the driver reports.
_PEAKS: tuple[tuple[str, Peak], ...] = (
    (r"\bGB[23]00\b", Peak(80, 2500, 5000)),
    (r"\bB[23]00\b", Peak(75, 2250, 4500)),
    (r"\bGH200\b", Peak(66.9, 989.4, 1978.9)),
    (r"\bH200 NVL\b", Peak(60, 835.5, 1671)),
    (r"\bH200\b", Peak(66.9, 989.4, 1978.9)),
    (r"\bH[18]00 PCIe\b", Peak(51.2, 756, 1513)),
    (r"\bH100 NVL\b", Peak(60, 835.5, 1671)),
    (r"\bH[18]00\b", Peak(66.9, 989.4, 1978.9)),
    (r"\bH20\b", Peak(44, 148, 296)),
    (r"\bA[18]00\b", Peak(19.5, 312)),
    (r"\bA30\b", Peak(10.3, 165)),
    (r"\bA40\b", Peak(37.4, 149.7)),
    (r"\bA10\b", Peak(31.2, 125)),
    (r"\bL40S\b", Peak(91.6, 362, 733)),
    (r"\bL40\b", Peak(90.5, 181, 362)),
    (r"\bL4\b", Peak(30.3, 121, 242.5)),
    (r"\bRTX 6000 Ada\b", Peak(91.1, 364.2, 728.5)),
    (r"\bRTX A6000\b", Peak(38.7, 154.8)),
    (r"\bRTX 5090(?! D| Laptop)\b", Peak(104.8, 209.5, 419)),
    (r"\bRTX 4090(?! D| Laptop)\b", Peak(82.6, 165.2, 330.3)),
    (r"\bRTX 3090 Ti\b", Peak(40, 80)),
    (r"\bRTX 3090\b", Peak(35.6, 71)),
    (r"\bV100.*PCIE", Peak(14, None)),
    (r"\bV100\b", Peak(15.7, None)),
    (r"\bT4\b", Peak(8.1, None)),
)


def device_peak(device_name: str) -> Peak | None:
    """The table's row for a device as CUDA names it (`NVIDIA H100 80GB HBM3`); None if it is not known, a CPU, or a MIG slice
    (which has a part of the device only)."""
    if re.search(r"\bMIG\b", device_name):
        return None
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, device_name, re.IGNORECASE)), None)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak in FLOP/s (not TFLOP/s) of one device.

    Args:
        device_name: as CUDA reports it; `cpu` has no known peak.
        precision: of the matrix products: `fp32`, `bf16` or `fp8` (a recipe's `precision.compute`).

    Returns:
        None where the device or its rate in this precision is not known: then there is no MFU to speak of.
    """
    peak = device_peak(device_name)
    rate = getattr(peak, precision, None) if precision in ("fp32", "bf16", "fp8") else None
    return None if rate is None else rate * 1e12
