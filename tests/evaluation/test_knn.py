import math

import numpy as np
import torch

from hdscale.evaluation.knn import extract_features, knn_accuracy, pooled, raw_pixels
from hdscale.types import Batch


def reference_accuracy(train, train_labels, val, val_labels, k):
    """Loop over held-out rows in float64; ties of votes go to the nearest neighbour's class."""
    correct = 0
    for features, label in zip(val, val_labels, strict=True):
        similarity = [float(features @ row / np.linalg.norm(features) / np.linalg.norm(row)) for row in train]
        nearest = sorted(range(len(train)), key=lambda i: (-similarity[i], i))[:k]
        votes = [int(train_labels[i]) for i in nearest]
        best = max(votes.count(vote) for vote in votes)
        correct += next(vote for vote in votes if votes.count(vote) == best) == int(label)
    return correct / len(val)


def make_batch(images, labels):
    ids = torch.arange(len(labels))
    return Batch(images, labels, ids, torch.zeros_like(ids), torch.zeros_like(ids), None)


def test_accuracy_equals_a_plain_loop_over_several_chunks(monkeypatch):
    monkeypatch.setattr("hdscale.evaluation.knn._CELLS", 150 * 400)
    rng = np.random.default_rng(0)
    train, val = rng.normal(size=(150, 8)), rng.normal(size=(1100, 8))
    train_labels, val_labels = rng.integers(0, 3, 150), rng.integers(0, 3, 1100)
    for k in (1, 2, 5):
        ours = knn_accuracy(
            torch.from_numpy(train),
            torch.from_numpy(train_labels),
            torch.from_numpy(val),
            torch.from_numpy(val_labels),
            k,
        )
        assert ours.accuracy == reference_accuracy(train, train_labels, val, val_labels, k)
        assert ours.num == 1100
        assert math.isclose(ours.standard_error, math.sqrt(ours.accuracy * (1 - ours.accuracy) / 1100))


def test_a_tie_of_votes_goes_to_the_nearest_neighbour():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.3], [1.0, 0.4], [0.0, -1.0]])
    labels = torch.tensor([7, 3, 7, 3])
    val = torch.tensor([[1.0, 0.3]])
    assert knn_accuracy(train, labels, val, torch.tensor([3]), 4).accuracy == 1.0
    assert knn_accuracy(train, labels, val, torch.tensor([7]), 3).accuracy == 1.0


def test_equal_similarities_rank_by_row_and_length_does_not_count():
    train = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
    val = torch.tensor([[0.5, 0.0]])
    assert knn_accuracy(train, torch.tensor([4, 1, 1]), val, torch.tensor([4]), 1).accuracy == 1.0


def test_of_equally_near_rows_the_first_ones_vote():
    train = torch.cat([torch.tensor([[1.0, 0.0]]).repeat(40, 1), torch.tensor([[0.0, 1.0]]).repeat(60, 1)])
    labels = torch.tensor([0, 0, 1, 1, 1] + [2] * 35 + [3] * 60)
    assert knn_accuracy(train, labels, torch.tensor([[3.0, 0.0]]), torch.tensor([1]), 5).accuracy == 1.0


def test_among_the_k_nearest_equally_near_ones_rank_by_row():
    train = torch.tensor([[0.0, 1.0]]).repeat(100, 1)
    train[[15, 32, 35, 45, 90]] = torch.tensor([1.0, 0.0])
    labels = torch.arange(100)  # five neighbours, five classes: the first one's
    assert knn_accuracy(train, labels, torch.tensor([[3.0, 0.0]]), torch.tensor([15]), 5).accuracy == 1.0


def test_fewer_training_rows_than_neighbours_all_vote():
    train, labels = torch.eye(2), torch.tensor([0, 1])
    assert knn_accuracy(train, labels, torch.tensor([[1.0, 0.1]]), torch.tensor([0]), 5).accuracy == 1.0


def test_features_keep_the_loaders_order_and_need_no_gradient():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    weight = torch.ones(1, requires_grad=True)
    batches = [make_batch(images[:1], torch.tensor([5])), make_batch(images[1:], torch.tensor([6]))]
    features, labels = extract_features(lambda x: raw_pixels(x) * weight, batches)
    assert labels.tolist() == [5, 6]
    assert not features.requires_grad
    np.testing.assert_allclose(features.numpy(), images.numpy().reshape(2, -1) / 255, rtol=1e-6)


def test_pooling_averages_tokens():
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])
    assert pooled(tokens).tolist() == [[2.0, 4.0]]
