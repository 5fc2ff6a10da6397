"""Weights in strips, and the gradients that another thread sums: against float64 products, whatever the sizes."""

import numpy as np
import pytest

from gpulayers.ops.host import threads as host_threads
from gpulayers.ops.recurrent import gradients as recurrent_gradients
from gpulayers.ops.recurrent import projections as recurrent_projections
from gpulayers.ops.recurrent.gradients import WeightGradients, rows_times
from gpulayers.ops.recurrent.products import SMALL_PRODUCT, in_strips, strip_width, weight_strips
from tests.ops.test_recurrent_arrays import CELLS, Case, check_gradients


@pytest.fixture(params=[True, False], ids=["threads", "alone"])
def pool(request, monkeypatch):
    made = host_threads._Pool({0, 1, 2}) if request.param else None
    monkeypatch.setattr(host_threads, "_pool", lambda: made)
    return made


@pytest.mark.parametrize(
    ("rows", "depth", "units", "width"),
    [
        (3, 5, 192, 64),
        (3, 5, 96, 32),
        (3, 5, 48, 16),
        (3, 5, 20, 20),  # no strip: odd widths stay whole
        (SMALL_PRODUCT >> 6, 4, 64, 16),  # more rows, narrower strips
        (SMALL_PRODUCT >> 3, 4, 64, 64),  # too many rows for a small product
        (3, 0, 64, 64),
    ],
)
def test_products_with_strips(rows, depth, units, width):
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(rows, depth)), rng.normal(size=(depth, 3 * units))
    order, scale = (2, 0, 1), (0.5, 1.0, 2.0)
    strips = weight_strips(weights, rows, x.dtype, order, scale)
    assert strips.shape == (3, units // width, depth, width) and (not depth or strips.ctypes.data % 64 == 0)
    product = np.full((3, rows, units), np.nan)
    np.matmul(x, strips, out=in_strips(product, strips))
    apart = weights.reshape(depth, 3, units)
    for found, column, factor in zip(product, order, scale, strict=True):
        np.testing.assert_allclose(found, x @ apart[:, column] * factor, atol=1e-12)


def test_no_units_and_no_rows():
    for rows in (4, 0):
        strips = weight_strips(np.ones((3, 0)), rows, np.dtype("f"))
        assert in_strips(np.ones((rows, 0)), strips).size == 0
    assert strip_width(0, 3, 64) == 0


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("worth", [1, 1 << 62], ids=["beside", "left to BLAS"])
def test_a_sequence_whose_products_are_cut(cell, worth, pool, monkeypatch):
    for module in (recurrent_gradients, recurrent_projections):
        monkeypatch.setattr(module, "WORTH_A_THREAD", worth)
    case = Case(cell, time=9, batch=3, depth=5, units=192)
    case.weights[:2] = [w / 10 for w in case.weights[:2]]
    *results, _ = case.forward()
    for got, want in zip(results, case.naive(), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)
    check_gradients(case, {})


@pytest.mark.parametrize(
    ("time", "batch", "depths", "columns"),
    [(7, 3, (5, 16), 32), (40, 9, (3,), 48), (1, 1, (1, 1, 1), 16), (200, 2, (600,), 16), (3, 4, (5,), 20)],
)
@pytest.mark.parametrize("dtype", ["f", "d"])
def test_sums_over_steps(time, batch, depths, columns, dtype, pool, monkeypatch):
    monkeypatch.setattr(recurrent_gradients, "WORTH_A_THREAD", 1)
    rng = np.random.default_rng(0)
    lefts = [rng.normal(size=(time, batch, depth)).astype(dtype) for depth in depths]
    wide = rng.normal(size=(time, batch, columns + 7)).astype(dtype)
    right = wide[..., 7:]  # a part of the columns, as GRU has them
    found = []
    for _ in range(2):
        sums = WeightGradients(right, *lefts)
        for end in range(time, 0, -3):
            sums.add(max(0, end - 3), end)
        found.append(sums.results())
    for once, again in zip(*found, strict=True):
        np.testing.assert_array_equal(once, again)
    flat = right.reshape(-1, columns).astype("d")
    wanted = [left.reshape(-1, left.shape[2]).T.astype("d") @ flat for left in lefts] + [flat.sum(axis=0)]
    for got, want in zip(found[0], wanted, strict=True):
        assert got.dtype == right.dtype
        np.testing.assert_allclose(got, want, atol=1e-3 if dtype == "f" else 1e-10, rtol=1e-5)


@pytest.mark.parametrize("columns", [16, 20])
def test_float32_sums_over_many_steps_keep_their_digits(monkeypatch, columns):
    monkeypatch.setattr(recurrent_gradients, "WORTH_A_THREAD", 1)
    right = np.full((4000, 32, columns), 0.1, "f")
    sums = WeightGradients(right, np.ones((4000, 32, 1), "f"))
    sums.add(0, 4000)
    *_, rows = sums.results()
    np.testing.assert_allclose(rows, np.float32(0.1) * np.float64(128000), rtol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("depth", "units"), [(0, 4), (3, 0), (0, 0)])
def test_gradients_without_depth_or_units(cell, depth, units):
    case = Case(cell, time=3, batch=2, depth=depth, units=units)
    *results, saved = case.forward()
    gradients = case.backward([np.ones_like(r) for r in results], saved)
    assert [g.shape for g in gradients] == [a.shape for a in (case.x, *case.states, *case.weights)]


@pytest.mark.parametrize(
    ("time", "batch", "columns", "depth"),
    [(7, 3, 20, 64), (300, 32, 64, 64), (2, 3, 4, 5), (0, 3, 4, 16), (4, 0, 4, 16)],
)
def test_rows_times(time, batch, columns, depth, pool):
    rng = np.random.default_rng(0)
    rows, weights = rng.normal(size=(time, batch, columns)), rng.normal(size=(columns, depth))
    np.testing.assert_allclose(rows_times(rows, weights), rows @ weights, atol=1e-12)
    transposed = np.ascontiguousarray(weights.T).T.astype("f")
    np.testing.assert_allclose(rows_times(rows, transposed), rows @ weights, atol=1e-4)
