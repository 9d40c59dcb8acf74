"""A linear classifier on frozen features: how much of the classes can be read off them in a straight line."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from hdscale.evaluation.accuracy import Accuracy, accuracy_of

_INVERSE_PENALTY = 1.0
"""scikit-learn's C: the squared weights, halved, count as much as one sample's cross entropy."""
_TOLERANCE = 1e-6
"""Largest gradient at the end. scikit-learn's default stops so early that samples near a boundary change sides."""
_MAX_ITERATIONS = 2000
"""Of L-BFGS; on the standardised features of a ViT it takes some hundred. scikit-learn warns when it is not enough."""


def linear_probe(train_features: Tensor, train_labels: Tensor, val_features: Tensor, val_labels: Tensor) -> Accuracy:
    """Fit multinomial logistic regression to training features and classify held-out ones.

    Features are standardised by the training side's mean and deviation; one that never varies counts as zero. The fit
    is convex, starts from zero and draws no random numbers. It holds an (M, classes) matrix in float64: take the first
    200,000 samples of an ImageNet.

    Args:
        train_features: (M, D).
        train_labels: (M,) int64.
        val_features: (V, D), V at least 1.
        val_labels: (V,) int64.
    """
    assert min(len(train_features), len(val_features)) > 0, "a probe needs samples on both sides"
    train, val = (features.double().numpy() for features in (train_features, val_features))
    labels = train_labels.numpy()
    deviation = train.std(axis=0)
    # A constant feature's deviation is not exactly zero: its mean is rounded.
    varies = deviation > 1e-12 * np.abs(train).max(axis=0)
    if not varies.any() or len(np.unique(labels)) == 1:  # nothing to fit: the most frequent class
        predicted = np.full(len(val), np.bincount(labels).argmax())
        return accuracy_of(int((predicted == val_labels.numpy()).sum()), len(val))
    mean, deviation = train.mean(axis=0)[varies], deviation[varies]
    train, val = ((features[:, varies] - mean) / deviation for features in (train, val))
    classifier = LogisticRegression(C=_INVERSE_PENALTY, tol=_TOLERANCE, max_iter=_MAX_ITERATIONS)
    predicted = classifier.fit(train, labels).predict(val)
    return accuracy_of(int((predicted == val_labels.numpy()).sum()), len(val))
