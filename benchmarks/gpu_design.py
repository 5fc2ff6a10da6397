"""The open questions of the kernel designs, a short kernel for each: ``python -m benchmarks.gpu_probe --design``.

Every function returns figures and one line of text under ``answer: ...``. The kernels are ours and are launched as the
library's are; each adds up what it reads, so that no load can be left out, and the sum is what tests look at.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gpulayers import _cupy
from gpulayers.device import array_module
from gpulayers.launch import Kernel, device_properties, launcher_of
from gpulayers.ops.batch_norm import arrays as batch_norm_arrays
from gpulayers.ops.batch_norm import plan as batch_norm_plan
from gpulayers.ops.batch_norm.arrays import MovingStatistics
from gpulayers.ops.batch_norm.layout import collapse

__all__ = ["KERNELS", "MEASURES"]

THREADS = 512
_ADD = """
__device__ __forceinline__ uint32 of(uint4 v) { return v.x + v.y + v.z + v.w; }
__device__ __forceinline__ const uint32* at(const uint32* base, int64 vector) { return base + 4 * vector; }
__device__ __forceinline__ void give(uint32 sum, uint32* out) {
    sum = block_sum(sum);
    if (thread_number() == 0) atomicAdd(out, sum);
}
"""
SWEEP = Kernel(
    "", "gl_probe_sweep", [("x", "const uint32*"), ("y", "uint32*"), ("out", "uint32*"), ("vectors", "int64"),
                           ("reverse", "int32")],
    defines={"STREAM": (True, False)}, listed=False,
    body=_ADD + """
// Reads x, and copies it to y where there is one, from the front to the back or the other way round.
GL_KERNEL(gl_probe_sweep, 512) {
    const int64 step = static_cast<int64>(gridDim.x) * blockDim.x, rounds = (arguments.vectors + step - 1) / step;
    const int64 mine = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
    uint32 sum = 0;
#pragma unroll 4
    for (int64 round = 0; round < rounds; ++round) {
        const int64 vector = (arguments.reverse ? rounds - 1 - round : round) * step + mine;
        if (vector >= arguments.vectors) continue;
        const uint4 v = load_16(at(arguments.x, vector));
        sum += of(v);
        if (arguments.y == nullptr) continue;
        if (STREAM) store_16_streaming(arguments.y + 4 * vector, v);
        else store_16(arguments.y + 4 * vector, v);
    }
    give(sum, arguments.out);
}
""",
)  # fmt: skip
SLAB = Kernel(
    "", "gl_probe_slab", [("x", "const uint32*"), ("out", "uint32*"), ("rows", "int64"), ("across", "int64")],
    defines={"LANES": (4, 8, 16, 32)}, listed=False,
    body=_ADD + """
// A block reads LANES neighbouring 16-byte vectors of every row of its part: a slab of channels, channels last.
GL_KERNEL(gl_probe_slab, 512) {
    const int64 lane = threadIdx.x % LANES, depth = blockDim.x / LANES, step = depth * gridDim.y;
    const int64 column = static_cast<int64>(blockIdx.x) * LANES + lane;
    uint32 sum = 0;
    if (column < arguments.across) {
#pragma unroll 4
        for (int64 row = blockIdx.y * depth + threadIdx.x / LANES; row < arguments.rows; row += step) {
            sum += of(load_16(at(arguments.x, row * arguments.across + column)));
        }
    }
    give(sum, arguments.out);
}
""",
)  # fmt: skip
AHEAD = Kernel(
    "", "gl_probe_ahead", [("x", "const uint32*"), ("y", "uint32*"), ("vectors", "int64")],
    defines={"LOADS": (1, 2, 4, 8)}, listed=False,
    body=_ADD + """
// A copy with LOADS loads in flight per thread before the first store.
GL_KERNEL(gl_probe_ahead, 512) {
    const int64 step = static_cast<int64>(gridDim.x) * blockDim.x;
    int64 first = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; first < arguments.vectors; first += LOADS * step) {
        uint4 v[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int64 vector = first + i * step;
            v[i] = vector < arguments.vectors ? load_16(at(arguments.x, vector)) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int64 vector = first + i * step;
            if (vector < arguments.vectors) store_16(arguments.y + 4 * vector, v[i]);
        }
    }
}
""",
)  # fmt: skip
STAGES, STAGE_BYTES = 6, 32 * 1024
BULK = Kernel(
    "", "gl_probe_bulk", [("x", "const uint32*"), ("out", "uint32*"), ("pieces", "int64"), ("piece", "int64")],
    minimum_arch=90, listed=False,
    body=_ADD + """
__device__ __forceinline__ uint32 in_shared(const void* address) {
#ifdef GL_HOST
    return 0;
#else
    return static_cast<uint32>(__cvta_generic_to_shared(address));
#endif
}
__device__ __forceinline__ void prepare(uint64* barrier) {
#ifdef GL_HOST
    *barrier = 0;
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(in_shared(barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// One thread asks for a copy of `bytes`, a multiple of 16, from global to shared memory; the barrier tells its end.
__device__ __forceinline__ void copy_in(void* to, const void* from, uint32 bytes, uint64* barrier) {
#ifdef GL_HOST
    memcpy(to, from, bytes);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(in_shared(barrier)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(in_shared(to)), "l"(from), "r"(bytes), "r"(in_shared(barrier)) : "memory");
#endif
}
__device__ __forceinline__ void wait_for(uint64* barrier, uint32 parity) {
#ifndef GL_HOST
    uint32 done = 0;
    while (!done) {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(in_shared(barrier)), "r"(parity) : "memory");
    }
#endif
}
// Block b takes pieces b, b + blocks, ... through a ring of stages in shared memory. Copies and uses of a stage have a
// __syncthreads between them either way.
GL_KERNEL(gl_probe_bulk, 1024) {
    constexpr int32 stages = """ + str(STAGES) + """;
    GL_SHARED(uint64, barriers, [stages]);
    GL_DYNAMIC_SHARED(ring);
    const int64 blocks = gridDim.x, mine = (arguments.pieces - blockIdx.x + blocks - 1) / blocks;
    const uint32 bytes = static_cast<uint32>(arguments.piece) * 16u;
    auto ask = [&](int64 number) {
        const int64 piece = blockIdx.x + number * blocks;
        copy_in(ring + (number % stages) * bytes, at(arguments.x, piece * arguments.piece), bytes,
                &barriers[number % stages]);
    };
    if (threadIdx.x == 0) {
        for (int32 i = 0; i < stages; ++i) prepare(&barriers[i]);
        for (int64 i = 0; i < stages && i < mine; ++i) ask(i);
    }
    __syncthreads();
    uint32 sum = 0;
    for (int64 number = 0; number < mine; ++number) {
        wait_for(&barriers[number % stages], static_cast<uint32>(number / stages) & 1u);
        const uint4* const stage = reinterpret_cast<const uint4*>(ring + (number % stages) * bytes);
        for (int64 i = threadIdx.x; i < arguments.piece; i += blockDim.x) sum += of(stage[i]);
        __syncthreads();
        if (threadIdx.x == 0 && number + stages < mine) ask(number + stages);
    }
    give(sum, arguments.out);
}
""",
)  # fmt: skip
_WIDTH = """
__device__ __forceinline__ uint32 cluster_width() {
#ifdef GL_HOST
    return CLUSTER;
#else
    uint32 width;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(width));
    return width;
#endif
}
"""
ALIVE = Kernel(
    "", "gl_probe_alive", [("alive", "uint32*"), ("most", "uint32*"), ("rounds", "int64"), ("widths", "uint32*")],
    defines={"CLUSTER": (1, 8)}, minimum_arch=90, listed=False,
    body=_WIDTH + """
// Counts the blocks that run at the same time, and writes how wide a cluster each of them sees.
GL_KERNEL(gl_probe_alive, 256) {
    if (threadIdx.x != 0) return;
    atomicMax(arguments.most, atomicAdd(arguments.alive, 1u) + 1u);
    for (int64 round = 0; round < arguments.rounds; ++round) {
        pause_thread(1000);
        atomicMax(arguments.most, load_relaxed(arguments.alive));
    }
    atomicAdd(arguments.alive, 0xffffffffu);
    arguments.widths[blockIdx.x] = cluster_width();
}
""",
)  # fmt: skip
KERNELS = (SWEEP, SLAB, AHEAD, BULK, ALIVE)


def _words(like: Any, count: int) -> Any:
    return array_module(like).zeros(count, dtype=np.uint32)


def sweep(x: Any, y: Any, out: Any, blocks: int, reverse: bool, stream: bool) -> None:
    """Read x once, and copy it to `y` unless that is None."""
    values = {"x": x, "y": y, "out": out, "vectors": x.size // 4, "reverse": int(reverse)}
    SWEEP.launch(values, grid=(blocks,), block=(THREADS,), defines={"STREAM": stream})


def slab(x: Any, out: Any, lanes: int, splits: int) -> None:
    """Read a matrix (rows, words) in slabs of `lanes` 16-byte vectors."""
    across = x.shape[1] // 4
    values = {"x": x, "out": out, "rows": x.shape[0], "across": across}
    SLAB.launch(values, grid=(-(-across // lanes), splits), block=(THREADS,), defines={"LANES": lanes})


def ahead(x: Any, y: Any, loads: int, blocks: int) -> None:
    """Copy x to y with `loads` loads in flight per thread."""
    values = {"x": x, "y": y, "vectors": x.size // 4}
    AHEAD.launch(values, grid=(blocks,), block=(THREADS,), defines={"LOADS": loads})


def bulk(x: Any, out: Any, blocks: int, threads: int, stage_bytes: int = STAGE_BYTES) -> None:
    """Read x, a whole number of stages, by bulk copies into shared memory."""
    values = {"x": x, "out": out, "pieces": x.nbytes // stage_bytes, "piece": stage_bytes // 16}
    BULK.launch(values, grid=(blocks,), block=(threads,), shared=STAGES * stage_bytes)


def alive(like: Any, blocks: int, cluster: int, shared: int, rounds: int) -> tuple[int, list[int]]:
    """Return how many blocks were seen at the same time, and the cluster widths that blocks saw."""
    found, widths = _words(like, 2), _words(like, blocks)
    values = {"alive": found[:1], "most": found[1:], "rounds": rounds, "widths": widths}
    ALIVE.launch(values, grid=(blocks,), block=(256,), shared=shared, defines={"CLUSTER": cluster})
    return int(found.get()[1]), sorted(set(widths.get().tolist()))


# --- the questions ----------------------------------------------------------------------------------------------------

Elapsed = Callable[[Callable[[], Any]], float]


def _two_sweeps(x: Any, y: Any, out: Any, blocks: int, reverse: bool, stream: bool) -> None:
    sweep(x, None, out, blocks, False, False)
    sweep(x, y, out, blocks, reverse, stream)


def sweep_order(elapsed: Elapsed, megabytes: tuple[int, ...] = (20, 40, 60, 100, 200)) -> dict[str, Any]:
    """Ask whether the second sweep should run backwards, and its results be streamed, by the size of the tensor."""
    found, best = {}, []
    for size in megabytes:
        x = _cupy.cupy().ones(size << 18, dtype="uint32")
        y, out, blocks = _cupy.cupy().empty_like(x), _words(x, 1), 4 * device_properties(x).multiprocessors
        speeds = {}
        for reverse in (False, True):
            for stream in (False, True):
                name = f"{'backwards' if reverse else 'forwards'}, y {'streamed' if stream else 'kept'}"
                run = functools.partial(_two_sweeps, x, y, out, blocks, reverse, stream)
                speeds[name] = 3 * x.nbytes / elapsed(run) / 1e3
        found |= {f"GB/s: two sweeps of {size} MiB, second {name}": speed for name, speed in speeds.items()}
        best.append(f"{size} MiB {max(speeds, key=speeds.__getitem__)}")
    return found | {"answer: fastest second sweep": "; ".join(best)}


def slab_width(elapsed: Elapsed, rows: int = 1 << 17, words: int = 512) -> dict[str, Any]:
    """Ask how wide a slab of channels a block should read where channels are last."""
    x = _cupy.cupy().ones((rows, words), dtype="uint32")
    out, processors, speeds = _words(x, 1), device_properties(x).multiprocessors, {}
    for lanes in (4, 8, 16, 32):
        splits = max(1, 4 * processors // -(-words // 4 // lanes))
        speeds[16 * lanes] = x.nbytes / elapsed(lambda n=lanes, s=splits: slab(x, out, n, s)) / 1e3
    widest = max(speeds.values())
    answer = ", ".join(f"{width} B {speed / widest:.0%}" for width, speed in speeds.items())
    figures = {f"GB/s: slabs of {width} bytes": speed for width, speed in speeds.items()}
    return figures | {"answer: slab widths against the best": answer}


def bulk_copies(elapsed: Elapsed, megabytes: int = 192) -> dict[str, Any]:
    """Ask whether bulk copies into shared memory read faster than 16-byte loads, at one block per multiprocessor."""
    x = _cupy.cupy().ones(megabytes << 18, dtype="uint32")
    out, blocks, found = _words(x, 1), device_properties(x).multiprocessors, {}
    found["16-byte loads, 512 threads"] = x.nbytes / elapsed(lambda: sweep(x, None, out, blocks, False, False)) / 1e3
    found["16-byte loads, 4 x 512 threads"] = (
        x.nbytes / elapsed(lambda: sweep(x, None, out, 4 * blocks, False, False)) / 1e3
    )
    for threads in (512, 1024):
        found[f"bulk copies, {threads} threads"] = x.nbytes / elapsed(lambda t=threads: bulk(x, out, blocks, t)) / 1e3
    figures = {f"GB/s: {name}": speed for name, speed in found.items()}
    return figures | {"answer: fastest reads of a stream": max(found, key=found.__getitem__)}


def loads_ahead(elapsed: Elapsed, megabytes: int = 200) -> dict[str, Any]:
    """Ask how many loads a thread should have in flight, by the number of blocks per multiprocessor."""
    x = _cupy.cupy().ones(megabytes << 18, dtype="uint32")
    y, processors, speeds = _cupy.cupy().empty_like(x), device_properties(x).multiprocessors, {}
    for per_processor in (1, 2, 4):
        for loads in (1, 2, 4, 8):
            run = lambda n=loads, b=per_processor * processors: ahead(x, y, n, b)
            speeds[f"{loads} loads ahead, {per_processor} blocks of {THREADS}"] = 2 * x.nbytes / elapsed(run) / 1e3
    figures = {f"GB/s: copy with {name}": speed for name, speed in speeds.items()}
    return figures | {"answer: fastest copy": max(speeds, key=speeds.__getitem__)}


class _LaunchAttribute(ctypes.Structure):
    """``CUlaunchAttribute``: its number, and a union of 64 bytes; the sizes of a cluster are its first three words."""

    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_LaunchAttribute)), ("count", ctypes.c_uint),
    ]  # fmt: skip


CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
REQUIRED_WIDTH, REQUIRED_HEIGHT, REQUIRED_DEPTH = 11, 12, 13  # CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_...


def active_clusters(function: int, width: int, threads: int, shared: int, library: str = "libcuda.so.1") -> int:
    """Return how many clusters of `width` blocks the driver says can run at a time; CuPy has no name for the question.

    Raises RuntimeError with the driver's number for an error.
    """
    attribute = _LaunchAttribute(CLUSTER_DIMENSION, 0, (width, 1, 1))
    config = _LaunchConfig((width, 1, 1), (threads, 1, 1), shared, None, ctypes.pointer(attribute), 1)
    most, ask = ctypes.c_int(), ctypes.CDLL(library).cuOccupancyMaxActiveClusters
    if status := ask(ctypes.byref(most), ctypes.c_void_p(function), ctypes.byref(config)):
        raise RuntimeError(f"cuOccupancyMaxActiveClusters says {status}")
    return most.value


def _function(like: Any, cluster: int) -> int:
    """Return the driver's handle of the kernel that counts blocks, compiled for clusters of this width."""
    return int(launcher_of(like)._function(ALIVE.specialise({"CLUSTER": cluster}), 0).ptr)  # type: ignore[attr-defined]


def _refused(error: Exception) -> str:
    return f"refused ({type(error).__name__}: {' '.join(str(error).split())[:120]})"


def clusters(elapsed: Elapsed) -> dict[str, Any]:
    """Ask how many clusters of 8 run at a time, seen and by the driver's word, and whether their width can be set."""
    like = _cupy.cupy().empty(1, dtype="uint32")
    properties = device_properties(like)
    if not properties.has_clusters:
        return {"answer: clusters": "this GPU has none"}
    blocks, found, placed = 8 * (2 * properties.multiprocessors // 8), {}, []
    for kilobytes in (100, 120, 225):
        shared = min(kilobytes << 10, properties.shared_per_block - 1024)
        most, _ = alive(like, blocks, 8, shared, 200)  # which also lets the kernel have so much
        found[f"clusters of 8 with {kilobytes} KiB each, seen at a time"] = most / 8
        try:
            _cupy.cupy().cuda.driver.funcSetAttribute(_function(like, 8), DYNAMIC_SHARED, shared)
            placed.append(f"{active_clusters(_function(like, 8), 8, 256, shared)} with {kilobytes} KiB")
        except Exception as error:  # drivers refuse with types of their own
            placed.append(f"{kilobytes} KiB: {_refused(error)}")
    try:  # the attributes stay with the function, which nothing else uses; CUDA wants all three of them
        for attribute, size in ((REQUIRED_WIDTH, 4), (REQUIRED_HEIGHT, 1), (REQUIRED_DEPTH, 1)):
            _cupy.cupy().cuda.driver.funcSetAttribute(_function(like, 1), attribute, size)
        _, widths = alive(like, 64, 1, 0, 1)
        text = f"set to 4, blocks saw {widths}"
    except Exception as error:
        text = _refused(error)
    found["clusters of 8, by the driver"] = "; ".join(placed)
    return found | {"answer: cluster width at run time": text}


def _neighbours(plan: Any) -> Iterator[tuple[str, Any]]:
    """Yield plans of the same regime as `plan` that compute the same."""
    name = plan.regime
    if name == "sweeps":
        for factor in (2, 4):
            yield f"{name}, {factor} x splits", plan._replace(splits=plan.splits * factor)
    if name in ("sweeps", "grid") and plan.splits > 1:
        yield f"{name}, half the splits", plan._replace(splits=plan.splits // 2)
    if name == "grid" and plan.kept_units > 1:  # the rest is read again
        kept = plan.kept_units // 2
        yield f"{name}, half as much in shared memory", plan._replace(
            kept_units=kept, shared=plan.shared // plan.kept_units * kept
        )


def _plans(shape: tuple[int, ...], axis: int, x: Any, kept: int) -> dict[str, Any]:
    """Return plans that compute the same, by name: of every regime that the device has, and their neighbours.

    Only `batch_norm.plan.choose` is asked, for a device with and without clusters, with and without grids that wait.
    """
    layout, device = collapse(shape, (axis,)), device_properties(x)
    choose = functools.partial(batch_norm_plan.choose, layout, x.dtype.itemsize, 16, kept=kept)
    without_clusters = device._replace(compute_capability=80)
    others = [choose(without_clusters), choose(without_clusters, grid=False), choose(device, one_launch=False)]
    chosen = choose(device)
    found: dict[str, Any] = {f"as chosen ({chosen.regime})": chosen}
    for plan in [chosen, *others]:
        for name, one in [(plan.regime, plan), *_neighbours(plan)]:
            if one not in found.values():
                found.setdefault(name, one)
    return found


# By layout: the axis of the channels, and shapes. Two are asked because cluster, grid and sweeps are close for them.
SHAPES = (
    (3, (32, 56, 56, 64)), (3, (32, 28, 28, 512)), (3, (32, 14, 14, 256)), (3, (32, 7, 7, 2048)),
    (3, (32, 14, 14, 1024)), (1, (256, 1024, 14, 14)),
)  # fmt: skip


def forced_plans(elapsed: Elapsed, shapes: tuple[tuple[int, tuple[int, ...]], ...] = SHAPES) -> dict[str, Any]:
    """Ask whether the plan that is chosen for batch normalisation is the fastest of its neighbours, in both passes."""
    cupy, found, answers = _cupy.cupy(), {}, []
    for axis, shape in shapes:
        x = cupy.ones(shape, dtype="float16")
        gamma, beta, mean, variance = (cupy.ones(shape[axis], dtype="float32") for _ in range(4))
        moving = MovingStatistics(mean, variance, 0.01)
        forward = functools.partial(
            batch_norm_arrays.forward, x, gamma, beta, moving=moving, axis=(axis,), epsilon=1e-3
        )
        backward = functools.partial(batch_norm_arrays.backward, x, x, gamma, forward().saved, axis=(axis,))
        for kept, (mode, run) in enumerate((("forward", forward), ("backward", backward)), start=1):
            size, times = f"{mode} {'x'.join(map(str, shape))}", {}
            for name, plan in _plans(shape, axis, x, kept).items():
                try:
                    with batch_norm_plan.forcing(lambda _, plan=plan: plan):
                        times[name] = elapsed(run)
                except Exception as error:  # a plan that this device cannot run: the others are asked all the same
                    found[f"{size}, {name}"] = _refused(error)
            found |= {f"device us: {size}, {name}": time for name, time in times.items()}
            best = min(times, key=times.__getitem__, default="none runs")
            if not best.startswith("as chosen"):
                answers.append(f"{size} {best}")
    return found | {"answer: faster than the chosen plans": "; ".join(answers) or "none"}


MEASURES = (sweep_order, slab_width, bulk_copies, loads_ahead, clusters, forced_plans)
