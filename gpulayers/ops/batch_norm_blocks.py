"""Cutting an array into blocks that stay in a core's cache, and running them on a small thread pool.

A block is 256 KB, or half of that in a sweep with many operands: large enough that two threads seldom meet at the
interpreter lock, small enough that a chain of NumPy calls on it costs one trip to memory. Which blocks there are, and
which of them are summed together, depends on the shape alone, never on the number of threads: results are the same
bits on any machine with the same NumPy.

No call made inside a task may start threads of its own: sums use ufuncs and ``vecdot`` on rows too short for a
threaded BLAS.
"""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from gpulayers.ops.batch_norm_plan import Layout

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["ELEMENTS", "Block", "Operand", "View", "block_rows", "run_tasks", "view_of"]

ELEMENTS = 256 * 1024 // 4  # of a block
TABLE = 64 * 1024 // 4  # elements of one row of a block with several rows channels first: its tables stay in the cache
LINE = 16  # slots: a multiple of it begins on a cache line, whatever `inner` is
WIDE = 2048  # elements of a wide row: enough that a ufunc's inner loop hides its start
NARROW_INNER = 64  # below this, channels-first rows are too short for a loop of their own
THREADED_BYTES = 1 << 20  # below this, waking a thread costs more than it saves
THREADS = 4  # at most, the calling one included
TASKS = 8  # enough that threads finish together when one is held up

Result = TypeVar("Result")


class Block(NamedTuple):
    """Rows `first` to `last` of one segment, statistics `left` to `right`; `rest`: of the rows that fill no tile."""

    segment: int
    rest: bool
    first: int
    last: int
    left: int
    right: int


class View(NamedTuple):
    """An input as ``[segments, length, slots, inner]``; segment q uses row ``q % tables`` of the tables of statistics.

    `columns`: the blocks are treated as rows of ``slots * inner`` columns, `tile` of them laid side by side as far as
    they go. A block has about `elements`.
    """

    segments: int
    length: int
    tables: int
    slots: int
    inner: int
    columns: bool
    tile: int
    elements: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape to view arrays in."""
        return self.segments, self.length, self.slots, self.inner

    @property
    def even(self) -> int:
        """The number of rows that fill whole tiles."""
        return self.length - self.length % self.tile


class Operand:
    """An array seen through a view, to be cut into blocks: (rows, columns), or channels first (rows, slots, inner)."""

    def __init__(self, view: View, array: Any) -> None:
        self.columns = view.columns
        self.main = self.rest = array.reshape(view.shape)
        if view.columns:
            width, even = view.slots * view.inner, view.even
            self.rest = self.main[:, even:].reshape(view.segments, view.length - even, width)
            self.main = self.main[:, :even].reshape(view.segments, even // view.tile, view.tile * width)

    def cut(self, block: Block) -> Any:
        """Return the block as a view of the array."""
        segment, rest, first, last, left, right = block
        if self.columns:
            return (self.rest if rest else self.main)[segment, first:last]
        return self.main[segment, first:last, left:right]


@functools.lru_cache(maxsize=4096)
def view_of(layout: Layout, elements: int = ELEMENTS) -> View:
    """Choose the view for a layout: sub-batches are extra channels where the memory allows, else many segments."""
    rows, groups, spread, channels, inner = layout[:5]
    if spread == 1:
        segments, length, tables, slots = 1, rows, 1, groups * channels
    else:
        segments, length, tables, slots = rows * groups, spread, groups, channels
    columns = inner == 1 or (inner < NARROW_INNER and slots * inner <= 8 * WIDE)
    tile = 1
    if columns:
        while tile * 2 * slots * inner <= WIDE and tile * 2 <= length:
            tile *= 2
    return View(segments, length, tables, slots, inner, columns, tile, elements)


@functools.lru_cache(maxsize=256)
def tasks_of(view: View) -> tuple[tuple[Block, ...], ...]:
    """Return the blocks, dealt in order to at most `TASKS` tasks."""
    blocks = tuple(_blocks(view))
    count = min(TASKS, len(blocks))
    return tuple(blocks[len(blocks) * i // count : len(blocks) * (i + 1) // count] for i in range(count))


def _block_slots(view: View) -> int:
    """Return how many slots a block spans: all, or, channels first, as many as keep the tables in the cache."""
    if view.columns or view.slots * view.inner <= TABLE:
        return view.slots
    slots = max(1, TABLE // view.inner)
    return slots - slots % LINE if slots > LINE else slots


def block_rows(view: View) -> int:
    """Return how many rows a block has at most, tiles counting as rows."""
    return max(1, min(view.elements // (_block_slots(view) * view.inner), view.length) // view.tile)


def _blocks(view: View) -> Iterator[Block]:
    slots_at_once, rows_at_once = _block_slots(view), block_rows(view)
    parts = ((False, view.even // view.tile), (True, view.length - view.even))
    for segment in range(view.segments):
        for rest, rows in parts:
            for left in range(0, view.slots, slots_at_once):
                right = min(left + slots_at_once, view.slots)
                for first in range(0, rows, rows_at_once):
                    yield Block(segment, rest, first, min(first + rows_at_once, rows), left, right)


@functools.cache
def _pool() -> tuple[ThreadPoolExecutor, int] | None:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if available < 2:
        return None
    from concurrent.futures import ThreadPoolExecutor  # a tenth of the package's import time, for large arrays only

    workers = min(available, THREADS) - 1
    return ThreadPoolExecutor(workers, thread_name_prefix="gpulayers"), workers


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has no threads


def run_tasks(
    work: Callable[[tuple[Block, ...]], Result], view: View, itemsize: int, backwards: bool = False
) -> list[Result]:
    """Call `work` on every task's blocks and return the results in order; on threads where the array is large.

    The threads take the next task when they are done with one. `backwards`: from the last block to the first.
    """
    tasks = tasks_of(view)
    results: list[Any] = [None] * len(tasks)
    waiting = collections.deque(range(len(tasks)))
    take = waiting.pop if backwards else waiting.popleft

    def work_off() -> None:
        with np.errstate(all="ignore"):  # NumPy keeps this per thread; infinities and NaN pass through silently
            while True:
                try:
                    index = take()
                except IndexError:
                    return
                results[index] = work(tasks[index][::-1] if backwards else tasks[index])

    size = view.segments * view.length * view.slots * view.inner * itemsize
    pool = _pool() if size >= THREADED_BYTES and len(tasks) > 1 else None
    futures = [] if pool is None else [pool[0].submit(work_off) for _ in range(pool[1])]
    work_off()
    for future in futures:
        if not future.cancel():  # one that has not begun would find nothing to do
            future.result()
    return results
