import pytest
import torch

from hdscale.config.loading import load_recipe
from hdscale.config.sections import MaskConfig, RelationConfig
from hdscale.data.loader import RankShare, TrainLoader
from hdscale.data.order import build_order
from hdscale.masking.progressive import keep_least_redundant, progressive_keep_indices
from hdscale.masking.random import random_keep_indices
from hdscale.teachers.build import build_teacher
from hdscale.teachers.targets import TeacherPair, online_keep_indices
from hdscale.types import Batch, ComparedTokens
from tests.helpers.launcher import ROOT


class Counting:
    """A callable around a teacher, as an engine is, that counts the images of each call."""

    def __init__(self, teacher):
        self.teacher = teacher
        self.calls = []

    def __call__(self, images, keep_indices=None):
        self.calls.append(len(images))
        return self.teacher(images, keep_indices)


def batch_of(images, keep_indices=None) -> Batch:
    numbers = torch.arange(len(images))
    return Batch(images, numbers, numbers + 100, numbers % 2, numbers * 0, keep_indices)


def teachers(config, mask):
    relation = build_teacher(config, role="relation", grid_size=4, relation_layers=(-3, -2), mask=mask)
    return Counting(build_teacher(config, role="feature", grid_size=4)), Counting(relation)


def pair_of(feature, relation, mask, *, cls=True, **relation_settings) -> TeacherPair:
    return TeacherPair(
        feature,
        relation,
        relation_config=RelationConfig(**relation_settings),
        mask_config=mask,
        seed=7,
        num_patches=16,
        compared=ComparedTokens(cls_in_relation=cls),
    )


def expected_relation(config, images, layer, keep, *, cls):
    """QK^T / 4 of a whole teacher, cut afterwards."""
    output = build_teacher(config, relation_layers=(layer,))(images)
    relation = output.queries[0].double() @ output.keys[0].double().transpose(-1, -2) / 4
    cut = []
    for one, indices in zip(relation, keep, strict=True):
        rows = torch.tensor(([0] if cls else []) + [1 + int(index) for index in indices])
        cut.append(one[:, rows][:, :, rows])
    return torch.stack(cut)


@pytest.mark.parametrize("strategy", ["progressive", "direct"])
@pytest.mark.parametrize("cls", [True, False])
def test_online_masks_relations_and_features_come_from_one_forward_of_each_group(strategy, cls, tiny_config, images):
    mask = MaskConfig(strategy=strategy, source="online", images_per_forward=4)
    feature, relation = teachers(tiny_config, mask)
    targets = pair_of(feature, relation, mask, cls=cls)(batch_of(images))
    assert relation.calls == [4, 4]
    whole = build_teacher(tiny_config, mask=MaskConfig(layers=(0, 1, 2, 3)))
    tokens = whole(images).stage_tokens
    if strategy == "progressive":
        keep = progressive_keep_indices((tokens[0], tokens[1], tokens[2]), 0.7)
    else:
        keep = keep_least_redundant(tokens[3], 5)
    assert torch.equal(targets.keep_indices, keep)
    for ours, layer in zip(targets.relations, (-3, -2), strict=True):
        reference = expected_relation(tiny_config, images, layer, keep, cls=cls)
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-6)
        assert ours.dtype == torch.float32
    features = whole(images).patch_tokens.gather(1, keep[:, :, None].expand(-1, -1, 48))
    torch.testing.assert_close(targets.features, features, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_the_mask_of_an_image_does_not_depend_on_its_batch(count, tiny_config, images):
    mask = MaskConfig(source="online", images_per_forward=4)
    _, relation = teachers(tiny_config, mask)
    everything = online_keep_indices(relation, images, mask)
    assert torch.equal(online_keep_indices(relation, images[:count], mask), everything[:count])
    assert set(relation.calls) == {4}
    pair = pair_of(None, relation, mask)
    assert torch.equal(pair(batch_of(images)).keep_indices, everything)


def test_stored_masks_choose_the_tokens(tiny_config, images):
    mask = MaskConfig(source="store")
    keep = torch.stack([torch.randperm(16)[:5].sort().values for _ in images])
    feature, relation = teachers(tiny_config, mask)
    targets = pair_of(feature, relation, mask)(batch_of(images, keep))
    assert torch.equal(targets.keep_indices, keep)
    reference = expected_relation(tiny_config, images, -2, keep, cls=True)
    torch.testing.assert_close(targets.relations[1].double(), reference, rtol=1e-5, atol=1e-6)
    assert relation.calls == [6]


@pytest.mark.parametrize("at", ["output", "input"])
def test_a_relation_teacher_that_drops_patches_says_which_and_relates_the_rest(at, tiny_config, images):
    mask = MaskConfig(source="online", in_teacher="drop", at=at, layers=(0, 1), images_per_forward=4)
    feature, relation = teachers(tiny_config, mask)
    targets = pair_of(feature, relation, mask)(batch_of(images))
    assert torch.equal(targets.keep_indices, online_keep_indices(relation, images, mask))
    # The first stage sees what a whole teacher's does; what comes after it has looked at fewer tokens.
    first = build_teacher(tiny_config, mask=MaskConfig(layers=(0,), at=at))(images).stage_tokens[0]
    among = keep_least_redundant(first, 11)
    assert all(
        set(kept.tolist()) < set(first.tolist()) for kept, first in zip(targets.keep_indices, among, strict=True)
    )
    masked_after = expected_relation(tiny_config, images, -2, targets.keep_indices, cls=True)
    assert targets.relations[1].shape == masked_after.shape == (6, 3, 8, 8)
    assert not torch.allclose(targets.relations[1].double(), masked_after, rtol=1e-3)


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("target", ["attention", "features"])
@pytest.mark.parametrize("source", ["online", "store"])
def test_the_relation_teacher_gives_tokens_of_its_layers(source, target, cls, tiny_config, images):
    mask = MaskConfig(source=source, images_per_forward=4)
    layers = {"relation_layers": (-3, -2), "layer_output": target}
    relation = build_teacher(tiny_config, role="relation", grid_size=4, mask=mask, **layers)
    keep = None if source == "online" else torch.stack([torch.randperm(16)[:5].sort().values for _ in images])
    targets = pair_of(None, relation, mask, cls=cls, target=target)(batch_of(images, keep))
    whole = build_teacher(tiny_config, **layers)(images).layer_tokens
    for ours, everything in zip(targets.relations, whole, strict=True):
        rows = [([0] if cls else []) + (1 + kept).tolist() for kept in targets.keep_indices]
        wanted = torch.stack([image[row] for image, row in zip(everything, rows, strict=True)])
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


def test_two_epochs_of_the_demo_with_fresh_views_and_random_masks_repeat_no_mask(digits):
    random = ["data.views=fresh", "mask.strategy=random", "data.workers=0"]
    recipe = load_recipe(ROOT / "launch/recipes/demo_hybrid.yaml", random)
    size, seed, order = 64, recipe.run.seed, build_order(digits.index, recipe.data, recipe.run.seed)
    steps = range(2 * digits.num_samples // size)
    loader = TrainLoader(digits, order, recipe.data, seed, RankShare(0, 1, size, size), steps)
    pair = TeacherPair(
        None,
        None,
        relation_config=recipe.relation,
        mask_config=recipe.mask,
        seed=seed,
        num_patches=64,
        compared=ComparedTokens(cls_in_relation=True),
    )
    seen, shown = set(), set()
    for batch in loader:
        seen |= {tuple(row) for row in pair(batch).keep_indices.tolist()}
        shown |= set(zip(batch.sample_ids.tolist(), batch.epochs.tolist(), strict=True))
    assert len(seen) == len(shown) == len(steps) * size


@pytest.mark.parametrize("random_per", ["epoch", "view"])
def test_random_masks_are_those_of_seed_sample_and_its_epoch_or_view(random_per, tiny_config, images):
    mask = MaskConfig(strategy="random", keep_ratio=0.25, random_per=random_per)
    feature, _ = teachers(tiny_config, mask)
    batch = batch_of(images)._replace(epochs=torch.tensor([4, 5, 4, 5, 6, 7]), views=torch.tensor([0, 1, 0, 1, 2, 3]))
    targets = pair_of(feature, None, mask)(batch)
    numbers = getattr(batch, f"{random_per}s")
    assert torch.equal(targets.keep_indices, random_keep_indices(batch.sample_ids, numbers, 16, 4, 7))
    assert targets.features.shape == (6, 4, 48)
    assert targets.relations == ()


def test_without_masks_every_token_is_compared(tiny_config, images):
    mask = MaskConfig(strategy="none")
    feature, relation = teachers(tiny_config, mask)
    targets = pair_of(feature, relation, mask, heads="merged")(batch_of(images))
    assert targets.keep_indices is None
    assert targets.features.shape == (6, 16, 48)
    assert [layer.shape for layer in targets.relations] == [(6, 1, 17, 17)] * 2
    assert pair_of(None, relation, mask)(batch_of(images)).features is None
