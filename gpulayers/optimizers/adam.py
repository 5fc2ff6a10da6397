"""Adam, and Adam with decoupled weight decay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from gpulayers.errors import message
from gpulayers.ops.optimizer_arrays import adam_numbers, adam_update
from gpulayers.optimizers.base import Optimizer
from gpulayers.variables import Variable

__all__ = ["Adam", "AdamW"]


class Adam(Optimizer):
    """``m <- beta_1 m + (1 - beta_1) g``, ``v <- beta_2 v + (1 - beta_2) g^2``, ``w -= a m / (sqrt(v) + epsilon)``.

    ``a = learning_rate sqrt(1 - beta_2^t) / (1 - beta_1^t)``, t the number of the update, from 1. The slots are ``m``
    and ``v``. `epsilon` is TensorFlow's, added to the uncorrected root; PyTorch adds its own to the corrected one, so
    equal epsilons differ a little there in the first updates.
    Raises ValueError for betas outside [0, 1) and a negative epsilon.
    Source: ``tf.keras.optimizers.Adam``; Kingma and Ba 2015.

    >>> w = Variable([1.0])
    >>> Adam(learning_rate=0.1).apply_gradients([([5.0], w)])
    >>> w.numpy().round(4)
    array([0.9], dtype=float32)
    """

    slot_names = ("m", "v")

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        name: str = "Adam",
        *,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
    ) -> None:
        super().__init__(name, learning_rate, clipnorm, clipvalue, global_clipnorm)
        for what, beta in (("beta_1", beta_1), ("beta_2", beta_2)):
            if not 0 <= beta < 1:
                raise ValueError(message(name, f"{what} is out of range", "0 or more, less than 1", beta))
        if not epsilon >= 0:
            raise ValueError(message(name, "epsilon is negative", "0 or more", epsilon))
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon

    weight_decay: float = 0.0

    def _decays(self, variable: Variable) -> bool:
        """Say whether weight decay applies to a variable."""
        return True

    def _numbers(self, rate: float, step: int) -> tuple[float, ...]:
        return adam_numbers(
            learning_rate=rate,
            beta_1=self.beta_1,
            beta_2=self.beta_2,
            epsilon=self.epsilon,
            weight_decay=self.weight_decay,
            step=step,
        )

    def _update_arrays(
        self,
        xp: Any,
        params: Sequence[Any],
        grads: Sequence[Any],
        slots: Sequence[Sequence[Any]],
        numbers: Any,
        variables: Sequence[Variable],
    ) -> None:
        decays = [self._decays(variable) for variable in variables] if self.weight_decay else None
        adam_update(xp, params, grads, slots[0], slots[1], numbers, decays=decays)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain data."""
        return {**super().get_config(), "beta_1": self.beta_1, "beta_2": self.beta_2, "epsilon": self.epsilon}


class AdamW(Adam):
    """`Adam`, and before each update ``w -= learning_rate weight_decay w``, apart from the moments.

    Source: ``tf.keras.optimizers.AdamW``; Loshchilov and Hutter 2019, algorithm 2.

    >>> w = Variable([1.0])
    >>> AdamW(learning_rate=0.1, weight_decay=0.5).apply_gradients([([0.0], w)])
    >>> w.numpy()
    array([0.95], dtype=float32)
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        weight_decay: float = 0.004,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        name: str = "AdamW",
        *,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
    ) -> None:
        super().__init__(
            learning_rate,
            beta_1,
            beta_2,
            epsilon,
            name,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
        )
        if not weight_decay >= 0:
            raise ValueError(message(name, "weight_decay is negative", "0 or more", weight_decay))
        self.weight_decay = weight_decay
        self._undecayed: list[Variable] = []
        self._undecayed_names: list[str] = []

    def exclude_from_weight_decay(
        self, var_list: Iterable[Variable] = (), var_names: Iterable[str] = ()
    ) -> None:
        """Leave variables without decay: these, and those with one of the regular expressions in their name.

        >>> optimizer = AdamW()
        >>> optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        """
        self._undecayed += list(var_list)
        self._undecayed_names += list(var_names)

    def _decays(self, variable: Variable) -> bool:
        return not any(variable is one for one in self._undecayed) and not any(
            re.search(pattern, variable.name) for pattern in self._undecayed_names
        )

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain data; what is excluded from decay is not among them."""
        return {**super().get_config(), "weight_decay": self.weight_decay}
