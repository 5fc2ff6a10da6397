"""The input projections of a recurrent sequence on NumPy, a block of time steps at a time, on a thread of their own.

What a step adds to its gates from the input depends on no other step, so while one block's steps run, another thread
projects the next ones. Only where the products are small enough for BLAS to make them without threads of its own;
otherwise the caller projects a block when its turn comes, which leaves it in the cache for its steps.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np

from gpulayers.ops.host_threads import run_ahead
from gpulayers.ops.recurrent_common import steps_per_block
from gpulayers.ops.recurrent_products import WORTH_A_THREAD, in_strips, strip_width

__all__ = ["projected_blocks", "steps_kept"]

_FIRST = 2  # steps of the first block, beside whose projection nothing runs
_BLOCKS_KEPT = 8


def steps_kept(time: int, step_bytes: int) -> int:
    """Return for how many steps `projected_blocks` needs memory where nothing is to be saved."""
    return min(time, _BLOCKS_KEPT * steps_per_block(time, step_bytes))


def _blocks(first: int, last: int, length: int, longest: int) -> list[tuple[int, int]]:
    """Cut the steps into blocks: one of `length`, the next twice as long, and so on up to `longest`."""
    blocks = []
    while first < last:
        blocks.append((first, min(first + length, last)))
        first, length = first + length, min(2 * length, longest)
    return blocks


def projected_blocks(
    x_tnd: np.ndarray, kernel: np.ndarray, offset_gu: np.ndarray, gates_tgnu: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first step of every block, and the block's ``x kernel + offset`` (steps, G, N, U), a part of `gates`.

    `kernel` is in strips. `gates` holds all steps or `steps_kept`; then a block may be overwritten when the next one is
    asked for.
    """
    (time, batch, depth), (kept, count, _, units) = x_tnd.shape, gates_tgnu.shape
    longest = steps_per_block(time, count * batch * units * gates_tgnu.itemsize)
    offset = offset_gu[:, None] if offset_gu.any() else None
    beside = strip_width(batch, depth, units) > 0 and kept * batch * depth * count * units >= WORTH_A_THREAD
    for start in range(0, time, max(kept, 1)):
        blocks = _blocks(start, min(start + kept, time), min(_FIRST, longest) if beside else longest, longest)
        parts = [gates_tgnu[first - start : last - start] for first, last in blocks]
        works = [
            functools.partial(_project, x_tnd[first:last, None, None], kernel, offset, part, in_strips(part, kernel))
            for (first, last), part in zip(blocks, parts, strict=True)
        ]
        works[0]()
        others = run_ahead(works[1:]) if beside else (work() for work in works[1:])
        for (first, _), part, _ in zip(blocks, parts, itertools.chain([None], others), strict=True):
            yield first, part


def _project(x: np.ndarray, kernel: np.ndarray, offset: np.ndarray | None, part: np.ndarray, into: np.ndarray) -> None:
    np.matmul(x, kernel, into)
    if offset is not None:
        np.add(part, offset, part)
