"""The stateless shuffle: keyed permutations and random bits, as pure functions of (key, index).

Nothing is drawn from a generator, so there is no state to save: element i of a shuffle of 10^9
things costs the same as element 0 and needs no table. All arithmetic is on 64-bit integers, so the
same key gives the same order on every machine and with every release of Python and numpy.

The permutation is a Feistel network on pairs (left, right) with 0 <= left < a, 0 <= right < b and
a * b just above n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002: generalised
Feistel with cycle walking). Its round function is the finaliser of SplitMix64 (Steele, Lea, Flood
2014), which is enough for shuffling and no cipher.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

UInts = NDArray[np.uint64]

MAX_SIZE = 1 << 62
"""Largest n that can be permuted: a and b then fit 32 bits."""

_ROUNDS = 12
_GOLDEN = 0x9E3779B97F4A7C15
_ROUND_CONSTANTS = np.array([(r + 1) * _GOLDEN % 2**64 for r in range(_ROUNDS)], dtype=np.uint64)
_27, _30, _31, _32 = (np.uint64(n) for n in (27, 30, 31, 32))
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def make_key(seed: int, *parts: str | int | float) -> int:
    """A 64-bit key from a seed and names. Any difference gives an unrelated key.

    Each part is hashed with its type and length, so ("a", "bc") and ("ab", "c") are different keys.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, *parts):
        if isinstance(part, str):
            data = b"s" + part.encode()
        elif isinstance(part, int):
            data = b"i" + str(part).encode()
        else:
            data = b"f" + struct.pack("<d", part)
        digest.update(struct.pack("<Q", len(data)) + data)
    return int.from_bytes(digest.digest(), "little")


def uniform_bits(key: ArrayLike, index: ArrayLike) -> UInts:
    """64 uniform bits for each (key, index), broadcast together; both are taken modulo 2^64.

    Also derives keys from keys: `uniform_bits(stream_key, epoch)` is the key of one epoch.
    """
    return _mix(_mix(_uint64(index) * np.uint64(_GOLDEN) + np.uint64(_GOLDEN)) ^ _uint64(key))


def uniform_below(bits: UInts, bound: ArrayLike) -> UInts:
    """Integers in [0, bound) from 64 uniform bits; bound <= 2^32. Their bias is < bound / 2^32."""
    return _below(bits, _uint64(bound))


def permute(index: ArrayLike, size: ArrayLike, key: ArrayLike) -> UInts:
    """Where a keyed permutation of [0, size) sends `index`; uint64, all three broadcast together.

    For a fixed size and key a bijection of [0, size), for every size from 1 to 2^62, in O(1) an
    element. ValueError if an index is not below its size.
    """
    index, size, key = np.broadcast_arrays(_uint64(index), _uint64(size), _uint64(key))
    if index.size and not (bool((index < size).all()) and int(size.max()) <= MAX_SIZE):
        raise ValueError("permute: every index must be in [0, size), and size at most 2^62")
    # a * b >= size, with a * b - size < a: at most about one element in sqrt(size) walks.
    a = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    a = np.maximum(a, 1)
    b = (size + a - np.uint64(1)) // a
    result = _feistel(index, a, b, key)
    outside = np.flatnonzero((result >= size).reshape(-1))
    flat, sizes, lefts, rights, keys = (np.ravel(x) for x in (result, size, a, b, key))
    # Follow the cycle until it comes back into [0, size). It must: `index` itself is inside.
    while outside.size:
        flat[outside] = _feistel(flat[outside], lefts[outside], rights[outside], keys[outside])
        outside = outside[flat[outside] >= sizes[outside]]
    return flat.reshape(index.shape)


def _feistel(index: UInts, a: UInts, b: UInts, key: UInts) -> UInts:
    """One pass over [0, a * b): left and right in turn are rotated by a keyed hash of the other."""
    left = index // b
    right = index - left * b
    keys = _mix(key + _ROUND_CONSTANTS.reshape(-1, *(1,) * key.ndim))
    for r in range(0, _ROUNDS, 2):
        left = left + _below(_mix(right + keys[r]), a)
        left = np.minimum(left, left - a)  # modulo a: below a, left - a wraps to something huge
        right = right + _below(_mix(left + keys[r + 1]), b)
        right = np.minimum(right, right - b)
    return left * b + right


def _below(bits: UInts, bound: UInts) -> UInts:
    return ((bits >> _32) * bound) >> _32


def _mix(x: UInts) -> UInts:
    """SplitMix64's finaliser: a bijection of 64-bit words; every bit depends on every bit."""
    x = (x ^ (x >> _30)) * _MIX_1
    x = (x ^ (x >> _27)) * _MIX_2
    return x ^ (x >> _31)


def _uint64(values: Any) -> UInts:
    """As a uint64 array of one or more dimensions: numpy warns when a scalar product wraps."""
    if isinstance(values, int):
        return np.array([values % 2**64], dtype=np.uint64)
    return np.atleast_1d(np.asarray(values)).astype(np.uint64, copy=False)
