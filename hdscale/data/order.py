"""Which sample stands at which place of which epoch: a pure function of the seed, without state.

Training reads one endless stream of positions. Position p is place p % n of epoch p // n, so a batch may straddle two
epochs and the state of a resumed run is one number. Ranks and workers only choose which positions they serve.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from typing import Protocol

import numpy as np

from hdscale.config.sections import DataConfig
from hdscale.hashing import hash64, hash_int

_SHARD_KEY = 0x7368617264  # "shard": separates this use of the seed from the others
_PLACE_KEY = 0x706C616365  # "place"
_ROUNDS = 4
_STRETCH = 1 << 15  # 256 KiB of int64


class Order(Protocol):
    """A permutation of the samples for every epoch."""

    num_samples: int

    def sample_ids(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Return the samples at these places of that epoch, int64, in the shape of `places` (values 0 .. n - 1)."""
        ...


def build_order(index: np.ndarray, config: DataConfig, seed: int) -> Order:
    """Build the order of `config.order` over an index.

    Args:
        index: (n,) records with a field `shard`, rising.
        config: `order` and `window_shards` are used.
        seed: `run.seed`.
    """
    if config.order == "global":
        return GlobalOrder(len(index), seed)
    return WindowedOrder(_shard_sizes(index["shard"]), config.window_shards, seed)


def _shard_sizes(shard_of_sample: np.ndarray) -> np.ndarray:
    """Count the samples of each shard by binary search, which leaves most of a memory-mapped index on the disk."""
    starts = [0]
    while starts[-1] < len(shard_of_sample):
        starts.append(bisect_left(shard_of_sample, len(starts), lo=starts[-1]))
    return np.diff(starts)


class GlobalOrder:
    """One permutation of all samples per epoch, computed place by place: it needs no memory."""

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed

    def sample_ids(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Return the samples at these places of that epoch."""
        return permute(places, self.num_samples, hash_int(self.seed, _PLACE_KEY, epoch))


class WindowedOrder:
    """Shards permuted every epoch, then the samples of `window_shards` shards at a time permuted among themselves.

    A reader then touches few files at once, which network file systems need.
    """

    def __init__(self, shard_sizes: np.ndarray, window_shards: int, seed: int) -> None:
        """Take the samples of each shard, (number of shards,) integers, in the order of the index."""
        self.num_samples = int(shard_sizes.sum())
        self.window_shards = window_shards
        self.seed = seed
        self._sizes = shard_sizes.astype(np.int64)
        self._first_ids = np.cumsum(self._sizes) - self._sizes
        self._layout: tuple[int, np.ndarray, np.ndarray] | None = None
        self._window: tuple[tuple[int, int], np.ndarray] | None = None

    def sample_ids(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Return the samples at these places of that epoch."""
        places = np.asarray(places, dtype=np.int64)
        flat = places.ravel()
        first_places = self._shards_of(epoch)[1][:: self.window_shards]
        window = np.searchsorted(first_places, flat, side="right") - 1
        by_window = np.argsort(window, kind="stable")
        edges = np.flatnonzero(np.diff(window[by_window])) + 1
        sample_ids = np.empty_like(flat)
        for chosen in np.split(by_window, edges) if flat.size else ():
            number = int(window[chosen[0]])
            members = self._members_of(epoch, number)
            key = hash_int(self.seed, _PLACE_KEY, epoch, number)
            sample_ids[chosen] = members[permute(flat[chosen] - first_places[number], len(members), key)]
        return sample_ids.reshape(places.shape)

    def _members_of(self, epoch: int, window: int) -> np.ndarray:
        """Return the sample ids of a window, shard after shard."""
        if self._window is None or self._window[0] != (epoch, window):
            turns = slice(window * self.window_shards, (window + 1) * self.window_shards)
            shards = self._shards_of(epoch)[0][turns]
            extents = zip(self._first_ids[shards].tolist(), self._sizes[shards].tolist(), strict=True)
            ids = [np.arange(first, first + size) for first, size in extents]
            self._window = ((epoch, window), np.concatenate(ids))
        return self._window[1]

    def _shards_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an epoch's shards in their order, and the place at which each of them starts."""
        # Kept for one epoch: 14,000 shards take a few milliseconds, and every batch asks.
        if self._layout is None or self._layout[0] != epoch:
            filled = np.flatnonzero(self._sizes)
            turns = permute(np.arange(len(filled)), len(filled), hash_int(self.seed, _SHARD_KEY, epoch))
            shards = filled[turns]
            self._layout = (epoch, shards, np.cumsum(self._sizes[shards]) - self._sizes[shards])
        return self._layout[1], self._layout[2]


def permute(places: np.ndarray, n: int, key: int) -> np.ndarray:
    """Apply the permutation of 0 .. n - 1 that belongs to a key.

    A balanced Feistel network (Luby and Rackoff 1988) on the smallest even number of bits that holds n; a value that
    falls outside is sent through again until it falls inside (cycle walking, Black and Rogaway 2002).

    Args:
        places: any shape, integers in 0 .. n - 1.
        n: at least 1.
        key: 64 bits.

    Returns:
        The same shape, int64.
    """
    values = np.asarray(places, dtype=np.int64)
    assert n >= 1
    assert not values.size or (values.min() >= 0 and values.max() < n)
    half = ((n - 1).bit_length() + 1) // 2
    scrambled = _scrambled(key, half)
    permuted = np.empty(values.size, dtype=np.int64)
    for start in range(0, values.size, _STRETCH):  # short enough for the processor's cache
        flat = _feistel(values.ravel()[start : start + _STRETCH], scrambled)
        outside = np.flatnonzero(flat >= n)
        while len(outside):
            again = _feistel(flat[outside], scrambled)
            flat[outside] = again
            outside = outside[again >= n]
        permuted[start : start + _STRETCH] = flat
    return permuted.reshape(values.shape)


@lru_cache(maxsize=8)
def _scrambled(key: int, half: int) -> np.ndarray:
    """Hash every half of a value for every round, once: (rounds, 2**half) int64, 4,096 halves for ImageNet-21K."""
    halves = np.arange(1 << half, dtype=np.int64)
    hashes = hash64(key, np.arange(_ROUNDS)[:, None], halves)
    return (hashes & np.uint64(len(halves) - 1)).astype(np.int64)


def _feistel(values: np.ndarray, scrambled: np.ndarray) -> np.ndarray:
    halves = scrambled.shape[1]
    left, right = values // halves, values % halves
    for hashes in scrambled:
        left, right = right, left ^ hashes[right]
    return left * halves + right


def positions_of(
    step: int, rank: int, world_size: int, micro_batch_size: int, gradient_accumulation_steps: int
) -> np.ndarray:
    """Return the positions that one rank serves in one optimizer step.

    The global batch of step s is positions s * G .. (s + 1) * G - 1, whatever the number of ranks; micro-step a takes a
    consecutive stretch of it, and rank r the r-th part of that stretch.

    Returns:
        (gradient_accumulation_steps, micro_batch_size) int64.
    """
    per_micro_step = micro_batch_size * world_size
    start = step * per_micro_step * gradient_accumulation_steps + rank * micro_batch_size
    micro_steps = np.arange(gradient_accumulation_steps, dtype=np.int64)[:, None] * per_micro_step
    return start + micro_steps + np.arange(micro_batch_size, dtype=np.int64)


def samples_at(order: Order, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Look up positions of the endless stream.

    Args:
        order: the permutation of every epoch.
        positions: (B,) integers, at least 0.

    Returns:
        Sample ids and epochs, each (B,) int64.
    """
    epochs = positions // order.num_samples
    places = positions % order.num_samples
    sample_ids = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        sample_ids[chosen] = order.sample_ids(int(epoch), places[chosen])
    return sample_ids, epochs
