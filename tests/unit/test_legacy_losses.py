"""Losses of ``tf.losses``: weights, collections and totals."""

from __future__ import annotations

import numpy as np
import pytest

from gpulayers import legacy_losses as losses
from gpulayers.trace import GradientTape, Graph, GraphKeys, Session, placeholder

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


@pytest.mark.parametrize("shape", [(3,), (1, 1, 1), (2, 2), (4, 1)])
def test_weights_have_one_axis_for_each_of_the_losses(shape):
    with pytest.raises(ValueError, match="weights do not fit"):
        losses.mean_squared_error(np.ones((2, 3)), np.zeros((2, 3)), np.ones(shape))
    with pytest.raises(ValueError, match="weights do not fit"), Graph().as_default():
        losses.mean_squared_error(np.ones((2, 3)), placeholder("float32", (None, 3)), np.ones((1, 1, 1)))


def test_weights_of_samples_in_a_column_fit_sparse_labels():
    logits, weights = np.eye(3), np.array([1.0, 0.0, 2.0])
    flat = losses.sparse_softmax_cross_entropy([0, 1, 1], logits, weights)
    np.testing.assert_array_equal(losses.sparse_softmax_cross_entropy([0, 1, 1], logits, weights[:, None]), flat)
    np.testing.assert_array_equal(losses.sparse_softmax_cross_entropy([[0], [1], [1]], logits, weights[:, None]), flat)


def test_sixteen_bit_losses_are_summed_in_float32():
    many = np.full((70_000,), 4.0, "float16")  # neither their sum nor their number fits float16
    loss = losses.compute_weighted_loss(many)
    assert loss.dtype == np.float16 and loss == 4.0
    squared = losses.mean_squared_error(np.zeros(3, "float16"), np.full(3, 300.0, "float16"))
    assert squared.dtype == np.float32 and squared == 90_000.0
    assert losses.absolute_difference(np.zeros(3), np.ones(3, "float16")).dtype == np.float32


@pytest.mark.parametrize("function", [losses.mean_squared_error, losses.absolute_difference])
def test_gradient_at_a_watched_array(function):
    predictions = np.array([[1.0, 5.0]])
    with GradientTape() as tape:
        tape.watch(predictions)
        loss = function(np.array([[0.0, 6.0]]), predictions)
    factor = 2.0 if function is losses.mean_squared_error else 1.0
    np.testing.assert_array_equal(tape.gradient(loss, predictions), factor * np.array([[0.5, -0.5]]))
