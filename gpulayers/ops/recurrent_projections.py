"""The input projections of a recurrent sequence on NumPy, a block of time steps at a time, on a thread of their own.

What a step adds to its gates from the input depends on no other step, so while one block's steps run, another thread
projects the next block. Only where nothing is saved, and the products are small enough for BLAS to make them without
threads of its own. Otherwise the caller projects a block when its turn comes, which leaves it in the cache for its
steps: in training, BLAS has used every processor shortly before, and its threads still wait for more in a busy loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

from gpulayers.ops.host_threads import run_beside
from gpulayers.ops.recurrent_common import cut_in_strips, steps_per_block

__all__ = ["projected_blocks", "steps_kept"]


def steps_kept(time: int, step_bytes: int) -> int:
    """Return for how many steps `projected_blocks` needs memory where nothing is to be saved: two blocks."""
    return min(time, 2 * steps_per_block(time, step_bytes))


def projected_blocks(
    x_tnd: np.ndarray, kernel_gdu: np.ndarray, offset_gu: np.ndarray, gates_gtnu: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first step of every block, and the block's ``x kernel + offset`` (G, steps, N, U), a part of `gates`.

    `gates` holds all steps or `steps_kept`; then a block is overwritten when the next but one is asked for.
    """
    (time, batch, depth), (count, kept, _, units) = x_tnd.shape, gates_gtnu.shape
    block = steps_per_block(time, count * batch * units * gates_gtnu.itemsize)
    strips = cut_in_strips(kernel_gdu, gates_gtnu[:, 0], time)[0] if time else kernel_gdu
    width, biased = strips.shape[-1], bool(offset_gu.any())
    beside = kept < time and width < units

    def project(start: int) -> np.ndarray:
        steps = x_tnd[start : start + block]
        part = gates_gtnu[:, start % kept : start % kept + len(steps)]
        if beside:
            into = part.reshape(count, len(steps), batch, units // width, width).transpose(1, 0, 3, 2, 4)
            np.matmul(steps[:, None, None], strips, out=into)
        else:
            rows = len(steps) * batch
            np.matmul(steps.reshape(rows, depth), kernel_gdu, out=part.reshape(count, rows, units))
        if biased:
            np.add(part, offset_gu[:, None, None, :], out=part)
        return part

    waiting: Callable[[], np.ndarray] | None = None
    for start in range(0, time, block):
        part = project(start) if waiting is None else waiting()
        following = start + block
        waiting = run_beside(functools.partial(project, following)) if beside and following < time else None
        yield start, part
