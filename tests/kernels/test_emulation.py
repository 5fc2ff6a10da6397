"""The test bench itself: what it computes is right, and what a GPU would not forgive is caught."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpulayers.launch import Kernel, register_launcher, workspace
from tests.kernels.emulation import SMALL, EmulatedLauncher, EmulationError
from tests.kernels.emulation.build import compiler
from tests.kernels.nvrtc import unusable_reason
from tests.kernels.strict_array import launcher, xp

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")


def kernel(name: str, body: str, arguments: list[tuple[str, str]], **keywords: Any) -> Kernel:
    return Kernel("", name, arguments, body=body, listed=False, **keywords)


@pytest.fixture
def using():
    """Return a function that puts another emulated launcher in place for one test."""

    def put(**keywords: Any) -> EmulatedLauncher:
        other = EmulatedLauncher(**keywords)
        register_launcher("emulated", other)
        return other

    yield put
    register_launcher("emulated", launcher)


# ---- right results ---------------------------------------------------------------------------------------------------

REVERSE_IN_BLOCK = """
GL_KERNEL(gl_reverse, 128) {
    GL_SHARED(float, tile, [128]);
    const int64 first = static_cast<int64>(blockIdx.x) * blockDim.x;
    tile[threadIdx.x] = arguments.x[first + threadIdx.x];
    BARRIER
    arguments.out[first + threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}
"""
XY = [("x", "const float32*"), ("out", "float32*")]


def test_shared_memory_and_barrier():
    x = np.arange(5 * 96, dtype="f")
    out = xp.empty(x.shape, "f")
    reverse = kernel("gl_reverse", REVERSE_IN_BLOCK, XY, defines={"BARRIER": ["__syncthreads();"]})
    reverse.launch({"x": xp.asarray(x), "out": out}, grid=(5,), block=(96,), defines={"BARRIER": "__syncthreads();"})
    np.testing.assert_array_equal(out.get(), x.reshape(5, 96)[:, ::-1].ravel())


def test_sums_of_warps_and_blocks():
    body = """
    GL_KERNEL(gl_sums, 1024) {
        const float mine = arguments.x[blockIdx.x * blockDim.x + threadIdx.x];
        const float total = block_sum(mine) + 1000.0f * block_sum(static_cast<float>(threadIdx.x == 3));
        if (threadIdx.x == 0) arguments.out[blockIdx.x] = total;
    }
    """
    x = np.random.default_rng(0).integers(0, 100, (4, 1024)).astype("f")
    for threads in (32, 64, 1024):
        out = xp.empty(4, "f")
        kernel("gl_sums", body, XY).launch(
            {"x": xp.asarray(x[:, :threads].copy()), "out": out}, grid=(4,), block=(threads,)
        )
        np.testing.assert_array_equal(out.get(), x[:, :threads].sum(1) + 1000)


def test_shuffles_and_votes():
    body = """
    GL_KERNEL(gl_votes, 64) {
        const int32 lane = lane_number();
        int32* out = arguments.out + threadIdx.x * 8;
        out[0] = __shfl_up_sync(all_lanes, lane, 3);
        out[1] = __shfl_down_sync(all_lanes, lane, 5);
        out[2] = __shfl_xor_sync(all_lanes, lane, 6, 8);
        out[3] = __shfl_sync(all_lanes, lane, 2, 16);
        out[4] = static_cast<int32>(__ballot_sync(all_lanes, lane % 3 == 0));
        out[5] = __any_sync(all_lanes, lane == 40);
        out[6] = __all_sync(all_lanes, lane < 32);
        const uint32 half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
        out[7] = static_cast<int32>(__shfl_xor_sync(half, static_cast<double>(lane) + 0.5, 15) * 2.0);
    }
    """
    out = xp.empty((64, 8), "i4")
    kernel("gl_votes", body, [("out", "int32*")]).launch({"out": out}, grid=(1,), block=(64,))
    lane = np.arange(64) % 32
    expected = [
        np.where(lane < 3, lane, lane - 3),
        np.where(lane + 5 > 31, lane, lane + 5),
        lane ^ 6,
        lane // 16 * 16 + 2,
        np.full(64, sum(1 << i for i in range(0, 32, 3))),
        np.zeros(64),
        np.ones(64),
        2 * (lane ^ 15) + 1,
    ]
    np.testing.assert_array_equal(out.get(), np.array(expected, np.int64).astype("i4").T)


GRID_SUM = """
GL_KERNEL(gl_grid_sum, 64) {
    const float part = block_sum(arguments.x[blockIdx.x * blockDim.x + threadIdx.x]);
    if (threadIdx.x == 0) arguments.parts[blockIdx.x] = part;
    BETWEEN
    float total = 0.0f;
    for (uint32 i = 0; i < gridDim.x; ++i) total += arguments.parts[i];
    arguments.out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}
"""
GRID_ARGUMENTS = [*XY, ("parts", "float32*"), ("counters", "uint32*")]
BARRIER = "grid_barrier(arguments.counters, gridDim.x, blockIdx.x == 0);"


def run_grid_sum(between: str, blocks: int = 4, cooperative: bool = True) -> tuple[Any, Any]:
    x = np.random.default_rng(1).integers(0, 50, blocks * 64).astype("f")
    out = xp.empty(x.shape, "f")
    device_x = xp.asarray(x)
    counters, scratch = xp.zeros(1, "uint32"), workspace(device_x, scratch=4 * blocks)[1]
    summing = kernel("gl_grid_sum", GRID_SUM, GRID_ARGUMENTS, defines={"BETWEEN": [between]})
    summing.launch(
        {"x": device_x, "out": out, "parts": scratch.view(np.float32), "counters": counters},
        grid=(blocks,),
        block=(64,),
        defines={"BETWEEN": between},
        cooperative=cooperative,
    )
    return out.get(), x.sum()


@pytest.mark.parametrize("times", [1, 2, 3])
def test_grid_barrier(times):
    out, expected = run_grid_sum(BARRIER * times)
    assert (out == expected).all()


LAST_BLOCK = """
GL_KERNEL(gl_last, 64) {
    const float part = block_sum(arguments.x[blockIdx.x * blockDim.x + threadIdx.x]);
    if (threadIdx.x == 0) arguments.parts[blockIdx.x] = part;
    if (!last_block(arguments.counters, gridDim.x)) return;
    if (threadIdx.x == 0) {
        float total = 0.0f;
        for (uint32 i = 0; i < gridDim.x; ++i) total += arguments.parts[i];
        arguments.out[0] = total;
    }
}
"""


def run_last_block(body: str = LAST_BLOCK) -> None:
    x = np.random.default_rng(1).integers(0, 50, 7 * 64).astype("f")
    device_x, out = xp.asarray(x), xp.empty(1, "f")
    counters, scratch = workspace(device_x, counters=1, scratch=4 * 7)
    values = {"x": device_x, "out": out, "parts": scratch.view(np.float32), "counters": counters}
    kernel("gl_last", body, GRID_ARGUMENTS).launch(values, grid=(7,), block=(64,))
    assert out.get()[0] == x.sum()


def test_last_block_merges():
    run_last_block()


GATE = """
GL_KERNEL(gl_gate, 64) {
    if (blockIdx.x == 0) {
        arguments.parts[threadIdx.x] = arguments.x[threadIdx.x];
        open_gate(arguments.counters);
    }
    pass_gate(arguments.counters);
    arguments.out[blockIdx.x * 64 + threadIdx.x] = arguments.parts[63 - threadIdx.x];
    leave_gate(arguments.counters, gridDim.x);
}
"""


def run_gate(body: str = GATE) -> None:
    x = np.random.default_rng(1).integers(0, 50, 64).astype("f")
    device_x, out = xp.asarray(x), xp.empty((3, 64), "f")
    counters, scratch = workspace(device_x, counters=1, scratch=4 * 64)
    values = {"x": device_x, "out": out, "parts": scratch.view(np.float32), "counters": counters}
    kernel("gl_gate", body, GRID_ARGUMENTS).launch(values, grid=(3,), block=(64,), cooperative=True)
    np.testing.assert_array_equal(out.get(), np.tile(x[::-1], (3, 1)))


def test_a_gate_lets_pass_what_was_written_before_it_opened():
    run_gate()


CLUSTER_SUM = """
GL_KERNEL(gl_cluster, 32) {
    GL_SHARED(float, mine, [32]);
    GL_DYNAMIC_SHARED(bytes);
    float* more = reinterpret_cast<float*>(bytes);
    mine[threadIdx.x] = arguments.x[blockIdx.x * 32 + threadIdx.x];
    more[threadIdx.x] = 2.0f * mine[threadIdx.x];
    cluster_barrier();
    float total = 0.0f;
    for (uint32 rank = 0; rank < CLUSTER; ++rank)
        total += cluster_shared(mine, rank)[31 - threadIdx.x] + cluster_shared(more, rank)[threadIdx.x];
    AFTER
    arguments.out[blockIdx.x * 32 + threadIdx.x] = total + 1000.0f * cluster_rank();
}
"""


def run_cluster(size: int, after: str = "cluster_barrier();") -> None:
    x = np.random.default_rng(2).integers(0, 50, (3, size, 32)).astype("f")
    out = xp.empty(x.shape, "f")
    defines = {"CLUSTER": size, "AFTER": after}
    summing = kernel("gl_cluster", CLUSTER_SUM, XY, defines={"CLUSTER": [2, 4, 8], "AFTER": [after]})
    summing.launch({"x": xp.asarray(x), "out": out}, grid=(3 * size,), block=(32,), shared=128, defines=defines)
    total = x.sum(1)[:, None, ::-1] + 2 * x.sum(1)[:, None] + 1000 * np.arange(size)[:, None]
    np.testing.assert_array_equal(out.get(), total)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_clusters_read_each_others_shared_memory(size):
    run_cluster(size)


def test_half_and_bfloat_conversions_round_like_numpy():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    body = """
    GL_KERNEL(gl_convert, 256) {
        const int64 i = static_cast<int64>(blockIdx.x) * 256 + threadIdx.x;
        if (i < arguments.count) arguments.out[i] = narrow<STORAGE>(arguments.x[i]);
        if (i < 65536) arguments.back[i] = widen(arguments.all[i]);
    }
    """
    arguments = [
        ("x", "const float32*"),
        ("out", "STORAGE*"),
        ("all", "const STORAGE*"),
        ("back", "float32*"),
        ("count", "int64"),
    ]
    convert = kernel("gl_convert", body, arguments, defines={"STORAGE": ["float16", "bfloat16"]})
    rng = np.random.default_rng(3)
    every = np.arange(65536, dtype="u2")
    random = rng.integers(0, 2**32, 60000, dtype="u4").view("f")
    for dtype in (np.dtype("float16"), np.dtype(ml_dtypes.bfloat16)):
        values = every.view(dtype)
        exact = values.astype("f")
        with np.errstate(all="ignore"):
            middle = ((exact[:-1].astype("d") + exact[1:]) / 2).astype("f")  # ties
            x = np.concatenate([random, exact, middle, rng.normal(0, 1e-6, 5000).astype("f")])
            expected = x.astype(dtype)
        out, back = xp.empty(x.shape, dtype), xp.empty(65536, "f")
        convert.launch(
            {"x": xp.asarray(x), "out": out, "all": xp.asarray(values), "back": back, "count": x.size},
            grid=(-(-x.size // 256),),
            block=(256,),
            defines={"STORAGE": dtype.name},
        )
        number = ~np.isnan(x)
        np.testing.assert_array_equal(out.get().view("u2")[number], expected.view("u2")[number])
        assert np.isnan(out.get()[~number].astype("f")).all()
        np.testing.assert_array_equal(back.get(), exact)


# ---- what must be caught ---------------------------------------------------------------------------------------------


def test_a_missing_barrier_is_caught():
    x = xp.asarray(np.arange(96, dtype="f"))
    reverse = kernel("gl_reverse", REVERSE_IN_BLOCK, XY, defines={"BARRIER": [" "]})
    with pytest.raises(EmulationError, match="depends on the order"):
        reverse.launch({"x": x, "out": xp.empty(96, "f")}, grid=(1,), block=(96,), defines={"BARRIER": " "})


def test_a_gate_where_one_thread_waits_for_itself_is_caught():
    wait = "if (threadIdx.x == 0) while ((load_relaxed(arguments.counters) & 0x80000000u) == 0u) {}"
    with pytest.raises(EmulationError, match="depends on the order"):
        run_gate(GATE.replace("pass_gate(arguments.counters);", wait))
    workspace(xp.empty(1), 1)[0]._memory[:] = 0


def test_a_missing_grid_barrier_is_caught():
    with pytest.raises(EmulationError, match="depends on the order"):
        run_grid_sum("__syncthreads();")


def test_waiting_for_blocks_that_are_not_resident_is_caught(using):
    with pytest.raises(EmulationError, match="spin does not end"):
        run_grid_sum(BARRIER, cooperative=False)
    using(device=SMALL)
    with pytest.raises(EmulationError, match="only 64 fit"):
        run_grid_sum(BARRIER, blocks=65)


@pytest.mark.skipif(bool(unusable_reason()), reason=unusable_reason() or "NVRTC is there")
def test_residency_can_follow_the_resource_report():
    summing = kernel("gl_grid_sum", GRID_SUM, GRID_ARGUMENTS, defines={"BETWEEN": [BARRIER]})
    specialisation = summing.specialise({"BETWEEN": BARRIER})
    by_report, few = EmulatedLauncher(registers=None), EmulatedLauncher(registers=255)
    assert by_report.resident_blocks(specialisation, 64, 0) == 32  # a small kernel: the limit of blocks
    assert few.resident_blocks(specialisation, 256, 0) == 1
    assert by_report.resident_blocks(specialisation, 64, 100 * 1024) == 2


@pytest.mark.parametrize(
    "left",
    ["atomicAdd(arguments.counters, 1u);", "grid_barrier(arguments.counters, gridDim.x, blockIdx.x == 0);"],
    ids=["count", "top bit"],
)
def test_a_counter_left_behind_is_caught(left):
    """A count, and the top bit of a barrier, which needs a word of its own: the next kernel counts from zero."""
    body = "GL_KERNEL(gl_left, 32) {\n" + left + "\n arguments.out[threadIdx.x] = 1.0f; }"
    counters, _ = workspace(xp.empty(1), counters=1)
    leaving = kernel("gl_left", body, [("out", "float32*"), ("counters", "uint32*")])
    with pytest.raises(EmulationError, match="counters"):
        leaving.launch({"out": xp.empty(32, "f"), "counters": counters}, grid=(1,), block=(32,), cooperative=True)
    counters._memory[:] = 0


def test_a_last_block_that_is_counted_wrongly_is_caught():
    with pytest.raises((EmulationError, AssertionError)):
        run_last_block(
            LAST_BLOCK.replace(
                "last_block(arguments.counters, gridDim.x)", "last_block(arguments.counters, gridDim.x - 1u)"
            )
        )
    workspace(xp.empty(1), 1)[0]._memory[:] = 0


def test_a_cluster_that_ends_too_early_is_caught():
    with pytest.raises(EmulationError, match="has ended"):
        run_cluster(4, after="if (false) cluster_barrier();".replace("cluster_barrier();", ";"))


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("if (threadIdx.x < 32) __syncthreads();", "deadlock"),
        ("if (threadIdx.x < 32) {__syncthreads();}\nelse {__syncthreads();}", "two different __syncthreads"),
        ("if (lane_number() != 7) __syncwarp();", "deadlock"),
        ("__shfl_xor_sync(0xffffu, 1, 1);", "leaves it out"),
        ("if (lane_number() < 16) __shfl_sync(0xffffu, 1, 20);", "takes no part"),
        ("load_16(arguments.x + 1);", "not aligned"),
        ("while (load_relaxed(reinterpret_cast<const uint32*>(arguments.x)) != 77u) {}", "spin does not end"),
    ],
)
def test_misuse_is_caught(body, complaint):
    wrong = kernel("gl_wrong", "GL_KERNEL(gl_wrong, 64) {\n" + body + "\n arguments.out[0] = 1.0f; }", XY)
    with pytest.raises(EmulationError, match=complaint):
        wrong.launch({"x": xp.zeros(8, "f"), "out": xp.empty(1, "f")}, grid=(1,), block=(64,))


def test_unwritten_shared_memory_is_caught():
    body = "GL_KERNEL(gl_wrong, 64) { GL_SHARED(float, s, [64]); arguments.out[threadIdx.x] = s[threadIdx.x]; }"
    with pytest.raises(EmulationError, match="memory nobody wrote"):
        kernel("gl_wrong", body, XY).launch({"x": None, "out": xp.empty(64, "f")}, grid=(1,), block=(64,))


def test_writing_a_const_array_is_caught():
    body = "GL_KERNEL(gl_wrong, 64) { const_cast<float*>(arguments.x)[0] = 3.0f; arguments.out[0] = 1.0f; }"
    with pytest.raises(EmulationError, match="declared const"):
        kernel("gl_wrong", body, XY).launch({"x": xp.zeros(1, "f"), "out": xp.empty(1, "f")}, grid=(1,), block=(1,))


def test_limits_of_the_device_are_kept(using):
    body = "GL_KERNEL(gl_wrong, 64) { arguments.out[0] = 1.0f; }"
    values = {"x": None, "out": xp.empty(1, "f")}
    with pytest.raises(EmulationError, match="more than the kernel's 64"):
        kernel("gl_wrong", body, XY).launch(values, grid=(1,), block=(96,))
    with pytest.raises(EmulationError, match="more than a block can have"):
        kernel("gl_wrong", body, XY).launch(values, grid=(1,), block=(32,), shared=228 * 1024)
    using(device=SMALL)
    with pytest.raises(EmulationError, match="needs sm_90"):
        kernel("gl_wrong", body, XY, defines={"CLUSTER": [2]}).launch(
            values, grid=(2,), block=(32,), defines={"CLUSTER": 2}
        )


# ---- sanitizers ------------------------------------------------------------------------------------------------------

COPY = """
GL_KERNEL(gl_copy, 64) {
    const int32 i = threadIdx.x;
    if (i BOUND arguments.count) arguments.out[i] = arguments.x[i];
}
"""
COPY_ARGUMENTS = [*XY, ("count", "int32")]


@pytest.mark.parametrize(("bound", "fails"), [("<", False), ("<=", True)])
def test_address_sanitizer_sees_an_off_by_one_bound(using, bound, fails):
    using(build="address")
    copy = kernel("gl_copy", COPY, COPY_ARGUMENTS, defines={"BOUND": [bound]})
    x, out = np.arange(40, dtype="f"), xp.empty(40, "f")
    values = {"x": xp.asarray(x), "out": out, "count": 40}
    if fails:
        with pytest.raises(EmulationError, match="heap-buffer-overflow"):
            copy.launch(values, grid=(1,), block=(64,), defines={"BOUND": bound})
    else:
        copy.launch(values, grid=(1,), block=(64,), defines={"BOUND": bound})
        np.testing.assert_array_equal(out.get(), x)


def test_address_sanitizer_runs_barriers_and_clusters(using):
    using(build="address")
    run_cluster(4)
    run_last_block()
    run_grid_sum(BARRIER)


def test_undefined_behaviour_is_caught(using):
    using(build="address")
    body = "GL_KERNEL(gl_wrong, 64) { int32 n = 0x7fffffff; n += int32(arguments.x[0]); arguments.out[0] = n; }"
    with pytest.raises(EmulationError, match="signed integer overflow"):
        kernel("gl_wrong", body, XY).launch({"x": xp.ones(1, "f"), "out": xp.empty(1, "f")}, grid=(1,), block=(1,))


def test_thread_sanitizer_accepts_what_is_right(using):
    using(build="threads", runs=((0, 0xFF, 2),))
    run_last_block()
    run_cluster(2)
    run_gate()
    out, expected = run_grid_sum(BARRIER)
    assert (out == expected).all()


@pytest.mark.parametrize("case", ["barrier", "order", "gate opened without release", "gate passed without acquire"])
def test_thread_sanitizer_sees_races(using, case):
    using(build="threads", runs=((0, 0xFF, 2),))
    with pytest.raises(EmulationError, match="data race"):
        if case == "barrier":
            values = {"x": xp.asarray(np.arange(96, dtype="f")), "out": xp.empty(96, "f")}
            reverse = kernel("gl_reverse", REVERSE_IN_BLOCK, XY, defines={"BARRIER": [" "]})
            reverse.launch(values, grid=(1,), block=(96,), defines={"BARRIER": " "})
        elif case == "gate opened without release":
            relaxed = "__syncthreads();\nif (threadIdx.x == 0) atomic_add_relaxed(arguments.counters, 0x80000000u);"
            run_gate(GATE.replace("open_gate(arguments.counters);", relaxed))
        elif case == "gate passed without acquire":
            wait = "while ((load_relaxed(arguments.counters) & 0x80000000u) == 0u) {}"
            passing = f"if (threadIdx.x == 0) {wait}\n__syncthreads();"
            run_gate(GATE.replace("pass_gate(arguments.counters);", passing))
        else:  # a relaxed counter orders nothing
            relaxed = "atomicAdd(arguments.counters, 1u) == gridDim.x - 1u && (arguments.counters[0] = 0u, true)"
            run_last_block(LAST_BLOCK.replace("last_block(arguments.counters, gridDim.x)", f"({relaxed})"))
