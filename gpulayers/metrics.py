"""Metrics: running totals in variables, updated call by call.

They work eagerly, inside a `function`, and in a graph, where `update_state` returns a node and ``metric(...)`` a tensor
that reads the totals after the update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from gpulayers import nest, ops
from gpulayers.device import asarray, is_array
from gpulayers.dtypes import as_dtype, is_floating
from gpulayers.errors import message
from gpulayers.ops.operation import Recordable
from gpulayers.trace import (
    CompositeValue,
    Graph,
    GraphTensor,
    active_graph,
    as_value,
    control_dependencies,
    group,
    stop_recording,
)
from gpulayers.variables import Variable

__all__ = [
    "Accuracy",
    "BinaryAccuracy",
    "CategoricalAccuracy",
    "Mean",
    "MeanMetricWrapper",
    "Metric",
    "SparseCategoricalAccuracy",
    "Sum",
    "binary_accuracy",
    "categorical_accuracy",
    "sparse_categorical_accuracy",
]


@contextlib.contextmanager
def _recorder(*values: Any) -> Iterator[Graph | None]:
    """Enter the graph that `values` belong to, if they are symbolic; nothing here goes onto a tape."""
    graph = active_graph()
    if graph is None:
        graph = next((v.graph for v in nest.flatten(list(values)) if isinstance(v, GraphTensor)), None)
    with stop_recording(), contextlib.nullcontext() if graph is None else graph.as_default():
        yield graph


def _operand(value: Any) -> Any:
    """Return a value as what operations take: graph tensors and variables as they are, the rest as arrays."""
    if isinstance(value, GraphTensor | CompositeValue):
        return value
    if isinstance(value, Recordable):
        return value if active_graph() is not None else as_value(value)
    return value if is_array(value) else asarray(value)


class Metric:
    """Base of metrics: define `update_state` and `result`, with variables from `add_weight`.

    ``metric(...)`` updates and returns the result. `name`: the class's name in small letters if not given. `dtype`:
    float32 if not given. Source: ``tf.keras.metrics.Metric``.

    >>> class Count(Metric):
    ...     def __init__(self):
    ...         super().__init__("count")
    ...         self.seen = self.add_weight("seen")
    ...     def update_state(self, values):
    ...         return self.add(self.seen, ops.cast(ops.size(values), self.dtype))
    ...     def result(self):
    ...         return self.seen.read_value()
    >>> count = Count()
    >>> float(count(asarray([1.0, 2.0]))), float(count(asarray([3.0])))
    (2.0, 3.0)
    """

    def __init__(self, name: str | None = None, dtype: Any = None) -> None:
        self.name = name or _snake(type(self).__name__)
        self.dtype = as_dtype("float32" if dtype is None else dtype)
        self.variables: list[Variable] = []
        self.last_result: Any = None  # by which a layer that adds the result as a metric finds this object

    def add_weight(self, name: str, shape: Any = (), initializer: Callable[..., Any] | None = None) -> Variable:
        """Make a variable of the metric, starting from zeros unless `initializer` says otherwise."""
        size, dtype = tuple(shape), self.dtype

        def start() -> Any:
            return ops.zeros(size, dtype) if initializer is None else initializer(size, dtype)

        variable = Variable(start, trainable=False, name=f"{self.name}/{name}", dtype=dtype, shape=size)
        self.variables.append(variable)
        return variable

    @property
    def weights(self) -> list[Variable]:
        """The metric's variables."""
        return list(self.variables)

    def add(self, variable: Variable, delta: Any) -> Any:
        """Add `delta` to a variable, now or when the graph is run; return what does it."""
        # Written with the variable itself, not its present value, so that a graph reads it when it runs.
        return variable.assign(ops.add(variable, ops.cast(delta, variable.static_dtype)))

    def update_state(self, *arguments: Any, **keywords: Any) -> Any:
        """Take in new values."""
        raise NotImplementedError(message(self.name, "does not define update_state"))

    def result(self) -> Any:
        """Return the present value of the metric."""
        raise NotImplementedError(message(self.name, "does not define result"))

    def reset_state(self) -> Any:
        """Start again from the initial values. In a graph, return a node that does."""
        if active_graph() is not None:
            return group(*(v.assign(ops.zeros(v.shape, v.dtype)) for v in self.variables))
        for variable in self.variables:
            variable.initialize()
        return None

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Take in new values and return the result."""
        with _recorder(arguments, keywords):
            update = self.update_state(*arguments, **keywords)
            with control_dependencies([] if update is None else [update]):
                self.last_result = self.result()
                return self.last_result

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"name": self.name, "dtype": self.dtype.name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make a metric from what `get_config` returned; its totals start anew."""
        return cls(**config)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def _weighted(values: Any, weights: Any, reduce: Callable[..., Any]) -> tuple[Any, Any]:
    """Return values and weights of shapes that broadcast, by TensorFlow's rule.

    Weights with one axis less than the values are stretched along the last, those with one more, of size 1, lose it;
    where more is missing, `reduce` takes away the values' further axes.
    """
    extra = len(values.shape) - len(weights.shape)
    if extra == -1 and weights.shape[-1] == 1:
        weights = ops.squeeze(weights, axis=-1)
    elif extra == 1 and len(weights.shape):
        weights = ops.expand_dims(weights, -1)
    elif extra > 1 and len(weights.shape):
        values = reduce(values, axis=tuple(range(-extra, 0)))
    return values, weights


class Sum(Metric):
    """The sum of all values, times their weights. Source: ``tf.keras.metrics.Sum``.

    >>> total = Sum()
    >>> total.update_state([1.0, 2.0]); total.update_state([3.0], sample_weight=[2.0])
    >>> float(total.result())
    9.0
    """

    def __init__(self, name: str | None = None, dtype: Any = None) -> None:
        super().__init__(name, dtype)
        self.total = self.add_weight("total")

    def update_state(self, values: Any, sample_weight: Any = None) -> Any:
        """Take in values of any shape, and weights of the same shape, of the leading axes, or one more of size 1."""
        with _recorder(values, sample_weight):
            values = ops.cast(_operand(values), self.dtype)
            if sample_weight is not None:
                values, weights = _weighted(values, ops.cast(_operand(sample_weight), self.dtype), ops.sum)
                values = values * weights
            return group(self.add(self.total, ops.sum(values)))

    def result(self) -> Any:
        """Return the sum, a scalar."""
        return self.total.read_value()


class Mean(Metric):
    """The mean of all values, weighted if weights are given; 0 before the first. Source: ``tf.keras.metrics.Mean``.

    >>> mean = Mean()
    >>> float(mean([1.0, 3.0])), float(mean([5.0], sample_weight=[2.0]))
    (2.0, 3.5)
    """

    def __init__(self, name: str | None = None, dtype: Any = None) -> None:
        super().__init__(name, dtype)
        self.total, self.count = self.add_weight("total"), self.add_weight("count")

    def update_state(self, values: Any, sample_weight: Any = None) -> Any:
        """Take in values of any shape, and weights of the same shape, of the leading axes, or one more of size 1."""
        with _recorder(values, sample_weight):
            values = ops.cast(_operand(values), self.dtype)
            weights = ops.ones_like(values)
            if sample_weight is not None:
                values, weights = _weighted(values, ops.cast(_operand(sample_weight), self.dtype), ops.mean)
                values, weights = values * weights, weights * ops.ones_like(values)
            return group(self.add(self.total, ops.sum(values)), self.add(self.count, ops.sum(weights)))

    def result(self) -> Any:
        """Return the mean, a scalar."""
        total, count = self.total.read_value(), self.count.read_value()
        empty = ops.equal(count, 0.0)
        return ops.where(empty, ops.zeros_like(total), total / ops.where(empty, ops.ones_like(count), count))


class MeanMetricWrapper(Mean):
    """The mean of ``function(y_true, y_pred, **arguments)``. Source: ``tf.keras.metrics.MeanMetricWrapper``.

    >>> error = MeanMetricWrapper(lambda y_true, y_pred: ops.absolute(y_true - y_pred), name="error")
    >>> float(error([1.0, 2.0], [1.5, 2.5]))
    0.5
    """

    def __init__(
        self, function: Callable[..., Any], name: str | None = None, dtype: Any = None, **arguments: Any
    ) -> None:
        super().__init__(name or getattr(function, "__name__", None), dtype)
        self._function, self._arguments = function, arguments

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:  # type: ignore[override]
        """Take in targets and predictions, and weights of the samples."""
        with _recorder(y_true, y_pred, sample_weight):
            matches = self._function(_operand(y_true), _operand(y_pred), **self._arguments)
            return super().update_state(matches, sample_weight)


def _equal(y_true: Any, y_pred: Any) -> Any:
    return ops.equal(y_true, ops.cast(y_pred, y_true.dtype))


def binary_accuracy(y_true: Any, y_pred: Any, threshold: float = 0.5) -> Any:
    """Return, for each sample, the part of the last axis where ``y_pred > threshold`` is what `y_true` says.

    >>> import numpy as np
    >>> binary_accuracy(np.array([[1.0, 0.0]]), np.array([[0.9, 0.8]]))
    array([0.5])
    """
    kind = y_pred.dtype if is_floating(y_pred.dtype) else as_dtype("float32")
    said = ops.cast(ops.greater(y_pred, threshold), kind)
    return ops.mean(ops.cast(ops.equal(ops.cast(y_true, kind), said), kind), axis=-1)


def categorical_accuracy(y_true: Any, y_pred: Any) -> Any:
    """Return, for each sample, whether the largest of `y_pred` is where the largest of `y_true` is (1.0 or 0.0).

    >>> import numpy as np
    >>> categorical_accuracy(np.eye(2), np.array([[0.9, 0.1], [0.6, 0.4]]))
    array([1., 0.], dtype=float32)
    """
    return ops.cast(ops.equal(ops.argmax(y_true, axis=-1), ops.argmax(y_pred, axis=-1)), "float32")


def sparse_categorical_accuracy(y_true: Any, y_pred: Any) -> Any:
    """Return, for each sample, whether the largest of `y_pred` is at index `y_true` (1.0 or 0.0).

    `y_true`: (...) or (..., 1), `y_pred`: (..., classes).

    >>> import numpy as np
    >>> sparse_categorical_accuracy(np.array([0, 1]), np.array([[0.9, 0.1], [0.6, 0.4]]))
    array([1., 0.], dtype=float32)
    """
    if len(y_true.shape) == len(y_pred.shape) and y_true.shape[-1] == 1:
        y_true = ops.squeeze(y_true, axis=-1)
    said = ops.argmax(y_pred, axis=-1)
    return ops.cast(ops.equal(ops.cast(y_true, said.dtype), said), "float32")


class Accuracy(MeanMetricWrapper):
    """How often predictions equal labels. Source: ``tf.keras.metrics.Accuracy``.

    >>> float(Accuracy()([1, 2, 3, 4], [0, 2, 3, 4]))
    0.75
    """

    def __init__(self, name: str = "accuracy", dtype: Any = None) -> None:
        super().__init__(_equal, name, dtype)


class BinaryAccuracy(MeanMetricWrapper):
    """How often predictions above `threshold` are right. Source: ``tf.keras.metrics.BinaryAccuracy``.

    >>> float(BinaryAccuracy()([[1.0], [0.0]], [[0.9], [0.6]]))
    0.5
    """

    def __init__(self, name: str = "binary_accuracy", dtype: Any = None, threshold: float = 0.5) -> None:
        super().__init__(binary_accuracy, name, dtype, threshold=threshold)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), **self._arguments}


class CategoricalAccuracy(MeanMetricWrapper):
    """How often the largest prediction is the one-hot label. Source: ``tf.keras.metrics.CategoricalAccuracy``.

    >>> float(CategoricalAccuracy()([[0.0, 1.0]], [[0.2, 0.8]]))
    1.0
    """

    def __init__(self, name: str = "categorical_accuracy", dtype: Any = None) -> None:
        super().__init__(categorical_accuracy, name, dtype)


class SparseCategoricalAccuracy(MeanMetricWrapper):
    """How often the largest prediction is the label's index. Source: ``tf.keras.metrics.SparseCategoricalAccuracy``.

    >>> float(SparseCategoricalAccuracy()([1, 0], [[0.2, 0.8], [0.1, 0.9]]))
    0.5
    """

    def __init__(self, name: str = "sparse_categorical_accuracy", dtype: Any = None) -> None:
        super().__init__(sparse_categorical_accuracy, name, dtype)
