"""Every operation on the strict double of CuPy's arrays: nothing may slip to the host or mix with host arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gpulayers import ops
from gpulayers.device import asnumpy, device
from gpulayers.trace import GradientTape
from tests.kernels.strict_array import StrictArray, xp
from tests.ops.network_cases import CASES
from tests.ops.test_operations import Case, floating, listed, parametrize, tape_gradients, weights

ON_THE_HOST = ("shape", "size", "rank")
"""Results that stay on the host on purpose."""


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    with device("emulated"):
        yield


def strict(arrays: Any) -> list[StrictArray]:
    return [xp.asarray(a) for a in arrays]


@parametrize(CASES)
def test_forward(case: Case) -> None:
    for result, truth in zip(
        listed(case.call(*strict(case.arrays))), listed(case.reference(*case.arrays)), strict=True
    ):
        assert isinstance(result, StrictArray) or case.name in ON_THE_HOST
        assert (result.shape, result.dtype) == (np.shape(truth), np.asarray(truth).dtype)
        np.testing.assert_allclose(asnumpy(result), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.emulated
@parametrize([c for c in CASES if c.first])
def test_gradient(case: Case) -> None:
    with device("cpu"):
        cotangents = weights(case)
        wanted = tape_gradients(case, case.arrays, cotangents)
    grads = tape_gradients(case, strict(case.arrays), strict(cotangents))
    for gradient, truth in zip(grads, wanted, strict=True):
        assert isinstance(gradient, StrictArray)
        assert (gradient.shape, gradient.dtype) == (truth.shape, truth.dtype)
        np.testing.assert_allclose(asnumpy(gradient), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.emulated
@parametrize([c for c in CASES if c.first and c.second])
def test_gradient_of_gradient_runs(case: Case) -> None:
    with device("cpu"):
        cotangents = weights(case)
    arrays = strict(case.arrays)
    with GradientTape() as tape:
        values: list[Any] = list(arrays)
        for index in floating(case):
            values[index] = tape.watch(arrays[index])
        grads = tape_gradients(case, values, strict(cotangents))
        total = sum(ops.sum(g * g) for g in grads)
    if not isinstance(total, StrictArray):
        for second in tape.gradient(total, [arrays[i] for i in floating(case)], unconnected_gradients="zero"):
            assert isinstance(second, StrictArray)


@pytest.mark.parametrize(
    "draw",
    [ops.random_uniform, ops.random_normal, ops.truncated_normal, ops.bernoulli],
    ids=lambda f: f.__name__,
)
def test_random(draw: Any) -> None:
    x = draw((3, 4), seed=1)
    assert isinstance(x, StrictArray)
    assert (x.shape, x.dtype) == ((3, 4), np.float32)
    np.testing.assert_array_equal(asnumpy(x), asnumpy(draw(ops.shape_of(x), seed=1)))
    assert isinstance(draw((2,)), StrictArray)


def test_random_integers_and_dropout() -> None:
    assert isinstance(ops.random_integers((3,), 0, 4), StrictArray)
    y = ops.dropout(xp.ones((50, 4), np.float16), 0.5, seed=0)
    assert isinstance(y, StrictArray)
    assert set(np.unique(asnumpy(y)).tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("name", ["sum", "mean", "softmax", "matmul", "convolution", "avg_pool", "sigmoid"])
def test_half_precision(name: str) -> None:
    x = xp.asarray(np.linspace(-2, 2, 64, dtype=np.float16).reshape(1, 8, 8))
    arguments = {"matmul": (x,), "convolution": (xp.ones((3, 8, 2), np.float16),), "avg_pool": (2,)}.get(name, ())
    result = getattr(ops, name)(x, *arguments)
    assert isinstance(result, StrictArray)
    assert result.dtype == np.float16


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.multiply(x, 0.5),
        lambda x: ops.subtract(1.0, x),
        lambda x: ops.add(x, 1),
        lambda x: ops.maximum(x, 0.0),
        lambda x: ops.where(ops.greater(x, 0.0), x, ops.negative(x)),
        lambda x: ops.where(ops.isnan(x), 0.0, x),
        lambda x: ops.relu(x),
        lambda x: ops.random_uniform((3,), -2.0, 2.0, x.dtype, seed=1) + x,
    ],
    ids=["times", "from", "integer", "maximum", "where of arrays", "where of a number", "relu", "uniform"],
)
def test_bfloat16_stays_bfloat16(call: Any) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    host = np.asarray([-1.5, 0.25, 2.0], ml_dtypes.bfloat16)
    with device("cpu"):
        want = call(host)
    x = xp.asarray(host)
    found = call(x)
    assert isinstance(found, StrictArray)
    assert found.dtype == want.dtype == host.dtype
    np.testing.assert_array_equal(asnumpy(found).astype("f"), want.astype("f"))
    with GradientTape() as tape:
        total = call(tape.watch(x))
    gradient = tape.gradient(total, x)
    assert gradient.dtype == host.dtype


SELECTIONS = {
    "take": lambda x, places: ops.take(x, places, axis=0),
    "gather": lambda x, places: ops.gather(x, places),
    "take_along_axis": lambda x, places: ops.take_along_axis(x, ops.stack([places, places], axis=1), axis=0),
    "index": lambda x, places: x[places],
}


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_gradients_of_selected_rows_do_not_touch_each_other(name: str, dtype: str) -> None:
    """One running sum over all rows would lose what is small behind what is large, and all behind an infinity."""
    places = np.array([3, 0, 1, 0, 3, 4], np.int32)
    weights = np.array([[2e4], [3], [0.25], [5], [np.inf], [0.5]], dtype).repeat(2, 1)
    x = xp.zeros((6, 2), dtype)
    with GradientTape() as tape:
        selected = SELECTIONS[name](tape.watch(x), xp.asarray(places))
    gradient = tape.gradient(selected, x, output_gradients=xp.asarray(weights))
    want = np.array([8, 0.25, 0, np.inf, 0.5, 0], dtype)[:, None].repeat(2, 1)
    np.testing.assert_array_equal(asnumpy(gradient), want)
