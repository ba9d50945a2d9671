"""A mean over checkpoints that were stored in different ways; what cannot be averaged is said, and nothing is half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megacode.cli.main import main
from megacode.convert.checkpoint_reader import CheckpointReader
from megacode.convert.checkpoint_writer import CheckpointWriter
from megacode.convert.layout import LAYER
from megacode.recipe.load import dump_recipe, load_recipe

EMBEDDING, FC2, COUNTER = (
    "embedding.word_embeddings.weight",
    f"{LAYER}mlp.linear_fc2.weight",
    "seen",
)
RECIPE = """
name: made
model: {{layers: 2, hidden_size: 16, heads: 2, ffn_size: 12, vocab_size: 20, pad_multiple: {pad}, norm_epsilon: {norm}}}
precision: {precision}
sources: {{a: {{path: a, tokens: 100k}}}}
phases: [{{name: one, steps: 9, batch_size: 2, sequence_length: 16, learning_rate: {{peak: 1e-3}}, mixture: {{sources: {{a: 1}}}}}}]
"""


def write(
    run: Path, step: int, *, pad: int = 8, numbered: bool = False, dtype: torch.dtype = torch.float32,
    count: int = 5, norm: float = 1e-5, precision: str = "bf16", vocabulary: int = 20,
) -> None:  # fmt: skip
    """Weights that are `step` everywhere (times the layer's number from 1), padded with zeros."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    writer = CheckpointWriter(folder, 2)
    rows, inner = -(-vocabulary // pad) * pad, -(-12 // pad) * pad
    embedding = torch.zeros(rows, 16, dtype=dtype)
    embedding[:vocabulary] = step
    writer.add(EMBEDDING, None, embedding)
    for layer in range(2):
        matrix = torch.zeros(16, inner, dtype=dtype)
        matrix[:, :12] = step * (layer + 1)
        name = FC2.replace(LAYER, f"{LAYER}{layer}.") if numbered else FC2
        writer.add(name, None if numbered else layer, matrix)
    writer.add(COUNTER, None, torch.tensor([count]))
    writer.add(f"optimizer.state.exp_avg.{EMBEDDING}", None, embedding)
    writer.finish()
    recipe = run / "recipe.yaml"
    recipe.write_text(RECIPE.format(pad=pad, norm=norm, precision=precision))
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe(recipe)))
    info = {"step": step, "recipe": "made", "vocab_size": vocabulary, "facts": {}}
    (folder / "megacode.json").write_text(json.dumps(info))


@pytest.mark.parametrize("numbered", [False, True])
def test_paddings_types_and_ways_to_name_layers_may_differ(
    tmp_path: Path, numbered: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 1, pad=8, numbered=not numbered)
    write(tmp_path, 2, pad=16, dtype=torch.bfloat16)
    write(tmp_path, 6, pad=8, numbered=numbered, dtype=torch.bfloat16)
    assert main(["average", str(tmp_path), "--last", "3"]) == 0
    reader = CheckpointReader.open(tmp_path / "averages/step_00000006-mean-of-3")
    names = set(reader.metadata.state_dict_metadata)
    assert {name for name in names if "_extra_state" not in name} == {
        EMBEDDING,
        COUNTER,
        *((f"{LAYER}{n}.mlp.linear_fc2.weight" for n in range(2)) if numbered else (FC2,)),
    }
    embedding = reader.tensor(EMBEDDING)
    assert embedding.dtype == torch.bfloat16 and embedding.shape == (24, 16)
    assert (embedding[:20] == 3).all() and (embedding[20:] == 0).all()
    for layer in range(2):
        matrix = reader.tensor(FC2, layer)
        assert matrix.shape == (16, 16), "padded as the last one's recipe says"
        assert (matrix[:, :12] == 3 * (layer + 1)).all() and (matrix[:, 12:] == 0).all()
    assert reader.tensor(COUNTER).tolist() == [5] and "note" not in capsys.readouterr().out


def test_counters_that_differ_and_scales_that_are_left_out_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 1, count=4)
    write(tmp_path, 2, precision="fp8", pad=16)
    assert main(["average", str(tmp_path), "--last", "2", "--output", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "1 tensors of whole numbers differ between the checkpoints" in told and COUNTER in told
    assert "FP8 scales (8 entries) are left out" in told
    assert CheckpointReader.open(tmp_path / "out").tensor(COUNTER).tolist() == [5]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"norm": 1e-6}, "its model is another than that of step_00000002 (model.norm_epsilon"),
        ({"vocabulary": 18}, "has a vocabulary of 18, and step_00000002 of 20"),
        ({}, "cannot be read"),
    ],
)
def test_what_cannot_be_averaged_leaves_nothing(
    tmp_path: Path, other: dict, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 1, **other)
    write(tmp_path, 2)
    if not other:
        shards = tmp_path / "checkpoints/step_00000001/__0_0.distcp"
        shards.write_bytes(shards.read_bytes()[:3000])
    assert main(["average", str(tmp_path), "--last", "2"]) == 2
    assert words in (told := capsys.readouterr().err) and "step_00000001" in told, told
    assert not list((tmp_path / "averages").glob("*")) and not list(tmp_path.glob(".*"))
