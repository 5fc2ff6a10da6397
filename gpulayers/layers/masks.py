"""Which values carry a mask. Tensors keep theirs; for plain arrays there is a table that forgets dead ones."""

from __future__ import annotations

import weakref
from typing import Any

from gpulayers import nest
from gpulayers.trace import Tensor

__all__ = ["any_masks", "mask_of", "masks_of", "set_mask"]

_masks: dict[int, Any] = {}


def set_mask(value: Any, mask: Any) -> None:
    """Attach `mask` (None removes it) to an array or tensor."""
    if isinstance(value, Tensor):
        value._keras_mask = mask
        return
    key = id(value)
    if mask is None:
        _masks.pop(key, None)
        return
    try:
        weakref.finalize(value, _masks.pop, key, None)
    except TypeError:  # an object that cannot be watched would leave its mask to whatever gets its identity next
        return
    _masks[key] = mask


def any_masks() -> bool:
    """Say whether any plain array carries a mask."""
    return bool(_masks)


def mask_of(value: Any) -> Any:
    """Return the mask of an array or tensor, or None."""
    if isinstance(value, Tensor):
        return getattr(value, "_keras_mask", None)
    return _masks.get(id(value)) if _masks else None


def masks_of(structure: Any) -> Any:
    """Return the masks of a nested structure, in its structure."""
    return nest.map_structure(mask_of, structure)
