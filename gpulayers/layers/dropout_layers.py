"""Dropout: in training, elements are set to zero at random and the others scaled up."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers import ops
from gpulayers.errors import DTypeError, LayerError, message
from gpulayers.layers.config_part import as_shape_structure
from gpulayers.layers.core import CoreLayer
from gpulayers.layers.legacy import LegacyLayer
from gpulayers.layers.modern import Layer
from gpulayers.layers.training import checked_training
from gpulayers.trace import GraphTensor, active_replays, cond

__all__ = ["Dropout", "LegacyDropout"]


class DropoutMixin(CoreLayer):
    """The maths of dropout, for both families."""

    def __init__(self, rate: Any, noise_shape: Any = None, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(rate, bool) or not isinstance(rate, int | float | np.number):
            raise DTypeError(message(self._name, "rate is not a number", "0 <= rate < 1", repr(rate)))
        if not 0 <= rate < 1:
            raise LayerError(message(self._name, "rate is out of range", "0 <= rate < 1", rate))
        self.rate, self.noise_shape, self.seed = float(rate), noise_shape, seed
        self.supports_masking = True
        # A seeded layer draws another mask at each call, and the same sequence of masks in each program.
        self._seeds = None if seed is None else np.random.default_rng(seed)

    def _drop(self, inputs: Any, training: Any) -> Any:
        training = checked_training(self._name, training)
        if not self.rate:
            return inputs
        if isinstance(training, GraphTensor):
            return cond(training, lambda: self._dropped(inputs), lambda: ops.identity(inputs))
        return self._dropped(inputs) if training else inputs

    def _dropped(self, inputs: Any) -> Any:
        seed = None if self._seeds is None else int(self._seeds.integers(2**63))
        if seed is not None and (replays := active_replays()) is not None:
            replays.refuse(f"{self._name} has a seed, so each mask comes from a seed that the host draws")
        return ops.dropout(inputs, self.rate, self.noise_shape, seed)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return `input_shape` as a `TensorShape`. Raises TypeError for something that is no shape."""
        return as_shape_structure(input_shape, self._name)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "rate": self.rate, "noise_shape": self.noise_shape, "seed": self.seed}


class Dropout(DropoutMixin, Layer):
    """In training, ``x * m``, with m 0 with probability `rate` and ``1 / (1 - rate)`` otherwise.

    Parameters: `rate`, from 0 to below 1; `noise_shape`, sizes of m, 1 where it is shared along an axis, None for the
    size of x; `seed`, for the same sequence of masks in every run of a program.

    Calling: ``layer(x, training=None)``; if not told, it follows the enclosing call, then the learning phase, which is
    False by default.
    Outside training x itself is returned. Masks are handed on. State written: the generator of a seeded layer.
    Raises ValueError for a rate out of range, TypeError for a `training` that is no bool, 0 or 1.
    Source: ``tf.keras.layers.Dropout``, arXiv 1207.0580.

    >>> import numpy as np, gpulayers as gl
    >>> y = gl.keras.layers.Dropout(0.5, seed=1)(np.ones((1, 100), "float32"), training=True)
    >>> sorted(set(y.ravel().tolist()))
    [0.0, 2.0]
    """

    def call(self, inputs: Any, training: Any = None) -> Any:
        """Drop elements of `inputs` if `training` is true."""
        return self._drop(inputs, training)


class LegacyDropout(DropoutMixin, LegacyLayer):
    """`gl.keras.layers.Dropout` with the order of ``tf.layers.Dropout``, and `rate` 0.5: ``gl.layers.Dropout``."""

    def __init__(
        self, rate: float = 0.5, noise_shape: Any = None, seed: int | None = None, name: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(rate, noise_shape, seed, name=name, **kwargs)

    def call(self, inputs: Any, training: Any = False) -> Any:
        """Drop elements of `inputs` if `training` is true."""
        return self._drop(inputs, training)


# Layers are named after their class.
LegacyDropout.__name__ = LegacyDropout.__qualname__ = "Dropout"
