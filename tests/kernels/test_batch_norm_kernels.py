"""The batch normalisation kernels on the emulated launcher, against the formulas in float64."""

from __future__ import annotations

import ast
import itertools

import numpy as np
import pytest

from gpulayers.errors import ShapeError
from gpulayers.launch import DeviceProperties, Kernel, division, register_launcher
from gpulayers.launch import source as launch_source
from gpulayers.ops.batch_norm import arrays as bn
from gpulayers.ops.batch_norm import kernels as batch_norm_kernels
from gpulayers.ops.batch_norm.layout import collapse
from gpulayers.ops.batch_norm.plan import choose, plan_table, static_shared
from tests.kernels.bfloat16 import BFLOAT16, finfo
from tests.kernels.emulation import H200_LIKE, SMALL, EmulatedLauncher, EmulationError
from tests.kernels.strict_array import launcher, xp
from tests.ops import batch_norm_truth as truth

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("emulated_gpu")]

EPSILON = 1e-3
TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "float16": 6e-3, "bfloat16": 5e-2}
PEOPLE = ("x", "dy", "residual")

# shape, kept axes, sub-batches, regime forward on the large emulated GPU
CASES = [
    ((8, 16), (1,), 1, "small"),
    ((1, 5), (1,), 1, "small"),
    ((37, 1), (1,), 1, "small"),
    ((40, 7), (1,), 1, "small"),
    ((3, 8, 10, 4), (1,), 1, "small"),
    ((3, 5, 7, 3), (1,), 1, "small"),
    ((12, 8), (1,), 3, "small"),
    ((6, 3, 8), (2,), 2, "small"),
    ((6, 5, 2, 4), (1,), 3, "small"),
    ((6, 5, 4, 8), (2,), 2, "small"),
    ((4, 3, 5, 2), (3, 1), 1, "small"),
    ((2, 8192), (1,), 1, "small"),
    ((5000, 16), (1,), 1, "sweeps"),
    ((9000, 3), (1,), 1, "sweeps"),
    ((80, 16, 7, 8), (3,), 20, "sweeps"),
    ((100, 13), (1,), 50, "sweeps"),
    ((80, 3, 11, 8), (1,), 20, "sweeps"),
    ((7, 3, 60, 67), (1,), 1, "sweeps"),
]
CLUSTER_CASES = [
    ((1100, 288), (1,), 1),
    ((4100, 131), (1,), 1),
    ((17, 12, 40, 60), (1,), 1),
    ((17, 11, 37, 61), (1,), 1),
]


def make(shape, axis, dtype, seed=0):
    """Return a layer's arrays in their dtypes, and the same numbers in float64."""
    rng = np.random.default_rng(seed)
    channels = int(np.prod([shape[a] for a in axis]))
    values = {name: rng.normal(size=shape) for name in PEOPLE}
    values["x"] = values["x"] * 2 + 1
    for name in ("gamma", "beta", "mean"):
        values[name] = rng.normal(size=channels)
    values["variance"] = rng.uniform(0.5, 2, channels)
    storage = np.dtype(BFLOAT16 if dtype == "bfloat16" else dtype)
    parameter = np.dtype("float64" if dtype == "float64" else "float32")
    cast = {name: v.astype(storage if name in PEOPLE else parameter) for name, v in values.items()}
    return cast, {name: v.astype(np.float64) for name, v in cast.items()}


def close(got, want, tolerance, what):
    scale = max(1.0, float(np.abs(want).max(initial=0)))
    error = np.abs(got.get().astype(np.float64) - want).max(initial=0)
    assert error <= tolerance * scale, f"{what}: off by {error}, {tolerance * scale} allowed"


def at_offset(values, offset):
    """Return a device array that lies `offset` elements behind a multiple of 16 bytes."""
    memory = xp.empty(values.size + offset, values.dtype)
    memory[offset:] = xp.asarray(values.ravel())
    return memory[offset:].reshape(values.shape)


def check(shape, axis, groups, dtype, residual=False, relu=False, seed=0, offset=0):
    """Run forward and backward of training and inference on the kernels and compare everything.

    x, dy and the residual begin `offset` elements behind a multiple of 16 bytes.
    """
    values, exact = make(shape, axis, dtype, seed)
    device = {name: at_offset(v, offset if name in PEOPLE else 0) for name, v in values.items()}
    options = {"axis": axis, "activation": "relu" if relu else None}
    extra, exact_extra = (device["residual"], exact["residual"]) if residual else (None, None)
    tolerance = TOLERANCE[dtype]
    f = bn.forward(device["x"], device["gamma"], device["beta"], groups=groups, residual=extra, **options)
    want = truth.forward(
        exact["x"], exact["gamma"], exact["beta"], axis, EPSILON, groups, residual=exact_extra, relu=relu
    )
    assert f.y.dtype == values["x"].dtype and f.mean.dtype == values["gamma"].dtype
    close(f.y, want.y, tolerance, "y")
    close(f.mean, want.mean, min(tolerance, 2e-6), "mean")
    close(f.variance, want.variance, min(tolerance, 1e-5), "variance")
    arguments = device["dy"], device["x"], device["gamma"], f.saved
    b = bn.backward(*arguments, groups=groups, mask=f.mask, residual=residual, **options)
    if relu:
        by_output = bn.backward(*arguments, groups=groups, y=f.y, residual=residual, **options)
        for name in ("dgamma", "dbeta"):
            np.testing.assert_array_equal(getattr(b, name).get(), getattr(by_output, name).get())
    mask = f.y.get().astype(np.float64) > 0 if relu else None
    back = truth.backward(exact["dy"], exact["x"], exact["gamma"], axis, EPSILON, groups, mask=mask)
    loose = tolerance * (300 if (np.asarray(want.variance) < 1e-2).any() else 4)
    for name in ("dx", "dgamma", "dbeta"):
        close(getattr(b, name), getattr(back, name), loose, name)
    if residual and relu:
        np.testing.assert_array_equal(b.dresidual.get(), np.where(mask, values["dy"], 0))
    statistics = device["mean"], device["variance"]
    y = bn.inference(device["x"], device["gamma"], device["beta"], *statistics, residual=extra, **options)
    n = truth.normalised(exact["x"], exact["mean"], exact["variance"], axis, EPSILON)
    plain = n * truth.along(exact["gamma"], n, axis) + truth.along(exact["beta"], n, axis)
    close(y, truth.finish(plain, exact_extra, relu), tolerance, "inference")
    output = y if relu and residual else None
    b = bn.inference_backward(
        device["dy"], device["x"], device["gamma"], *statistics, beta=device["beta"], y=output, residual=residual,
        **options,
    )  # fmt: skip
    g = exact["dy"] * (y.get().astype(np.float64) > 0) if relu else exact["dy"]
    reduced = truth.reduced_axes(g, axis)
    close(
        b.dx, g * truth.along(exact["gamma"] / np.sqrt(exact["variance"] + EPSILON), n, axis), tolerance, "inference dx"
    )
    close(b.dgamma, (g * n).sum(axis=reduced).ravel(), 4 * tolerance, "inference dgamma")
    close(b.dbeta, g.sum(axis=reduced).ravel(), 4 * tolerance, "inference dbeta")
    mean, variance = bn.statistics(device["x"], axis=axis, groups=groups)
    if groups == 1:
        close(mean, want.mean, min(tolerance, 2e-6), "statistics: mean")
        close(variance, want.variance, min(tolerance, 1e-5), "statistics: variance")


def regimes():
    return {(specialisation.name, specialisation.cluster) for specialisation, *_ in launcher.record}


EXPECTED = {
    "small": {("gl_bn_forward", 1)},
    "sweeps": {("gl_bn_statistics", 1), ("gl_bn_normalise", 1)},
    "cluster": {("gl_bn_forward", 8)},
}


@pytest.mark.parametrize(("shape", "axis", "groups", "regime"), CASES)
def test_layouts_and_regimes(shape, axis, groups, regime):
    check(shape, axis, groups, "float32", residual=True, relu=True)
    assert regimes() >= EXPECTED[regime]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize(("shape", "axis", "groups"), [((24, 16), (1,), 3), ((6, 5, 4, 8), (1,), 1)])
def test_dtypes(shape, axis, groups, dtype):
    check(shape, axis, groups, dtype)


@pytest.mark.parametrize(("residual", "relu"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize(("shape", "axis"), [((40, 16), (1,)), ((5000, 16), (1,))])
def test_options(shape, axis, residual, relu):
    check(shape, axis, 1, "float32", residual, relu)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "axis", "groups", "regime"), CASES)
@pytest.mark.parametrize(("residual", "relu"), list(itertools.product([False, True], repeat=2)))
def test_everything(shape, axis, groups, regime, dtype, residual, relu):
    check(shape, axis, groups, dtype, residual, relu)


@pytest.mark.parametrize(("shape", "axis", "groups"), CLUSTER_CASES[::3])
def test_clusters_keep_the_input(shape, axis, groups):
    check(shape, axis, groups, "float32", relu=True)
    assert regimes() >= EXPECTED["cluster"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "axis", "groups"), CLUSTER_CASES)
def test_clusters_of_every_dtype(shape, axis, groups, dtype):
    check(shape, axis, groups, dtype, residual=True, relu=True)


def test_a_small_gpu_without_clusters():
    launcher.device = SMALL
    check((700, 40), (1,), 1, "float32")
    assert regimes() >= EXPECTED["sweeps"] and not regimes() & EXPECTED["cluster"]


@pytest.mark.parametrize("shape", [(33, 16), (5000, 16)])
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_addresses_that_are_not_aligned(shape, offset):
    values, exact = make(shape, (1,), "float32")
    x = at_offset(values["x"], offset)
    y = bn.forward(x, None, None, axis=(1,)).y
    close(y, truth.forward(exact["x"], 1.0, 0.0, (1,), EPSILON).y, 1e-5, "y")
    packets = {specialisation.defines["PACKET"] for specialisation, *_ in launcher.record}
    assert packets == {offset}


CLIPS = [(None, None, None), (0.8, 1.2, 0.3)]


def check_renorm(shape, axis, groups, clips):
    """Compare a training step with renorm and all moving statistics, and its gradients, with float64."""
    values, exact = make(shape, axis, "float32")
    channels = values["gamma"].size
    rng = np.random.default_rng(1)
    old = {
        k: rng.uniform(0.5, 2, channels).astype("f")
        for k in ("mean", "variance", "stddev", "renorm_mean", "renorm_stddev")
    }
    old["renorm_stddev"][0] = 0.0
    device = {name: xp.asarray(v.copy()) for name, v in old.items()}
    moving = bn.MovingStatistics(
        device["mean"], device["variance"], 0.1, stddev=device["stddev"], renorm_mean=device["renorm_mean"],
        renorm_stddev=device["renorm_stddev"], renorm_decay=0.2,
    )  # fmt: skip
    numbers = (0.8, 1.2, 0.3) if clips == "device" else clips
    given = [xp.asarray(np.float32(c)) for c in numbers] if clips == "device" else numbers
    r, d, after = truth.renorm(
        exact["x"], axis, EPSILON, groups, {k: v.astype("d") for k, v in old.items()}, numbers, 0.1, 0.2
    )
    renorm = bn.Renorm(device["renorm_mean"], device["renorm_stddev"], *given)
    x, gamma, beta, dy = (xp.asarray(values[k]) for k in ("x", "gamma", "beta", "dy"))
    f = bn.forward(x, gamma, beta, axis=axis, groups=groups, renorm=renorm, moving=moving)
    want = truth.forward(exact["x"], exact["gamma"], exact["beta"], axis, EPSILON, groups, r=r, d=d)
    close(f.y, want.y, 1e-5, "y")
    for name, expected in after.items():
        close(device[name], expected, 2e-6, name)
    b = bn.backward(dy, x, gamma, f.saved, axis=axis, groups=groups)
    back = truth.backward(exact["dy"], exact["x"], exact["gamma"], axis, EPSILON, groups, r=r, d=d)
    for name in ("dx", "dgamma", "dbeta"):
        close(getattr(b, name), getattr(back, name), 4e-5, name)


@pytest.mark.parametrize("clips", [*CLIPS, "device"])
@pytest.mark.parametrize(
    ("shape", "axis", "groups"), [((12, 6), (1,), 3), ((5000, 9), (1,), 1), ((40, 9, 7), (2,), 20)]
)
def test_renorm_and_moving_statistics(shape, axis, groups, clips):
    check_renorm(shape, axis, groups, clips)


def test_renorm_in_clusters():
    check_renorm(*RENORM_IN_CLUSTER)
    assert regimes() >= EXPECTED["cluster"]


@pytest.mark.parametrize("shape", [(60, 5), (9000, 5)])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_values_stay_in_their_channel(shape, skip, bad):
    nonfinite(shape, skip, bad)


def nonfinite(shape, skip, bad):
    """Check that a channel with one such value becomes NaN, and that nothing else changes."""
    x = np.random.default_rng(6).normal(size=shape).astype("f")
    clean = truth.forward(x.astype("d"), 1.0, 0.0, (1,), EPSILON)
    x[3, 2] = bad
    skipped = xp.asarray(np.zeros(1, np.int64))
    moving = bn.MovingStatistics(
        xp.asarray(np.zeros(5, "f")),
        xp.asarray(np.ones(5, "f")),
        0.5,
        unbiased=True,
        skip_nonfinite=skip,
        skipped=skipped,
    )
    f = bn.forward(xp.asarray(x), None, None, axis=(1,), moving=moving)
    others = [0, 1, 3, 4]
    assert np.isnan(f.y.get()[:, 2]).any()
    kept = bn.forward(xp.asarray(x), None, None, axis=(1,), activation="relu").y.get()
    assert np.isnan(kept[:, 2]).any() and (kept[:, others] >= 0).all()
    assert np.abs(f.y.get()[:, others] - clean.y[:, others]).max() < 1e-5
    factor = shape[0] / (shape[0] - 1)
    np.testing.assert_allclose(moving.variance.get()[others], 0.5 + clean.variance[others] * factor / 2, rtol=1e-5)
    if skip:
        assert moving.mean.get()[2] == 0 and moving.variance.get()[2] == 1
    else:
        assert not np.isfinite(moving.mean.get()[2])
    assert skipped.get()[0] == int(skip)


@pytest.mark.parametrize("shape", [(900, 16), (9000, 3), (20, 3, 40, 40)])
@pytest.mark.parametrize("ratio", [100, 1e4])
def test_float32_far_from_zero(shape, ratio):
    x = (np.random.default_rng(3).normal(size=shape) + ratio).astype("f")
    f = bn.forward(xp.asarray(x), None, None, axis=(1,), epsilon=0.0)
    want = truth.forward(x.astype("d"), 1.0, 0.0, (1,), 0.0)
    np.testing.assert_allclose(f.variance.get(), want.variance, rtol=1e-5)
    assert np.abs(f.y.get() - want.y).max() <= 2e-6
    y = bn.inference(xp.asarray(x), None, None, f.mean, f.variance, axis=(1,), epsilon=0.0)
    mean, variance = f.mean.get().astype("d"), f.variance.get().astype("d")
    assert np.abs(y.get() - truth.normalised(x.astype("d"), mean, variance, (1,), 0.0)).max() <= 2e-6


def test_an_outlier_in_front_does_not_spoil_the_variance():
    x = np.random.default_rng(5).normal(size=(9000, 4)).astype("f")
    x[0] = 3000.0
    variance = bn.statistics(xp.asarray(x), axis=(1,))[1]
    np.testing.assert_allclose(variance.get(), x.astype("d").var(axis=0), rtol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_sign_of_the_output_is_found_again(dtype):
    signs_of(dtype)


def awkward(dtype):
    """Numbers where rounding, underflow, overflow, infinities, NaN and the sign of zero matter."""
    about = finfo(dtype)
    some = [0, 1, 1 + float(about.eps), 3, float(about.smallest_subnormal), float(about.tiny), float(about.max), np.inf]
    return np.array([*some, *[-v for v in some], np.nan], np.float64)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_sign_is_found_again_for_awkward_numbers(dtype):
    """Every pair of an awkward input and awkward factors: the gradient is the same to the bit as by reading y."""
    storage = np.dtype(BFLOAT16 if dtype == "bfloat16" else dtype)
    parameter = np.dtype("float64" if dtype == "float64" else "float32")
    x = awkward(storage)
    near = float(finfo(storage).smallest_subnormal)
    halves = [near / 2, np.nextafter(parameter.type(near / 2), parameter.type(1)), 1.5 * near]
    factors = np.array([*x, *halves, *[-h for h in halves]])
    gamma, beta = (v.ravel().astype(parameter) for v in np.meshgrid(factors, factors))
    with np.errstate(all="ignore"):
        x = np.repeat(x.astype(storage)[:, None], gamma.size, axis=1)
    dy = np.ones(x.shape, storage)
    for columns in (gamma.size, gamma.size // 8 * 8):  # one by one, and 16 bytes at a time
        device = [xp.asarray(v[..., :columns].copy()) for v in (dy, x, gamma, beta)]
        mean, variance = xp.asarray(np.zeros(columns, parameter)), xp.asarray(np.ones(columns, parameter))
        options = {"axis": (1,), "epsilon": 0.0, "activation": "relu"}
        y = bn.inference(*device[1:], mean, variance, **options)
        by_output = bn.inference_backward(*device[:3], mean, variance, y=y, **options)
        again = bn.inference_backward(*device[:3], mean, variance, beta=device[3], **options)
        for name in ("dx", "dgamma", "dbeta"):
            assert getattr(again, name).get().tobytes() == getattr(by_output, name).get().tobytes(), name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "axis"), [((300, 16), (1,)), ((5000, 16), (1,)), ((6, 5, 4, 8), (1,))])
def test_a_relu_behind_a_residual_leaves_bits(shape, axis, dtype):
    bits_of(shape, axis, dtype)


def test_clusters_leave_and_read_bits():
    bits_of((1100, 288), (1,), "float32")
    assert regimes() >= EXPECTED["cluster"]


@pytest.mark.parametrize("shape", [(40, 7), (5000, 3)])
def test_where_rows_allow_no_vectors_the_mask_is_the_output(shape):
    values, _ = make(shape, (1,), "float16")
    x, residual = xp.asarray(values["x"]), xp.asarray(values["residual"])
    f = bn.forward(x, None, None, axis=(1,), residual=residual, activation="relu")
    assert f.mask.get().tobytes() == f.y.get().tobytes()


_divide = Kernel(
    "",
    "gl_test_divide",
    [
        ("numbers", "const uint64*"),
        ("out", "uint64*"),
        ("count", "int64"),
        ("multiplier", "uint64"),
        ("shift", "int32"),
    ],
    body="""GL_KERNEL(gl_test_divide, 128) {
        for (int64 i = thread_number(); i < arguments.count; i += 128)
            arguments.out[i] = divide(arguments.numbers[i], arguments.multiplier, arguments.shift);
    }""",
    listed=False,
)


def test_divisions_by_multiplication_are_exact():
    """Divisors around powers of two and others, numbers around their multiples, up to the largest of 64 bits."""
    divisors = {2, 3, 5, 7, 10, 49, 641, 3136, 2**31 - 1, 2**32 + 1, 2**62 - 57, 2**63 - 1}
    divisors |= {2**k + d for k in range(1, 63, 5) for d in (-1, 0, 1) if 2**k + d > 1}
    top = 2**64 - 1
    for divisor in sorted(divisors):
        last = top // divisor
        multiples = [divisor * q for q in (1, 2, 3, last // 2, last - 1, last) if 0 < q <= last]
        numbers = [0, 1, 2**31, 2**32, 2**63, top, top - 1, *(m + d for m in multiples for d in (-1, 0, 1))]
        numbers = np.array([n for n in numbers if n <= top], np.uint64)
        out = xp.empty(numbers.size, "uint64")
        multiplier, shift = division(divisor)
        values = {"numbers": xp.asarray(numbers), "out": out, "count": numbers.size}
        _divide.launch({**values, "multiplier": multiplier, "shift": shift}, grid=(1,), block=(128,), defines={})
        assert [int(q) for q in out.get()] == [int(n) // divisor for n in numbers], divisor


def test_a_relu_without_residual_reads_no_output():
    """Two sweeps of x and dy: the output is neither kept nor read."""
    values, _ = make((5000, 16), (1,), "float16")
    dy, x, gamma, beta = (xp.asarray(values[name]) for name in ("dy", "x", "gamma", "beta"))
    f = bn.forward(x, gamma, beta, axis=(1,), activation="relu")
    assert f.mask.nbytes == 2 * 16 * 4
    with pytest.raises(ShapeError, match="output y, or the mask"):
        bn.backward(dy, x, gamma, f.saved, axis=(1,), activation="relu")
    with pytest.raises(ShapeError, match="does not belong"):
        bn.backward(dy, x, gamma, f.saved, axis=(1,), activation="relu", mask=f.mask[:-8])


def test_weights_on_the_device():
    values, exact = make((6, 4, 3), (2,), "float64")
    weights = np.random.default_rng(2).integers(0, 3, (6, 4, 1)).astype("d")
    f = bn.forward(xp.asarray(values["x"]), None, None, axis=(2,), weights=xp.asarray(weights))
    host = bn.forward(values["x"], None, None, axis=(2,), weights=weights)
    np.testing.assert_allclose(f.y.get(), host.y, atol=1e-12)
    b = bn.backward(
        xp.asarray(values["dy"]), xp.asarray(values["x"]), None, f.saved, axis=(2,), weights=xp.asarray(weights)
    )
    np.testing.assert_allclose(
        b.dx.get(), bn.backward(values["dy"], values["x"], None, host.saved, axis=(2,), weights=weights).dx, atol=1e-12
    )


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty(shape):
    x = xp.empty(shape, "float32")
    channels = shape[1]
    moving = bn.MovingStatistics(xp.asarray(np.full(channels, 3.0, "f")), xp.asarray(np.full(channels, 4.0, "f")), 0.5)
    f = bn.forward(x, None, None, axis=(1,), moving=moving)
    assert f.y.shape == shape and (moving.mean.get() == 3).all()
    assert bn.backward(x, x, None, f.saved, axis=(1,)).dx.shape == shape
    assert bn.inference(x, None, None, moving.mean, moving.variance, axis=(1,)).shape == shape
    assert not launcher.record


def test_one_launch_or_two():
    x = xp.asarray(np.ones((8, 16), "f"))
    f = bn.forward(x, None, None, axis=(1,))
    bn.backward(x, x, None, f.saved, axis=(1,))
    assert [s.name for s, *_ in launcher.record] == ["gl_bn_forward", "gl_bn_backward"]
    launcher.record.clear()
    bn.inference(x, None, None, f.mean, f.variance, axis=(1,))
    bn.inference_backward(x, x, None, f.mean, f.variance, axis=(1,))
    assert [s.name for s, *_ in launcher.record] == ["gl_bn_normalise", "gl_bn_sums"]


# ---- the plan ------------------------------------------------------------------------------------------------------

A100_LIKE = DeviceProperties("emulated A100", 80, 108, 163 * 1024, 164 * 1024, 65536, 2048, 1024, 40 * 2**20)


def test_the_plan_as_a_table():
    shapes = [
        ((256, 64), (1,), 1),
        ((32, 14, 14, 1024), (3,), 1),
        ((32, 56, 56, 64), (3,), 1),
        ((32, 64, 56, 56), (1,), 1),
        ((32, 7, 7, 512), (3,), 1),
    ]
    assert plan_table(shapes, 2, H200_LIKE).splitlines()[1].startswith("(256, 64), (1,), 1 | small")
    regimes = [
        [choose(collapse(*case), 2, 16, device).regime for case in shapes] for device in (H200_LIKE, A100_LIKE)
    ]
    assert regimes == [["small", "cluster", "grid", "grid", "cluster"], ["small", *["grid"] * 4]]


@pytest.mark.parametrize("device", [H200_LIKE, A100_LIKE, SMALL], ids=lambda d: d.name)
def test_every_plan_can_be_launched(device):
    sizes = [1, 2, 3, 7, 8, 31, 64, 100, 513, 2048, 8192, 100_000]
    for rows, channels, inner in itertools.product(sizes, sizes, (1, 2, 3, 8, 49, 62, 65, 196, 3136)):
        for itemsize, alignment, kept in itertools.product((2, 4, 8), (1, 8, 16), (1, 2)):
            layout = collapse((rows, channels, inner), (1,))
            plan = choose(layout, itemsize, alignment, device, kept)
            packet, channels_last, folded, _ = plan.access
            assert plan.slab_channels <= plan.lanes * plan.depth <= 256
            assert plan.lanes & (plan.lanes - 1) == 0 and plan.depth & (plan.depth - 1) == 0
            assert plan.slab_channels & (plan.slab_channels - 1) == 0
            assert (plan.slabs - 1) * plan.slab_channels < channels <= plan.slabs * plan.slab_channels
            if folded:  # as the kernel counts on it
                columns = plan.slab_channels * inner
                assert columns % packet == 0 and columns <= plan.lanes * packet < 2 * columns
                assert plan.lanes <= 64 and plan.slab_channels <= 64
            else:
                assert plan.slab_channels == (plan.lanes * packet if channels_last else 1)
                assert plan.lanes <= (1 if not channels_last else 16 if packet > 1 else 32)
            assert plan.shared + static_shared(itemsize, plan.access) <= device.shared_per_block
            assert plan.regime != "cluster" or device.has_clusters
            if plan.regime == "cluster":
                units = rows * plan.access.units_of_row(inner)
                largest = -(-units // plan.splits)
                assert -(-largest // plan.depth) * plan.lanes * plan.depth * packet * itemsize * kept <= plan.shared


# shape, axis, kept arrays, regime in float16 on a device of 132 multiprocessors, where 15 clusters of 8 have room
CLUSTER_PLANS = [
    ((32, 14, 14, 1024), 3, 1, "cluster"),  # 16 clusters, but two blocks share a multiprocessor
    ((32, 14, 14, 1024), 3, 2, "grid"),  # blocks of 200 KB: the 16th would make a second wave
    ((32, 7, 7, 512), 3, 2, "cluster"),  # 8 of them
    ((32, 64, 56, 56), 1, 1, "grid"),  # 64 in 30 places: two waves and a bit
    ((32, 56, 56, 56), 3, 1, "grid"),
    ((64, 58, 56, 56), 1, 2, "cluster"),  # 58 of 100 KB in 15 places: four waves, full and long
    ((256, 1024, 14, 14), 1, 1, "sweeps"),  # a thousand of small blocks
    ((256, 1024, 14, 14), 1, 2, "sweeps"),
]


@pytest.mark.parametrize(("shape", "axis", "kept", "regime"), CLUSTER_PLANS)
def test_clusters_fill_their_waves(shape, axis, kept, regime):
    assert choose(collapse(shape, (axis,)), 2, 16, H200_LIKE, kept).regime == regime


# Slabs of less than 64 KiB on 132 multiprocessors: by one block, unless it would need long for them while others idle.
# shape, axis, sub-batches | plan in float16 | plan in float32
SMALL_SLABS = """\
(32, 128, 28, 28), (1,), 1 | small 128x1, 16 bytes | grid 128x2, 16 bytes
(32, 512, 7, 7), (1,), 1 | small 64x1, 16 bytes | small 128x1, 16 bytes
(32, 64, 14, 14), (1,), 1 | small 64x1, 8 bytes | small 64x1, 16 bytes
(64, 64, 21, 21), (1,), 1 | small 64x1, 16 bytes | grid 64x4, 16 bytes
(64, 16, 17, 17), (1,), 1 | small 16x1, 16 bytes | cluster 16x8, 16 bytes
(64, 192, 21, 21), (1,), 1 | small 192x1, 16 bytes | grid 192x1, 16 bytes
(64, 48, 17, 17), (1,), 4 | small 48x1, 16 bytes | grid 48x1, 16 bytes
(65, 63, 21, 21), (1,), 1 | grid 63x4, 2 bytes | grid 63x4, 4 bytes
(65, 17, 17, 17), (1,), 1 | cluster 17x8, 2 bytes | cluster 17x8, 4 bytes
(33, 49, 17, 17), (1,), 1 | small 49x1, 2 bytes | small 49x1, 4 bytes
(63, 193, 21, 21), (1,), 1 | small 193x1, 2 bytes | grid 193x1, 4 bytes
(63, 49, 17, 17), (1,), 3 | sweeps 49x5, 2 bytes | sweeps 49x5, 4 bytes
(9, 63, 17, 17), (1,), 1 | small 63x1, 2 bytes | small 63x1, 4 bytes"""


def test_small_slabs_as_a_table():
    lines = []
    for line in SMALL_SLABS.splitlines():
        shape, axis, groups = ast.literal_eval(line.split(" | ")[0])
        plans = [choose(collapse(shape, axis, groups), itemsize, 16, H200_LIKE) for itemsize in (2, 4)]
        texts = [
            f"{p.regime} {p.slabs}x{p.splits}, {p.access.packet * size} bytes"
            for p, size in zip(plans, (2, 4), strict=True)
        ]
        lines.append(" | ".join([f"{shape}, {axis}, {groups}", *texts]))
    assert "\n".join(lines) == SMALL_SLABS


# shape, sub-batches, whether there are two sweeps; splits of a channel in float16 on 132 multiprocessors
WAVES = [
    ((32, 512, 14, 14), 1, False, 2),
    ((32, 1024, 14, 14), 1, False, 1),  # as full as with 2, and half the blocks
    ((4096, 100, 14, 14), 4, True, 7),  # 400 blocks would be one wave and four blocks
    ((256, 1024, 14, 14), 1, True, 3),
    ((256, 64, 112, 112), 1, True, 6),
    ((256, 2048, 7, 7), 1, False, 3),
]


@pytest.mark.parametrize(("shape", "groups", "two", "splits"), WAVES)
def test_sweeps_fill_their_waves(shape, groups, two, splits):
    plan = choose(collapse(shape, (1,), groups), 2, 16, H200_LIKE, one_launch=two)
    assert (plan.regime, plan.splits) == ("sweeps", splits)


RESNET_50 = [(112, 64), (56, 64), (56, 256), (28, 128), (28, 512), (14, 256), (14, 1024), (7, 512), (7, 2048)]


@pytest.mark.parametrize("device", [H200_LIKE, A100_LIKE], ids=lambda d: d.name)
def test_sweeps_fill_the_gpu_and_leave_little_to_merge(device):
    """Large inputs: full waves of three blocks per multiprocessor, rows of 64 bytes, few partial sums for one block."""
    seen = 0
    for batch, (size, channels), itemsize, last in itertools.product((32, 256), RESNET_50, (2, 4), (True, False)):
        shape, axis = ((batch, size, size, channels), 3) if last else ((batch, channels, size, size), 1)
        layout = collapse(shape, (axis,))
        plan = choose(layout, itemsize, 16, device, 2)
        if plan.regime != "sweeps" or layout.size * itemsize < 30e6:
            continue
        seen += 1
        blocks, resident = plan.slabs * plan.splits, 3 * device.multiprocessors
        assert blocks >= 0.9 * resident * -(-blocks // resident), (shape, plan)
        columns = plan.lanes * 16 // itemsize if last else 1
        assert not last or columns * itemsize >= 64
        assert plan.splits * columns * 8 <= 100 * 1024, (shape, plan)
    assert seen > 10


# ---- broken copies must be caught ----------------------------------------------------------------------------------


def forward_of(shape, groups=1, far=0.0):
    """Check y and the variance of a training forward alone."""
    x = (np.random.default_rng(3).normal(size=shape) + far).astype("f")
    f = bn.forward(xp.asarray(x), None, None, axis=(1,), epsilon=0.0, groups=groups)
    want = truth.forward(x.astype("d"), 1.0, 0.0, (1,), 0.0, groups)
    np.testing.assert_allclose(f.variance.get(), want.variance, rtol=1e-5)
    assert np.abs(f.y.get() - want.y).max() <= 4e-6


def backward_of(shape):
    """Check the gradients behind a ReLU whose output is often exactly 0."""
    x, dy = (np.random.default_rng(seed).normal(size=shape).astype("f") for seed in (3, 4))
    y = np.maximum(x, 0)
    saved = bn.forward(x, None, None, axis=(1,)).saved
    b = bn.backward(
        xp.asarray(dy), xp.asarray(x), None, xp.asarray(saved), axis=(1,), y=xp.asarray(y), activation="relu"
    )
    want = truth.backward(dy.astype("d"), x.astype("d"), 1.0, (1,), EPSILON, mask=y > 0)
    close(b.dx, want.dx, 1e-5, "dx")


def signs_of(dtype):
    """Check that backward finds every sign that training stored, where many outputs are at the edge of underflow."""
    storage = np.dtype(BFLOAT16 if dtype == "bfloat16" else dtype)
    parameter = "float64" if dtype == "float64" else "float32"
    step = float(np.finfo(storage).smallest_subnormal) if storage.kind == "f" else 2.0**-133
    rng = np.random.default_rng(8)
    for shape, groups in (((64, 16), 2), ((5000, 16), 1)):
        x = rng.normal(size=shape).astype(storage)
        gamma = (step * rng.uniform(-4, 4, 16)).astype(parameter)
        beta = (step * rng.choice([-0.5, 0.0, 0.5, 1.0], 16)).astype(parameter)
        gamma[::3], beta[::3] = rng.normal(size=(2, 6))
        f = bn.forward(xp.asarray(x), xp.asarray(gamma), xp.asarray(beta), axis=(1,), groups=groups, activation="relu")
        found = bn.passed(xp.asarray(x), f.saved, f.mask, axis=(1,), groups=groups)
        kept = f.y.get().astype("d") > 0
        assert 0.2 < kept.mean() < 0.8
        np.testing.assert_array_equal(found.get().astype("d"), kept)


def bits_of(shape, axis, dtype):
    """Check the mask behind a residual, and gradients by it: with all arrays aligned, and with one that is not."""
    values, _ = make(shape, axis, dtype)
    values["residual"][::3] = -values["x"][::3]
    x, residual, dy, gamma = (xp.asarray(values[name]) for name in ("x", "residual", "dy", "gamma"))
    options = {"axis": axis, "activation": "relu"}
    f = bn.forward(x, xp.asarray(np.ones_like(values["gamma"])), None, residual=residual, **options)
    kept = f.y.get().astype("d") > 0
    per_byte = 16 // x.itemsize
    assert f.mask.dtype == np.uint8 and f.mask.nbytes == x.nbytes // 16
    unpacked = np.unpackbits(f.mask.get()[:, None], axis=1, bitorder="little")[:, :per_byte]
    np.testing.assert_array_equal(unpacked.reshape(shape), kept)
    for gradient in (dy, at_offset(values["dy"], 1), at_offset(values["dy"], per_byte // 2)):
        by_mask, by_output = (
            bn.backward(gradient, x, gamma, f.saved, residual=True, **given, **options)
            for given in ({"mask": f.mask}, {"y": f.y})
        )
        for found, wanted in zip(by_mask, by_output, strict=True):
            assert found.get().tobytes() == wanted.get().tobytes()
    np.testing.assert_array_equal(by_mask.dresidual.get(), np.where(kept, values["dy"], values["dy"].dtype.type(0)))


def relu_of_rows(shape, groups):
    """Check sub-batches with a ReLU, whose second sweep goes through its rows backwards."""
    check(shape, (1,), groups, "float32", relu=True)


SMALL_SLAB, TWO_SWEEPS, SUB_BATCHES = ((300, 19),), ((5000, 3),), ((40, 6), 20)
RENORM_IN_CLUSTER = ((1100, 288), (1,), 1, (0.8, 1.2, 0.3))

# what is broken: (right text, wrong text, the check that sees it, its arguments)
MUTANTS = {
    "a barrier before the tree is missing": (
        "reinterpret_cast<T*>(scratch());\n    __syncthreads();",
        "reinterpret_cast<T*>(scratch());",
        relu_of_rows,
        ((24, 16), 3),
    ),
    "a barrier inside the tree is missing": (
        "half >= columns; half >>= 1) {\n        __syncthreads();",
        "half >= columns; half >>= 1) {",
        forward_of,
        SMALL_SLAB,
    ),
    "a warp leaves a half of itself out": (
        "distance = columns; distance < 32;",
        "distance = 2 * columns; distance < 32;",
        forward_of,
        SMALL_SLAB,
    ),
    "a ReLU takes NaN for 0": (
        "value <= floor ? floor : value;",
        "value > floor ? value : floor;",
        nonfinite,
        ((60, 5), False, np.nan),
    ),
    "a pass of its own forgets the ReLU": ("signs == Signs::of_input;", "false;", relu_of_rows, ((5000, 3), 1)),
    "the outputs are not read": (
        "more || arguments.bits || arguments.y) {",
        "more || arguments.bits) {",
        backward_of,
        TWO_SWEEPS,
    ),
    "one unit too few": ("+ depth() - 1) >>", "+ depth() - 2) >>", forward_of, ((257, 1),)),
    "one unit too many": ("+ depth() - 1) >>", "+ depth()) >>", forward_of, SMALL_SLAB),
    "a row's end is passed over": (
        "at += next_row;\n            }\n        }",
        "}\n        }",
        relu_of_rows,
        ((80, 3, 11, 8), 20),
    ),
    "the merge forgets the distance": (
        "square += other_square + delta * delta * count * share;",
        "square += other_square;",
        forward_of,
        SMALL_SLAB,
    ),
    "the merge weighs wrongly": ("mean += delta * share;", "mean += delta * A(0.5);", forward_of, SMALL_SLAB),
    "the means are not relative to the channel's first value": (
        "(base[i] - widen(first.values[i]))",
        "base[i]",
        forward_of,
        SMALL_SLAB,
    ),
    "the last block does not wait": (
        "if (!last_split(arguments, p)) return;\n    const Moments",
        "if (p.split != 0) return;\n    const Moments",
        forward_of,
        TWO_SWEEPS,
    ),
    "the channel is not checked": ("inside = channel < p.channels;", "inside = true;", forward_of, TWO_SWEEPS),
    "the mask lets zero pass": (
        "if (widen(y.values[i]) > A(0)) bits |=",
        "if (widen(y.values[i]) >= A(0)) bits |=",
        backward_of,
        SMALL_SLAB,
    ),
    "a value that is stored as zero passes": ("> underflow<STORAGE>)", "> A(0))", signs_of, ("float16",)),
    "the bits are a place off": (
        "static_cast<uint8>(bits);",
        "static_cast<uint8>(bits >> 1);",
        bits_of,
        ((5000, 16), (1,), "float16"),
    ),
    "a stored zero sets its bit": (
        "if (result[i] > underflow<STORAGE>) bits",
        "if (result[i] >= underflow<STORAGE>) bits",
        bits_of,
        ((5000, 16), (1,), "float32"),
    ),
    "single elements read the first bit": (
        "whole >> static_cast<int32>(offset % elements_of_byte) & all_elements",
        "whole & all_elements",
        bits_of,
        ((300, 16), (1,), "float32"),
    ),
    "the sign comes from a product and a sum": (
        "if (affine.of(x.values[i]) >",
        "if (widen(x.values[i]) * affine.a + (affine.b - affine.pivot * affine.a) >",
        signs_of,
        ("float32",),
    ),
    "the factors of a neighbour": (
        "table[at + 1] = second;",
        "table[(at ^ 2) + 1] = second;",
        signs_of,
        ("float16",),
    ),
    "the factors are not waited for": (
        "leave(me, make(channel));\n    }\n    __syncthreads();",
        "leave(me, make(channel));\n    }",
        signs_of,
        ("float32",),
    ),
    "the factors are written while the sums before are still read": (
        "__syncthreads();\n    if constexpr (FOLDED) {  // once",
        "if constexpr (FOLDED) {  // once",
        forward_of,
        ((48, 6), 4),
    ),
    "the groups are contiguous": (
        "return (row * p.groups + p.group) * length;",
        "return (p.group * p.rows + row) * length;",
        forward_of,
        SUB_BATCHES,
    ),
    "the longer splits weigh like the others": (
        "return shares.count(split) *",
        "return shares.share *",
        forward_of,
        ((5003, 3),),
    ),
    "the splits' means are not merged": (
        "sums[1] += part.second + count * mean * mean;",
        "sums[1] += part.second;",
        forward_of,
        TWO_SWEEPS,
    ),
    "the last parts are left out": (
        "if (split < p.splits) add(",
        "if (split < p.splits - 1) add(",
        forward_of,
        TWO_SWEEPS,
    ),
    "a cluster's blocks do not wait for the factors": (
        "cluster_barrier();\n    if (first && !renorm)",
        "if (first && !renorm)",
        check_renorm,
        RENORM_IN_CLUSTER,
    ),
    "the offset is lost": (
        "result.b = fused(-arguments.saved[slot + plane], result.a, result.b);",
        "",
        forward_of,
        (*SMALL_SLAB, 1, 1e4),
    ),
}


# In a process of their own, watched: bounds, and races between the warps of a block, which fibers run in step.
WATCHED = {
    "one unit too many": "address",
    "the channel is not checked": "address",
    "a row's end is passed over": "address",
    "the groups are contiguous": "address",
    "a barrier before the tree is missing": "threads",
}


def checks_of(mutants):
    """Return what `mutants` fail, as parameters: (function, arguments) pairs under names."""
    checks = dict.fromkeys((run, arguments) for _, _, run, arguments in mutants.values())
    return [pytest.param(check, id=f"{check[0].__name__} {check[1]}") for check in checks]


@pytest.mark.parametrize("case", checks_of(MUTANTS))
def test_the_right_text_passes_the_mutants_checks(case):
    case[0](*case[1])


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(monkeypatch, mutant):
    """Each broken copy fails a check that the right text passes."""
    assert times_in_the_kernels(MUTANTS[mutant]) > 0, "the kernel changed: change the mutant too"
    check_is_failed(monkeypatch, MUTANTS[mutant], WATCHED.get(mutant, "fibers"))


def times_in_the_kernels(mutant):
    """Return how often the text that a mutant replaces stands in the kernels."""
    return "".join(launch_source.read_source("batch_norm.cu")).count(mutant[0])


def check_is_failed(monkeypatch, mutant, build, device=H200_LIKE):
    """Demand that the kernels fail the mutant's check with its text in place of the right one."""
    right, wrong, run, arguments = mutant
    read = launch_source.read_source
    with_mutant(monkeypatch, lambda name: tuple(part.replace(right, wrong) for part in read(name)), build, device)
    with pytest.raises((AssertionError, EmulationError)):
        run(*arguments)


def with_mutant(monkeypatch, read, build, device=H200_LIKE):
    """Make the kernels read their text through `read` and run on `device`, with nothing remembered from before."""
    import gpulayers.launch.kernel as kernel_module

    monkeypatch.setattr(kernel_module._source, "read_source", read)
    for value in vars(batch_norm_kernels).values():
        if type(value).__name__ == "Kernel":
            monkeypatch.setattr(value, "_specialisations", {})
    runs = EmulatedLauncher().runs if build == "fibers" else ((0, 0xFF, 1),)
    register_launcher("emulated", EmulatedLauncher(device, build=build, runs=runs))


# ---- sanitizers ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "axis", "groups"),
    [((33, 20), (1,), 1), ((3000, 9), (1,), 1), ((4, 3, 5, 7), (1,), 2), ((5, 3, 6, 8), (1,), 1)],
)
def test_under_address_and_undefined_behaviour_sanitizer(shape, axis, groups):
    register_launcher("emulated", EmulatedLauncher(build="address", runs=((0, 0xFF, 1),)))
    check(shape, axis, groups, "float32", residual=True, relu=True)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "axis"), [((20, 6), (1,)), ((3000, 3), (1,))])
def test_under_thread_sanitizer(shape, axis):
    register_launcher("emulated", EmulatedLauncher(build="threads", runs=((0, 0xFF, 2),)))
    x = np.random.default_rng(0).normal(size=shape).astype("f")
    y = bn.forward(xp.asarray(x), None, None, axis=axis).y
    close(y, truth.forward(x.astype("d"), 1.0, 0.0, axis, EPSILON).y, 1e-5, "y")
