"""Small corpora on disk and plans over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megacode.data.indexed import token_dtype, write_index
from megacode.data.mixture import OpenMixture, open_mixture
from megacode.data.planning import plan_with_data
from megacode.recipe.schema import Recipe

EOD = 2


def write_shard(prefix: Path, documents: Sequence[Sequence[int]], vocab_size: int = 1000) -> None:
    """An IndexedDataset of these documents (written by megacode; one law says Megatron-Core writes the same)."""
    dtype = token_dtype(vocab_size)
    with open(f"{prefix}.bin", "wb") as file:
        for document in documents:
            file.write(np.asarray(document, dtype=dtype).tobytes())
    write_index(
        Path(f"{prefix}.idx"),
        np.array([len(document) for document in documents], dtype=np.int32),
        dtype,
    )


def numbered(tokens: int, document: int = 50, first: int = 0) -> list[list[int]]:
    """Documents whose tokens count up from `first`, so that every window is known by its first token."""
    ids = list(range(first, first + tokens))
    return [ids[i : i + document] for i in range(0, tokens, document)]


def recipe_of(sources: dict[str, Any], phases: list[dict[str, Any]], **keys: Any) -> Recipe:
    """A recipe around sources and phases; a phase's missing keys are small."""
    usual = {
        "batch_size": 8,
        "sequence_length": 16,
        "learning_rate": {"schedule": "constant", "peak": 1e-3},
    }
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"layers": 1, "hidden_size": 8, "heads": 1, "vocab_size": 200_000},
            "sources": sources,
            "phases": [{"name": f"p{i}", **usual, **phase} for i, phase in enumerate(phases)],
            **keys,
        }
    )


def mixture_of(recipe: Recipe) -> OpenMixture:
    plan = plan_with_data(recipe)
    return open_mixture(plan)


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Recipe sources: `a` (3,000 tokens from 0, two shards), `b` (1,000 tokens from 100,000), `c` (100 from 5,000)."""
    folder = tmp_path_factory.mktemp("corpora")
    write_shard(folder / "a0", numbered(1234), 200_000)
    write_shard(folder / "a1", numbered(3000 - 1234, first=1234), 200_000)
    write_shard(folder / "b", numbered(1000, first=100_000), 200_000)
    write_shard(folder / "c", numbered(100, first=5_000))
    return {
        "a": {"path": str(folder / "a*"), "domain": "text"},
        "b": {"path": str(folder / "b"), "domain": "code"},
        "c": {"path": str(folder / "c.bin"), "domain": "code"},
    }


@pytest.fixture(scope="session")
def make_mixture(corpora: dict[str, Any]) -> Callable[..., OpenMixture]:
    """phases, keys -> OpenMixture over `corpora`."""

    def make(phases: list[dict[str, Any]], **keys: Any) -> OpenMixture:
        return mixture_of(recipe_of(corpora, phases, **keys))

    return make
