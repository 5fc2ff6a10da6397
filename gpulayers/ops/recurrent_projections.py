"""The input projections of a recurrent sequence on NumPy, a block of time steps at a time, on a thread of their own.

What a step adds to its gates from the input depends on no other step, so while one block's steps run, another thread
projects the next block. Only where the products are small enough for BLAS to make them without threads of its own;
otherwise the caller projects a block when its turn comes, which leaves it in the cache for its steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

from gpulayers.ops.host_threads import run_beside
from gpulayers.ops.recurrent_common import steps_per_block
from gpulayers.ops.recurrent_products import WORTH_A_THREAD, in_strips, strip_width

__all__ = ["projected_blocks", "steps_kept"]

_FIRST = 2  # steps of the first block, beside whose projection nothing runs


def steps_kept(time: int, step_bytes: int) -> int:
    """Return for how many steps `projected_blocks` needs memory where nothing is to be saved: two blocks."""
    return min(time, 2 * steps_per_block(time, step_bytes))


def _blocks(time: int, longest: int, first: int) -> list[tuple[int, int]]:
    """Return the blocks' first and last steps; the first block has `first` steps, the next twice as many, and so on."""
    blocks, start, length = [], 0, min(first, longest)
    while start < time:
        blocks.append((start, min(start + length, time)))
        start, length = start + length, min(2 * length, longest)
    return blocks


def projected_blocks(
    x_tnd: np.ndarray, kernel: np.ndarray, offset_gu: np.ndarray, gates_gtnu: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first step of every block, and the block's ``x kernel + offset`` (G, steps, N, U), a part of `gates`.

    `kernel` is in strips. `gates` holds all steps or `steps_kept`; then a block is overwritten when the next but one is
    asked for.
    """
    (time, batch, depth), (count, kept, _, units) = x_tnd.shape, gates_gtnu.shape
    longest = steps_per_block(time, count * batch * units * gates_gtnu.itemsize)
    biased, small = bool(offset_gu.any()), strip_width(batch, depth, units) > 0
    beside = small and time * batch * depth * count * units >= WORTH_A_THREAD

    def project(index: int) -> np.ndarray:
        first, last = blocks[index]
        place = first if kept == time else index % 2 * longest
        steps, part = x_tnd[first:last], gates_gtnu[:, place : place + last - first]
        if small:
            np.matmul(steps[:, None, None], kernel, out=in_strips(part, kernel).swapaxes(0, 1))
        else:
            rows = len(steps) * batch
            np.matmul(steps.reshape(rows, depth), kernel[:, 0], out=part.reshape(count, rows, units))
        if biased:
            np.add(part, offset_gu[:, None, None, :], out=part)
        return part

    blocks = _blocks(time, longest, _FIRST if beside else longest)
    waiting: Callable[[], np.ndarray] | None = None
    for index, (first, _) in enumerate(blocks):
        part = project(index) if waiting is None else waiting()
        waiting = run_beside(functools.partial(project, index + 1)) if beside and index + 1 < len(blocks) else None
        yield first, part
