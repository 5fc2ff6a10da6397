"""Batch normalisation without a layer: ``gl.nn.batch_normalization`` and the fused functions on plain arrays.

`forward`, `backward`, `inference`, `inference_backward` and `statistics` take and return plain arrays, record nothing
and keep no state: the kernels themselves, for programs with a gradient machinery of their own. See
`gpulayers.ops.batch_norm.arrays`.
"""

from __future__ import annotations

from typing import Any

from gpulayers import ops
from gpulayers.ops.batch_norm.arrays import Forward as Forward
from gpulayers.ops.batch_norm.arrays import Gradients as Gradients
from gpulayers.ops.batch_norm.arrays import MovingStatistics as MovingStatistics
from gpulayers.ops.batch_norm.arrays import Renorm as Renorm
from gpulayers.ops.batch_norm.arrays import backward as backward
from gpulayers.ops.batch_norm.arrays import forward as forward
from gpulayers.ops.batch_norm.arrays import inference as inference
from gpulayers.ops.batch_norm.arrays import inference_backward as inference_backward
from gpulayers.ops.batch_norm.arrays import statistics as statistics

__all__ = ["backward", "batch_normalization", "forward", "inference", "inference_backward", "statistics"]


def batch_normalization(
    x: Any, mean: Any, variance: Any, offset: Any, scale: Any, variance_epsilon: float, name: str | None = None
) -> Any:
    """Return ``(x - mean) / sqrt(variance + variance_epsilon) * scale + offset``, every operand broadcasting.

    `offset` and `scale` may be None. Differentiable in all of them, recorded like any operation.
    Source: ``tf.nn.batch_normalization``.

    >>> import numpy as np
    >>> batch_normalization(np.array([[3.0, 1.0]]), 1.0, 4.0, np.array([0.5, 0.0]), None, 0.0)
    array([[1.5, 0. ]])
    """
    factor = ops.rsqrt(ops.add(variance, variance_epsilon))
    if scale is not None:
        factor = factor * scale
    y = ops.subtract(x, mean) * factor
    return y if offset is None else y + offset
