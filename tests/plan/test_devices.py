"""Peaks are dense ones, unknown devices have none, and plan and MFU read one table."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from megacode.plan.devices import DEVICES, device_peak, peak_flops


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
        ("NVIDIA H100 NVL", "fp8", 1670.5),
        ("NVIDIA H800 PCIe", "fp8", 1513),
        ("NVIDIA H20", "bf16", 148),
        ("NVIDIA GH200 480GB", "fp8", 1978.9),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA B300 SXM6 AC", "fp8", 4500),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA GB300", "fp8", 5000),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA RTX A6000", "bf16", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", "bf16", 364.2),
        ("Tesla V100-SXM2-16GB", "fp32", 15.7),
        ("Tesla V100-PCIE-32GB", "fp32", 14),
        ("Tesla V100S-PCIE-32GB", "fp32", 16.4),
        ("AMD Instinct MI300X", "bf16", 1307.4),
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


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("Tesla V100-SXM2-32GB", 125),
        ("Tesla V100S-PCIE-32GB", 130),
        ("Tesla T4", 65),
        ("NVIDIA H100 80GB HBM3", 989.4),
    ],
)
def test_sixteen_bit_is_bf16_or_fp16(name: str, tflops: float) -> None:
    peak = device_peak(name)
    assert peak and peak.sixteen_bit == tflops


def test_no_row_hides_another() -> None:
    """A row's short name, written as drivers write it, finds that row."""
    for short, (_, peak) in DEVICES.items():
        words = (
            short.upper().replace("RTX-6000-ADA", "RTX 6000 Ada").replace("PCIE", "PCIe").split("-")
        )
        assert (
            device_peak("NVIDIA " + ("-" if short == "v100-pcie" else " ").join(words)) is peak
        ), short


def test_the_plan_reckons_with_the_peak_that_mfu_is_measured_against() -> None:
    from megacode.cli.main import main

    recipe = Path(__file__).parents[2] / "recipes/crystal-7b.yaml"
    shown = {}
    for device in ("h100", "h100-pcie", "v100"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(["plan", str(recipe), "--gpus", "64", "--device", device]) == 0
        shown[device] = " ".join(out.getvalue().split())
    assert (
        "989 TFLOP/s" in shown["h100"]
        and "756 TFLOP/s" in shown["h100-pcie"]
        and "125 TFLOP/s" in shown["v100"]
    )
