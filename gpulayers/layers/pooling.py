"""Pooling over windows of the spatial axes, and over all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from gpulayers import ops
from gpulayers.dtypes import TensorShape
from gpulayers.layers.core import CoreLayer
from gpulayers.layers.kernel import one_shape, window_places
from gpulayers.layers.legacy import LegacyLayer
from gpulayers.layers.modern import Layer
from gpulayers.layers.spec import InputSpec
from gpulayers.ops.static import static_shape
from gpulayers.ops.windows import Window, numbers, parse_format, parse_padding

__all__ = [
    "AveragePooling1D",
    "AveragePooling2D",
    "GlobalAveragePooling1D",
    "GlobalAveragePooling2D",
    "GlobalMaxPooling1D",
    "GlobalMaxPooling2D",
    "LegacyAveragePooling1D",
    "LegacyAveragePooling2D",
    "LegacyMaxPooling1D",
    "LegacyMaxPooling2D",
    "MaxPooling1D",
    "MaxPooling2D",
]


class PoolingMixin(CoreLayer):
    """The maths of pooling `_spatial` axes with `_pool`, for both families."""

    _spatial = 0
    _pool: ClassVar[Callable[..., Any]]

    def __init__(
        self, pool_size: Any, strides: Any, padding: str = "valid", data_format: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        name, rank = self._name, self._spatial
        self.pool_size = numbers(name, "pool_size", pool_size, rank)
        self.strides = self.pool_size if strides is None else numbers(name, "strides", strides, rank)
        self.padding = parse_padding(name, padding)
        self._last = parse_format(name, data_format)
        self.data_format = "channels_last" if self._last else "channels_first"
        self.input_spec = InputSpec(ndim=rank + 2)

    def call(self, inputs: Any) -> Any:
        """Return one value for each place of the window and each channel."""
        if (shape := static_shape(inputs)) is not None:
            self._places(shape)
        return type(self)._pool(inputs, self.pool_size, self.strides, self.padding, self.data_format)

    def _places(self, shape: tuple[int | None, ...]) -> list[int | None]:
        spatial = shape[1:-1] if self._last else shape[2:]
        return window_places(
            self._name, spatial, Window(self.pool_size, self.strides, (1,) * self._spatial, self.padding)
        )

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the shape of the result. Raises TypeError for no shape, ValueError for one that does not fit."""
        n, *rest = one_shape(self._name, input_shape, range(self._spatial + 2, self._spatial + 3))
        sizes = self._places((n, *rest))
        return TensorShape([n, *sizes, rest[-1]] if self._last else [n, rest[0], *sizes])

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "pool_size": self.pool_size,
            "strides": self.strides,
            "padding": self.padding,
            "data_format": self.data_format,
        }


class _Modern(PoolingMixin, Layer):
    """The arguments of the modern layers, in their order."""

    def __init__(
        self,
        pool_size: Any = 2,
        strides: Any = None,
        padding: str = "valid",
        data_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(pool_size, strides, padding, data_format, **kwargs)


class MaxPooling2D(_Modern):
    """The largest value of each window: ``gl.keras.layers.MaxPooling2D``.

    `x`: (n, h, w, c), or (n, c, h, w) with `data_format` "channels_first". `pool_size` and `strides` (None means
    `pool_size`): one integer or one for each axis. `padding`: "valid" or "same". Raises ValueError unless x has 4 axes,
    and where a "valid" window is longer than x (TensorFlow in eager mode: an empty result in some cases).
    Source: ``tf.keras.layers.MaxPooling2D``.

    >>> import numpy as np, gpulayers as gl
    >>> gl.keras.layers.MaxPooling2D()(np.arange(4.0).reshape(1, 2, 2, 1)).ravel()
    array([3.], dtype=float32)
    """

    _spatial, _pool = 2, ops.max_pool


class MaxPooling1D(_Modern):
    """`MaxPooling2D` for (n, steps, c), or (n, c, steps). Source: ``tf.keras.layers.MaxPooling1D``."""

    _spatial, _pool = 1, ops.max_pool


class AveragePooling2D(_Modern):
    """The mean of each window, padding not counted; arguments as `MaxPooling2D`. 16-bit data is summed in float32.

    Source: ``tf.keras.layers.AveragePooling2D``.

    >>> import numpy as np, gpulayers as gl
    >>> gl.keras.layers.AveragePooling2D()(np.arange(4.0).reshape(1, 2, 2, 1)).ravel()
    array([1.5], dtype=float32)
    """

    _spatial, _pool = 2, ops.avg_pool


class AveragePooling1D(_Modern):
    """`AveragePooling2D` for (n, steps, c), or (n, c, steps). Source: ``tf.keras.layers.AveragePooling1D``."""

    _spatial, _pool = 1, ops.avg_pool


class _Legacy(PoolingMixin, LegacyLayer):
    """The arguments of the legacy layers, in their order."""

    def __init__(
        self,
        pool_size: Any,
        strides: Any,
        padding: str = "valid",
        data_format: str | None = "channels_last",
        name: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(pool_size, strides, padding, data_format, name=name, **kwargs)


class LegacyMaxPooling2D(_Legacy):
    """The largest value of each window, with the order of ``tf.layers.MaxPooling2D``: ``gl.layers.MaxPooling2D``."""

    _spatial, _pool = 2, ops.max_pool


class LegacyMaxPooling1D(_Legacy):
    """The largest value of each window of one axis: ``gl.layers.MaxPooling1D``."""

    _spatial, _pool = 1, ops.max_pool


class LegacyAveragePooling2D(_Legacy):
    """The mean of each window, with the order of ``tf.layers.AveragePooling2D``: ``gl.layers.AveragePooling2D``."""

    _spatial, _pool = 2, ops.avg_pool


class LegacyAveragePooling1D(_Legacy):
    """The mean of each window of one axis: ``gl.layers.AveragePooling1D``."""

    _spatial, _pool = 1, ops.avg_pool


# Layers are named after their class.
for _class in (LegacyMaxPooling1D, LegacyMaxPooling2D, LegacyAveragePooling1D, LegacyAveragePooling2D):
    _class.__name__ = _class.__qualname__ = _class.__name__.removeprefix("Legacy")


class _Global(Layer):
    """Reduce all `_spatial` axes with `_reduce`."""

    _spatial = 0
    _reduce: ClassVar[Callable[..., Any]]

    def __init__(self, data_format: str | None = None, keepdims: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._last = parse_format(self._name, data_format)
        self.data_format = "channels_last" if self._last else "channels_first"
        self.keepdims = keepdims
        self.input_spec = InputSpec(ndim=self._spatial + 2)

    @property
    def _axes(self) -> tuple[int, ...]:
        first = 1 if self._last else 2
        return tuple(range(first, first + self._spatial))

    def call(self, inputs: Any) -> Any:
        """Return one value for each channel."""
        return type(self)._reduce(inputs, self._axes, keepdims=self.keepdims)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the shape of the result. Raises TypeError for no shape, ValueError for one that does not fit."""
        shape = one_shape(self._name, input_shape, range(self._spatial + 2, self._spatial + 3))
        sizes = [1 if axis in self._axes else size for axis, size in enumerate(shape)]
        return TensorShape(sizes if self.keepdims else [s for axis, s in enumerate(sizes) if axis not in self._axes])

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "data_format": self.data_format, "keepdims": self.keepdims}


class GlobalAveragePooling2D(_Global):
    """The mean over height and width: (n, h, w, c) to (n, c). Source: ``tf.keras.layers.GlobalAveragePooling2D``."""

    _spatial, _reduce = 2, ops.mean


class GlobalAveragePooling1D(_Global):
    """The mean over all steps: (n, steps, c) to (n, c); steps that a mask leaves out do not count.

    Source: ``tf.keras.layers.GlobalAveragePooling1D``.

    >>> import numpy as np, gpulayers as gl
    >>> x = np.array([[[1.0], [3.0], [0.0]]], "float32")
    >>> gl.keras.layers.GlobalAveragePooling1D()(gl.keras.layers.Masking()(x))
    array([[2.]], dtype=float32)
    """

    _spatial, _reduce = 1, ops.mean

    def __init__(self, data_format: str | None = None, keepdims: bool = False, **kwargs: Any) -> None:
        super().__init__(data_format, keepdims, **kwargs)
        self.supports_masking = True

    def call(self, inputs: Any, mask: Any = None) -> Any:
        """Return the mean of the steps that `mask` (n, steps) keeps."""
        if mask is None:
            return super().call(inputs)
        weights = ops.expand_dims(ops.cast(mask, inputs.dtype), -1 if self._last else 1)
        total = ops.sum(inputs * weights, self._axes, keepdims=self.keepdims)
        return total / ops.sum(weights, self._axes, keepdims=self.keepdims)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """Return None: there are no steps left to mask."""
        return None


class GlobalMaxPooling2D(_Global):
    """The maximum over height and width: (n, h, w, c) to (n, c). Source: ``tf.keras.layers.GlobalMaxPooling2D``."""

    _spatial, _reduce = 2, ops.max


class GlobalMaxPooling1D(_Global):
    """The largest value over all steps: (n, steps, c) to (n, c). Source: ``tf.keras.layers.GlobalMaxPooling1D``."""

    _spatial, _reduce = 1, ops.max
