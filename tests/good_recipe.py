"""A small good recipe that tests bend."""

import textwrap
from pathlib import Path

import pytest

GOOD = """\
name: small
seed: 7
tokenizer: {path: tok.model}
model:
  layers: 4
  hidden_size: 64
  heads: 4
sources:
  python: {path: data/python, domain: code, tokens: 1M}
  docs: {path: data/docs, domain: text, tokens: 500k}
phases:
  - name: first
    steps: 100
    batch_size: 8
    sequence_length: 128
    mixture:
      sources: {docs: 0.7, python: 0.3}
    learning_rate: {peak: 1e-3, warmup: 10}
  - name: second
    tokens: 100_000
    batch_size: 16
    sequence_length: 128
    mixture:
      domains: {code: 0.63, text: 0.37}
    learning_rate: {peak: 3E-4}
"""


@pytest.fixture
def write(tmp_path: Path):
    """Writes a recipe file and returns its path."""

    def write(text: str = GOOD, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write


@pytest.fixture
def good() -> str:
    return GOOD
