"""Laws of batches, and Megatron-Core's masks and positions beside ours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacode.data.batch import Batch, make_batch
from tests.data.conftest import EOD


def batch_of(windows: np.ndarray, first: int = 0, **settings: object) -> Batch:
    count = len(windows)
    return make_batch(
        windows, np.zeros(count, np.int32), np.arange(first, first + count), **settings
    )  # type: ignore[arg-type]


def windows_of(seed: int, count: int = 4, length: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).choice(
        [EOD, 5, 6, 7], size=(count, length + 1), p=[0.1, 0.3, 0.3, 0.3]
    )


def test_labels_are_the_next_tokens() -> None:
    windows = windows_of(1)
    batch = batch_of(windows.astype(np.uint16))
    assert np.array_equal(np.concatenate([batch.tokens, batch.labels[:, -1:]], axis=1), windows)
    assert np.array_equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert batch.loss_mask.all() and batch.segments is None
    assert np.array_equal(batch.position_ids, np.tile(np.arange(32), (4, 1)))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), reset=st.booleans(), mask=st.booleans())
def test_masks_and_positions_are_megatron_cores(seed: int, reset: bool, mask: bool) -> None:
    torch = pytest.importorskip("torch")
    gpt_dataset = pytest.importorskip("megatron.core.datasets.gpt_dataset")
    batch = batch_of(windows_of(seed), eod_id=EOD, reset_at_eod=reset, mask_eod_loss=mask)
    for row in range(4):
        attention, loss_mask, positions = gpt_dataset._get_ltor_masks_and_position_ids(
            torch.from_numpy(batch.tokens[row]), EOD, reset, reset, mask, True
        )
        assert np.array_equal(batch.loss_mask[row], loss_mask.numpy())
        assert np.array_equal(batch.position_ids[row], positions.numpy())
        hidden = np.triu(np.ones((32, 32), dtype=bool), 1)
        if batch.segments is not None:
            hidden |= batch.segments[row][:, None] != batch.segments[row][None]
        assert np.array_equal(attention.numpy()[0], hidden)


def test_positions_after_the_real_tokens_have_no_loss() -> None:
    batch = batch_of(windows_of(3), lengths=np.array([33, 32, 2, 0]))
    assert batch.loss_mask.sum(axis=1).tolist() == [32, 31, 1, 0]


def test_boundaries_need_the_token() -> None:
    with pytest.raises(ValueError, match="need eod_id"):
        batch_of(windows_of(3), reset_at_eod=True)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), cut=st.integers(0, 4))
def test_digests_of_parts_add_up(seed: int, cut: int) -> None:
    windows = windows_of(seed)
    parts = batch_of(windows[:cut]).digest + batch_of(windows[cut:], first=cut).digest
    assert parts % 2**64 == batch_of(windows).digest
    assert batch_of(windows.astype(np.int32)).digest == batch_of(windows).digest


def test_digests_see_every_token_and_every_place() -> None:
    windows = windows_of(5)
    seen = {
        batch_of(windows).digest,
        batch_of(windows[::-1]).digest,
        batch_of(windows, first=1).digest,
    }
    for row in range(4):
        for column in range(33):
            changed = windows.copy()
            changed[row, column] += 1
            seen.add(batch_of(changed).digest)
    assert len(seen) == 3 + 4 * 33


def test_a_digest_is_the_same_on_every_machine_and_release() -> None:
    """A golden value: digests of old runs are compared with new ones."""
    assert batch_of(np.arange(66).reshape(2, 33)).digest == 0xD49841B9D185F0A
