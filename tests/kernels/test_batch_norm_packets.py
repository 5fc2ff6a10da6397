"""Rows of channels whose length is odd or short: how wide they are read, and columns that are folded to channels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gpulayers.launch import alignment_of, register_launcher
from gpulayers.launch import source as launch_source
from gpulayers.ops.batch_norm import arrays as bn
from gpulayers.ops.batch_norm.layout import Layout, collapse
from gpulayers.ops.batch_norm.plan import LANES_FOLDED, LANES_WIDE, access, choose
from tests.kernels.emulation import H200_LIKE, EmulatedLauncher
from tests.kernels.strict_array import launcher, xp
from tests.kernels.test_batch_norm_grid import ROOMY, TIGHT
from tests.kernels.test_batch_norm_kernels import (
    EPSILON,
    TOLERANCE,
    at_offset,
    bits_of,
    check,
    check_is_failed,
    check_renorm,
    checks_of,
    close,
    make,
    regimes,
    times_in_the_kernels,
)
from tests.ops import batch_norm_truth as truth

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("emulated_gpu")]

INNER = (196, 49, 14, 7, 5, 3, 2, 1)


def layouts():
    """Return the (packet, folded) that were launched."""
    return {(s.defines["PACKET"], s.defines["FOLDED"]) for s, *_ in launcher.record}


# ---- how wide ------------------------------------------------------------------------------------------------------


def bytes_moved(channels, inner, itemsize, alignment):
    how = access(Layout(32, 1, 1, channels, inner), itemsize, alignment)
    return f"{how.packet * itemsize}{'f' if how.folded else 'r' if how.ragged else ''}"


# Bytes of an access, f where columns are folded, r where rows are ragged. Columns: 16-bit, 32-bit, 64-bit elements.
WIDTHS = """\
512 x 3136, 16: 16 16 16
512 x 3136, 8: 8 8 8
512 x 196, 16: 8 16 16
512 x 196, 2: 2 4 8
512 x 98, 16: 16f 8 16
512 x 49, 16: 16f 16f 8
512 x 49, 8: 2 4 8
512 x 14, 16: 16f 16f 16
512 x 7, 16: 16f 16f 16f
512 x 5, 16: 16f 16f 16f
512 x 3, 16: 16f 16f 16f
512 x 2, 16: 16f 16f 16f
512 x 1, 16: 16 16 16
12 x 1, 16: 8 16 16
12 x 49, 16: 16r 16f 8
12 x 14, 16: 16f 16f 16
13 x 14, 16: 16r 8 16
13 x 18, 16: 16r 8 16
13 x 10, 16: 4 8 16
13 x 7, 16: 16r 16r 8
13 x 3, 16: 2 4 8
512 x 289, 16: 16r 16r 8
512 x 289, 8: 2 4 8
512 x 578, 16: 16r 8 16
512 x 580, 16: 8 16 16
13 x 1, 16: 2 4 8"""


def test_the_width_of_accesses_as_a_table():
    lines = []
    for line in WIDTHS.splitlines():
        channels, inner, alignment = (int(n) for n in line.split(":")[0].replace(",", " x").split(" x "))
        widths = " ".join(bytes_moved(channels, inner, itemsize, alignment) for itemsize in (2, 4, 8))
        lines.append(f"{channels} x {inner}, {alignment}: {widths}")
    assert "\n".join(lines) == WIDTHS


def test_accesses_fit_every_row_and_address():
    for channels, inner, itemsize, log in itertools.product(range(1, 40), range(1, 70), (2, 4, 8), range(1, 5)):
        alignment = 1 << log
        if alignment < itemsize:
            continue
        how = access(Layout(3, 1, 1, channels, inner), itemsize, alignment)
        assert how.packet * itemsize <= alignment
        length = channels * inner if how.folded or inner == 1 else 3 * channels * inner if how.ragged else inner
        assert length % how.packet == 0
        assert how.channels_last == (how.folded or inner == 1)
        assert not how.ragged or (how.packet * itemsize == 16 and not how.channels_last)


def test_addresses_are_asked_for_what_all_of_them_are_multiples_of():
    values = np.zeros(32, np.float16)
    offsets = [alignment_of(at_offset(values, 0), at_offset(values, offset)) for offset in (0, 1, 2, 3, 4, 8, 12)]
    assert offsets == [16, 2, 4, 2, 8, 16, 8] and alignment_of() == 16


def test_the_plan_knows_the_limits_of_the_kernels():
    text = "".join(launch_source.read_source("batch_norm.cu"))
    assert f"widest = FOLDED ? {LANES_FOLDED} : {LANES_WIDE};" in text
    assert f"most_folded = {LANES_WIDE * 8 // 2};" in text


# ---- what they compute ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("inner", INNER)
def test_short_rows(inner, dtype):
    """Some channels more than a slab has; aligned, and all arrays an element or 8 bytes off."""
    itemsize = {"float64": 8, "float32": 4}.get(dtype, 2)
    for offset in {0, 1, 8 // itemsize}:
        check((6, 24, inner), (1,), 3, dtype, residual=True, relu=True, offset=offset)
        wanted = access(Layout(2, 3, 1, 24, inner), itemsize, 16 if offset == 0 else offset * itemsize)
        assert (wanted.packet, wanted.folded) in layouts()


LARGER = [(120, 16, 49), (900, 12, 5), (2000, 28, 3), (2500, 8, 2), (700, 20, 7), (300, 24, 14), (400, 6, 98)]
DEVICES = pytest.mark.parametrize("on", [H200_LIKE, ROOMY, TIGHT], ids=lambda d: d.name)


@DEVICES
@pytest.mark.parametrize("shape", LARGER)
def test_regimes(shape, on):
    launcher.device = on
    check(shape, (1,), 1, "float32", relu=True)
    plans = [choose(collapse(shape, (1,)), 4, 16, on, kept) for kept in (1, 2)]
    assert all((plan.access.packet, plan.access.folded) in layouts() for plan in plans)
    for plan, names in zip(plans, (("statistics", "forward"), ("apply", "backward")), strict=True):
        assert f"gl_bn_{names[plan.regime != 'sweeps']}{'_grid' * (plan.regime == 'grid')}" in {n for n, _ in regimes()}


def test_the_cases_are_folded_in_every_regime():
    """Small slabs, two sweeps, and grids that keep all or a part, and that have ragged slabs."""
    cases = itertools.product(LARGER, (H200_LIKE, ROOMY, TIGHT), (1, 2))
    plans = [(shape, choose(collapse(shape, (1,)), 4, 16, on, kept)) for shape, on, kept in cases]
    folded = [(shape, plan) for shape, plan in plans if plan.access.folded]
    assert {plan.regime for _, plan in folded} == {"small", "sweeps", "grid"}
    assert {plan.on_chip == 1 for _, plan in folded if plan.regime == "grid"} == {True, False}
    assert any(shape[1] % plan.slab_channels and plan.regime == "sweeps" for shape, plan in folded)


@pytest.mark.slow
@DEVICES
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("residual", "relu"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("shape", LARGER)
def test_regimes_of_every_dtype(shape, residual, relu, dtype, on):
    launcher.device = on
    for groups in (1, 5):
        check(shape, (1,), groups, dtype, residual, relu)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_clusters_keep_folded_columns(dtype):
    check((100, 64, 49), (1,), 1, dtype, residual=True, relu=True)
    assert ("gl_bn_forward", 8) in regimes() and layouts() == {(8 if dtype == "float16" else 4, True)}


@pytest.mark.parametrize(
    ("shape", "groups"), [((6, 12, 7, 7), 1), ((12, 24, 5), 3), ((300, 12, 7), 1), ((80, 16, 14), 20)]
)
def test_renorm(shape, groups):
    check_renorm(shape, (1,), groups, (0.8, 1.2, 0.3))
    assert (4, True) in layouts()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(30, 16, 7), (200, 24, 5), (30, 24, 9), (6, 10, 100)])
def test_bits_behind_a_residual(shape, dtype):
    itemsize = {"float64": 8, "float32": 4}.get(dtype, 2)
    how = access(Layout(1, 1, 1, *shape[1:]), itemsize)
    if how.leaves_bits(itemsize):
        bits_of(shape, (1,), dtype)
    else:
        check(shape, (1,), 1, dtype, residual=True, relu=True)
    assert (how.packet, how.folded) in layouts()


def test_images_with_rows_between_batch_and_channels():
    """Sub-batches whose rows are not equally far apart, folded."""
    check((12, 5, 16, 7), (2,), 3, "float16", residual=True, relu=True)
    assert (8, True) in layouts()


@pytest.mark.parametrize("shape", [(30, 12, 49), (900, 8, 5)])
def test_nonfinite_values_stay_in_their_channel(shape):
    x = np.random.default_rng(6).normal(size=shape).astype("f")
    clean = truth.forward(x.astype("d"), 1.0, 0.0, (1,), EPSILON)
    x[3, 2, -1] = np.inf
    f = bn.forward(xp.asarray(x), None, None, axis=(1,))
    others = [c for c in range(shape[1]) if c != 2]
    assert np.isnan(f.y.get()[:, 2]).any() and layouts() == {(4, True)}
    assert np.abs(f.y.get()[:, others] - clean.y[:, others]).max() < 1e-5


def far_from_zero(shape, ratio=1e4):
    """Check mean, variance and output where each column of a channel begins with another value, far from zero."""
    x = (np.random.default_rng(3).normal(size=shape) + ratio).astype("f")
    x[0] += 3 * np.arange(shape[2], dtype="f")
    f = bn.forward(xp.asarray(x), None, None, axis=(1,), epsilon=0.0)
    want = truth.forward(x.astype("d"), 1.0, 0.0, (1,), 0.0)
    np.testing.assert_allclose(f.variance.get(), want.variance, rtol=1e-5)
    np.testing.assert_allclose(f.mean.get(), want.mean, rtol=2e-7)
    assert np.abs(f.y.get() - want.y).max() <= 4e-6
    assert layouts() == {(4, True)}


@pytest.mark.parametrize("shape", [(30, 12, 49), (900, 8, 5)])
@pytest.mark.parametrize("ratio", [100, 1e4])
def test_float32_far_from_zero(shape, ratio):
    far_from_zero(shape, ratio)


def test_the_same_bits_on_every_run():
    values, _ = make((120, 16, 49), (1,), "float16")
    x, dy = xp.asarray(values["x"]), xp.asarray(values["dy"])
    runs = []
    for _ in range(2):  # each of them is three runs in other orders already
        f = bn.forward(x, None, None, axis=(1,))
        b = bn.backward(dy, x, None, f.saved, axis=(1,))
        runs.append([v.get().tobytes() for v in (f.y, f.mean, f.variance, b.dx, b.dgamma, b.dbeta)])
    assert runs[0] == runs[1] and layouts() == {(8, True)}


# ---- broken copies must be caught ----------------------------------------------------------------------------------


def training(shape, dtype="float32", groups=1, offset=0):
    """Check a training step and inference with residual and ReLU."""
    check(shape, (1,), groups, dtype, residual=True, relu=True, offset=offset)


RAGGED, LONG = ((30, 12, 3),), ((30, 12, 49),)

# what is broken: (right text, wrong text, the check that sees it, its arguments)
MUTANTS = {
    "the last column is left out": ("number < inner; number +=", "number < inner - 1; number +=", training, LONG),
    "all means are relative to one value": (
        "(widen(values[number]) - widen(values[0])) + of_column",
        "of_column",
        far_from_zero,
        LONG,
    ),
    "the distances of the columns' means are forgotten": (
        "squares + count * mean * mean;",
        "squares;",
        far_from_zero,
        LONG,
    ),
    "the channel's mean stays in its squares": (
        "squares = sums[1] - sums[0] * mean * count;",
        "squares = sums[1];",
        far_from_zero,
        LONG,
    ),
    "a split's channels weigh like columns": (
        "return FOLDED ? p.inner : CHANNELS_LAST ? 1 : width;",
        "return CHANNELS_LAST ? 1 : width;",
        far_from_zero,
        ((901, 8, 5),),
    ),
    "the lanes behind the columns work": (
        "p.inside = column < (behind < p.slab_channels ? behind : p.slab_channels) * p.inner;",
        "p.inside = true;",
        training,
        RAGGED,
    ),
    "the last slab is whole": (
        "(behind < p.slab_channels ? behind : p.slab_channels) * p.inner",
        "p.slab_channels * p.inner",
        training,
        ((2000, 28, 3),),
    ),
    "the factors are not expanded": ("made[divide(", "made[0 * divide(", training, LONG),
    "what is made per channel is not waited for": (
        "made[me] = make(channel);\n        __syncthreads();",
        "made[me] = make(channel);",
        training,
        LONG,
    ),
    "the fold does not wait": (
        "double sums[2] = {0.0, 0.0};\n        __syncthreads();",
        "double sums[2] = {0.0, 0.0};",
        training,
        LONG,
    ),
    "half a byte's bits are taken from its beginning": (
        "whole >> static_cast<int32>(offset % elements_of_byte) & all_elements",
        "whole & all_elements",
        bits_of,
        ((5, 4, 40), (1,), "float16"),
    ),
}

# In a process of their own, watched: what they write out of bounds.
WATCHED = {"the lanes behind the columns work": "address", "the last slab is whole": "address"}


@pytest.mark.parametrize("case", checks_of(MUTANTS))
def test_the_right_text_passes_the_mutants_checks(case):
    case[0](*case[1])


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(monkeypatch, mutant):
    """Each broken copy fails a check that the right text passes."""
    assert times_in_the_kernels(MUTANTS[mutant]) == 1, "the kernel changed: change the mutant too"
    check_is_failed(monkeypatch, MUTANTS[mutant], WATCHED.get(mutant, "fibers"))


# ---- sanitizers ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("shape", "groups", "offset"),
    [((6, 24, 49), 3, 0), ((2000, 28, 3), 1, 0), ((6, 24, 14), 1, 1), ((6, 24, 196), 2, 4)],
)
def test_under_address_and_undefined_behaviour_sanitizer(shape, groups, offset, dtype):
    register_launcher("emulated", EmulatedLauncher(build="address", runs=((0, 0xFF, 1),)))
    check(shape, (1,), groups, dtype, residual=True, relu=True, offset=offset)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 16, 49), (700, 4, 3)])
def test_under_thread_sanitizer(shape):
    register_launcher("emulated", EmulatedLauncher(build="threads", runs=((0, 0xFF, 2),)))
    values, exact = make(shape, (1,), "float32")
    x, dy = at_offset(values["x"], 0), at_offset(values["dy"], 0)
    f = bn.forward(x, None, None, axis=(1,))
    b = bn.backward(dy, x, None, f.saved, axis=(1,))
    close(f.y, truth.forward(exact["x"], 1.0, 0.0, (1,), EPSILON).y, 1e-5, "y")
    close(b.dx, truth.backward(exact["dy"], exact["x"], 1.0, (1,), EPSILON).dx, 4e-5, "dx")
