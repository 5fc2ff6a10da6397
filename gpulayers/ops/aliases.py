"""TensorFlow's names for the operations, with its argument names and their order. Names only: no logic lives here.

`TOP` holds what stands at the top of TensorFlow (``tf.reduce_mean``), `NN` what stands in ``tf.nn``. Where names,
order and defaults are the same in both worlds the operation itself is listed.

`name` keeps its place in the order and names nothing: a node is named after its type, within the scope in force.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpulayers import ops
from gpulayers.ops.operation import Recordable

__all__ = ["NN", "TOP"]


def _reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    def alias(input_tensor: Any, axis: Any = None, keepdims: bool = False, name: str | None = None) -> Any:
        return function(input_tensor, axis, keepdims=keepdims)

    return _named(alias, function)


def _unary(function: Callable[..., Any]) -> Callable[..., Any]:
    def alias(x: Any, name: str | None = None) -> Any:
        return function(x)

    return _named(alias, function)


def _binary(function: Callable[..., Any]) -> Callable[..., Any]:
    def alias(x: Any, y: Any, name: str | None = None) -> Any:
        return function(x, y)

    return _named(alias, function)


def _named(alias: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    alias.__name__ = alias.__qualname__ = function.__name__
    alias.__doc__ = function.__doc__
    return alias


def _arg(function: Callable[..., Any]) -> Callable[..., Any]:
    def alias(input: Any, axis: int | None = None, output_type: Any = np.int64, name: str | None = None) -> Any:
        return ops.cast(function(input, 0 if axis is None else axis), output_type)

    return _named(alias, function)


def matmul(a: Any, b: Any, transpose_a: bool = False, transpose_b: bool = False, name: str | None = None) -> Any:
    """Return the matrix product of `a` and `b`, either transposed in its last two axes if asked for."""
    return ops.matmul(ops.swapaxes(a, -1, -2) if transpose_a else a, ops.swapaxes(b, -1, -2) if transpose_b else b)


def concat(values: Any, axis: int, name: str | None = None) -> Any:
    """Return `values` joined along `axis`."""
    return ops.concatenate(values, axis)


def stack(values: Any, axis: int = 0, name: str | None = None) -> Any:
    """Return `values` joined along a new axis."""
    return ops.stack(values, axis)


def unstack(value: Any, num: int | None = None, axis: int = 0, name: str | None = None) -> list[Any]:
    """Return the slices of `value` along `axis`."""
    return ops.unstack(value, axis, num)


def split(value: Any, num_or_size_splits: Any, axis: int = 0, num: int | None = None, name: str | None = None) -> Any:
    """Cut `value` into a number of equal pieces, or into pieces of the given sizes (one of them may be -1)."""
    if hasattr(num_or_size_splits, "__index__"):
        return ops.split(value, int(num_or_size_splits), axis)
    return ops.split_sizes(value, num_or_size_splits, axis)


def expand_dims(input: Any, axis: int, name: str | None = None) -> Any:
    """Return `input` with a new axis of size 1."""
    return ops.expand_dims(input, axis)


def squeeze(input: Any, axis: Any = None, name: str | None = None) -> Any:
    """Return `input` without axes of size 1."""
    return ops.squeeze(input, axis or None if isinstance(axis, list | tuple) else axis)


def reshape(tensor: Any, shape: Any, name: str | None = None) -> Any:
    """Return `tensor` in another shape."""
    return ops.reshape(tensor, shape)


def transpose(a: Any, perm: Any = None, name: str | None = None) -> Any:
    """Return `a` with its axes in the order `perm`."""
    return ops.transpose(a, perm)


def cast(x: Any, dtype: Any, name: str | None = None) -> Any:
    """Return `x` in another dtype."""
    return ops.cast(x, dtype)


def shape(input: Any, out_type: Any = np.int32, name: str | None = None) -> Any:
    """Return the shape of `input` as a vector."""
    return ops.cast(ops.shape_of(input), out_type)


def size(input: Any, out_type: Any = np.int32, name: str | None = None) -> Any:
    """Return the number of elements of `input`."""
    return ops.cast(ops.size(input), out_type)


def rank(input: Any, name: str | None = None) -> Any:
    """Return the number of axes of `input`."""
    return ops.rank(input)


def fill(dims: Any, value: Any, name: str | None = None) -> Any:
    """Return an array of shape `dims` full of `value`."""
    return ops.full(dims, value)


def range(start: Any, limit: Any = None, delta: Any = 1, dtype: Any = None, name: str | None = None) -> Any:
    """Return the numbers from `start` up to, but without, `limit`; one argument is the limit."""
    return ops.arange(start, limit, delta, dtype)


def clip_by_value(t: Any, clip_value_min: Any, clip_value_max: Any, name: str | None = None) -> Any:
    """Return `t` limited to ``[clip_value_min, clip_value_max]``."""
    return ops.clip(t, clip_value_min, clip_value_max)


def where(condition: Any, x: Any = None, y: Any = None, name: str | None = None) -> Any:
    """Return `x` where `condition` is true, else `y`."""
    return ops.where(condition, x, y)


def gather(params: Any, indices: Any, axis: int = 0, name: str | None = None) -> Any:
    """Return the slices of `params` along `axis` that `indices` name."""
    return ops.gather(params, indices, axis)


def tile(input: Any, multiples: Any, name: str | None = None) -> Any:
    """Return `input` repeated."""
    return ops.tile(input, multiples)


def repeat(input: Any, repeats: int, axis: int | None = None, name: str | None = None) -> Any:
    """Return `input` with each element repeated."""
    return ops.repeat(input, repeats, axis)


def pad(tensor: Any, paddings: Any, mode: str = "CONSTANT", constant_values: Any = 0, name: str | None = None) -> Any:
    """Return `tensor` with a constant around it."""
    return ops.pad(tensor, paddings, mode, constant_values=constant_values)


def boolean_mask(tensor: Any, mask: Any, axis: int = 0, name: str | None = None) -> Any:
    """Return the parts of `tensor` where `mask` is true."""
    return ops.boolean_mask(tensor, mask, axis)


def reverse(tensor: Any, axis: Any, name: str | None = None) -> Any:
    """Return `tensor` in reverse order along `axis`."""
    return ops.flip(tensor, axis)


def roll(input: Any, shift: Any, axis: Any, name: str | None = None) -> Any:
    """Return `input` moved along `axis`."""
    return ops.roll(input, shift, axis)


def broadcast_to(input: Any, shape: Any, name: str | None = None) -> Any:
    """Return `input` stretched to `shape`."""
    return ops.broadcast_to(input, shape)


def one_hot(
    indices: Any,
    depth: int,
    on_value: Any = 1,
    off_value: Any = 0,
    axis: int = -1,
    dtype: Any = np.float32,
    name: str | None = None,
) -> Any:
    """Return `on_value` where the place along a new axis is the index, `off_value` elsewhere."""
    return ops.one_hot(indices, depth, on_value, off_value, axis, dtype)


def eye(num_rows: int, num_columns: int | None = None, dtype: Any = np.float32, name: str | None = None) -> Any:
    """Return a matrix with ones on its diagonal."""
    return ops.eye(num_rows, num_columns, dtype=dtype)


def cumsum(x: Any, axis: int = 0, name: str | None = None) -> Any:
    """Return the running sum along `axis`."""
    return ops.cumsum(x, axis)


def tensordot(a: Any, b: Any, axes: Any, name: str | None = None) -> Any:
    """Return the sum of products over pairs of axes."""
    return ops.tensordot(a, b, axes)


def convert_to_tensor(value: Any, dtype: Any = None, dtype_hint: Any = None, name: str | None = None) -> Any:
    """Return numbers, lists or an array as an array of the default device (in a graph, as a tensor)."""
    if not isinstance(value, Recordable):
        return ops.constant(value, dtype)
    return ops.identity(value) if dtype is None else ops.cast(value, dtype)


def add_n(inputs: Any, name: str | None = None) -> Any:
    """Return the sum of arrays of one shape."""
    return ops.sum(ops.stack(inputs), 0)


TOP: dict[str, Callable[..., Any]] = {
    **{f"reduce_{name}": _reduce(getattr(ops, name)) for name in ("mean", "sum", "max", "min", "prod", "all", "any")},
    "reduce_logsumexp": _reduce(ops.logsumexp),
    "reduce_std": _reduce(ops.std),
    "reduce_variance": _reduce(ops.var),
    **{name: _unary(getattr(ops, name)) for name in (
        "abs ceil cos erf exp expm1 floor identity log log1p logical_not negative ones_like reciprocal rint rsqrt "
        "sigmoid sign sin sqrt square stop_gradient tanh zeros_like"
    ).split()},
    "is_finite": _unary(ops.isfinite),
    "is_inf": _unary(ops.isinf),
    "is_nan": _unary(ops.isnan),
    "round": _unary(ops.rint),
    **{name: _binary(getattr(ops, name)) for name in (
        "add divide equal greater greater_equal less less_equal logical_and logical_or logical_xor maximum minimum "
        "multiply not_equal pow subtract"
    ).split()},
    "floordiv": _binary(ops.floor_divide),
    "floormod": _binary(ops.remainder),
    "truediv": _binary(ops.divide),
    "argmax": _arg(ops.argmax),
    "argmin": _arg(ops.argmin),
    **{function.__name__: function for function in (
        add_n, boolean_mask, broadcast_to, cast, clip_by_value, concat, convert_to_tensor, cumsum, expand_dims,
        eye, fill, gather, matmul,
        one_hot, pad, range, rank, repeat, reshape, reverse, roll, shape, size, split, squeeze, stack, tensordot, tile,
        transpose, unstack, where,
    )},
    **{name: getattr(ops, name) for name in (
        "constant einsum ones random_normal random_uniform truncated_normal zeros"
    ).split()},
}  # fmt: skip
"""Names at the top."""


def _channel_free(value: Any, data_format: str | None) -> Any:
    """Return the spatial entries of TensorFlow's strides or sizes, which may have entries for batch and channels."""
    if hasattr(value, "__index__") or len(value) != 4:
        return value
    return value[2:] if data_format == "NCHW" else value[1:3]


def conv2d(
    input: Any,
    filters: Any,
    strides: Any,
    padding: str,
    data_format: str = "NHWC",
    dilations: Any = 1,
    name: str | None = None,
) -> Any:
    """Slide `filters` (height, width, channels, count) over `input`. Strides: one, two, or four integers."""
    steps, gaps = _channel_free(strides, data_format), _channel_free(dilations, data_format)
    return ops.convolution(input, filters, steps, padding, data_format, gaps)


def _pool(function: Callable[..., Any]) -> Callable[..., Any]:
    def alias(
        input: Any, ksize: Any, strides: Any, padding: str, data_format: str = "NHWC", name: str | None = None
    ) -> Any:
        sizes, steps = _channel_free(ksize, data_format), _channel_free(strides, data_format)
        return function(input, sizes, steps, padding, data_format)

    return _named(alias, function)


def bias_add(value: Any, bias: Any, data_format: str | None = None, name: str | None = None) -> Any:
    """Return `value` plus a vector along its channels."""
    return ops.bias_add(value, bias, data_format)


def dropout(x: Any, rate: float, noise_shape: Any = None, seed: int | None = None, name: str | None = None) -> Any:
    """Return `x` with each element set to 0 with probability `rate`, the others scaled up."""
    return ops.dropout(x, rate, noise_shape, seed)


def l2_normalize(x: Any, axis: Any = None, epsilon: float = 1e-12, name: str | None = None) -> Any:
    """Return `x` divided by its length over `axis`."""
    return ops.l2_normalize(x, axis, epsilon)


def leaky_relu(features: Any, alpha: float = 0.2, name: str | None = None) -> Any:
    """Return `features` where positive, else `alpha` times them."""
    return ops.leaky_relu(features, alpha)


def moments(x: Any, axes: Any, shift: Any = None, keepdims: bool = False, name: str | None = None) -> tuple[Any, Any]:
    """Return mean and variance over `axes`; `shift` is accepted and not needed."""
    return ops.moments(x, axes, keepdims)


def _softmax(function: Callable[..., Any]) -> Callable[..., Any]:
    def alias(logits: Any, axis: int | None = None, name: str | None = None) -> Any:
        return function(logits, -1 if axis is None else axis)

    return _named(alias, function)


def softmax_cross_entropy_with_logits(labels: Any, logits: Any, axis: int = -1, name: str | None = None) -> Any:
    """Return the cross entropy of `labels` and the softmax of `logits` along `axis`."""
    if axis != -1:
        labels, logits = ops.moveaxis(labels, axis, -1), ops.moveaxis(logits, axis, -1)
    return ops.softmax_cross_entropy_with_logits(labels, logits)


def _cross_entropy(function: Callable[..., Any]) -> Callable[..., Any]:
    def alias(labels: Any, logits: Any, name: str | None = None) -> Any:
        return function(labels, logits)

    return _named(alias, function)


def gelu(features: Any, approximate: bool = False, name: str | None = None) -> Any:
    """Return `x F(x)` with F the normal distribution function."""
    return ops.gelu(features, approximate)


NN: dict[str, Callable[..., Any]] = {
    **{name: _unary(getattr(ops, name)) for name in (
        "elu relu relu6 selu sigmoid silu softplus softsign swish tanh"
    ).split()},
    "avg_pool2d": _pool(ops.avg_pool),
    "max_pool2d": _pool(ops.max_pool),
    "softmax": _softmax(ops.softmax),
    "log_softmax": _softmax(ops.log_softmax),
    "sigmoid_cross_entropy_with_logits": _cross_entropy(ops.sigmoid_cross_entropy_with_logits),
    "sparse_softmax_cross_entropy_with_logits": _cross_entropy(ops.sparse_softmax_cross_entropy_with_logits),
    **{function.__name__: function for function in (
        bias_add, conv2d, dropout, gelu, l2_normalize, leaky_relu, moments, softmax_cross_entropy_with_logits,
    )},
}  # fmt: skip
"""Names in ``nn``."""
