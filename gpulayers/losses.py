"""Losses: functions that return one value for each sample, and classes that weight and reduce them.

``N`` is any leading axes, ``C`` the classes. Cross-entropies are stable from logits (``from_logits=True``); from
probabilities they are limited to ``[1e-7, 1 - 1e-7]`` first, as in Keras.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpulayers import ops
from gpulayers.device import asarray, is_array
from gpulayers.dtypes import is_floating
from gpulayers.errors import ShapeError, message
from gpulayers.ops.operation import Recordable

__all__ = [
    "BinaryCrossentropy",
    "CategoricalCrossentropy",
    "Huber",
    "Loss",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "SparseCategoricalCrossentropy",
    "binary_crossentropy",
    "categorical_crossentropy",
    "huber",
    "mean_absolute_error",
    "mean_squared_error",
    "sparse_categorical_crossentropy",
]

EPSILON = 1e-7
REDUCTIONS = ("auto", "sum_over_batch_size", "sum", "none")


def _operand(value: Any) -> Any:
    return value if isinstance(value, Recordable) or is_array(value) else asarray(value)


def _sizes(value: Any) -> tuple[Any, ...] | None:
    shape = value.shape
    return tuple(shape) if isinstance(shape, tuple) or shape.rank is not None else None


def _pair(name: str, y_true: Any, y_pred: Any) -> tuple[Any, Any]:
    """Return both with equal ranks, the targets in the dtype of the predictions.

    A last axis of size 1 that only one side has is added or dropped. Other shapes that differ are refused: broadcasting
    (N,) against (N, 1) would compare every sample with every other.
    """
    y_true, y_pred = _operand(y_true), _operand(y_pred)
    if not is_floating(y_pred.dtype):
        y_pred = ops.cast(y_pred, y_true.dtype if is_floating(y_true.dtype) else "float32")
    a, b = _sizes(y_true), _sizes(y_pred)
    if a is not None and b is not None:
        if len(a) == len(b) + 1 and a[-1] == 1:
            y_true, a = ops.squeeze(y_true, axis=-1), a[:-1]
        elif len(b) == len(a) + 1 and b[-1] == 1:
            y_true, a = ops.expand_dims(y_true, -1), (*a, 1)
        if len(a) != len(b) or any(m != n for m, n in zip(a, b, strict=True) if None not in (m, n)):
            raise ShapeError(message(name, "targets and predictions differ in shape", b, a))
    return ops.cast(y_true, y_pred.dtype), y_pred


def mean_squared_error(y_true: Any, y_pred: Any) -> Any:
    """Return ``mean((y_pred - y_true)^2)`` over the last axis. Both (N, d); returns (N).

    >>> mean_squared_error([[0.0, 2.0]], [[1.0, 2.0]])
    array([0.5], dtype=float32)
    """
    y_true, y_pred = _pair("mean_squared_error", y_true, y_pred)
    return ops.mean(ops.square(ops.subtract(y_pred, y_true)), axis=-1)


def mean_absolute_error(y_true: Any, y_pred: Any) -> Any:
    """Return ``mean |y_pred - y_true|`` over the last axis. Both (N, d); returns (N).

    >>> mean_absolute_error([[0.0, 2.0]], [[1.0, 2.0]])
    array([0.5], dtype=float32)
    """
    y_true, y_pred = _pair("mean_absolute_error", y_true, y_pred)
    return ops.mean(ops.absolute(ops.subtract(y_pred, y_true)), axis=-1)


def huber(y_true: Any, y_pred: Any, delta: float = 1.0) -> Any:
    """Return the mean over the last axis of ``e^2 / 2`` where ``|e| <= delta``, else ``delta |e| - delta^2 / 2``.

    >>> huber([[0.0, 0.0]], [[1.0, 3.0]])
    array([1.5], dtype=float32)
    """
    y_true, y_pred = _pair("huber", y_true, y_pred)
    distance = ops.absolute(ops.subtract(y_pred, y_true))
    inside = ops.minimum(distance, delta)  # e^2 / 2 up to delta, a line of slope delta from there
    return ops.mean(inside * (distance - inside * 0.5), axis=-1)


def _smoothed(y_true: Any, label_smoothing: float, classes: Any) -> Any:
    return y_true if not label_smoothing else y_true * (1.0 - label_smoothing) + label_smoothing / classes


def binary_crossentropy(
    y_true: Any, y_pred: Any, from_logits: bool = False, label_smoothing: float = 0.0
) -> Any:
    """Return ``mean(-t log p - (1 - t) log(1 - p))`` over the last axis. Both (N, d); returns (N).

    With `from_logits`, p is the sigmoid of `y_pred` and nothing overflows. `label_smoothing` s moves targets to
    ``t (1 - s) + s / 2``.

    >>> binary_crossentropy([[1.0, 0.0]], [[0.0, 0.0]], from_logits=True).round(4)
    array([0.6931], dtype=float32)
    """
    y_true, y_pred = _pair("binary_crossentropy", y_true, y_pred)
    y_true = _smoothed(y_true, label_smoothing, 2)
    if from_logits:
        return ops.mean(ops.sigmoid_cross_entropy_with_logits(y_true, y_pred), axis=-1)
    p = ops.clip(y_pred, EPSILON, 1.0 - EPSILON)
    return -ops.mean(y_true * ops.log(p + EPSILON) + (1.0 - y_true) * ops.log(1.0 - p + EPSILON), axis=-1)


def categorical_crossentropy(
    y_true: Any, y_pred: Any, from_logits: bool = False, label_smoothing: float = 0.0
) -> Any:
    """Return ``-sum(t log p)`` over the last axis. Both (N, C); returns (N).

    With `from_logits`, p is the softmax of `y_pred` and nothing overflows; otherwise `y_pred` is divided by its sum.
    `label_smoothing` s moves targets to ``t (1 - s) + s / C``.

    >>> categorical_crossentropy([[0.0, 1.0]], [[0.0, 0.0]], from_logits=True).round(4)
    array([0.6931], dtype=float32)
    """
    y_true, y_pred = _pair("categorical_crossentropy", y_true, y_pred)
    y_true = _smoothed(y_true, label_smoothing, y_pred.shape[-1])
    if from_logits:
        return ops.softmax_cross_entropy_with_logits(y_true, y_pred)
    p = ops.clip(y_pred / ops.sum(y_pred, axis=-1, keepdims=True), EPSILON, 1.0 - EPSILON)
    return -ops.sum(y_true * ops.log(p), axis=-1)


def sparse_categorical_crossentropy(y_true: Any, y_pred: Any, from_logits: bool = False) -> Any:
    """Return ``-log p[label]``. `y_true`: labels (N) or (N, 1), `y_pred`: (N, C); returns (N).

    With `from_logits`, p is the softmax of `y_pred` and nothing overflows; otherwise `y_pred` is divided by its sum.

    >>> sparse_categorical_crossentropy([1], [[0.0, 0.0]], from_logits=True).round(4)
    array([0.6931], dtype=float32)
    """
    y_true, y_pred = _operand(y_true), _operand(y_pred)
    a, b = _sizes(y_true), _sizes(y_pred)
    if a is not None and b is not None and len(a) == len(b) and a[-1] == 1:
        y_true = ops.squeeze(y_true, axis=-1)
    if y_true.dtype.kind not in "iu":
        y_true = ops.cast(y_true, "int64")
    # log p is a logit whose softmax is p / sum(p)
    logits = y_pred if from_logits else ops.log(ops.clip(y_pred, EPSILON, 1.0 - EPSILON))
    return ops.sparse_softmax_cross_entropy_with_logits(y_true, logits)


class Loss:
    """A function of targets and predictions, weighted and reduced to one number.

    `reduction`: ``"sum_over_batch_size"`` (the mean over samples; ``"auto"`` is the same), ``"sum"`` or ``"none"`` (one
    value for each sample). A subclass defines `call(y_true, y_pred)`. Source: ``tf.keras.losses.Loss``.

    >>> class Distance(Loss):
    ...     def call(self, y_true, y_pred):
    ...         return mean_absolute_error(y_true, y_pred)
    >>> float(Distance(reduction="sum")([[1.0], [2.0]], [[2.0], [4.0]]))
    3.0
    """

    def __init__(self, reduction: str = "sum_over_batch_size", name: str | None = None) -> None:
        if reduction not in REDUCTIONS:
            raise ValueError(message(type(self).__name__, "unknown reduction", ", ".join(REDUCTIONS), repr(reduction)))
        self.reduction, self.name = reduction, name

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return one value for each sample."""
        raise NotImplementedError(message(type(self).__name__, "does not define call"))

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Return the reduced loss. `sample_weight`: a number, or one for each sample, (N) or (N, 1)."""
        losses = self.call(y_true, y_pred)
        if sample_weight is not None:
            weights = ops.cast(_operand(sample_weight), losses.dtype)
            if len(weights.shape) == len(losses.shape) + 1:
                weights = ops.squeeze(weights, axis=-1)
            losses = losses * weights
        if self.reduction == "none":
            return losses
        return ops.sum(losses) if self.reduction == "sum" else ops.mean(losses)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"reduction": self.reduction, "name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make a loss from what `get_config` returned."""
        return cls(**config)


class _FunctionLoss(Loss):
    """A loss around one of the functions above; `settings` are the keywords it is called with."""

    function: Callable[..., Any]

    def __init__(self, reduction: str, name: str | None, **settings: Any) -> None:
        super().__init__(reduction, name or type(self).function.__name__)
        self._settings = settings

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return one value for each sample."""
        return type(self).function(y_true, y_pred, **self._settings)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**self._settings, **super().get_config()}


class MeanSquaredError(_FunctionLoss):
    """`mean_squared_error`, reduced. Source: ``tf.keras.losses.MeanSquaredError``.

    >>> float(MeanSquaredError()([[0.0], [1.0]], [[1.0], [1.0]]))
    0.5
    """

    function = staticmethod(mean_squared_error)

    def __init__(self, reduction: str = "sum_over_batch_size", name: str | None = None) -> None:
        super().__init__(reduction, name)


class MeanAbsoluteError(_FunctionLoss):
    """`mean_absolute_error`, reduced. Source: ``tf.keras.losses.MeanAbsoluteError``."""

    function = staticmethod(mean_absolute_error)

    def __init__(self, reduction: str = "sum_over_batch_size", name: str | None = None) -> None:
        super().__init__(reduction, name)


class Huber(_FunctionLoss):
    """`huber`, reduced. Source: ``tf.keras.losses.Huber``."""

    function = staticmethod(huber)

    def __init__(self, delta: float = 1.0, reduction: str = "sum_over_batch_size", name: str | None = None) -> None:
        super().__init__(reduction, name, delta=delta)


class BinaryCrossentropy(_FunctionLoss):
    """`binary_crossentropy`, reduced. Source: ``tf.keras.losses.BinaryCrossentropy``."""

    function = staticmethod(binary_crossentropy)

    def __init__(
        self,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        reduction: str = "sum_over_batch_size",
        name: str | None = None,
    ) -> None:
        super().__init__(reduction, name, from_logits=from_logits, label_smoothing=label_smoothing)


class CategoricalCrossentropy(_FunctionLoss):
    """`categorical_crossentropy`, reduced. Source: ``tf.keras.losses.CategoricalCrossentropy``."""

    function = staticmethod(categorical_crossentropy)

    def __init__(
        self,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        reduction: str = "sum_over_batch_size",
        name: str | None = None,
    ) -> None:
        super().__init__(reduction, name, from_logits=from_logits, label_smoothing=label_smoothing)


class SparseCategoricalCrossentropy(_FunctionLoss):
    """`sparse_categorical_crossentropy`, reduced. Source: ``tf.keras.losses.SparseCategoricalCrossentropy``.

    >>> loss = SparseCategoricalCrossentropy(from_logits=True)
    >>> round(float(loss([0, 1], [[0.0, 0.0], [0.0, 1000.0]])), 4)
    0.3466
    """

    function = staticmethod(sparse_categorical_crossentropy)

    def __init__(
        self, from_logits: bool = False, reduction: str = "sum_over_batch_size", name: str | None = None
    ) -> None:
        super().__init__(reduction, name, from_logits=from_logits)
