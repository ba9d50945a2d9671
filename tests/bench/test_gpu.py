"""What bench/gpu would measure on a device that is not here, and the page it leaves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
H100, H200 = int(79.2 * 2**30), int(139.8 * 2**30)
HOPPER = ["bf16", "delayed", "tensorwise", "blockwise", "tensorwise-params"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import gpu

    yield gpu
    for name in ("gpu", "gpu_cases", "gpu_page", "bare"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("memory", [H100, H200])
def test_every_device_has_something_to_measure_and_all_of_it_fits(bench: Any, memory: int) -> None:
    from gpu_cases import needed

    for name in ("crystal-7b-reduced", "crystal-7b-8k-reduced", "llama-8b-8k-reduced"):
        case = bench.CASES[name]
        layers = bench.fitting_layers(case, HOPPER, memory)
        assert 8 <= layers < case.layers
        assert all(bench.refusal(case, layers, precision, memory) is None for precision in HOPPER)
        assert any(needed(case, layers + 2, precision) > 0.9 * memory for precision in HOPPER), (
            "more layers would fit"
        )


def test_the_full_model_is_tried_where_it_can_fit(bench: Any) -> None:
    case = bench.CASES["crystal-7b"]
    assert bench.fitting_layers(case, HOPPER, H100) == 32  # never fewer in silence
    assert bench.refusal(case, 32, "bf16", H200) is None
    assert bench.refusal(case, 32, "tensorwise-params", H200) is None
    assert bench.refusal(case, 32, "bf16", H100) == "would take 128 GiB of 79"


@pytest.mark.parametrize("precision", HOPPER)
def test_its_recipes_can_be_loaded(bench: Any, precision: str, tmp_path: Path) -> None:
    from megacode.recipe.load import load_recipe

    for name, case in bench.CASES.items():
        recipe = bench.recipe_of(case, case.layers, precision, tmp_path)
        (tmp_path / "recipe.yaml").write_text(bench.dump_recipe(recipe))
        assert load_recipe(tmp_path / "recipe.yaml").model == recipe.model, name


def test_a_page_keeps_what_earlier_runs_measured(bench: Any, tmp_path: Path) -> None:
    row = {
        "case": "tiny",
        "layers": 2,
        "precision": "bf16",
        "tokens": 1e4,
        "tflops": 1.0,
        "mfu": 0.5,
        "memory": 3.0,
    }
    first = bench.Page(tmp_path, "NVIDIA X", "What it is.", "python bench/gpu.py --first")
    first.write([{**row, "side": "bare", "ms": 100.0}])
    first.write([{**row, "side": "bare", "ms": 100.0}, {**row, "side": "megacode", "ms": 102.0}])
    second = bench.Page(tmp_path, "NVIDIA X", "What it is.", "python bench/gpu.py --second")
    eighth = {**row, "precision": "tensorwise", "side": "bare"}
    for _ in range(2):
        second.write(
            [
                {**row, "side": "bare", "ms": 90.0},
                {**eighth, "ms": 60.0},
                {**eighth, "side": "megacode", "none": "no"},
            ]
        )
    text = (tmp_path / "gpu-nvidia-x.md").read_text()
    assert (
        text.count("# Training speed on one NVIDIA X\n\nWhat it is.") == 1
        and text.count("\n## ") == 2
    )
    assert text.index("--second") < text.index("--first")
    assert "| tiny | bf16 | megacode | 102 | 10,000 | 1 | 50.0% | 3.0 | 1.020 | 1.00 |" in text
    assert "| tiny | tensorwise | bare | 60 | 10,000 | 1 | 50.0% | 3.0 | 1.000 | 1.50 |" in text
    assert "| tiny | tensorwise | megacode | no |" in text
