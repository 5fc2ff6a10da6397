"""Elementwise arithmetic, comparisons and selection. Names, broadcasting and dtype promotion are NumPy's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpulayers.ops.operation import Operation, Rule, elementwise

__all__ = [
    "absolute",
    "add",
    "ceil",
    "clip",
    "cos",
    "divide",
    "equal",
    "exp",
    "expm1",
    "floor",
    "floor_divide",
    "greater",
    "greater_equal",
    "isfinite",
    "isinf",
    "isnan",
    "less",
    "less_equal",
    "log",
    "log1p",
    "logical_and",
    "logical_not",
    "logical_or",
    "logical_xor",
    "maximum",
    "minimum",
    "multiply",
    "negative",
    "not_equal",
    "power",
    "reciprocal",
    "remainder",
    "rint",
    "rsqrt",
    "select",
    "sign",
    "sin",
    "sqrt",
    "square",
    "subtract",
    "tanh",
    "where",
]


def _ufunc(name: str, *gradient: Rule | None, type: str | None = None, doc: str = "") -> Operation:
    """Define an operation that NumPy and CuPy have as a ufunc of this name. No rules: not differentiable."""

    def forward(xp: Any, *arrays: Any) -> Any:
        return getattr(xp, name)(*arrays)

    return _elementwise(name, forward, *gradient, type=type, doc=doc)


def _elementwise(
    name: str, forward: Callable[..., Any], *gradient: Rule | None, type: str | None = None, doc: str = ""
) -> Operation:
    return Operation(
        name,
        forward,
        spec=elementwise(forward),
        gradient=gradient or None,
        broadcasts=True,
        type=type,
        doc=doc,
    )


add = _ufunc("add", lambda c, g: g, lambda c, g: g, type="Add", doc="Return `x + y`.")
subtract = _ufunc("subtract", lambda c, g: g, lambda c, g: negative(g), type="Sub", doc="Return `x - y`.")
multiply = _ufunc(
    "multiply", lambda c, g: g * c.inputs[1], lambda c, g: g * c.inputs[0], type="Mul", doc="Return `x * y`."
)
divide = _ufunc(
    "divide",
    lambda c, g: g / c.inputs[1],
    lambda c, g: -g * c.y / c.inputs[1],
    type="RealDiv",
    doc="Return `x / y`; integers divide to a floating result.",
)
floor_divide = _ufunc("floor_divide", type="FloorDiv", doc="Return `floor(x / y)`; not differentiable.")
remainder = _ufunc(
    "remainder",
    lambda c, g: g,
    lambda c, g: -g * floor_divide(c.inputs[0], c.inputs[1]),
    type="FloorMod",
    doc="Return `x - floor(x / y) * y`, which has the sign of `y`.",
)
power: Operation = _ufunc(
    "power",
    lambda c, g: g * c.inputs[1] * power(c.inputs[0], c.inputs[1] - 1),
    # 0 ** y is 0 for every y > 0, so its slope in y is 0 there; the logarithm alone would give 0 * -inf.
    lambda c, g: g * c.y * log(where(c.inputs[0] > 0, c.inputs[0], 1.0)),
    type="Pow",
    doc="Return `x ** y`. The gradient with respect to `y` is taken as 0 where `x <= 0`.",
)
negative: Operation = _ufunc("negative", lambda c, g: -g, type="Neg", doc="Return `-x`.")
reciprocal = _ufunc("reciprocal", lambda c, g: -g * c.y * c.y, doc="Return `1 / x`.")
absolute = _ufunc("absolute", lambda c, g: g * sign(c.x), type="Abs", doc="Return `|x|`; the gradient at 0 is 0.")
sign: Operation = _ufunc("sign", lambda c, g: g * 0, doc="Return -1, 0 or 1; the gradient is 0.")
floor = _ufunc("floor", lambda c, g: g * 0, doc="Return the largest whole number not above `x`; the gradient is 0.")
ceil = _ufunc("ceil", lambda c, g: g * 0, doc="Return the smallest whole number not below `x`; the gradient is 0.")
rint = _ufunc("rint", lambda c, g: g * 0, doc="Round to the nearest whole number, halves to even; the gradient is 0.")
square = _ufunc("square", lambda c, g: g * (c.x * 2), doc="Return `x * x`.")
sqrt = _ufunc("sqrt", lambda c, g: g / (c.y * 2), doc="Return the square root of `x`.")
rsqrt = _elementwise(
    "rsqrt",
    lambda xp, x: xp.reciprocal(xp.sqrt(x)),
    lambda c, g: g * c.y * c.y * c.y * -0.5,
    doc="Return `1 / sqrt(x)`.",
)
exp = _ufunc("exp", lambda c, g: g * c.y, doc="Return `e ** x`.")
expm1 = _ufunc("expm1", lambda c, g: g * (c.y + 1), doc="Return `e ** x - 1`, exact for small `x`.")
log: Operation = _ufunc("log", lambda c, g: g / c.x, doc="Return the natural logarithm of `x`.")
log1p = _ufunc("log1p", lambda c, g: g / (c.x + 1), doc="Return `log(1 + x)`, exact for small `x`.")
sin = _ufunc("sin", lambda c, g: g * cos(c.x), doc="Return the sine of `x` (radians).")
cos: Operation = _ufunc("cos", lambda c, g: -g * sin(c.x), doc="Return the cosine of `x` (radians).")
tanh = _ufunc("tanh", lambda c, g: g * (1 - c.y * c.y), doc="Return the hyperbolic tangent of `x`.")


def _share(chosen: Callable[[Any, Any], Any]) -> Callable[[int], Rule]:
    """Make the rules of maximum and minimum: the chosen side takes the gradient, equal sides take half each."""

    def for_input(index: int) -> Rule:
        def rule(c: Any, g: Any) -> Any:
            mine, other = c.inputs[index], c.inputs[1 - index]
            return where(chosen(mine, other), g, where(equal(mine, other), g * 0.5, 0.0))

        return rule

    return for_input


_larger, _smaller = _share(lambda a, b: greater(a, b)), _share(lambda a, b: less(a, b))
maximum = _ufunc(
    "maximum", _larger(0), _larger(1), doc="Return the larger of `x` and `y`; equal values share the gradient."
)
minimum = _ufunc(
    "minimum", _smaller(0), _smaller(1), doc="Return the smaller of `x` and `y`; equal values share the gradient."
)

equal = _ufunc("equal", doc="Return `x == y`.")
not_equal = _ufunc("not_equal", doc="Return `x != y`.")
less: Operation = _ufunc("less", doc="Return `x < y`.")
less_equal = _ufunc("less_equal", doc="Return `x <= y`.")
greater: Operation = _ufunc("greater", doc="Return `x > y`.")
greater_equal = _ufunc("greater_equal", doc="Return `x >= y`.")
logical_and = _ufunc("logical_and", doc="Return `x and y` for each element.")
logical_or = _ufunc("logical_or", doc="Return `x or y` for each element.")
logical_xor = _ufunc("logical_xor", doc="Return whether exactly one of `x` and `y` is true.")
logical_not = _ufunc("logical_not", doc="Return `not x` for each element.")
isnan = _ufunc("isnan", type="IsNan", doc="Return whether `x` is not a number.")
isinf = _ufunc("isinf", type="IsInf", doc="Return whether `x` is infinite.")
isfinite = _ufunc("isfinite", type="IsFinite", doc="Return whether `x` is neither infinite nor not a number.")


def select(xp: Any, condition: Any, x: Any, y: Any) -> Any:
    """Return ``xp.where(condition, x, y)`` for arrays and numbers, bfloat16 for bfloat16: CuPy's makes that float32."""
    result = xp.where(condition, x, y)
    dtypes = [side.dtype for side in (x, y) if hasattr(side, "dtype")]
    if dtypes and all(dtype.kind == "V" for dtype in dtypes):
        return result.astype(dtypes[0], copy=False)
    return result


where: Operation = _elementwise(
    "where",
    select,
    None,
    lambda c, g: where(c.inputs[0], g, 0.0),
    lambda c, g: where(c.inputs[0], 0.0, g),
    type="SelectV2",
    doc="Return `x` where `condition` is true, else `y`; the gradient goes only where the value came from.",
)


def clip(x: Any, a_min: Any = None, a_max: Any = None) -> Any:
    """Return `x` limited to ``[a_min, a_max]``; None leaves a side open.

    The gradient is 1 inside, 0 outside, and 1/2 exactly at a limit (as `maximum` and `minimum` share it).

    >>> import numpy as np
    >>> clip(np.array([-2.0, 0.5, 3.0]), -1.0, 1.0)
    array([-1. ,  0.5,  1. ])
    """
    if a_min is not None:
        x = maximum(x, a_min)
    return x if a_max is None else minimum(x, a_max)
