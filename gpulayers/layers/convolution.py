"""Conv1D and Conv2D: a kernel slid over the spatial axes, from one implementation."""

from __future__ import annotations

import math
from typing import Any

from gpulayers import initializers, ops
from gpulayers.dtypes import TensorShape
from gpulayers.errors import ShapeError, message
from gpulayers.layers.kernel import KernelMixin, checked_count, one_shape, window_places
from gpulayers.layers.legacy import LegacyLayer
from gpulayers.layers.modern import Layer
from gpulayers.layers.spec import InputSpec
from gpulayers.ops.static import static_shape
from gpulayers.ops.windows import Window, numbers, parse_format, parse_padding

__all__ = ["Conv1D", "Conv2D", "LegacyConv1D", "LegacyConv2D"]


class ConvolutionMixin(KernelMixin):
    """The maths of a convolution over `_spatial` axes, for both families."""

    _spatial = 0

    def __init__(
        self,
        filters: int,
        kernel_size: Any,
        strides: Any = 1,
        padding: str = "valid",
        data_format: str | None = None,
        dilation_rate: Any = 1,
        groups: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        name, rank = self._name, self._spatial
        self.filters = checked_count(name, "filters", filters)
        self.groups = checked_count(name, "groups", groups)
        self.kernel_size = numbers(name, "kernel_size", kernel_size, rank)
        self.strides = numbers(name, "strides", strides, rank)
        self.dilation_rate = numbers(name, "dilation_rate", dilation_rate, rank)
        self.padding = parse_padding(name, padding, causal=rank == 1)
        self._last = parse_format(name, data_format)
        self.data_format = "channels_last" if self._last else "channels_first"
        if self.filters % self.groups:
            raise ShapeError(message(name, "filters do not divide into the groups", f"a multiple of {groups}", filters))
        self.input_spec = InputSpec(min_ndim=rank + 2)

    @property
    def _channel_axis(self) -> int:
        return -1 if self._last else -1 - self._spatial

    def _channels(self, shape: TensorShape) -> int:
        channels = shape[self._channel_axis]
        if channels is None:
            raise ShapeError(message(self._name, "The channel dimension of the inputs should be defined", got=shape))
        if channels % self.groups:
            raise ShapeError(
                message(self._name, "channels do not divide into the groups", f"a multiple of {self.groups}", channels)
            )
        return int(channels)

    def build(self, input_shape: Any) -> None:
        """Make `kernel` (sizes..., c / groups, filters) and `bias` (filters,).

        Raises ValueError if c is unknown or the kernel longer than the input.
        """
        shape = self._shape(input_shape)
        channels = self._channels(shape)
        self._places(tuple(shape))
        self.input_spec = InputSpec(min_ndim=self._spatial + 2, axes={self._channel_axis: channels})
        self._make_kernel((*self.kernel_size, channels // self.groups, self.filters))
        self.built = True

    def call(self, inputs: Any) -> Any:
        """Return ``activation(convolution(inputs, kernel) + bias)``."""
        inputs = self._in_compute_dtype(inputs)
        shape = static_shape(inputs)
        if shape is not None:
            self._places(shape)
        further = 0 if shape is None else len(shape) - self._spatial - 2
        outputs = self._convolve(inputs if not further else _folded(self._name, inputs, further))
        if self.bias is not None:
            outputs = ops.bias_add(outputs, self.bias, self.data_format)
        if further and shape is not None:
            lead = [-1 if size is None else size for size in shape[: further + 1]]
            outputs = ops.reshape(outputs, (*lead, *(static_shape(outputs) or ())[1:]))
        return self._activated(outputs)

    def _places(self, shape: tuple[int | None, ...]) -> list[int | None]:
        spatial = shape[-self._spatial - 1 : -1] if self._last else shape[-self._spatial :]
        return window_places(
            self._name, spatial, Window(self.kernel_size, self.strides, self.dilation_rate, self.padding)
        )

    def _convolve(self, inputs: Any) -> Any:
        return ops.convolution(
            inputs, self.kernel, self.strides, self.padding, self.data_format, self.dilation_rate, self.groups
        )

    def _shape(self, input_shape: Any) -> TensorShape:
        return one_shape(self._name, input_shape, range(self._spatial + 2, 1 << 30))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the shape of the result. Raises TypeError for no shape, ValueError for one that does not fit."""
        shape = self._shape(input_shape)
        self._channels(shape)
        lead = list(shape)[: -self._spatial - 1]
        sizes = self._places(tuple(shape))
        return TensorShape([*lead, *sizes, self.filters] if self._last else [*lead, self.filters, *sizes])

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        own = {
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "data_format": self.data_format,
            "dilation_rate": self.dilation_rate,
        }
        if self.groups != 1:
            own["groups"] = self.groups
        return {**super().get_config(), **own}


def _folded(name: str, x: Any, further: int) -> Any:
    """Fold the first `further` + 1 axes, all of the batch, into one."""
    shape = static_shape(x) or ()
    if shape[: further + 1].count(None) > 1 or None in shape[further + 1 :]:
        raise ShapeError(message(name, "too much of the shape is unknown for more than one batch axis", got=shape))
    rows = -1 if None in shape else math.prod(shape[: further + 1])  # type: ignore[arg-type]
    return ops.reshape(x, (rows, *shape[further + 1 :]))


class _Modern(ConvolutionMixin, Layer):
    """The arguments of the modern convolutions, in their order."""

    def __init__(
        self,
        filters: int,
        kernel_size: Any,
        strides: Any = 1,
        padding: str = "valid",
        data_format: str | None = None,
        dilation_rate: Any = 1,
        groups: int = 1,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            filters,
            kernel_size,
            strides,
            padding,
            data_format,
            dilation_rate,
            groups,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            **kwargs,
        )


class Conv2D(_Modern):
    """Slide a kernel over two spatial axes (cross-correlation): ``gl.keras.layers.Conv2D``.

    `x`: (n, h, w, c), or (n, c, h, w) with `data_format` "channels_first"; further axes in front belong to the batch.
    Returns (n, places, places, filters), or (n, filters, places, places).

    Parameters

    - `filters`: channels of the result. `kernel_size`, `strides`, `dilation_rate`: one integer or one for each axis.
    - `padding`: "valid", or "same": ceil(size / stride) places, an odd zero behind.
    - `data_format`: None means "channels_last".
    - `groups`: the channels are cut into so many parts, each with its own filters.
    - `activation`, `use_bias`, initializers, regularizers, constraints: as in `Dense`.

    Variables: `kernel` (kh, kw, c / groups, filters), `bias` (filters,). 16-bit products are accumulated in float32.
    Raises ValueError for a rank below 4, an unknown c, an unknown padding or data format, sizes that are not positive,
    and a "valid" window longer than x (TensorFlow in eager mode: an empty result where it is longer by one).
    Source: ``tf.keras.layers.Conv2D``; strides and dilation may both exceed 1 here.

    >>> import numpy as np, gpulayers as gl
    >>> layer = gl.keras.layers.Conv2D(1, 2, kernel_initializer="ones")
    >>> layer(np.ones((1, 3, 3, 1), "float32")).ravel()
    array([4., 4., 4., 4.], dtype=float32)
    """

    _spatial = 2


class Conv1D(_Modern):
    """Slide a kernel over one spatial axis: `Conv2D` with (n, steps, c), or (n, c, steps).

    `padding` may also be "causal": zeros in front only, so that no place sees a later step.
    Source: ``tf.keras.layers.Conv1D``.

    >>> import numpy as np, gpulayers as gl
    >>> layer = gl.keras.layers.Conv1D(1, 2, padding="causal", kernel_initializer="ones")
    >>> layer(np.ones((1, 3, 1), "float32")).ravel()
    array([1., 2., 2.], dtype=float32)
    """

    _spatial = 1


class _Legacy(ConvolutionMixin, LegacyLayer):
    """The arguments of the legacy convolutions, in their order."""

    def __init__(
        self,
        filters: int,
        kernel_size: Any,
        strides: Any = 1,
        padding: str = "valid",
        data_format: str | None = "channels_last",
        dilation_rate: Any = 1,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = None,
        bias_initializer: Any = initializers.zeros_initializer(),  # noqa: B008  (it holds nothing but a dtype)
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        trainable: bool = True,
        name: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            filters,
            kernel_size,
            strides,
            padding,
            data_format,
            dilation_rate,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            trainable=trainable,
            name=name,
            **kwargs,
        )


class LegacyConv2D(_Legacy):
    """`gl.keras.layers.Conv2D` with variable scopes and the order of ``tf.layers.Conv2D``: ``gl.layers.Conv2D``.

    `kernel_initializer` None takes the scope's initializer, or Glorot uniform. The dtype is the first input's.

    >>> import numpy as np, gpulayers as gl
    >>> layer = gl.layers.Conv2D(1, (2, 2), kernel_initializer=gl.ones_initializer())
    >>> layer(np.ones((1, 2, 2, 1))).shape
    (1, 1, 1, 1)
    """

    _spatial = 2


class LegacyConv1D(_Legacy):
    """`gl.keras.layers.Conv1D` with variable scopes and the order of ``tf.layers.Conv1D``: ``gl.layers.Conv1D``."""

    _spatial = 1


# Layers are named after their class, and a legacy program's are called Conv1D and Conv2D.
LegacyConv1D.__name__ = LegacyConv1D.__qualname__ = "Conv1D"
LegacyConv2D.__name__ = LegacyConv2D.__qualname__ = "Conv2D"
