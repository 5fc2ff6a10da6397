"""Optimizers, learning-rate schedules and gradient clipping.

>>> get({"class_name": "SGD", "config": {"learning_rate": 0.5}}).learning_rate
0.5
"""

from __future__ import annotations

from typing import Any

from gpulayers import serialization
from gpulayers.errors import message
from gpulayers.ops.clipping import clip_by_global_norm, clip_by_norm, clip_by_value, global_norm
from gpulayers.optimizers import schedules as schedules
from gpulayers.optimizers.adam import Adam, AdamW
from gpulayers.optimizers.base import Optimizer
from gpulayers.optimizers.global_step import create_global_step, get_global_step, get_or_create_global_step
from gpulayers.optimizers.legacy import (
    AdamOptimizer,
    GradientDescentOptimizer,
    LegacyOptimizer,
    MomentumOptimizer,
    exponential_decay,
    piecewise_constant,
)
from gpulayers.optimizers.sgd import SGD, Momentum

__all__ = [
    "SGD",
    "Adam",
    "AdamOptimizer",
    "AdamW",
    "GradientDescentOptimizer",
    "LegacyOptimizer",
    "Momentum",
    "MomentumOptimizer",
    "Optimizer",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "create_global_step",
    "deserialize",
    "exponential_decay",
    "get",
    "get_global_step",
    "get_or_create_global_step",
    "global_norm",
    "piecewise_constant",
    "schedules",
    "serialize",
]

NAMES: dict[str, Any] = {
    **{made.__name__: made for made in (SGD, Momentum, Adam, AdamW)},
    **{made.__name__.lower(): made for made in (SGD, Momentum, Adam, AdamW)},
}


def get(identifier: Any) -> Any:
    """Return the optimizer meant by a name, configuration, class or optimizer. Raises ValueError for anything else.

    >>> get("adam").name
    'Adam'
    """
    if isinstance(identifier, Optimizer | LegacyOptimizer):
        return identifier
    if isinstance(identifier, type) and issubclass(identifier, Optimizer):
        return identifier()  # type: ignore[call-arg]
    if isinstance(identifier, str | dict):
        return deserialize(identifier)
    raise ValueError(message("optimizers.get", "cannot be made an optimizer", "a name or optimizer", repr(identifier)))


def deserialize(config: Any, custom_objects: dict[str, Any] | None = None) -> Any:
    """Make an optimizer from a name or a configuration."""
    return serialization.deserialize(config, custom_objects, NAMES, "optimizer")


serialize = serialization.serialize
