"""The card tells the run as it was at the checkpoint, in Markdown that a hub can read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megacode.convert.card import write_card
from megacode.recipe.load import load_recipe
from megacode.run.metrics import read_metrics
from tests.report.conftest import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ramp"
    make_run(folder, steps=60)
    return folder


def checkpoint(run: Path, step: int, **info: Any) -> Path:
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "recipe.yaml", folder)
    record = next(r for r in read_metrics(run) if r["kind"] == "train" and r["step"] == step)
    known = {
        "step": step,
        "phase": record["phase"],
        "tokens": record["tokens"],
        "vocab_size": 32032,
    }
    (folder / "megacode.json").write_text(json.dumps(known | info))
    return folder


def card(folder: Path, checkpoint_folder: Path, run: Path | None) -> str:
    folder.mkdir(exist_ok=True)
    write_card(
        folder, load_recipe(checkpoint_folder / "recipe.yaml"), checkpoint_folder, run, "llama"
    )
    return (folder / "README.md").read_text()


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the table that follows a heading."""
    lines = text.split(f"## {heading}")[1].split("\n## ", maxsplit=1)[0].splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in lines
        if line.startswith("| ")
    ]


def test_header_model_and_phases(run: Path, tmp_path: Path) -> None:
    text = card(tmp_path / "out", checkpoint(run, 200), run)
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["library_name"] == "transformers" and header["pipeline_tag"] == "text-generation"
    assert (
        header["tags"] == ["megacode", "llama", "code", "math", "text"] and "license" not in header
    )
    assert "# license: yours to choose" in text
    model = dict(rows(text, "Model"))
    assert (
        model["heads"] == "16, 128 wide, 8 for keys and values" and model["vocabulary"] == "32,032"
    )
    per_layer = 2048 * (2048 + 2 * 1024) + 2048 * 2048 + 3 * 2048 * 5504 + 2 * 2048
    assert model["parameters"] == f"{24 * per_layer + 2 * 32032 * 2048 + 2048:,}"
    phases = rows(text, "Training")[1:]
    assert [row[0] for row in phases] == ["text", "**ramp**", "python"]
    assert phases[1][1] == "61–240" and "FIM" in text
    assert not [line for line in text.splitlines() if line.startswith("|") and line.count("|") < 3]


def test_numbers_are_those_of_the_checkpoints_step(run: Path, tmp_path: Path) -> None:
    records = [r for r in read_metrics(run) if r["kind"] == "train"]
    valid = {r["step"]: r["loss_by_domain"] for r in read_metrics(run) if r["kind"] == "validation"}
    text = card(tmp_path / "out", checkpoint(run, 150), run)
    assert "150 of 300 steps" in text and "after 150 steps" in text
    table = {row[0]: row[1:] for row in rows(text, "Losses at step 150")[1:]}
    last = records[50:150]
    for domain in ("code", "text"):
        pairs = [
            (r["loss_by_domain"][domain], r["ratio_by_domain"][domain])
            for r in last
            if domain in r["loss_by_domain"]
        ]
        expected = np.average([loss for loss, _ in pairs], weights=[share for _, share in pairs])
        assert float(table[domain][0]) == pytest.approx(expected, abs=6e-5)
        assert float(table[domain][1]) == pytest.approx(valid[100][domain], abs=6e-5)
    assert "those of step 100" in text


def test_pictures_are_png_in_the_lights_colours(run: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    text = card(tmp_path / "out", checkpoint(run, 300), run)
    for name in ("loss.png", "mixture.png"):
        assert f"]({name})" in text
        pixels = imread(tmp_path / "out" / name)[..., :3]
        assert pixels.shape[1] == 1600 and (pixels[0, 0] == 1).all()
        flat = np.round(pixels.reshape(-1, 3) * 255).astype(int)
        near_black = (flat.max(1) <= 12).sum()
        assert near_black < 20, "placeholder colours are left"
        blue = (np.abs(flat - [0, 0x72, 0xB2]).max(1) <= 2).sum()  # code's hue
        assert name == "mixture.png" or blue > 100


def test_how_to_load_follows_the_files(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    plain = card(folder, checkpoint(run, 300), run)
    assert "trust_remote_code" not in plain and "AutoTokenizer.from_pretrained" not in plain
    (folder / "modeling_crystalcoder.py").touch()
    (folder / "tokenizer.json").touch()
    text = card(folder, checkpoint(run, 300), run)
    assert (
        'from_pretrained("out", trust_remote_code=True)' in text
        and "split_special_tokens=True" in text
    )
    assert '"<|fim_prefix|>" + before + "<|fim_suffix|>" + after + "<|fim_middle|>"' in text


def test_without_a_run_the_model_is_still_told(run: Path, tmp_path: Path) -> None:
    text = card(tmp_path / "out", checkpoint(run, 300), None)
    assert "## Model" in text and "## Training" not in text and "## Losses" not in text
    assert "tokens seen" in text and not (tmp_path / "out" / "loss.png").exists()
    assert card(tmp_path / "other", checkpoint(run, 300), tmp_path / "nowhere") == text.replace(
        '"out"', '"other"'
    )
