"""Cutting an array into blocks that stay in a core's cache.

A block is one megabyte, and two where it is only read: large enough that the calls on it last longer than what is done
between them, so that two threads seldom meet at the interpreter lock (``host.threads``); small enough that most of a
chain of NumPy calls on it costs one trip to memory, also where a machine's last cache is shared with others, and that
two threads finish together. Which blocks there are, and which of them are summed together, depends on the shape alone,
never on the number of threads: results are the same bits on any machine with the same NumPy.

No call made inside a task may start threads of its own: sums use ufuncs and ``vecdot`` on rows too short for a
threaded BLAS.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpulayers.ops.batch_norm.layout import Layout

__all__ = ["LONG_ROW", "ROWS", "Block", "View", "parts_of", "table_parts_of", "threaded", "view_of"]

ELEMENTS = 1024 * 1024 // 4  # of a block
ELEMENTS_READ = 2 * ELEMENTS  # of a block that is only read
FOLDED = 64 * 1024  # elements of a row with all sub-batches and their places: more make good blocks by themselves
WIDE = 8192  # elements of a wide row: enough to hide a loop's start
WIDE_SUMS = 2048  # the same where columns are summed: the row of sums stays in the first-level cache
ROWS = 64  # rows of a column summed at once: longer running float32 sums lose digits
NARROW_INNER = 64  # below this, channels-first rows are too short for a loop of their own
TINY_INNER = 16  # below this they would also need a large part of the input's memory for their sums
LONG_ROW = 1024  # from here on a row's constants can be single numbers, and its sums taken by einsum
REPEATED = 1 << 20  # elements that a table of factors may be blown up to
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


class Series(NamedTuple):
    """Blocks one after the other that are summed into the same statistics: `left` to `right` of one table.

    `pieces`: for each block, where its pieces of `ROWS` rows are among those of the series.
    """

    table: int
    left: int
    right: int
    columns: int
    pieces: tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class View:
    """An input as ``[segments, length, slots, inner]``; segment q uses row ``q % tables`` of the tables of statistics.

    `columns`: the blocks are treated as rows of ``slots * inner`` columns, `tile` of them laid side by side as far as
    they go. A block has at most `rows` rows (of whole tiles), `span` slots and `stretch` inner elements. `folded` is
    None, or (groups, spread, channels), which make up the slots: places of one sub-batch that share their statistics.

    There is one for every layout. What follows from it is worked out once: between two sweeps over memory nothing of
    Python is in a cache, and every step that is left out there is worth several.
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

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape to view arrays in."""
        return self.segments, self.length, self.slots, self.inner

    @functools.cached_property
    def size(self) -> int:
        """The number of elements."""
        return self.segments * self.length * self.slots * self.inner

    @functools.cached_property
    def even(self) -> int:
        """The number of rows that fill whole tiles."""
        return self.length - self.length % self.tile

    @functools.cached_property
    def tiled(self) -> tuple[int, ...]:
        """The shape to view arrays in that have columns, but for rows that fill no tile."""
        return self.segments, self.even // self.tile, self.tile * self.slots * self.inner

    @functools.cached_property
    def table_shape(self) -> tuple[int, ...]:
        """The shape in which a table is filled from values of (tables, 1, slots, 1)."""
        if self.columns:
            return self.tables, self.tile, self.slots, self.inner
        short = self.inner < LONG_ROW and self.tables * self.slots * self.inner <= REPEATED
        return self.tables, 1, self.slots, self.inner if short else 1

    @functools.cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks in order."""
        return tuple(_blocks(self))

    @functools.cached_property
    def series(self) -> tuple[Series, ...]:
        """The blocks in series, each as long as their order allows. For views with columns."""
        return tuple(_series(self))

    @functools.cached_property
    def indices(self) -> tuple[tuple[Any, ...], ...]:
        """Each block's place in an array."""
        return tuple(_index(self, block) for block in self.blocks)

    @functools.cached_property
    def table_indices(self) -> tuple[tuple[tuple[Any, ...], ...], tuple[int, ...]]:
        """The places in a table that blocks need, and for each block which of them."""
        keys = [(block.segment % self.tables, block.rest, block.left, block.right) for block in self.blocks]
        places = {key: _table_index(self, block) for key, block in zip(keys, self.blocks, strict=True)}
        numbers = {key: number for number, key in enumerate(places)}
        return tuple(places.values()), tuple(numbers[key] for key in keys)

    def columns_of(self, block: Block) -> int:
        """Return how many columns a block of a view with columns has."""
        rows = self.length - self.even if block.rest else self.tile
        return rows * (block.right - block.left) * self.inner


@functools.lru_cache(maxsize=256)
def view_of(layout: Layout, sums: bool = False, copies: bool = True) -> View:
    """Choose the view for a layout: sub-batches are extra channels, small ones with all their places, or segments.

    `sums`: for sums, with narrower rows; with larger blocks where they are not taken of `copies`. A block is contiguous
    where it spans all slots: memory is walked through in one direction, and the factors are read again for each block.
    """
    rows, groups, spread, channels, inner = layout[:5]
    segments, length, tables, slots = rows * groups, spread, groups, channels
    folded = None
    if groups * spread * channels * inner <= FOLDED or spread == 1:
        segments, length, tables, slots = 1, rows, 1, groups * spread * channels
        folded = None if spread == 1 else (groups, spread, channels)
    elements, wide = (ELEMENTS if copies else ELEMENTS_READ), (WIDE_SUMS if sums else WIDE)
    columns = inner == 1 or (inner < NARROW_INNER and (slots * inner <= 2 * WIDE_SUMS or inner < TINY_INNER))
    tile = 1
    while columns and tile * 2 * slots * inner <= wide and tile * 2 <= length:
        if segments > 1 and tile * 2 * slots * inner > WIDE_SUMS and length % (tile * 2):
            break  # every segment would have a block of the rest
        tile *= 2
    together = min(ROWS, length) if sums and columns else 1  # rows of a block: its sums must be small beside it
    span = max(1, min(slots, elements // (inner * together)))
    stretch = min(inner, elements)
    at_once = max(1, min(elements // (span * stretch), length) // tile)
    return View(segments, length, tables, slots, inner, columns, tile, at_once, span, stretch, folded)


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


def _series(view: View) -> Iterator[Series]:
    same = itertools.groupby(view.blocks, lambda block: (block.segment % view.tables, block.rest, *block[4:]))
    for _, group in same:
        blocks = list(group)
        ends = [0, *itertools.accumulate(-(-(block.last - block.first) // ROWS) for block in blocks)]
        segment, left, right, columns = blocks[0].segment, blocks[0].left, blocks[0].right, view.columns_of(blocks[0])
        yield Series(segment % view.tables, left, right, columns, tuple(map(slice, ends[:-1], ends[1:])))


def _index(view: View, block: Block) -> tuple[Any, ...]:
    segment, _, first, last, left, right, begin, end = block
    if not view.columns:
        return segment, slice(first, last), slice(left, right), slice(begin, end)
    if view.span == view.slots:
        return segment, slice(first, last)
    return segment, slice(first, last), slice(left * view.inner, right * view.inner)


def _table_index(view: View, block: Block) -> tuple[Any, ...]:
    row = block.segment % view.tables
    if block.rest:
        return row, slice(view.columns_of(block))
    if view.span == view.slots:
        return (row,)
    factor = view.inner if view.columns else 1
    return row, slice(block.left * factor, block.right * factor)


def parts_of(view: View, array: Any) -> list[Any]:
    """Cut an array into the blocks of its view: (rows, columns), or channels first (rows, slots, inner)."""
    if not view.columns:
        array = array.reshape(view.shape)
        return [array[index] for index in view.indices]
    if view.even == view.length:
        array = array.reshape(view.tiled)
        return [array[index] for index in view.indices]
    array = array.reshape(view.shape)
    rest = array[:, view.even :].reshape(view.segments, 1, -1)
    main = array[:, : view.even].reshape(view.tiled)
    return [(rest if block.rest else main)[index] for block, index in zip(view.blocks, view.indices, strict=True)]


def table_parts_of(view: View, table: Any) -> list[Any]:
    """Cut a table, (tables, columns) or (tables, slots, 1 or inner), into what each block needs of it."""
    places, which = view.table_indices
    parts = [table[place] for place in places]
    return [parts[number] for number in which]


def threaded(view: View, itemsize: int) -> bool:
    """Say whether the array is large enough for threads."""
    return view.size * itemsize >= THREADED_BYTES
