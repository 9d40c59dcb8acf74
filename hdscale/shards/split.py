"""Which picture goes into which split and shard, and which machine writes which shard.

Names and a seed decide it before anything is written.
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

import numpy as np

from hdscale.errors import UserError
from hdscale.hashing import hash64, uniform
from hdscale.shards.sources.base import Listing, sample_key

VAL_SPLIT = "val"
_SHUFFLE_KEY = 0x73687566666C65  # "shuffle": separates the two uses of a key's hash
_SPLIT_KEY = 0x73706C6974  # "split"


class SplitSettings(NamedTuple):
    """What decides the content of shards, beside the source."""

    split: str = "train"
    val_fraction: float | None = None
    """Share of the pictures that goes into the split `val`; None: all go into `split`."""
    samples_per_shard: int = 5000
    seed: int = 0


class MachineShare(NamedTuple):
    """The shards of one machine among several that make the same split: `--part number/total`."""

    number: int  # 1 .. total
    total: int

    def owns(self, shard: int) -> bool:
        """Say whether this machine writes the shard of that number."""
        return shard % self.total == self.number - 1


def parse_part(text: str) -> MachineShare:
    """Read the option `--part`, such as 2/4 for the second of four machines.

    Raises:
        UserError: it is something else.
    """
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--part must be i/n with i from 1 to n, such as 2/4 for the second of four, got {text}")
    return MachineShare(int(match[1]), int(match[2]))


def check_settings(settings: SplitSettings) -> None:
    """Raise a UserError for settings that make no sense."""
    split, val_fraction, samples_per_shard, _ = settings
    if not split or not all(letter.isalnum() or letter in "-_" for letter in split):
        raise UserError(f"--split must be letters, digits, - and _, got {split!r}")
    if samples_per_shard < 1:
        raise UserError(f"--samples-per-shard must be at least 1, got {samples_per_shard}")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction must be between 0 and 1, got {val_fraction}: leave it out for a single split")
    if val_fraction is not None and split == VAL_SPLIT:
        raise UserError("--val-fraction names the held-out split val itself: give another --split, or no fraction")


def assign_splits(listing: Listing, settings: SplitSettings) -> dict[str, np.ndarray]:
    """Assign each picture of a listing to a split, and shuffle the splits.

    The side on which a picture falls depends on its key alone, so that it stays there when other pictures come or the
    seed changes. Shards are consecutive stretches of the result.

    Returns:
        By the name of each split, (n,) rows of the listing in the order in which they are written.

    Raises:
        UserError: a split would be empty.
    """
    keys = np.fromiter(map(_key_hash, listing.names), dtype=np.uint64, count=len(listing.names))
    order = np.argsort(hash64(settings.seed, _SHUFFLE_KEY, keys), kind="stable")
    if settings.val_fraction is None:
        return {settings.split: order}
    held_out = uniform(hash64(_SPLIT_KEY, keys[order])) < settings.val_fraction
    for name, count in ((settings.split, np.sum(~held_out)), (VAL_SPLIT, np.sum(held_out))):
        if not count:
            raise UserError(
                f"--val-fraction {settings.val_fraction} leaves no picture for {name} among {len(keys)}: "
                "choose another fraction, or give more pictures"
            )
    return {settings.split: order[~held_out], VAL_SPLIT: order[held_out]}


def _key_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(sample_key(name).encode()).digest()[:8], "little")
