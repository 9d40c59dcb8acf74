"""What a mask store is compared by: the whole of it, typed, and each part when its input changes."""

import pytest

from hdscale.config.sections import MaskConfig
from hdscale.masking.fingerprint import mask_fingerprint

ARGUMENTS = {
    "teacher_digest": "ab12",
    "teacher_normalisation": ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1)),
    "view_fingerprint": {"img_size": 224, "crop_scale": (0.2, 1.0)},
    "index_digest": "9f",
    "seed": 3,
    "precision": "fp32",
    "depth": 24,
}
COMMON = {
    "relation teacher's weights": "ab12",
    "relation teacher's mean and deviation": [[0.5, 0.4, 0.3], [0.2, 0.2, 0.1]],
    "relation teacher's precision": "fp32",
    "index of the shards": "9f",
    "run.seed": 3,
    "mask.images_per_forward": 16,
    "view img_size": 224,
    "view crop_scale": [0.2, 1.0],
}
PROGRESSIVE = COMMON | {
    "mask.strategy": "progressive",
    "mask.stage_keep_ratio": 0.7,
    "mask.layers": [0, 8, 16],
    "mask.at": "output",
}
DIRECT = COMMON | {"mask.strategy": "direct", "mask.keep_ratio": 0.35}


def fingerprint(mask=None, **changes):
    return mask_fingerprint(MaskConfig(**(mask or {})), **ARGUMENTS | changes)


def test_the_fingerprint_of_masks_holds_these_parts_and_no_others():
    assert fingerprint() == PROGRESSIVE
    assert fingerprint({"strategy": "direct"}) == DIRECT


@pytest.mark.parametrize(
    ("mask", "part", "value"),
    [
        ({"stage_keep_ratio": 0.9}, "mask.stage_keep_ratio", 0.9),
        ({"layers": (0, 4)}, "mask.layers", [0, 4]),
        ({"at": "input"}, "mask.at", "input"),
        ({"images_per_forward": 4}, "mask.images_per_forward", 4),
        ({"in_teacher": "drop", "source": "online"}, "mask.in_teacher", "drop"),  # full is what older stores mean
    ],
)
def test_each_setting_of_progressive_masks_changes_its_part_alone(mask, part, value):
    assert fingerprint(mask) == PROGRESSIVE | {part: value}


def test_each_setting_of_direct_masks_changes_its_part_alone():
    assert fingerprint({"strategy": "direct", "keep_ratio": 0.5}) == DIRECT | {"mask.keep_ratio": 0.5}
    assert fingerprint({"strategy": "direct", "images_per_forward": 4}) == DIRECT | {"mask.images_per_forward": 4}


def test_settings_of_another_strategy_or_of_where_masks_lie_change_nothing():
    assert fingerprint({"keep_ratio": 0.9, "store": "elsewhere", "source": "online"}) == PROGRESSIVE
    unused = {"stage_keep_ratio": 0.5, "layers": (1,), "at": "input", "store": "elsewhere", "source": "online"}
    assert fingerprint({"strategy": "direct", **unused}) == DIRECT


@pytest.mark.parametrize(
    ("change", "part", "value"),
    [
        ({"teacher_digest": "cd"}, "relation teacher's weights", "cd"),
        (
            {"teacher_normalisation": ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))},
            "relation teacher's mean and deviation",
            [[0.5, 0.4, 0.3], [0.2, 0.2, 0.2]],
        ),
        ({"precision": "bf16"}, "relation teacher's precision", "bf16"),
        ({"index_digest": "8e"}, "index of the shards", "8e"),
        ({"seed": 0}, "run.seed", 0),
        ({"depth": 12}, "mask.layers", [0, 4, 8]),
        ({"view_fingerprint": {"img_size": 32, "crop_scale": (0.2, 1.0)}}, "view img_size", 32),
    ],
)
def test_each_thing_that_decides_a_mask_changes_its_part_alone(change, part, value):
    assert fingerprint(**change) == PROGRESSIVE | {part: value}
