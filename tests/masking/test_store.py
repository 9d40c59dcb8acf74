"""The mask store: what was written comes back, nothing half-written, and every refusal by name."""

import json
import os
import pickle
import re

import numpy as np
import pytest
import torch

from hdscale.config.sections import MaskConfig
from hdscale.errors import UserError
from hdscale.masking.bits import pack_indices, rows_with_other_count, unpack_indices
from hdscale.masking.fingerprint import mask_fingerprint
from hdscale.masking.random import random_keep_indices
from hdscale.masking.store import MaskStore

NUM_SAMPLES, NUM_PATCHES, NUM_KEEP, VIEWS, PART_SIZE = 21, 13, 4, 2, 8
SIZES = (NUM_SAMPLES, NUM_PATCHES, NUM_KEEP, VIEWS, PART_SIZE)


def fingerprint(**changes):
    parts = {
        "mask": MaskConfig(),
        "teacher_digest": "ab12" * 16,
        "teacher_normalisation": ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
        "view_fingerprint": {"img_size": 224, "crop_scale": (0.2, 1.0)},
        "index_digest": "9f" * 32,
        "seed": 0,
        "precision": "fp32",
        "depth": 24,
    }
    return mask_fingerprint(**{**parts, **changes})


def masks(sample_ids, views):
    return random_keep_indices(np.asarray(sample_ids), views, NUM_PATCHES, NUM_KEEP, seed=1)


def fill(store, places=None):
    for view, part in store.missing_parts() if places is None else places:
        packed = pack_indices(masks(store.part_samples(part), view).numpy(), NUM_PATCHES)
        store.write_part(view, part, packed)


@pytest.fixture
def store(tmp_path):
    made = MaskStore.create(tmp_path / "masks", fingerprint(), *SIZES)
    fill(made)
    return made


def refused(message, call, *args):
    with pytest.raises(UserError, match=message) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


def test_bits_are_one_for_kept_with_the_lowest_patch_in_the_lowest_bit():
    packed = pack_indices(np.array([[0, 9], [1, 12]]), NUM_PATCHES)
    assert packed.dtype == np.uint8
    assert packed.tolist() == [[0b1, 0b10], [0b10, 0b10000]]
    assert unpack_indices(packed, NUM_PATCHES, 2).tolist() == [[0, 9], [1, 12]]


def test_rows_with_another_count_or_bits_past_the_last_patch_are_found():
    packed = np.array([[0b11, 0], [0b111, 0], [0b1, 0b100000], [0, 0b11000]], dtype=np.uint8)
    assert rows_with_other_count(packed, NUM_PATCHES, 2).tolist() == [1, 2]


def test_masks_come_back_by_sample_and_view_across_parts(store):
    reader = MaskStore.open(store.path)
    sample_ids, views = torch.tensor([20, 0, 7, 8, 8, 0]), torch.tensor([0, 1, 0, 1, 0, 0])
    kept = reader.keep_indices(sample_ids, views)
    assert kept.dtype == torch.int64
    assert torch.equal(kept, masks(sample_ids, views))
    assert torch.equal(reader.keep_indices(sample_ids.numpy(), 1), masks(sample_ids, 1))
    assert reader.keep_indices(np.array([], dtype=np.int64), 0).shape == (0, NUM_KEEP)


def test_the_files_are_as_documented(store):
    assert sorted(str(file.relative_to(store.path)) for file in store.path.rglob("*") if file.is_file()) == [
        "manifest.json",
        *(f"view-000{view}/part-0000{part}.npy" for view in range(2) for part in range(3)),
    ]
    part = np.load(store.path / "view-0001/part-00002.npy")
    bits = np.unpackbits(part, axis=1, bitorder="little")
    assert part.shape == (5, 2)
    assert [np.nonzero(row)[0].tolist() for row in bits] == masks(range(16, 21), 1).tolist()


def test_a_store_travels_to_a_worker_without_its_masks(store):
    store.keep_indices(np.arange(NUM_SAMPLES), 0)
    travelled = pickle.dumps(store)
    assert len(travelled) < 3000
    assert torch.equal(pickle.loads(travelled).keep_indices(np.arange(3), 0), masks(range(3), 0))


def test_an_interrupted_store_is_continued_and_may_grow_by_views(tmp_path):
    path = tmp_path / "masks"
    first = MaskStore.create(path, fingerprint(), *SIZES)
    fill(first, [(0, 1), (1, 0)])
    before = (path / "view-0000/part-00001.npy").read_bytes()
    again = MaskStore.create(path, fingerprint(), *SIZES)
    assert again.missing_parts() == [(0, 0), (0, 2), (1, 1), (1, 2)]
    assert again.missing_parts(views=1) == [(0, 0), (0, 2)]
    fill(again)
    again.check(fingerprint(), VIEWS)
    assert (path / "view-0000/part-00001.npy").read_bytes() == before

    grown = MaskStore.create(path, fingerprint(), NUM_SAMPLES, NUM_PATCHES, NUM_KEEP, 3, PART_SIZE)
    assert grown.missing_parts() == [(2, 0), (2, 1), (2, 2)]
    fewer = MaskStore.create(path, fingerprint(), NUM_SAMPLES, NUM_PATCHES, NUM_KEEP, 1, PART_SIZE)
    assert fewer.manifest.views == 3


def test_what_killed_runs_left_half_written_is_removed(tmp_path):
    path = tmp_path / "masks"
    path.mkdir()
    (path / ".manifest.json.123.tmp").write_text("{")
    made = MaskStore.create(path, fingerprint(), *SIZES)
    (path / "view-0000").mkdir()
    (path / "view-0000/.part-00000.npy.123.tmp").write_bytes(b"half")
    fill(made)
    assert list(path.rglob(".*")) == []
    MaskStore.create(path, fingerprint(), *SIZES).check(fingerprint(), VIEWS)


def test_a_write_that_fails_leaves_no_part_behind(tmp_path, monkeypatch):
    made = MaskStore.create(tmp_path / "masks", fingerprint(), *SIZES)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        fill(made, [(0, 0)])
    assert (0, 0) in made.missing_parts()
    assert list((tmp_path / "masks").rglob("*.tmp")) == []
    monkeypatch.undo()
    fill(made)
    made.check(fingerprint(), VIEWS)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (
            {"teacher_digest": "cd34" * 16},
            r"another relation teacher's weights \(sha256 ab12ab12ab12\.{3}, the recipe has sha256 cd34cd34cd34\.{3}\)",
        ),
        ({"precision": "bf16"}, r"another relation teacher's precision \(\"fp32\", the recipe has \"bf16\"\)"),
        ({"index_digest": "8e" * 32}, r"another index of the shards \(sha256 9f9f9f9f9f9f\.\.\., "),
        ({"seed": 5}, r"another run\.seed \(0, the recipe has 5\)"),
        ({"mask": MaskConfig(stage_keep_ratio=0.9)}, r"another mask\.stage_keep_ratio \(0\.7, the recipe has 0\.9\)"),
        (
            {"mask": MaskConfig(strategy="direct")},
            r"another mask\.strategy \(.progressive., the recipe has .direct.\)",
        ),
        ({"mask": MaskConfig(layers=(0, 4))}, r"another mask\.layers \(\[0, 8, 16\], the recipe has \[0, 4\]\)"),
        ({"mask": MaskConfig(at="input")}, r"another mask\.at \(\"output\", the recipe has \"input\"\)"),
        ({"mask": MaskConfig(images_per_forward=4)}, r"another mask\.images_per_forward \(16, the recipe has 4\)"),
        (
            {"view_fingerprint": {"img_size": 224, "crop_scale": (0.5, 1.0)}},
            r"another view crop_scale \(\[0\.2, 1\.0\], the recipe has \[0\.5, 1\.0\]\)",
        ),
    ],
)
def test_masks_of_something_else_are_refused_by_name(store, changes, difference):
    expected = fingerprint(**changes)
    out = r": run launch/precompute_masks\.py with mask\.store=OTHER_FOLDER$"
    refused(rf"manifest\.json: the masks were made with .*{difference}.*{out}", store.check, expected, VIEWS)
    refused(difference.split(", the recipe")[0], MaskStore.create, store.path, expected, *SIZES)


def test_settings_that_the_strategy_does_not_use_do_not_count(store):
    store.check(fingerprint(mask=MaskConfig(keep_ratio=0.9, store="elsewhere", source="online")), VIEWS)
    store.check(fingerprint(mask=MaskConfig(layers=(0, 8, 16))), VIEWS)
    direct = fingerprint(mask=MaskConfig(strategy="direct"))
    assert direct == fingerprint(mask=MaskConfig(strategy="direct", stage_keep_ratio=0.5, layers=(1,), at="input"))
    assert direct != fingerprint(mask=MaskConfig(strategy="direct", keep_ratio=0.5))


def test_a_store_of_other_sizes_is_not_continued(store):
    refused(r"another num_keep \(4, this run has 5\)", MaskStore.create, store.path, fingerprint(), 21, 13, 5, 2, 8)


def test_too_few_views_and_missing_parts_are_refused(store):
    refused(r"masks of 2 views, data\.views is 3: run launch/precompute", store.check, fingerprint(), 3)
    (store.path / "view-0001/part-00002.npy").unlink()
    store.check(fingerprint(), 1)
    message = r"view-0001/part-00002\.npy: missing.* run launch/precompute_masks\.py again"
    refused(message, store.check, fingerprint(), VIEWS)
    refused(message, MaskStore.open(store.path).keep_indices, np.array([18]), 1)


@pytest.mark.parametrize("content", [b"", b"not numpy"])
def test_a_part_that_is_not_an_array_is_refused(store, content):
    (store.path / "view-0000/part-00001.npy").write_bytes(content)
    message = r"view-0000/part-00001\.npy: must be uint8 \(8, 2\), got an unreadable file: delete this file"
    refused(message, store.check, fingerprint(), VIEWS)


def test_a_cut_part_and_one_of_another_shape_are_refused(store):
    part = store.path / "view-0000/part-00001.npy"
    part.write_bytes(part.read_bytes()[:-3])
    refused(r"part-00001\.npy: must be uint8 \(8, 2\), got an unreadable", store.check, fingerprint(), VIEWS)
    np.save(part, np.zeros((8, 3), dtype=np.uint8))
    refused(r"part-00001\.npy: must be uint8 \(8, 2\), got uint8 \(8, 3\)", store.check, fingerprint(), VIEWS)


def test_a_mask_with_another_number_of_patches_is_refused_when_read(store):
    part = store.path / "view-0001/part-00000.npy"
    packed = np.load(part)
    packed[3] = 0xFF
    np.save(part, packed)
    reader = MaskStore.open(store.path)
    reader.keep_indices(np.array([2, 4]), 1)
    message = r"view-0001/part-00000\.npy: the mask of sample 3 does not keep 4 of 13 patches: delete this file"
    refused(message, reader.keep_indices, np.array([2, 3]), 1)


def test_folders_that_are_no_store_are_refused(tmp_path):
    refused(r"masks/manifest\.json: no mask store there: run launch/precompute", MaskStore.open, tmp_path / "masks")
    (tmp_path / "photo.jpg").touch()
    refused(r"must be an empty folder, found photo\.jpg", MaskStore.create, tmp_path, fingerprint(), *SIZES)
    refused(r"photo\.jpg: mask\.store cannot", MaskStore.create, tmp_path / "photo.jpg", fingerprint(), *SIZES)
    for content in ("{", "[]", json.dumps({"format": 2}), json.dumps({"format": 1, "views": 1})):
        (tmp_path / "manifest.json").write_text(content)
        refused(r"manifest\.json: not a mask store's manifest of format 1", MaskStore.open, tmp_path)


def test_a_fingerprint_survives_the_manifest(store):
    assert MaskStore.open(store.path).manifest == store.manifest
    assert store.manifest.fingerprint == fingerprint()
    assert re.search(r'"mask.layers": \[\s*0,\s*8,\s*16\s*\]', (store.path / "manifest.json").read_text())
