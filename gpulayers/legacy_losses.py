"""The losses of ``tf.compat.v1.losses``: one number each, and in a graph also an entry of the collection LOSSES.

Without weights a loss is the mean over all elements; with weights, the weighted sum divided by the number of elements
whose weight is not 0 (TensorFlow's ``SUM_BY_NONZERO_WEIGHTS``).
"""

from __future__ import annotations

from typing import Any

from gpulayers import ops
from gpulayers.device import asarray, is_array
from gpulayers.errors import ShapeError, message
from gpulayers.ops.operation import Recordable, Shape
from gpulayers.ops.static import is_small_float, static_shape
from gpulayers.trace import GraphKeys, active_graph

__all__ = [
    "absolute_difference",
    "add_loss",
    "compute_weighted_loss",
    "get_losses",
    "get_regularization_loss",
    "get_regularization_losses",
    "get_total_loss",
    "mean_squared_error",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "sparse_softmax_cross_entropy",
]


def _operand(value: Any) -> Any:
    return value if isinstance(value, Recordable) or is_array(value) else asarray(value)


def add_loss(loss: Any, loss_collection: str | None = GraphKeys.LOSSES) -> None:
    """Enter a loss into a collection of the graph; nothing in eager mode, which has none."""
    graph = active_graph()
    if graph is not None and loss_collection:
        graph.add_to_collection(loss_collection, loss)


def compute_weighted_loss(
    losses: Any, weights: Any = 1.0, scope: Any = None, loss_collection: str | None = GraphKeys.LOSSES
) -> Any:
    """Return the sum of ``losses * weights`` divided by how many elements have a weight other than 0; 0 if none has.

    `weights`: a number, or an array with the axes of `losses`, each of size 1 or theirs; ValueError for others. 16-bit
    losses are summed in float32. Source: ``tf.compat.v1.losses.compute_weighted_loss``.

    >>> float(compute_weighted_loss(asarray([1.0, 2.0, 6.0]), [1.0, 0.0, 0.5]))
    2.0
    """
    losses, weights = _operand(losses), _operand(weights)
    _check_weights(static_shape(weights), static_shape(losses))
    wide = _in_float32(losses)  # sums and counts of 16-bit losses may not fit 16 bits
    factors = ops.multiply(ops.ones_like(wide), ops.cast(weights, wide.dtype))
    counted = ops.sum(ops.cast(ops.not_equal(factors, 0.0), wide.dtype))
    loss = ops.cast(ops.sum(ops.multiply(wide, factors)) / ops.maximum(counted, 1.0), losses.dtype)
    add_loss(loss, loss_collection)
    return loss


def _in_float32(value: Any) -> Any:
    return ops.cast(value, "float32") if is_small_float(value.dtype) else value


def _check_weights(weights: Shape, losses: Shape) -> None:
    """Raise ShapeError unless there is one weight, or an axis for each of the losses, of size 1 or theirs."""
    if weights is None or losses is None or not weights:
        return
    pairs = zip(weights, losses, strict=False)
    if len(weights) == len(losses) and all(w in (1, None, n) or n is None for w, n in pairs):
        return
    raise ShapeError(
        message("compute_weighted_loss", "the weights do not fit the losses", f"() or the axes of {losses}", weights)
    )


def _pair(name: str, labels: Any, predictions: Any) -> tuple[Any, Any]:
    labels, predictions = _operand(labels), _operand(predictions)
    a, b = tuple(labels.shape), tuple(predictions.shape)
    if len(a) != len(b) or any(m != n for m, n in zip(a, b, strict=True) if None not in (m, n)):
        raise ShapeError(message(name, "labels and predictions differ in shape", b, a))
    return ops.cast(labels, predictions.dtype), predictions


def mean_squared_error(
    labels: Any, predictions: Any, weights: Any = 1.0, scope: Any = None, loss_collection: str | None = GraphKeys.LOSSES
) -> Any:
    """Return the weighted mean of ``(predictions - labels)^2``, both of one shape. float32 for 16-bit predictions.

    >>> float(mean_squared_error([[0.0], [1.0]], [[2.0], [1.0]]))
    2.0
    """
    labels, predictions = _pair("mean_squared_error", labels, _in_float32(_operand(predictions)))
    return compute_weighted_loss(ops.square(ops.subtract(predictions, labels)), weights, scope, loss_collection)


def absolute_difference(
    labels: Any, predictions: Any, weights: Any = 1.0, scope: Any = None, loss_collection: str | None = GraphKeys.LOSSES
) -> Any:
    """Return the weighted mean of ``|predictions - labels|``, both of one shape. float32 for 16-bit predictions.

    >>> float(absolute_difference([[0.0], [1.0]], [[2.0], [1.0]]))
    1.0
    """
    labels, predictions = _pair("absolute_difference", labels, _in_float32(_operand(predictions)))
    return compute_weighted_loss(ops.absolute(ops.subtract(predictions, labels)), weights, scope, loss_collection)


def sigmoid_cross_entropy(
    multi_class_labels: Any,
    logits: Any,
    weights: Any = 1.0,
    label_smoothing: float = 0.0,
    scope: Any = None,
    loss_collection: str | None = GraphKeys.LOSSES,
) -> Any:
    """Return the weighted mean of the binary cross-entropy of each logit; smoothing s moves labels to ``t(1-s) + s/2``.

    >>> round(float(sigmoid_cross_entropy([[1.0]], [[0.0]])), 4)
    0.6931
    """
    labels, logits = _pair("sigmoid_cross_entropy", multi_class_labels, logits)
    if label_smoothing:
        labels = labels * (1.0 - label_smoothing) + 0.5 * label_smoothing
    return compute_weighted_loss(
        ops.sigmoid_cross_entropy_with_logits(labels, logits), weights, scope, loss_collection
    )


def softmax_cross_entropy(
    onehot_labels: Any,
    logits: Any,
    weights: Any = 1.0,
    label_smoothing: float = 0.0,
    scope: Any = None,
    loss_collection: str | None = GraphKeys.LOSSES,
) -> Any:
    """Return the weighted mean over samples of the cross-entropy. Both (N, C); smoothed labels are ``t(1-s) + s/C``.

    >>> round(float(softmax_cross_entropy([[0.0, 1.0]], [[0.0, 0.0]])), 4)
    0.6931
    """
    labels, logits = _pair("softmax_cross_entropy", onehot_labels, logits)
    if label_smoothing:
        labels = labels * (1.0 - label_smoothing) + label_smoothing / logits.shape[-1]
    return compute_weighted_loss(
        ops.softmax_cross_entropy_with_logits(labels, logits), weights, scope, loss_collection
    )


def sparse_softmax_cross_entropy(
    labels: Any, logits: Any, weights: Any = 1.0, scope: Any = None, loss_collection: str | None = GraphKeys.LOSSES
) -> Any:
    """Return the weighted mean over samples of the cross-entropy. `labels`: integers (N) or (N, 1); `logits`: (N, C).

    `weights` may be (N, 1) too.

    >>> round(float(sparse_softmax_cross_entropy([1], [[0.0, 0.0]])), 4)
    0.6931
    """
    labels, logits = _operand(labels), _operand(logits)
    if len(labels.shape) == len(logits.shape) and labels.shape[-1] == 1:
        labels = ops.squeeze(labels, axis=-1)
    weights = _operand(weights)
    if len(weights.shape) == len(logits.shape) and weights.shape[-1] == 1:
        weights = ops.squeeze(weights, axis=-1)
    return compute_weighted_loss(
        ops.sparse_softmax_cross_entropy_with_logits(labels, logits), weights, scope, loss_collection
    )


def _collected(key: str, scope: str | None) -> list[Any]:
    graph = active_graph()
    return [] if graph is None else graph.get_collection(key, scope)


def get_losses(scope: str | None = None, loss_collection: str = GraphKeys.LOSSES) -> list[Any]:
    """Return the losses in the collection; in eager mode there are none."""
    return _collected(loss_collection, scope)


def get_regularization_losses(scope: str | None = None) -> list[Any]:
    """Return the regularization losses of the graph; in eager mode there are none."""
    return _collected(GraphKeys.REGULARIZATION_LOSSES, scope)


def _total(losses: list[Any]) -> Any:
    total: Any = ops.zeros((), "float32")
    for loss in losses:
        total = total + loss
    return total


def get_regularization_loss(scope: str | None = None, name: str = "total_regularization_loss") -> Any:
    """Return the sum of the regularization losses, 0 if there are none.

    >>> float(get_regularization_loss())
    0.0
    """
    return _total(get_regularization_losses(scope))


def get_total_loss(
    add_regularization_losses: bool = True, name: str = "total_loss", scope: str | None = None
) -> Any:
    """Return the sum of the losses in the collections, by default with the regularization losses.

    >>> float(get_total_loss())
    0.0
    """
    return _total(get_losses(scope) + (get_regularization_losses(scope) if add_regularization_losses else []))
