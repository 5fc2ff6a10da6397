"""Batch normalisation layers, legacy and modern."""

from __future__ import annotations

from typing import Any

from gpulayers import initializers
from gpulayers.layers.batch_normalization_mixin import BatchNormalizationMixin
from gpulayers.layers.legacy import LegacyLayer
from gpulayers.layers.modern import Layer

__all__ = ["BatchNormalization", "LegacyBatchNormalization"]


class LegacyBatchNormalization(BatchNormalizationMixin, LegacyLayer):
    """Batch normalisation with TensorFlow 1's rules: ``gl.layers.BatchNormalization``.

    `momentum` is the weight kept of the past (PyTorch's is the weight of the new value: ``momentum = 1 - torch's``).

    Training: ``y = (x - mean) / sqrt(var + epsilon) * gamma + beta``, with mean and biased variance (divided by N)
    over all axes but `axis`. Inference: the same with `moving_mean` and `moving_variance`. Each training call makes
    ``v <- v - (v - batch value) * (1 - momentum)``; where TensorFlow would take its fused path (see `fused`) the moving
    variance takes the unbiased one, ``var * N / max(N - 1, 1)``.

    Parameters
    - `axis`: the axis, or list of axes, that has statistics of its own; -1 for channels last, 1 for channels first.
    - `momentum`, `epsilon`: see above; epsilon is used as given.
    - `center`, `scale`: whether there are `beta` and `gamma`.
    - `beta_initializer`, `gamma_initializer`, `moving_mean_initializer`, `moving_variance_initializer`;
      `beta_regularizer`, `gamma_regularizer`; `beta_constraint`, `gamma_constraint`: names, configurations or
      callables.
    - `renorm`, `renorm_clipping` (dictionary with any of ``rmax``, ``rmin``, ``dmax``: numbers, scalars, or functions
      without arguments for a schedule), `renorm_momentum`: batch renormalisation; y becomes ``(n * r + d) * gamma +
      beta``. A function gives a number or a scalar on the host or the device. In eager mode it is called in each
      training call; where a graph or `gl.function` records, once then and again whenever what was recorded runs, unless
      it gave a tensor or variable, which is used as such. `gl.cuda_graph` cannot capture such a call, and says so.
    - `fused`: None, True or False. Which kernel runs is our affair; this decides the estimator of the moving variance,
      as in TensorFlow: fused for rank 4 or 5, axis 1 or last, no renorm, sub-batches or adjustment, not float64.
    - `trainable`: False leaves the moving statistics alone and makes gamma and beta non-trainable; training calls still
      use batch statistics (the modern layer does not).
    - `virtual_batch_size` V: each sub-batch of V rows is normalised by itself; row i belongs to sub-batch ``i mod (B /
      V)``.
    - `adjustment`: function of the input's dynamic shape giving (scale, bias), ``y = (n * scale + bias) * gamma +
      beta``.
    - `activation` (extension): applied to the output, ReLU in the same kernel.
    - `skip_nonfinite_updates` (extension): channels whose batch moments are not finite keep their moving statistics,
      and the variable `skipped_updates` counts them.
    - `name`, `dtype` and the other keywords of `Layer`.

    Calling: ``layer(x, training=False, mask=None, residual=None)``. `x` of any rank, floating. `training`: bool, 0, 1,
    or a boolean scalar: an array, a variable, a tensor of a graph. `mask`, shaped like x without its last axis, weighs
    the values in the moments; all are normalised still, and no gradient reaches the mask (TensorFlow: it reaches a
    floating one). `residual` (extension) is cast as x is, and added before the activation. Returns an array of x's
    shape, in the layer's dtype.

    State written: moving statistics, at once in eager mode and under a tape, by `updates` in a graph (run them with the
    step: they are in UPDATE_OPS). Variables are float32 for 16-bit layers. Shapes: (C,) for one axis; for several axes
    x's rank with 1 elsewhere; with `virtual_batch_size` a further 1 at index 1.

    Raises TypeError and ValueError as TensorFlow does: `axis` of a wrong type (constructor) or out of range (build),
    unknown keys in `renorm_clipping` or an `epsilon` that is no number (constructor; TensorFlow refuses the latter when
    called), integer input (TensorFlow casts it where the layer has a floating dtype) or another `training` (call; what
    a graph is fed is checked when it runs, its value only on the host), a batch that `virtual_batch_size` does not
    divide (training call), and so on; GraphError for a training call in a branch of a graph's `cond`, whose updates no
    session could run: pass the condition as `training`. An empty batch returns an empty array and changes nothing
    (TensorFlow: NaN). One value per channel gives y = beta and warns once. The config of a built layer with
    `virtual_batch_size` numbers `axis` as inputs do, so that a copy can be made (TensorFlow: as `layer.axis`).

    Numerics: 16-bit data is accumulated in float32, sums are taken around a pivot; same bits on every run.
    Source: arXiv 1502.03167 algorithm 1; arXiv 1702.03275 algorithm 1 (renorm); ``tf.layers.BatchNormalization``.

    >>> import numpy as np, gpulayers as gl
    >>> layer = gl.layers.BatchNormalization(momentum=0.9)
    >>> y = layer(np.array([[1.0], [3.0]], np.float32), training=True)
    >>> y.round(3).tolist(), layer.moving_mean.numpy().round(3).tolist()
    ([[-1.0], [1.0]], [0.20000000298023224])
    """

    def __init__(
        self,
        axis: Any = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = initializers.zeros_initializer(),  # noqa: B008  (it holds nothing but a dtype)
        gamma_initializer: Any = initializers.ones_initializer(),  # noqa: B008
        moving_mean_initializer: Any = initializers.zeros_initializer(),  # noqa: B008
        moving_variance_initializer: Any = initializers.ones_initializer(),  # noqa: B008
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            axis,
            momentum,
            epsilon,
            center,
            scale,
            beta_initializer,
            gamma_initializer,
            moving_mean_initializer,
            moving_variance_initializer,
            *args,
            **kwargs,
        )

    def call(self, inputs: Any, training: Any = False, mask: Any = None, residual: Any = None) -> Any:
        """Normalise `inputs`; see the class."""
        return self._normalise(inputs, training, mask, residual)

    _own_call = call


# Layers are named after their class, and a legacy program's is called BatchNormalization.
LegacyBatchNormalization.__name__ = LegacyBatchNormalization.__qualname__ = "BatchNormalization"


class BatchNormalization(BatchNormalizationMixin, Layer):
    """Batch normalisation with the modern rules: ``gl.keras.layers.BatchNormalization``.

    Arguments and maths are those of `gl.layers.BatchNormalization`; all of renorm, sub-batches, adjustment and several
    axes are here too. It differs in three rules: with ``trainable=False`` a training call uses the moving statistics,
    as inference does; ``fused=True`` where that is impossible raises ValueError; and inputs are cast to the compute
    dtype of the layer's policy, variables staying float32 under a mixed policy. `training` defaults to the enclosing
    call's.

    Source: ``tf.keras.layers.BatchNormalization``.

    >>> import numpy as np, gpulayers as gl
    >>> layer = gl.keras.layers.BatchNormalization(trainable=False, epsilon=0.0)
    >>> layer(np.array([[3.0], [5.0]], np.float32), training=True)
    array([[3.],
           [5.]], dtype=float32)
    """

    _trainable_false_means_inference = True
    _fused_must_be_possible = True

    def call(self, inputs: Any, training: Any = None, mask: Any = None, residual: Any = None) -> Any:
        """Normalise `inputs`; see the class."""
        return self._normalise(inputs, training, mask, residual)

    _own_call = call
