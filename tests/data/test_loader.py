"""Laws of loading: any layout reads the same tokens, a resumed run the same batches, and errors say where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megacode.data.loader import StepBatch, StepReader, batches, validation_batches
from megacode.data.mixture import OpenMixture
from megacode.data.source import TokenSource, open_source
from megacode.errors import UserError
from tests.data.conftest import mixture_of, numbered, recipe_of, write_shard

Make = Callable[..., OpenMixture]
MIXED = {"mixture": {"sources": {"a": 0.6, "b": 0.3, "c": 0.1}}}
PHASES = [{"steps": 6, **MIXED}, {"steps": 6, "sequence_length": 8, "batch_size": 16, **MIXED}]


def rows(batch: StepBatch) -> list[tuple[int, ...]]:
    """Every sample of a share as (stream, tokens ..., last label)."""
    return [
        (int(stream), *tokens, int(labels[-1]))
        for part in batch.micro_batches
        for stream, tokens, labels in zip(
            part.stream, part.tokens.tolist(), part.labels, strict=True
        )
    ]


@pytest.mark.parametrize(("world", "size"), [(1, 1), (1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_any_layout_reads_the_same_tokens(make_mixture: Make, world: int, size: int) -> None:
    mixture = make_mixture(PHASES)
    whole = StepReader(mixture)
    ranks = [
        StepReader(mixture, rank=rank, world=world, micro_batch_size=size) for rank in range(world)
    ]
    for step in range(12):
        expected, parts = whole.read(step), [rank.read(step) for rank in ranks]
        assert all(len(batch.tokens) == size for part in parts for batch in part.micro_batches)
        assert sum(part.digest for part in parts) % 2**64 == expected.digest
        placed = {
            place: row
            for part in parts
            for place, row in zip(part.samples.positions.tolist(), rows(part), strict=True)
        }
        assert [placed[place] for place in range(len(placed))] == rows(expected)


def test_micro_batch_m_of_rank_r_holds_the_places_megatron_gives_it(make_mixture: Make) -> None:
    part = StepReader(make_mixture(PHASES), rank=1, world=2, micro_batch_size=2).read(0)
    assert part.samples.positions.tolist() == [2, 3, 6, 7]


def test_tokens_are_those_of_the_mixture(make_mixture: Make) -> None:
    mixture = make_mixture(PHASES)
    base = np.array([0, 100_000, 5_000])
    for step in range(12):
        batch = StepReader(mixture, micro_batch_size=4).read(step)
        tokens = np.concatenate([part.tokens for part in batch.micro_batches])
        first = base[batch.samples.stream] + batch.samples.start
        assert np.array_equal(
            tokens, first[:, None] + np.arange(batch.samples.phase.sequence_length)
        )
        assert np.array_equal(
            np.concatenate([part.stream for part in batch.micro_batches]), batch.samples.stream
        )


@pytest.mark.parametrize("first", [0, 1, 5, 6, 11])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_resumed_run_reads_the_same_batches(
    make_mixture: Make, first: int, prefetch: int
) -> None:
    with (
        batches(StepReader(make_mixture(PHASES)), prefetch=prefetch) as straight,
        batches(StepReader(make_mixture(PHASES)), first_step=first, prefetch=prefetch) as resumed,
    ):
        expected = {batch.step: (batch.digest, rows(batch)) for batch in straight}
        found = {batch.step: (batch.digest, rows(batch)) for batch in resumed}
    assert found == {step: value for step, value in expected.items() if step >= first}
    assert list(expected) == list(range(12))


def test_a_longer_run_reads_the_same_batches(make_mixture: Make) -> None:
    def digests(phases: list[dict[str, Any]]) -> list[int]:
        return [batch.digest for batch in batches(StepReader(make_mixture(phases)), prefetch=0)]

    assert (
        digests(PHASES)[:6]
        == digests([{**PHASES[0], "steps": 17}])[:6]
        == digests([*PHASES, PHASES[0]])[:6]
    )
    assert len(set(digests(PHASES))) == 12


def test_a_batch_that_does_not_divide_is_one_sentence(make_mixture: Make) -> None:
    with pytest.raises(
        UserError, match=r"phases\.p0\.batch_size: 8 sequences .* make it a multiple of 6"
    ):
        StepReader(make_mixture(PHASES), world=2, micro_batch_size=3).read(0)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_id_outside_the_vocabulary_is_one_sentence(
    corpora: dict[str, Any], prefetch: int
) -> None:
    model = {"layers": 1, "hidden_size": 8, "heads": 1, "vocab_size": 6000}
    recipe = recipe_of(corpora, PHASES, model=model)
    with (
        pytest.raises(
            UserError, match=r"sources\.b: holds token 10\d{4}, outside the vocabulary of 6,000"
        ),
        batches(StepReader(mixture_of(recipe)), prefetch=prefetch) as stream,
    ):
        next(stream)


def test_what_fails_on_the_thread_says_which_step(
    make_mixture: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(self: TokenSource, rows: Any, size: int, pad: int) -> None:
        raise MemoryError("no more")

    with batches(StepReader(make_mixture(PHASES)), first_step=3, prefetch=2) as stream:
        monkeypatch.setattr(TokenSource, "read_pieces", read)
        with pytest.raises(
            RuntimeError, match=r"loading step [3-6] on data-parallel rank 0 failed: MemoryError"
        ):
            list(stream)


def test_boundaries_without_a_tokenizer_are_one_sentence(make_mixture: Make) -> None:
    for phase in ({**PHASES[0], "reset_at_eod": True}, {**PHASES[0], "fim_rate": 0.5}):
        with pytest.raises(UserError, match=r"tokenizer: .* need one"):
            StepReader(make_mixture([phase]))


# ------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("tokens", "samples"), [(161, 4), (161, 99), (170, 99), (5, 3), (17, 1), (2, 1)]
)
@pytest.mark.parametrize(("world", "size"), [(1, 1), (2, 2), (3, 1)])
def test_validation_reads_the_first_windows_once_on_any_ranks(
    tmp_path: Path, tokens: int, samples: int, world: int, size: int
) -> None:
    write_shard(tmp_path / "v", numbered(tokens))
    source = open_source("v", [str(tmp_path / "v")], "validation")
    ranks = [
        list(validation_batches(source, 16, samples, rank=rank, world=world, micro_batch_size=size))
        for rank in range(world)
    ]
    assert len({len(parts) for parts in ranks}) == 1
    labels = [
        int(label)
        for parts in zip(*ranks, strict=True)
        for part in parts
        for label in part.labels[part.loss_mask > 0].reshape(-1)
    ]
    assert labels == list(range(1, min(tokens, samples * 16 + 1)))
    assert all(part.tokens.shape == (size, 16) for parts in ranks for part in parts)


def test_validation_of_one_token_is_one_sentence(tmp_path: Path) -> None:
    write_shard(tmp_path / "v", [[1]])
    with pytest.raises(UserError, match=r"sources\.v\.validation: has one token"):
        next(validation_batches(open_source("v", [str(tmp_path / "v")]), 16, 4))
