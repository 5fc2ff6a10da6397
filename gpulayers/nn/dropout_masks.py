"""Dropout masks of cells: one for the inputs and one for the state, the same for all steps of one layer call."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gpulayers import ops
from gpulayers.layers.training import checked_training
from gpulayers.ops.random import dropout_mask
from gpulayers.trace import GraphTensor

__all__ = ["Masks", "draw_masks", "held_masks", "holding", "is_held", "may_drop"]

Masks = tuple[Any, Any]
"""The mask of the inputs and that of the state; None where nothing is dropped."""


class _Held(threading.local):
    """Masks of the cells inside the layer call in progress, by the identity of the cell."""

    def __init__(self) -> None:
        self.masks: dict[int, Masks | None] = {}


_held = _Held()


def may_drop(training: Any) -> bool:
    """Say whether dropout acts with this `training`, the learning phase where it is None.

    A tensor decides when it runs, so it may.
    """
    return isinstance(training, GraphTensor) or checked_training("dropout", training) is not False


def draw_masks(inputs: Any, state: Any, training: Any, rate: float, recurrent_rate: float) -> Masks:
    """Draw masks shaped as `inputs` (N, D) and `state` (N, U), already scaled by ``1 / (1 - rate)``.

    `training` false, or None and the learning phase is: no masks. A tensor decides when it runs.
    """
    training = checked_training("dropout", training)
    if training is False:
        return None, None
    deciding = isinstance(training, GraphTensor)
    found = []
    for like, one in ((inputs, rate), (state, recurrent_rate)):
        mask = None
        if one == 1:
            mask = ops.zeros_like(like)
        elif one:
            mask = dropout_mask(like, one)
        if mask is not None and deciding:
            mask = ops.where(training, mask, ops.ones_like(mask))
        found.append(mask)
    return found[0], found[1]


def is_held(cell: Any) -> bool:
    """Say whether the layer call in progress has a place for the masks of `cell`."""
    return id(cell) in _held.masks


def held_masks(cell: Any, draw: Callable[[], Masks]) -> Masks:
    """Return the masks that the layer call in progress holds for `cell`, or else those that `draw` makes.

    Where the call has an empty place for the cell, what is drawn is kept there for the steps that follow.
    """
    masks = _held.masks.get(id(cell))
    if masks is None:
        masks = draw()
        if is_held(cell):
            _held.masks[id(cell)] = masks
    return masks


@contextlib.contextmanager
def holding(masks: Sequence[tuple[Any, Masks | None]]) -> Iterator[None]:
    """Use these masks for these cells inside the block; None holds a place for masks drawn at the first step.

    None of the cells has a place already.
    """
    _held.masks.update({id(cell): pair for cell, pair in masks})
    try:
        yield
    finally:
        for cell, _ in masks:
            del _held.masks[id(cell)]
