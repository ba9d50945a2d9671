"""Small corpora, made by Megatron-Core's own builder, and a recipe over them; every run has processes of its own."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.processes import command, start

ROOT = Path(__file__).parents[2]
VOCAB = 300


def _build(sets: dict[str, list[list[int]]]) -> None:
    import torch

    from megacode.megatron import cpu

    cpu.quiet()
    if not torch.cuda.is_available():
        cpu.install()
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for prefix, made in sets.items():
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for document in made:
            builder.add_document(torch.tensor(document), [len(document)])
        builder.finalize(f"{prefix}.idx")


def documents(seed: int, count: int, low: int, high: int) -> list[list[int]]:
    """Documents that walk through a range of tokens by small steps, so that a loss can fall; token 2 ends each."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        steps = rng.integers(1, 4, rng.integers(20, 120)).cumsum()
        made.append([*(low + steps % (high - low)).tolist(), 2])
    return made


def build_corpora(folder: Path, sets: dict[str, list[list[int]]]) -> None:
    """Each name's documents as FOLDER/NAME.bin and .idx."""
    made = {str(folder / name): documents for name, documents in sets.items()}
    assert start(_build, [(made,)]) == [0]


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    sets = {
        "code": documents(1, 500, 10, 140), "code_valid": documents(2, 40, 10, 140),
        "text": documents(3, 700, 140, 300), "text_valid": documents(4, 40, 140, 300),
        "web": documents(5, 300, 100, 200),
    }  # fmt: skip
    build_corpora(folder, sets)
    return folder


# The second phase warms up, because the first update of a fresh Adam is the sign of the gradient, and rounding alone decides the
# sign of the smallest: layouts would differ by whole updates.
RECIPE = """
name: small
seed: 7
model: {{layers: 4, hidden_size: 48, heads: 4, kv_heads: 2, vocab_size: {vocab}}}
precision: fp32
sources:
  code: {{path: {data}/code, domain: code, validation: {data}/code_valid}}
  text: {{path: {data}/text, domain: text, validation: {data}/text_valid}}
  web: {{path: {data}/web, domain: text}}
phases:
  - name: first
    steps: 8
    batch_size: 8
    sequence_length: 32
    mixture: {{sources: {{text: 0.7, web: 0.2, code: 0.1}}}}
    learning_rate: {{schedule: linear, peak: 0.004, warmup: 2, decay_steps: 40}}
  - name: second
    steps: 12
    batch_size: 8
    sequence_length: 32
    mixture:
      domains:
        code: {{ratio: {{shape: linear, start: 0.2, end: 0.8}}}}
        text: {{ratio: {{shape: linear, start: 0.8, end: 0.2}}}}
    learning_rate: {{schedule: cosine, peak: 0.003, warmup: 3}}
    optimizer_state: fresh
parallel: {{micro_batch_size: 2}}
checkpoints: {{every: 10}}
evaluation: {{samples: 8}}
logging: {{every: 1, tensorboard: false}}
"""


@pytest.fixture(scope="session")
def recipe(corpora: Path) -> Path:
    path = corpora / "small.yaml"
    path.write_text(RECIPE.format(data=corpora, vocab=VOCAB))
    return path


def megacode(
    *arguments: object, check: bool = True, ranks: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, or, with `ranks`, in as many as torchrun would."""
    done = command(list(map(str, arguments)), environment, ranks)
    if check and done.returncode:
        raise AssertionError(
            f"megacode {' '.join(map(str, arguments))} -> {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
    return done


@dataclass(frozen=True)
class Steps:
    """What metrics.jsonl says of the training steps of a run."""

    losses: list[float]
    norms: list[float]
    batches: list[str]


def steps_of(run: Path) -> Steps:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in train] == list(range(1, len(train) + 1)), (
        "a step is missing or stands twice"
    )
    return Steps(
        [r["loss"] for r in train], [r["grad_norm"] for r in train], [r["batch"] for r in train]
    )
