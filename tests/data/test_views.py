import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import RandomResizedCrop

from hdscale.config.sections import DataConfig
from hdscale.data.views import central_square, view_number, view_parameters

GOLDEN_VIEWS = [
    (80, 41, 401, 327, True),
    (145, 93, 229, 221, True),
    (234, 122, 201, 217, True),
    (97, 19, 267, 231, False),
]


def test_the_views_of_released_versions_never_change():
    drawn = [tuple(view_parameters(3, view, sample, 500, 375)) for view in (0, 1) for sample in (0, 14_000_000)]
    assert drawn == GOLDEN_VIEWS


@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    sample_id=st.integers(0, 10**8),
    low=st.floats(0.01, 1),
    ratios=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(lambda pair: (min(pair), max(pair))),
)
@settings(max_examples=300, deadline=None)
def test_the_box_lies_inside_the_picture(width, height, sample_id, low, ratios):
    box = view_parameters(0, 0, sample_id, width, height, scale=(low, 1.0), ratio=ratios)
    assert box.width >= 1
    assert box.height >= 1
    assert 0 <= box.left <= width - box.width
    assert 0 <= box.top <= height - box.height


def test_the_boxes_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    picture = torch.empty(3, 375, 500)
    transform = RandomResizedCrop(224, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
    theirs = [transform.make_params([picture]) for _ in range(4000)]
    ours = [view_parameters(0, 0, sample, 500, 375) for sample in range(4000)]
    for field in ("left", "top", "width", "height"):
        expected = np.array([box[field] for box in theirs], dtype=float)
        drawn = np.array([getattr(box, field) for box in ours], dtype=float)
        for share in (0.05, 0.25, 0.5, 0.75, 0.95):
            assert np.quantile(drawn, share) == pytest.approx(np.quantile(expected, share), abs=12), (field, share)
    assert np.mean([box.flip for box in ours]) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (7, 3), (1, 1), (40, 40)])
def test_a_picture_without_room_for_the_crop_gets_torchvisions_central_box(width, height):
    # a share of 1 and a shape the picture does not have: no try can succeed
    box = view_parameters(0, 0, 0, width, height, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    expected = RandomResizedCrop(8, scale=(1.0, 1.0), ratio=(1.0, 1.0)).make_params([torch.empty(3, height, width)])
    assert box[:4] == (expected["left"], expected["top"], expected["width"], expected["height"])


def test_sample_view_and_seed_each_change_the_box():
    boxes = {tuple(view_parameters(*arguments, 500, 375)) for arguments in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(boxes) == 4


@pytest.mark.parametrize(("hflip", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_the_flip_can_be_never_and_always(hflip, share):
    assert np.mean([view_parameters(0, 0, sample, 9, 9, hflip=hflip).flip for sample in range(50)]) == share


def test_epochs_repeat_views_unless_they_are_fresh():
    epochs = np.arange(6)
    assert view_number(DataConfig(views=4), epochs).tolist() == [0, 1, 2, 3, 0, 1]
    assert view_number(DataConfig(views="fresh"), epochs).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("width", "height", "box"), [(61, 40, (10, 0, 40, 40)), (40, 61, (0, 10, 40, 40)), (1, 9, (0, 4, 1, 1))]
)
def test_held_out_samples_show_their_central_square(width, height, box):
    assert central_square(width, height) == (*box, False)
