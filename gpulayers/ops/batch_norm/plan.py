"""How the batch normalisation kernels work on a layout: what threads move, the regime, the block and the grid.

`choose` is one function of shape, dtype size, alignment and device; `plan_table` prints what it chooses.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from gpulayers.ops.batch_norm.layout import Layout, collapse

__all__ = ["Access", "Plan", "access", "choose", "forcing", "plan_table", "static_shared"]

SMALL_BYTES = 64 * 1024  # a slab of this size is summed and normalised by one block before the caches forget it
SMALL_ACCESSES = 64  # of a thread: a slab's by 4 bytes; more of them, narrower, only where no multiprocessor is idle
SMALL_GROUPS = 16  # one block takes the groups one after another
CLUSTER = 8  # the largest cluster that every device with clusters can place
# Clusters lie inside a processing cluster, and those are not equally large: on 132 multiprocessors there is room for 15
# clusters of 8 at least.
CLUSTER_PLACES = 15, 132
CLUSTER_WAVES = 3  # more of them wait more for each other than for memory, unless their blocks hold much
THREADS = 256
LANES_WIDE, LANES_NARROW = 16, 4  # 256 and 64 bytes of a row with 16-byte accesses
LANES_FOLDED = 64  # the most that the columns of a channel may take where they are folded
SHORT_BYTES = 64  # channels whose rows are shorter share the sectors and lines of memory with their neighbours
AHEAD = 4  # accesses in flight per thread at least, as in batch_norm_passes.cuh
BUSY, BUSY_SMALL = 0.5, 0.45  # share of the multiprocessors that clusters keep busy; small parts save a launch
RESIDENT = 3  # blocks that a multiprocessor holds at least in the sweeps: the launch bounds in batch_norm.cu
GRID_RESIDENT = 2  # the same of the one-launch kernels: clusters, and the grid that waits for itself
GRID_REGISTERS = {1: 4, 2: 1}  # units that its threads keep in registers, by `kept`: as in batch_norm_grid.cuh
GRID_BUSY = 0.6  # share of those blocks that it keeps busy
GRID_SHARE = 0.25  # share of the input that it keeps on chip: with less, full multiprocessors count for more
GRID_L2 = 32  # an input of a smaller part of the L2 cache is read from there a second time
BLOCK_SHARED = 1024  # what CUDA takes for itself from the shared memory of each block


class Access(NamedTuple):
    """How threads move the elements of a layout.

    `packet`: neighbours that are moved at once, 16 bytes or a smaller power of two. `channels_last`: a thread has the
    same `packet` columns of all its rows, else it has one channel. `folded`: several columns of a row make a channel.
    `ragged`: a channel's rows begin and end inside packets, and what those have of other rows is passed over.
    """

    packet: int
    channels_last: bool
    folded: bool
    ragged: bool

    def units_of_row(self, inner: int) -> int:
        """Return how many accesses of a thread a row takes: `inner` elements, or (channels last) what it has of it.

        That is the most which a ragged row can touch, wherever it begins.
        """
        if self.channels_last:
            return 1
        return (inner + 2 * self.packet - 2) // self.packet if self.ragged else inner // self.packet

    def leaves_bits(self, itemsize: int) -> bool:
        """Say whether a forward pass leaves the bits of a ReLU: the 16 bytes behind each byte are one thread's."""
        return self.packet * itemsize == 16 and not self.ragged


def access(layout: Layout, itemsize: int, alignment: int = 16) -> Access:
    """Choose the widest packets that a layout and addresses that are multiples of `alignment` bytes allow.

    Packets of one channel end with its row, so `inner` is a multiple of them. Where that leaves less than 8 bytes, or
    rows so short that neighbouring channels share the lines of memory, the row of all channels is read 16 bytes at a
    time instead, if its length allows that: a packet's columns then belong to more than one channel, and the columns of
    each channel are summed apart and folded. A block holds whole channels, the first of which begins with a packet; it
    has the threads for that if their columns are at most 64 packets.

    Other rows that leave less than 8 bytes are ragged where that takes less than half as many accesses: every packet of
    16 bytes that a row touches is read, and at its ends the elements of the neighbouring rows are passed over. All
    packets are there if the array ends with one.

    >>> for inner in (3136, 289, 196, 49, 14, 5, 1):
    ...     layout = Layout(32, 1, 1, 512, inner)
    ...     print(inner, *(access(layout, size)[0] for size in (2, 4)), access(layout, 2)[1:])
    3136 8 4 (False, False, False)
    289 8 4 (False, False, True)
    196 4 4 (False, False, False)
    49 8 4 (True, True, False)
    14 8 4 (True, True, False)
    5 8 4 (True, True, False)
    1 8 4 (True, False, False)
    """
    most = max(1, min(16, alignment) // itemsize)
    if layout.inner == 1:
        return Access(math.gcd(layout.channels, most), True, False, False)
    packet = math.gcd(layout.inner, most)
    rows = Access(packet, False, False, False)
    if most * itemsize < 16:
        return rows
    narrow = packet * itemsize < 8
    whole_rows = layout.channels * layout.inner % most == 0 and layout.inner // packet <= LANES_FOLDED
    if whole_rows and (narrow or layout.inner * itemsize < SHORT_BYTES):
        return Access(most, True, True, False)
    ragged = Access(most, False, False, True)
    fewer = 2 * ragged.units_of_row(layout.inner) < rows.units_of_row(layout.inner)
    return ragged if narrow and fewer and layout.size % most == 0 else rows


class Plan(NamedTuple):
    """How kernels work on a layout.

    `regime`: ``"small"`` (one launch, one block per slab), ``"cluster"`` (one launch, a cluster per slab, the input
    kept in shared memory), ``"grid"`` (one cooperative launch of resident blocks that keep what they can of the input)
    or ``"sweeps"`` (two launches). `access`: what threads move. `lanes`, `depth`: the block. `slabs`: slabs of
    `slab_channels` channels. `splits`: blocks per slab and group. `shared`: dynamic shared memory in bytes.
    `kept_units`: accesses per thread that a grid keeps there. `on_chip`: the share of the input that the second pass
    finds on chip; a small slab is read again, from the caches.
    """

    regime: str
    access: Access
    lanes: int
    depth: int
    slabs: int
    slab_channels: int
    splits: int
    shared: int
    kept_units: int = 0
    on_chip: float = 0.0


def choose(
    layout: Layout,
    itemsize: int,
    alignment: int,
    device: Any,
    kept: int = 1,
    one_launch: bool = True,
    grid: bool = True,
) -> Plan:
    """Choose the regime, the block and the grid: a function of shape, dtype size, alignment and device alone.

    Parameters: `alignment`, a number of bytes, at most 16, that all addresses are multiples of; `device`, a
    `gpulayers.launch.DeviceProperties`; `kept`, arrays that a cluster or grid would keep (1 forward, 2 backward);
    `one_launch`, whether the operation has two sweeps at all (inference has one, and then nothing is gained by doing
    them in one launch); `grid`, whether all blocks of a grid can be resident, which the compiled kernel decides.

    >>> from gpulayers.launch import DeviceProperties
    >>> h200 = DeviceProperties("H200", 90, 132, 232448, 233472, 65536, 2048, 1024, 50 * 2**20)
    >>> for shape, axis in [((256, 64), 1), ((32, 14, 14, 1024), 3), ((32, 56, 56, 64), 3), ((32, 64, 56, 56), 1)]:
    ...     p = choose(collapse(shape, (axis,)), 2, 16, h200)
    ...     print(p.regime, p.lanes, p.depth, p.slabs, p.splits)
    small 4 64 2 1
    cluster 8 32 16 8
    grid 4 64 2 132
    grid 1 256 64 4
    """
    plan = _choose(layout, itemsize, alignment, device, kept, one_launch, grid)
    return plan if forced is None else forced(plan)


forced: Callable[[Plan], Plan] | None = None  # see `forcing`


@contextlib.contextmanager
def forcing(change: Callable[[Plan], Plan]) -> Iterator[None]:
    """Let ``change(plan)`` replace every plan that is chosen inside the block: for benchmarks, and for nothing else.

    What it returns must compute the same; nothing checks that. It holds in all threads.
    """
    global forced
    outer, forced = forced, change
    try:
        yield
    finally:
        forced = outer


@functools.lru_cache(maxsize=4096)
def _choose(
    layout: Layout, itemsize: int, alignment: int, device: Any, kept: int, one_launch: bool, grid: bool
) -> Plan:
    how = access(layout, itemsize, alignment)
    static = static_shared(itemsize, how)
    for lanes_limit in (LANES_NARROW, LANES_WIDE // 2, LANES_WIDE):
        lanes, depth, slabs, slab_channels, units = _block(layout, itemsize, how, lanes_limit)
        if one_launch and _one_block_pays(layout, itemsize, slabs, slab_channels, -(-units // depth), device):
            return Plan("small", how, lanes, depth, slabs, slab_channels, 1, 0)
        per_thread = -(-(-(-units // CLUSTER) + 1) // depth)
        shared = per_thread * lanes * depth * how.packet * itemsize * kept
        wide_enough = not how.channels_last or lanes_limit > LANES_NARROW
        possible = one_launch and device.has_clusters and layout.groups == 1 and wide_enough
        if possible and _clusters_pay(slabs, shared, static, device):
            return Plan("cluster", how, lanes, depth, slabs, slab_channels, CLUSTER, shared, 0, 1.0)
    # After all others have ended, one block merges what the splits of a slab leave. A narrow slab has fewer channels
    # and (as there are more slabs) fewer splits; where rows are short it still reads whole neighbourhoods of memory.
    short = layout.channels * (layout.inner if how.folded else 1) <= LANES_WIDE * how.packet
    lanes_limit = (LANES_NARROW if short else LANES_WIDE // 2) if how.packet > 1 else LANES_WIDE
    lanes, depth, slabs, slab_channels, units = _block(layout, itemsize, how, lanes_limit)
    if one_launch and grid and device.cooperative_launch:
        row_bytes = lanes * how.packet * itemsize
        splits, kept_units, shared, on_chip = _grid(layout, slabs, units, depth, row_bytes, static, device, kept)
        if on_chip >= GRID_SHARE and layout.size * itemsize * GRID_L2 >= device.l2_bytes:
            return Plan("grid", how, lanes, depth, slabs, slab_channels, splits, shared, kept_units, on_chip)
    splits = _splits(slabs * layout.groups, RESIDENT * device.multiprocessors, -(-units // (depth * AHEAD)))
    return Plan("sweeps", how, lanes, depth, slabs, slab_channels, splits, 0)


def static_shared(itemsize: int, how: Access) -> int:
    """Return an upper bound of what the kernels use beside their copies, in bytes.

    >>> static_shared(2, Access(8, True, False, False)), static_shared(2, Access(8, True, True, False))
    (8960, 17664)
    >>> static_shared(4, Access(4, False, False, False))
    4352
    """
    accumulated, held = 8 if itemsize == 8 else 4, how.packet if how.channels_last else 1
    # Threads that still have sums of their own after a warp's shuffles.
    merged = THREADS // 2 if held > 1 and not how.folded else THREADS
    return max(accumulated * (2 * held + 1) * merged, 16 * THREADS) + 256


def _one_block_pays(layout: Layout, itemsize: int, slabs: int, slab_channels: int, accesses: int, device: Any) -> bool:
    """Say whether a slab is so small that one block should do all of it; `accesses` are a thread's per group."""
    if layout.groups > SMALL_GROUPS or layout.samples * layout.groups * slab_channels * itemsize > SMALL_BYTES:
        return False
    return accesses * layout.groups <= SMALL_ACCESSES or slabs >= device.multiprocessors


def _clusters_pay(slabs: int, shared: int, static: int, device: Any) -> bool:
    """Say whether a cluster for each of `slabs` fits the device, keeps it busy, and ends in a wave that is full enough.

    One wave may be half empty, as the whole input is then on its way at once; of several the last counts.
    """
    block = shared + static + BLOCK_SHARED
    if shared + static > device.shared_per_block:
        return False
    of_multiprocessor = min(GRID_RESIDENT, device.shared_per_multiprocessor // block)
    places = of_multiprocessor * (CLUSTER_PLACES[0] * device.multiprocessors // CLUSTER_PLACES[1])
    if slabs <= places:
        return slabs * CLUSTER >= (BUSY if shared > SMALL_BYTES else BUSY_SMALL) * device.multiprocessors
    waves = -(-slabs // max(1, places))
    return places > 0 and _full(slabs, places) and (waves <= CLUSTER_WAVES or shared >= SMALL_BYTES)


def _full(blocks: int, resident: int) -> bool:
    """Say whether waves of `resident` blocks are nine tenths full."""
    return 10 * blocks >= 9 * resident * -(-blocks // resident)


def _grid(
    layout: Layout, slabs: int, units: int, depth: int, row_bytes: int, static: int, device: Any, kept: int
) -> tuple[int, int, int, float]:
    """Return splits, units per thread in shared memory, its bytes, and the share of the input that stays on chip.

    `units` are a slab's, `row_bytes` those that the block's lanes move at once, `static` the block's other shared
    memory. The share is 0 where the slabs and groups do not leave enough of the resident blocks busy.
    """
    resident, count = GRID_RESIDENT * device.multiprocessors, slabs * layout.groups
    splits = min(resident // count, -(-units // depth))
    if count * splits < GRID_BUSY * resident:
        return 0, 0, 0, 0.0
    step = depth * row_bytes * kept
    per_block = device.shared_per_multiprocessor // GRID_RESIDENT - BLOCK_SHARED
    room = (min(per_block, device.shared_per_block) - static) // step
    longest = -(-units // splits)
    per_thread, registers = -(-longest // depth), GRID_REGISTERS[kept]
    kept_units = max(0, min(room, per_thread - registers))
    return splits, kept_units, kept_units * step, min(1.0, (registers + kept_units) * depth * splits / units)


def _splits(count: int, resident: int, most: int) -> int:
    """Return how many blocks, at most `most`, work on each of `count` slabs, so that waves of `resident` are full.

    One wave if it can be nine tenths full, else the first number of splits that fills the last wave so, up to eight. If
    none does, the first that fills its waves best: what a block does before its first access is done by fewer of them.

    >>> _splits(2, 396, 1000), _splits(256, 396, 1000), _splits(1024, 396, 2), _splits(512, 396, 2)
    (198, 3, 1, 2)
    """
    least = min(most, max(1, resident // count))
    options = range(least, min(most, max(least, 8 * resident // count)) + 1)
    full = (splits for splits in options if _full(splits * count, resident))
    return next(full, None) or max(options, key=lambda splits: splits * count / -(-splits * count // resident))


def _block(layout: Layout, itemsize: int, how: Access, lanes_limit: int) -> tuple[int, int, int, int, int]:
    """Return lanes, depth, slabs, the channels of a slab and its units, for lanes of `lanes_limit` 16-byte accesses.

    Narrower accesses take more lanes, single elements twice as many; folded columns as many as a whole number of
    channels needs that ends with a packet.
    """
    lanes = slab_channels = 1
    units = layout.samples // layout.inner * how.units_of_row(layout.inner)
    if how.folded:
        common = math.gcd(layout.inner, how.packet)
        packets, slab_channels = layout.inner // common, how.packet // common
        while 2 * packets <= lanes_limit and slab_channels < layout.channels:
            packets, slab_channels = 2 * packets, 2 * slab_channels
        lanes = _power_of_two(packets)
    elif how.channels_last:
        most = min(LANES_WIDE, lanes_limit * 16 // (how.packet * itemsize)) if how.packet > 1 else 2 * lanes_limit
        lanes = min(most, _power_of_two(-(-layout.channels // how.packet)))
        slab_channels = lanes * how.packet
    least = max(1, 32 // lanes, slab_channels // lanes)
    depth = max(least, min(THREADS // lanes, _power_of_two(units)))
    return lanes, depth, -(-layout.channels // slab_channels), slab_channels, units


def _power_of_two(value: int) -> int:
    """Return the smallest power of two that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()


def _share(plan: Plan) -> str:
    return f", {plan.on_chip:.0%} on chip" if plan.on_chip else ""


def plan_table(cases: list[tuple[tuple[int, ...], tuple[int, ...], int]], itemsize: int, device: Any) -> str:
    """Return the plans of (shape, axis, groups) cases as a table, forward and backward: for reports and for tests."""
    lines = ["shape, axis, groups | forward | backward"]
    for shape, axis, groups in cases:
        layout = collapse(shape, axis, groups)
        plans = [choose(layout, itemsize, 16, device, kept) for kept in (1, 2)]
        texts = [f"{p.regime} {p.slabs}x{p.splits} blocks of {p.lanes}x{p.depth}{_share(p)}" for p in plans]
        lines.append(" | ".join([f"{shape}, {axis}, {groups}", *texts]))
    return "\n".join(lines)
