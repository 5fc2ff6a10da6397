"""Random operations: their distributions, seeds, dtypes, and that a graph draws anew at each run."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpulayers import ops
from gpulayers.errors import DTypeError
from gpulayers.trace import GradientTape, Graph, Session, gradients, placeholder

COUNT = (40_000,)
DRAWS = {
    "random_uniform": lambda shape, **k: ops.random_uniform(shape, -1.0, 3.0, **k),
    "random_normal": lambda shape, **k: ops.random_normal(shape, 1.0, 2.0, **k),
    "truncated_normal": lambda shape, **k: ops.truncated_normal(shape, 1.0, 2.0, **k),
    "bernoulli": lambda shape, **k: ops.bernoulli(shape, 0.3, **k),
}
# Mean and standard deviation; those of the normal distribution cut at two: sqrt(1 - 4 phi(2) / (2 Phi(2) - 1)) times 2.
MOMENTS = {
    "random_uniform": (1.0, 4 / 12**0.5),
    "random_normal": (1.0, 2.0),
    "truncated_normal": (1.0, 2 * 0.87962566),
    "bernoulli": (0.3, 0.21**0.5),
}


@pytest.mark.parametrize("name", DRAWS)
def test_moments(name: str) -> None:
    x = DRAWS[name](COUNT, dtype="float64", seed=5)
    mean, std = MOMENTS[name]
    assert abs(x.mean() - mean) < 4 * std / 200
    assert abs(x.std() - std) < 0.03 * std


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", DRAWS)
def test_dtype_and_seed(name: str, dtype: Any) -> None:
    first, again = (DRAWS[name]((3, 50), dtype=dtype, seed=1) for _ in range(2))
    assert first.dtype == np.dtype(dtype)
    assert first.shape == (3, 50)
    np.testing.assert_array_equal(first, again)
    assert (first != DRAWS[name]((3, 50), dtype=dtype, seed=2)).any()


@pytest.mark.parametrize("name", DRAWS)
def test_shared_generator(name: str) -> None:
    ops.set_seed(9)
    first, second = DRAWS[name]((20,)), DRAWS[name]((20,))
    ops.set_seed(9)
    np.testing.assert_array_equal(first, DRAWS[name]((20,)))
    assert (first != second).any()
    assert DRAWS[name]((0, 3)).shape == (0, 3)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ml_dtypes.bfloat16])
def test_uniform_never_reaches_its_end(dtype: Any) -> None:
    for low, high in ((0, 1), (0.93, 1.07), (-0.1, 0.1)):
        x = ops.random_uniform(COUNT, low, high, dtype, seed=3)
        assert (x >= np.asarray(low, dtype)).all()
        assert (x < high).all()


def test_truncated_stays_within_two_deviations() -> None:
    x = ops.truncated_normal(COUNT, 0.0, 1.0, seed=0)
    assert 1.9 < np.abs(x).max() <= 2


def test_integers() -> None:
    x = ops.random_integers((1000,), -2, 3, seed=0)
    assert x.dtype == np.int32
    assert set(x.tolist()) == {-2, -1, 0, 1, 2}


def test_limits_as_tensors() -> None:
    low = np.array([0.0, 10.0])
    x = ops.random_uniform((50, 2), low, low + 1, "float64", seed=0)
    assert ((x >= low) & (x < low + 1)).all()


@pytest.mark.parametrize("name", DRAWS)
def test_graph_draws_anew_from_its_seed(name: str) -> None:
    with Graph().as_default():
        x = placeholder("float32", (None, 4))
        y = DRAWS[name](ops.shape_of(x), dtype="float64", seed=4)
        fixed = DRAWS[name]((2, 3), seed=4)
        assert tuple(fixed.shape) == (2, 3)
        with Session() as session:
            feed = {x: np.zeros((30, 4), np.float32)}
            first, second = session.run(y, feed), session.run(y, feed)
            one, two = session.run((fixed, fixed))
    assert first.shape == (30, 4)
    assert (first != second).any()
    np.testing.assert_array_equal(one, two)  # one node, one run, one value
    np.testing.assert_array_equal(first, DRAWS[name]((30, 4), dtype="float64", seed=4))


def test_dropout() -> None:
    x = np.ones((200, 100), np.float32)
    y = ops.dropout(x, 0.25, seed=1)
    assert set(np.unique(y)) == {np.float32(0), np.float32(4 / 3)}
    assert abs(y.mean() - 1) < 0.02
    assert ops.dropout(x, 0) is x
    shared = ops.dropout(x, 0.5, noise_shape=(None, 1), seed=1)
    assert (shared == shared[:, :1]).all()
    with GradientTape() as tape:
        t = tape.watch(x)
        y = ops.dropout(t, 0.25, seed=1)
    np.testing.assert_array_equal(tape.gradient(y, x), y.value)


def test_dropout_in_a_graph() -> None:
    with Graph().as_default():
        x = placeholder("float32", (None, 3))
        y = ops.dropout(x, 0.5)
        gradient = gradients(y, [x])[0]
        with Session() as session:
            value, slope = session.run((y, gradient), {x: np.ones((50, 3))})
            other = session.run(y, {x: np.ones((50, 3))})
    np.testing.assert_array_equal(value, slope)
    assert (value != other).any()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ops.dropout(np.ones(3), 1.0), ValueError, "rate"),
        (lambda: ops.bernoulli((2,), 1.5), ValueError, "probability"),
        (lambda: ops.random_uniform((2,), 1.0, 1.0), ValueError, "empty"),
        (lambda: ops.random_uniform((2,), 0, dtype="int32"), ValueError, "maxval"),
        (lambda: ops.random_normal((2,), dtype="int32"), DTypeError, "floating"),
        (lambda: ops.random_uniform((2,), seed=-1), DTypeError, "seed"),
        (lambda: ops.random_uniform((2.5,)), DTypeError, "integer"),
    ],
)
def test_errors(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
