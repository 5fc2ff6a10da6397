"""Stochastic gradient descent, with or without momentum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpulayers.errors import message
from gpulayers.ops.optimizer_arrays import sgd_numbers, sgd_update
from gpulayers.optimizers.base import Optimizer
from gpulayers.variables import Variable

__all__ = ["SGD", "Momentum"]


class SGD(Optimizer):
    """``w -= a g``; with momentum ``b <- momentum b + g``, ``w -= a b``, with `nesterov` ``w -= a (g + momentum b)``.

    The slot ``momentum`` holds b. Keras keeps ``a b`` instead, which differs only while the learning rate changes; this
    is the form of ``tf.compat.v1.train.MomentumOptimizer`` and of PyTorch.
    Raises ValueError for a momentum outside [0, 1], and for `nesterov` without momentum.

    >>> w = Variable([1.0])
    >>> SGD(learning_rate=0.25).apply_gradients([([2.0], w)])
    >>> w.numpy()
    array([0.5], dtype=float32)
    """

    def __init__(
        self,
        learning_rate: Any = 0.01,
        momentum: float = 0.0,
        nesterov: bool = False,
        name: str = "SGD",
        *,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
    ) -> None:
        super().__init__(name, learning_rate, clipnorm, clipvalue, global_clipnorm)
        if not 0 <= momentum <= 1:
            raise ValueError(message(name, "momentum is out of range", "0 to 1", momentum))
        if nesterov and not momentum:
            raise ValueError(message(name, "nesterov needs momentum", "momentum above 0", momentum))
        self.momentum, self.nesterov = momentum, nesterov
        self.slot_names = ("momentum",) if momentum else ()

    def _numbers(self, rate: float, step: int) -> tuple[float, ...]:
        return sgd_numbers(rate, self.momentum if self.slot_names else None)

    def _update_arrays(
        self,
        xp: Any,
        params: Sequence[Any],
        grads: Sequence[Any],
        slots: Sequence[Sequence[Any]],
        numbers: Any,
        variables: Sequence[Variable],
    ) -> None:
        sgd_update(xp, params, grads, slots[0] if slots else None, numbers, nesterov=self.nesterov)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain data."""
        return {**super().get_config(), "momentum": self.momentum, "nesterov": self.nesterov}


class Momentum(SGD):
    """`SGD` whose momentum is 0.9 if not given.

    >>> Momentum(nesterov=True).get_config()["momentum"]
    0.9
    """

    def __init__(
        self,
        learning_rate: Any = 0.01,
        momentum: float = 0.9,
        nesterov: bool = False,
        name: str = "Momentum",
        *,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
    ) -> None:
        super().__init__(
            learning_rate,
            momentum,
            nesterov,
            name,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
        )
