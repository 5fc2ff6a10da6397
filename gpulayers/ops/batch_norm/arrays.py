"""Batch normalisation of plain arrays: forward, backward, inference, its backward, and statistics alone.

No layers, no tapes, no variables: arrays in, arrays out, for the operations built on top and for people who want the
fused kernels only. NumPy arrays are worked on by NumPy, device arrays by the kernels of ``kernels/batch_norm*.cu``.

Shapes. `x` has any rank; `axis` names the axes that are *kept* (the channels, C in all), every other axis is averaged
over. Per-channel arguments hold C values in any shape (they are read flat); with several axes the values are in the
order of the axes in memory, whatever order `axis` has. Per-channel results are 1-D, of length C, except those that say
(groups, C). With ``groups = G > 1`` row i of axis 0 belongs to sub-batch ``i mod G``, and every sub-batch is
normalised by itself. An array whose kept axes do not lie side by side is copied once,
transposed; in training a large one on NumPy is not.

Dtypes. float16, bfloat16, float32 or float64 `x`; outputs have x's dtype. Arithmetic, statistics and per-channel
results are float32 for 16-bit x, else x's dtype. Sums are taken around a pivot, never as E[x^2] - E[x]^2.
Deterministic: same bits on every run.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import numpy as np

from gpulayers.device import array_module
from gpulayers.dtypes import is_floating, parameter_dtype
from gpulayers.errors import DTypeError, ShapeError, message
from gpulayers.ops.batch_norm import numpy_body
from gpulayers.ops.batch_norm import weighted as batch_norm_weighted
from gpulayers.ops.batch_norm.layout import Layout, collapse
from gpulayers.ops.batch_norm.moving import MovingStatistics, Renorm

__all__ = [
    "Forward",
    "Gradients",
    "MovingStatistics",
    "Prepared",
    "Renorm",
    "backward",
    "forward",
    "inference",
    "inference_backward",
    "passed",
    "statistics",
]


class Forward(NamedTuple):
    """What a training step returns.

    `y`: shape and dtype of x. `mean`, `variance`: (C,), the batch moments, biased, averaged over sub-batches.
    `saved`: what `backward` needs, shape (3, groups, C): pivot, mean - pivot, 1 / sqrt(variance + epsilon); with
    renorm (5, groups, C), then also r and d. `mask`: what `backward` needs of an activation, flat, uint8, not meant to
    be read: on NumPy and with weights the bytes of y (no copy), on a device less: the factors that give y again, or
    with a residual one bit for each element of 16-bit types, two of float32, four of float64; None without activation.
    """

    y: Any
    mean: Any
    variance: Any
    saved: Any
    mask: Any = None


class Gradients(NamedTuple):
    """`dx`: shape and dtype of x. `dgamma`, `dbeta`: (C,). `dresidual`: shape and dtype of x, or None without
    residual.
    """

    dx: Any
    dgamma: Any
    dbeta: Any
    dresidual: Any


def forward(
    x: Any,
    gamma: Any,
    beta: Any,
    *,
    axis: tuple[int, ...],
    epsilon: float = 1e-3,
    groups: int = 1,
    weights: Any = None,
    renorm: Renorm | None = None,
    residual: Any = None,
    activation: str | None = None,
    moving: MovingStatistics | None = None,
) -> Forward:
    """Normalise `x` with its own statistics: ``y = activation((n r + d) gamma + beta + residual)``.

    ``n = (x - mean) / sqrt(variance + epsilon)``, the variance biased (divided by the count), per channel and
    sub-batch.

    Parameters: `x`, contiguous or not; `gamma`, `beta`, C values or None (1 and 0); `axis`, the kept axes; `epsilon`
    > 0 or 0; `groups`, see the module; `weights`, broadcastable to x, frequencies of the values in the moments (0
    leaves one out, NaN included; all are normalised still); `renorm`, the old renorm statistics and clips, from which
    r and d are made (see `Renorm`); `residual`, like x; `activation`, None or ``"relu"``; `moving`, statistics to
    update in place in the same kernel (see `MovingStatistics`).

    Returns `Forward`. One value per channel has variance 0, so y = beta (plus residual). An empty x gives an empty y,
    zeros for the moments, and leaves `moving` alone. A channel with an infinity or NaN becomes NaN; no other channel
    does.

    Raises DTypeError for a dtype that is not floating (of moving statistics too), an unknown activation, or groups
    that are no integer; ShapeError for a bad axis, groups that do not divide the batch, arguments of the wrong size, or
    moving statistics that are not contiguous.

    Source: arXiv 1502.03167, algorithm 1; 1702.03275, algorithm 1 (renorm). Against float64 at mean / sigma = 1e4 a
    float32 variance is within 1e-5 relative, the output within 2e-6.

    >>> x = np.array([[3.0], [5.0]], np.float32)
    >>> forward(x, None, None, axis=(1,), epsilon=0.0).y
    array([[-1.],
           [ 1.]], dtype=float32)
    """
    xp, layout, dtype = _prepare(x, axis, groups)
    relu = _is_relu(activation)
    _check(x, layout, residual, gamma, beta, *_statistics_of(renorm, moving))
    if _in_pieces(xp, x, layout, weights):
        view = batch_norm_weighted.view_of(x, axis, groups, weights, dtype)
        result = batch_norm_weighted.forward(xp, x, view, gamma, beta, epsilon, renorm, residual, relu, moving, dtype)
        y = result[0]
    else:
        x_c, residual_c = _collapsed(xp, x, layout), _collapsed(xp, residual, layout)
        result = _body(xp).forward(x_c, layout, gamma, beta, epsilon, renorm, residual_c, relu, moving, dtype)
        y = _expanded(xp, result[0], x, layout)
    mask = result[4] if len(result) == 5 else None
    if relu and mask is None:
        mask = y.reshape(-1).view("uint8")
    return Forward(y, *result[1:4], mask)


def backward(
    dy: Any,
    x: Any,
    gamma: Any,
    saved: Any,
    *,
    axis: tuple[int, ...],
    groups: int = 1,
    weights: Any = None,
    mask: Any = None,
    y: Any = None,
    activation: str | None = None,
    residual: bool = False,
) -> Gradients:
    """Return the gradients of a training step, through the mean and the variance; renorm's r and d are constants.

    With ``g = dy`` (where y > 0, with ReLU), ``n`` the normalised value, M the mean over a sub-batch and ``G = g
    gamma r``: ``dx = (G - M(G) - n M(G n)) / sqrt(variance + epsilon)``, ``dgamma = sum g (n r + d)``, ``dbeta = sum
    g``.

    Parameters: `dy`, like x; `x`, `gamma`, `axis`, `groups`, `weights`, `activation` as given to `forward`; `saved`
    from it; `mask` from it, or else `y`, its output, with an activation (a device has less to read with `mask`);
    `residual`, whether there was one.

    Returns `Gradients`. `dresidual` is `dy` itself (not a copy) where there was no activation. dgamma and dbeta come
    even where gamma was None.

    >>> x = np.array([[3.0], [5.0], [4.0]])
    >>> f = forward(x, None, None, axis=(1,))
    >>> backward(np.ones_like(x), x, None, f.saved, axis=(1,)).dbeta
    array([3.])
    """
    xp, layout, dtype = _prepare(x, axis, groups)
    _check(x, layout, dy, gamma)
    _check_saved(saved, layout)
    y, mask = _relu_signs(activation, x, layout, y, mask, xp is np or weights is not None, residual)
    if _in_pieces(xp, x, layout, weights):
        view = batch_norm_weighted.view_of(x, axis, groups, weights, dtype)
        return Gradients(*batch_norm_weighted.backward(xp, dy, x, view, gamma, saved, y, residual, dtype))
    x_c, dy_c, y_c = (_collapsed(xp, v, layout) for v in (x, dy, y))
    more = () if mask is None else (mask,)
    result = _body(xp).backward(dy_c, x_c, layout, gamma, saved, y_c, residual, dtype, *more)
    return _gradients(xp, result, dy, dy_c, x, layout)


def passed(x: Any, saved: Any, mask: Any, *, axis: tuple[int, ...], groups: int = 1, residual: bool = False) -> Any:
    """Return 1 where the ReLU of `forward` let its value pass, else 0, in an array like x.

    `saved`, `mask` as `forward` returned them (it had no weights); `residual`, whether there was one.

    >>> x = np.array([[3.0], [5.0]])
    >>> f = forward(x, None, None, axis=(1,), activation="relu")
    >>> passed(x, f.saved, f.mask, axis=(1,))
    array([[0.],
           [1.]])
    """
    xp, layout, dtype = _prepare(x, axis, groups)
    _check_saved(saved, layout)
    y, mask = _relu_signs("relu", x, layout, None, mask, xp is np, residual)
    if mask is None:
        return (y > 0).astype(x.dtype)
    x_c = _collapsed(xp, x, layout)
    return _expanded(xp, _body(xp).passed(x_c, layout, saved, dtype, mask), x, layout)


def inference(
    x: Any,
    gamma: Any,
    beta: Any,
    moving_mean: Any,
    moving_variance: Any,
    *,
    axis: tuple[int, ...],
    epsilon: float = 1e-3,
    residual: Any = None,
    activation: str | None = None,
) -> Any:
    """Normalise `x` with given statistics.

    ``y = activation((x - mean) / sqrt(variance + epsilon) gamma + beta + residual)``.
    Arguments as for `forward`; `moving_mean`, `moving_variance`: C values each. Returns an array like x. Raises as
    `forward`.

    >>> inference(np.array([[3.0]]), None, None, np.array([1.0]), np.array([4.0]), axis=(1,), epsilon=0.0)
    array([[1.]])
    """
    xp, layout, dtype = _prepare(x, axis, 1)
    relu = _is_relu(activation)
    _check(x, layout, residual, gamma, beta, moving_mean, moving_variance)
    y = _body(xp).inference(
        _collapsed(xp, x, layout),
        layout,
        gamma,
        beta,
        moving_mean,
        moving_variance,
        epsilon,
        _collapsed(xp, residual, layout),
        relu,
        dtype,
    )
    return _expanded(xp, y, x, layout)


def inference_backward(
    dy: Any,
    x: Any,
    gamma: Any,
    moving_mean: Any,
    moving_variance: Any,
    *,
    axis: tuple[int, ...],
    epsilon: float = 1e-3,
    beta: Any = None,
    y: Any = None,
    activation: str | None = None,
    residual: bool = False,
) -> Gradients:
    """Return the gradients of `inference`, the statistics being constants: ``dx = g gamma / sqrt(variance + epsilon)``.

    Arguments and result as for `backward`. `y`, the output, is required with an activation on NumPy and where there was
    a residual; on a device it can be left out else: then its sign is computed again, from `beta` as `inference` had it.
    """
    xp, layout, dtype = _prepare(x, axis, 1)
    _check(x, layout, dy, gamma, beta, moving_mean, moving_variance)
    recompute = y is None and xp is not np and _is_relu(activation) and not residual
    y = None if recompute else _relu_output(activation, y, x)
    x_c, dy_c, y_c = (_collapsed(xp, v, layout) for v in (x, dy, y))
    more = (beta, True) if recompute else ()
    result = _body(xp).inference_backward(
        dy_c, x_c, layout, gamma, moving_mean, moving_variance, epsilon, y_c, residual, dtype, *more
    )
    return _gradients(xp, result, dy, dy_c, x, layout)


def statistics(x: Any, *, axis: tuple[int, ...], groups: int = 1, weights: Any = None) -> tuple[Any, Any]:
    """Return the mean and the biased variance of every channel: (C,) each, or (groups, C) with several groups.

    >>> statistics(np.array([[1.0, 2.0], [3.0, 6.0]]), axis=(1,))
    (array([2., 4.]), array([1., 4.]))
    """
    xp, layout, dtype = _prepare(x, axis, groups)
    if _in_pieces(xp, x, layout, weights):
        view = batch_norm_weighted.view_of(x, axis, groups, weights, dtype)
        mean, variance = (v.astype(dtype, copy=False) for v in batch_norm_weighted.moments(xp, x, view, dtype))
    else:
        mean, variance = _body(xp).statistics(_collapsed(xp, x, layout), layout, dtype)
    return (mean[0], variance[0]) if groups == 1 else (mean, variance)


class Prepared:
    """A layout worked out once, for many calls with arrays like `x`: same module, shape and dtype, kept axes `axis`."""

    def __init__(self, x: Any, axis: tuple[int, ...]) -> None:
        self._xp, self._layout, self._dtype = _prepare(x, axis, 1)
        self._implementation = _body(self._xp)
        only_y = {} if self._xp is np else {"only_y": True}  # on a device every further result is an allocation
        self._forward = functools.partial(self._implementation.forward, **only_y)

    def inference(self, x: Any, gamma: Any, beta: Any, mean: Any, variance: Any, epsilon: float, relu: bool) -> Any:
        """As the function `inference`, without residual and without checks."""
        layout, x_c = self._layout, _collapsed(self._xp, x, self._layout)
        y = self._implementation.inference(x_c, layout, gamma, beta, mean, variance, epsilon, None, relu, self._dtype)
        return _expanded(self._xp, y, x, layout)

    def forward(self, x: Any, gamma: Any, beta: Any, epsilon: float, relu: bool, moving: Any) -> Any:
        """As the function `forward`, without residual and without checks; returns y only."""
        layout, x_c = self._layout, _collapsed(self._xp, x, self._layout)
        result = self._forward(x_c, layout, gamma, beta, epsilon, None, None, relu, moving, self._dtype)
        return _expanded(self._xp, result[0], x, layout)


@functools.cache
def _body(xp: Any) -> Any:
    """Return the module with the body for arrays of module `xp`."""
    if xp is np:
        return numpy_body
    from gpulayers.ops.batch_norm import kernels  # imports the launcher: only where there is a device array

    return kernels


def _prepare(x: Any, axis: tuple[int, ...], groups: int) -> tuple[Any, Layout, Any]:
    """Return the array module, the layout and the working dtype."""
    dtype = _WORKING.get(x.dtype)
    if dtype is None:
        if not is_floating(x.dtype):
            raise DTypeError(
                message("batch_norm", "input is not floating", "float16, bfloat16, float32 or float64", x.dtype)
            )
        dtype = _WORKING[x.dtype] = parameter_dtype(x.dtype)
    if type(groups) is not int:
        groups = _index(groups)
    return array_module(x), collapse(x.shape, tuple(axis), groups), dtype


def _index(groups: Any) -> int:
    try:
        return operator.index(groups)
    except TypeError as error:
        raise DTypeError(message("batch_norm", "groups is not an integer", "an int", repr(groups))) from error


_WORKING: dict[Any, Any] = {}  # dtype of x -> dtype of the arithmetic, filled as dtypes are met


TRANSPOSED_BYTES = 16 << 20
"""Up to this size NumPy arrays are copied where their kept axes do not lie side by side: backward holds four copies."""


def _in_pieces(xp: Any, x: Any, layout: Layout, weights: Any) -> bool:
    """Say whether the body that works in pieces takes this: where there are weights, or copies would be large."""
    if weights is not None:
        return bool(x.size)
    return layout.order is not None and xp is np and x.nbytes > TRANSPOSED_BYTES


def _is_relu(activation: str | None) -> bool:
    if activation not in (None, "relu"):
        raise DTypeError(message("batch_norm", "unknown activation", "None or 'relu'", repr(activation)))
    return activation is not None


def _relu_output(activation: str | None, y: Any, x: Any) -> Any:
    """Return `y` if there is an activation (its shape checked), else None."""
    if not _is_relu(activation):
        return None
    if y is None or y.shape != x.shape:
        got = None if y is None else y.shape
        raise ShapeError(message("batch_norm", "the gradient of relu needs the output y, or the mask", x.shape, got))
    return y


def _relu_signs(
    activation: str | None, x: Any, layout: Layout, y: Any, mask: Any, whole: bool, residual: bool
) -> tuple[Any, Any]:
    """Return (y, mask) with at most one not None: what tells where the ReLU let values pass.

    `whole` says that masks hold y here. A mask comes back as the kernels take it.
    """
    if y is not None or mask is None or not _is_relu(activation):
        return _relu_output(activation, y, x), None
    size, dtype = x.nbytes, _WORKING[x.dtype]
    if not whole:
        size = (size if mask.size == size else size // 16) if residual else 2 * layout.slots * dtype.itemsize
    if mask.dtype != np.uint8 or mask.size != size:
        wanted, got = f"the mask that forward returned, {size} bytes", f"{mask.size} of {mask.dtype}"
        raise ShapeError(message("batch_norm", "the mask does not belong to this input", wanted, got))
    if whole or (residual and size == x.nbytes):
        return mask.view(x.dtype).reshape(x.shape), None
    return None, mask if residual else mask.view(dtype)


def _check(x: Any, layout: Layout, like_x: Any, *per_channel: Any) -> None:
    if like_x is not None and like_x.shape != x.shape:
        raise ShapeError(message("batch_norm", "residual or gradient has another shape", x.shape, like_x.shape))
    for values in per_channel:
        if values is not None and values.size != layout.channels:
            raise ShapeError(
                message("batch_norm", "wrong number of values", f"{layout.channels} channels", values.shape)
            )


def _statistics_of(renorm: Renorm | None, moving: MovingStatistics | None) -> list[Any]:
    """Return the per-channel arrays of both, where there are any; those to write into have been checked for that."""
    found = [] if renorm is None else [renorm.mean, renorm.stddev]
    if moving is not None:
        written = [moving.mean, moving.variance, moving.stddev, moving.renorm_mean, moving.renorm_stddev]
        for values in written:
            if values is not None and not (values.flags.c_contiguous and values.dtype in _WORKING):
                _check_written(values)
        found += written
    return found


def _check_written(values: Any) -> None:
    if not is_floating(values.dtype):
        raise DTypeError(message("batch_norm", "moving statistics are not floating", "a floating dtype", values.dtype))
    if not values.flags.c_contiguous:
        raise ShapeError(
            message(
                "batch_norm",
                "moving statistics are not contiguous, and could not be updated in place",
                "C-contiguous arrays",
                f"shape {values.shape}, strides {values.strides}",
                "Pass a copy, and read the new values from it.",
            )
        )


def _check_saved(saved: Any, layout: Layout) -> None:
    if saved.ndim != 3 or saved.shape[0] not in (3, 5) or saved.shape[1:] != layout[1:4:2]:
        wanted = f"(3 or 5, {layout.groups} groups, {layout.channels} channels)"
        raise ShapeError(message("batch_norm", "`saved` does not belong to this input", wanted, tuple(saved.shape)))


def _collapsed(xp: Any, array: Any, layout: Layout) -> Any:
    """Return `array` contiguous, its kept axes side by side."""
    if array is None:
        return None
    if layout.order is not None:
        array = array.transpose(layout.order)
    return array if array.flags.c_contiguous else xp.ascontiguousarray(array)


def _expanded(xp: Any, array: Any, x: Any, layout: Layout) -> Any:
    """Undo `_collapsed`: return a contiguous array of x's shape."""
    if layout.order is None:
        return array
    inverse = tuple(layout.order.index(a) for a in range(x.ndim))
    return xp.ascontiguousarray(array.reshape([x.shape[a] for a in layout.order]).transpose(inverse))


def _gradients(xp: Any, result: tuple[Any, ...], dy: Any, dy_c: Any, x: Any, layout: Layout) -> Gradients:
    dx, dgamma, dbeta, dresidual = result
    if dresidual is dy_c:
        dresidual = dy
    elif dresidual is not None:
        dresidual = _expanded(xp, dresidual, x, layout)
    return Gradients(_expanded(xp, dx, x, layout), dgamma, dbeta, dresidual)
