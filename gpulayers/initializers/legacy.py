"""The family of ``tf.compat.v1``: other defaults, a dtype of their own, and new values at every call.

The maths is that of the modern family (`draws`). With a seed, an instance starts a fixed sequence and each call takes
the next numbers from it. For a part of a partitioned variable, variance scaling counts the fans of the whole.
The class names are TensorFlow's function-like ones.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpulayers.dtypes import as_dtype, dtype_name
from gpulayers.errors import DTypeError, ShapeError, message
from gpulayers.initializers import draws
from gpulayers.initializers.base import BaseInitializer, generator_of

__all__ = [
    "constant_initializer",
    "glorot_normal_initializer",
    "glorot_uniform_initializer",
    "he_normal_initializer",
    "he_uniform_initializer",
    "identity_initializer",
    "lecun_normal_initializer",
    "lecun_uniform_initializer",
    "ones_initializer",
    "orthogonal_initializer",
    "random_normal_initializer",
    "random_uniform_initializer",
    "truncated_normal_initializer",
    "variance_scaling_initializer",
    "zeros_initializer",
]


class LegacyInitializer(BaseInitializer):
    """Base of the v1 initializers: `settings` of the subclass and the dtype make the configuration."""

    _generator: np.random.Generator | None = None

    def __init__(self, dtype: Any = "float32") -> None:
        self.dtype = self.default_dtype = as_dtype(dtype)

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments other than dtype."""
        return {}

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, the dtype by its name."""
        return {**self.settings(), "dtype": dtype_name(self.dtype)}

    def generator(self) -> np.random.Generator:
        """Return the sequence that calls take their numbers from."""
        if self._generator is None:
            self._generator = generator_of(self._drawn_seed)
        return self._generator


class zeros_initializer(LegacyInitializer):
    """All 0 (or False). Source: ``tf.compat.v1.zeros_initializer``.

    >>> zeros_initializer()((2,)), zeros_initializer().get_config()
    (array([0., 0.], dtype=float32), {'dtype': 'float32'})
    """

    def host(self, shape: tuple[int, ...], dtype: np.dtype, partition_info: Any) -> np.ndarray:
        """Return zeros."""
        return draws.filled("zeros", shape, dtype, 0)


class ones_initializer(LegacyInitializer):
    """All 1 (or True). Source: ``tf.compat.v1.ones_initializer``."""

    def host(self, shape: tuple[int, ...], dtype: np.dtype, partition_info: Any) -> np.ndarray:
        """Return ones."""
        return draws.filled("ones", shape, dtype, 1)


class constant_initializer(LegacyInitializer):
    """A number, or a list or array that fills the shape row by row; a short one repeats its last element.

    Raises TypeError for a value that is no number, list or array, and with `verify_shape` for one of another shape;
    ValueError when called for a shape with fewer elements than the list. Source: ``tf.compat.v1.constant_initializer``.

    >>> constant_initializer([1, 2, 3])((2, 2))
    array([[1., 2.],
           [3., 3.]], dtype=float32)
    """

    def __init__(self, value: Any = 0, dtype: Any = "float32", verify_shape: bool = False) -> None:
        super().__init__(dtype)
        if not (np.isscalar(value) or isinstance(value, list | tuple | np.ndarray)):
            raise DTypeError(message("constant_initializer", "not a value", "a number, list or array", repr(value)))
        self.value, self.verify_shape = value, verify_shape

    def host(self, shape: tuple[int, ...], dtype: np.dtype, partition_info: Any) -> np.ndarray:
        """Return the value in the shape."""
        value = np.asarray(self.value)
        if self.verify_shape and value.shape != shape:
            raise DTypeError(message("constant_initializer", "the value has another shape", shape, value.shape))
        if value.ndim == 0:
            return draws.filled("constant", shape, dtype, self.value)
        flat, size = value.ravel(), math.prod(shape)
        if flat.size > size:
            raise ShapeError(message("constant_initializer", "too many values", f"{size} for {shape}", flat.size))
        if size and not flat.size:
            raise ShapeError(message("constant_initializer", "the list is empty", "one value at least"))
        filler = np.repeat(flat[-1:], size - flat.size)
        return np.concatenate([flat, filler]).astype(dtype).reshape(shape)

    def settings(self) -> dict[str, Any]:
        """Return ``{"value": ...}``."""
        return {"value": self.value}


class random_uniform_initializer(LegacyInitializer):
    """Uniform in ``[minval, maxval)``; `maxval` is 1 for floating dtypes if not given.

    Raises ValueError when called for integers without `maxval`. Source: ``tf.compat.v1.random_uniform_initializer``.
    """

    def __init__(
        self, minval: float = 0.0, maxval: float | None = None, seed: int | None = None, dtype: Any = "float32"
    ) -> None:
        super().__init__(dtype)
        self.minval, self.maxval = minval, maxval
        self._take_seed(seed)

    def host(self, shape: tuple[int, ...], dtype: np.dtype, partition_info: Any) -> np.ndarray:
        """Return uniform numbers."""
        if self.maxval is None and dtype.kind in "iu":
            raise ValueError(message("random_uniform_initializer", "integers need maxval", do="Pass maxval."))
        high = 1.0 if self.maxval is None else self.maxval
        return draws.uniform(self.generator(), shape, dtype, self.minval, high)

    def settings(self) -> dict[str, Any]:
        """Return minval, maxval and seed."""
        return {"minval": self.minval, "maxval": self.maxval, "seed": self.seed}


class random_normal_initializer(LegacyInitializer):
    """Normal; `stddev` is 1 if not given. Source: ``tf.compat.v1.random_normal_initializer``.

    >>> initializer = random_normal_initializer(seed=1)
    >>> bool((initializer((3,)) == initializer((3,))).any())
    False
    """

    def __init__(
        self, mean: float = 0.0, stddev: float = 1.0, seed: int | None = None, dtype: Any = "float32"
    ) -> None:
        super().__init__(dtype)
        self.mean, self.stddev = mean, stddev
        self._take_seed(seed)

    def host(self, shape: tuple[int, ...], dtype: np.dtype, partition_info: Any) -> np.ndarray:
        """Return normal numbers."""
        return draws.normal(self.generator(), shape, dtype, self.mean, self.stddev)

    def settings(self) -> dict[str, Any]:
        """Return mean, stddev and seed."""
        return {"mean": self.mean, "stddev": self.stddev, "seed": self.seed}


class truncated_normal_initializer(random_normal_initializer):
    """Normal, drawn again beyond two `stddev`. Source: ``tf.compat.v1.truncated_normal_initializer``."""

    def host(self, shape: tuple[int, ...], dtype: np.dtype, partition_info: Any) -> np.ndarray:
        """Return truncated normal numbers."""
        return draws.truncated(self.generator(), shape, dtype, self.mean, self.stddev)


class variance_scaling_initializer(LegacyInitializer):
    """Variance ``scale / n``; see `VarianceScaling`. Source: ``tf.compat.v1.variance_scaling_initializer``."""

    def __init__(
        self,
        scale: float = 1.0,
        mode: str = "fan_in",
        distribution: str = "truncated_normal",
        seed: int | None = None,
        dtype: Any = "float32",
    ) -> None:
        super().__init__(dtype)
        self.mode, self.distribution = draws.check_scaling(type(self).__name__, scale, mode, distribution)
        self.scale = scale
        self._take_seed(seed)

    def host(self, shape: tuple[int, ...], dtype: np.dtype, partition_info: Any) -> np.ndarray:
        """Return scaled numbers; a part's scale is that of the whole."""
        whole = None if partition_info is None else tuple(partition_info.full_shape)
        return draws.scaled(self.generator(), shape, dtype, self.scale, self.mode, self.distribution, whole)

    def settings(self) -> dict[str, Any]:
        """Return scale, mode, distribution and seed."""
        return {"scale": self.scale, "mode": self.mode, "distribution": self.distribution, "seed": self.seed}


class _Named(variance_scaling_initializer):
    """A variance scaling known by a name: only seed and dtype are free."""

    arguments: tuple[float, str, str]

    def __init__(self, seed: int | None = None, dtype: Any = "float32") -> None:
        super().__init__(*self.arguments, seed=seed, dtype=dtype)

    def settings(self) -> dict[str, Any]:
        """Return ``{"seed": ...}``."""
        return {"seed": self.seed}


class glorot_uniform_initializer(_Named):
    """Uniform in ``+-sqrt(6 / (inputs + outputs))``. Source: ``tf.compat.v1.glorot_uniform_initializer``."""

    arguments = (1.0, "fan_avg", "uniform")


class glorot_normal_initializer(_Named):
    """Truncated normal of variance ``2 / (inputs + outputs)``. Source: ``tf.compat.v1.glorot_normal_initializer``."""

    arguments = (1.0, "fan_avg", "truncated_normal")


class he_uniform_initializer(_Named):
    """Uniform in ``+-sqrt(6 / inputs)``. Source: ``tf.compat.v1.initializers.he_uniform``."""

    arguments = (2.0, "fan_in", "uniform")


class he_normal_initializer(_Named):
    """Truncated normal of variance ``2 / inputs``. Source: ``tf.compat.v1.initializers.he_normal``."""

    arguments = (2.0, "fan_in", "truncated_normal")


class lecun_uniform_initializer(_Named):
    """Uniform in ``+-sqrt(3 / inputs)``. Source: ``tf.compat.v1.initializers.lecun_uniform``."""

    arguments = (1.0, "fan_in", "uniform")


class lecun_normal_initializer(_Named):
    """Truncated normal of variance ``1 / inputs``. Source: ``tf.compat.v1.initializers.lecun_normal``."""

    arguments = (1.0, "fan_in", "truncated_normal")


class orthogonal_initializer(LegacyInitializer):
    """`gain` times a matrix with orthonormal rows or columns. Source: ``tf.compat.v1.orthogonal_initializer``."""

    def __init__(self, gain: float = 1.0, seed: int | None = None, dtype: Any = "float32") -> None:
        super().__init__(dtype)
        self.gain = gain
        self._take_seed(seed)

    def host(self, shape: tuple[int, ...], dtype: np.dtype, partition_info: Any) -> np.ndarray:
        """Return the matrix in its shape; a part of a partitioned variable is orthogonal by itself."""
        return draws.orthogonal(self.generator(), shape, dtype, self.gain)

    def settings(self) -> dict[str, Any]:
        """Return gain and seed."""
        return {"gain": self.gain, "seed": self.seed}


class identity_initializer(LegacyInitializer):
    """`gain` on the diagonal of a matrix. Source: ``tf.compat.v1.initializers.identity``."""

    def __init__(self, gain: float = 1.0, dtype: Any = "float32") -> None:
        super().__init__(dtype)
        self.gain = gain

    def host(self, shape: tuple[int, ...], dtype: np.dtype, partition_info: Any) -> np.ndarray:
        """Return the matrix; a part of a partitioned variable is the whole's at its place."""
        if partition_info is None:
            return draws.diagonal(shape, dtype, self.gain)
        whole = draws.diagonal(tuple(partition_info.full_shape), dtype, self.gain)
        offsets = partition_info.var_offset
        return whole[tuple(slice(o, o + size) for o, size in zip(offsets, shape, strict=True))]

    def settings(self) -> dict[str, Any]:
        """Return ``{"gain": ...}``."""
        return {"gain": self.gain}
