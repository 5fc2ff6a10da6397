"""Losses against PyTorch in float64, their gradients, extreme logits, shapes and reductions."""

from __future__ import annotations

import numpy as np
import pytest

from gpulayers import losses
from gpulayers.trace import GradientTape, Graph, Session, placeholder

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.standard_normal((6, 5)) * 3
LABELS = RANDOM.integers(0, 5, 6)
TARGETS = RANDOM.uniform(0, 1, (6, 5))
ONE_HOT = np.eye(5)[LABELS]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def binary(t, p):
    return -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean(-1)


ERROR = np.abs(LOGITS - TARGETS)
TABLE = {
    "mse": (losses.mean_squared_error, TARGETS, {}, (ERROR**2).mean(-1)),
    "mae": (losses.mean_absolute_error, TARGETS, {}, ERROR.mean(-1)),
    "huber": (
        losses.huber,
        TARGETS,
        {"delta": 1.5},
        np.where(ERROR <= 1.5, ERROR**2 / 2, 1.5 * ERROR - 1.125).mean(-1),
    ),
    "binary": (losses.binary_crossentropy, TARGETS, {"from_logits": True}, binary(TARGETS, sigmoid(LOGITS))),
    "binary smooth": (
        losses.binary_crossentropy,
        TARGETS,
        {"from_logits": True, "label_smoothing": 0.2},
        binary(TARGETS * 0.8 + 0.1, sigmoid(LOGITS)),
    ),
    "categorical": (
        losses.categorical_crossentropy,
        ONE_HOT,
        {"from_logits": True},
        -np.log(softmax(LOGITS))[np.arange(6), LABELS],
    ),
    "categorical smooth": (
        losses.categorical_crossentropy,
        ONE_HOT,
        {"from_logits": True, "label_smoothing": 0.1},
        -((ONE_HOT * 0.9 + 0.02) * np.log(softmax(LOGITS))).sum(-1),
    ),
    "sparse": (
        losses.sparse_categorical_crossentropy,
        LABELS,
        {"from_logits": True},
        -np.log(softmax(LOGITS))[np.arange(6), LABELS],
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_values_from_the_definition(name):
    function, targets, settings, expected = TABLE[name]
    np.testing.assert_allclose(function(targets, LOGITS, **settings), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["binary", "categorical", "sparse"])
def test_probabilities_give_what_logits_give(name):
    function, targets, settings, expected = TABLE[name]
    probabilities = sigmoid(LOGITS) if name == "binary" else softmax(LOGITS) * 0.5  # need not add up to 1
    np.testing.assert_allclose(function(targets, probabilities), expected, rtol=1e-4)


@pytest.mark.parametrize("name", TABLE)
def test_gradient_against_differences(name):
    function, targets, settings, _ = TABLE[name]
    with GradientTape() as tape:
        loss = function(targets, tape.watch(LOGITS), **settings)
    direction = RANDOM.standard_normal(LOGITS.shape)
    plus, minus = (function(targets, LOGITS + sign * 1e-6 * direction, **settings).sum() for sign in (1, -1))
    slope = (plus - minus) / 2e-6
    assert np.isclose((tape.gradient(loss, LOGITS) * direction).sum(), slope, rtol=1e-6)


@pytest.mark.parametrize("name", TABLE)
def test_graph_gives_the_same(name):
    function, targets, settings, expected = TABLE[name]
    with Graph().as_default():
        t = placeholder(targets.dtype, (None, *targets.shape[1:]))
        x = placeholder("float64", (None, 5))
        loss = function(t, x, **settings)
        assert loss.shape == (None,)
        np.testing.assert_allclose(Session().run(loss, {t: targets, x: LOGITS}), expected, rtol=1e-12, atol=1e-14)


def test_against_torch():
    torch = pytest.importorskip("torch")
    x, labels = torch.tensor(LOGITS), torch.tensor(LABELS)
    smooth = torch.nn.functional.cross_entropy(x, labels, reduction="none", label_smoothing=0.1)
    np.testing.assert_allclose(
        losses.categorical_crossentropy(ONE_HOT, LOGITS, True, 0.1), smooth.numpy(), rtol=1e-12
    )
    huber = torch.nn.functional.huber_loss(x, torch.tensor(TARGETS), reduction="none", delta=0.7).mean(-1)
    np.testing.assert_allclose(losses.huber(TARGETS, LOGITS, 0.7), huber.numpy(), rtol=1e-12)


def test_huge_logits_stay_finite():
    x = np.array([[1e4, -1e4]], np.float32)
    assert losses.sparse_categorical_crossentropy([1], x, from_logits=True).tolist() == [2e4]
    assert losses.categorical_crossentropy([[0.0, 1.0]], x, from_logits=True).tolist() == [2e4]
    assert losses.binary_crossentropy([[0.0, 0.0]], x, from_logits=True).tolist() == [5e3]
    with GradientTape() as tape:
        loss = losses.sparse_categorical_crossentropy([1], tape.watch(x), from_logits=True)
    assert tape.gradient(loss, x).tolist() == [[1.0, -1.0]]


def test_certain_probabilities_stay_finite():
    assert np.isfinite(losses.binary_crossentropy([[1.0, 0.0]], [[0.0, 1.0]])).all()
    assert np.isfinite(losses.categorical_crossentropy([[1.0, 0.0]], [[0.0, 1.0]])).all()


def test_a_missing_last_axis_is_added_not_broadcast():
    y_true, y_pred = np.array([1.0, 2.0, 3.0]), np.array([[1.0], [2.0], [4.0]])
    assert losses.mean_squared_error(y_true, y_pred).tolist() == [0.0, 0.0, 1.0]
    assert losses.sparse_categorical_crossentropy([[0], [1]], np.zeros((2, 3)), from_logits=True).shape == (2,)


@pytest.mark.parametrize(("a", "b"), [((3,), (3, 2)), ((3, 2), (4, 2)), ((3, 1), (3, 2)), ((1, 2), (3, 2))])
def test_other_shapes_are_refused(a, b):
    with pytest.raises(ValueError, match="differ in shape"):
        losses.mean_squared_error(np.zeros(a), np.zeros(b))


def test_reductions_and_weights():
    y_true, y_pred = [[0.0], [0.0], [0.0]], [[1.0], [2.0], [3.0]]
    assert losses.MeanSquaredError(reduction="none")(y_true, y_pred).tolist() == [1.0, 4.0, 9.0]
    assert float(losses.MeanSquaredError(reduction="sum")(y_true, y_pred)) == 14.0
    assert float(losses.MeanAbsoluteError(reduction="auto")(y_true, y_pred)) == 2.0
    weighted = losses.MeanAbsoluteError()(y_true, y_pred, sample_weight=[[1.0], [0.0], [2.0]])
    assert np.isclose(float(weighted), 7 / 3)  # divided by the number of samples, not by the weights
    with pytest.raises(ValueError, match="unknown reduction"):
        losses.MeanSquaredError(reduction="average")


@pytest.mark.parametrize(
    "loss",
    [
        losses.MeanSquaredError(),
        losses.Huber(0.5, reduction="sum"),
        losses.BinaryCrossentropy(True, 0.1),
        losses.CategoricalCrossentropy(True, 0.1, name="loss"),
        losses.SparseCategoricalCrossentropy(from_logits=True),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_configurations_round_trip(loss):
    targets = LABELS if "Sparse" in type(loss).__name__ else TARGETS
    again = type(loss).from_config(loss.get_config())
    assert again.get_config() == loss.get_config()
    assert float(again(targets, LOGITS)) == float(loss(targets, LOGITS))


def test_sixteen_bits():
    loss = losses.mean_squared_error(TARGETS, LOGITS.astype(np.float16))
    assert loss.dtype == np.float16


@pytest.mark.parametrize(
    "function", [losses.mean_squared_error, losses.mean_absolute_error, losses.huber, losses.binary_crossentropy]
)
def test_gradient_at_a_watched_array(function):
    y_true, y_pred = np.array([[0.0, 1.0]]), np.array([[0.25, 0.75]])
    with GradientTape() as tape:
        tape.watch(y_pred)
        loss = function(y_true, y_pred)
    found = tape.gradient(loss, y_pred)
    with GradientTape() as tape:
        expected = tape.gradient(function(y_true, tensor := tape.watch(y_pred)), tensor)
    np.testing.assert_array_equal(found, expected)
    assert (found * [[1.0, -1.0]] > 0).all()
