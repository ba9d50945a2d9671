"""A row of padded documents, its shares over context-parallel ranks, and the loss over them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from megacode.data.batch import Batch, make_batch
from megacode.data.packed_row import pack_row, packed_length
from megacode.recipe.schema import Parallel
from tests.processes import run_on

EOD, LENGTH, STREAMS = 2, 48, 3


def batch_of(seed: int = 0, samples: int = 3) -> Batch:
    """Documents of 1 to ~20 tokens; every token another number, so that one can be told from another."""
    rng = np.random.default_rng(seed)
    windows = 10 + np.arange(samples * (LENGTH + 1)).reshape(samples, LENGTH + 1)
    windows[rng.random(windows.shape) < 0.15] = EOD
    windows[0, 5:7] = EOD  # a document of one token
    stream = rng.integers(0, STREAMS, samples).astype(np.int32)
    return make_batch(
        windows, stream, np.arange(samples), lengths=np.array([LENGTH + 1] * (samples - 1) + [30]),
        eod_id=EOD, reset_at_eod=True, mask_eod_loss=True,
    )  # fmt: skip


def test_on_one_rank_nothing_is_padded() -> None:
    batch = batch_of()
    assert packed_length(batch, 1) == batch.tokens.size
    row = pack_row(batch, batch.tokens.size)
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        assert (getattr(row, name) == getattr(batch, name).reshape(1, -1)).all()
        assert getattr(row, name).dtype == getattr(batch, name).dtype
    assert row.sample_tokens == (LENGTH,) * 3
    opens = np.flatnonzero(batch.position_ids.reshape(-1) == 0)
    assert row.edges.tolist() == [*opens, batch.tokens.size]


@pytest.mark.parametrize("more", [0, 24])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_shares_are_slices_of_every_document(size: int, more: int) -> None:
    """Rank r has slices r and 2 c - 1 - r, as Transformer Engine takes them; put together they are the documents."""
    batch = batch_of()
    length = packed_length(batch, size) + more * size
    shares = [pack_row(batch, length, size, rank) for rank in range(size)]
    edges = shares[0].edges
    assert edges[-1] == length and (np.diff(edges) % (2 * size) == 0).all()
    whole: dict[str, np.ndarray] = {}
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        found = np.full(length, -1.0)
        for rank, share in enumerate(shares):
            array, at = getattr(share, name)[0], 0
            assert array.shape == (length // size,)
            for begin, end in itertools.pairwise(edges):
                part = (end - begin) // (2 * size)
                for slice_ in (rank, 2 * size - 1 - rank):
                    found[begin + slice_ * part :][:part] = array[at : at + part]
                    at += part
            assert at == len(array)
        whole[name] = found
    real = np.diff(
        np.append(np.flatnonzero(batch.position_ids.reshape(-1) == 0), batch.tokens.size)
    )
    kept = np.concatenate([begin + np.arange(n) for begin, n in zip(edges, real, strict=False)])
    for name, found in whole.items():
        assert (found[kept] == getattr(batch, name).reshape(-1)).all(), name
        assert not np.delete(found, kept).any(), f"{name} in the padding"
    assert all(sum(share.sample_tokens) == length // size for share in shares)


def loss_of_shares(world: Any) -> tuple[Any, Any, Any]:
    """Loss sum, denominators (trained tokens, positions) and sums by stream, with a loss that is a function of the token."""
    from megacode.megatron import step

    step.transformer_engine_available = lambda: True  # what it is handed needs no device
    batch = batch_of()
    moved = step.to_device(batch, world, packed_length(batch, world.context_size) + 24)
    assert moved.packed is not None and moved.mask is None
    assert moved.tokens.shape[1] == int(moved.packed.cu_seqlens_q[-1]) // world.context_size
    losses = moved.labels.float() / 7 + moved.position_ids
    total, trained, sums = step._Losses(STREAMS, False, None).sums(moved, losses)
    positions = step._Losses(STREAMS, True, None).denominator(moved)
    return float(total), (int(trained), int(positions)), sums


@pytest.mark.parametrize("context", [2, 3])
def test_the_loss_over_context_ranks_is_that_of_one(context: int) -> None:
    ((total, counts, sums),) = run_on(1, loss_of_shares)
    shares = run_on(context, loss_of_shares, parallel=Parallel(context=context))
    assert sum(share[0] for share in shares) == pytest.approx(total, rel=1e-6)
    assert tuple(np.sum([share[1] for share in shares], axis=0)) == counts
    assert counts == (int(batch_of().loss_mask.sum()), batch_of().tokens.size)
    np.testing.assert_allclose(sum(share[2].numpy() for share in shares), sums.numpy(), rtol=1e-6)
