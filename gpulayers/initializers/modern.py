"""The modern family (``tf.keras.initializers``): one instance gives the same values at every call.

Without a seed an instance draws one for itself when it is made. A part of a partitioned variable is cut out of the
values of the whole, so a variable's values do not depend on how it is partitioned.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.errors import message
from gpulayers.initializers import draws
from gpulayers.initializers.base import BaseInitializer, generator_of

__all__ = [
    "Constant",
    "GlorotNormal",
    "GlorotUniform",
    "HeNormal",
    "HeUniform",
    "Identity",
    "Initializer",
    "LecunNormal",
    "LecunUniform",
    "Ones",
    "Orthogonal",
    "RandomNormal",
    "RandomUniform",
    "TruncatedNormal",
    "VarianceScaling",
    "Zeros",
]


class Initializer(BaseInitializer):
    """Base of initializers. A subclass of your own may define `__call__(shape, dtype=None, **keywords)` alone.

    >>> class Halves(Initializer):
    ...     def __call__(self, shape, dtype=None, **keywords):
    ...         return np.full(shape, 0.5, dtype)
    >>> Halves()((2,))
    array([0.5, 0.5])
    """

    def host(self, shape: tuple[int, ...], dtype: np.dtype, partition_info: Any) -> np.ndarray:
        """Return the values; for a part, those of the whole at its place."""
        if partition_info is None:
            return self.draw(shape, dtype)
        whole = self.draw(tuple(partition_info.full_shape), dtype)
        offsets = partition_info.var_offset
        return whole[tuple(slice(o, o + size) for o, size in zip(offsets, shape, strict=True))]

    def draw(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return host values for the whole shape."""
        raise NotImplementedError(message(type(self).__name__, "defines neither __call__ nor draw"))

    def _generator(self) -> np.random.Generator:
        return generator_of(self._drawn_seed)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make an initializer from what `get_config` returned. The ``dtype`` of a v1 configuration is left out."""
        return cls(**{name: value for name, value in config.items() if name != "dtype"})


class Zeros(Initializer):
    """All 0 (or False). Source: ``tf.keras.initializers.Zeros``.

    >>> Zeros()((2,))
    array([0., 0.], dtype=float32)
    """

    def draw(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return zeros."""
        return draws.filled("zeros", shape, dtype, 0)


class Ones(Initializer):
    """All 1 (or True). Source: ``tf.keras.initializers.Ones``.

    >>> Ones()((2,), "int32")
    array([1, 1], dtype=int32)
    """

    def draw(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return ones."""
        return draws.filled("ones", shape, dtype, 1)


class Constant(Initializer):
    """All `value`, or an array of the shape asked for (or one that broadcasts to it).

    Source: ``tf.keras.initializers.Constant``.

    >>> Constant(2.5)((2,))
    array([2.5, 2.5], dtype=float32)
    """

    def __init__(self, value: Any = 0) -> None:
        self.value = value

    def draw(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return the value, stretched to the shape."""
        return draws.filled("constant", shape, dtype, self.value)

    def get_config(self) -> dict[str, Any]:
        """Return ``{"value": ...}``."""
        return {"value": self.value}


class RandomUniform(Initializer):
    """Uniform in ``[minval, maxval)``. Source: ``tf.keras.initializers.RandomUniform``.

    >>> values = RandomUniform(-1.0, 1.0, seed=1)((1000,))
    >>> bool((values >= -1).all() and (values < 1).all())
    True
    """

    def __init__(self, minval: float = -0.05, maxval: float = 0.05, seed: int | None = None) -> None:
        self.minval, self.maxval = minval, maxval
        self._take_seed(seed)

    def draw(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return uniform numbers."""
        return draws.uniform(self._generator(), shape, dtype, self.minval, self.maxval)

    def get_config(self) -> dict[str, Any]:
        """Return the three arguments."""
        return {"minval": self.minval, "maxval": self.maxval, "seed": self.seed}


class RandomNormal(Initializer):
    """Normal with `mean` and standard deviation `stddev`. Source: ``tf.keras.initializers.RandomNormal``.

    >>> initializer = RandomNormal(seed=1)
    >>> bool((initializer((3,)) == initializer((3,))).all())
    True
    """

    def __init__(self, mean: float = 0.0, stddev: float = 0.05, seed: int | None = None) -> None:
        self.mean, self.stddev = mean, stddev
        self._take_seed(seed)

    def draw(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return normal numbers."""
        return draws.normal(self._generator(), shape, dtype, self.mean, self.stddev)

    def get_config(self) -> dict[str, Any]:
        """Return the three arguments."""
        return {"mean": self.mean, "stddev": self.stddev, "seed": self.seed}


class TruncatedNormal(RandomNormal):
    """Normal, drawn again beyond two `stddev`; the result's deviation is 0.88 `stddev`.

    Source: ``tf.keras.initializers.TruncatedNormal``.

    >>> bool((abs(TruncatedNormal(stddev=1.0, seed=1)((1000,))) <= 2).all())
    True
    """

    def draw(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return truncated normal numbers."""
        return draws.truncated(self._generator(), shape, dtype, self.mean, self.stddev)


class VarianceScaling(Initializer):
    """Variance ``scale / n``, with n the inputs (``fan_in``), the outputs (``fan_out``) or their mean (``fan_avg``).

    `distribution`: ``"truncated_normal"`` (or ``"normal"``), whose deviation is corrected for the truncation,
    ``"untruncated_normal"``, or ``"uniform"`` in ``+-sqrt(3 scale / n)``.
    Raises ValueError for a scale of 0 or less, and unknown names. Source: ``tf.keras.initializers.VarianceScaling``.

    >>> bool(abs(VarianceScaling(mode="fan_out", distribution="uniform", seed=1)((2, 3))).max() <= 1.0)
    True
    """

    def __init__(
        self,
        scale: float = 1.0,
        mode: str = "fan_in",
        distribution: str = "truncated_normal",
        seed: int | None = None,
    ) -> None:
        self.mode, self.distribution = draws.check_scaling(type(self).__name__, scale, mode, distribution)
        self.scale = scale
        self._take_seed(seed)

    def draw(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return scaled numbers."""
        return draws.scaled(self._generator(), shape, dtype, self.scale, self.mode, self.distribution)

    def get_config(self) -> dict[str, Any]:
        """Return the four arguments."""
        return {"scale": self.scale, "mode": self.mode, "distribution": self.distribution, "seed": self.seed}


class _Named(VarianceScaling):
    """A variance scaling known by a name: only its seed is free."""

    arguments: tuple[float, str, str]

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(*self.arguments, seed)

    def get_config(self) -> dict[str, Any]:
        """Return ``{"seed": ...}``."""
        return {"seed": self.seed}


class GlorotUniform(_Named):
    """Uniform in ``+-sqrt(6 / (inputs + outputs))``. Source: Glorot and Bengio 2010, equation 16."""

    arguments = (1.0, "fan_avg", "uniform")


class GlorotNormal(_Named):
    """Truncated normal of variance ``2 / (inputs + outputs)``. Source: Glorot and Bengio 2010, equation 12."""

    arguments = (1.0, "fan_avg", "truncated_normal")


class HeUniform(_Named):
    """Uniform in ``+-sqrt(6 / inputs)``. Source: He et al. 2015, section 2.2."""

    arguments = (2.0, "fan_in", "uniform")


class HeNormal(_Named):
    """Truncated normal of variance ``2 / inputs``. Source: He et al. 2015, equation 10."""

    arguments = (2.0, "fan_in", "truncated_normal")


class LecunUniform(_Named):
    """Uniform in ``+-sqrt(3 / inputs)``. Source: LeCun et al. 1998, section 4.6."""

    arguments = (1.0, "fan_in", "uniform")


class LecunNormal(_Named):
    """Truncated normal of variance ``1 / inputs``. Source: LeCun et al. 1998, equation 16."""

    arguments = (1.0, "fan_in", "truncated_normal")


class Orthogonal(Initializer):
    """`gain` times a matrix with orthonormal rows or columns; leading axes count as one.

    Raises ValueError for fewer than two axes. Source: ``tf.keras.initializers.Orthogonal``; Saxe et al. 2014.

    >>> w = Orthogonal(seed=1)((3, 2), "float64")
    >>> bool(np.allclose(w.T @ w, np.eye(2)))
    True
    """

    def __init__(self, gain: float = 1.0, seed: int | None = None) -> None:
        self.gain = gain
        self._take_seed(seed)

    def draw(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return the matrix in its shape."""
        return draws.orthogonal(self._generator(), shape, dtype, self.gain)

    def get_config(self) -> dict[str, Any]:
        """Return ``{"gain": ..., "seed": ...}``."""
        return {"gain": self.gain, "seed": self.seed}


class Identity(Initializer):
    """`gain` on the diagonal of a matrix. Raises ValueError unless there are two axes.

    Source: ``tf.keras.initializers.Identity``.

    >>> Identity(2.0)((2, 3))
    array([[2., 0., 0.],
           [0., 2., 0.]], dtype=float32)
    """

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def draw(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return the matrix."""
        return draws.diagonal(shape, dtype, self.gain)

    def get_config(self) -> dict[str, Any]:
        """Return ``{"gain": ...}``."""
        return {"gain": self.gain}
