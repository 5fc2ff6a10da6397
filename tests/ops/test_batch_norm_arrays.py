"""Batch normalisation of plain arrays on NumPy, against the formulas written out in float64."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from gpulayers.errors import DTypeError, ShapeError
from gpulayers.ops.batch_norm import arrays as bn
from gpulayers.ops.batch_norm import blocks as batch_norm_blocks
from gpulayers.ops.batch_norm import direct as batch_norm_direct
from gpulayers.ops.batch_norm import weighted as batch_norm_weighted
from gpulayers.ops.batch_norm.layout import collapse
from gpulayers.ops.host import buffers as host_buffers
from gpulayers.ops.host import threads as host_threads
from tests.ops import batch_norm_truth as truth

EPSILON = 1e-3
DTYPES = {"float64": 1e-11, "float32": 1e-5, "float16": 6e-3, "bfloat16": 5e-2}

# shape, kept axes, sub-batches: each line is another layout, width or regime
CASES = [
    ((8, 16), (1,), 1),
    ((9, 1), (1,), 1),
    ((1, 5), (1,), 1),
    ((7, 4, 3), (-1,), 1),
    ((7, 4, 3), (1,), 1),
    ((7, 4, 3), (0,), 1),
    ((4, 3, 5, 2), (1, 2), 1),
    ((4, 3, 5, 2), (3, 1), 1),  # not side by side: a transposing copy
    ((4, 3, 1, 2), (3, 1), 1),  # side by side but for an axis of one
    ((1200, 37), (1,), 1),  # many rows: blocks, several rows side by side, and a rest
    ((3001, 3), (1,), 1),
    ((40, 2000), (1,), 1),
    ((10, 20, 15, 16), (3,), 1),
    ((10, 16, 15, 20), (1,), 1),  # rows of their own
    ((10, 300, 5, 3), (1,), 1),  # short inner rows: columns
    ((2, 9, 9001), (1,), 1),  # inner rows longer than a dot product may be
    ((3, 150, 40, 40), (1,), 1),  # one row of channels is more than a block
    ((2, 3, 70, 11), (1,), 1),  # rows too short for a loop of their own, too many for columns
    ((1, 2, 300, 1001), (1,), 1),  # one channel of one row is more than a block
    ((2, 300001), (1,), 1),  # so many channels that one row is more than a block
    ((12, 5), (1,), 3),
    ((12, 5), (1,), 12),
    ((6, 7, 5), (2,), 2),
    ((6, 5, 7), (1,), 3),
    ((600, 70), (1,), 30),
    ((8, 30, 40, 6), (3,), 4),
    ((8, 6, 30, 40), (1,), 4),
    ((8, 30, 6, 40), (2,), 2),
    ((6, 5, 30, 40), (1, 3), 3),
]


def _make(shape: tuple[int, ...], axis: tuple[int, ...], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    channels = int(np.prod([shape[a] for a in axis]))
    draw = lambda *size: rng.normal(size=size)  # noqa: E731
    return {
        "x": draw(*shape) * 2 + 1,
        "dy": draw(*shape),
        "residual": draw(*shape),
        "gamma": draw(channels),
        "beta": draw(channels),
        "mean": draw(channels),
        "variance": rng.uniform(0.5, 2, channels),
    }


def _cast(values: dict[str, np.ndarray], dtype: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the arrays in the dtypes a layer gives them, and the same numbers as float64."""
    storage = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    parameter = np.dtype("float64" if dtype == "float64" else "float32")
    cast = {k: v.astype(storage if k in ("x", "dy", "residual") else parameter) for k, v in values.items()}
    return cast, {k: v.astype(np.float64) for k, v in cast.items()}


def _close(got: np.ndarray, want: np.ndarray, tolerance: float, what: str) -> None:
    scale = max(1.0, float(np.abs(want).max(initial=0)))
    error = np.abs(got.astype(np.float64) - want).max(initial=0)
    assert error <= tolerance * scale, f"{what}: off by {error}, {tolerance * scale} allowed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis", "groups"), CASES)
def test_forward_and_backward(shape, axis, groups, dtype):
    values, exact = _cast(_make(shape, axis), dtype)
    got = bn.forward(values["x"], values["gamma"], values["beta"], axis=axis, epsilon=EPSILON, groups=groups)
    want = truth.forward(exact["x"], exact["gamma"], exact["beta"], axis, EPSILON, groups)
    tolerance = DTYPES[dtype]
    assert got.y.dtype == values["x"].dtype and got.y.flags.c_contiguous
    assert got.mean.dtype == got.saved.dtype == values["gamma"].dtype
    assert got.mean.shape == got.variance.shape == values["gamma"].shape
    assert got.saved.shape == (3, groups, got.mean.size)
    _close(got.y, want.y, tolerance, "y")
    _close(got.mean, want.mean, min(tolerance, 2e-6), "mean")
    _close(got.variance, want.variance, min(tolerance, 1e-5), "variance")
    back = bn.backward(values["dy"], values["x"], values["gamma"], got.saved, axis=axis, groups=groups)
    expected = truth.backward(exact["dy"], exact["x"], exact["gamma"], axis, EPSILON, groups)
    loose = tolerance * (300 if (np.asarray(want.variance) < 1e-2).any() else 4)
    assert back.dx.dtype == values["x"].dtype and back.dresidual is None
    for name in ("dx", "dgamma", "dbeta"):
        _close(getattr(back, name), getattr(expected, name), loose, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"), [((8, 16), (1,)), ((1200, 37), (1,)), ((10, 16, 15, 20), (1,)), ((4, 3, 5, 2), (3, 1))]
)
@pytest.mark.parametrize(("residual", "activation"), [(False, "relu"), (True, None), (True, "relu")])
def test_residual_and_relu(shape, axis, dtype, residual, activation):
    values, exact = _cast(_make(shape, axis), dtype)
    extra, exact_extra = (values["residual"], exact["residual"]) if residual else (None, None)
    options = {"axis": axis, "activation": activation}
    relu = activation == "relu"
    got = bn.forward(values["x"], values["gamma"], values["beta"], residual=extra, **options)
    want = truth.forward(exact["x"], exact["gamma"], exact["beta"], axis, EPSILON, residual=exact_extra, relu=relu)
    tolerance = DTYPES[dtype]
    _close(got.y, want.y, tolerance, "y")
    back = bn.backward(values["dy"], values["x"], values["gamma"], got.saved, y=got.y, residual=residual, **options)
    mask = got.y.astype(np.float64) > 0 if relu else None
    expected = truth.backward(exact["dy"], exact["x"], exact["gamma"], axis, EPSILON, mask=mask)
    for name in ("dx", "dgamma", "dbeta"):
        _close(getattr(back, name), getattr(expected, name), 4 * tolerance, name)
    if residual and not relu:
        assert back.dresidual is values["dy"]
    elif residual:
        np.testing.assert_array_equal(back.dresidual, np.where(mask, values["dy"], 0))
    statistics = values["mean"], values["variance"]
    y = bn.inference(values["x"], values["gamma"], values["beta"], *statistics, residual=extra, **options)
    n = truth.normalised(exact["x"], exact["mean"], exact["variance"], axis, EPSILON)
    plain = n * truth.along(exact["gamma"], exact["x"], axis) + truth.along(exact["beta"], exact["x"], axis)
    _close(y, truth.finish(plain, exact_extra, relu), tolerance, "inference")
    back = bn.inference_backward(
        values["dy"], values["x"], values["gamma"], *statistics, y=y, residual=residual, **options
    )
    g = exact["dy"] * (y.astype(np.float64) > 0) if relu else exact["dy"]
    reduced = truth.reduced_axes(g, axis)
    inverse = truth.along(exact["gamma"] / np.sqrt(exact["variance"] + EPSILON), exact["x"], axis)
    _close(back.dx, g * inverse, tolerance, "inference dx")
    _close(back.dgamma, (g * n).sum(axis=reduced).ravel(), 4 * tolerance, "inference dgamma")
    _close(back.dbeta, g.sum(axis=reduced).ravel(), 4 * tolerance, "inference dbeta")
    assert (back.dresidual is None) == (not residual)


@pytest.mark.parametrize("without", [("gamma",), ("beta",), ("gamma", "beta")])
@pytest.mark.parametrize(("shape", "groups"), [((8, 16), 1), ((8, 16), 4), ((5000, 9), 1)])
def test_no_scale_no_center(shape, groups, without):
    values = _make(shape, (1,))
    kept = {k: None if k in without else values[k] for k in ("gamma", "beta")}
    full = {k: np.full(shape[1], 1.0 if k == "gamma" else 0.0) if v is None else v for k, v in kept.items()}
    got = bn.forward(values["x"], kept["gamma"], kept["beta"], axis=(1,), groups=groups)
    want = truth.forward(values["x"], full["gamma"], full["beta"], (1,), EPSILON, groups)
    np.testing.assert_allclose(got.y, want.y, atol=1e-12)
    back = bn.backward(values["dy"], values["x"], kept["gamma"], got.saved, axis=(1,), groups=groups)
    expected = truth.backward(values["dy"], values["x"], full["gamma"], (1,), EPSILON, groups)
    np.testing.assert_allclose(back.dx, expected.dx, atol=1e-10)
    np.testing.assert_allclose(back.dgamma, expected.dgamma, atol=1e-10)


CLIPS = [(None, None, None), (0.8, 1.2, 0.3), (None, 1.1, None), (np.float64(0.9), np.asarray(1.3), 0.1)]


@pytest.mark.parametrize("clips", CLIPS)
@pytest.mark.parametrize(
    ("shape", "axis", "groups"),
    [((8, 6), (1,), 1), ((12, 6), (1,), 3), ((20, 6, 30, 20), (1,), 1), ((600, 9, 7), (2,), 4)],
)
def test_renorm(shape, axis, groups, clips):
    values = _make(shape, axis)
    channels = values["gamma"].size
    rng = np.random.default_rng(1)
    old = {k: rng.uniform(0.5, 2, channels) for k in ("mean", "variance", "stddev", "renorm_mean", "renorm_stddev")}
    old["renorm_stddev"][0] = 0.0  # below the floor sqrt(epsilon)
    moving = bn.MovingStatistics(
        *(old[k].copy() for k in ("mean", "variance")), 0.1,
        stddev=old["stddev"].copy(), renorm_mean=old["renorm_mean"].copy(), renorm_stddev=old["renorm_stddev"].copy(),
        renorm_decay=0.2,
    )  # fmt: skip
    renorm = bn.Renorm(moving.renorm_mean, moving.renorm_stddev, *clips)
    r, d, after = truth.renorm(values["x"], axis, EPSILON, groups, old, clips, 0.1, 0.2)
    got = bn.forward(
        values["x"], values["gamma"], values["beta"], axis=axis, groups=groups, renorm=renorm, moving=moving
    )
    want = truth.forward(values["x"], values["gamma"], values["beta"], axis, EPSILON, groups, r=r, d=d)
    np.testing.assert_allclose(got.y, want.y, rtol=1e-9, atol=1e-9)
    for name, expected in after.items():
        np.testing.assert_allclose(getattr(moving, name), expected, rtol=1e-10, err_msg=name)
    back = bn.backward(values["dy"], values["x"], values["gamma"], got.saved, axis=axis, groups=groups)
    expected = truth.backward(values["dy"], values["x"], values["gamma"], axis, EPSILON, groups, r=r, d=d)
    for name in ("dx", "dgamma", "dbeta"):
        np.testing.assert_allclose(getattr(back, name), getattr(expected, name), rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("renormed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_by_finite_differences(renormed, weighted, groups):
    """Differences of the library's own forward, with renorm's r and d held at their first values by the clips."""
    values = _make((6, 4, 3), (2,))
    rng = np.random.default_rng(2)
    weights = rng.uniform(0, 2, (6, 4, 1)) * (rng.random((6, 4, 1)) > 0.3) if weighted else None
    r, d = 1.3, 0.2
    renorm = None
    if renormed:  # clips of one point: r and d are these constants whatever the statistics
        renorm = bn.Renorm(np.full(3, -1e6), np.full(3, 1.0), r, r, d)
    options = {"axis": (2,), "groups": groups, "weights": weights}

    def loss(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> float:
        return float((bn.forward(x, gamma, beta, renorm=renorm, **options).y * values["dy"]).sum())

    arguments = [values["x"], values["gamma"], values["beta"]]
    saved = bn.forward(*arguments, renorm=renorm, **options).saved
    got = bn.backward(values["dy"], values["x"], values["gamma"], saved, **options)
    for index, name in enumerate(("dx", "dgamma", "dbeta")):
        for _ in range(6):
            direction = rng.normal(size=arguments[index].shape)
            ends = []
            for sign in (1, -1):
                moved = list(arguments)
                moved[index] = moved[index] + sign * 1e-6 * direction
                ends.append(loss(*moved))
            slope = (ends[0] - ends[1]) / 2e-6
            assert slope == pytest.approx(float((getattr(got, name) * direction).sum()), rel=1e-6, abs=1e-7), name


def test_weights_are_frequencies():
    x = np.array([[1.0], [3.0]])
    mean, variance = bn.statistics(x, axis=(1,), weights=np.array([[1.0], [3.0]]))
    np.testing.assert_allclose([mean[0], variance[0]], [2.5, 0.75])
    x[0] = np.nan  # weight 0: left out, but still normalised
    got = bn.forward(x, None, None, axis=(1,), weights=np.array([[0.0], [1.0]]))
    np.testing.assert_allclose(got.mean, 3)
    assert np.isnan(got.y[0]).all() and got.y[1] == 0
    got = bn.forward(np.ones((2, 1)), None, None, axis=(1,), weights=np.zeros((2, 1)))
    np.testing.assert_array_equal([got.mean, got.variance], 0)


@pytest.mark.parametrize("pieces_of", [1, 7, 60, None])
@pytest.mark.parametrize(("shape", "axis", "groups"), [case for case in CASES if np.prod(case[0]) < 2000])
@pytest.mark.parametrize("weighted", [False, True])
def test_pieces_of_any_size(monkeypatch, shape, axis, groups, weighted, pieces_of):
    """Rows of weight 2 count as if they came twice."""
    if pieces_of:
        monkeypatch.setattr(batch_norm_weighted, "ELEMENTS_HOST", pieces_of)
    monkeypatch.setattr(bn, "TRANSPOSED_BYTES", 0)
    values = _make(shape, axis)
    rng = np.random.default_rng(11)
    counts = rng.integers(1, 3, (*shape[:-1], 1) if weighted and axis != (0,) else (1,) * len(shape))
    options = {"axis": axis, "groups": groups}
    x, dy, gamma, beta = (values[k] for k in ("x", "dy", "gamma", "beta"))
    weights = counts.astype(np.float64) if weighted else None
    view = batch_norm_weighted.view_of(x, axis, groups, weights, x.dtype)
    seen = np.zeros(view.shape, int)
    for piece in view.pieces(np):
        seen[piece] += 1
    assert (seen == 1).all()
    mean, variance = bn.statistics(x, weights=weights, **options)
    repeated, everything = np.broadcast_to(counts, shape) if weighted else np.ones(shape, int), []
    for group in range(groups):
        part, count = (v[group::groups] for v in (x, repeated))
        reduced = truth.reduced_axes(part, axis)
        average = (part * count).sum(reduced, keepdims=True) / count.sum(reduced, keepdims=True)
        squares = (count * (part - average) ** 2).sum(reduced) / count.sum(reduced)
        everything.append((average.ravel(), squares.ravel()))
    np.testing.assert_allclose(mean.reshape(groups, -1), [m for m, _ in everything], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(variance.reshape(groups, -1), [v for _, v in everything], rtol=1e-10, atol=1e-12)
    if weighted:
        return
    got = bn.forward(x, gamma, beta, residual=values["residual"], activation="relu", **options)
    want = truth.forward(x, gamma, beta, axis, EPSILON, groups, residual=values["residual"], relu=True)
    _close(got.y, want.y, 1e-11, "y")
    back = bn.backward(dy, x, gamma, got.saved, y=got.y, activation="relu", residual=True, **options)
    expected = truth.backward(dy, x, gamma, axis, EPSILON, groups, mask=want.y > 0)
    for name in ("dx", "dgamma", "dbeta"):
        _close(getattr(back, name), getattr(expected, name), 1e-8, name)
    np.testing.assert_array_equal(back.dresidual, np.where(want.y > 0, dy, 0))


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((20000, 20), (1,)), ((100000, 2), (1,)), ((16, 20, 30, 30), (1,)), ((900, 20), (1,)), ((90, 20, 9, 30), (1, 3))],
)
@pytest.mark.parametrize("ratio", [0, 1, 100, 1e4])
@pytest.mark.parametrize("weighted", [False, True])
def test_float32_far_from_zero(monkeypatch, shape, axis, ratio, weighted):
    """At mean / sigma = 1e4 the variance is within 1e-5 relative, the output within 2e-6, of float64 on the same x."""
    monkeypatch.setattr(bn, "TRANSPOSED_BYTES", 0)  # axes that lie apart are worked on in pieces, as in large arrays
    x = (np.random.default_rng(3).normal(size=shape) + ratio).astype(np.float32)
    weights = np.ones((*shape[:-1], 1), np.float32) if weighted else None
    got = bn.forward(x, None, None, axis=axis, epsilon=0.0, weights=weights)
    want = truth.forward(x.astype(np.float64), 1.0, 0.0, axis, 0.0)
    np.testing.assert_allclose(got.variance, want.variance, rtol=1e-5)
    assert np.abs(got.y - want.y).max() <= 2e-6
    dy = np.random.default_rng(4).normal(size=shape).astype(np.float32)
    back = bn.backward(dy, x, None, got.saved, axis=axis, weights=weights)
    expected = truth.backward(dy.astype(np.float64), x.astype(np.float64), 1.0, axis, 0.0)
    assert np.abs(back.dx - expected.dx).max() <= 4e-6
    y = bn.inference(x, None, None, got.mean, got.variance, axis=axis, epsilon=0.0)
    mean, variance = got.mean.astype(np.float64), got.variance.astype(np.float64)
    assert np.abs(y - truth.normalised(x.astype(np.float64), mean, variance, axis, 0.0)).max() <= 2e-6


def test_an_outlier_in_front_does_not_spoil_the_variance():
    x = np.random.default_rng(5).normal(size=(50000, 4)).astype(np.float32)
    x[0] = 3000.0
    want = x.astype(np.float64).var(axis=0)
    np.testing.assert_allclose(bn.statistics(x, axis=(1,))[1], want, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("shape", "axis"), [((9, 5), (1,)), ((9000, 5), (1,)), ((20, 5, 30, 30), (1,))])
@pytest.mark.parametrize("skip", [False, True])
def test_nonfinite_values_stay_in_their_channel(shape, axis, bad, skip):
    x = np.random.default_rng(6).normal(size=shape)
    clean = bn.forward(x, None, None, axis=axis)
    dirty = x.copy()
    dirty[(3, 2) + (0,) * (len(shape) - 2)] = bad
    skipped = np.zeros(1, np.int64)
    moving = bn.MovingStatistics(np.zeros(5), np.ones(5), 0.5, skip_nonfinite=skip, skipped=skipped)
    got = bn.forward(dirty, None, None, axis=axis, moving=moving)
    others = [0, 1, 3, 4]
    assert np.isnan(got.y[:, 2]).any()
    np.testing.assert_allclose(got.y[:, others], clean.y[:, others], atol=1e-12)
    np.testing.assert_allclose(moving.mean[others], clean.mean[others] / 2, atol=1e-12)
    if skip:
        assert moving.mean[2] == 0 and moving.variance[2] == 1 and skipped[0] == 1
    else:
        assert np.isnan(moving.mean[2]) or np.isinf(moving.mean[2])


@pytest.mark.parametrize("unbiased", [False, True])
def test_moving_statistics(unbiased):
    values = _make((6, 5, 3), (2,))
    moving = bn.MovingStatistics(values["mean"][:3].copy(), values["variance"][:3].copy(), 0.1, unbiased=unbiased)
    got = bn.forward(values["x"], None, None, axis=(2,), moving=moving)
    factor = 30 / 29 if unbiased else 1
    np.testing.assert_allclose(moving.mean, values["mean"] * 0.9 + got.mean * 0.1)
    np.testing.assert_allclose(moving.variance, values["variance"] * 0.9 + got.variance * factor * 0.1)


def test_one_value_per_channel():
    beta = np.array([1.0, 2.0], np.float32)
    moving = bn.MovingStatistics(np.zeros(2, np.float32), np.ones(2, np.float32), 0.1, unbiased=True)
    got = bn.forward(np.array([[7.0, 9.0]], np.float32), None, beta, axis=(1,), moving=moving)
    np.testing.assert_array_equal(got.y, [beta])
    np.testing.assert_array_equal(got.variance, 0)
    np.testing.assert_allclose(moving.variance, 0.9)


@pytest.mark.parametrize(("shape", "axis"), [((0, 3), (1,)), ((2, 0), (1,)), ((0, 3, 4), (1,))])
def test_empty(shape, axis):
    x = np.empty(shape)
    channels = shape[1]
    moving = bn.MovingStatistics(np.full(channels, 3.0), np.full(channels, 4.0), 0.5)
    got = bn.forward(x, None, None, axis=axis, moving=moving)
    assert got.y.shape == shape and (moving.mean == 3).all() and (moving.variance == 4).all()
    assert not got.mean.any() and got.mean.shape == (channels,)
    back = bn.backward(x, x, None, got.saved, axis=axis)
    assert back.dx.shape == shape and not back.dgamma.any()
    assert bn.inference(x, None, None, moving.mean, moving.variance, axis=axis).shape == shape
    assert bn.inference_backward(x, x, None, moving.mean, moving.variance, axis=axis).dx.shape == shape
    assert bn.statistics(x, axis=axis)[0].shape == (channels,)


def test_views_that_are_not_contiguous():
    values = _make((40, 12, 50), (1,))
    x = values["x"][::2, ::-1].swapaxes(0, 2)
    dy = values["dy"][::2, ::-1].swapaxes(0, 2)
    got = bn.forward(x, values["gamma"], values["beta"], axis=(1,), residual=dy)
    copied = bn.forward(x.copy(), values["gamma"], values["beta"], axis=(1,), residual=dy.copy())
    np.testing.assert_array_equal(got.y, copied.y)
    back = bn.backward(dy, x, values["gamma"], got.saved, axis=(1,))
    np.testing.assert_array_equal(back.dx, bn.backward(dy.copy(), x.copy(), values["gamma"], got.saved, axis=(1,)).dx)


def test_statistics_of_groups():
    x = np.arange(12.0).reshape(6, 2)
    mean, variance = bn.statistics(x, axis=(1,), groups=3)
    np.testing.assert_allclose(mean, [[3, 4], [5, 6], [7, 8]])
    np.testing.assert_allclose(variance, 9)


@pytest.mark.parametrize(("shape", "axis"), [((60000, 30), 1), ((8, 16, 60, 61), 1), ((16, 300, 14, 14), 1)])
def test_the_same_bits_with_and_without_threads(monkeypatch, shape, axis):
    x, dy = np.random.default_rng(7).normal(size=(2, *shape)).astype(np.float32)
    kept = x.copy()

    def step():
        got = bn.forward(x, None, None, axis=(axis,))
        return got.y, *bn.backward(dy, x, None, got.saved, axis=(axis,))[:3]

    with_threads = step()
    monkeypatch.setattr(host_threads, "_pool", lambda: None)
    for alone, together in zip(step(), with_threads, strict=True):
        np.testing.assert_array_equal(alone, together)
    np.testing.assert_array_equal(x, kept)


@pytest.mark.parametrize("inner", [1500, 4096, 70001])
def test_variance_of_long_rows(inner):
    x = (np.random.default_rng(3).normal(size=(1, 4, inner)) + 3).astype(np.float32)
    mean, variance = bn.statistics(x, axis=(1,))
    np.testing.assert_allclose(variance, x.astype(np.float64).var(axis=(0, 2)), rtol=3e-6)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(axis=(0, 2)), rtol=1e-6)


@pytest.mark.parametrize("shape", [(1600, 600), (6272, 1024), (40000, 30)])
@pytest.mark.parametrize("ratio", [0, 1, 2, 10])
def test_long_columns_keep_their_digits(shape, ratio):
    x = (np.random.default_rng(0).normal(size=shape) + ratio).astype(np.float32)
    got, wide = bn.forward(x, None, None, axis=(1,), epsilon=1e-3), x.astype(np.float64)
    np.testing.assert_allclose(got.variance, wide.var(axis=0), rtol=1e-6)
    np.testing.assert_allclose(got.y, (wide - wide.mean(axis=0)) / np.sqrt(wide.var(axis=0) + 1e-3), atol=2e-6)


@pytest.mark.parametrize(("shape", "axis", "groups"), CASES)
def test_both_numpy_bodies_agree(monkeypatch, shape, axis, groups):
    values = _make(shape, axis)
    results = []
    for small in (True, False):
        monkeypatch.setattr(batch_norm_direct, "suits", lambda layout, small=small: small)
        got = bn.forward(values["x"], values["gamma"], values["beta"], axis=axis, groups=groups)
        results.append(
            (
                *got[:3],
                *bn.backward(values["dy"], values["x"], values["gamma"], got.saved, axis=axis, groups=groups)[:3],
            )
        )
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("shape", "groups"), [((4096, 4, 4, 16), 2), ((65536, 2, 8), 4), ((32, 56, 56, 64), 4)])
def test_sub_batches_are_no_reason_for_many_blocks(shape, groups):
    for sums, copies in ((False, True), (True, True), (True, False)):
        view = batch_norm_blocks.view_of(collapse(shape, (len(shape) - 1,), groups), sums, copies)
        assert len(view.blocks) <= max(2 * math.prod(shape) / batch_norm_blocks.ELEMENTS, 32)


@pytest.mark.parametrize(("shape", "axis"), [((8192, 16), (1,)), ((8, 16, 1024), (1,))])
def test_squares_beyond_float32(shape, axis):
    """The sums of squares overflow; around the mean they do not."""
    x = (1e20 + 1e16 * np.random.default_rng(0).normal(size=shape)).astype(np.float32)
    got = bn.forward(x, None, None, axis=axis)
    over = {"axis": tuple(a for a in range(len(shape)) if a not in axis), "dtype": np.float64}
    np.testing.assert_allclose(got.variance, x.var(**over), rtol=1e-5)
    normalised = (x - x.mean(**over, keepdims=True)) / x.std(**over, keepdims=True)
    np.testing.assert_allclose(got.y, normalised, atol=1e-4)


@pytest.mark.parametrize("shape", [(262144, 64), (640, 51200), (2048, 2048, 2, 2), (32, 64, 96, 96)])
def test_memory_beside_the_results(shape):
    """At most 64 MB for 400 MB, whatever the shape: partial sums must not grow with the number of channels."""
    x, dy = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    host_buffers.release()
    tracemalloc.start()
    try:
        got = bn.forward(x, None, None, axis=(1,))
        forward = tracemalloc.get_traced_memory()[1] - got.y.nbytes
        tracemalloc.reset_peak()
        dx = bn.backward(dy, x, None, got.saved, axis=(1,)).dx
        backward = tracemalloc.get_traced_memory()[1] - got.y.nbytes - dx.nbytes
    finally:
        tracemalloc.stop()
    assert max(forward, backward) <= 64 / 400 * x.nbytes


def check_series(view):
    """All blocks in order, those of a series with the same statistics, their pieces one after the other."""
    blocks = iter(view.blocks)
    for series in view.series:
        end = 0
        for place in series.pieces:
            block = next(blocks)
            assert (series.table, series.left, series.right) == (block.segment % view.tables, block.left, block.right)
            assert series.columns == view.columns_of(block)
            assert place == slice(end, end + math.ceil((block.last - block.first) / batch_norm_blocks.ROWS))
            end = place.stop
    assert next(blocks, None) is None


def test_blocks_cover_every_element_once():
    for (shape, axis, groups), sums, copies in itertools.product(CASES, (False, True), (False, True)):
        view = batch_norm_blocks.view_of(collapse(shape, axis, groups), sums, copies)
        seen = np.zeros(view.shape, int)
        check_series(view)
        for part in batch_norm_blocks.parts_of(view, seen):
            assert np.shares_memory(part, seen)
            part += 1
        assert (seen == 1).all(), shape


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"axis": (2,)}, ShapeError, "axis out of range"),
        ({"axis": ()}, ShapeError, "axis out of range"),
        ({"axis": (1, -1)}, ShapeError, "twice"),
        ({"axis": (1,), "groups": 3}, ShapeError, "that divide axis 0"),
        ({"axis": (0,), "groups": 2}, ShapeError, "sub-batches"),
        ({"axis": (1,), "activation": "tanh"}, DTypeError, "unknown activation"),
        ({"axis": (1,), "residual": np.zeros((4, 3))}, ShapeError, "another shape"),
        ({"axis": (0,)}, ShapeError, "wrong number"),
    ],
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        bn.forward(np.zeros((4, 2)), np.ones(2), None, **arguments)
    with pytest.raises(DTypeError, match="not floating"):
        bn.forward(np.zeros((4, 2), int), None, None, axis=(1,))
    with pytest.raises(ShapeError, match="needs the output"):
        bn.backward(np.zeros((4, 2)), np.zeros((4, 2)), None, np.zeros((3, 1, 2)), axis=(1,), activation="relu")


@pytest.mark.parametrize("name", ["mean", "variance", "stddev", "renorm_mean", "renorm_stddev"])
@pytest.mark.parametrize(
    ("wrong", "error"),
    [(np.ones((2, 3)).T, ShapeError), (np.ones((3, 2), int), DTypeError), (np.ones(12)[::2], ShapeError)],
)
def test_moving_statistics_that_cannot_be_updated(name, wrong, error):
    x = np.random.default_rng(9).normal(size=(4, 3, 2))
    good = {k: np.ones((3, 2)) for k in ("mean", "variance", "stddev", "renorm_mean", "renorm_stddev")}
    moving = bn.MovingStatistics(decay=0.5, **{**good, name: wrong})
    with pytest.raises(error, match="moving statistics"):
        bn.forward(x, None, None, axis=(1, 2), moving=moving, renorm=bn.Renorm(np.zeros(6), np.ones(6)))
    for value in (*good.values(), wrong):
        np.testing.assert_array_equal(value, 1)


def test_groups_that_are_no_integer_are_refused_and_leave_nothing_behind():
    """4.0 hashes like 4: what a refused call left in the cache of layouts would be found by the next good one."""
    x = np.random.default_rng(8).normal(size=(88, 3))
    with pytest.raises(DTypeError, match="groups"):
        bn.forward(x, None, None, axis=(1,), groups=4.0)
    assert all(type(size) is int for size in collapse(x.shape, (1,), 4)[:5])
    assert bn.forward(x, None, None, axis=(1,), groups=np.int64(4)).saved.shape == (3, 4, 3)


@pytest.mark.parametrize(
    ("shape", "axis", "groups"),
    [
        ((16, 40, 40, 400), (1,), 1),
        ((16, 40, 40, 400), (3,), 8),
        ((16, 40, 40, 400), (1, 3), 1),
        ((10_000_000, 1), (1,), 1),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_memory_beyond_the_outputs(shape, axis, groups, weighted):
    """40 MB in: no temporary grows with the input."""
    x = np.zeros(shape, np.float32)
    x[...] = np.arange(shape[-1])
    options = {"axis": axis, "groups": groups, "weights": np.ones((*shape[:-1], 1), np.float32) if weighted else None}
    host_buffers.release()  # memory that is kept for reuse would hide an output
    tracemalloc.start()
    try:
        f = bn.forward(x, None, None, **options)
        bn.backward(x, x, None, f.saved, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 2 * x.nbytes <= peak < 2 * x.nbytes + 16 * 2**20


def test_a_relu_masks_gradients_that_are_not_finite():
    """Where the output was 0 nothing flows back, not even an infinity, in arrays of the blocked size too."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(4000, 16)).astype(np.float32)
    step = bn.forward(x, None, None, axis=(1,), activation="relu")
    dy = rng.normal(size=x.shape).astype(np.float32)
    masked = step.y == 0
    expected = bn.backward(dy, x, None, step.saved, axis=(1,), y=step.y, activation="relu", residual=True)
    dy[masked & (rng.random(x.shape) < 0.1)] = np.inf
    dy[masked & (rng.random(x.shape) < 0.1)] = np.nan
    found = bn.backward(dy, x, None, step.saved, axis=(1,), y=step.y, activation="relu", residual=True)
    np.testing.assert_array_equal(found.dx, expected.dx)
    np.testing.assert_array_equal(found.dresidual, np.where(masked, np.float32(0), dy))
