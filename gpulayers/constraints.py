"""Constraints: functions of a variable's value that an optimizer applies after each update.

Norms are Euclidean, taken along `axis` with that axis kept. The small number added to them is 1e-7, as in Keras.
"""

from __future__ import annotations

from typing import Any

from gpulayers import ops, serialization
from gpulayers.errors import message

__all__ = ["Constraint", "MaxNorm", "MinMaxNorm", "NonNeg", "UnitNorm", "deserialize", "get", "serialize"]

EPSILON = 1e-7


def _norm(w: Any, axis: Any) -> Any:
    axes = tuple(axis) if isinstance(axis, list | tuple) else axis
    return ops.sqrt(ops.sum(ops.square(w), axis=axes, keepdims=True))


class Constraint:
    """Base of constraints: ``constraint(w)`` returns the value to store instead of `w`, here `w` itself."""

    def __call__(self, w: Any) -> Any:
        """Return the value to store instead of `w`."""
        return w

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make a constraint from what `get_config` returned."""
        return cls(**config)


class MaxNorm(Constraint):
    """``w * clip(n, 0, max_value) / (eps + n)`` with the norms ``n`` along `axis`.

    Source: ``tf.keras.constraints.MaxNorm``.

    >>> import numpy as np
    >>> MaxNorm(1.0)(np.array([[3.0, 0.3], [4.0, 0.4]])).round(6)
    array([[0.6, 0.3],
           [0.8, 0.4]])
    """

    def __init__(self, max_value: float = 2, axis: Any = 0) -> None:
        self.max_value, self.axis = max_value, axis

    def __call__(self, w: Any) -> Any:
        """Return `w` with longer norms shortened to `max_value`."""
        norms = _norm(w, self.axis)
        return w * (ops.clip(norms, 0.0, self.max_value) / (norms + EPSILON))

    def get_config(self) -> dict[str, Any]:
        """Return ``{"max_value": ..., "axis": ...}``."""
        return {"max_value": self.max_value, "axis": self.axis}


class NonNeg(Constraint):
    """``w * (w >= 0)``. Source: ``tf.keras.constraints.NonNeg``.

    >>> import numpy as np
    >>> NonNeg()(np.array([-1.0, 2.0])) + 0.0
    array([0., 2.])
    """

    def __call__(self, w: Any) -> Any:
        """Return `w` with negative entries set to 0."""
        return w * ops.cast(ops.greater_equal(w, 0.0), w.dtype)


class UnitNorm(Constraint):
    """``w / (eps + n)`` with the norms ``n`` along `axis`. Source: ``tf.keras.constraints.UnitNorm``.

    >>> import numpy as np
    >>> UnitNorm()(np.array([3.0, 4.0])).round(6)
    array([0.6, 0.8])
    """

    def __init__(self, axis: Any = 0) -> None:
        self.axis = axis

    def __call__(self, w: Any) -> Any:
        """Return `w` with all norms 1."""
        return w / (_norm(w, self.axis) + EPSILON)

    def get_config(self) -> dict[str, Any]:
        """Return ``{"axis": ...}``."""
        return {"axis": self.axis}


class MinMaxNorm(Constraint):
    """``w * (rate * clip(n, min_value, max_value) + (1 - rate) * n) / (eps + n)`` with the norms ``n`` along `axis`.

    `rate` 1 enforces the limits in one step, less moves towards them. Source: ``tf.keras.constraints.MinMaxNorm``.

    >>> import numpy as np
    >>> MinMaxNorm(min_value=1.0, max_value=2.0)(np.array([3.0, 4.0])).round(6)
    array([1.2, 1.6])
    """

    def __init__(self, min_value: float = 0, max_value: float = 1, rate: float = 1.0, axis: Any = 0) -> None:
        self.min_value, self.max_value, self.rate, self.axis = min_value, max_value, rate, axis

    def __call__(self, w: Any) -> Any:
        """Return `w` with its norms moved into, or towards, the limits."""
        norms = _norm(w, self.axis)
        target = ops.clip(norms, self.min_value, self.max_value) * self.rate + norms * (1 - self.rate)
        return w * (target / (norms + EPSILON))

    def get_config(self) -> dict[str, Any]:
        """Return the four arguments."""
        return {"min_value": self.min_value, "max_value": self.max_value, "rate": self.rate, "axis": self.axis}


NAMES: dict[str, Any] = {
    "MaxNorm": MaxNorm,
    "MinMaxNorm": MinMaxNorm,
    "NonNeg": NonNeg,
    "UnitNorm": UnitNorm,
    "max_norm": MaxNorm,
    "min_max_norm": MinMaxNorm,
    "non_neg": NonNeg,
    "unit_norm": UnitNorm,
}
max_norm, min_max_norm, non_neg, unit_norm = MaxNorm, MinMaxNorm, NonNeg, UnitNorm


def get(identifier: Any) -> Any:
    """Return the constraint meant by a name, configuration, class or callable; None for None.

    Raises ValueError for an unknown name and for anything else.

    >>> get("max_norm").get_config()
    {'max_value': 2, 'axis': 0}
    """
    if identifier is None or isinstance(identifier, str | dict):
        return deserialize(identifier)
    if callable(identifier):
        return identifier() if isinstance(identifier, type) else identifier
    raise ValueError(message("constraints.get", "cannot be made a constraint", "a name or callable", repr(identifier)))


def deserialize(config: Any, custom_objects: dict[str, Any] | None = None) -> Any:
    """Make a constraint from a name or a configuration."""
    return serialization.deserialize(config, custom_objects, NAMES, "constraint")


serialize = serialization.serialize
