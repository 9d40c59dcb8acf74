import math

import numpy as np
import pytest
import scipy.optimize
import torch

from hdscale.evaluation.linear_probe import linear_probe


def reference_accuracy(train, labels, val, val_labels):
    """Minimise cross entropy, summed over samples, plus half the squared weights, with SciPy's BFGS in float64."""
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    train, val = (train - mean) / deviation, (val - mean) / deviation
    classes, width = labels.max() + 1, train.shape[1]

    def objective(parameters):
        weights, biases = parameters[:-classes].reshape(classes, width), parameters[-classes:]
        logits = train @ weights.T + biases
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(len(labels)), labels]
        return (np.log(np.exp(logits).sum(axis=1)) - chosen).sum() + (weights**2).sum() / 2

    found = scipy.optimize.minimize(objective, np.zeros(classes * (width + 1)), method="BFGS").x
    logits = val @ found[:-classes].reshape(classes, width).T + found[-classes:]
    return (logits.argmax(axis=1) == val_labels).mean()


def test_accuracy_equals_a_minimisation_by_hand_on_features_of_very_different_sizes():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 5))
    labels, val_labels = rng.integers(0, 3, 120), rng.integers(0, 3, 700)
    sizes = np.array([1e-4, 1.0, 50.0, 3.0, 1e3])
    train = (centres[labels] + rng.normal(size=(120, 5))) * sizes + 10 * sizes
    val = (centres[val_labels] + rng.normal(size=(700, 5))) * sizes + 10 * sizes
    tensors = [torch.from_numpy(array) for array in (train, labels, val, val_labels)]
    ours = linear_probe(*tensors)
    assert 0.6 < ours.accuracy < 0.95
    assert ours.accuracy == pytest.approx(reference_accuracy(train, labels, val, val_labels))
    assert ours.num == 700
    assert ours.standard_error == pytest.approx(math.sqrt(ours.accuracy * (1 - ours.accuracy) / 700))
    assert linear_probe(*tensors) == ours


def test_two_mirrored_classes_are_parted_in_the_middle():
    train = torch.tensor([[-3.0], [-1.0], [1.0], [3.0]])
    val = torch.tensor([[-0.1], [0.1], [5.0], [-5.0]])
    # The boundary is at 0, and the last held-out sample is on the wrong side of it.
    ours = linear_probe(train, torch.tensor([0, 0, 1, 1]), val, torch.tensor([0, 1, 1, 1]))
    assert ours == (0.75, math.sqrt(0.75 * 0.25 / 4), 4)


def test_a_constant_feature_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    train, val = torch.randn(40, 3, generator=generator), torch.randn(30, 3, generator=generator)
    labels, val_labels = (train[:, 0] > 0).long(), (val[:, 0] > 0).long()
    plain = linear_probe(train, labels, val, val_labels)
    # Held out, the feature that never varied in training does.
    constant, varied = torch.full((40, 1), 0.1), 1e6 * torch.randn(30, 1, generator=generator)
    assert linear_probe(torch.cat([train, constant], 1), labels, torch.cat([val, varied], 1), val_labels) == plain
    assert plain.accuracy > 0.8


def test_nothing_to_learn_from_gives_the_most_frequent_class():
    same, val = torch.ones(3, 2), torch.randn(4, 2)
    val_labels = torch.tensor([1, 1, 1, 0])
    assert linear_probe(same, torch.tensor([1, 1, 0]), val, val_labels).accuracy == 0.75
    assert linear_probe(torch.randn(3, 2), torch.tensor([1, 1, 1]), val, val_labels).accuracy == 0.75
