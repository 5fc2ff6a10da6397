"""The batch normalisation kernels on a GPU, in every regime, by the checks that the emulated device passes."""

from __future__ import annotations

import pytest

from gpulayers import _cupy
from gpulayers.ops.batch_norm import arrays as bn
from gpulayers.ops.batch_norm.layout import collapse
from gpulayers.ops.batch_norm.plan import choose
from tests.kernels import test_batch_norm_kernels as emulated
from tests.kernels.emulation import H200_LIKE

# shape, kept axes, sub-batches, the regime of 16-bit data on 132 multiprocessors
CASES = [
    ((40, 16), (1,), 1, "small"),
    ((40, 7), (1,), 1, "small"),
    ((6, 5, 2, 4), (1,), 3, "small"),
    ((2200, 576), (1,), 1, "cluster"),
    ((4100, 131), (1,), 1, "cluster"),
    ((17, 12, 40, 60), (1,), 1, "cluster"),
    ((17, 12, 37, 61), (1,), 1, "cluster"),
    ((40000, 24), (1,), 1, "grid"),
    ((40011, 23), (1,), 1, "grid"),
    ((130, 8, 40, 60), (1,), 1, "grid"),
    ((131, 7, 37, 61), (1,), 1, "grid"),
    ((40, 16, 40, 64), (3,), 2, "grid"),
    ((5000, 16), (1,), 1, "sweeps"),
    ((9000, 3), (1,), 1, "sweeps"),
    ((80, 3, 11, 8), (1,), 20, "sweeps"),
    ((64, 8, 14, 14), (1,), 1, "small"),  # packets of 8 bytes
    ((900, 12, 14, 14), (1,), 1, "cluster"),
    ((2000, 8, 14, 14), (1,), 1, "grid"),
    ((32, 16, 7, 7), (1,), 1, "small"),  # folded columns
    ((100, 64, 7, 7), (1,), 1, "cluster"),
    ((4000, 8, 7, 7), (1,), 1, "grid"),
    ((120, 16, 7, 7), (1,), 1, "sweeps"),
    ((64, 8, 17, 17), (1,), 1, "small"),  # ragged rows
    ((24, 8, 41, 41), (1,), 1, "cluster"),
    ((130, 8, 37, 61), (1,), 1, "grid"),
    ((80, 8, 11, 11), (1,), 20, "sweeps"),
]
FIRST = list({regime: case for *case, regime in reversed(CASES)}.values())  # one of each regime
EVERY = "small", "cluster", "grid", "sweeps"
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@pytest.fixture
def xp(monkeypatch):
    """Return CuPy, which the checks of the emulated device then work with, too."""
    monkeypatch.setattr(emulated, "xp", _cupy.cupy())
    return emulated.xp


def test_the_cases_are_of_every_regime():
    """Where a GPU is like the one that is emulated; others choose by what they have."""
    taken = set()
    for shape, axis, groups, regime in CASES:
        plan = choose(collapse(shape, axis, groups), 2, 16, H200_LIKE)
        assert plan.regime == regime, shape
        taken.add((regime, *plan.access))
    whole = False, False  # neither folded nor ragged
    widths, both = (1, 8), (False, True)
    assert taken >= {(regime, n, last, *whole) for regime in ("cluster", "grid") for n in widths for last in both}
    assert taken >= {(regime, n, True, *whole) for regime in ("small", "sweeps") for n in widths}
    assert taken >= {(regime, 4, False, *whole) for regime in ("small", "cluster", "grid")}
    assert taken >= {(regime, 8, True, True, False) for regime in EVERY}
    assert taken >= {(regime, 8, False, False, True) for regime in EVERY}


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "axis", "groups", "regime"), CASES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_layouts_and_regimes(xp, shape, axis, groups, regime, dtype):
    emulated.check(shape, axis, groups, dtype)
    emulated.check(shape, axis, groups, dtype, residual=True, relu=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "axis", "groups"), FIRST)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtypes(xp, shape, axis, groups, dtype):
    emulated.check(shape, axis, groups, dtype, relu=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "axis", "groups"), FIRST)
def test_renorm_and_moving_statistics(xp, shape, axis, groups):
    emulated.check_renorm(shape, axis, groups, (0.8, 1.2, 0.3))


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "axis", "groups"), [case for case in FIRST if case[2] == 1])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_relu_behind_a_residual_leaves_bits(xp, shape, axis, groups, dtype):
    emulated.bits_of(shape, axis, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "axis", "groups"), FIRST)
def test_the_same_bits_in_every_run(xp, shape, axis, groups):
    """Many runs, one behind the other without a wait: a sum that is read too early is another in some of them."""
    values, _ = emulated.make(shape, axis, "float32")
    x, dy = xp.asarray(values["x"]), xp.asarray(values["dy"])
    runs = []
    for _ in range(50):
        f = bn.forward(x, None, None, axis=axis, groups=groups)
        runs.append((*f[:3], *bn.backward(dy, x, None, f.saved, axis=axis, groups=groups)[:3]))
    first = [value.get().tobytes() for value in runs[0]]
    assert all([value.get().tobytes() for value in run] == first for run in runs)
