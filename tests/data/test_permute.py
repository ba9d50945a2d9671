"""Laws of the stateless shuffle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacode.data.permute import MAX_SIZE, make_key, permute, uniform_below, uniform_bits

KEYS = st.integers(0, 2**64 - 1)


def shuffled(size: int, key: int) -> np.ndarray:
    return permute(np.arange(size), size, key)


@pytest.mark.parametrize(
    "size", [*range(1, 130), 255, 256, 257, 1000, 4095, 4096, 4097, 65_537, 100_003]
)
def test_every_size_is_permuted_onto_itself(size: int) -> None:
    assert np.array_equal(np.sort(shuffled(size, 7)), np.arange(size))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 5000), key=KEYS)
def test_every_key_permutes_every_size_onto_itself(size: int, key: int) -> None:
    assert np.array_equal(np.sort(shuffled(size, key)), np.arange(size))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(2**31, MAX_SIZE), key=KEYS, start=st.integers(0, 2**31 - 300))
def test_huge_sizes_stay_in_range_without_collision(size: int, key: int, start: int) -> None:
    out = permute(np.arange(start, start + 256), size, key)
    assert len(np.unique(out)) == 256
    assert int(out.max()) < size


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 10**12), min_size=1, max_size=20), key=KEYS)
def test_a_batch_of_sizes_and_keys_gives_what_each_gives_alone(sizes: list[int], key: int) -> None:
    index = np.array([s // 3 for s in sizes])
    keys = uniform_bits(key, np.arange(len(sizes)))
    together = permute(index, np.array(sizes), keys)
    alone = [int(permute(int(i), s, int(k))[0]) for i, s, k in zip(index, sizes, keys, strict=True)]
    assert together.tolist() == alone


def test_the_order_is_the_same_on_every_machine_and_release() -> None:
    """Golden values: changing them changes the data order of every run there is."""
    assert make_key(1234, "python", 0.0, 1.0) == 0xC6CF58C59A3D3F40
    assert shuffled(10, 1).tolist() == [1, 8, 9, 6, 4, 7, 5, 2, 0, 3]
    assert permute([0, 1, 2], 10**12, make_key(1234, "c4")).tolist() == [
        705299580176,
        753754386046,
        743467926098,
    ]
    assert uniform_bits(1, [0, 1]).tolist() == [11385487063155714807, 658006869215568080]


def test_another_key_gives_another_order() -> None:
    orders = {
        tuple(shuffled(50, make_key(seed, "source", epoch)).tolist())
        for seed in range(20)
        for epoch in range(20)
    }
    assert len(orders) == 400


def test_keys_tell_parts_and_types_apart() -> None:
    keys = [
        make_key(1, "ab", "c"),
        make_key(1, "a", "bc"),
        make_key(1, "abc"),
        make_key(1, "1"),
        make_key(1, 1),
    ]
    keys += [make_key(1, 1.0), make_key(2, "abc"), make_key(1, 0.0, 0.1), make_key(1, 0.0, 0.2)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_sizes_take_every_order_equally_often(size: int) -> None:
    orders = permute(np.arange(size)[None], size, uniform_bits(5, np.arange(24_000))[:, None])
    assert orders.shape == (24_000, size)
    codes = (orders @ (size ** np.arange(size)).astype(np.uint64)).astype(np.int64)
    counts = np.unique(codes, return_counts=True)[1]
    expected = 24_000 / np.prod(np.arange(1, size + 1))
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    free = len(counts) - 1
    assert len(counts) == np.prod(np.arange(1, size + 1))
    assert chi2 < free + 5 * np.sqrt(2 * free) + 5


@pytest.mark.parametrize("size", [1000, 4096, 99_991])
def test_a_shuffle_has_no_visible_structure(size: int) -> None:
    for key in range(5):
        order = shuffled(size, make_key(key, "structure")).astype(np.int64)
        # Displacement: |perm(i) - i| of a uniform order is n/3 on average, with variance n^2/18.
        displacement = np.abs(order - np.arange(size)).mean() / size
        assert abs(displacement - 1 / 3) < 6 * np.sqrt(1 / 18 / size)
        # Adjacent places are as far apart as any two, and hardly any neighbours stay neighbours (2 expected).
        gaps = np.diff(order)
        assert abs(np.abs(gaps).mean() / size - 1 / 3) < 6 * np.sqrt(1 / 18 / size)
        assert (np.abs(gaps) == 1).sum() <= 14
        # Fixed points: one expected (Poisson).
        assert (order == np.arange(size)).sum() <= 9
        # Correlation of place and value, and of low bits.
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 6 / np.sqrt(size)
        assert abs(((order ^ np.arange(size)) & 1).mean() - 0.5) < 3 / np.sqrt(size)


def test_two_epochs_are_unrelated() -> None:
    key = make_key(3, "source", 0.0, 1.0)
    first, second = (
        shuffled(20_000, int(uniform_bits(key, e)[0])).astype(np.float64) for e in (0, 1)
    )
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.04
    assert (first == second).sum() <= 9


def test_bits_are_uniform_and_bounded_draws_stay_below_the_bound() -> None:
    bits = uniform_bits(make_key(9, "bits"), np.arange(1 << 16))
    ones = ((bits[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 0.012
    draws = uniform_below(bits, 7)
    counts = np.bincount(draws.astype(np.int64), minlength=7)
    assert len(counts) == 7
    assert np.abs(counts / len(bits) - 1 / 7).max() < 0.01


def test_an_index_outside_is_refused() -> None:
    with pytest.raises(ValueError, match="in \\[0, size\\)"):
        permute([3], 3, 1)
