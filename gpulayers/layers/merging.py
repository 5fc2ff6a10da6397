"""Layers that make one tensor of several: Add, Subtract, Multiply, Average, Maximum, Minimum, Concatenate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from gpulayers import nest, ops
from gpulayers.dtypes import TensorShape, broadcast_static_shape
from gpulayers.errors import DTypeError, LayerError, ShapeError, message
from gpulayers.layers.config_part import as_shape_structure
from gpulayers.layers.modern import Layer
from gpulayers.ops.static import axis_of, static_shape

__all__ = ["Add", "Average", "Concatenate", "Maximum", "Minimum", "Multiply", "Subtract"]


class _Merge(Layer):
    """Fold a list of inputs with `_combine`. Inputs of lower rank get axes of size 1 behind the batch axis."""

    _combine: ClassVar[Callable[[Any, Any], Any]]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        """Check the shapes. Raises ValueError if they are not several, or do not go together."""
        self.compute_output_shape(input_shape)
        self.built = True

    def _shapes(self, input_shape: Any) -> list[TensorShape]:
        shapes = as_shape_structure(input_shape, self._name)
        if not isinstance(shapes, list | tuple) or not all(isinstance(s, TensorShape) for s in shapes) or not shapes:
            raise LayerError(
                message(
                    self._name, "A merge layer should be called on a list of inputs", "a list of shapes", input_shape
                )
            )
        for shape in shapes:
            if shape.rank is None:
                raise ShapeError(message(self._name, "the shape is incomplete", "a known rank", shape))
        return list(shapes)

    def call(self, inputs: Any) -> Any:
        """Return the inputs combined, element by element."""
        values = _aligned(_listed(self._name, inputs))
        return functools.reduce(type(self)._combine, values)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """Return where all masks are true; an input without a mask does not count."""
        masks = [one for one in nest.flatten(mask) if one is not None]
        return functools.reduce(ops.logical_and, masks) if masks else None

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the broadcast shape. Raises TypeError for no shape, ValueError for shapes that do not fit."""
        shapes = self._shapes(input_shape)
        rank = max(shape.rank or 0 for shape in shapes)
        filled = [(*shape[:1], *[1] * (rank - (shape.rank or 0)), *shape[1:]) for shape in shapes]
        return TensorShape(broadcast_static_shape(*filled))


def _listed(name: str, inputs: Any) -> list[Any]:
    if not isinstance(inputs, list | tuple) or not inputs:
        raise LayerError(message(name, "A merge layer should be called on a list of inputs", got=type(inputs).__name__))
    return list(inputs)


def _aligned(values: list[Any]) -> list[Any]:
    """Give all values the same rank."""
    ranks = [len(static_shape(value) or ()) for value in values]
    highest = max(ranks)
    return [
        value if rank == highest else ops.expand_dims(value, tuple(range(1, 1 + highest - rank)))
        for value, rank in zip(values, ranks, strict=True)
    ]


class Add(_Merge):
    """The sum of a list of inputs, broadcast: ``gl.keras.layers.Add``.

    Masks: a step counts where every mask is true. Raises ValueError for anything but a list, or shapes that do not
    broadcast. Source: ``tf.keras.layers.Add``.

    >>> import numpy as np, gpulayers as gl
    >>> gl.keras.layers.Add()([np.ones((1, 2), "float32"), np.ones((1, 2), "float32")])
    array([[2., 2.]], dtype=float32)
    """

    _combine = ops.add


class Multiply(_Merge):
    """The product of a list of inputs; otherwise as `Add`. Source: ``tf.keras.layers.Multiply``."""

    _combine = ops.multiply


class Maximum(_Merge):
    """The elementwise maximum of a list of inputs; otherwise as `Add`. Source: ``tf.keras.layers.Maximum``."""

    _combine = ops.maximum


class Minimum(_Merge):
    """The elementwise minimum of a list of inputs; otherwise as `Add`. Source: ``tf.keras.layers.Minimum``."""

    _combine = ops.minimum


class Subtract(_Merge):
    """The first input minus the second; otherwise as `Add`. Source: ``tf.keras.layers.Subtract``."""

    _combine = ops.subtract

    def _shapes(self, input_shape: Any) -> list[TensorShape]:
        shapes = super()._shapes(input_shape)
        if len(shapes) != 2:
            raise LayerError(
                message(self._name, "A `Subtract` layer should be called on exactly 2 inputs", 2, len(shapes))
            )
        return shapes


class Average(_Merge):
    """The mean of a list of inputs; otherwise as `Add`. Source: ``tf.keras.layers.Average``."""

    _combine = ops.add

    def call(self, inputs: Any) -> Any:
        """Return the mean of the inputs, element by element."""
        return ops.divide(super().call(inputs), float(len(inputs)))


class Concatenate(_Merge):
    """The inputs one behind the other along `axis`: ``gl.keras.layers.Concatenate``.

    Raises ValueError for anything but a list, or sizes that differ off the axis.
    Source: ``tf.keras.layers.Concatenate``.

    >>> import numpy as np, gpulayers as gl
    >>> gl.keras.layers.Concatenate()([np.ones((1, 2)), np.ones((1, 3))]).shape
    (1, 5)
    """

    def __init__(self, axis: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(axis, bool) or not hasattr(axis, "__index__"):
            raise DTypeError(message(self._name, "axis is not an integer", "an integer", repr(axis)))
        self.axis = int(axis)

    def call(self, inputs: Any) -> Any:
        """Return the inputs joined."""
        return ops.concatenate(_listed(self._name, inputs), self.axis)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """Return the masks joined in the same way; an input without one counts as all true."""
        masks = list(mask) if isinstance(mask, list | tuple) else [mask]
        if all(one is None for one in masks):
            return None
        filled = [
            ops.ones_like(value, bool)
            if one is None
            else ops.logical_and(ops.expand_dims(one, -1), ops.ones_like(value, bool))
            for value, one in zip(inputs, masks, strict=True)
        ]
        return ops.all(ops.concatenate(filled, self.axis), -1)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the joined shape. Raises TypeError for something that is no shape, ValueError if they do not fit."""
        shapes = [list(shape) for shape in self._shapes(input_shape)]
        axis = axis_of(self._name, self.axis, len(shapes[0]))
        result = shapes[0]
        for shape in shapes[1:]:
            if len(shape) != len(result):
                raise ShapeError(message(self._name, "the ranks differ", got=shapes))
            for other, (a, b) in enumerate(zip(result, shape, strict=True)):
                if other == axis:
                    result[other] = None if a is None or b is None else a + b
                elif None not in (a, b) and a != b:
                    raise ShapeError(message(self._name, "sizes differ", f"equal sizes but on axis {axis}", shapes))
                else:
                    result[other] = b if a is None else a
        return TensorShape(result)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "axis": self.axis}
