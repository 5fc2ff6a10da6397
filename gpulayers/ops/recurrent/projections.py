"""The input projections of a recurrent sequence on NumPy, a block of time steps at a time, on a thread of their own.

What a step adds to its gates from the input depends on no other step, so while one block's steps run, another thread
projects the next ones. Only where the products are small enough for BLAS to make them without threads of its own;
otherwise the caller projects a block when its turn comes, which leaves it in the cache for its steps.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gpulayers.ops.host.buffers import recycled
from gpulayers.ops.host.threads import run_ahead
from gpulayers.ops.recurrent.common import reverse_if, steps_per_block
from gpulayers.ops.recurrent.products import WORTH_A_THREAD, in_strips, strip_width

__all__ = ["Inputs", "inputs_of", "projected_blocks", "steps_kept"]

_FIRST = 2  # steps of the first block, beside whose projection nothing runs
_BLOCKS_KEPT = 8


def steps_kept(time: int, step_bytes: int) -> int:
    """Return for how many steps `projected_blocks` needs memory where nothing is to be saved."""
    return min(time, _BLOCKS_KEPT * steps_per_block(time, step_bytes))


class Inputs(NamedTuple):
    """The inputs of a sequence, each (T, N, D), filled a block of steps at a time by `projected_blocks`.

    `source` has any layout and dtype; `x` is the same, contiguous and in the loop's dtype, as a step reads it;
    `entering` is what enters the products: `x` times `mask` (N, D), or `x` itself.
    """

    source: np.ndarray
    x: np.ndarray
    mask: np.ndarray | None
    entering: np.ndarray


def inputs_of(x_tnd: np.ndarray, go_backwards: bool, dtype: np.dtype, mask: np.ndarray | None) -> Inputs:
    """Return the inputs of a sequence before the first block."""
    source = reverse_if(go_backwards, x_tnd)
    ready = source.dtype == dtype and source.flags.c_contiguous
    x = source if ready else recycled(source.shape, dtype)
    if mask is None:
        return Inputs(source, x, None, x)
    return Inputs(source, x, mask.astype(dtype, copy=False), recycled(source.shape, dtype))


def _blocks(first: int, last: int, length: int, longest: int) -> list[tuple[int, int]]:
    """Cut the steps into blocks: one of `length`, the next half as long again, and so on up to `longest`.

    A projection takes a little more than half as long as the steps it is for.
    """
    blocks = []
    while first < last:
        blocks.append((first, min(first + length, last)))
        first, length = first + length, min(length + (length + 1) // 2, longest)
    return blocks


def projected_blocks(
    inputs: Inputs, kernel: np.ndarray, offset_gu: np.ndarray, gates_tgnu: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first step of every block, and the block's ``x kernel + offset`` (steps, G, N, U), a part of `gates`.

    `kernel` is in strips. `gates` holds all steps or `steps_kept`; then a block may be overwritten when the next one is
    asked for.
    """
    (time, batch, depth), (kept, count, _, units) = inputs.x.shape, gates_tgnu.shape
    longest = steps_per_block(time, count * batch * units * gates_tgnu.itemsize)
    offset = offset_gu[:, None] if offset_gu.any() else None
    beside = strip_width(batch, depth, units) > 0 and kept * batch * depth * count * units >= WORTH_A_THREAD
    for start in range(0, time, max(kept, 1)):
        blocks = _blocks(start, min(start + kept, time), min(_FIRST, longest) if beside else longest, longest)
        parts = [gates_tgnu[first - start : last - start] for first, last in blocks]
        works = [
            functools.partial(_project, inputs, slice(first, last), kernel, offset, part, in_strips(part, kernel))
            for (first, last), part in zip(blocks, parts, strict=True)
        ]
        works[0]()
        others = run_ahead(works[1:]) if beside else (work() for work in works[1:])
        for (first, _), part, _ in zip(blocks, parts, itertools.chain([None], others), strict=True):
            yield first, part


def _project(
    inputs: Inputs, steps: slice, kernel: np.ndarray, offset: np.ndarray | None, part: np.ndarray, into: np.ndarray
) -> None:
    if inputs.x is not inputs.source:
        np.copyto(inputs.x[steps], inputs.source[steps])
    if inputs.mask is not None:
        np.multiply(inputs.x[steps], inputs.mask, inputs.entering[steps])
    np.matmul(inputs.entering[steps, None, None], kernel, into)
    if offset is not None:
        np.add(part, offset, part)
