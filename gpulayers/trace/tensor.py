"""Tensors: values that are being recorded, on a tape (`RecordedTensor`) or in a graph (`GraphTensor`).

A tensor behaves like an array: operators, methods, indexing, and NumPy's functions through ``__array_ufunc__`` and
``__array_function__``. It never silently turns into a plain array, because a gradient would be lost without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gpulayers import ops
from gpulayers.device import asnumpy
from gpulayers.dtypes import TensorShape
from gpulayers.errors import StateError, message
from gpulayers.ops.operation import OPERATIONS, Recordable
from gpulayers.trace.default_session import session_for

__all__ = ["GraphTensor", "RecordedTensor", "Tensor", "array_like_operators"]


def _binary(name: str, reflected: bool = False) -> Callable[[Any, Any], Any]:
    operation = OPERATIONS[name]

    def method(self: Any, other: Any) -> Any:
        if other is None or isinstance(other, str | bytes | dict):
            return NotImplemented
        return operation(other, self) if reflected else operation(self, other)

    return method


def _matmul(self: Any, other: Any) -> Any:
    return ops.matmul(self, other)


def _rmatmul(self: Any, other: Any) -> Any:
    return ops.matmul(other, self)


_OPERATORS = {
    "add": "add",
    "sub": "subtract",
    "mul": "multiply",
    "truediv": "divide",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "pow": "power",
}
_COMPARISONS = {
    "eq": "equal",
    "ne": "not_equal",
    "lt": "less",
    "le": "less_equal",
    "gt": "greater",
    "ge": "greater_equal",
    "and": "logical_and",
    "or": "logical_or",
    "xor": "logical_xor",
}
_METHODS = (
    "all any argmax argmin clip cumsum max mean min prod "
    "ravel repeat reshape squeeze std sum swapaxes take transpose var"
).split()


def array_like_operators(cls: type) -> type:
    """Class decorator: give a recordable class the operators, methods and NumPy protocols of an array."""

    def put(name: str, method: Callable[..., Any]) -> None:
        if name not in cls.__dict__:  # what the class says itself stays: the parts of a partitioned variable, for one
            method.__name__ = name
            setattr(cls, name, method)

    for short, name in _OPERATORS.items():
        put(f"__{short}__", _binary(name))
        put(f"__r{short}__", _binary(name, reflected=True))
    for short, name in _COMPARISONS.items():
        put(f"__{short}__", _binary(name))
    put("__matmul__", _matmul)
    put("__rmatmul__", _rmatmul)
    put("__neg__", lambda self: ops.negative(self))
    put("__pos__", lambda self: self)
    put("__abs__", lambda self: ops.absolute(self))
    put("__invert__", lambda self: ops.logical_not(self))
    put("__getitem__", lambda self, key: ops.getitem(self, key))
    put("__iter__", _iterate)
    put("__array_ufunc__", _array_ufunc)
    put("__array_function__", _array_function)
    for name in _METHODS:
        put(name, _method(name))
    put("astype", lambda self, dtype, copy=True: ops.cast(self, dtype))
    put("flatten", lambda self: ops.ravel(self))
    put("dot", _matmul)
    cls.T = property(lambda self: ops.transpose(self), doc="The transpose.")  # type: ignore[attr-defined]
    # Above NumPy's and CuPy's arrays, so that `array * tensor` asks the tensor.
    cls.__array_priority__ = 1000  # type: ignore[attr-defined]
    return cls


def _method(name: str) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if name in ("reshape", "transpose") and len(arguments) > 1:  # x.reshape(2, 3) as well as x.reshape((2, 3))
            arguments = (arguments,)
        return getattr(ops, name)(self, *arguments, **keywords)

    method.__doc__ = f"Return ``gl.ops.{name}`` of it."
    return method


def _iterate(self: Any) -> Iterator[Any]:
    shape = tuple(self.shape)
    if not shape or shape[0] is None:
        raise TypeError(message("Tensor", "cannot iterate", "a known first size", f"shape {self.shape}"))
    return (ops.getitem(self, index) for index in range(shape[0]))


def _array_ufunc(self: Any, ufunc: np.ufunc, method: str, *inputs: Any, **keywords: Any) -> Any:
    operation = OPERATIONS.get(ufunc.__name__) or getattr(ops, ufunc.__name__, None)
    if method != "__call__" or operation is None or keywords:
        detail = f"np.{ufunc.__name__}" + ("" if method == "__call__" else f".{method}")
        raise TypeError(
            message(
                detail,
                f"cannot be recorded{' with ' + ', '.join(keywords) if keywords else ''}",
                do="Use a function of gl.ops, or compute on t.value where no gradient is wanted.",
            )
        )
    return operation(*inputs)


# Questions about a static shape need no recording.
_ABOUT_SHAPES: dict[Any, Callable[[Any], Any]] = {np.shape: lambda a: tuple(a.shape), np.ndim: lambda a: len(a.shape)}


def _array_function(self: Any, function: Callable[..., Any], types: Any, arguments: Any, keywords: Any) -> Any:
    if function in _ABOUT_SHAPES:
        return _ABOUT_SHAPES[function](*arguments)
    replacement = getattr(ops, function.__name__, None)
    if replacement is None:
        raise TypeError(
            message(
                f"np.{function.__name__}",
                "cannot be recorded",
                do="Use a function of gl.ops, or compute on t.value where no gradient is wanted.",
            )
        )
    return replacement(*arguments, **keywords)


class Tensor(Recordable):
    """A value that is being recorded. Made by a tape, a graph or `gl.Input`, never by hand.

    Hashes by identity; ``==`` is elementwise. `shape`, `dtype`, `ndim`, operators, methods and indexing are an array's.
    """

    __slots__ = ("__weakref__", "_keras_history", "_keras_mask")
    __hash__ = object.__hash__

    shape: Any
    dtype: np.dtype
    _keras_history: Any
    _keras_mask: Any

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        size = tuple(self.shape)[0] if len(self.shape) else None
        if size is None:
            raise TypeError(message("Tensor", "has no length", "a known first size", f"shape {self.shape}"))
        return int(size)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError(_no_conversion("np.asarray(t)"))

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError(message("Tensor", "cannot be changed in place", do="Make a new one, by gl.where for one."))

    # CuPy asks an unknown operand for this before it gives up: the one chance to say what to write.
    def __cupy_override_elementwise_kernel__(self, *arguments: Any, **keywords: Any) -> Any:
        raise TypeError(_no_conversion("a CuPy function of t"))

    @property
    def __cuda_array_interface__(self) -> Any:
        raise AttributeError(_no_conversion("cupy.asarray(t)"))


def _no_conversion(what: str) -> str:
    return message(
        "Tensor",
        f"{what} would lose the recording",
        do="Use gl.ops (gl.ops.tanh(t)) or NumPy's functions (np.tanh(t)) to go on recording, t.value for the array.",
    )


array_like_operators(Tensor)


class RecordedTensor(Tensor):
    """A tensor on a tape: an array, and the fact that somebody wants gradients through it."""

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    @property
    def value(self) -> Any:
        """The device array, no longer recorded."""
        return self._value

    def numpy(self) -> np.ndarray:
        """Return the contents as a NumPy array on the host."""
        return asnumpy(self._value)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(self._value.shape)

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        """Dtype of the elements."""
        dtype: np.dtype = self._value.dtype
        return dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(self._value.size)

    def item(self) -> Any:
        """Return the only element as a Python number."""
        return self._value.item()

    def tolist(self) -> Any:
        """Return the contents as nested lists."""
        return self.numpy().tolist()

    def __bool__(self) -> bool:
        return bool(self._value)

    def __float__(self) -> float:
        return float(self._value)

    def __int__(self) -> int:
        return int(self._value)

    def __index__(self) -> int:
        return int(self._value.__index__())

    def __repr__(self) -> str:
        return f"<Tensor: shape={self.shape}, dtype={self.dtype.name}, value={self._value!r}>"


class GraphTensor(Tensor):
    """A tensor in a graph: output `index` of a node, with its static `shape` and dtype, to be computed later."""

    __slots__ = ("_dtype", "_shape", "index", "node")

    def __init__(self, node: Any, index: int, shape: Any, dtype: np.dtype) -> None:
        self.node, self.index, self._shape, self._dtype = node, index, TensorShape(shape), dtype

    @property
    def shape(self) -> TensorShape:
        """Static shape; None where a size is unknown."""
        return self._shape

    def set_shape(self, shape: Any) -> None:
        """Add what is known of the static shape. Raises ValueError if it contradicts."""
        self._shape = self._shape.merge_with(shape)

    def get_shape(self) -> TensorShape:
        """Return `shape`."""
        return self._shape

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        """Dtype of the elements."""
        return self._dtype

    @property
    def graph(self) -> Any:
        """The graph it belongs to."""
        return self.node.graph

    @property
    def op(self) -> Any:
        """The node that computes it."""
        return self.node

    @property
    def name(self) -> str:
        """Its node's name and its number among the outputs, such as ``"dense/MatMul:0"``."""
        return f"{self.node.name}:{self.index}"

    @property
    def value(self) -> Any:
        """Raises: a graph tensor has no value before it is run."""
        raise StateError(message(self.name, "has no value yet", do="Run it: session.run(t), or call the Model."))

    def numpy(self) -> np.ndarray:
        """Raise, as `value` does."""
        return np.asarray(self.value)

    def eval(self, feed_dict: dict[Any, Any] | None = None, session: Any = None) -> Any:
        """Return ``session.run(self, feed_dict)`` of the given or the default session."""
        return session_for(self.name, session).run(self, feed_dict)

    def __bool__(self) -> bool:
        raise TypeError(
            message(self.name, "a graph tensor is neither true nor false yet", do="Use gl.cond or gl.where.")
        )

    def _no_number(self, *_: Any) -> Any:
        raise StateError(message(self.name, "a graph tensor is not a number yet", do="Run it with a Session."))

    __float__ = __int__ = __index__ = _no_number

    def __repr__(self) -> str:
        shape = "?" if self._shape.rank is None else tuple(self._shape)
        return f"<Tensor {self.name!r} shape={shape} dtype={self.dtype.name}>"
