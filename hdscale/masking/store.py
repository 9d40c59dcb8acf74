"""Masks made ahead of training, for every sample and view, and found by sample id.

    masks/manifest.json              what the masks were made from, and their sizes
    masks/view-0000/part-00000.npy   `part_size` consecutive sample ids, (n, ceil(N / 8)) uint8, 1 = kept

A part has one writer, which stages and renames it: a part that exists is complete.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from hdscale.errors import UserError
from hdscale.hashing import short_value
from hdscale.masking.bits import row_bytes, rows_with_other_count, unpack_indices
from hdscale.staging import remove_leftovers, staged

FORMAT = 1
"""Of manifest and parts."""
PART_SIZE = 131_072
"""Sample ids per part."""
OPEN_PARTS = 128
"""Parts that a reader keeps mapped: one view of ImageNet-21K has 109, and each takes a file descriptor."""

RUN_PRECOMPUTE = "run launch/precompute_masks.py"
OTHER_STORE = f"{RUN_PRECOMPUTE} with mask.store=OTHER_FOLDER"


class StoreManifest(NamedTuple):
    """What masks/manifest.json says."""

    fingerprint: dict[str, Any]  # of what decides a mask, from `mask_fingerprint`
    num_samples: int
    num_patches: int
    num_keep: int
    views: int
    part_size: int


class MaskStore:
    """A folder of masks; reading is safe in loader workers, writing is one part per writer."""

    def __init__(self, path: Path, manifest: StoreManifest) -> None:
        self.path = path
        self.manifest = manifest
        self._cached_part = functools.lru_cache(maxsize=OPEN_PARTS)(self._open_part)

    def __reduce__(self) -> tuple[type[MaskStore], tuple[Path, StoreManifest]]:
        """Travel to a worker process as path and sizes: pickled memory maps would carry the masks themselves."""
        return type(self), (self.path, self.manifest)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a store.

        Raises:
            UserError: no store there, or its manifest is unreadable.
        """
        return cls(Path(path), _read_manifest(Path(path)))

    @classmethod
    def create(
        cls,
        path: str | Path,
        fingerprint: dict[str, Any],
        num_samples: int,
        num_patches: int,
        num_keep: int,
        views: int,
        part_size: int = PART_SIZE,
    ) -> Self:
        """Make a store, or continue one made from the same things; call it on one rank, then `open` on the others.

        Args:
            path: the store's folder.
            fingerprint: from `mask_fingerprint`.
            num_samples: rows of the index.
            num_patches: N.
            num_keep: K.
            views: augmented views of each sample; an existing store may grow.
            part_size: sample ids per part.

        Raises:
            UserError: the folder holds something else, or masks made from something else, or cannot be written.
        """
        path = Path(path)
        wanted = StoreManifest(fingerprint, num_samples, num_patches, num_keep, views, part_size)
        try:
            if (path / "manifest.json").exists():
                found = _read_manifest(path)
                _refuse_differences(path, _parts(found), _parts(wanted), "this run has")
                wanted = wanted._replace(views=max(views, found.views))
                if wanted.views == found.views:
                    return cls(path, found)
            path.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path, "manifest.json")
            foreign = sorted(entry.name for entry in path.iterdir())
            if foreign and not (path / "manifest.json").exists():
                raise UserError(f"{path}: mask.store must be an empty folder, found {foreign[0]}: choose another")
            with staged(path / "manifest.json") as temporary:
                temporary.write_text(json.dumps({"format": FORMAT, **wanted._asdict()}, indent=2))
        except OSError as error:
            raise UserError(f"{path}: mask.store cannot be written ({error.strerror}): choose another") from error
        return cls.open(path)

    def part_samples(self, part: int) -> range:
        """Return the sample ids that a part holds."""
        start = part * self.manifest.part_size
        return range(start, min(start + self.manifest.part_size, self.manifest.num_samples))

    def missing_parts(self, views: int | None = None) -> list[tuple[int, int]]:
        """List (view, part) that nobody has written yet, of the first `views` views or of all."""
        num_parts = -(-self.manifest.num_samples // self.manifest.part_size)
        every = ((view, part) for view in range(views or self.manifest.views) for part in range(num_parts))
        return [place for place in every if not self._part_path(*place).exists()]

    def write_part(self, view: int, part: int, packed: np.ndarray) -> None:
        """Write the masks of `part_samples(part)` in one view, all or nothing.

        Those of n samples are (n, ceil(N / 8)) uint8, from `pack_indices`.
        """
        sizes = self.manifest
        assert packed.dtype == np.uint8, packed.dtype
        assert packed.shape == self._part_shape(part), packed.shape
        assert not len(rows_with_other_count(packed, sizes.num_patches, sizes.num_keep)), "masks of another size"
        target = self._part_path(view, part)
        target.parent.mkdir(exist_ok=True)
        remove_leftovers(target.parent, target.name)
        with staged(target) as temporary, temporary.open("wb") as file:
            np.save(file, np.ascontiguousarray(packed))

    def keep_indices(self, sample_ids: np.ndarray | Tensor, view: int | np.ndarray | Tensor) -> Tensor:
        """Look masks up.

        Args:
            sample_ids: (B,) rows of the index.
            view: the augmented view of each sample: (B,), or one for all.

        Returns:
            (B, K) int64, ascending, on the CPU.

        Raises:
            UserError: a part is missing or damaged.
        """
        samples = np.asarray(torch.as_tensor(sample_ids).cpu())
        views = np.broadcast_to(np.asarray(torch.as_tensor(view).cpu()), samples.shape)
        sizes = self.manifest
        assert not len(samples) or 0 <= samples.min() <= samples.max() < sizes.num_samples, "no such sample"
        packed = np.empty((len(samples), row_bytes(sizes.num_patches)), dtype=np.uint8)
        parts, rows = np.divmod(samples, sizes.part_size)
        for place in np.unique(np.stack([views, parts], axis=1), axis=0):
            here = (views == place[0]) & (parts == place[1])
            packed[here] = self._cached_part(int(place[0]), int(place[1]))[rows[here]]
        wrong = rows_with_other_count(packed, sizes.num_patches, sizes.num_keep)
        if len(wrong):
            first = int(wrong[0])
            raise UserError(
                f"{self._part_path(int(views[first]), int(parts[first]))}: the mask of sample {samples[first]} does "
                f"not keep {sizes.num_keep} of {sizes.num_patches} patches: delete this file and {RUN_PRECOMPUTE} again"
            )
        return torch.from_numpy(unpack_indices(packed, sizes.num_patches, sizes.num_keep))

    def check(self, expected: dict[str, Any], views_needed: int) -> None:
        """Refuse masks that were made from something else, or are not all there.

        Args:
            expected: the recipe's `mask_fingerprint`.
            views_needed: data.views.

        Raises:
            UserError: each difference by name, or the part that is missing or damaged.
        """
        _refuse_differences(self.path, self.manifest.fingerprint, expected, "the recipe has")
        if self.manifest.views < views_needed:
            raise UserError(
                f"{self.path / 'manifest.json'}: has masks of {self.manifest.views} views, data.views is "
                f"{views_needed}: {RUN_PRECOMPUTE} again, it adds the rest"
            )
        if missing := self.missing_parts(views_needed):
            raise UserError(
                f"{self._part_path(*missing[0])}: missing, with {len(missing) - 1} more: {RUN_PRECOMPUTE} again, "
                "it continues where it stopped"
            )
        for view in range(views_needed):
            for part in range(-(-self.manifest.num_samples // self.manifest.part_size)):
                self._open_part(view, part)

    def _part_path(self, view: int, part: int) -> Path:
        return self.path / f"view-{view:04d}" / f"part-{part:05d}.npy"

    def _part_shape(self, part: int) -> tuple[int, int]:
        return len(self.part_samples(part)), row_bytes(self.manifest.num_patches)

    def _open_part(self, view: int, part: int) -> np.ndarray:
        path, shape = self._part_path(view, part), self._part_shape(part)
        if not path.exists():
            raise UserError(f"{path}: missing: {RUN_PRECOMPUTE} again, it continues where it stopped")
        try:
            packed = np.load(path, mmap_mode="r", allow_pickle=False)
            found = f"{packed.dtype} {packed.shape}"
        except (OSError, ValueError, EOFError):
            packed, found = None, "an unreadable file"
        if packed is None or packed.dtype != np.uint8 or packed.shape != shape:
            raise UserError(f"{path}: must be uint8 {shape}, got {found}: delete this file and {RUN_PRECOMPUTE} again")
        return packed


def _read_manifest(path: Path) -> StoreManifest:
    file = path / "manifest.json"
    if not file.is_file():
        raise UserError(f"{file}: no mask store there: {RUN_PRECOMPUTE} first, or set mask.store or mask.source=online")
    try:
        content = json.loads(file.read_text())
        if content.pop("format") != FORMAT:
            raise ValueError(f"format must be {FORMAT}")
        return StoreManifest(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: not a mask store's manifest of format {FORMAT} ({error}): {OTHER_STORE}") from error


def _parts(manifest: StoreManifest) -> dict[str, Any]:
    sizes = {"num_samples": manifest.num_samples, "num_patches": manifest.num_patches, "num_keep": manifest.num_keep}
    return {**manifest.fingerprint, **sizes, "part_size": manifest.part_size}


def _refuse_differences(path: Path, found: dict[str, Any], wanted: dict[str, Any], who: str) -> None:
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if names:
        differences = ", ".join(
            f"another {name} ({short_value(found.get(name), json.dumps)}, {who} "
            f"{short_value(wanted.get(name), json.dumps)})"
            for name in names
        )
        raise UserError(f"{path / 'manifest.json'}: the masks were made with {differences}: {OTHER_STORE}")
