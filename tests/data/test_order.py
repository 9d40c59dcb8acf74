import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdscale.config.sections import DataConfig
from hdscale.data.order import GlobalOrder, WindowedOrder, build_order, permute, positions_of, samples_at
from hdscale.shards.sources.base import Listing
from hdscale.shards.split import SplitSettings, assign_splits

MASK64 = 2**64 - 1
GOLDEN_GLOBAL = [154, 607, 290, 557, 904, 602]
GOLDEN_WINDOWED = [3, 12, 0, 2, 13, 4, 1, 9, 5, 7, 8, 6, 10, 11]
shard_sizes = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


def mix(z):
    z = (z + 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def permute_one(place, n, key):
    """The same permutation, in plain integers."""
    half = next(bits for bits in range(40) if 4**bits >= n)
    while True:
        left, right = divmod(place, 2**half)
        for turn in range(4):
            left, right = right, left ^ (mix(mix(mix(key) ^ turn) ^ right) % 2**half)
        place = left * 2**half + right
        if place < n:
            return place


@given(n=st.integers(1, 3000), key=st.integers(0, MASK64))
@settings(max_examples=60, deadline=None)
def test_permute_reaches_every_value_once(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 5, 64, 1000, 14_197_122])
def test_permute_agrees_with_plain_integers(n):
    places = np.unique(np.linspace(0, n - 1, 20).astype(np.int64))
    assert permute(places, n, 12345).tolist() == [permute_one(int(place), n, 12345) for place in places]


@pytest.mark.parametrize("n", [40_000, 70_001])  # longer than a stretch; 70,001 of 262,144 values walk far
def test_many_places_at_once_are_permuted_as_one_by_one(n):
    whole = permute(np.arange(n), n, 9)
    assert np.array_equal(np.sort(whole), np.arange(n))
    assert [int(permute(np.array([place]), n, 9)[0]) for place in range(0, n, 997)] == whole[::997].tolist()


def test_permute_keeps_the_shape_of_its_places():
    places = np.arange(12).reshape(3, 4)
    assert np.array_equal(permute(places, 12, 3), permute(places.ravel(), 12, 3).reshape(3, 4))


def test_the_orders_of_released_versions_never_change():
    assert GlobalOrder(1000, 7).sample_ids(3, np.arange(6)).tolist() == GOLDEN_GLOBAL
    assert WindowedOrder(np.array([5, 3, 4, 2]), 2, 7).sample_ids(3, np.arange(14)).tolist() == GOLDEN_WINDOWED


@given(sizes=shard_sizes, window=st.integers(1, 15), epoch=st.integers(0, 10**6), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=100, deadline=None)
def test_windowed_order_shows_every_sample_once_an_epoch(sizes, window, epoch, seed):
    order = WindowedOrder(np.array(sizes), window, seed)
    ids = order.sample_ids(epoch, np.arange(order.num_samples))
    assert np.array_equal(np.sort(ids), np.arange(sum(sizes)))


def test_windowed_order_touches_few_shards_at_a_time():
    order = WindowedOrder(np.full(12, 50), 3, seed=1)
    windows = order.sample_ids(0, np.arange(600)).reshape(4, 150) // 50
    touched = [set(window.tolist()) for window in windows]
    assert all(len(shards) == 3 for shards in touched)
    assert set.union(*touched) == set(range(12))
    # mixed inside the window, not one shard after another
    assert all(len(set(window[:20].tolist())) == 3 for window in windows)


def test_windowed_order_takes_the_shards_of_every_epoch_in_another_order():
    order = WindowedOrder(np.full(200, 3), 1, seed=4)
    turns = [order.sample_ids(epoch, np.arange(0, 600, 3)) // 3 for epoch in range(5)]
    for number, one in enumerate(turns):
        assert np.array_equal(np.sort(one), np.arange(200))
        assert all(np.mean(one == other) < 0.05 for other in turns[:number])


def test_windowed_order_puts_samples_of_a_class_side_by_side_no_more_often_than_chance():
    classes = np.repeat(np.arange(100), 300)
    listing = Listing(tuple(map(str, range(100))), [f"{row}.jpg" for row in range(30_000)], classes, [])
    labels = classes[assign_splits(listing, SplitSettings())["train"]]  # as make_shards packs them
    index = np.zeros(30_000, dtype=[("shard", "<u4")])
    index["shard"] = np.arange(30_000) // 100
    order = build_order(index, DataConfig(), seed=0)
    assert isinstance(order, WindowedOrder)
    chance = 299 / 29_999
    for epoch in range(3):
        shown = labels[order.sample_ids(epoch, np.arange(30_000))]
        neighbours = np.mean(shown[1:] == shown[:-1])
        assert neighbours < chance + 3 * (chance / 30_000) ** 0.5


@given(sizes=shard_sizes)
def test_shards_are_counted_from_the_index(sizes):
    index = np.zeros(sum(sizes), dtype=[("shard", "<u4")])
    index["shard"] = np.repeat(np.arange(len(sizes)), sizes)
    places = np.arange(sum(sizes))
    expected = WindowedOrder(np.array(sizes), 3, seed=2).sample_ids(1, places)
    assert np.array_equal(build_order(index, DataConfig(window_shards=3), seed=2).sample_ids(1, places), expected)


def test_windowed_order_does_not_depend_on_which_places_are_asked_for():
    order, other = (WindowedOrder(np.array([7, 9, 4, 11]), 2, 5) for _ in range(2))
    whole = order.sample_ids(2, np.arange(31))
    other.sample_ids(9, np.arange(3))
    assert other.sample_ids(2, np.array([30, 4, 17])).tolist() == whole[[30, 4, 17]].tolist()


@pytest.mark.parametrize("name", ["global", "windowed"])
def test_epochs_and_seeds_differ(name):
    index = np.zeros(400, dtype=[("shard", "<u4")])
    index["shard"] = np.arange(400) // 50
    config = DataConfig(order=name, window_shards=3)
    places = np.arange(400)
    orders = [build_order(index, config, seed).sample_ids(epoch, places) for seed in (0, 1) for epoch in (0, 1)]
    for number, one in enumerate(orders):
        assert np.array_equal(np.sort(one), places)
        for other in orders[:number]:
            assert np.mean(one == other) < 0.05


@given(
    world_size=st.integers(1, 6), micro=st.integers(1, 5), accumulation=st.integers(1, 4), step=st.integers(0, 10**9)
)
@settings(max_examples=60, deadline=None)
def test_ranks_share_a_steps_positions_without_gap_or_overlap(world_size, micro, accumulation, step):
    shares = [positions_of(step, rank, world_size, micro, accumulation) for rank in range(world_size)]
    assert all(share.shape == (accumulation, micro) for share in shares)
    batch = world_size * micro * accumulation
    assert np.array_equal(np.sort(np.ravel(shares)), np.arange(step * batch, (step + 1) * batch))


def test_micro_steps_take_consecutive_stretches_and_ranks_their_parts():
    assert positions_of(2, 1, 3, 2, 2).tolist() == [[26, 27], [32, 33]]


def test_positions_straddle_epochs():
    order = GlobalOrder(10, 0)
    ids, epochs = samples_at(order, np.arange(8, 32))
    assert epochs.tolist() == [0] * 2 + [1] * 10 + [2] * 10 + [3] * 2
    assert ids[2:12].tolist() == order.sample_ids(1, np.arange(10)).tolist()
    assert ids[:2].tolist() == order.sample_ids(0, np.array([8, 9])).tolist()


@given(
    sizes=shard_sizes,
    window=st.integers(1, 15),
    shares=st.lists(st.sampled_from([(1, 1, 12), (1, 3, 4), (2, 2, 3), (3, 4, 1), (4, 3, 1), (6, 1, 2)]), min_size=1),
    steps_each=st.integers(1, 9),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=100, deadline=None)
def test_stopping_and_going_on_at_any_world_size_changes_no_global_batch(sizes, window, shares, steps_each, seed):
    order, undisturbed = (WindowedOrder(np.array(sizes), window, seed) for _ in range(2))
    shown = []
    for start, (world_size, micro, accumulation) in enumerate(shares):  # one start of the run after another
        for step in range(start * steps_each, (start + 1) * steps_each):
            ranks = [positions_of(step, rank, world_size, micro, accumulation) for rank in range(world_size)]
            batch = [np.stack(samples_at(order, positions.ravel())) for positions in ranks]
            shown.append(np.concatenate(batch, axis=1))
    whole = np.stack(samples_at(undisturbed, np.arange(12 * len(shown))))
    for step, batch in enumerate(shown):
        expected = whole[:, 12 * step : 12 * (step + 1)]
        assert sorted(batch.T.tolist()) == sorted(expected.T.tolist())
    ids, epochs = whole
    for epoch in range(epochs[-1]):
        assert np.array_equal(np.sort(ids[epochs == epoch]), np.arange(order.num_samples))
