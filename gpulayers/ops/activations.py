"""Activation functions, and the table of their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpulayers.errors import message
from gpulayers.ops.arithmetic import absolute, add, clip, exp, greater, less, logical_and, multiply, square, tanh, where
from gpulayers.ops.operation import Operation, Spec, elementwise, result_dtype
from gpulayers.ops.reductions import sum
from gpulayers.ops.shaping import identity
from gpulayers.ops.static import axis_of, widened

__all__ = [
    "elu",
    "erf",
    "exponential",
    "gelu",
    "get",
    "hard_sigmoid",
    "leaky_relu",
    "linear",
    "log_softmax",
    "mish",
    "relu",
    "relu6",
    "selu",
    "serialize",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "softsign",
    "swish",
]


def _in_float32(body: Callable[..., Any]) -> Callable[..., Any]:
    """Make a forward that computes 16-bit data in float32: several roundings in 16 bits would add up."""

    def forward(xp: Any, *arrays: Any, **attributes: Any) -> Any:
        wide, narrow = widened(arrays)
        result = body(xp, *wide, **attributes)
        return result if narrow is None else result.astype(narrow)

    return forward


def _activation(
    name: str, body: Callable[..., Any], rule: Callable[..., Any], doc: str, type: str | None = None
) -> Operation:
    forward = _in_float32(body)
    return Operation(name, forward, spec=elementwise(forward), gradient=(rule,), type=type, doc=doc)


def _sigmoid_body(xp: Any, x: Any) -> Any:
    e = xp.exp(-xp.abs(x))  # never overflows, and keeps the small values of negative x
    return xp.where(x >= 0, 1.0, e) / (1.0 + e)


# erf(x) = x P(x^2) for |x| < 1, and 1 - exp(-x^2) Q(3 / (|x| + 2)) up to 6, beyond which it is 1 in float64. P and Q
# are interpolated at Chebyshev points of [0, 1] and [3/8, 1], mapped to [-1, 1]; coefficients of rising powers.
_ERF_NEAR = (
    0.96546873866986727, -0.14053608902271711, 0.019852496688984218, -0.0022854855611440855, 0.00021751715603563488,
    -1.7537169441280198e-05, 1.2233827638093572e-06, -7.51156925108609e-08, 4.1157515002658853e-09,
    -2.035231956483527e-10, 9.2112501874282304e-12, -3.8065912241221399e-13,
)  # fmt: skip
_ERF_FAR = (
    0.2214295402299318, 0.16189356804102495, 0.038560570425182426, 0.0055888162818414026, 0.00019713917772795885,
    -8.0792204287966299e-05, -7.3405179382879979e-06, 1.9795619759276001e-06, 1.6349937383405805e-07,
    -7.0053717937367918e-08, -5.8860532992216011e-10, 2.625007492297143e-09, -2.6869851834855798e-10,
    -7.4687118180506843e-11, 2.2135736614933752e-11, 4.7757761107821881e-13, -9.3694560328695933e-13,
)  # fmt: skip


def _polynomial(coefficients: tuple[float, ...], u: Any) -> Any:
    value = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        value = value * u + coefficient
    return value


def _erf_body(xp: Any, x: Any) -> Any:
    if x.dtype.kind != "f":
        x = x.astype(np.float64)
    size = xp.abs(x)
    near = x * _polynomial(_ERF_NEAR, 2 * xp.minimum(size, 1.0) ** 2 - 1)
    far = xp.clip(size, 1.0, 6.0)
    tail = _polynomial(_ERF_FAR, (3 / (far + 2) - 0.6875) / 0.3125) * xp.exp(-far * far)
    result = xp.where(size < 1, near, xp.copysign(1 - tail, x))
    return xp.where(xp.isnan(x), x, result)


sigmoid = _activation(
    "sigmoid", _sigmoid_body, lambda c, g: g * c.y * (1 - c.y), "Return `1 / (1 + exp(-x))`, without overflow."
)
erf = _activation(
    "erf",
    _erf_body,
    lambda c, g: g * exp(-square(c.x)) * (2.0 / float(np.sqrt(np.pi))),
    "Return the error function; errors stay below 1e-15 in float64.",
)
relu = _activation(
    "relu",
    lambda xp, x: xp.maximum(x, 0),
    lambda c, g: where(greater(c.y, 0), g, 0.0),
    "Return `max(x, 0)`; the gradient at 0 is 0.",
)
relu6 = _activation(
    "relu6",
    lambda xp, x: xp.minimum(xp.maximum(x, 0), 6),
    lambda c, g: where(logical_and(greater(c.y, 0), less(c.y, 6)), g, 0.0),
    "Return `min(max(x, 0), 6)`; the gradient at 0 and 6 is 0.",
)
softplus = _activation(
    "softplus",
    lambda xp, x: xp.maximum(x, 0) + xp.log1p(xp.exp(-xp.abs(x))),
    lambda c, g: g * sigmoid(c.x),
    "Return `log(1 + exp(x))`, without overflow.",
)
softsign = _activation(
    "softsign",
    lambda xp, x: x / (1 + xp.abs(x)),
    lambda c, g: g * square(1 - absolute(c.y)),
    "Return `x / (1 + |x|)`.",
)
_elu = Operation(
    "elu",
    _in_float32(lambda xp, x, *, alpha: xp.where(x > 0, x, alpha * xp.expm1(xp.minimum(x, 0)))),
    spec=elementwise(lambda xp, x, *, alpha: np.expm1(x)),
    gradient=(lambda c, g: where(greater(c.x, 0), g, g * (c.y + c["alpha"])),),
)
_leaky_forward = _in_float32(lambda xp, x, *, alpha: xp.where(x > 0, x, alpha * x))
_leaky_relu = Operation(
    "leaky_relu",
    _leaky_forward,
    spec=elementwise(_leaky_forward),
    gradient=(lambda c, g: where(greater(c.x, 0), g, multiply(g, c["alpha"])),),
)


def elu(x: Any, alpha: float = 1.0) -> Any:
    """Return `x` where it is positive, else `alpha * (exp(x) - 1)`."""
    return _elu(x, alpha=float(alpha))


def leaky_relu(x: Any, alpha: float = 0.2) -> Any:
    """Return `x` where it is positive, else `alpha * x`."""
    return _leaky_relu(x, alpha=float(alpha))


def selu(x: Any) -> Any:
    """Return `scale * elu(x, alpha)` with the constants that keep mean 0 and variance 1.

    Source: Klambauer et al., Self-Normalizing Neural Networks (2017), equation 14.
    """
    return multiply(elu(x, 1.6732632423543772), 1.0507009873554805)


def hard_sigmoid(x: Any) -> Any:
    """Return `0.2 x + 0.5` limited to [0, 1]: what Keras 2 calls hard_sigmoid."""
    return clip(add(multiply(x, 0.2), 0.5), 0.0, 1.0)


def gelu(x: Any, approximate: bool = False) -> Any:
    """Return `x * F(x)` with F the normal distribution function; `approximate` uses tanh for it.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units (2016), section 2.
    """
    if approximate:
        shape = tanh(multiply(add(x, multiply(x * x * x, 0.044715)), float(np.sqrt(2 / np.pi))))
    else:
        shape = erf(multiply(x, float(np.sqrt(0.5))))
    return multiply(x, 0.5) * add(shape, 1)


def silu(x: Any) -> Any:
    """Return `x * sigmoid(x)`, also called swish."""
    return x * sigmoid(x)


def mish(x: Any) -> Any:
    """Return `x * tanh(softplus(x))`."""
    return x * tanh(softplus(x))


def linear(x: Any) -> Any:
    """Return `x`."""
    return identity(x)


def exponential(x: Any) -> Any:
    """Return `e ** x`."""
    return exp(x)


swish = silu


def _softmax_body(xp: Any, x: Any, *, axis: int) -> Any:
    e = xp.exp(x - xp.max(x, axis=axis, keepdims=True))
    return e / xp.sum(e, axis=axis, keepdims=True)


def _log_softmax_body(xp: Any, x: Any, *, axis: int) -> Any:
    shifted = x - xp.max(x, axis=axis, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=axis, keepdims=True))


def _along_axis(name: str, body: Callable[..., Any], rule: Callable[..., Any], type: str) -> Operation:
    forward = _in_float32(lambda xp, x, *, axis: body(xp, x, axis=axis) if x.size else xp.exp(x))

    def spec(x: Spec, *, axis: int) -> Spec:
        if x.shape is not None:
            axis_of(name, axis, len(x.shape))
        return Spec(x.shape, result_dtype(forward, [Spec((1,), x.dtype)], axis=0))

    return Operation(name, forward, spec=spec, gradient=(rule,), type=type)


def _softmax_rule(c: Any, g: Any) -> Any:
    weighted = g * c.y
    return weighted - c.y * sum(weighted, c["axis"], keepdims=True)


_softmax = _along_axis("softmax", _softmax_body, _softmax_rule, "Softmax")
_log_softmax = _along_axis(
    "log_softmax",
    _log_softmax_body,
    lambda c, g: g - exp(c.y) * sum(g, c["axis"], keepdims=True),
    "LogSoftmax",
)


def softmax(x: Any, axis: int = -1) -> Any:
    """Return `exp(x) / sum(exp(x))` along `axis`, without overflow.

    >>> import numpy as np
    >>> softmax(np.array([0.0, 0.0]))
    array([0.5, 0.5])
    """
    return _softmax(x, axis=axis)


def log_softmax(x: Any, axis: int = -1) -> Any:
    """Return the logarithm of `softmax`, exact where softmax itself would be 0."""
    return _log_softmax(x, axis=axis)


_BY_NAME: dict[str, Callable[..., Any]] = {
    "elu": elu,
    "exponential": exponential,
    "gelu": gelu,
    "hard_sigmoid": hard_sigmoid,
    "leaky_relu": leaky_relu,
    "linear": linear,
    "log_softmax": log_softmax,
    "mish": mish,
    "relu": relu,
    "relu6": relu6,
    "selu": selu,
    "sigmoid": sigmoid,
    "silu": silu,
    "softmax": softmax,
    "softplus": softplus,
    "softsign": softsign,
    "swish": swish,
    "tanh": tanh,
}


def get(identifier: Any) -> Callable[..., Any]:
    """Return an activation function for its name, for None (`linear`), or for a function (itself).

    Raises ValueError for an unknown name, TypeError for anything else.

    >>> get("relu") is relu, get(None) is linear
    (True, True)
    """
    if identifier is None:
        return linear
    if isinstance(identifier, str):
        if identifier not in _BY_NAME:
            raise ValueError(message("activation", "unknown name", ", ".join(_BY_NAME), repr(identifier)))
        return _BY_NAME[identifier]
    if callable(identifier):
        return identifier
    raise TypeError(message("activation", "not an activation", "a name or a function", repr(identifier)))


def serialize(activation: Callable[..., Any]) -> Any:
    """Return the name under which `get` finds `activation`: one of the table, or the function's own.

    >>> serialize(tanh), serialize(linear)
    ('tanh', 'linear')
    """
    for name, function in _BY_NAME.items():
        if function is activation:
            return name
    return getattr(activation, "__name__", type(activation).__name__)
