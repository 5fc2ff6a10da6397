"""Rows added up by place: against sums in float64, with infinities that must stay where they are."""

from __future__ import annotations

import numpy as np
import pytest

from gpulayers.ops.indexing_kernels import add_rows
from tests.kernels.bfloat16 import BFLOAT16, finfo

pytestmark = pytest.mark.emulated
DTYPES = ["float16", BFLOAT16, "float32", "float64"]


def summed(rows, places, count):
    """The sums in float64, rounded once."""
    out = np.zeros((count, *rows.shape[1:]))
    np.add.at(out, places, rows.astype("d"))
    return out.astype(rows.dtype)


def added(arrays, rows, places, count):
    order = np.argsort(places, kind="stable")
    out = arrays.zeros((count, *rows.shape[1:]), rows.dtype)
    add_rows(arrays.asarray(rows), arrays.asarray(order), arrays.asarray(places[order]), out)
    return out.get()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [(), (1,), (5,), (3, 100)], ids=str)
@pytest.mark.parametrize("count", [1, 7, 400])
def test_rows_are_added_up_by_place(arrays, dtype, width, count):
    rng = np.random.default_rng(0)
    rows = np.asarray(rng.normal(size=(300, *width)), dtype)
    places = rng.integers(0, count, 300)
    found, want = added(arrays, rows, places, count), summed(rows, places, count)
    atol = 1e-13 if dtype == "float64" else 2e-5  # of sums of 300 numbers in double and in float
    np.testing.assert_allclose(found.astype("d"), want.astype("d"), rtol=float(finfo(dtype).eps), atol=atol)
    assert not found[np.setdiff1d(np.arange(count), places)].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_place(arrays, dtype):
    rows = np.array([1, np.inf, 2, np.nan, 3, 4], dtype)
    places = np.array([0, 1, 2, 3, 2, 0], np.int32)
    np.testing.assert_array_equal(added(arrays, rows, places, 5).astype("f"), np.array([5, np.inf, 5, np.nan, 0], "f"))


def test_sums_run_from_front_to_back(arrays):
    rows = np.array([1, 2.0**-24, 2.0**-24, -1], "f")
    assert added(arrays, rows, np.zeros(4, np.int32), 1)[0] == 0  # each small one is lost beside the 1
    rows = np.array([2.0**-24, 2.0**-24, 1, -1], "f")
    assert added(arrays, rows, np.zeros(4, np.int32), 1)[0] == 2.0**-23


def test_rows_with_gaps(arrays):
    rows = np.arange(24, dtype="f").reshape(4, 6)
    device, places = arrays.asarray(rows)[:, ::2], np.array([1, 0, 1, 1])
    order, out = np.argsort(places, kind="stable"), arrays.zeros((2, 3), "f")
    add_rows(device, arrays.asarray(order), arrays.asarray(places[order]), out)
    np.testing.assert_array_equal(out.get(), summed(rows[:, ::2], places, 2))
