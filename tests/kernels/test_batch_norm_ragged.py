"""Rows of channels that begin and end inside packets of 16 bytes, in every regime."""

from __future__ import annotations

import numpy as np
import pytest

from gpulayers.launch import register_launcher
from gpulayers.ops.batch_norm import arrays as bn
from gpulayers.ops.batch_norm.layout import collapse
from gpulayers.ops.batch_norm.plan import choose
from tests.kernels.emulation import H200_LIKE, EmulatedLauncher
from tests.kernels.strict_array import launcher, xp
from tests.kernels.test_batch_norm_grid import ROOMY, TIGHT
from tests.kernels.test_batch_norm_kernels import (
    CLIPS,
    EPSILON,
    PEOPLE,
    TOLERANCE,
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

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
SLOW = {"bfloat16": pytest.mark.slow}  # it differs from float16 in its conversions alone
BY_DTYPE = pytest.mark.parametrize("dtype", [pytest.param(name, marks=SLOW.get(name, ())) for name in ITEMSIZE])
# Odd, and 2 and 4 mod 8; 289 and the other squares touch the same number of packets wherever they begin.
INNER = (5, 14, *range(65, 76), 121, 225, 289, 1225)
# shape (channels second), sub-batches, device, regime forward and backward
REGIMES = [
    ((8, 3, 121), 1, H200_LIKE, "small"),
    ((24, 3, 67), 3, H200_LIKE, "small"),
    ((24, 8, 1681), 1, H200_LIKE, "cluster"),
    ((56, 8, 737), 1, H200_LIKE, "cluster"),
    ((32, 8, 1225), 1, ROOMY, "grid"),  # kept in part
    ((128, 3, 289), 2, ROOMY, "grid"),
    ((16, 2, 8041), 1, ROOMY, "grid"),  # splits that begin and end inside rows
    ((160, 1, 225), 1, TIGHT, "grid"),
    ((80, 3, 71), 20, H200_LIKE, "sweeps"),
    ((40, 8, 1923), 2, TIGHT, "sweeps"),
]
BY_REGIME = pytest.mark.parametrize(("shape", "groups", "on", "regime"), REGIMES)
NAMES = {"small": ("forward", "backward"), "cluster": ("forward", "backward"), "sweeps": ("statistics", "apply")}
NAMES["grid"] = ("forward_grid", "backward_grid")


def plan_of(shape, groups, dtype, kept=1):
    return choose(collapse(shape, (1,), groups), ITEMSIZE[dtype], 16, launcher.device, kept)


def forms():
    """Return the (packet, ragged) that were launched."""
    return {(s.defines["PACKET"], s.defines["RAGGED"]) for s, *_ in launcher.record}


@BY_DTYPE
@pytest.mark.parametrize("inner", INNER)
def test_lengths(inner, dtype):
    odd = inner % 2 == 1 or (dtype != "float32" and inner % 4 == 2)
    for channels, groups in ((1, 1), (3, 2), (8, 4)):
        check((8, channels, inner), (1,), groups, dtype, residual=True, relu=True)
        how = plan_of((8, channels, inner), groups, dtype).access
        assert forms() == {(how.packet, how.ragged)}
        assert how.ragged == (odd and not how.folded)
        launcher.record.clear()


@BY_DTYPE
@BY_REGIME
def test_regimes(shape, groups, on, regime, dtype):
    launcher.device = on
    assert {plan_of(shape, groups, dtype, kept).regime for kept in (1, 2)} == {regime}
    check(shape, (1,), groups, dtype, residual=True, relu=True)
    assert forms() == {(16 // ITEMSIZE[dtype], True)}
    cluster = 8 if regime == "cluster" else 1
    assert regimes() >= {(f"gl_bn_{name}", cluster) for name in NAMES[regime]}


@pytest.mark.parametrize(("residual", "relu"), [(False, False), (False, True), (True, False)])
@BY_REGIME
def test_options(shape, groups, on, regime, residual, relu):
    launcher.device = on
    check(shape, (1,), groups, "float16", residual, relu)


@BY_DTYPE
def test_images_with_rows_between_batch_and_channels(dtype):
    """Sub-batches whose rows are not equally far apart."""
    check((12, 5, 8, 67), (2,), 3, dtype, residual=True, relu=True)
    assert forms() == {(16 // ITEMSIZE[dtype], True)}


@pytest.mark.parametrize("clips", CLIPS)
@pytest.mark.parametrize(("shape", "groups"), [((8, 3, 11, 11), 1), ((12, 5, 67), 3), ((80, 3, 71), 20)])
def test_renorm(shape, groups, clips):
    check_renorm(shape, (1,), groups, clips)
    assert forms() == {(4, True)}


@pytest.mark.parametrize(
    ("shape", "dtype", "offset", "packet"),
    [
        ((3, 5, 121), "float16", 0, 1),  # the array does not end with a packet
        ((3, 5, 121), "float32", 0, 1),
        ((2, 6, 121), "float16", 0, 1),
        ((8, 3, 121), "float16", 1, 1),  # nor does it begin with one
        ((8, 3, 70), "float16", 4, 2),
        ((8, 3, 121), "float32", 2, 1),
        ((8, 3, 121), "float64", 0, 1),
    ],
)
def test_other_arrays_are_moved_by_what_divides_their_rows(shape, dtype, offset, packet):
    check(shape, (1,), 1, dtype, residual=True, relu=True, offset=offset)
    assert (packet, False) in forms()


@BY_DTYPE
def test_the_mask_behind_a_residual_is_the_output(dtype):
    """Two rows share the byte of a packet, so there are no bits."""
    values, _ = make((8, 3, 121), (1,), dtype)
    x, residual = xp.asarray(values["x"]), xp.asarray(values["residual"])
    f = bn.forward(x, None, None, axis=(1,), residual=residual, activation="relu")
    assert f.mask.get().tobytes() == f.y.get().tobytes()


# ---- what lies beside a row ----------------------------------------------------------------------------------------


def results(values, groups):
    """Return what all operations compute for channels, channels second or alone."""
    x, dy, residual, gamma, beta, mean, variance = (
        xp.asarray(values[name]) for name in ("x", "dy", "residual", "gamma", "beta", "mean", "variance")
    )
    options = {"axis": (1,), "activation": "relu"}
    f = bn.forward(x, gamma, beta, groups=groups, residual=residual, **options)
    b = bn.backward(dy, x, gamma, f.saved, groups=groups, y=f.y, residual=True, **options)
    again = bn.forward(x, gamma, beta, groups=groups, **options)
    found = bn.backward(dy, x, gamma, f.saved, groups=groups, mask=again.mask, **options)
    y = bn.inference(x, gamma, beta, mean, variance, residual=residual, **options)
    n = bn.inference_backward(dy, x, gamma, mean, variance, beta=beta, **options)
    per_channel = [f.mean, f.variance, b.dgamma, b.dbeta, found.dgamma, found.dbeta, n.dgamma, n.dbeta]
    return [*(v.get() for v in (f.y, b.dx, b.dresidual, found.dx, y, n.dx)), *(v.get()[None] for v in per_channel)]


def neighbours(shape, groups=1, dtype="float32", on=H200_LIKE):
    """Check that a channel gets the same bits whatever the channels beside it hold."""
    launcher.device = on
    values, _ = make(shape, (1,), dtype)
    clean = results(values, groups)
    for first in {0, min(1, shape[1] - 1)}:
        spoiled = {name: value.copy() for name, value in values.items()}
        for name in PEOPLE:
            others = spoiled[name][:, 1 - first :: 2]
            others[...] = np.resize([np.inf, np.nan, -np.inf], others.shape)
        for found, wanted in zip(results(spoiled, groups), clean, strict=True):
            assert found[:, first::2].tobytes() == wanted[:, first::2].tobytes()


@BY_DTYPE
@BY_REGIME
def test_neighbours_do_not_matter(shape, groups, on, regime, dtype):
    if shape[1] == 1:
        shape = (shape[0], 2, shape[2])
    neighbours(shape, groups, dtype, on)
    assert forms() == {(16 // ITEMSIZE[dtype], True)}


def drifting(shape):
    """Check statistics and output where rows, and what splits have of them, differ and are far from zero."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=shape) + 0.1 * np.arange(shape[0])[:, None, None] + 30 * np.arange(shape[1])[:, None]
    x = (x + np.linspace(0, 9, shape[2]) ** 2).astype("f")
    want = truth.forward(x.astype("d"), 1.0, 0.0, (1,), EPSILON)
    mean, variance = bn.statistics(xp.asarray(x), axis=(1,))
    np.testing.assert_allclose(mean.get().ravel(), want.mean, rtol=1e-6)
    np.testing.assert_allclose(variance.get().ravel(), want.variance, rtol=1e-6)


@pytest.mark.parametrize("shape", [(700, 3, 71), (40, 8, 1923), (16, 2, 8041)])
def test_splits_weigh_as_much_as_they_have(shape):
    drifting(shape)
    assert forms() == {(4, True)}


# ---- broken copies must be caught ----------------------------------------------------------------------------------


def training(shape):
    """Check a training step and inference with residual and ReLU."""
    check(shape, (1,), 1, "float32", residual=True, relu=True)


SMALL, ROWS = ((8, 3, 67),), ((40, 3, 67),)
LONG = ((700, 3, 71),)  # one of the splits begins with a row's last packet, which has nothing of the row

# what is broken: (right text, wrong text, the check that sees it, its arguments)
MUTANTS = {
    "rows begin with their packet": ("position == 0 ? before : 0;", "0;", training, SMALL),
    "rows begin one element early": (
        "position == 0 ? before : 0;",
        "position == 0 && before > 0 ? before - 1 : 0;",
        training,
        SMALL,
    ),
    "rows begin one element late": ("position == 0 ? before : 0;", "position == 0 ? before + 1 : 0;", training, SMALL),
    "rows end with their packet": ("& ((1u << end) - 1u)};", "& all_elements};", training, SMALL),
    "rows end one element early": ("((1u << end) - 1u)};", "((1u << end) - 1u) >> (end < width)};", training, SMALL),
    "rows end one element late": ("((1u << end) - 1u)};", "((2u << end) - 1u)};", training, SMALL),
    "a row's last packet is forgotten": ("(p.inner + 2 * width - 2)", "(p.inner + width - 2)", training, SMALL),
    "rows are as long as their elements": ("RAGGED ? row_end * width : p.inner;", "p.inner;", training, ROWS),
    "what is behind the array is read": (
        "Unit{offset - before - (end == 0 ? width : 0),",
        "Unit{offset - before,",
        training,
        SMALL,
    ),
    "packets at the ends are written whole": ("if (unit.whole()) {", "if (true) {", training, SMALL),
    "the statistics take in neighbours": (
        "replace_others(unit, values[slot], narrow<STORAGE>(base[0]));",
        "",
        training,
        SMALL,
    ),
    "the gradients' sums take in neighbours": ("replace_others(unit, g[slot], STORAGE{});", "", training, SMALL),
    "neighbours are multiplied by zero": ("replace_others(unit, x[slot], STORAGE{});", "", neighbours, SMALL),
    "the base is a neighbour's value": ("if (unit.has(i)) first[", "first[", neighbours, SMALL),
    "packets count as whole": ("RAGGED ? __popc(elements) :", "RAGGED ? width :", training, SMALL),
    "splits weigh by their packets": (
        "if (!RAGGED) return shares.count(split)",
        "return shares.count(split)",
        drifting,
        LONG,
    ),
    "splits weigh as if rows began with packets": (
        "position * width - elements_before(row_start(p, row) + p.start);",
        "position * width;",
        drifting,
        LONG,
    ),
    "rows' last packets count as whole": ("(of_row < p.inner ? of_row : p.inner)", "of_row", drifting, LONG),
}
# In a process of their own, watched: what they read or write out of bounds.
WATCHED = dict.fromkeys(
    ["a row's last packet is forgotten", "rows are as long as their elements", "what is behind the array is read"],
    "address",
)


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
@BY_DTYPE
@pytest.mark.parametrize(
    ("shape", "groups", "on"), [(*case[:3],) for case in REGIMES if case[0][2] in (67, 121, 737, 8041, 71, 1923)]
)
def test_under_address_and_undefined_behaviour_sanitizer(shape, groups, on, dtype):
    register_launcher("emulated", EmulatedLauncher(on, build="address", runs=((0, 0xFF, 1),)))
    check(shape, (1,), groups, dtype, residual=True, relu=True)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 3, 67), (40, 2, 1923)])
def test_under_thread_sanitizer(shape):
    register_launcher("emulated", EmulatedLauncher(TIGHT, build="threads", runs=((0, 0xFF, 2),)))
    values, exact = make(shape, (1,), "float32")
    x, dy = xp.asarray(values["x"]), xp.asarray(values["dy"])
    f = bn.forward(x, None, None, axis=(1,))
    b = bn.backward(dy, x, None, f.saved, axis=(1,))
    close(f.y, truth.forward(exact["x"], 1.0, 0.0, (1,), EPSILON).y, TOLERANCE["float32"], "y")
    close(b.dx, truth.backward(exact["dy"], exact["x"], 1.0, (1,), EPSILON).dx, 4e-5, "dx")


@pytest.mark.slow
def test_what_the_first_pass_writes_is_not_read_by_other_blocks():
    """A packet at a row's end has elements of the neighbouring row, whose gradient another block masks and writes."""
    few = TIGHT._replace(multiprocessors=4)
    assert choose(collapse((8, 2, 3041), (1,)), 4, 16, few, 2).on_chip < 1  # the rest is read again
    register_launcher("emulated", EmulatedLauncher(few, build="threads", runs=((0, 0xFF, 3),)))
    check((8, 2, 3041), (1,), 1, "float32", residual=True, relu=True)
