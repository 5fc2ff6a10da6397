"""The residual add, through the whole chain: checks, packing, geometry and kernel text."""

from __future__ import annotations

import numpy as np
import pytest

from gpulayers.errors import DTypeError, ShapeError
from gpulayers.launch import is_aligned, register_launcher
from gpulayers.ops.residual_kernels import LEAVES, residual_add
from tests.kernels.bfloat16 import BFLOAT16
from tests.kernels.emulation import EmulatedLauncher
from tests.kernels.strict_array import launcher, xp

pytestmark = pytest.mark.emulated
DTYPES = ["float16", BFLOAT16, "float32", "float64"]
SHAPES = [(1,), (3, 5), (7,), (0, 4), (64, 129), (), (2, 3, 1000)]


def drawn(shape, dtype, seed=0):
    return np.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def rounded_sum(x, y):
    """The sum in float64, rounded once."""
    return (x.astype("d") + y.astype("d")).astype(x.dtype)


def same_bits(result, expected):
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    assert result.get().tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_structure(arrays, dtype):
    xs = [drawn(shape, dtype, 1) for shape in SHAPES]
    ys = [drawn(shape, dtype, 2) for shape in SHAPES]
    results = residual_add([arrays.asarray(x) for x in xs], [arrays.asarray(y) for y in ys])
    for x, y, result in zip(xs, ys, results, strict=True):
        same_bits(result, rounded_sum(x, y))


@pytest.mark.parametrize("count", [1, 7, 8, 1023, 8192, 8193, 50001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pair(arrays, dtype, count):
    x, y = drawn(count, dtype, 1), drawn(count, dtype, 2)
    (result,) = residual_add([arrays.asarray(x)], [arrays.asarray(y)])
    same_bits(result, rounded_sum(x, y))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("packets", "steps"), [(1023, 1), (1024, 2), (1500, 2), (2048, 4), (2049, 4), (5000, 4)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_arrays_give_a_thread_several_packets(dtype, packets, steps, offset, monkeypatch):
    monkeypatch.setattr(launcher, "device", launcher.device._replace(multiprocessors=1))
    width = 1 if offset else 16 // np.dtype(dtype).itemsize
    x, y = drawn(packets * width + offset, dtype, 1), drawn(packets * width + offset, dtype, 2)
    launcher.record.clear()
    (result,) = residual_add([xp.asarray(x)[offset:]], [xp.asarray(y)[offset:]])
    same_bits(result, rounded_sum(x[offset:], y[offset:]))
    assert [s.defines["STEPS"] for s, *_ in launcher.record] == [steps]
    leaves = [x[offset:], x[offset : 7 + offset], y[offset:]]
    given = [xp.asarray(leaf) for leaf in leaves]
    for leaf, result in zip(leaves, residual_add(given, given), strict=True):
        same_bits(result, rounded_sum(leaf, leaf))


def test_a_structure_takes_one_launch():
    launcher.record.clear()
    given = [xp.asarray(drawn(shape, "f")) for shape in SHAPES]
    residual_add(given, given)
    assert [entry[0].name for entry in launcher.record] == ["gl_residual_add_leaves"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_addresses(arrays, dtype, offset):
    base = drawn(5000, dtype)
    x = arrays.asarray(base)[offset:]
    aligned = arrays.asarray(base[offset:])
    assert not is_aligned(x)
    (result,) = residual_add([x], [aligned])
    same_bits(result, rounded_sum(base[offset:], base[offset:]))


def test_views_that_are_not_contiguous_are_copied():
    x = drawn((20, 30), "f")
    (result,) = residual_add([xp.asarray(x).T], [xp.asarray(x.T.copy())])
    np.testing.assert_array_equal(result.get(), 2 * x.T)


def test_many_leaves_and_several_dtypes():
    xs = [drawn((3, i % 5), "f" if i % 2 else "e", i) for i in range(2 * LEAVES + 11)]
    launcher.record.clear()
    results = residual_add([xp.asarray(x) for x in xs], [xp.asarray(x) for x in xs])
    assert len(launcher.record) == 2
    for x, result in zip(xs, results, strict=True):
        np.testing.assert_array_equal(result.get(), 2 * x)


def test_nothing_to_add_launches_nothing():
    launcher.record.clear()
    assert residual_add([], []) == []
    assert residual_add([xp.empty((0, 3), "f")], [xp.empty((0, 3), "f")])[0].shape == (0, 3)
    assert not launcher.record


def test_infinities_and_nan_stay_where_they_are():
    x = np.array([np.inf, -np.inf, np.nan, 1, 3e38, -0.0], "f")
    y = np.array([-np.inf, 1, 1, np.nan, 3e38, -0.0], "f")
    (result,) = residual_add([xp.asarray(x)], [xp.asarray(y)])
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(result.get(), x + y)


def test_wrong_input_is_refused():
    x = xp.asarray(drawn((3, 2), "f"))
    with pytest.raises(ShapeError, match=r"shapes differ. Expected \(3, 2\); got \(2, 3\)"):
        residual_add([x], [x.reshape(2, 3)])
    with pytest.raises(ShapeError, match="structures differ"):
        residual_add([x], [])
    with pytest.raises(DTypeError, match="int32"):
        residual_add([x.astype("i4")], [x.astype("i4")])


@pytest.mark.parametrize("build", ["address", "threads"])
def test_under_sanitizers(build):
    register_launcher("emulated", EmulatedLauncher(build=build, runs=((0, 0xFF, 1),)))
    try:
        xs = [drawn(shape, "e", 1) for shape in [(7,), (3, 129)]]
        given = [xp.asarray(xs[0])[1:], xp.asarray(xs[1])]
        for x, result in zip(given, residual_add(given, given), strict=True):
            np.testing.assert_array_equal(result.get(), 2 * x.get())
    finally:
        register_launcher("emulated", launcher)
