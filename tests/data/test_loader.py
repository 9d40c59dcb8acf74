import numpy as np
import pytest
import torch

from hdscale.data.decode import decode_view
from hdscale.data.fingerprint import view_fingerprint
from hdscale.data.loader import RankShare, SequentialLoader, TrainLoader, accumulation_steps
from hdscale.data.order import build_order
from hdscale.data.samples import EVAL_VIEW, substitute
from hdscale.data.views import central_square, view_parameters
from hdscale.errors import UserError

SEED = 11


@pytest.fixture
def train_loader(digits, view_config):
    """Build the loader of one rank; keyword arguments replace the defaults."""

    def build(*, config=None, start_step=0, num_steps=4, look_up_masks=None, **changes):
        config, order = config or view_config, build_order(digits.index, config or view_config, SEED)
        share = RankShare(rank=0, world_size=1, global_batch_size=64, micro_batch_size=16)._replace(**changes)
        steps = range(start_step, start_step + num_steps)
        return TrainLoader(digits, order, config, SEED, share, steps, look_up_masks)

    return build


def joined(loader):
    """All batches of a loader as one, keep_indices left out."""
    batches = list(loader)
    return [torch.cat([batch[field] for batch in batches]) for field in range(5)]


def global_batches(train_loader, world_size, **changes):
    """Sample ids of each step over all ranks, sorted: (steps, global batch)."""
    ranks = [joined(train_loader(rank=rank, world_size=world_size, **changes))[2] for rank in range(world_size)]
    steps = [ids.view(changes["num_steps"], -1) for ids in ranks]
    return torch.cat(steps, dim=1).sort(dim=1).values


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (3, 2)])
def test_every_sample_comes_exactly_once_an_epoch(train_loader, digits, view_config, world_size, workers):
    config = view_config.model_copy(update={"workers": workers})
    steps = 2 * digits.num_samples // 48  # two epochs, without the last incomplete batch
    sizes = {"global_batch_size": 48, "micro_batch_size": 8, "num_steps": steps, "config": config}
    ranks = [joined(train_loader(rank=rank, world_size=world_size, **sizes)) for rank in range(world_size)]
    ids, epochs = (torch.cat([rank[field] for rank in ranks]).numpy() for field in (2, 4))
    assert np.array_equal(np.sort(ids[epochs == 0]), np.arange(digits.num_samples))
    second = ids[epochs == 1]
    assert len(np.unique(second)) == len(second) == steps * 48 - digits.num_samples
    assert set(epochs) == {0, 1}


def test_the_global_batch_does_not_depend_on_the_number_of_ranks(train_loader):
    sizes = {"global_batch_size": 48, "micro_batch_size": 4, "num_steps": 40}
    one, two, three = (global_batches(train_loader, world_size, **sizes) for world_size in (1, 2, 3))
    assert torch.equal(one, two)
    assert torch.equal(one, three)


def test_workers_change_nothing(train_loader, view_config):
    several = train_loader(config=view_config.model_copy(update={"workers": 2}))
    for left, right in zip(joined(train_loader()), joined(several), strict=True):
        assert torch.equal(left, right)


def test_a_resumed_loader_continues_where_the_other_would_have_gone(train_loader, view_config):
    config = view_config.model_copy(update={"views": 2})
    whole = joined(train_loader(config=config, num_steps=62, micro_batch_size=32))  # more than two epochs
    resumed = joined(train_loader(config=config, start_step=23, num_steps=39, micro_batch_size=32))
    for left, right in zip(whole, resumed, strict=True):
        assert torch.equal(left[23 * 64 :], right)


@pytest.mark.parametrize(("world_size", "workers"), [(2, 1), (4, 0)])
def test_a_loader_resumed_at_another_world_size_gives_the_same_global_batches(
    train_loader, view_config, world_size, workers
):
    whole = train_loader(num_steps=60, micro_batch_size=32)  # more than two epochs
    by_sample = [joined(whole)]
    config = view_config.model_copy(update={"workers": workers})
    sizes = {"start_step": 23, "num_steps": 37, "micro_batch_size": 8, "world_size": world_size, "config": config}
    ranks = [joined(train_loader(rank=rank, **sizes)) for rank in range(world_size)]
    for step in range(37):
        expected, resumed = (
            [torch.cat([fields[field][first : first + size] for fields in shares]) for field in range(5)]
            for shares, first, size in (
                (by_sample, (23 + step) * 64, 64),
                (ranks, step * 64 // world_size, 64 // world_size),
            )
        )
        orders = [fields[2].argsort(stable=True) for fields in (expected, resumed)]
        for left, right in zip(expected, resumed, strict=True):
            assert torch.equal(left[orders[0]], right[orders[1]])


def test_a_batch_holds_what_its_ids_and_views_say(train_loader, digits, view_config):
    batches = list(train_loader(start_step=27, num_steps=2))  # straddles the first two epochs
    assert len(batches) == len(train_loader(start_step=27, num_steps=2)) == 8
    assert {int(epoch) for batch in batches for epoch in batch.epochs} == {0, 1}
    for batch in batches:
        assert batch.images.shape == (16, 3, 8, 8)
        assert batch.images.dtype == torch.uint8
        assert batch.keep_indices is None
        assert torch.equal(batch.views, batch.epochs)
        for image, label, sample_id, view in zip(*batch[:4], strict=True):
            assert label == digits.index["label"][sample_id]
            box = view_parameters(SEED, int(view), int(sample_id), 8, 8)
            expected = decode_view(digits.read(int(sample_id)), (8, 8), box, view_config.img_size)
            assert torch.equal(image, expected)


def test_views_repeat_after_their_number_of_epochs(train_loader, view_config):
    config = view_config.model_copy(update={"views": 2})
    # three epochs of 1797 positions: the third shows view 0 again
    loader = train_loader(config=config, num_steps=3, global_batch_size=1797, micro_batch_size=599)
    images, _, ids, views, epochs = joined(loader)
    assert torch.equal(views, epochs % 2)
    by_epoch = [images[epochs == epoch][ids[epochs == epoch].argsort()] for epoch in range(3)]
    assert torch.equal(by_epoch[0], by_epoch[2])
    assert not torch.equal(by_epoch[0], by_epoch[1])


def test_kept_tokens_come_with_their_samples(train_loader):
    def look_up(sample_ids, views):
        return np.stack([sample_ids, sample_ids + views + 1], axis=1)

    for batch in train_loader(start_step=27, num_steps=2, look_up_masks=look_up):
        assert batch.keep_indices.dtype == torch.int64
        assert torch.equal(batch.keep_indices[:, 0], batch.sample_ids)
        assert torch.equal(batch.keep_indices[:, 1], batch.sample_ids + batch.views + 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_mask_ends_the_run_with_one_line(train_loader, view_config, workers):
    def look_up(sample_ids, views):
        raise UserError("masks/view-0000/part-00000.npy: delete this file")

    config = view_config.model_copy(update={"workers": workers})
    with pytest.raises(UserError) as caught:
        next(iter(train_loader(config=config, look_up_masks=look_up)))
    assert str(caught.value) == "masks/view-0000/part-00000.npy: delete this file"


@pytest.mark.parametrize("workers", [0, 2])
def test_sequential_loader_shows_the_views_that_training_shows(train_loader, digits, view_config, workers):
    for batch in train_loader(start_step=28, num_steps=1):
        ids = batch.sample_ids[batch.views == 1]
        loader = SequentialLoader(digits, view_config, SEED, sample_ids=ids, view=1, batch_size=5, workers=workers)
        images, labels, sample_ids, views, _ = joined(loader)
        assert torch.equal(images, batch.images[batch.views == 1])
        assert torch.equal(labels, batch.labels[batch.views == 1])
        assert torch.equal(sample_ids, ids)
        assert views.tolist() == [1] * len(ids)


def test_sequential_loader_without_a_view_shows_whole_pictures(digits, view_config):
    loader = SequentialLoader(digits, view_config, SEED, sample_ids=range(3, 10), view=None, batch_size=4)
    batches = list(loader)
    assert [len(batch.images) for batch in batches] == [4, 3]
    assert len(loader) == 2
    assert torch.cat([batch.sample_ids for batch in batches]).tolist() == list(range(3, 10))
    assert batches[0].views.tolist() == [EVAL_VIEW] * 4
    assert torch.equal(batches[1].images[0], decode_view(digits.read(7), (8, 8), central_square(8, 8), 8))


def test_view_0_of_a_sequential_loader_is_augmented_and_no_central_square(digits, view_config):
    (batch,) = SequentialLoader(digits, view_config, SEED, sample_ids=range(6), view=0, batch_size=6)
    assert (batch.views.tolist(), batch.epochs.tolist()) == ([0] * 6, [0] * 6)
    for row, image in enumerate(batch.images):
        assert torch.equal(image, decode_view(digits.read(row), (8, 8), view_parameters(SEED, 0, row, 8, 8), 8))


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_damaged_samples_end_a_sequential_loader_with_one_line(damaged, view_config, workers):
    shards = damaged([2, 3])
    config = view_config.model_copy(update={"max_bad_fraction": 1.5 / shards.num_samples})
    loader = SequentialLoader(shards, config, 0, sample_ids=range(6), view=0, batch_size=3, workers=workers)
    batches = iter(loader)
    assert next(batches).sample_ids.tolist() == [0, 1, substitute(2, 1, shards.num_samples)]
    with pytest.raises(UserError, match=r"2 samples of split train are bad, .* allows 1 \(the last: .*digit") as caught:
        next(batches)
    assert "\n" not in str(caught.value)


def test_a_sequential_loader_says_how_many_samples_were_bad(damaged, view_config, caplog):
    loader = SequentialLoader(damaged([2]), view_config, 0, sample_ids=[2, 5, 2], view=0, batch_size=1)
    list(loader)
    assert [record.message.split(": ")[1] for record in caplog.records] == [
        "1 samples were bad, others were shown in their place"
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_show_the_same_substitutes_with_their_masks_and_labels(damaged, view_config, workers):
    shards = damaged([7, 300, 1000])
    config = view_config.model_copy(update={"workers": workers})
    order = build_order(shards.index, config, SEED)
    steps = range(shards.num_samples // 64 + 1)

    def run(rank, world_size):
        share = RankShare(rank, world_size, global_batch_size=64, micro_batch_size=64 // world_size)
        return TrainLoader(shards, order, config, SEED, share, steps, look_up)

    def look_up(ids, views):
        return np.stack([ids, ids + views + 1], axis=1)

    one, two = list(run(0, 1)), [batch for rank in range(2) for batch in run(rank, 2)]
    found = {(bad.sample_id, bad.shown_id) for batch in one for bad in batch.bad}
    assert found == {(bad, substitute(bad, 1, shards.num_samples)) for bad in (7, 300, 1000)}
    assert found == {(bad.sample_id, bad.shown_id) for batch in two for bad in batch.bad}
    ids = torch.cat([batch.sample_ids for batch in one])
    assert not set(ids.tolist()) & {7, 300, 1000}
    assert torch.equal(ids.sort().values, torch.cat([batch.sample_ids for batch in two]).sort().values)
    for batch in one:
        assert torch.equal(batch.keep_indices[:, 0], batch.sample_ids)
        assert batch.labels.tolist() == shards.index["label"][batch.sample_ids.numpy()].tolist()


def test_batch_sizes_that_do_not_divide_are_refused():
    assert accumulation_steps(96, 16, 3) == RankShare(2, 3, 96, 16).accumulation == 2
    with pytest.raises(UserError, match=r"optim.global_batch_size .* optim.micro_batch_size x ranks .* = 48, got 64"):
        accumulation_steps(64, 16, 3)


@pytest.mark.parametrize(
    "change", [{"img_size": 9}, {"crop_scale": (0.3, 1.0)}, {"crop_ratio": (0.5, 2.0)}, {"hflip": 0.4}]
)
def test_the_views_fingerprint_names_what_decides_pixels(view_config, change):
    before = view_fingerprint(view_config, SEED)
    after = view_fingerprint(view_config.model_copy(update=change), SEED)
    assert {name for name in before if before[name] != after[name]} == set(change)
    assert before["seed"] == SEED


@pytest.mark.parametrize("change", [{"views": 2}, {"workers": 3}, {"order": "global"}, {"window_shards": 9}])
def test_the_views_fingerprint_leaves_out_what_decides_none(view_config, change):
    assert view_fingerprint(view_config.model_copy(update=change), 0) == view_fingerprint(view_config, 0)


def test_the_loader_leaves_the_global_random_state_alone(train_loader):
    before = torch.random.get_rng_state()
    list(train_loader(num_steps=1))
    assert torch.equal(torch.random.get_rng_state(), before)
