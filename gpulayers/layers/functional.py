"""The functions of ``tf.layers``: make a legacy layer, call it once, return the output.

Variables are named ``name/...`` and shared with ``reuse=True``, or where the variable scope reuses. In eager mode each
call makes a new layer, so its variables are new too unless they are shared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from gpulayers import initializers
from gpulayers.layers.batch_normalization_layers import LegacyBatchNormalization
from gpulayers.layers.convolution import LegacyConv1D, LegacyConv2D
from gpulayers.layers.dense_layers import LegacyDense
from gpulayers.layers.dropout_layers import LegacyDropout
from gpulayers.layers.pooling import (
    LegacyAveragePooling1D,
    LegacyAveragePooling2D,
    LegacyMaxPooling1D,
    LegacyMaxPooling2D,
)
from gpulayers.layers.reshaping import LegacyFlatten

__all__ = [
    "average_pooling1d",
    "average_pooling2d",
    "batch_normalization",
    "conv1d",
    "conv2d",
    "dense",
    "dropout",
    "flatten",
    "max_pooling1d",
    "max_pooling2d",
]

_ZEROS = initializers.zeros_initializer()
_ONES = initializers.ones_initializer()


def dense(
    inputs: Any,
    units: int,
    activation: Any = None,
    use_bias: bool = True,
    kernel_initializer: Any = None,
    bias_initializer: Any = _ZEROS,
    kernel_regularizer: Any = None,
    bias_regularizer: Any = None,
    activity_regularizer: Any = None,
    kernel_constraint: Any = None,
    bias_constraint: Any = None,
    trainable: bool = True,
    name: str | None = None,
    reuse: Any = None,
) -> Any:
    """Return `gl.layers.Dense` of `inputs`. `reuse`: share the variables of this name. Source: ``tf.layers.dense``.

    >>> import numpy as np, gpulayers as gl
    >>> gl.layers.dense(np.ones((1, 3)), 2, kernel_initializer=gl.ones_initializer())
    array([[3., 3.]])
    """
    layer = LegacyDense(
        units,
        activation,
        use_bias,
        kernel_initializer,
        bias_initializer,
        kernel_regularizer,
        bias_regularizer,
        activity_regularizer,
        kernel_constraint,
        bias_constraint,
        trainable,
        name,
        _scope=name,
        _reuse=reuse,
    )
    return layer(inputs)


def _convolve(layer: Any, inputs: Any, settings: dict[str, Any]) -> Any:
    """Make `layer` with the settings of `conv1d` or `conv2d`, and call it."""
    reuse = settings.pop("reuse")
    return layer(**settings, _scope=settings["name"], _reuse=reuse)(inputs)


def conv1d(
    inputs: Any,
    filters: int,
    kernel_size: Any,
    strides: Any = 1,
    padding: str = "valid",
    data_format: str | None = "channels_last",
    dilation_rate: Any = 1,
    activation: Any = None,
    use_bias: bool = True,
    kernel_initializer: Any = None,
    bias_initializer: Any = _ZEROS,
    kernel_regularizer: Any = None,
    bias_regularizer: Any = None,
    activity_regularizer: Any = None,
    kernel_constraint: Any = None,
    bias_constraint: Any = None,
    trainable: bool = True,
    name: str | None = None,
    reuse: Any = None,
) -> Any:
    """Return `gl.layers.Conv1D` of `inputs`. `reuse`: share the variables of this name.

    Source: ``tf.layers.conv1d``.
    """
    settings = dict(locals())
    return _convolve(LegacyConv1D, settings.pop("inputs"), settings)


def conv2d(
    inputs: Any,
    filters: int,
    kernel_size: Any,
    strides: Any = (1, 1),
    padding: str = "valid",
    data_format: str | None = "channels_last",
    dilation_rate: Any = (1, 1),
    activation: Any = None,
    use_bias: bool = True,
    kernel_initializer: Any = None,
    bias_initializer: Any = _ZEROS,
    kernel_regularizer: Any = None,
    bias_regularizer: Any = None,
    activity_regularizer: Any = None,
    kernel_constraint: Any = None,
    bias_constraint: Any = None,
    trainable: bool = True,
    name: str | None = None,
    reuse: Any = None,
) -> Any:
    """Return `gl.layers.Conv2D` of `inputs`. `reuse`: share the variables of this name. Source: ``tf.layers.conv2d``.

    >>> import numpy as np, gpulayers as gl
    >>> gl.layers.conv2d(np.ones((1, 4, 4, 1), "float32"), 8, 3, padding="same").shape
    (1, 4, 4, 8)
    """
    settings = dict(locals())
    return _convolve(LegacyConv2D, settings.pop("inputs"), settings)


def dropout(
    inputs: Any,
    rate: float = 0.5,
    noise_shape: Any = None,
    seed: int | None = None,
    training: Any = False,
    name: str | None = None,
) -> Any:
    """Return `gl.layers.Dropout` of `inputs`. Source: ``tf.layers.dropout``."""
    return LegacyDropout(rate, noise_shape, seed, name)(inputs, training=training)


def flatten(inputs: Any, name: str | None = None, data_format: str | None = "channels_last") -> Any:
    """Return `gl.layers.Flatten` of `inputs`. Source: ``tf.layers.flatten``."""
    return LegacyFlatten(data_format, name=name)(inputs)


def max_pooling1d(
    inputs: Any,
    pool_size: Any,
    strides: Any,
    padding: str = "valid",
    data_format: str | None = "channels_last",
    name: str | None = None,
) -> Any:
    """Return `gl.layers.MaxPooling1D` of `inputs`. Source: ``tf.layers.max_pooling1d``."""
    return LegacyMaxPooling1D(pool_size, strides, padding, data_format, name)(inputs)


def max_pooling2d(
    inputs: Any,
    pool_size: Any,
    strides: Any,
    padding: str = "valid",
    data_format: str | None = "channels_last",
    name: str | None = None,
) -> Any:
    """Return `gl.layers.MaxPooling2D` of `inputs`. Source: ``tf.layers.max_pooling2d``."""
    return LegacyMaxPooling2D(pool_size, strides, padding, data_format, name)(inputs)


def average_pooling1d(
    inputs: Any,
    pool_size: Any,
    strides: Any,
    padding: str = "valid",
    data_format: str | None = "channels_last",
    name: str | None = None,
) -> Any:
    """Return `gl.layers.AveragePooling1D` of `inputs`. Source: ``tf.layers.average_pooling1d``."""
    return LegacyAveragePooling1D(pool_size, strides, padding, data_format, name)(inputs)


def average_pooling2d(
    inputs: Any,
    pool_size: Any,
    strides: Any,
    padding: str = "valid",
    data_format: str | None = "channels_last",
    name: str | None = None,
) -> Any:
    """Return `gl.layers.AveragePooling2D` of `inputs`. Source: ``tf.layers.average_pooling2d``."""
    return LegacyAveragePooling2D(pool_size, strides, padding, data_format, name)(inputs)


def batch_normalization(
    inputs: Any,
    axis: Any = -1,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    center: bool = True,
    scale: bool = True,
    beta_initializer: Any = _ZEROS,
    gamma_initializer: Any = _ONES,
    moving_mean_initializer: Any = _ZEROS,
    moving_variance_initializer: Any = _ONES,
    beta_regularizer: Any = None,
    gamma_regularizer: Any = None,
    beta_constraint: Any = None,
    gamma_constraint: Any = None,
    training: Any = False,
    trainable: bool = True,
    name: str | None = None,
    reuse: Any = None,
    renorm: bool = False,
    renorm_clipping: dict[str, Any] | None = None,
    renorm_momentum: float = 0.99,
    fused: bool | None = None,
    virtual_batch_size: int | None = None,
    adjustment: Callable[[Any], tuple[Any, Any]] | None = None,
) -> Any:
    """Make a `gl.layers.BatchNormalization` with its variables at ``name/...``, call it on `inputs`, return the output.

    `reuse`: share the variables of that name (True), or make new ones (None; ValueError in a graph if they exist). The
    other arguments are the layer's. Works in eager mode too, with new variables at each call. Issues a
    DeprecationWarning, as ``tf.layers.batch_normalization`` does, its source: use the layer in new programs.

    >>> import warnings, numpy as np, gpulayers as gl
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", DeprecationWarning)
    ...     gl.layers.batch_normalization(np.array([[1.0], [3.0]], np.float32), epsilon=0.0, training=True)
    array([[-1.],
           [ 1.]], dtype=float32)
    """
    warnings.warn(
        "batch_normalization is a legacy function; use gl.layers.BatchNormalization or gl.keras.layers.",
        DeprecationWarning,
        stacklevel=2,
    )
    layer = LegacyBatchNormalization(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        center=center,
        scale=scale,
        beta_initializer=beta_initializer,
        gamma_initializer=gamma_initializer,
        moving_mean_initializer=moving_mean_initializer,
        moving_variance_initializer=moving_variance_initializer,
        beta_regularizer=beta_regularizer,
        gamma_regularizer=gamma_regularizer,
        beta_constraint=beta_constraint,
        gamma_constraint=gamma_constraint,
        renorm=renorm,
        renorm_clipping=renorm_clipping,
        renorm_momentum=renorm_momentum,
        fused=fused,
        trainable=trainable,
        virtual_batch_size=virtual_batch_size,
        adjustment=adjustment,
        name=name,
        _reuse=reuse,
        _scope=name,
    )
    return layer(inputs, training=training)
