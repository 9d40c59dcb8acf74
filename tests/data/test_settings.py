"""Every setting of `data` reaches what the loader delivers, and what a resume compares tells of it."""

from typing import NamedTuple

import pytest
import torch

from hdscale.config.loading import changed_fields, load_recipe
from hdscale.config.sections import DataConfig
from hdscale.data import fingerprint as fingerprint_module
from hdscale.data.decode import INTERPOLATION, decode_view, decoder_version
from hdscale.data.fingerprint import view_fingerprint
from hdscale.data.loader import RankShare, SequentialLoader, TrainLoader
from hdscale.data.order import build_order
from hdscale.data.views import view_parameters

SEED = 11
SHARE = RankShare(rank=0, world_size=1, global_batch_size=64, micro_batch_size=32)
START = 1797 // 64 - 1  # so that two epochs meet in what is compared


class Change(NamedTuple):
    """What another value of a setting changes."""

    value: object
    pixels: bool = False  # of the same sample in the same epoch
    order: bool = False
    fingerprint: bool = False
    free: bool = False  # a resume may change it


CHANGES = {
    "order": Change("global", order=True),
    "window_shards": Change(9, order=True),
    "img_size": Change(9, pixels=True, fingerprint=True),
    "views": Change(1, pixels=True),  # left out of the fingerprint, for stores of fewer views; the recipe tells
    "crop_scale": Change((0.1, 0.15), pixels=True, fingerprint=True),
    "crop_ratio": Change((2.0, 3.0), pixels=True, fingerprint=True),
    "hflip": Change(0.0, pixels=True, fingerprint=True),
    "workers": Change(1, free=True),
    "max_bad_fraction": Change(0.5, free=True),
}
WHICH_SHARDS = {"shards", "split"}  # whoever opens them reads these two; the digest of the index tells


def delivered(shards, config, seed=SEED):
    """Sample ids by place in the stream, and pixels by epoch and sample."""
    loader = TrainLoader(shards, build_order(shards.index, config, seed), config, seed, SHARE, range(START, START + 3))
    ids, pictures = [], {}
    for batch in loader:
        ids += batch.sample_ids.tolist()
        for image, sample, epoch in zip(batch.images, batch.sample_ids.tolist(), batch.epochs.tolist(), strict=True):
            pictures[epoch, sample] = image
    assert {epoch for epoch, _ in pictures} == {0, 1}
    return ids, pictures


def equal_pixels(left, right):
    common = left.keys() & right.keys()
    assert common
    return all(torch.equal(left[key], right[key]) for key in common)


def test_every_setting_is_in_the_table():
    assert CHANGES.keys() | WHICH_SHARDS == DataConfig.model_fields.keys()


@pytest.mark.parametrize("field", CHANGES)
def test_another_value_of_a_setting_changes_what_is_delivered_and_what_a_resume_compares(field, digits, view_config):
    change = CHANGES[field]
    other = view_config.model_copy(update={field: change.value})
    (ids, pictures), (other_ids, other_pictures) = delivered(digits, view_config), delivered(digits, other)
    assert (ids != other_ids) == change.order
    assert equal_pixels(pictures, other_pictures) != change.pixels

    before, after = view_fingerprint(view_config, SEED), view_fingerprint(other, SEED)
    assert {name for name in before if before[name] != after[name]} == ({field} if change.fingerprint else set())
    recipe = load_recipe(None)
    recipes = [recipe.model_copy(update={"data": config}) for config in (view_config, other)]
    assert [name for name, *_ in changed_fields(*recipes)] == ([] if change.free else [f"data.{field}"])


def test_the_seed_changes_order_pixels_and_fingerprint(digits, view_config):
    (ids, pictures), (other_ids, other_pictures) = (delivered(digits, view_config, seed) for seed in (SEED, 12))
    assert ids != other_ids
    assert not equal_pixels(pictures, other_pictures)
    assert view_fingerprint(view_config, 12) == view_fingerprint(view_config, SEED) | {"seed": 12}


def test_a_view_is_drawn_with_the_settings_and_no_default_of_the_code(digits, view_config):
    settings = {"img_size": 10, "crop_scale": (0.3, 0.4), "crop_ratio": (1.5, 2.5), "hflip": 0.9}
    config = view_config.model_copy(update=settings)
    loader = SequentialLoader(digits, config, SEED, sample_ids=range(40), view=3, batch_size=40)
    (batch,) = loader
    flips = 0
    for row, image in enumerate(batch.images):
        box = view_parameters(SEED, 3, row, 8, 8, scale=(0.3, 0.4), ratio=(1.5, 2.5), hflip=0.9)
        flips += box.flip
        assert box.width > box.height
        assert torch.equal(image, decode_view(digits.read(row), (8, 8), box, 10))
    assert 30 < flips < 40


def test_the_fingerprint_of_views_holds_these_parts_and_no_others(view_config):
    assert view_fingerprint(view_config, SEED) == {
        "seed": 11,
        "img_size": 8,
        "crop_scale": [0.2, 1.0],
        "crop_ratio": [3 / 4, 4 / 3],
        "hflip": 0.5,
        "interpolation": INTERPOLATION,
        "view_algorithm": 1,
        "decoder": decoder_version(),
    }


@pytest.mark.parametrize(
    ("part", "home", "value"),
    [
        ("decoder", "decoder_version", lambda: "another"),
        ("interpolation", "INTERPOLATION", "another"),
        ("view_algorithm", "VIEW_ALGORITHM", "another"),
    ],
)
def test_the_fingerprint_of_views_tells_of_the_code_that_makes_them(part, home, value, view_config, monkeypatch):
    before = view_fingerprint(view_config, SEED)
    monkeypatch.setattr(fingerprint_module, home, value)
    assert view_fingerprint(view_config, SEED) == before | {part: "another"}


@pytest.mark.parametrize("package", ["torch", "torchvision", "PIL"])
def test_the_version_of_the_decoder_names_each_package_that_makes_pixels(package, monkeypatch):
    before = decoder_version()
    monkeypatch.setattr(f"hdscale.data.decode.{package}.__version__", "99.9")
    assert "99.9" in decoder_version()
    assert decoder_version() != before
