"""What both families share: arguments, the generator, and a part of a partitioned variable."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.device import asarray
from gpulayers.dtypes import TensorShape, as_dtype
from gpulayers.errors import ShapeError, message
from gpulayers.ops.random import fresh_seed

__all__ = ["BaseInitializer"]


def generator_of(seed: int) -> np.random.Generator:
    """Return the generator that `seed` stands for; negative seeds are allowed."""
    return np.random.Generator(np.random.PCG64(int(seed) % 2**64))


class BaseInitializer:
    """``initializer(shape, dtype=None, partition_info=None)`` returns an array on the default device.

    A subclass defines `draw`, which returns a host array, and `get_config`.
    """

    default_dtype: Any = "float32"

    def __call__(self, shape: Any, dtype: Any = None, partition_info: Any = None, **_: Any) -> Any:
        """Return initial values.

        Parameters: `shape`, fully known; `dtype`, float32 if not given; `partition_info`, for one part of a partitioned
        variable, with the `full_shape` and the part's `var_offset`.
        Raises ValueError for a shape with unknown sizes and for a dtype the initializer has no values for.
        """
        static = TensorShape(shape)
        if not static.is_fully_defined():
            raise ShapeError(message(type(self).__name__, "needs a fully known shape", got=static))
        sizes: Any = tuple(static)
        kind = as_dtype(self.default_dtype if dtype is None else dtype)
        return asarray(self.host(sizes, kind, partition_info), dtype=kind)

    def host(self, shape: tuple[int, ...], dtype: np.dtype, partition_info: Any) -> np.ndarray:
        """Return the values as a host array."""
        raise NotImplementedError(message(type(self).__name__, "does not say its values"))

    def _take_seed(self, seed: Any) -> None:
        if seed is not None and (isinstance(seed, bool) or not hasattr(seed, "__index__")):
            raise ValueError(message(type(self).__name__, "not a seed", "an integer or None", repr(seed)))
        self.seed = seed
        self._drawn_seed = fresh_seed() if seed is None else int(seed)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make an initializer from what `get_config` returned."""
        return cls(**config)
