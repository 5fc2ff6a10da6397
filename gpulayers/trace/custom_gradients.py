"""`custom_gradient`: a function that brings its own gradient."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

from gpulayers import ops
from gpulayers.device import asarray, is_array
from gpulayers.ops.operation import GradientContext, Operation
from gpulayers.trace.dispatch import as_value
from gpulayers.trace.graph import executing_eagerly
from gpulayers.trace.stored import StoredValue
from gpulayers.trace.tape import stop_recording
from gpulayers.trace.tensor import GraphTensor, RecordedTensor

__all__ = ["custom_gradient"]


def custom_gradient(f: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for a function ``f(*arrays) -> (result, grad)``, where ``grad(*cotangents)`` gives one for each array.

    What `f` computes inside is not differentiated; `grad` is. Eager, under tapes, and in graphs.
    Source: ``tf.custom_gradient``; `f` must not use trainable variables other than through its arguments.

    >>> import numpy as np, gpulayers as gl
    >>> @gl.custom_gradient
    ... def twice_with_wrong_slope(x):
    ...     return 2 * x, lambda g: 10 * g
    >>> with gl.GradientTape() as tape:
    ...     y = twice_with_wrong_slope(tape.watch(x := np.ones(2)))
    >>> tape.gradient(y, x)
    array([10., 10.])
    """

    @functools.wraps(f)
    def call(*arguments: Any) -> Any:
        values = [as_value(a) for a in arguments]
        symbolic = not executing_eagerly() or any(isinstance(v, GraphTensor) for v in values)
        if not symbolic:
            values = [v if is_array(v) else asarray(v) for v in values]
        with contextlib.nullcontext() if symbolic else stop_recording():
            result, grad = f(*values)
        several = isinstance(result, tuple | list)
        outputs = [as_value(r) for r in (result if several else (result,))]

        def rule(c: GradientContext, *gs: Any) -> tuple[Any, ...]:
            filled = [ops.zeros_like(o) if g is None else g for g, o in zip(gs, c.outputs, strict=True)]
            found = grad(*filled)
            return tuple(found) if isinstance(found, tuple | list) else (found,)

        count = len(arguments)
        tied = _Tie(count, len(outputs), rule)
        tied_outputs = tied(*_operands(arguments, values, symbolic), *outputs)
        return type(result)(tied_outputs) if several else tied_outputs[0]

    return call


def _operands(arguments: Sequence[Any], values: Sequence[Any], symbolic: bool) -> Sequence[Any]:
    """Return the arguments as recorded values where they are, else as arrays."""
    if symbolic:
        return [v if hasattr(v, "dtype") else asarray(v) for v in arguments]
    return [
        a if isinstance(a, RecordedTensor | StoredValue) or is_array(a) else v
        for a, v in zip(arguments, values, strict=True)
    ]


class _Tie(Operation):
    """Pass the last inputs through, with a gradient rule for the first ones: how a custom gradient is recorded."""

    def __init__(self, count: int, outputs: int, rule: Callable[..., Any]) -> None:
        # Not in OPERATIONS: one is made for each call.
        self.name = self.__name__ = "custom_gradient"
        self.type, self.stateful, self.broadcasts, self.kernel = "CustomGradient", False, False, None
        self.__doc__ = self.__class__.__doc__
        self.forward = lambda xp, *values: tuple(values[count:])
        self.spec = lambda *specs: tuple(specs[count:])
        self.gradient = lambda c, *gs: (*rule(c, *gs), *([None] * outputs))
        self.many = True
