"""Losses of ``tf.losses``: weights, collections and totals."""

from __future__ import annotations

import numpy as np
import pytest

from gpulayers import legacy_losses as losses
from gpulayers.trace import Graph, GraphKeys, Session, placeholder

RANDOM = np.random.default_rng(0)
X, T = RANDOM.standard_normal((4, 3)), RANDOM.uniform(0, 1, (4, 3))
LABELS = np.array([0, 2, 1, 1])
LOG_P = X - np.log(np.exp(X).sum(-1, keepdims=True))


def test_values():
    assert np.isclose(losses.mean_squared_error(T, X), ((X - T) ** 2).mean(), rtol=1e-12)
    assert np.isclose(losses.absolute_difference(T, X), np.abs(X - T).mean(), rtol=1e-12)
    picked = -LOG_P[np.arange(4), LABELS]
    assert np.isclose(losses.sparse_softmax_cross_entropy(LABELS, X), picked.mean(), rtol=1e-12)
    assert np.isclose(losses.sparse_softmax_cross_entropy(LABELS[:, None], X), picked.mean(), rtol=1e-12)
    one_hot = np.eye(3)[LABELS]
    assert np.isclose(losses.softmax_cross_entropy(one_hot, X), picked.mean(), rtol=1e-12)
    smooth = -((one_hot * 0.7 + 0.1) * LOG_P).sum(-1).mean()
    assert np.isclose(losses.softmax_cross_entropy(one_hot, X, label_smoothing=0.3), smooth, rtol=1e-12)
    p = 1 / (1 + np.exp(-X))
    t = T * 0.8 + 0.1
    binary = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    assert np.isclose(losses.sigmoid_cross_entropy(T, X, label_smoothing=0.2), binary, rtol=1e-12)


def test_weights_count_where_they_are_not_zero():
    weights = np.array([[2.0], [0.0], [0.0], [1.0]])
    expected = ((X - T) ** 2 * weights).sum() / 6
    assert np.isclose(losses.mean_squared_error(T, X, weights), expected, rtol=1e-12)
    assert float(losses.mean_squared_error(T, X, 0.0)) == 0.0
    assert np.isclose(losses.mean_squared_error(T, X, 3.0), 3 * ((X - T) ** 2).mean(), rtol=1e-12)


def test_collections_and_totals():
    with Graph().as_default() as graph:
        x = placeholder("float32", (None, 3))
        first = losses.mean_squared_error(x * 0.0, x)
        losses.absolute_difference(x * 0.0, x, loss_collection=None)
        losses.add_loss(first * 2.0)
        graph.add_to_collection(GraphKeys.REGULARIZATION_LOSSES, first * 10.0)
        assert len(losses.get_losses()) == 2 and losses.get_losses()[0] is first
        totals = [losses.get_total_loss(), losses.get_total_loss(False), losses.get_regularization_loss()]
        ones = np.ones((2, 3), np.float32)
        assert [float(v) for v in Session().run(totals, {x: ones})] == [13.0, 3.0, 10.0]


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        losses.mean_squared_error(np.ones(3), np.ones((3, 1)))
