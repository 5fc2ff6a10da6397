"""Regularizers: penalties on weights or activities, as losses to be added.

Coefficients are kept as float32 values, as TensorFlow keeps them, so a configuration shows 0.009999999776482582 for
0.01. A penalty is computed by operations, so it works on arrays and variables and is recorded where they are.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

from gpulayers import ops, serialization
from gpulayers.device import asarray
from gpulayers.errors import ShapeError, message

__all__ = [
    "L1",
    "L1L2",
    "L2",
    "OrthogonalRegularizer",
    "Regularizer",
    "deserialize",
    "get",
    "l1",
    "l1_l2",
    "l2",
    "serialize",
]


def _coefficient(name: str, value: Any) -> float:
    """Return a coefficient rounded to float32. Raises ValueError for NaN, infinity and what is not a number."""
    usable = isinstance(value, numbers.Real | np.number) and not isinstance(value, bool)
    if not usable or not math.isfinite(float(value)):
        raise ValueError(message(name, "the coefficient cannot be used", "a finite number", repr(value)))
    return float(np.float32(value))


class Regularizer:
    """Base of regularizers: ``regularizer(x)`` returns a scalar penalty.

    >>> class Sum(Regularizer):
    ...     def __call__(self, x):
    ...         return ops.sum(x)
    >>> float(Sum()(np.ones(3)))
    3.0
    """

    def __call__(self, x: Any) -> Any:
        """Return the penalty of `x`, here always 0."""
        return ops.zeros((), x.dtype)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments. Raises NotImplementedError where a subclass does not say them."""
        raise NotImplementedError(message(type(self).__name__, "does not define get_config"))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make a regularizer from what `get_config` returned."""
        return cls(**config)


class L1L2(Regularizer):
    """``l1 * sum |x| + l2 * sum x^2`` (no factor 1/2); both coefficients are 0 if not given.

    Raises ValueError for a coefficient that is not a finite number; negative ones are accepted.
    Source: ``tf.keras.regularizers.L1L2``.

    >>> float(L1L2(l1=0.5, l2=0.25)(np.array([1.0, -2.0])))
    2.75
    """

    def __init__(self, l1: float | None = 0.0, l2: float | None = 0.0) -> None:
        self.l1 = _coefficient("L1L2", 0.0 if l1 is None else l1)
        self.l2 = _coefficient("L1L2", 0.0 if l2 is None else l2)

    def __call__(self, x: Any) -> Any:
        """Return the penalty, a scalar of the dtype of `x`."""
        penalty = None
        if self.l1:
            penalty = ops.sum(ops.absolute(x)) * self.l1
        if self.l2:
            squares = ops.sum(ops.square(x)) * self.l2
            penalty = squares if penalty is None else penalty + squares
        return super().__call__(x) if penalty is None else penalty

    def get_config(self) -> dict[str, Any]:
        """Return ``{"l1": ..., "l2": ...}``."""
        return {"l1": self.l1, "l2": self.l2}


class L1(Regularizer):
    """``l1 * sum |x|``; `l1` is 0.01 if not given. Source: ``tf.keras.regularizers.L1``.

    >>> float(L1(0.5)(np.array([1.0, -2.0])))
    1.5
    """

    def __init__(self, l1: float | None = 0.01) -> None:
        self.l1 = _coefficient("L1", 0.01 if l1 is None else l1)

    def __call__(self, x: Any) -> Any:
        """Return the penalty, a scalar of the dtype of `x`."""
        return ops.sum(ops.absolute(x)) * self.l1

    def get_config(self) -> dict[str, Any]:
        """Return ``{"l1": ...}``."""
        return {"l1": self.l1}


class L2(Regularizer):
    """``l2 * sum x^2``, without the factor 1/2 of some texts; `l2` is 0.01 if not given.

    Source: ``tf.keras.regularizers.L2``.

    >>> float(L2(0.5)(np.array([1.0, -2.0])))
    2.5
    """

    def __init__(self, l2: float | None = 0.01) -> None:
        self.l2 = _coefficient("L2", 0.01 if l2 is None else l2)

    def __call__(self, x: Any) -> Any:
        """Return the penalty, a scalar of the dtype of `x`."""
        return ops.sum(ops.square(x)) * self.l2

    def get_config(self) -> dict[str, Any]:
        """Return ``{"l2": ...}``."""
        return {"l2": self.l2}


class OrthogonalRegularizer(Regularizer):
    """Penalise rows (or columns) that are not orthogonal to each other.

    With ``u_i`` the rows divided by their length: ``factor * mean |u_i . u_j|`` over the pairs ``i < j``. A matrix with
    one row has no pair and gives 0 (NaN in TensorFlow).

    Parameters: `factor`; `mode`, ``"rows"`` or ``"columns"``. Raises ValueError for another mode, and when called on
    what is not a matrix. Source: ``tf.keras.regularizers.OrthogonalRegularizer``.

    >>> float(OrthogonalRegularizer(1.0)(np.array([[2.0, 0.0], [3.0, 4.0]]))).__round__(6)
    0.6
    """

    def __init__(self, factor: float = 0.01, mode: str = "rows") -> None:
        self.factor = _coefficient("OrthogonalRegularizer", factor)
        if mode not in ("rows", "columns"):
            raise ValueError(message("OrthogonalRegularizer", "unknown mode", "'rows' or 'columns'", repr(mode)))
        self.mode = mode

    def __call__(self, x: Any) -> Any:
        """Return the penalty, a scalar of the dtype of `x`."""
        if len(x.shape) != 2:
            raise ShapeError(message("OrthogonalRegularizer", "needs a matrix", "2 axes", tuple(x.shape)))
        along = 1 if self.mode == "rows" else 0
        size = x.shape[1 - along]
        # The smallest square that still counts is the one of TensorFlow's l2_normalize.
        u = x * ops.rsqrt(ops.maximum(ops.sum(ops.square(x), axis=along, keepdims=True), 1e-12))
        products = ops.matmul(u, ops.transpose(u)) if along else ops.matmul(ops.transpose(u), u)
        off_diagonal = asarray(1.0 - np.eye(size), dtype=x.dtype)
        pairs = max(size * (size - 1) / 2, 1)
        return ops.sum(ops.absolute(products * off_diagonal)) * (0.5 * self.factor / pairs)

    def get_config(self) -> dict[str, Any]:
        """Return ``{"factor": ..., "mode": ...}``."""
        return {"factor": self.factor, "mode": self.mode}


def l1(l1: float = 0.01) -> L1:
    """Return ``L1(l1)``.

    >>> l1(0.5).get_config()
    {'l1': 0.5}
    """
    return L1(l1)


def l2(l2: float = 0.01) -> L2:
    """Return ``L2(l2)``.

    >>> l2(0.5).get_config()
    {'l2': 0.5}
    """
    return L2(l2)


def l1_l2(l1: float = 0.01, l2: float = 0.01) -> L1L2:
    """Return ``L1L2(l1, l2)``; unlike the class, both are 0.01 if not given.

    >>> l1_l2(0.5, 0.25).get_config()
    {'l1': 0.5, 'l2': 0.25}
    """
    return L1L2(l1, l2)


NAMES: dict[str, Any] = {
    "L1": L1,
    "L1L2": L1L2,
    "L2": L2,
    "OrthogonalRegularizer": OrthogonalRegularizer,
    "l1": L1,
    "l1_l2": L1L2,
    "l2": L2,
    "orthogonal_regularizer": OrthogonalRegularizer,
}


def get(identifier: Any) -> Any:
    """Return the regularizer meant by a name, configuration, class or callable; None for None.

    The name ``"l1_l2"`` means 0.01 and 0.01. Raises ValueError for an unknown name (TensorFlow hands the string back)
    and for anything else.

    >>> get("l2").get_config()
    {'l2': 0.009999999776482582}
    """
    if isinstance(identifier, str) and identifier == "l1_l2":
        return l1_l2()
    if identifier is None or isinstance(identifier, str | dict):
        return deserialize(identifier)
    if callable(identifier):
        return identifier() if isinstance(identifier, type) else identifier
    wanted = "a name or callable"
    raise ValueError(message("regularizers.get", "cannot be made a regularizer", wanted, repr(identifier)))


def deserialize(config: Any, custom_objects: dict[str, Any] | None = None) -> Any:
    """Make a regularizer from a name or a configuration."""
    return serialization.deserialize(config, custom_objects, NAMES, "regularizer")


serialize = serialization.serialize
