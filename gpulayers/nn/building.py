"""Build cells before a loop runs them, so that no variable is made inside it."""

from __future__ import annotations

import contextlib
from typing import Any

from gpulayers import nest
from gpulayers.device import device
from gpulayers.dtypes import TensorShape, as_dtype
from gpulayers.layers.calling import call_context, signature_of
from gpulayers.layers.config_part import as_shape_structure
from gpulayers.layers.core import CoreLayer
from gpulayers.layers.legacy import LegacyLayer

__all__ = ["Outline", "build_cell", "build_inside"]


class Outline:
    """Shape and dtype of inputs that need not exist yet."""

    __slots__ = ("dtype", "shape")

    def __init__(self, shape: Any, dtype: Any) -> None:
        self.shape, self.dtype = TensorShape(shape), as_dtype(dtype)


def build_cell(cell: Any, shape: Any, dtype: Any) -> None:
    """Build `cell` for inputs of `shape` as its first call would: in its own scope, under its own name.

    A cell that is built stays as it is. Objects that are not layers are left alone, and so are legacy cells that make
    their variables in the first call: once built, a cell's scope only gives variables that are there.
    """
    own = getattr(cell, "_build_as_cell", None)
    if own is not None:
        own(shape, dtype)
        return
    if isinstance(cell, CoreLayer) and not cell.built and not _builds_in_call(cell):
        _build_now(cell, shape, dtype)


def _builds_in_call(cell: Any) -> bool:
    """Say whether a legacy cell, or one inside it, may make variables in `call`: it has no `build` of its own."""
    if not isinstance(cell, LegacyLayer):
        return False
    if hasattr(cell, "_build_as_cell"):  # a wrapper, which has nothing to build but its cell
        return _builds_in_call(cell.cell)  # type: ignore[attr-defined]
    return type(cell).build is CoreLayer.build or any(map(_builds_in_call, getattr(cell, "cells", ())))


def _build_now(cell: CoreLayer, shape: Any, dtype: Any) -> None:
    around = cell._around_call(signature_of(cell.call), {}, symbolic=False)
    shape = as_shape_structure(shape, cell.name)
    before, call_context.name_prefix = call_context.name_prefix, f"{call_context.name_prefix}{cell.name}/"
    try:
        with contextlib.nullcontext() if around is None else around:
            cell._build_for(nest.map_structure(lambda one: Outline(one, dtype), shape))
    finally:
        call_context.name_prefix = before


def build_inside(cell: Any, shape: Any, dtype: Any) -> None:
    """Build a wrapped `cell` under the names of the layer that is being built. A built cell stays as it is."""
    if isinstance(cell, LegacyLayer) and not cell.built and not hasattr(cell, "_build_as_cell"):
        _build_now(cell, shape, dtype)  # whatever it makes in `call` is made in the wrapper's scopes
    elif isinstance(cell, LegacyLayer):
        build_cell(cell, shape, dtype)
    elif isinstance(cell, CoreLayer):
        if not cell.built:
            with device(cell._device):
                cell.build(shape)
            cell.built = True
    elif hasattr(cell, "build") and not getattr(cell, "built", False):
        cell.build(shape)
