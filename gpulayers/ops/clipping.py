"""Limit gradients: by value, by their own length, or by the length of all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpulayers import ops
from gpulayers.device import asarray, is_array
from gpulayers.errors import message
from gpulayers.ops.norms import global_norm as norm_of_all
from gpulayers.ops.operation import Recordable

__all__ = ["clip_by_global_norm", "clip_by_norm", "clip_by_value", "global_norm"]


def _operand(value: Any) -> Any:
    return value if isinstance(value, Recordable) or is_array(value) else asarray(value)


def _squares(t: Any, axis: Any = None, keepdims: bool = False) -> Any:
    wide = ops.cast(t, "float32") if t.dtype.itemsize == 2 else t  # the square of a 16-bit number may not fit 16 bits
    return ops.sum(ops.square(wide), axis=axis, keepdims=keepdims)


def clip_by_value(t: Any, clip_value_min: Any, clip_value_max: Any, name: str | None = None) -> Any:
    """Return `t` limited to ``[clip_value_min, clip_value_max]``.

    >>> clip_by_value([-3.0, 0.5], -1.0, 1.0)
    array([-1. ,  0.5], dtype=float32)
    """
    return ops.clip(_operand(t), clip_value_min, clip_value_max)


def clip_by_norm(t: Any, clip_norm: float, axes: Any = None, name: str | None = None) -> Any:
    """Return `t` shortened to Euclidean length `clip_norm` where it is longer, along `axes` (all of them if None).

    >>> clip_by_norm([3.0, 4.0], 1.0)
    array([0.6, 0.8], dtype=float32)
    """
    t = _operand(t)
    norm = ops.sqrt(_squares(t, axes, keepdims=axes is not None))
    return ops.cast(t * (clip_norm / ops.maximum(norm, clip_norm)), t.dtype)


def global_norm(t_list: Sequence[Any], name: str | None = None) -> Any:
    """Return the Euclidean length of all arrays together, None among them left out. Raises ValueError for no array.

    >>> float(global_norm([[3.0], None, [4.0]]))
    5.0
    """
    given = [_operand(t) for t in t_list if t is not None]
    if not given:
        raise ValueError(message("global_norm", "there is nothing to measure", "one array at least"))
    return norm_of_all(given)


def clip_by_global_norm(
    t_list: Sequence[Any], clip_norm: float, use_norm: Any = None, name: str | None = None
) -> tuple[list[Any], Any]:
    """Return (arrays, norm): all shortened by one factor so that `global_norm` is at most `clip_norm`; the norm before.

    None among `t_list` stays. If the norm is not finite, all become NaN, so that the fault is seen and not spread
    unevenly. `use_norm`: the norm, if it is known already.

    >>> clipped, norm = clip_by_global_norm([[3.0], [4.0]], 1.0)
    >>> [float(t[0]) for t in clipped] == [float(asarray(0.6)), float(asarray(0.8))], float(norm)
    (True, 5.0)
    """
    norm = global_norm(t_list) if use_norm is None else _operand(use_norm)
    scale = ops.where(ops.isfinite(norm), clip_norm / ops.maximum(norm, clip_norm), float("nan"))
    values = [None if t is None else _operand(t) for t in t_list]
    scales = {dtype: ops.cast(scale, dtype) for dtype in {t.dtype for t in values if t is not None}}
    return [None if t is None else ops.cast(t * scales[t.dtype], t.dtype) for t in values], norm
