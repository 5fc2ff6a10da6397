"""Cutting an array into blocks that stay in a core's cache.

A block is two megabytes, and four where it is only read: large enough that the calls on it last some 100 us and two
threads seldom meet at the interpreter lock (``host.threads``), small enough that most of a chain of NumPy calls on it
costs one trip to memory. Which blocks there are, and which of them are summed together, depends on the shape alone,
never on the number of threads: results are the same bits on any machine with the same NumPy.

No call made inside a task may start threads of its own: sums use ufuncs and ``vecdot`` on rows too short for a
threaded BLAS.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from gpulayers.ops.batch_norm.layout import Layout

__all__ = [
    "LONG_ROW",
    "Block",
    "View",
    "blocks_of",
    "parts_of",
    "series_of",
    "table_parts_of",
    "threaded",
    "view_of",
]

ELEMENTS = 2 * 1024 * 1024 // 4  # of a block
ELEMENTS_READ = 2 * ELEMENTS  # of a block that is only read
FOLDED = 64 * 1024  # elements of a row with all sub-batches and their places: more make good blocks by themselves
WIDE = 2048  # elements of a wide row: enough to hide a loop's start, and a row of sums stays in the first-level cache
NARROW_INNER = 64  # below this, channels-first rows are too short for a loop of their own
LONG_ROW = 1024  # from here on a row's constants can be single numbers, and its sums taken by einsum
THREADED_BYTES = 1 << 20  # below this, waking a thread costs more than it saves


class Block(NamedTuple):
    """Part of one segment: rows `first` to `last`, statistics `left` to `right`, inner elements `begin` to `end`.

    `rest`: the rows that fill no tile, side by side as one.
    """

    segment: int
    rest: bool
    first: int
    last: int
    left: int
    right: int
    begin: int
    end: int


class View(NamedTuple):
    """An input as ``[segments, length, slots, inner]``; segment q uses row ``q % tables`` of the tables of statistics.

    `columns`: the blocks are treated as rows of ``slots * inner`` columns, `tile` of them laid side by side as far as
    they go. A block has at most `rows` rows (of whole tiles), `span` slots and `stretch` inner elements. `folded` is
    None, or (groups, spread, channels), which make up the slots: places of one sub-batch that share their statistics.
    """

    segments: int
    length: int
    tables: int
    slots: int
    inner: int
    columns: bool
    tile: int
    rows: int
    span: int
    stretch: int
    folded: tuple[int, int, int] | None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape to view arrays in."""
        return self.segments, self.length, self.slots, self.inner

    def columns_of(self, block: Block) -> int:
        """Return how many columns a block of a view with columns has."""
        rows = self.length - self.even if block.rest else self.tile
        return rows * (block.right - block.left) * self.inner

    @property
    def even(self) -> int:
        """The number of rows that fill whole tiles."""
        return self.length - self.length % self.tile


@functools.lru_cache(maxsize=4096)
def view_of(layout: Layout, read: bool = False) -> View:
    """Choose the view for a layout: sub-batches are extra channels, small ones with all their places, or segments.

    `read`: for sums that copy nothing; their blocks are larger. A block is contiguous where it spans all slots: memory
    is walked through in one direction, and the factors are read again for each block.
    """
    rows, groups, spread, channels, inner = layout[:5]
    segments, length, tables, slots = rows * groups, spread, groups, channels
    folded = None
    if groups * spread * channels * inner <= FOLDED or spread == 1:
        segments, length, tables, slots = 1, rows, 1, groups * spread * channels
        folded = None if spread == 1 else (groups, spread, channels)
    elements = ELEMENTS_READ if read else ELEMENTS
    columns = inner == 1 or (inner < NARROW_INNER and slots * inner <= 2 * WIDE)
    tile = 1
    if columns:
        while tile * 2 * slots * inner <= WIDE and tile * 2 <= length:
            tile *= 2
    span = max(1, min(slots, elements // inner))
    stretch = min(inner, elements)
    at_once = max(1, min(elements // (span * stretch), length) // tile)
    return View(segments, length, tables, slots, inner, columns, tile, at_once, span, stretch, folded)


@functools.lru_cache(maxsize=256)
def blocks_of(view: View) -> tuple[Block, ...]:
    """Return the blocks in order."""
    return tuple(_blocks(view))


@functools.lru_cache(maxsize=256)
def series_of(view: View) -> tuple[tuple[Block, ...], ...]:
    """Return the blocks in series that cover the same statistics, each series as long as the order of blocks allows."""
    same = itertools.groupby(blocks_of(view), lambda block: (block.segment % view.tables, *block[1:2], *block[4:]))
    return tuple(tuple(series) for _, series in same)


def _blocks(view: View) -> Iterator[Block]:
    parts = ((False, view.even // view.tile), (True, int(view.length > view.even)))
    for segment in range(view.segments):
        for rest, rows in parts:
            for left, right in _pieces(view.slots, view.span):
                for first, last in _pieces(rows, view.rows):
                    for begin, end in _pieces(view.inner, view.stretch):
                        yield Block(segment, rest, first, last, left, right, begin, end)


def _pieces(length: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + step, length)) for start in range(0, length, step))


def parts_of(view: View, array: Any) -> list[Any]:
    """Cut an array into the blocks of its view: (rows, columns), or channels first (rows, slots, inner)."""
    main = rest = array.reshape(view.shape)
    if view.columns:
        width, even = view.slots * view.inner, view.even
        rest = main[:, even:].reshape(view.segments, 1, (view.length - even) * width)
        main = main[:, :even].reshape(view.segments, even // view.tile, view.tile * width)
    return [(rest if of_rest else main)[index] for of_rest, index in _indices_of(view)]


@functools.lru_cache(maxsize=256)
def _indices_of(view: View) -> tuple[tuple[bool, tuple[Any, ...]], ...]:
    return tuple((block.rest, _index(view, block)) for block in blocks_of(view))


def _index(view: View, block: Block) -> tuple[Any, ...]:
    segment, _, first, last, left, right, begin, end = block
    if not view.columns:
        return segment, slice(first, last), slice(left, right), slice(begin, end)
    if view.span == view.slots:
        return segment, slice(first, last)
    return segment, slice(first, last), slice(left * view.inner, right * view.inner)


def table_parts_of(view: View, table: Any) -> list[Any]:
    """Cut a table, (tables, columns) or (tables, slots, 1 or inner), into what each block needs of it."""
    return [table[index] for index in _table_indices_of(view)]


@functools.lru_cache(maxsize=256)
def _table_indices_of(view: View) -> tuple[tuple[Any, ...], ...]:
    return tuple(_table_index(view, block) for block in blocks_of(view))


def _table_index(view: View, block: Block) -> tuple[Any, ...]:
    row = block.segment % view.tables
    if block.rest:
        return row, slice(view.columns_of(block))
    if view.span == view.slots:
        return (row,)
    factor = view.inner if view.columns else 1
    return row, slice(block.left * factor, block.right * factor)


def threaded(view: View, itemsize: int) -> bool:
    """Say whether the array is large enough for threads."""
    return view.segments * view.length * view.slots * view.inner * itemsize >= THREADED_BYTES
