"""Dropout masks of cells: one for the inputs and one for the state, the same for all steps of one layer call."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from gpulayers import ops
from gpulayers.ops.random import dropout_mask
from gpulayers.trace import GraphTensor

__all__ = ["Masks", "draw_masks", "held_masks", "holding"]

Masks = tuple[Any, Any]
"""The mask of the inputs and that of the state; None where nothing is dropped."""


class _Held(threading.local):
    """Masks of the cells inside the layer call in progress, by the identity of the cell."""

    def __init__(self) -> None:
        self.masks: dict[int, Masks] = {}


_held = _Held()


def draw_masks(inputs: Any, state: Any, training: Any, rate: float, recurrent_rate: float) -> Masks:
    """Draw masks shaped as `inputs` (N, D) and `state` (N, U), already scaled by ``1 / (1 - rate)``.

    `training` false or None: no masks. A tensor decides when it runs.
    """
    deciding = isinstance(training, GraphTensor)
    if not deciding and not (training is not None and bool(training)):
        return None, None
    found = []
    for like, one in ((inputs, rate), (state, recurrent_rate)):
        mask = None
        if one == 1:
            mask = ops.zeros_like(like)
        elif one:
            mask = dropout_mask(like, one)
        if mask is not None and deciding:
            mask = ops.where(ops.cast(training, "bool"), mask, ops.ones_like(mask))
        found.append(mask)
    return found[0], found[1]


def held_masks(cell: Any) -> Masks | None:
    """Return the masks that the layer call in progress holds for `cell`, or None outside one."""
    return _held.masks.get(id(cell))


@contextlib.contextmanager
def holding(masks: Sequence[tuple[Any, Masks]]) -> Iterator[None]:
    """Use these masks for these cells inside the block."""
    before = dict(_held.masks)
    _held.masks.update({id(cell): pair for cell, pair in masks})
    try:
        yield
    finally:
        _held.masks = before
