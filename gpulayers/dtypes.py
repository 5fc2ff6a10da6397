"""Names of dtypes, static shapes with unknown sizes, and dtype policies.

Dtypes are NumPy's own dtype objects, so ``x.dtype == gl.float32`` holds for NumPy and CuPy arrays, and so does
``x.dtype == "float32"``. ``bfloat16`` exists where the package ml_dtypes is installed.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gpulayers.errors import DTypeError, ShapeError, message

__all__ = [
    "Policy",
    "TensorShape",
    "as_dtype",
    "bool_",
    "broadcast_static_shape",
    "complex128",
    "complex64",
    "dtype_name",
    "float16",
    "float32",
    "float64",
    "global_policy",
    "int16",
    "int32",
    "int64",
    "int8",
    "is_floating",
    "parameter_dtype",
    "set_global_policy",
    "uint16",
    "uint32",
    "uint64",
    "uint8",
]

float16, float32, float64 = np.dtype("float16"), np.dtype("float32"), np.dtype("float64")
int8, int16, int32, int64 = (np.dtype(f"int{bits}") for bits in (8, 16, 32, 64))
uint8, uint16, uint32, uint64 = (np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64))
complex64, complex128 = np.dtype("complex64"), np.dtype("complex128")
bool_ = np.dtype("bool")


def _bfloat16() -> np.dtype:
    try:
        return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError as error:
        raise DTypeError(
            message("bfloat16", "NumPy has no such dtype", do="Install the package ml_dtypes, which adds it.")
        ) from error


def __getattr__(name: str) -> Any:
    # ml_dtypes is an optional package, so it is imported only when somebody names the dtype.
    if name == "bfloat16":
        return _bfloat16()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def as_dtype(value: Any) -> np.dtype:
    """Return the NumPy dtype for a dtype, its name, a Python type or a `Policy`.

    Raises DTypeError for anything else.

    >>> as_dtype("float16"), as_dtype(float32)
    (dtype('float16'), dtype('float32'))
    """
    if isinstance(value, np.dtype):
        return value
    if isinstance(value, Policy):
        value = value.variable_dtype
    if value == "bfloat16":
        return _bfloat16()
    try:
        if value is None:
            raise TypeError
        return np.dtype(value)
    except TypeError as error:
        raise DTypeError(message("dtype", "not a dtype", "a dtype or its name", repr(value))) from error


def dtype_name(value: Any) -> str:
    """Return the name of a dtype, such as ``"float32"``.

    >>> dtype_name(float)
    'float64'
    """
    return _name(as_dtype(value))


@functools.lru_cache(maxsize=64)
def _name(dtype: np.dtype) -> str:
    return dtype.name  # NumPy makes it anew at every look, which takes microseconds


def is_floating(value: Any) -> bool:
    """Say whether a dtype is a real floating one (bfloat16 included).

    >>> is_floating("float16"), is_floating("int32")
    (True, False)
    """
    dtype = as_dtype(value)
    return dtype.kind == "f" or dtype.name == "bfloat16"


def parameter_dtype(value: Any) -> np.dtype:
    """Return the dtype of statistics and parameters of a layer that works in dtype `value`: float32 for 16-bit types.

    >>> parameter_dtype("float16"), parameter_dtype("float64")
    (dtype('float32'), dtype('float64'))
    """
    dtype = as_dtype(value)
    return float32 if is_floating(dtype) and dtype.itemsize == 2 else dtype


class TensorShape:
    """A shape known before any data is: a tuple of sizes, ``None`` where a size is unknown, or unknown rank.

    Compares equal to tuples and lists. Source: ``tf.TensorShape``; unlike there, ``==`` treats ``None`` as a value
    (so ``TensorShape((None, 3)) == (None, 3)``); ask `is_compatible_with` for the other question.

    >>> s = TensorShape((None, 3))
    >>> s[1], s.rank, s == (None, 3), s.as_list(), s.is_compatible_with((8, 3))
    (3, 2, True, [None, 3], True)
    >>> s
    TensorShape([None, 3])
    """

    __slots__ = ("_dims",)

    def __init__(self, dims: Any) -> None:
        self._dims: tuple[int | None, ...] | None
        if dims is None:
            self._dims = None
        elif isinstance(dims, TensorShape):
            self._dims = dims._dims
        elif isinstance(dims, int | np.integer) and not isinstance(dims, bool):
            self._dims = (int(dims),)
        elif isinstance(dims, Iterable) and not isinstance(dims, str | bytes | dict):
            self._dims = tuple(_dimension(d) for d in dims)
        else:
            raise TypeError(
                message("TensorShape", "not a shape", "sizes, None where unknown", f"{dims!r} ({type(dims).__name__})")
            )

    @property
    def rank(self) -> int | None:
        """Number of axes, or None if unknown."""
        return None if self._dims is None else len(self._dims)

    ndims = rank

    @property
    def dims(self) -> list[int | None] | None:
        """The sizes as a list, or None if the rank is unknown."""
        return None if self._dims is None else list(self._dims)

    def _known(self, what: str) -> tuple[int | None, ...]:
        if self._dims is None:
            raise ShapeError(message("TensorShape", f"cannot give {what} of a shape of unknown rank"))
        return self._dims

    def as_list(self) -> list[int | None]:
        """Return the sizes as a list. Raises ValueError if the rank is unknown."""
        return list(self._known("the sizes"))

    def is_fully_defined(self) -> bool:
        """Say whether every size is known."""
        return self._dims is not None and None not in self._dims

    def num_elements(self) -> int | None:
        """Return the product of the sizes, or None if one is unknown."""
        return int(np.prod(self._dims, dtype=np.int64)) if self.is_fully_defined() else None  # type: ignore[arg-type]

    def is_compatible_with(self, other: Any) -> bool:
        """Say whether a tensor could have both shapes; unknown sizes fit anything."""
        theirs = TensorShape(other)._dims
        if self._dims is None or theirs is None:
            return True
        return len(self._dims) == len(theirs) and all(
            a is None or b is None or a == b for a, b in zip(self._dims, theirs, strict=True)
        )

    def assert_is_compatible_with(self, other: Any) -> None:
        """Raise ValueError unless `is_compatible_with`."""
        if not self.is_compatible_with(other):
            raise ShapeError(f"Shapes {self} and {TensorShape(other)} are incompatible")

    def merge_with(self, other: Any) -> TensorShape:
        """Return the shape with all that either knows. Raises ValueError if they contradict."""
        self.assert_is_compatible_with(other)
        theirs = TensorShape(other)
        if self._dims is None or theirs._dims is None:
            return theirs if self._dims is None else self
        return TensorShape([b if a is None else a for a, b in zip(self._dims, theirs._dims, strict=True)])

    def concatenate(self, other: Any) -> TensorShape:
        """Return the shape with `other`'s axes behind this one's."""
        theirs = TensorShape(other)._dims
        return TensorShape(None if self._dims is None or theirs is None else self._dims + theirs)

    def with_rank(self, rank: int) -> TensorShape:
        """Return the shape, its rank known. Raises ValueError if it has another."""
        return self.merge_with([None] * rank)

    def __len__(self) -> int:
        return len(self._known("the length"))

    def __iter__(self) -> Iterator[int | None]:
        return iter(self._known("the sizes"))

    def __getitem__(self, index: Any) -> Any:
        dims = self._known("one size")[index]
        return TensorShape(dims) if isinstance(index, slice) else dims

    def __bool__(self) -> bool:
        return self._dims is not None

    def __eq__(self, other: object) -> bool:
        if other is None:
            return self._dims is None
        try:
            return self._dims == TensorShape(other)._dims
        except TypeError:
            return NotImplemented

    def __hash__(self) -> int:
        return hash(self._dims)

    def __add__(self, other: Any) -> TensorShape:
        return self.concatenate(other)

    def __radd__(self, other: Any) -> TensorShape:
        return TensorShape(other).concatenate(self)

    def __str__(self) -> str:
        return "<unknown>" if self._dims is None else str(self._dims)

    def __repr__(self) -> str:
        return f"TensorShape({None if self._dims is None else list(self._dims)})"


def _dimension(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(message("TensorShape", "not a size", "an integer or None", repr(value)))
    size = int(value)
    if size < 0:
        raise ShapeError(message("TensorShape", "a size is negative", "0 or more, or None", size))
    return size


def broadcast_static_shape(*shapes: Any) -> tuple[int | None, ...] | None:
    """Return the shape that NumPy broadcasting gives, with unknown sizes; None if a rank is unknown.

    Raises ShapeError if they do not broadcast.

    >>> broadcast_static_shape((None, 3), (1,)), broadcast_static_shape((None, 1), (4, 3))
    ((None, 3), (4, 3))
    """
    dims = [TensorShape(s)._dims for s in shapes]
    if any(d is None for d in dims):
        return None
    rank = max((len(d) for d in dims), default=0)  # type: ignore[arg-type]
    result: list[int | None] = []
    for axis in range(-rank, 0):
        sizes = {d[axis] for d in dims if len(d) >= -axis} - {1}  # type: ignore[arg-type, index]
        known = sizes - {None}
        if len(known) > 1:
            raise ShapeError(message("broadcast", "shapes do not broadcast", got=", ".join(map(str, shapes))))
        result.append(known.pop() if known else (None if sizes else 1))
    return tuple(result)


_MIXED = {"mixed_float16": "float16", "mixed_bfloat16": "bfloat16"}


class Policy:
    """The dtypes of a layer: what it computes in and what its variables are stored in.

    `name`: a dtype name (both are that dtype), ``"mixed_float16"`` or ``"mixed_bfloat16"`` (compute in 16 bits, store
    float32), or ``"_infer"`` (not settled yet; both are None). Raises TypeError for a name that is not a string,
    ValueError for an unknown one. Policies compare by identity. Source: ``tf.keras.mixed_precision.Policy``.

    >>> p = Policy("mixed_float16")
    >>> p, p.compute_dtype, p.variable_dtype
    (<Policy "mixed_float16">, 'float16', 'float32')
    """

    __slots__ = ("_compute_dtype", "_name", "_variable_dtype")

    def __init__(self, name: str) -> None:
        if not isinstance(name, str):
            raise DTypeError(message("Policy", "name is not a string", "such as 'float32'", repr(name)))
        self._name = name
        self._compute_dtype: str | None
        self._variable_dtype: str | None
        if name == "_infer":
            self._compute_dtype = self._variable_dtype = None
        elif name in _MIXED:
            self._compute_dtype, self._variable_dtype = _MIXED[name], "float32"
        else:
            try:
                self._compute_dtype = self._variable_dtype = name if name == "bfloat16" else np.dtype(name).name
            except TypeError as error:
                raise ValueError(
                    message("Policy", "unknown policy", "a dtype name, 'mixed_float16' or 'mixed_bfloat16'", repr(name))
                ) from error

    name = property(lambda self: self._name, doc="The name it was made with.")
    compute_dtype = property(lambda self: self._compute_dtype, doc="Dtype name of the arithmetic, or None.")
    variable_dtype = property(lambda self: self._variable_dtype, doc="Dtype name of the variables, or None.")

    def __repr__(self) -> str:
        return f'<Policy "{self._name}">'

    def get_config(self) -> dict[str, Any]:
        """Return ``{"name": name}``."""
        return {"name": self._name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Policy:
        """Make a policy from `get_config`'s dictionary."""
        return cls(**config)


_global_policy = threading.local()


def global_policy() -> Policy:
    """Return the policy of modern layers that are given none. It starts as float32.

    >>> global_policy()
    <Policy "float32">
    """
    if not hasattr(_global_policy, "value"):
        _global_policy.value = Policy("float32")
    policy: Policy = _global_policy.value
    return policy


def set_global_policy(policy: Policy | str | None) -> None:
    """Set the policy of modern layers made from now on, in this thread; ``None`` means float32.

    Raises ValueError unless it is a floating one.
    """
    chosen = policy if isinstance(policy, Policy) else Policy(policy or "float32")
    if chosen.compute_dtype is None or not is_floating(chosen.compute_dtype):
        raise ValueError(message("set_global_policy", "not a floating policy", "such as 'float32'", repr(chosen)))
    _global_policy.value = chosen
