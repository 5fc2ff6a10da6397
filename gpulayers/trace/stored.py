"""Values that can change: what tapes and graphs need to know of a variable, and no more."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from gpulayers.dtypes import TensorShape
from gpulayers.errors import ShapeError, UninitializedError, message
from gpulayers.ops.operation import Operation, Recordable, Spec
from gpulayers.trace.tensor import RecordedTensor

__all__ = ["CompositeValue", "StoredValue", "assign_stored", "lend_aliased", "observe", "read_stored"]

_observed = threading.local()
_readers: list[Callable[[StoredValue], None]] = []  # of all threads: asking a list is what every read can afford


@contextlib.contextmanager
def observe(reading: Callable[[StoredValue], None], writing: Callable[[StoredValue, Any], None]) -> Iterator[None]:
    """Call ``reading(value)`` before any read and ``writing(value, previous_array)`` when this thread prepares a write.

    In `writing`, `value.read()` is the array for the new contents: `previous_array` itself if it is changed in place.
    """
    outer = getattr(_observed, "writing", None)
    _observed.writing = writing
    _readers.append(reading)
    try:
        yield
    finally:
        _readers.remove(reading)
        _observed.writing = outer


def _tell(value: StoredValue, previous: Any) -> None:
    writing = getattr(_observed, "writing", None)
    if writing is not None:
        writing(value, previous)


class CompositeValue(Recordable):
    """A value made of several stored ones, which takes part in operations as one tensor."""

    __slots__ = ()

    def as_tensor(self) -> Any:
        """Return the whole value, by operations on the parts."""
        raise TypeError(message(type(self).__name__, "does not say how to be read as one tensor"))


class StoredValue(Recordable):
    """An array that can be replaced, with a counter of its changes.

    `read` gives the array, `store` replaces it, `writable` gives the array to write into. `tensor` is the recorded
    tensor of the present version, shared by all tapes that watch it. With `autocast` it is read in the compute dtype of
    the layer that is being called.
    """

    __slots__ = (
        "__weakref__",
        "_array",
        "_lent",
        "_tensor",
        "_tensor_version",
        "autocast",
        "name",
        "static_dtype",
        "static_shape",
        "trainable",
        "version",
    )
    __hash__ = object.__hash__

    def __init__(self, array: Any, name: str, trainable: bool, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._array, self.name, self.trainable = array, name, trainable
        self.static_shape, self.static_dtype = shape, dtype
        self.version = 0
        self.autocast = False
        self._lent = False
        self._tensor: RecordedTensor | None = None
        self._tensor_version = -1

    def read(self) -> Any:
        """Return the device array. Raises UninitializedError before the first value."""
        for reading in _readers:
            reading(self)
        if self._array is None:
            raise UninitializedError(
                message(
                    self.name,
                    "is read before it has a value",
                    do="Run gl.global_variables_initializer() in the session first.",
                )
            )
        return self._array

    def lend(self) -> Any:
        """Return the array for a use that may outlast a later in-place update: that update will write a copy."""
        self._lent = True
        return self.read()

    def store(self, array: Any) -> None:
        """Replace the array."""
        previous, self._array = self._array, array
        self._lent = False
        self.version += 1
        _tell(self, previous)

    def writable(self) -> Any:
        """Return the array to write into. Its present value counts as changed."""
        previous = array = self.read()
        if self._lent:
            self._array = array = array.copy()
            self._lent = False
        self.version += 1
        _tell(self, previous)
        return array

    def tensor(self) -> RecordedTensor:
        """Return the tensor that stands for the present version on tapes."""
        for reading in _readers:
            reading(self)
        if self._tensor is None or self._tensor_version != self.version:
            self._tensor, self._tensor_version = RecordedTensor(self.read()), self.version
        return self._tensor

    @property
    def is_lent(self) -> bool:
        """Whether somebody holds the array as a value that must stay."""
        return self._lent

    def changed(self) -> None:
        """Say that device work changed the array in place without `writable`: a replayed graph."""
        self.version += 1

    @property
    def initialized(self) -> bool:
        """Whether it has a value."""
        return self._array is not None


def lend_aliased(inputs: Iterable[Any], result: Any) -> None:
    """Lend the variables among `inputs` whose memory `result` shows (a view, or the array itself).

    Whoever holds the result then keeps the value that was read: the next in-place update writes a copy.
    """
    results = result if isinstance(result, tuple | list) else (result,)
    for value in inputs:
        if isinstance(value, StoredValue):
            array = value.read()
            for one in results:
                base = getattr(one, "base", None)
                if one is array or (base is not None and (base is array or base is array.base)):
                    value.lend()


read_stored = Operation(
    "read_stored",
    lambda xp, *, stored: stored.lend(),
    spec=lambda stored: Spec(stored.static_shape, stored.static_dtype),
    type="ReadVariableOp",
    stateful=True,
    doc="Read a variable in a graph.",
)


def _assign(xp: Any, value: Any, *, stored: StoredValue) -> Any:
    stored.store(stored.accept(value))  # type: ignore[attr-defined]
    return stored.read()


def _assign_spec(value: Spec, stored: StoredValue) -> Spec:
    if not TensorShape(value.shape).is_compatible_with(stored.static_shape):
        raise ShapeError(
            message(stored.name, "a value of another shape is assigned", stored.static_shape, TensorShape(value.shape))
        )
    return Spec(stored.static_shape, stored.static_dtype)


assign_stored = Operation(
    "assign_stored",
    _assign,
    spec=_assign_spec,
    type="Assign",
    stateful=True,
    doc="Give a variable a new value and return it.",
)
