"""Peaks are dense ones, and unknown devices have none."""

from __future__ import annotations

import pytest

from megacode.runtime.devices import device_peak, peak_flops


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "fp8", 1978.9),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA GH200 480GB", "fp8", 1978.9),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L40", "bf16", 181),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", 80),
    ],
)
def test_known_devices(name: str, precision: str, tflops: float) -> None:
    assert peak_flops(name, precision) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("cpu", "bf16"),
        ("", "fp32"),
        ("NVIDIA A100-SXM4-80GB", "fp8"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bf16"),
        ("Tesla V100-SXM2-16GB", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA GeForce RTX 4090 D", "bf16"),
        ("NVIDIA A1000 Laptop GPU", "bf16"),
        ("NVIDIA H100 80GB HBM3", "int4"),
        ("NVIDIA H100 80GB HBM3", "__doc__"),
    ],
)
def test_what_is_not_known_has_no_peak(name: str, precision: str) -> None:
    assert peak_flops(name, precision) is None


def test_fp8_doubles_bf16_where_there_is_fp8() -> None:
    for name in ("H100 80GB HBM3", "H200", "B200", "L40S", "RTX 4090", "H100 PCIe"):
        peak = device_peak(name)
        assert peak and peak.bf16 and peak.fp8 == pytest.approx(2 * peak.bf16, rel=0.02)
