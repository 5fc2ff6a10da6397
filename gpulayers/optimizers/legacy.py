"""The optimizers of ``tf.compat.v1.train``: their arguments and methods, around the optimizers of this package."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gpulayers.optimizers.adam import Adam
from gpulayers.optimizers.base import Optimizer
from gpulayers.optimizers.schedules import ExponentialDecay, PiecewiseConstantDecay
from gpulayers.optimizers.sgd import SGD
from gpulayers.trace import GraphKeys, active_graph
from gpulayers.variables import Variable

__all__ = [
    "AdamOptimizer",
    "GradientDescentOptimizer",
    "LegacyOptimizer",
    "MomentumOptimizer",
    "exponential_decay",
    "piecewise_constant",
]


class LegacyOptimizer:
    """Base of the v1 optimizers. Source: ``tf.compat.v1.train.Optimizer``.

    Arguments that TensorFlow needs and this library has no use for (`use_locking`, `gate_gradients`,
    `aggregation_method`, `colocate_gradients_with_ops`) are accepted and have no effect.
    """

    def __init__(self, inner: Optimizer) -> None:
        self._inner = inner

    def minimize(
        self,
        loss: Any,
        global_step: Variable | None = None,
        var_list: Any = None,
        gate_gradients: Any = None,
        aggregation_method: Any = None,
        colocate_gradients_with_ops: Any = False,
        name: str | None = None,
        grad_loss: Any = None,
    ) -> Any:
        """Compute and apply gradients, and add 1 to `global_step`. In a graph, return the node that does it.

        `loss`: a tensor of the graph; in eager mode a function without arguments.
        """
        return self.apply_gradients(self.compute_gradients(loss, var_list, grad_loss=grad_loss), global_step, name)

    def compute_gradients(
        self,
        loss: Any,
        var_list: Any = None,
        gate_gradients: Any = None,
        aggregation_method: Any = None,
        colocate_gradients_with_ops: Any = False,
        grad_loss: Any = None,
    ) -> list[tuple[Any, Variable]]:
        """Return (gradient, variable) pairs; the variables are the graph's trainable ones if not given."""
        return self._inner.compute_gradients(loss, var_list, grad_loss=grad_loss)

    def apply_gradients(
        self,
        grads_and_vars: Iterable[tuple[Any, Variable]],
        global_step: Variable | None = None,
        name: str | None = None,
    ) -> Any:
        """Update the variables and add 1 to `global_step`. Pairs without a gradient are left out, as in TensorFlow.

        In a graph, return the node that does it; it is also in the collection TRAIN_OP.
        """
        pairs = list(grads_and_vars)
        with_gradient = [pair for pair in pairs if pair[0] is not None]
        node = self._inner._apply(with_gradient or pairs, global_step)
        graph = active_graph()
        if node is not None and graph is not None:
            graph.add_to_collection(GraphKeys.TRAIN_OP, node)
        return node

    def get_slot(self, var: Variable, name: str) -> Variable | None:
        """Return the slot called `name` of a variable, or None."""
        return self._inner.get_slot(var, name)

    def get_slot_names(self) -> list[str]:
        """Return the names of the slots."""
        return self._inner.get_slot_names()

    def get_name(self) -> str:
        """Return the name."""
        return self._inner.name

    def variables(self) -> list[Variable]:
        """Return the optimizer's own variables."""
        return self._inner.variables


class GradientDescentOptimizer(LegacyOptimizer):
    """``w -= learning_rate g``. Source: ``tf.compat.v1.train.GradientDescentOptimizer``.

    >>> w = Variable([1.0])
    >>> GradientDescentOptimizer(0.25).minimize(lambda: w * w, var_list=[w])
    >>> w.numpy()
    array([0.5], dtype=float32)
    """

    def __init__(self, learning_rate: Any, use_locking: bool = False, name: str = "GradientDescent") -> None:
        super().__init__(SGD(learning_rate, name=name))


class MomentumOptimizer(LegacyOptimizer):
    """`SGD` with momentum; the slot is called ``momentum``. Source: ``tf.compat.v1.train.MomentumOptimizer``."""

    def __init__(
        self,
        learning_rate: Any,
        momentum: float,
        use_locking: bool = False,
        name: str = "Momentum",
        use_nesterov: bool = False,
    ) -> None:
        super().__init__(SGD(learning_rate, momentum, use_nesterov, name))


class AdamOptimizer(LegacyOptimizer):
    """`Adam` with v1's argument names and epsilon; the slots are ``m`` and ``v``.

    Source: ``tf.compat.v1.train.AdamOptimizer``.
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        use_locking: bool = False,
        name: str = "Adam",
    ) -> None:
        super().__init__(Adam(learning_rate, beta1, beta2, epsilon, name))


def exponential_decay(
    learning_rate: float,
    global_step: Any,
    decay_steps: float,
    decay_rate: float,
    staircase: bool = False,
    name: str | None = None,
) -> Any:
    """Return ``ExponentialDecay(...)(global_step)``: in a graph a tensor that follows `global_step`.

    Source: ``tf.compat.v1.train.exponential_decay``.

    >>> exponential_decay(1.0, 20, 10, 0.5)
    0.25
    """
    return _at(ExponentialDecay(learning_rate, decay_steps, decay_rate, staircase), global_step)


def piecewise_constant(x: Any, boundaries: Any, values: Any, name: str | None = None) -> Any:
    """Return ``PiecewiseConstantDecay(boundaries, values)(x)``. Source: ``tf.compat.v1.train.piecewise_constant``.

    >>> piecewise_constant(5, [3], [1.0, 0.5])
    0.5
    """
    return _at(PiecewiseConstantDecay(boundaries, values), x)


def _at(schedule: Any, step: Any) -> Any:
    """Return the rate at `step`; in eager mode, where a variable changes later, a function that looks again."""
    if isinstance(step, Variable) and active_graph() is None:
        return lambda: schedule(step)
    return schedule(step)
