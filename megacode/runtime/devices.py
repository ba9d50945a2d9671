"""Peak rates of devices, to say how much of one a run uses (MFU)."""

from __future__ import annotations

# Dense tensor-core TFLOP/s (not the sparse figures, which are twice these), from NVIDIA's data sheets of each product:
# (part of the name torch reports, bf16, fp8). The first match wins, so longer names come first.
_DENSE_TFLOPS: tuple[tuple[str, float, float | None], ...] = (
    ("B300", 2250.0, 4500.0),
    ("GB200", 2500.0, 5000.0),
    ("B200", 2250.0, 4500.0),
    ("GH200", 989.4, 1978.9),
    ("H200 NVL", 835.5, 1670.5),
    ("H200", 989.4, 1978.9),
    ("H100 PCIe", 756.5, 1513.0),
    ("H100 NVL", 835.5, 1670.5),
    ("H100", 989.4, 1978.9),
    ("H800", 989.4, 1978.9),
    ("H20", 148.0, 296.0),
    ("A100", 312.0, None),
    ("A800", 312.0, None),
    ("L40S", 362.0, 733.0),
    ("L40", 181.0, 362.0),
    ("L4", 121.0, 242.0),
    ("A40", 149.7, None),
    ("A10", 125.0, None),
    ("RTX 6000 Ada", 364.2, 728.5),
    ("RTX 4090", 165.2, 330.3),
    ("RTX 3090", 71.0, None),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak of a device in FLOP/s for `bf16`, `fp8` or `fp32`; None where it is not known (then no MFU is shown).

    fp32 has no entry: what tensor cores do to fp32 matrices depends on settings.
    """
    for part, bf16, fp8 in _DENSE_TFLOPS:
        if part.lower() in device_name.lower():
            value = {"bf16": bf16, "fp8": fp8}.get(precision)
            return value * 1e12 if value else None
    return None
