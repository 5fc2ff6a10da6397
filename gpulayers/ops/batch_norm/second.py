"""Gradients of the gradients of batch normalisation, written in operations.

With ``n = (x - mean) i``, ``i = 1 / sqrt(var + epsilon)``, ``P u = i (u - M(u) - n M(u n))`` (M the mean over the
reduced axes of a sub-batch), ``S = gamma r`` and ``G = g S``, the first gradients are ``dx = P G``,
``dgamma = sum g (n r + d)``, ``dbeta = sum g``. For cotangents a, b, e of these three:

    dg     = S P a + b (n r + d) + e
    dgamma = sum (P a) g r
    dx     = P(g b r) - i^2 (n K + A M(G n) + M(a n) B)
    A = a - M(a) - n M(a n),  B = G - M(G) - n M(G n),  K = M(a G) - M(a) M(G) - M(a n) M(G n)

P is its own adjoint, which gives the first two; the third differentiates i and n by x. r and d stay constants.
"""

from __future__ import annotations

from typing import Any

from gpulayers.dtypes import parameter_dtype
from gpulayers.errors import GradientError, message
from gpulayers.ops.arithmetic import greater, rsqrt, square, where
from gpulayers.ops.batch_norm import arrays
from gpulayers.ops.operation import GradientContext, Operation, like_first, match
from gpulayers.ops.reductions import mean as mean_of
from gpulayers.ops.reductions import sum as sum_of
from gpulayers.ops.shaping import cast, reshape

__all__ = ["inference_second_gradient", "training_second_gradient"]


class _View:
    """Arrays as ``(rows, sub-batches, ...)`` where there are sub-batches, else as they are, in the working dtype."""

    def __init__(self, x: Any, axis: tuple[int, ...], virtual_batch_size: int | None) -> None:
        sizes = tuple(x.shape)
        self.like, self.split = x, virtual_batch_size is not None
        self.dtype = parameter_dtype(x.dtype)
        self.shape = (virtual_batch_size, -1, *sizes[1:]) if self.split else sizes
        kept = {a + 1 for a in axis} | {1} if self.split else set(axis)
        rank = len(self.shape)
        self.reduced = tuple(a for a in range(rank) if a not in kept)
        self.reduced_to_channels = tuple(a for a in range(rank) if a not in kept or (self.split and a == 1))
        channels = [sizes[a] if a in axis else 1 for a in range(len(sizes))]
        self.table = (1, -1, *channels[1:]) if self.split else tuple(channels)
        self.parameter = (1, 1, *channels[1:]) if self.split else tuple(channels)

    def data(self, value: Any) -> Any:
        """View an array like x."""
        value = cast(value, self.dtype) if value.dtype != self.dtype else value
        return reshape(value, self.shape) if self.split else value

    def per_channel(self, value: Any) -> Any:
        """View C values so that they broadcast."""
        return reshape(cast(value, self.dtype), self.parameter)

    def back(self, value: Any) -> Any:
        """Return a viewed array in the shape and dtype of x."""
        if self.split:
            value = reshape(value, (-1, *tuple(self.like.shape)[1:]))
        return match(value, self.like)

    def average(self, value: Any) -> Any:
        """Return M(value), broadcastable."""
        return mean_of(value, axis=self.reduced, keepdims=True)

    def total(self, value: Any, like: Any) -> Any:
        """Return the sum for each channel, in the shape and dtype of `like`."""
        return match(reshape(sum_of(value, axis=self.reduced_to_channels), tuple(like.shape)), like)


def _passed(
    xp: Any, x: Any, saved: Any, mask: Any, *, axis: tuple[int, ...], virtual_batch_size: int | None, residual: bool
) -> Any:
    groups = 1 if virtual_batch_size is None else max(x.shape[0] // virtual_batch_size, 1)
    return arrays.passed(x, saved, mask, axis=axis, groups=groups, residual=residual)


_relu_passed = Operation(
    "batch_norm_relu_passed",
    _passed,
    spec=like_first,
    kernel=_passed,
    doc="1 where the ReLU behind a batch normalisation let its value pass, else 0: operands x, saved and mask.",
)


def _masked(signs: Any, view: _View, value: Any) -> Any:
    """Return `value` where `signs`, an array like x, is positive, else 0; all of it where there are no signs."""
    return value if signs is None else where(greater(view.data(signs), 0), value, 0.0)


def _sum(*terms: Any) -> Any:
    present = [term for term in terms if term is not None]
    total = present[0]
    for term in present[1:]:
        total = total + term
    return total


def _ordered(c: GradientContext, given: tuple[str, ...], first: list[Any], dgamma: Any) -> tuple[Any, ...]:
    return (*first, *[dgamma if name == "gamma" else None for name in given])


def training_second_gradient(c: GradientContext, a: Any, b: Any, e: Any, of_residual: Any = None) -> tuple[Any, ...]:
    """Return gradients for (g, x, saved, and what `given` names); raises GradientError where there were weights."""
    given = c["given"]
    if "weights" in given:
        raise GradientError(message("batch_norm_training_gradient", "has no gradient of its own where there is a mask"))
    named = dict(zip(given, c.inputs[3:], strict=True))
    view = _View(c.x, c["axis"], c["virtual_batch_size"])
    saved = c.inputs[2]
    table = [reshape(saved[i], view.table) for i in range(tuple(saved.shape)[0])]
    i, r, d = table[2], (table[3] if len(table) == 5 else None), (table[4] if len(table) == 5 else None)
    x = view.data(c.inputs[1])
    n = ((x - table[0]) - table[1]) * i
    passed = None
    if "mask" in named:
        options = {name: c[name] for name in ("axis", "virtual_batch_size", "residual")}
        passed = _relu_passed(c.inputs[1], saved, named["mask"], **options)
    g = _masked(passed, view, view.data(c.inputs[0]))
    scale = view.per_channel(named["gamma"]) if "gamma" in named else None
    s = _product(scale, r)
    big_g = g if s is None else g * s

    def centred(u: Any) -> Any:
        return u - view.average(u) - n * view.average(u * n)

    dg, dx, dgamma = [], [], None
    if a is not None:
        a = view.data(a)
        projected, a_n, g_n = centred(a), view.average(a * n), view.average(big_g * n)
        dg.append(i * projected if s is None else i * projected * s)
        k = view.average(a * big_g) - view.average(a) * view.average(big_g) - a_n * g_n
        dx.append(-square(i) * (n * k + projected * g_n + a_n * centred(big_g)))
        if scale is not None:
            dgamma = view.total(i * projected * g if r is None else i * projected * g * r, named["gamma"])
    if b is not None:
        b = view.per_channel(b)
        dg.append(b * (n if r is None else n * r + d))
        dx.append(i * centred(g * b if r is None else g * b * r))
    if e is not None:
        dg.append(view.per_channel(e) + g * 0)
    if of_residual is not None:
        dg.append(view.data(of_residual))
    dg = view.back(_masked(passed, view, _sum(*dg)))
    return _ordered(c, given, [dg, view.back(_sum(*dx)) if dx else None, None], dgamma)


def _product(scale: Any, r: Any) -> Any:
    if scale is None or r is None:
        return r if scale is None else scale
    return scale * r


def inference_second_gradient(c: GradientContext, a: Any, b: Any, e: Any, of_residual: Any = None) -> tuple[Any, ...]:
    """Return gradients for (g, x, mean, variance, and what `given` names): everything is linear in g there."""
    given = c["given"]
    named = dict(zip(given, c.inputs[4:], strict=True))
    view = _View(c.inputs[1], c["axis"], None)
    i = rsqrt(view.per_channel(c.inputs[3]) + c["epsilon"])
    g, x = _masked(named.get("y"), view, view.data(c.inputs[0])), view.data(c.inputs[1])
    dg, dx, dgamma = [], None, None
    if a is not None:
        a = view.data(a)
        dg.append(a * i * view.per_channel(named["gamma"]) if "gamma" in named else a * i)
        dgamma = view.total(a * g * i, named["gamma"]) if "gamma" in named else None
    if b is not None:
        b = view.per_channel(b)
        dg.append(b * (x - view.per_channel(c.inputs[2])) * i)
        dx = view.back(b * g * i)
    if e is not None:
        dg.append(view.per_channel(e) + g * 0)
    if of_residual is not None:
        dg.append(view.data(of_residual))
    dg = view.back(_masked(named.get("y"), view, _sum(*dg)))
    return _ordered(c, given, [dg, dx, None, None], dgamma)
