"""Random numbers from explicit seeds. In a graph they are drawn anew at each run; on a device, by its own generator."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.device import current_device, is_array
from gpulayers.dtypes import as_dtype
from gpulayers.errors import DTypeError, message
from gpulayers.launch import keep
from gpulayers.ops.arithmetic import select
from gpulayers.ops.creation import made
from gpulayers.ops.operation import Operation, Recordable, Spec
from gpulayers.ops.shaping import cast
from gpulayers.ops.static import is_small_float

__all__ = [
    "bernoulli",
    "dropout_mask",
    "random_integers",
    "random_normal",
    "random_uniform",
    "set_seed",
    "truncated_normal",
]


class _Stream:
    """A sequence of random numbers: one generator for each device it is used on, made when first needed.

    `seed` None: fresh entropy from the operating system.
    """

    def __init__(self, seed: int | None) -> None:
        self.seed = seed
        self._generators: dict[Any, Any] = {}

    def on(self, xp: Any) -> Any:
        """Return the generator of array module `xp` on the current device."""
        where = "cpu" if xp is np else (id(xp), str(current_device()))
        if where not in self._generators:
            self._generators[where] = xp.random.default_rng(self.seed)
        generator, own = self._generators[where], self._generators
        # Its state lies on the device and its kernels move it on, so replays of a graph draw on where the last ended.
        keep(generator, is_current=lambda: self._generators is own)
        return generator


_shared = _Stream(None)


def set_seed(seed: int | None) -> None:
    """Restart the generators behind every random operation that has no seed of its own. None: from fresh entropy.

    >>> set_seed(3); first = random_uniform((2,)); set_seed(3)
    >>> bool((first == random_uniform((2,))).all())
    True
    """
    _shared.__init__(_checked(seed))  # type: ignore[misc]


def fresh_seed() -> int:
    """Return a seed drawn from the generator that `set_seed` restarts: for what needs a seed but was given none.

    >>> set_seed(3); first = fresh_seed(); set_seed(3)
    >>> first == fresh_seed()
    True
    """
    return int(_shared.on(np).integers(2**63))


def _checked(seed: Any) -> int | None:
    if seed is not None and (not hasattr(seed, "__index__") or int(seed) < 0):
        raise DTypeError(message("seed", "not a seed", "an integer of 0 or more, or None", repr(seed)))
    return None if seed is None else int(seed)


def _stream(seed: int | None) -> _Stream:
    # A seed belongs to one call: the same call gives the same numbers again. In a graph the stream lives in the node,
    # so each run goes on where the last one stopped.
    return _shared if seed is None else _Stream(_checked(seed))


_BITS = {"float16": 11, "bfloat16": 8}  # of precision: a number of so many bits below 1 does not round up to 1


def _unit(xp: Any, shape: tuple[int, ...], dtype: np.dtype, stream: _Stream) -> Any:
    """Draw uniformly from [0, 1) in `dtype`."""
    drawn = stream.on(xp).random(shape, dtype=np.float64 if dtype == np.float64 else np.float32)
    if is_small_float(dtype):
        scale = 2.0 ** _BITS[dtype.name]
        drawn = xp.floor(drawn * scale) / scale
    return xp.asarray(drawn).astype(dtype, copy=False)


def _uniform_create(xp: Any, shape: Any, *, dtype: np.dtype, low: Any, high: Any, stream: _Stream) -> Any:
    if dtype.kind in "iu":
        return xp.asarray(stream.on(xp).integers(low, high, size=shape)).astype(dtype, copy=False)
    if (low, high) == (0, 1):
        return _unit(xp, shape, dtype, stream)
    result = (_unit(xp, shape, dtype, stream) * (high - low) + low).astype(dtype, copy=False)
    limit, least = xp.full((), high, dtype=dtype), xp.full((), low, dtype=dtype)
    return select(xp, result < limit, result, least)  # rounding went up


def _normal_create(xp: Any, shape: Any, *, dtype: np.dtype, mean: float, stddev: float, stream: _Stream) -> Any:
    return (_standard(xp, shape, dtype, stream) * stddev + mean).astype(dtype, copy=False)


def _standard(xp: Any, shape: Any, dtype: np.dtype, stream: _Stream) -> Any:
    wide = np.float64 if dtype == np.float64 else np.float32
    return xp.asarray(stream.on(xp).standard_normal(shape, dtype=wide))


def _truncated_create(xp: Any, shape: Any, *, dtype: np.dtype, mean: float, stddev: float, stream: _Stream) -> Any:
    """Draw until all lie within two standard deviations. Each round asks the device whether it was the last."""
    drawn = _standard(xp, shape, dtype, stream)
    outside = xp.abs(drawn) > 2
    while bool(xp.any(outside)):
        drawn = xp.where(outside, _standard(xp, shape, dtype, stream), drawn)
        outside = xp.abs(drawn) > 2
    return (drawn * stddev + mean).astype(dtype, copy=False)


def _bernoulli_create(xp: Any, shape: Any, *, dtype: np.dtype, p: float, stream: _Stream) -> Any:
    return (xp.asarray(stream.on(xp).random(shape, dtype=np.float32)) < p).astype(dtype, copy=False)


_uniform = made("random_uniform", _uniform_create, type="RandomUniform", stateful=True)
_normal = made("random_normal", _normal_create, type="RandomStandardNormal", stateful=True)
_truncated = made("truncated_normal", _truncated_create, type="TruncatedNormal", stateful=True)
_bernoulli = made("bernoulli", _bernoulli_create, stateful=True)


def _floating(name: str, dtype: Any) -> np.dtype:
    chosen = as_dtype(dtype)
    if chosen.kind != "f" and chosen.name != "bfloat16":
        raise DTypeError(message(name, "cannot draw this dtype", "a floating dtype", chosen.name))
    return chosen


def random_uniform(
    shape: Any, minval: Any = 0, maxval: Any = None, dtype: Any = np.float32, seed: int | None = None
) -> Any:
    """Draw uniformly from [minval, maxval); for an integer `dtype` all integers in that range are equally likely.

    `shape`: integers, or a tensor of them. `maxval`: 1 if not given; integers need one. The limits may be arrays or
    tensors that broadcast to `shape`. The same `seed` gives the same numbers at every eager call. In a graph each run
    draws anew. Raises ValueError if the range is empty.

    >>> x = random_uniform((3,), 0.93, 1.07, seed=1)
    >>> bool(((x >= 0.93) & (x < 1.07)).all())
    True
    """
    chosen = as_dtype(dtype)
    if chosen.kind not in "iu":
        chosen = _floating("random_uniform", chosen)
    elif maxval is None:
        raise ValueError(message("random_uniform", "integers need maxval", do="Give the limit above the largest."))
    maxval = 1 if maxval is None else maxval
    if any(isinstance(limit, Recordable) or is_array(limit) for limit in (minval, maxval)):
        if chosen.kind in "iu":
            raise DTypeError(message("random_uniform", "limits of integers are arrays", "integers", "arrays"))
        unit = _uniform(shape, chosen, low=0, high=1, stream=_stream(seed))
        return cast(unit * (maxval - minval) + minval, chosen)
    if not minval < maxval:
        raise ValueError(message("random_uniform", "the range is empty", "minval < maxval", f"[{minval}, {maxval})"))
    return _uniform(shape, chosen, low=minval, high=maxval, stream=_stream(seed))


def random_integers(shape: Any, low: int, high: int, dtype: Any = np.int32, seed: int | None = None) -> Any:
    """Draw integers from `low` up to, but without, `high`."""
    return random_uniform(shape, int(low), int(high), dtype, seed)


def random_normal(
    shape: Any, mean: float = 0.0, stddev: float = 1.0, dtype: Any = np.float32, seed: int | None = None
) -> Any:
    """Draw from the normal distribution. `shape` may be a tensor; seeds as in `random_uniform`.

    >>> random_normal((2, 3), seed=0).shape
    (2, 3)
    """
    return _normal(shape, _floating("random_normal", dtype), mean=mean, stddev=stddev, stream=_stream(seed))


def truncated_normal(
    shape: Any, mean: float = 0.0, stddev: float = 1.0, dtype: Any = np.float32, seed: int | None = None
) -> Any:
    """Draw from the normal distribution, again and again while a number lies beyond two standard deviations."""
    return _truncated(shape, _floating("truncated_normal", dtype), mean=mean, stddev=stddev, stream=_stream(seed))


def bernoulli(shape: Any, p: float = 0.5, dtype: Any = np.float32, seed: int | None = None) -> Any:
    """Draw 1 with probability `p`, else 0, in `dtype`."""
    if not 0 <= p <= 1:
        raise ValueError(message("bernoulli", "not a probability", "0 <= p <= 1", p))
    return _bernoulli(shape, dtype, p=p, stream=_stream(seed))


def _mask_forward(xp: Any, x: Any, *, rate: float, noise_shape: Any, stream: _Stream) -> Any:
    """Draw 0 with probability `rate`, else `1 / (1 - rate)`, in the dtype of `x`."""
    shape = x.shape
    if noise_shape is not None:
        shape = tuple(own if size is None else size for own, size in zip(x.shape, noise_shape, strict=True))
    kept = xp.asarray(stream.on(xp).random(shape, dtype=np.float32)) >= rate
    wide = np.float64 if x.dtype == np.float64 else np.float32  # a number beside an array of 16 bits may promote it
    return (kept.astype(wide) * (1 / (1 - rate))).astype(x.dtype, copy=False)


_mask = Operation(
    "dropout_mask",
    _mask_forward,
    spec=lambda x, rate, noise_shape, stream: Spec(
        x.shape
        if noise_shape is None or x.shape is None
        else tuple(a if b is None else b for a, b in zip(x.shape, noise_shape, strict=True)),
        x.dtype,
    ),
    stateful=True,
)


def dropout_mask(x: Any, rate: float, noise_shape: Any = None, seed: int | None = None) -> Any:
    """Return what dropout multiplies `x` by: 0 with probability `rate`, else `1 / (1 - rate)`.

    `noise_shape`: the mask's sizes, 1 where it is shared along an axis, None for the size of `x`. Raises ValueError
    unless 0 <= rate < 1.
    """
    if not 0 <= rate < 1:
        raise ValueError(message("dropout", "rate is not a probability below 1", "0 <= rate < 1", rate))
    return _mask(
        x, rate=float(rate), noise_shape=None if noise_shape is None else tuple(noise_shape), stream=_stream(seed)
    )
