"""Learning rates that change with the number of updates made.

A schedule called with a number gives a number; called with an array, variable or graph tensor it computes by
operations, so it can stand in a graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpulayers import ops
from gpulayers.device import is_array
from gpulayers.errors import message
from gpulayers.ops.operation import Recordable

__all__ = ["CosineDecay", "ExponentialDecay", "LearningRateSchedule", "PiecewiseConstantDecay"]


class LearningRateSchedule:
    """Base of schedules: a subclass defines ``rate(functions, step)`` with NumPy's names in `functions`.

    >>> class Half(LearningRateSchedule):
    ...     def rate(self, functions, step):
    ...         return functions.power(0.5, step)
    >>> Half()(2)
    0.25
    """

    def __call__(self, step: Any) -> Any:
        """Return the learning rate after `step` updates."""
        if isinstance(step, Recordable) or (is_array(step) and not isinstance(step, np.generic)):
            return self.rate(ops, ops.cast(step, "float32"))
        return float(self.rate(np, float(step)))

    def rate(self, functions: Any, step: Any) -> Any:
        """Return the learning rate, computed with the names of `functions`."""
        raise NotImplementedError(message(type(self).__name__, "does not define rate"))

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make a schedule from what `get_config` returned."""
        return cls(**config)


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(message(name, "decay_steps is not positive", "more than 0", value))
    return value


class ExponentialDecay(LearningRateSchedule):
    """``initial_learning_rate * decay_rate ^ (step / decay_steps)``; with `staircase` the quotient is rounded down.

    Source: ``tf.keras.optimizers.schedules.ExponentialDecay``.

    >>> ExponentialDecay(1.0, decay_steps=10, decay_rate=0.5)(20)
    0.25
    """

    def __init__(
        self, initial_learning_rate: float, decay_steps: float, decay_rate: float, staircase: bool = False
    ) -> None:
        self.initial_learning_rate, self.decay_rate, self.staircase = initial_learning_rate, decay_rate, staircase
        self.decay_steps = _positive("ExponentialDecay", decay_steps)

    def rate(self, functions: Any, step: Any) -> Any:
        """Return the rate."""
        exponent = step / self.decay_steps
        exponent = functions.floor(exponent) if self.staircase else exponent
        return functions.power(self.decay_rate, exponent) * self.initial_learning_rate


class CosineDecay(LearningRateSchedule):
    """From the initial rate to `alpha` times it along half a cosine over `decay_steps`, constant afterwards.

    With `warmup_steps`, the rate first rises in a line from the initial one to `warmup_target`, and falls from there.
    Source: ``tf.keras.optimizers.schedules.CosineDecay``; Loshchilov and Hutter 2017.

    >>> CosineDecay(1.0, decay_steps=10)(5)
    0.5
    """

    def __init__(
        self,
        initial_learning_rate: float,
        decay_steps: float,
        alpha: float = 0.0,
        warmup_target: float | None = None,
        warmup_steps: int = 0,
    ) -> None:
        self.initial_learning_rate, self.alpha = initial_learning_rate, alpha
        self.warmup_target, self.warmup_steps = warmup_target, warmup_steps
        self.decay_steps = _positive("CosineDecay", decay_steps)

    def rate(self, functions: Any, step: Any) -> Any:
        """Return the rate."""
        warmup = self.warmup_steps if self.warmup_target is not None else 0
        top = self.initial_learning_rate if self.warmup_target is None else self.warmup_target
        after = functions.minimum(functions.maximum(step - float(warmup), 0.0), float(self.decay_steps))
        cosine = functions.cos(after * (math.pi / self.decay_steps)) * 0.5 + 0.5
        falling = (cosine * (1.0 - self.alpha) + self.alpha) * top
        if not warmup:
            return falling
        rising = step * ((top - self.initial_learning_rate) / warmup) + self.initial_learning_rate
        return functions.where(functions.less(step, float(warmup)), rising, falling)


class PiecewiseConstantDecay(LearningRateSchedule):
    """``values[0]`` up to and with step ``boundaries[0]``, then ``values[1]``, and so on.

    Raises ValueError unless there is one value more than boundaries.
    Source: ``tf.keras.optimizers.schedules.PiecewiseConstantDecay``.

    >>> schedule = PiecewiseConstantDecay([100], [0.1, 0.01])
    >>> schedule(100), schedule(101)
    (0.1, 0.01)
    """

    def __init__(self, boundaries: Sequence[float], values: Sequence[float]) -> None:
        if len(values) != len(boundaries) + 1:
            raise ValueError(
                message("PiecewiseConstantDecay", "values do not fit", f"{len(boundaries) + 1} values", len(values))
            )
        self.boundaries, self.values = list(boundaries), list(values)

    def rate(self, functions: Any, step: Any) -> Any:
        """Return the rate."""
        rate: Any = step * 0.0 + self.values[0]
        for boundary, value in zip(self.boundaries, self.values[1:], strict=True):
            rate = functions.where(functions.greater(step, float(boundary)), value, rate)
        return rate
