"""Batch normalisation in one cooperative launch that keeps its input on chip, on small emulated devices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gpulayers.launch import DeviceProperties, register_launcher
from gpulayers.launch import source as launch_source
from gpulayers.ops.batch_norm import arrays as bn
from gpulayers.ops.batch_norm import kernels as batch_norm_kernels
from gpulayers.ops.batch_norm.layout import collapse
from gpulayers.ops.batch_norm.plan import GRID_REGISTERS, GRID_RESIDENT, Access, choose, plan_table, static_shared
from tests.kernels.emulation import H200_LIKE, EmulatedLauncher
from tests.kernels.emulation.build import compiler
from tests.kernels.nvrtc import compile_for, supported, unusable_reason
from tests.kernels.strict_array import launcher, xp
from tests.kernels.test_batch_norm_kernels import (
    EPSILON,
    TOLERANCE,
    check,
    check_is_failed,
    check_renorm,
    close,
    make,
    regimes,
    times_in_the_kernels,
)
from tests.ops import batch_norm_truth as truth

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")


def device(shared: int, multiprocessors: int = 4) -> DeviceProperties:
    """Return a GPU without clusters whose multiprocessors have `shared` KiB."""
    return DeviceProperties(
        f"emulated, {shared} KiB", 80, multiprocessors, shared << 10, shared << 10, 65536, 1024, 1024, 1 << 20
    )


ROOMY, TIGHT = device(164), device(64)

# shape, kept axes, sub-batches
CASES = [
    ((3000, 16), (1,), 1),  # registers hold it
    ((5000, 20), (1,), 1),  # a second slab, ragged
    ((6011, 7), (1,), 1),  # single elements; splits that are not equally long
    ((4, 17, 43, 24), (3,), 1),
    ((21, 3, 40, 44), (1,), 1),
    ((7, 3, 60, 67), (1,), 1),
    ((40, 16, 9, 8), (3,), 2),
    ((6, 50, 11, 9), (3,), 3),
    ((12, 2, 50, 44), (1,), 2),
]
GRID = {("gl_bn_forward_grid", 1), ("gl_bn_backward_grid", 1)}


@pytest.fixture(autouse=True)
def on_a_small_device(emulated_gpu):
    emulated_gpu.device = ROOMY


def plans(shape, axis, groups, dtype="float32", on=ROOMY):
    """Return the plans forward and backward."""
    itemsize = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[dtype]
    return [choose(collapse(shape, axis, groups), itemsize, 16, on, kept) for kept in (1, 2)]


@pytest.mark.parametrize("on", [ROOMY, TIGHT], ids=lambda d: d.name)
@pytest.mark.parametrize(("shape", "axis", "groups"), CASES)
def test_layouts(shape, axis, groups, on):
    launcher.device = on
    expected = {plan.regime for plan in plans(shape, axis, groups, on=on)}
    check(shape, axis, groups, "float32", residual=True, relu=True)
    assert expected & {"grid"} and regimes() & GRID
    assert expected != {"grid"} or regimes() >= GRID


def test_the_cases_are_held_whole_in_part_and_by_registers_alone():
    shares = [p.on_chip for on in (ROOMY, TIGHT) for case in CASES for p in plans(*case, on=on) if p.regime == "grid"]
    assert shares.count(1.0) > 5 and sum(0.25 <= share < 0.9 for share in shares) > 5
    kept = {p.kept_units for on in (ROOMY, TIGHT) for case in CASES for p in plans(*case, on=on)}
    assert 0 in kept and max(kept) > 5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("case", [((4, 17, 43, 24), (3,), 1), ((19, 3, 40, 44), (1,), 1)], ids=["last", "first"])
def test_dtypes(case, dtype):
    launcher.device = device(228)
    check(*case, dtype)
    assert regimes() >= GRID


@pytest.mark.parametrize(("residual", "relu"), [(False, False), (False, True), (True, False)])
def test_options(residual, relu):
    check((5000, 20), (1,), 1, "float32", residual, relu)
    assert regimes() >= GRID


@pytest.mark.slow
@pytest.mark.parametrize("on", [ROOMY, TIGHT], ids=lambda d: d.name)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "axis", "groups"), CASES)
@pytest.mark.parametrize(("residual", "relu"), list(itertools.product([False, True], repeat=2)))
def test_everything(shape, axis, groups, dtype, residual, relu, on):
    launcher.device = on
    check(shape, axis, groups, dtype, residual, relu)


@pytest.mark.parametrize(("shape", "axis", "groups"), [((5000, 20), (1,), 1), ((6, 50, 11, 9), (3,), 3)])
def test_renorm_and_moving_statistics(shape, axis, groups):
    check_renorm(shape, axis, groups, (0.8, 1.2, 0.3))
    assert regimes() == GRID


def test_the_same_bits_on_every_run_and_counters_that_are_zero_again():
    values, _ = make((5000, 20), (1,), "float32")
    x, dy = xp.asarray(values["x"]), xp.asarray(values["dy"])
    runs = []
    for _ in range(3):  # each of them is three runs in other orders already
        f = bn.forward(x, None, None, axis=(1,))
        b = bn.backward(dy, x, None, f.saved, axis=(1,))
        runs.append([v.get().tobytes() for v in (f.y, f.mean, f.variance, b.dx, b.dgamma, b.dbeta)])
        assert not launcher._counters.any()  # the gate leaves no bit behind: other kernels count there too
    assert runs[0] == runs[1] == runs[2] and regimes() == GRID


@pytest.mark.parametrize(
    "on", [ROOMY._replace(cooperative_launch=False), device(24)], ids=["no cooperative launch", "no memory"]
)
def test_two_sweeps_where_the_grid_cannot_wait_or_keep(on):
    launcher.device = on
    check((9000, 20), (1,), 1, "float32")
    assert regimes() == {(f"gl_bn_{name}", 1) for name in ("statistics", "normalise", "sums", "apply")}


def test_two_sweeps_where_the_compiled_kernel_does_not_fit():
    """The plan counts on two blocks per multiprocessor; the occupancy of the specialisation has the last word."""
    large = EmulatedLauncher(ROOMY, registers=200)
    register_launcher("emulated", large)
    check((5000, 20), (1,), 1, "float32")
    assert not {name for name, *_ in ((s.name, grid) for s, grid, *_ in large.record) if "grid" in name}
    assert any(s.name == "gl_bn_apply" for s, *_ in large.record)


@pytest.mark.skipif(bool(unusable_reason()), reason=unusable_reason() or "NVRTC is there")
def test_the_grid_is_resident_by_the_compilers_report():
    """With the registers and static shared memory that NVRTC reports, the plans' blocks are all resident."""
    if not supported(80):
        pytest.skip("this NVRTC does not know sm_80")
    by_report = EmulatedLauncher(ROOMY, registers=None)
    register_launcher("emulated", by_report)
    for shape in ((5000, 20), (9, 2, 80, 80)):
        x = xp.asarray(np.random.default_rng(0).normal(size=shape).astype("f"))
        bn.backward(x, x, None, bn.forward(x, None, None, axis=(1,)).saved, axis=(1,))
    assert {s.name for s, *_ in by_report.record} == {name for name, _ in GRID}


@pytest.mark.skipif(bool(unusable_reason()), reason=unusable_reason() or "NVRTC is there")
@pytest.mark.parametrize(
    ("last", "folded", "ragged"),
    [(False, False, False), (True, False, False), (True, True, False), (False, False, True)],
)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_plan_knows_how_much_shared_memory_is_taken(dtype, last, folded, ragged):
    if ragged and dtype == "float64":
        pytest.skip("rows of float64 are never ragged")
    itemsize = {"float64": 8, "float32": 4}.get(dtype, 2)
    parameter = "float64" if dtype == "float64" else "float32"
    how = Access(16 // itemsize, last, folded, ragged)
    for kernel in (batch_norm_kernels._forward_grid, batch_norm_kernels._backward_grid):
        specialisation = kernel.specialise(batch_norm_kernels._defines(how, dtype, parameter))
        found = compile_for(specialisation.text, specialisation.name, 90).shared
        assert 0 < found <= static_shared(itemsize, how), found


# ---- the plan ------------------------------------------------------------------------------------------------------

H200_TABLE = """\
shape, axis, groups | forward | backward
(32, 56, 56, 64), (3,), 1 | grid 2x132 blocks of 4x64, 100% on chip | grid 2x132 blocks of 4x64, 100% on chip
(32, 28, 28, 128), (3,), 1 | grid 4x66 blocks of 4x64, 100% on chip | grid 4x66 blocks of 4x64, 100% on chip
(32, 56, 56, 64), (3,), 16 | grid 2x8 blocks of 4x64, 100% on chip | grid 2x8 blocks of 4x64, 100% on chip
(32, 14, 14, 1024), (3,), 1 | cluster 16x8 blocks of 8x32, 100% on chip | grid 16x16 blocks of 8x32, 100% on chip
(256, 64), (1,), 1 | small 2x1 blocks of 4x64 | small 2x1 blocks of 4x64
(256, 112, 112, 64), (3,), 1 | sweeps 2x198 blocks of 4x64 | sweeps 2x198 blocks of 4x64"""


def test_the_regimes_of_the_h200_as_a_table():
    cases = [
        ((32, 56, 56, 64), (3,), 1),
        ((32, 28, 28, 128), (3,), 1),
        ((32, 56, 56, 64), (3,), 16),
        ((32, 14, 14, 1024), (3,), 1),
        ((256, 64), (1,), 1),
        ((256, 112, 112, 64), (3,), 1),
    ]
    assert plan_table(cases, 2, H200_LIKE) == H200_TABLE


def test_the_plan_knows_what_the_kernel_keeps_in_registers():
    units = f"packets == 1 ? {GRID_REGISTERS[1]} : {GRID_REGISTERS[2]};"
    assert units in "".join(launch_source.read_source("batch_norm.cu"))


@pytest.mark.parametrize("on", [H200_LIKE, ROOMY, TIGHT], ids=lambda d: d.name)
def test_every_grid_fits_its_device(on):
    sizes, seen = [1, 3, 8, 31, 64, 100, 513, 2048, 100_000], 0
    for rows, channels, inner, groups in itertools.product(sizes, sizes, (1, 3, 8, 49, 3136), (1, 2, 16)):
        for itemsize, alignment, kept in itertools.product((2, 4, 8), (1, 8, 16), (1, 2)):
            if rows % groups:
                continue
            layout = collapse((rows, channels, inner), (1,), groups)
            plan = choose(layout, itemsize, alignment, on, kept)
            if plan.regime != "grid":
                continue
            seen += 1
            step = plan.lanes * plan.depth * plan.access.packet * itemsize * kept
            assert plan.slabs * plan.splits * groups <= GRID_RESIDENT * on.multiprocessors
            assert plan.shared == plan.kept_units * step
            static = static_shared(itemsize, plan.access)
            assert GRID_RESIDENT * (plan.shared + static + 1024) <= on.shared_per_multiprocessor
            units = rows // groups * plan.access.units_of_row(inner)
            held = (GRID_REGISTERS[kept] + plan.kept_units) * plan.depth * plan.splits
            assert plan.on_chip == min(1.0, held / units) >= 0.25
    assert seen > 100


# ---- broken copies must be caught ----------------------------------------------------------------------------------


def both_directions(shape, axis=(1,), groups=1):
    """Check y, the variance and dx of a training step."""
    values, exact = make(shape, axis, "float32", 3)
    x, dy = xp.asarray(values["x"]), xp.asarray(values["dy"])
    f = bn.forward(x, None, None, axis=axis, groups=groups)
    want = truth.forward(exact["x"], 1.0, 0.0, axis, EPSILON, groups)
    close(f.variance, want.variance, 1e-5, "variance")
    close(f.y, want.y, 1e-5, "y")
    b = bn.backward(dy, x, None, f.saved, axis=axis, groups=groups)
    close(b.dx, truth.backward(exact["dy"], exact["x"], 1.0, axis, EPSILON, groups).dx, 4e-5, "dx")


IN_PART = ((7000, 20),)
GROUPS = ((40, 16, 9, 8), (3,), 2)

# what is broken: (right text, wrong text, the arguments of the check that sees it)
MUTANTS = {
    "the gate of the forward is missing": (
        "pass_gate(gate_of(arguments, p));\n    const Place again",
        "__syncthreads();\n    const Place again",
        IN_PART,
    ),
    "the gate of the backward is missing": (
        "pass_gate(gate_of(arguments, p));\n    apply_split",
        "__syncthreads();\n    apply_split",
        IN_PART,
    ),
    "a block passes before its gate opens": (
        "(load_relaxed(gate) & 0x80000000u) == 0u",
        "(load_relaxed(gate) & 0x80000000u) != 0u",
        IN_PART,
    ),
    "nobody shuts the gate": ("== 0x80000000u + blocks - 1u) store", "== 0x80000000u + blocks) store", IN_PART),
    "the gates of two slabs are one": ("/ 32 + p.slab) * 32;", "/ 32) * 32;", IN_PART),
    "a group waits for itself alone": (
        "static_cast<uint32>(p.groups));",
        "1u);",
        GROUPS,
    ),
    "shared memory begins one unit too late": (
        "p, steps(p, units, units + shared_units), false,",
        "p, steps(p, units + 1, units + shared_units), false,",
        IN_PART,
    ),
    "what is not kept begins one unit too early": (
        "p, steps(p, units + shared_units, all_steps)",
        "p, steps(p, units + shared_units - 1, all_steps)",
        IN_PART,
    ),
    "the last unit is left out": (
        "to * depth() < all.count ? to * depth() : all.count;",
        "to * depth() < all.count ? to * depth() : all.count - 1;",
        IN_PART,
    ),
    "x and the gradient share a place": ("(packets * number + which)", "(packets * number)", IN_PART),
    "the gradient is taken for x": (
        "const { unit[which] = value; }",
        "const { unit[0] = value; }",
        IN_PART,
    ),
    "a split is merged twice": (
        "part_of(arguments, p, column.part, column.channel);",
        "part_of(arguments, p, column.part ? column.part - 1 : 0, column.channel);",
        IN_PART,
    ),
    "the gate opens before the factors are there": (
        "if (last_split(arguments, p)) {\n        const Moments",
        "if (last_split(arguments, p)) {\n        open_gate(gate_of(arguments, p));\n        const Moments",
        IN_PART,
    ),
    "every block works on the first slab": ("p.slab = rest % p.slabs;", "p.slab = 0;", IN_PART),
}


@pytest.mark.parametrize("arguments", [IN_PART, GROUPS], ids=str)
def test_the_right_text_passes_the_mutants_checks(arguments):
    both_directions(*arguments)
    assert regimes() == GRID


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(monkeypatch, mutant):
    """Each broken copy fails a check that the right text passes."""
    right, wrong, arguments = MUTANTS[mutant]
    mutant = right, wrong, both_directions, arguments
    assert times_in_the_kernels(mutant) == 1, "the kernel changed: change the mutant too"
    check_is_failed(monkeypatch, mutant, "fibers", device=ROOMY)


# ---- sanitizers ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "axis", "groups"), [CASES[1], CASES[2], CASES[4], CASES[7]])
def test_under_address_and_undefined_behaviour_sanitizer(shape, axis, groups):
    register_launcher("emulated", EmulatedLauncher(ROOMY, build="address", runs=((0, 0xFF, 1),)))
    check(shape, axis, groups, "float32", residual=True, relu=True)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "axis"), [((2500, 8), (1,)), ((3, 2, 90, 81), (1,))])
def test_under_thread_sanitizer(shape, axis):
    threads = EmulatedLauncher(device(164, 2), build="threads", runs=((0, 0xFF, 2),))
    register_launcher("emulated", threads)
    values, exact = make(shape, axis, "float32")
    x, dy = xp.asarray(values["x"]), xp.asarray(values["dy"])
    f = bn.forward(x, None, None, axis=axis)
    b = bn.backward(dy, x, None, f.saved, axis=axis)
    close(f.y, truth.forward(exact["x"], 1.0, 0.0, axis, EPSILON).y, 1e-5, "y")
    close(b.dx, truth.backward(exact["dy"], exact["x"], 1.0, axis, EPSILON).dx, 4e-5, "dx")
    assert {s.name for s, *_ in threads.record} == {name for name, _ in GRID}
