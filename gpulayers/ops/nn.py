"""Operations that networks are made of: losses on logits, moments, normalisation by length, dropout, bias."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.errors import DTypeError, ShapeError, message
from gpulayers.ops.activations import log_softmax, sigmoid, softmax
from gpulayers.ops.arithmetic import maximum, rsqrt, square
from gpulayers.ops.indexing import one_hot
from gpulayers.ops.operation import GradientContext, Operation, Spec, elementwise, result_dtype
from gpulayers.ops.random import dropout_mask
from gpulayers.ops.reductions import mean, sum
from gpulayers.ops.shaping import cast, expand_dims, reshape, squeeze, stop_gradient
from gpulayers.ops.static import axes_of, is_small_float, static_shape, widened
from gpulayers.ops.windows import parse_format

__all__ = [
    "bias_add",
    "dropout",
    "l2_normalize",
    "moments",
    "sigmoid_cross_entropy_with_logits",
    "softmax_cross_entropy_with_logits",
    "sparse_softmax_cross_entropy_with_logits",
]


def _narrowed(result: Any, dtype: np.dtype | None) -> Any:
    return result if dtype is None else result.astype(dtype)


def _sigmoid_forward(xp: Any, labels: Any, logits: Any) -> Any:
    """Return `max(x, 0) - x z + log(1 + exp(-|x|))`, which never overflows."""
    (z, x), narrow = widened([labels, logits])
    return _narrowed(xp.maximum(x, 0) - x * z + xp.log1p(xp.exp(-xp.abs(x))), narrow)


_sigmoid_cross_entropy = Operation(
    "sigmoid_cross_entropy",
    _sigmoid_forward,
    spec=elementwise(_sigmoid_forward),
    gradient=(lambda c, g: -g * c.inputs[1], lambda c, g: g * (sigmoid(c.inputs[1]) - c.inputs[0])),
    broadcasts=True,
)


def sigmoid_cross_entropy_with_logits(labels: Any, logits: Any) -> Any:
    """Return `-z log(s) - (1 - z) log(1 - s)` for each element, with s the sigmoid of the logits, without overflow.

    >>> import numpy as np
    >>> float(sigmoid_cross_entropy_with_logits(np.array(1.0), np.array(-1000.0)))
    1000.0
    """
    return _sigmoid_cross_entropy(labels, logits)


def _softmax_forward(xp: Any, labels: Any, logits: Any) -> Any:
    """Return `-sum(z log(softmax(x)))` over the last axis."""
    (z, x), narrow = widened([labels, logits])
    shifted = x - xp.max(x, axis=-1, keepdims=True)
    log_total = xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))
    return _narrowed(xp.sum(z * (log_total - shifted), axis=-1), narrow)


def _softmax_spec(labels: Spec, logits: Spec) -> Spec:
    dtype = result_dtype(_softmax_forward, [Spec((1,), labels.dtype), Spec((1,), logits.dtype)])
    return Spec(None if logits.shape is None else logits.shape[:-1], dtype)


def _softmax_logits_rule(c: GradientContext, g: Any) -> Any:
    z, x = c.inputs
    return expand_dims(g, -1) * (softmax(x) * sum(z, -1, keepdims=True) - z)


_softmax_cross_entropy = Operation(
    "softmax_cross_entropy",
    _softmax_forward,
    spec=_softmax_spec,
    gradient=(lambda c, g: -expand_dims(g, -1) * log_softmax(c.inputs[1]), _softmax_logits_rule),
)


def _same_shape(name: str, labels: Any, logits: Any) -> None:
    a, b = static_shape(labels), static_shape(logits)
    if a is None or b is None:
        return
    if not b or len(a) != len(b) or any(None not in pair and pair[0] != pair[1] for pair in zip(a, b, strict=True)):
        raise ShapeError(message(name, "labels and logits differ in shape", b, a))


def softmax_cross_entropy_with_logits(labels: Any, logits: Any) -> Any:
    """Return `-sum(labels * log_softmax(logits))` over the last axis. Both (..., classes); returns (...).

    Labels are weights of the classes; they need not add up to 1, and get a gradient too.
    """
    _same_shape("softmax_cross_entropy_with_logits", labels, logits)
    return _softmax_cross_entropy(labels, logits)


def _sparse_forward(xp: Any, labels: Any, logits: Any) -> Any:
    """Return `log(sum(exp(x))) - x[label]` over the last axis."""
    (x,), narrow = widened([logits])
    shifted = x - xp.max(x, axis=-1, keepdims=True)
    chosen = xp.take_along_axis(shifted, xp.expand_dims(labels, -1), axis=-1)
    return _narrowed(xp.squeeze(xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True)) - chosen, axis=-1), narrow)


def _classes(x: Any) -> int:
    shape = static_shape(x)
    if shape is None or shape[-1] is None:
        raise ShapeError(message("sparse_softmax_cross_entropy_with_logits", "the number of classes is unknown"))
    return shape[-1]


def _sparse_gradient_forward(xp: Any, labels: Any, logits: Any, g: Any) -> Any:
    """Return `g (softmax(x) - one_hot(label))`: one operation, because small steps are made of the cost of each."""
    (x, g), narrow = widened([logits, g])
    p = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    p /= xp.sum(p, axis=-1, keepdims=True)
    p -= xp.expand_dims(labels, -1) == xp.arange(x.shape[-1])
    return _narrowed(p * xp.expand_dims(g, -1), narrow)


def _sparse_second_logits(c: GradientContext, v: Any) -> Any:
    _, x, g = c.inputs
    p, u = softmax(x), v * expand_dims(g, -1)
    return p * (u - sum(u * p, -1, keepdims=True))


def _sparse_second_cotangent(c: GradientContext, v: Any) -> Any:
    labels, x, _ = c.inputs
    return sum(v * (softmax(x) - one_hot(labels, _classes(x), dtype=x.dtype)), -1)


_sparse_gradient = Operation(
    "sparse_softmax_cross_entropy_gradient",
    _sparse_gradient_forward,
    spec=lambda labels, logits, g: logits,
    gradient=(None, _sparse_second_logits, _sparse_second_cotangent),
)


def _sparse_rule(c: GradientContext, g: Any) -> Any:
    labels, x = c.inputs
    _classes(x)
    return _sparse_gradient(labels, x, g)


_sparse_cross_entropy = Operation(
    "sparse_softmax_cross_entropy",
    _sparse_forward,
    spec=lambda labels, logits: Spec(None if logits.shape is None else logits.shape[:-1], logits.dtype),
    gradient=(None, _sparse_rule),
)


def sparse_softmax_cross_entropy_with_logits(labels: Any, logits: Any) -> Any:
    """Return `-log_softmax(logits)[label]`. `labels`: integers (...); `logits`: (..., classes); returns (...).

    >>> import numpy as np
    >>> loss = sparse_softmax_cross_entropy_with_logits(np.array([0]), np.array([[0.0, 0.0]]))
    >>> abs(float(loss[0]) - float(np.log(2.0))) < 1e-15
    True
    """
    dtype = getattr(labels, "dtype", np.dtype(np.int64))
    if dtype.kind not in "iu":
        raise DTypeError(message("sparse_softmax_cross_entropy_with_logits", "labels are not integers", got=dtype))
    a, b = static_shape(labels), static_shape(logits)
    if a is not None and b is not None and len(a) != len(b) - 1:
        raise ShapeError(message("sparse_softmax_cross_entropy_with_logits", "labels do not fit the logits", b[:-1], a))
    return _sparse_cross_entropy(labels, logits)


def l2_normalize(x: Any, axis: Any = None, epsilon: float = 1e-12) -> Any:
    """Return `x / sqrt(max(sum(x^2), epsilon))`, the sum over `axis`."""
    return x * rsqrt(maximum(sum(square(x), axis, keepdims=True), epsilon))


def moments(x: Any, axes: Any, keepdims: bool = False) -> tuple[Any, Any]:
    """Return mean and variance (divided by m) over `axes`, both with gradients.

    16-bit data is reduced in float32 and the results come back in its dtype. Source: ``tf.nn.moments``.
    """
    dtype = getattr(x, "dtype", None)
    small = dtype is not None and is_small_float(dtype)
    wide = cast(x, np.float32) if small else x
    center = mean(wide, axes, keepdims=True)
    # The deviations are taken from a centre that counts as constant: their mean is zero, so no gradient is lost.
    variance = mean(square(wide - stop_gradient(center)), axes, keepdims=keepdims)
    if not keepdims:
        shape = static_shape(x)
        center = squeeze(center, None if shape is None else axes_of("moments", axes, len(shape)))
    return (cast(center, dtype), cast(variance, dtype)) if small else (center, variance)


def dropout(x: Any, rate: float, noise_shape: Any = None, seed: int | None = None) -> Any:
    """Return `x` with each element set to 0 with probability `rate`, the others scaled by `1 / (1 - rate)`.

    `noise_shape`: sizes of the mask, 1 where it is shared along an axis, None for the size of `x`. The mask comes from
    the seeded generator, in a graph anew at each run. Raises ValueError unless 0 <= rate < 1.
    """
    return x if rate == 0 else x * dropout_mask(x, rate, noise_shape, seed)


_bias_add = Operation(
    "bias_add",
    lambda xp, value, bias: value + bias,
    spec=elementwise(lambda xp, value, bias: value + bias),
    gradient=(lambda c, g: g,),
    broadcasts=True,
    type="BiasAdd",
    doc="Return `value` plus a bias that broadcasts to it.",
)


def bias_add(value: Any, bias: Any, data_format: str | None = None) -> Any:
    """Return `value` plus a vector along its channels: the last axis, or axis 1 with a channels-first `data_format`."""
    if parse_format("bias_add", data_format):
        return _bias_add(value, bias)
    shape = static_shape(value)
    if shape is None:
        raise ShapeError(message("bias_add", "the rank is unknown", do="Give the tensor a shape: t.set_shape(...)."))
    return _bias_add(value, reshape(bias, (-1, *[1] * (len(shape) - 2))))
