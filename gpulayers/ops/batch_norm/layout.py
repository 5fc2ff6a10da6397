"""How a batch normalisation sees its input: any axes collapsed to five sizes.

Every layout becomes ``[rows, groups, spread, channels, inner]`` over contiguous memory:

* `rows`: rows of the batch that fall in one sub-batch (all of them if there is one);
* `groups`: number of sub-batches, interleaved: row i of the batch is in group ``i mod groups``;
* `spread`: the reduced axes between the batch and the channels (1 where they can be merged into `rows`);
* `channels`: the normalised axes, merged, in increasing order;
* `inner`: the reduced axes behind the channels (1 for channels last).

Statistics have shape ``(groups, channels)`` and are taken over ``rows * spread * inner`` values each.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from gpulayers.errors import ShapeError, message

__all__ = ["Layout", "collapse"]


class Layout(NamedTuple):
    """The collapsed view of an input; `order` is the transposition that has to come first, or None."""

    rows: int
    groups: int
    spread: int
    channels: int
    inner: int
    order: tuple[int, ...] | None = None

    @property
    def samples(self) -> int:
        """Number of values behind one statistic."""
        return self.rows * self.spread * self.inner

    @property
    def slots(self) -> int:
        """Number of statistics: groups times channels."""
        return self.groups * self.channels

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.samples * self.slots


@functools.lru_cache(maxsize=4096, typed=True)  # 4.0 and True hash like numbers that are sizes
def collapse(shape: tuple[int, ...], axis: tuple[int, ...], groups: int = 1) -> Layout:
    """Return the layout of an input of this `shape`, normalised on `axis`, in `groups` interleaved sub-batches.

    Raises ShapeError for an axis out of range or given twice, and where the groups do not divide the batch or are none.

    >>> collapse((32, 56, 56, 64), (3,))
    Layout(rows=100352, groups=1, spread=1, channels=64, inner=1, order=None)
    >>> collapse((32, 64, 56, 56), (1,))
    Layout(rows=32, groups=1, spread=1, channels=64, inner=3136, order=None)
    >>> collapse((32, 8, 64), (-1,), groups=4)
    Layout(rows=8, groups=4, spread=8, channels=64, inner=1, order=None)
    >>> collapse((5, 3, 4, 2), (1, 3)).order
    (0, 2, 1, 3)
    """
    rank = len(shape)
    if not all(-rank <= a < rank for a in axis) or not axis:
        raise ShapeError(message("batch_norm", "axis out of range", f"one or more axes of rank {rank}", axis))
    channel_axes = tuple(sorted(a % rank for a in axis))
    if len(set(channel_axes)) != len(axis):
        raise ShapeError(message("batch_norm", "an axis is given twice", "different axes", axis))
    if groups < 1 or groups > 1 and (0 in channel_axes or shape[0] % groups):
        raise ShapeError(
            message("batch_norm", "sub-batches do not fit", "1 or more that divide axis 0", f"{groups} of {shape}")
        )
    order = _order(shape, channel_axes)
    if order is not None:
        shape = tuple(shape[a] for a in order)
        channel_axes = tuple(range(rank - len(channel_axes), rank))
    first, last = channel_axes[0], channel_axes[-1]
    if order is None:  # axes of size 1 between the channels carry nothing
        first, last = _bounds(shape, channel_axes)
    channels, inner = math.prod(shape[first : last + 1]), math.prod(shape[last + 1 :])
    outer = shape[:first]
    if groups == 1:
        return Layout(math.prod(outer), 1, 1, channels, inner, order)
    return Layout(outer[0] // groups, groups, math.prod(outer[1:]), channels, inner, order)


def _bounds(shape: tuple[int, ...], channel_axes: tuple[int, ...]) -> tuple[int, int]:
    """Return the first and last normalised axis that has more than one element (any, if none has)."""
    real = [a for a in channel_axes if shape[a] != 1] or [channel_axes[0]]
    return real[0], real[-1]


def _order(shape: tuple[int, ...], channel_axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the transposition that brings the normalised axes together at the end, or None if they already touch."""
    first, last = _bounds(shape, channel_axes)
    if all(a in channel_axes or shape[a] == 1 for a in range(first, last + 1)):
        return None
    reduced = tuple(a for a in range(len(shape)) if a not in channel_axes)
    return reduced + channel_axes
