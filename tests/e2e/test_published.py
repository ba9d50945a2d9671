"""The tiny twins of published recipes, a few steps in each of their phases: lengths, rotary positions, fill-in-the-middle, exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megacode import load_recipe, make_plan, open_mixture
from megacode.data.loader import StepReader
from megacode.run.metrics import read_metrics
from megacode.tokenizer.tokenizer import load_tokenizer
from tests.e2e.conftest import ROOT, megacode, steps_of
from tests.e2e.test_golden import byte_corpora

pytestmark = pytest.mark.slow
STEPS = 2
# What the config of an export of the last checkpoint says.
TWINS: dict[str, dict[str, Any]] = {
    "smollm3": {
        "model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0], "rope_theta": 5e6,
        "max_position_embeddings": 512, "num_key_value_heads": 1, "tie_word_embeddings": True,
    },
    "deepseek-coder": {
        "model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 1e5,
        "max_position_embeddings": 512,
    },
    "qwen2.5-coder": {"model_type": "qwen2", "rope_theta": 1e6, "max_position_embeddings": 512},
    "k2-v2": {"model_type": "llama", "rope_theta": 1e7, "max_position_embeddings": 512},
}  # fmt: skip


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made corpora in the place of the quickstart's."""
    pytest.importorskip("tiktoken")
    folder = tmp_path_factory.mktemp("published")
    byte_corpora(folder)
    return folder


def shortened(corpora: Path, name: str) -> Path:
    """The twin with few steps a phase and small batches."""
    twin = load_recipe(ROOT / f"recipes/{name}-tiny.yaml")
    paths = {"python": "python", "docs": "docs", "merged": ["python", "docs"]}
    recipe = {
        "extends": str(ROOT / f"recipes/{name}-tiny.yaml"),
        "tokenizer": {"path": "bytes.tiktoken", "bos": True},
        "sources": {
            source: {"path": paths[source]}
            | ({"validation": f"{source}_valid"} if twin.sources[source].validation else {})
            for source in twin.sources
        },
        "phases": {
            phase.name: {
                "steps": STEPS, "batch_size": 4, "learning_rate": {"warmup": 1, "decay_steps": None},
            }
            for phase in twin.phases
        },
        "evaluation": {"samples": 2},
        "logging": {"every": 1, "tensorboard": False},
    }  # fmt: skip
    path = corpora / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_trains_every_phase(name: str, corpora: Path, tmp_path: Path) -> None:
    path = shortened(corpora, name)
    recipe = load_recipe(path)
    megacode("train", path, "--run", tmp_path / "run")
    losses, records = steps_of(tmp_path / "run").losses, read_metrics(tmp_path / "run")
    assert len(losses) == STEPS * len(recipe.phases) and np.isfinite(losses).all()
    validated = [r for r in records if r["kind"] == "validation"]
    assert [set(r["loss_by_source"]) for r in validated] == [{"python", "docs"}] * len(
        recipe.phases
    )

    tokenizer = load_tokenizer(recipe.tokenizer) if recipe.tokenizer else None
    assert tokenizer is not None
    reader = StepReader(open_mixture(make_plan(recipe)), tokenizer=tokenizer)
    middle = tokenizer.token_id(recipe.data.fim.middle)
    for number, phase in enumerate(recipe.phases):
        steps = range(STEPS * number, STEPS * (number + 1))
        batches = [batch for step in steps for batch in reader.read(step).micro_batches]
        assert {batch.tokens.shape[1] for batch in batches} == {phase.sequence_length}
        rearranged = any((batch.tokens == middle).any() for batch in batches)
        assert rearranged == name.endswith("coder")

    megacode("export", tmp_path / "run", tmp_path / "out", "--no-tokenizer")
    config = json.loads((tmp_path / "out/config.json").read_text())
    wanted = TWINS[name]
    assert {key: config[key] for key in wanted} == wanted
