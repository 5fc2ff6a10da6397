"""Layers that only move elements: Flatten, Reshape, Permute."""

from __future__ import annotations

import math
from typing import Any

from gpulayers import ops
from gpulayers.dtypes import TensorShape
from gpulayers.errors import ShapeError, message
from gpulayers.layers.core import CoreLayer
from gpulayers.layers.kernel import one_shape
from gpulayers.layers.legacy import LegacyLayer
from gpulayers.layers.modern import Layer
from gpulayers.layers.spec import InputSpec
from gpulayers.ops.static import known_size, static_shape
from gpulayers.ops.windows import parse_format

__all__ = ["Flatten", "LegacyFlatten", "Permute", "Reshape"]


class FlattenMixin(CoreLayer):
    """The maths of flattening, for both families."""

    def __init__(self, data_format: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._last = parse_format(self._name, data_format)
        self.data_format = "channels_last" if self._last else "channels_first"
        self.input_spec = InputSpec(min_ndim=1)

    def call(self, inputs: Any) -> Any:
        """Return (n, everything else); channels come last also if the input has them first."""
        shape = static_shape(inputs)
        if shape is None:
            raise ShapeError(message(self._name, "the rank is unknown", do="Call t.set_shape(...) on the tensor."))
        if not self._last and len(shape) > 2:
            inputs = ops.transpose(inputs, (0, *range(2, len(shape)), 1))
        return ops.reshape(inputs, (_batch(inputs, shape[0], exact=None in shape[1:]), _rest(shape)))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return (n, product of the others). Raises TypeError for something that is no shape, ValueError for rank 0."""
        shape = one_shape(self._name, input_shape, range(1, 1 << 30))
        return TensorShape([shape[0], None if None in tuple(shape)[1:] else _rest(tuple(shape))])

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "data_format": self.data_format}


def _rest(shape: tuple[int | None, ...]) -> int:
    return -1 if None in shape[1:] else math.prod(shape[1:])  # type: ignore[arg-type]


def _batch(x: Any, size: int | None, exact: bool) -> Any:
    """Return the batch size to reshape to: -1 if it is unknown, unless another -1 needs an `exact` one."""
    if size is not None:
        return size
    return ops.shape_of(x)[0] if exact else -1


class Flatten(FlattenMixin, Layer):
    """(n, ...) to (n, product of the others): ``gl.keras.layers.Flatten``.

    `data_format`: with "channels_first" the channels, axis 1, are moved to the end before, so that what follows sees
    the same order for both formats. (n,) becomes (n, 1). Source: ``tf.keras.layers.Flatten``.

    >>> import numpy as np, gpulayers as gl
    >>> gl.keras.layers.Flatten()(np.ones((2, 3, 4))).shape
    (2, 12)
    """


class LegacyFlatten(FlattenMixin, LegacyLayer):
    """As `gl.keras.layers.Flatten`: ``gl.layers.Flatten``. Source: ``tf.layers.Flatten``."""

    def __init__(self, data_format: str | None = "channels_last", **kwargs: Any) -> None:
        super().__init__(data_format, **kwargs)


# Layers are named after their class.
LegacyFlatten.__name__ = LegacyFlatten.__qualname__ = "Flatten"


class Reshape(Layer):
    """(n, ...) to (n, *target_shape): ``gl.keras.layers.Reshape``.

    `target_shape`: sizes without the batch axis, one of them may be -1. Raises ValueError if they do not fit.
    Source: ``tf.keras.layers.Reshape``.

    >>> import numpy as np, gpulayers as gl
    >>> gl.keras.layers.Reshape((2, -1))(np.ones((5, 6))).shape
    (5, 2, 3)
    """

    def __init__(self, target_shape: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        sizes = (target_shape,) if hasattr(target_shape, "__index__") else tuple(target_shape)
        self.target_shape = tuple(int(size) for size in sizes)
        if self.target_shape.count(-1) > 1 or any(size < -1 for size in self.target_shape):
            raise ShapeError(message(self._name, "not a target shape", "sizes, one of them -1", self.target_shape))

    def call(self, inputs: Any) -> Any:
        """Return `inputs` with all but the first axis in the target shape."""
        shape = static_shape(inputs) or (None,)
        target = self._target(shape)
        return ops.reshape(inputs, (_batch(inputs, shape[0], exact=-1 in target), *target))

    def _target(self, shape: tuple[int | None, ...]) -> tuple[int, ...]:
        size = known_size(tuple(shape[1:]))
        known = math.prod(s for s in self.target_shape if s != -1)
        if size is None:
            return self.target_shape
        if -1 not in self.target_shape:
            if known != size:
                raise ShapeError(message(self._name, "the sizes do not fit", f"{size} elements", self.target_shape))
            return self.target_shape
        if not known or size % known:
            raise ShapeError(message(self._name, "the sizes do not fit", f"{size} elements", self.target_shape))
        return tuple(size // known if s == -1 else s for s in self.target_shape)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the shape of the result. Raises TypeError for no shape, ValueError for one that does not fit."""
        shape = one_shape(self._name, input_shape, range(1, 1 << 30))
        return TensorShape([shape[0], *(None if s == -1 else s for s in self._target(tuple(shape)))])

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "target_shape": self.target_shape}


class Permute(Layer):
    """Put the axes behind the first into another order: ``gl.keras.layers.Permute``.

    `dims`: the axes, counted from 1, in their new order. Raises ValueError if it is not a permutation.
    Source: ``tf.keras.layers.Permute``.

    >>> import numpy as np, gpulayers as gl
    >>> gl.keras.layers.Permute((2, 1))(np.ones((5, 6, 7))).shape
    (5, 7, 6)
    """

    def __init__(self, dims: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dims = tuple(int(axis) for axis in dims)
        if sorted(self.dims) != list(range(1, len(self.dims) + 1)):
            raise ShapeError(message(self._name, "Invalid permutation argument `dims`", "1, 2, ... in any order", dims))
        self.input_spec = InputSpec(ndim=len(self.dims) + 1)

    def call(self, inputs: Any) -> Any:
        """Return `inputs` with its axes in the new order."""
        return ops.transpose(inputs, (0, *self.dims))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the shape of the result. Raises TypeError for no shape, ValueError for one that does not fit."""
        rank = len(self.dims) + 1
        shape = one_shape(self._name, input_shape, range(rank, rank + 1))
        return TensorShape([shape[axis] for axis in (0, *self.dims)])

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "dims": self.dims}
