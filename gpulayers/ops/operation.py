"""What an operation is: a name, a shape rule, a forward on arrays, and a gradient rule written in operations.

An operation runs in three ways, all through the same four parts. *Eager*: its forward is called on arrays. Under a
*tape* it is called and recorded. In a *graph* it is recorded now, by its shape rule, and called later. How values are
recorded is none of this file's business: it hands calls that involve recording to the function that
`gpulayers.trace` installs with `set_dispatcher`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpulayers.device import array_module, asarray, is_array, kind_of
from gpulayers.dtypes import broadcast_static_shape
from gpulayers.errors import DeviceError, DTypeError, GradientError, ShapeError, message

__all__ = [
    "OPERATIONS",
    "GradientContext",
    "Operation",
    "Recordable",
    "Spec",
    "as_arrays",
    "broadcast_like",
    "cast_operation",
    "elementwise",
    "explained",
    "like_first",
    "match",
    "pullback",
    "result_dtype",
    "set_differentiator",
    "set_dispatcher",
    "state",
    "sum_to_like",
]

Shape = tuple[int | None, ...] | None  # None: the rank is unknown


class Spec(NamedTuple):
    """What is known of a value before it exists: its shape (None for unknown sizes or rank) and dtype."""

    shape: Shape
    dtype: np.dtype


class Recordable:
    """Base of the values that are not arrays but take part in operations: tensors and variables."""

    __slots__ = ()


class _State(threading.local):
    """Whether anything records in this thread: the number of active tapes and graphs."""

    recorders = 0


state = _State()
_dispatch: Callable[[Operation, tuple[Any, ...], dict[str, Any]], Any]

OPERATIONS: dict[str, Operation] = {}
"""Every operation by name; tests walk it."""


def set_dispatcher(function: Callable[[Operation, tuple[Any, ...], dict[str, Any]], Any]) -> None:
    """Install the function that handles calls with recordable values or under a tape or graph."""
    global _dispatch
    _dispatch = function


_differentiate: Callable[..., list[Any]]


def set_differentiator(function: Callable[..., list[Any]]) -> None:
    """Install the function that `pullback` calls."""
    global _differentiate
    _differentiate = function


def pullback(function: Callable[..., Sequence[Any]], inputs: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
    """Return the gradients by each input of what `function` computes by operations, for gradient rules to use.

    `function(*inputs)` returns several values; `cotangents` are theirs, None where none arrived. An input that no value
    depends on gets zeros. What is computed is recorded like any other operation, so it has gradients in turn.
    """
    return _differentiate(function, inputs, cotangents)


class GradientContext:
    """What a gradient rule may look at: the recorded call's inputs, outputs, attributes, and which inputs count.

    `inputs[i]` and `outputs[i]` are arrays or tensors; `x` and `y` are the first of each. `needs[i]` says whether a
    gradient for input i is wanted.
    """

    __slots__ = ("attributes", "inputs", "needs", "outputs")

    def __init__(
        self, inputs: Sequence[Any], outputs: Sequence[Any], attributes: dict[str, Any], needs: Sequence[bool]
    ) -> None:
        self.inputs, self.outputs, self.attributes, self.needs = inputs, outputs, attributes, needs

    @property
    def x(self) -> Any:
        """The first input."""
        return self.inputs[0]

    @property
    def y(self) -> Any:
        """The first output."""
        return self.outputs[0]

    def like(self, index: int) -> Any:
        """Return input `index` for its shape and dtype only: its contents may have changed since it was recorded."""
        return getattr(self.inputs, "unchecked", self.inputs)[index]

    def __getitem__(self, name: str) -> Any:
        return self.attributes[name]


Rule = Callable[..., Any]


class Operation:
    """One operation; call it with arrays, numbers, tensors or variables, and attributes by keyword.

    Parameters

    - `name`: NumPy's name for it where there is one.
    - `forward(xp, *arrays, **attributes)`: the result for arrays of module `xp`, an array or a tuple of arrays. Python
      numbers among the inputs come as they are, so that they take the arrays' dtype (NEP 50).
    - `spec(*specs, **attributes)`: the `Spec` (or tuple) of the result. A Python number's spec has shape ``()`` and
      dtype its Python type.
    - `gradient`: None where no gradient is defined; a tuple with one rule ``(context, g) -> gradient`` or None for each
      input; or one rule ``(context, *gs) -> tuple``. Rules are written in operations, so they can be recorded too. A
      cotangent that never arrived is None only for rules of several outputs.
    - `kernel`: like `forward`, for arrays that are not NumPy's.
    - `broadcasts`: inputs broadcast as in NumPy, so each gradient is summed to its input's shape.
    - `type`: the type that names nodes in a graph, TensorFlow's where there is one.
    - `stateful`: it does more than compute, so it is never skipped or replayed in a graph without being asked for.
    """

    __slots__ = ("__dict__", "broadcasts", "forward", "gradient", "kernel", "name", "spec", "stateful", "type")

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        *,
        spec: Callable[..., Any],
        gradient: Rule | tuple[Rule | None, ...] | None = None,
        kernel: Callable[..., Any] | None = None,
        broadcasts: bool = False,
        type: str | None = None,
        stateful: bool = False,
        doc: str | None = None,
    ) -> None:
        self.name, self.forward, self.spec, self.gradient, self.kernel = name, forward, spec, gradient, kernel
        self.broadcasts, self.stateful = broadcasts, stateful
        self.type = type or "".join(part.capitalize() for part in name.split("_"))
        self.__name__ = name
        self.__doc__ = doc or forward.__doc__
        if name in OPERATIONS:
            raise ValueError(message("Operation", f"{name!r} is defined twice"))
        OPERATIONS[name] = self

    def __call__(self, *inputs: Any, **attributes: Any) -> Any:
        """Compute, or record where something records."""
        if state.recorders:
            return _dispatch(self, inputs, attributes)
        for value in inputs:
            if isinstance(value, Recordable):
                return _dispatch(self, inputs, attributes)
        return self.run(inputs, attributes)

    def __repr__(self) -> str:
        return f"<operation {self.name}>"

    def as_arrays(self, inputs: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        """Return the array module of `inputs`, and the inputs as `forward` takes them."""
        return as_arrays(self.name, inputs)

    def run(self, inputs: Sequence[Any], attributes: dict[str, Any]) -> Any:
        """Compute on arrays and numbers; nothing is recorded."""
        xp, arrays = self.as_arrays(inputs)
        body = self.forward if xp is np or self.kernel is None else self.kernel
        try:
            result = body(xp, *arrays, **attributes)
        except (IndexError, TypeError, ValueError) as error:
            if type(error).__module__ == ShapeError.__module__:
                raise  # says already what is wrong
            raise explained(self.name, error, arrays) from error
        return np.asarray(result) if isinstance(result, np.generic) else result

    def backward(self, context: GradientContext, cotangents: Sequence[Any]) -> Sequence[Any]:
        """Return one gradient (or None) for each input, given the cotangent (or None) of each output."""
        rule = self.gradient
        if rule is None:
            raise GradientError(
                message(self.name, "no gradient is defined", do="Use gl.stop_gradient where none should flow.")
            )
        if callable(rule):
            result = rule(context, *cotangents)
            found = result if isinstance(result, tuple) else (result,)
            return [None if g is None else _in_dtype_of(context.like(i), g) for i, g in enumerate(found)]
        gradients = []
        for index, needed in enumerate(context.needs):
            one = rule[min(index, len(rule) - 1)] if needed else None
            gradient = None if one is None else one(context, cotangents[0])
            if gradient is not None and self.broadcasts:
                gradient = match(gradient, context.like(index))
            gradients.append(None if gradient is None else _in_dtype_of(context.like(index), gradient))
        return gradients


def explained(name: str, error: Exception, arrays: Sequence[Any]) -> Exception:
    """Return the array module's `error` in the form and as a type of ours, saying what was given."""
    given = ", ".join(f"{a.dtype}{list(a.shape)}" if hasattr(a, "dtype") else repr(a) for a in arrays)
    text = message(name, " ".join(str(error).split()).rstrip(".") or type(error).__name__, got=given or "no arrays")
    if isinstance(error, ValueError):
        return ShapeError(text)
    return DTypeError(text) if isinstance(error, TypeError) else IndexError(text)


_NUMBERS = (bool, int, float, complex)


def as_arrays(name: str, inputs: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """Return the array module of `inputs` and the inputs as its arrays; numbers beside an array stay numbers."""
    plain = numbers = False
    for value in inputs:
        kind = type(value)
        if kind is np.ndarray:
            plain = True
        elif kind in _NUMBERS:
            numbers = True
        else:
            break
    else:
        if plain or not inputs:
            return np, _beside_bfloat16(inputs) if numbers else inputs
    xp = array_module(*inputs)
    if not any(is_array(value) for value in inputs):
        converted = [asarray(value) for value in inputs]
        return array_module(*converted), converted
    target = None if xp is np else kind_of(next(v for v in inputs if is_array(v) and array_module(v) is xp))
    arrays = []
    for value in inputs:
        if type(value) in _NUMBERS:
            arrays.append(value)
        elif is_array(value) and array_module(value) is xp:
            arrays.append(np.asarray(value) if xp is np else value)
        elif is_array(value) and array_module(value) is not np:
            raise DeviceError(message(name, "arrays of two different devices are mixed", target, kind_of(value)))
        elif xp is np:
            arrays.append(np.asarray(asarray(value, device="cpu")))
        else:
            arrays.append(xp.asarray(value if is_array(value) else asarray(value, device="cpu")))
    return xp, _beside_bfloat16(arrays)


def _beside_bfloat16(inputs: Sequence[Any]) -> Sequence[Any]:
    """Return numbers beside a bfloat16 array in its dtype: NumPy and CuPy would make both float32 or more."""
    dtype = next((v.dtype for v in inputs if type(v) not in _NUMBERS and v.dtype.kind == "V"), None)
    if dtype is None:
        return inputs
    return [dtype.type(float(value)) if type(value) in (int, float) else value for value in inputs]


# --- shape rules that most operations share ---------------------------------------------------------------------------


def _probe(spec: Spec, size: int) -> Any:
    """A tiny stand-in for a value: all sizes `size`, right dtype; Python numbers as themselves."""
    number: Any = spec.dtype  # a Python number's spec has its Python type; note that dtype("float64") == float
    if isinstance(number, type):
        return number(1)
    return np.ones((size,) * len(spec.shape or ()), spec.dtype)


def result_dtype(forward: Callable[..., Any], specs: Sequence[Spec], **attributes: Any) -> np.dtype:
    """Return the dtype `forward` gives, by calling it on arrays of size one: the promotion rules are NumPy's own."""
    with np.errstate(all="ignore"):
        return np.asarray(forward(np, *_beside_bfloat16([_probe(s, 1) for s in specs]), **attributes)).dtype


def elementwise(forward: Callable[..., Any]) -> Callable[..., Spec]:
    """Make the shape rule of an elementwise operation: shapes broadcast, the dtype is what `forward` gives."""

    def spec(*specs: Spec, **attributes: Any) -> Spec:
        return Spec(broadcast_static_shape(*(s.shape for s in specs)), result_dtype(forward, specs, **attributes))

    return spec


def like_first(first: Spec, *_: Spec, **__: Any) -> Spec:
    """The shape rule of operations whose result is like their first input."""
    return first


# --- the operations that broadcasting gradients need ------------------------------------------------------------------


def _sum_to(xp: Any, g: Any, like: Any) -> Any:
    """Sum `g` over the axes that broadcasting added or stretched, so that it has the shape of `like`."""
    shape = np.shape(like) if isinstance(like, _NUMBERS) else like.shape
    if g.shape == shape:
        return g
    added = g.ndim - len(shape)
    axes = tuple(range(added)) + tuple(
        added + axis for axis, size in enumerate(shape) if size == 1 and g.shape[added + axis] != 1
    )
    if g.dtype.itemsize == 2:  # 16-bit data is accumulated in float32
        return xp.sum(g, axis=axes, dtype=np.float32).reshape(shape).astype(g.dtype)
    return xp.sum(g, axis=axes).reshape(shape)


def _broadcast_like(xp: Any, g: Any, like: Any) -> Any:
    """Stretch `g` to the shape of `like`, as NumPy broadcasting would."""
    return xp.broadcast_to(g, np.shape(like) if isinstance(like, _NUMBERS) else like.shape)


_sum_to_operation = Operation(
    "sum_to_like",
    _sum_to,
    spec=lambda g, like: Spec(like.shape, g.dtype),
    gradient=(lambda c, g: broadcast_like(g, c.inputs[0]), None),
)
broadcast_like: Operation = Operation(
    "broadcast_like",
    _broadcast_like,
    spec=lambda g, like: Spec(like.shape, g.dtype),
    gradient=(lambda c, g: sum_to_like(g, c.inputs[0]), None),
)


def sum_to_like(g: Any, like: Any) -> Any:
    """Return `g` summed to the shape of `like`: the gradient of broadcasting `like` to the shape of `g`."""
    shape = getattr(g, "shape", None)
    if shape is not None and _same_known_shape(shape, getattr(like, "shape", ())):
        return g
    return _sum_to_operation(g, like)


def _cast(xp: Any, x: Any, *, dtype: np.dtype) -> Any:
    """Convert `x` to `dtype`."""
    return xp.full((), x, dtype=dtype) if isinstance(x, _NUMBERS) else x.astype(dtype, copy=False)


cast_operation: Operation = Operation(
    "cast",
    _cast,
    spec=lambda x, dtype: Spec(x.shape, dtype),
    gradient=(lambda c, g: cast_operation(g, dtype=c.inputs[0].dtype),),
)


def _in_dtype_of(like: Any, gradient: Any) -> Any:
    dtype = getattr(like, "dtype", None)
    if gradient is None or dtype is None or gradient.dtype == dtype:
        return gradient
    return cast_operation(gradient, dtype=dtype)


def match(gradient: Any, like: Any) -> Any:
    """Return a gradient with the shape and dtype of the value it belongs to, `like`."""
    return sum_to_like(_in_dtype_of(like, gradient), like)


def _same_known_shape(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return a == b
    rank = len(a) if isinstance(a, tuple) else a.rank
    return rank is not None and bool(a == b) and None not in tuple(a)
