"""Variables: device arrays that a program trains or updates; partitioned variables and the partitioners."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gpulayers import nest, ops
from gpulayers.device import array_module, asarray, asnumpy, current_device, kind_of, placed
from gpulayers.device import device as on_device
from gpulayers.dtypes import TensorShape, as_dtype
from gpulayers.errors import DeviceError, ShapeError, StateError, message
from gpulayers.ops.operation import Operation
from gpulayers.trace import (
    CompositeValue,
    FunctionGraph,
    GraphKeys,
    GraphTensor,
    StoredValue,
    active_graph,
    active_tapes,
    as_value,
    assign_stored,
    autocast_dtype,
    eager_mode,
    group,
)
from gpulayers.trace.default_session import session_for
from gpulayers.trace.tensor import array_like_operators

__all__ = [
    "PartitionInfo",
    "PartitionedVariable",
    "Variable",
    "assign",
    "assign_add",
    "assign_sub",
    "fixed_size_partitioner",
    "global_variables_initializer",
    "local_variables_initializer",
    "variable_axis_size_partitioner",
    "variables_initializer",
]


def _initialize(xp: Any, *, variable: Variable) -> None:
    variable.initialize()


_initializer_operation = Operation(
    "initialize_variable",
    _initialize,
    spec=lambda variable: None,
    type="Initialize",
    stateful=True,
    doc="Give a variable its initial value.",
)


class Variable(StoredValue):
    """A device array with a name, that operations can read and programs can assign.

    Parameters

    - `initial_value`: an array, number, nested list, or a function without arguments that returns one. In a graph also
      a tensor of a fully known shape, which its `initializer` computes.
    - `trainable`: whether tapes watch it by themselves and optimizers update it.
    - `name`: ``"Variable"`` if not given; reported with ``:0`` behind it.
    - `dtype`: converted to this; otherwise the value's own (Python numbers: float32 and int32).
    - `constraint`: a function of the value that an optimizer applies after each update. Raises ValueError for another
      thing.

    Usable in operators, in NumPy's functions, and, outside a tape, as a CuPy array through
    ``__cuda_array_interface__``. In a graph the value exists after its `initializer` was run.

    State written: `assign`, `assign_add`, `assign_sub`, optimizers. `version` counts the changes.
    Source: ``tf.Variable``.

    >>> v = Variable([1.0, 2.0], name="v")
    >>> v.assign_add([1.0, 1.0]).numpy(), v.name, v.shape
    (array([2., 3.], dtype=float32), 'v:0', (2,))
    """

    __slots__ = ("_device", "_initial_value", "constraint", "graph", "initializer")
    __hash__ = object.__hash__

    def __init__(
        self,
        initial_value: Any,
        trainable: bool = True,
        name: str | None = None,
        dtype: Any = None,
        constraint: Callable[[Any], Any] | None = None,
        *,
        shape: Sequence[int] | None = None,
        autocast: bool = False,
        collections: Sequence[str] | None = None,
        unique_name: bool = True,
    ) -> None:
        if constraint is not None and not callable(constraint):
            raise ValueError(message("Variable", "the constraint is not callable", got=repr(constraint)))
        graph = active_graph()
        if isinstance(graph, FunctionGraph) and not graph.initializes_variables_in_session:
            graph = None  # made while a function is being recorded: an ordinary variable
        graph = None if graph is None else graph.owner
        self.graph = graph
        self._device = current_device()
        self._initial_value = initial_value
        base = name or "Variable"
        if graph is not None and unique_name:
            base = graph.unique_name(base)
        wanted = None if dtype is None else as_dtype(dtype)
        array = None
        if graph is not None and isinstance(initial_value, GraphTensor):
            shape, wanted = _settled(shape, initial_value.shape), wanted or initial_value.dtype
        elif graph is None or shape is None or wanted is None:
            array = self._evaluate(wanted)
            shape, wanted = tuple(array.shape), array.dtype
        static_shape = tuple(int(size) for size in shape)
        super().__init__(array if graph is None else None, f"{base}:0", trainable, static_shape, wanted)
        self.constraint, self.autocast = constraint, autocast
        self.initializer = None
        if graph is not None:
            self._register(graph, collections)

    def _register(self, graph: Any, collections: Sequence[str] | None) -> None:
        with graph.control_dependencies(None):
            if isinstance(self._initial_value, GraphTensor):
                self.initializer = graph.record(assign_stored, (self._initial_value,), {"stored": self})
            else:
                self.initializer = graph.record(_initializer_operation, (), {"variable": self})
        for key in collections if collections is not None else (GraphKeys.GLOBAL_VARIABLES,):
            graph.add_to_collection(key, self)
        if self.trainable:
            graph.add_to_collection(GraphKeys.TRAINABLE_VARIABLES, self)

    def _evaluate(self, dtype: Any) -> Any:
        value = self._initial_value
        if isinstance(value, GraphTensor):
            raise StateError(
                message(
                    "Variable",
                    "its initial value is a graph tensor",
                    do="Pass an array or a function that returns one, or run the variable's initializer.",
                )
            )
        with eager_mode():
            return self._own(as_value(value() if callable(value) else value), dtype)

    def _own(self, value: Any, dtype: Any) -> Any:
        """Return `value` as an array on the variable's device that nobody else has; updates need it contiguous."""
        array = asarray(value, dtype=dtype, device=self._device)
        if array is not value and array.flags.c_contiguous:
            return array
        with placed(self._device):  # CuPy copies to its current device
            return array.copy()

    def initialize(self) -> None:
        """Give the variable its initial value again (a function is called again)."""
        self.store(self.accept(self._evaluate(self.static_dtype)))

    def accept(self, value: Any) -> Any:
        """Return `value` as a new array of this variable's dtype on its device. Raises ValueError for another shape."""
        array = self._own(as_value(value), self.static_dtype)
        if tuple(array.shape) != self.static_shape:
            raise ShapeError(
                message(self.name, "a value of another shape is assigned", self.static_shape, tuple(array.shape))
            )
        return array

    # --- reading ------------------------------------------------------------------------------------------------------

    @property
    def value(self) -> Any:
        """The device array itself: in-place updates by optimizers and layers show in it."""
        return self.read()

    def numpy(self) -> np.ndarray:
        """Return a copy of the value as a NumPy array on the host."""
        host = asnumpy(self.read())
        return host.copy() if array_module(self.read()) is np else host

    def read_value(self) -> Any:
        """Return the present value as an operation's result: recorded where something records, else the array."""
        return ops.identity(self)

    def eval(self, session: Any = None) -> np.ndarray:
        """Return the value by the given or the default session. Raises ValueError if there is neither."""
        result: np.ndarray = session_for(self.name, session).run(self)
        return result

    def load(self, value: Any, session: Any = None) -> None:
        """Replace the value at once, in a graph too: it stays with the variable, so `session` has no meaning here."""
        self.store(self.accept(value))

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self.static_shape

    def get_shape(self) -> TensorShape:
        """Return the shape as a `TensorShape`."""
        return TensorShape(self.static_shape)

    @property
    def dtype(self) -> np.dtype:
        """Dtype as it is read: the compute dtype inside the call of a mixed-precision layer, else the stored one."""
        cast = autocast_dtype() if self.autocast else None
        return cast or self.static_dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.static_shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.static_shape)

    @property
    def op(self) -> Any:
        """The variable's own name without ``:0``, under `name`, as graph programs ask for it (``v.op.name``)."""
        return _Named(self.name.partition(":")[0])

    @property
    def device(self) -> str:
        """The device it lives on."""
        return str(self._device)

    def __len__(self) -> int:
        if not self.static_shape:
            raise TypeError(message(self.name, "a scalar has no length"))
        return self.static_shape[0]

    def __bool__(self) -> bool:
        return bool(self.read())

    def __float__(self) -> float:
        return float(self.read())

    def __int__(self) -> int:
        return int(self.read())

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self._refuse_while_recording("np.asarray(variable)")
        if kind_of(self.read()) != "cpu":
            raise DeviceError(message(self.name, "is on a device", do="Write variable.numpy() to copy it to the host."))
        return np.array(self.read(), dtype=dtype, copy=copy)

    @property
    def __cuda_array_interface__(self) -> Any:
        if kind_of(self.read()) == "cpu":
            raise AttributeError(message(self.name, "is not on a GPU"))
        try:
            self._refuse_while_recording("a CuPy function of a variable")
        except StateError as error:
            raise AttributeError(str(error)) from error
        return self.read().__cuda_array_interface__

    def _refuse_while_recording(self, what: str) -> None:
        if active_graph() is not None or active_tapes():
            raise StateError(
                message(
                    self.name,
                    f"{what} would lose the recording",
                    do="Use gl.ops or NumPy's functions on the variable, or variable.value for the array.",
                )
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Variable:
        if self.graph is not None:
            raise NotImplementedError(
                message(self.name, "a graph's variable cannot be copied", do="Copy the layer before it is built.")
            )
        base = self.name.partition(":")[0]
        with on_device(self._device):
            copied = Variable(self.read(), self.trainable, base, constraint=self.constraint, autocast=self.autocast)
        memo[id(self)] = copied
        return copied

    def __repr__(self) -> str:
        value = "<uninitialized>" if not self.initialized else repr(self.read())
        return f"<Variable {self.name!r} shape={self.static_shape} dtype={self.static_dtype.name} value={value}>"

    # --- writing ------------------------------------------------------------------------------------------------------

    def assign(self, value: Any, read_value: bool = True, name: str | None = None) -> Any:
        """Replace the value. Eager: at once, returns the variable. Graph: returns a tensor that assigns when run.

        Raises ValueError if the shape differs; the value is cast to the variable's dtype.
        """
        if active_graph() is not None or isinstance(value, GraphTensor):
            return assign_stored(value, stored=self)
        self.store(self.accept(value))
        return self

    def assign_add(self, delta: Any, read_value: bool = True, name: str | None = None) -> Any:
        """Add `delta` to the value; otherwise as `assign`."""
        return self.assign(ops.add(self._present(), delta))

    def assign_sub(self, delta: Any, read_value: bool = True, name: str | None = None) -> Any:
        """Subtract `delta` from the value; otherwise as `assign`."""
        return self.assign(ops.subtract(self._present(), delta))

    def _present(self) -> Any:
        return self if active_graph() is not None else self.read()


array_like_operators(Variable)


def _settled(shape: Sequence[int] | None, known: Any) -> tuple[int, ...]:
    """Return the shape of a variable whose initial value is a tensor of shape `known`."""
    static = TensorShape(known if shape is None else shape)
    if not static.is_fully_defined():
        raise ShapeError(message("Variable", "the shape of its initial value must be fully known", got=static))
    return tuple(static)  # type: ignore[arg-type]


class _Named:
    """Something with a name."""

    def __init__(self, name: str) -> None:
        self.name = name


def variables_initializer(variables: Sequence[Variable], name: str | None = None) -> Any:
    """Return a node that gives each of `variables` its initial value; None in eager mode."""
    return group(*(v.initializer for v in variables if v.initializer is not None))


def global_variables_initializer() -> Any:
    """Return a node that initializes every variable of the graph; None in eager mode, where they have values
    already.
    """
    graph = active_graph()
    return None if graph is None else variables_initializer(graph.get_collection(GraphKeys.GLOBAL_VARIABLES))


def local_variables_initializer() -> Any:
    """Return a node that initializes every variable of the collection LOCAL_VARIABLES; None in eager mode.

    Source: ``tf.compat.v1.local_variables_initializer``.
    """
    graph = active_graph()
    return None if graph is None else variables_initializer(graph.get_collection(GraphKeys.LOCAL_VARIABLES))


def assign(
    ref: Variable, value: Any, validate_shape: Any = None, use_locking: Any = None, name: str | None = None
) -> Any:
    """Replace the value of a variable: ``ref.assign(value)``.

    `validate_shape` and `use_locking` are accepted and have no effect: the shape always has to fit.
    Source: ``tf.compat.v1.assign``.

    >>> import gpulayers as gl
    >>> v = gl.Variable([1.0, 2.0])
    >>> gl.assign(v, [5.0, 6.0]).numpy()
    array([5., 6.], dtype=float32)
    """
    return ref.assign(value)


def assign_add(ref: Variable, value: Any, use_locking: Any = None, name: str | None = None) -> Any:
    """Add to the value of a variable: ``ref.assign_add(value)``. Source: ``tf.compat.v1.assign_add``."""
    return ref.assign_add(value)


def assign_sub(ref: Variable, value: Any, use_locking: Any = None, name: str | None = None) -> Any:
    """Subtract from the value of a variable: ``ref.assign_sub(value)``. Source: ``tf.compat.v1.assign_sub``."""
    return ref.assign_sub(value)


# --- partitioned variables --------------------------------------------------------------------------------------------


class PartitionInfo:
    """What an initializer of one part may ask: the full shape, and where the part begins along each axis."""

    def __init__(self, full_shape: Sequence[int], var_offset: Sequence[int]) -> None:
        self.full_shape, self.var_offset = list(full_shape), list(var_offset)

    def __repr__(self) -> str:
        return f"PartitionInfo(full_shape={self.full_shape}, var_offset={self.var_offset})"


@array_like_operators
class PartitionedVariable(CompositeValue):
    """A variable stored in several parts along one axis. Reads as one tensor; lists hold the parts.

    Source: ``tf.compat.v1.PartitionedVariable`` (made by `get_variable` and ``layer.add_variable`` with a partitioner).
    """

    __hash__ = object.__hash__

    def __init__(
        self, name: str, shape: Sequence[int], dtype: Any, variable_list: Sequence[Variable], partitions: Sequence[int]
    ) -> None:
        self.name, self.shape, self.dtype = name, tuple(shape), as_dtype(dtype)
        self._parts, self.partitions = list(variable_list), list(partitions)

    @property
    def axis(self) -> int:
        """The axis along which it is cut: the one with more than one part, else 0."""
        return next((axis for axis, count in enumerate(self.partitions) if count > 1), 0)

    def as_tensor(self) -> Any:
        """Return the parts joined along `axis`."""
        return ops.concatenate(self._parts, axis=self.axis)

    @property
    def value(self) -> Any:
        """The whole as one new device array."""
        return as_value(self.as_tensor())

    def numpy(self) -> np.ndarray:
        """Return the whole as a NumPy array."""
        return asnumpy(self.value)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def trainable(self) -> bool:
        """Whether the parts are trainable."""
        return all(part.trainable for part in self._parts)

    def get_shape(self) -> TensorShape:
        """Return the shape of the whole."""
        return TensorShape(self.shape)

    def __iter__(self) -> Iterator[Variable]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def assign(self, value: Any) -> Any:
        """Assign each part its piece of `value`."""
        sizes = [part.shape[self.axis] for part in self._parts]
        pieces = ops.split(value, np.cumsum(sizes)[:-1].tolist(), axis=self.axis)
        results = [part.assign(piece) for part, piece in zip(self._parts, pieces, strict=True)]
        return self if active_graph() is None else group(*results)

    def __repr__(self) -> str:
        described = f"shape={self.shape} dtype={self.dtype.name} partitions={self.partitions}"
        return f"<PartitionedVariable {self.name!r} {described}>"


def partition_counts(partitioner: Any, shape: Any, dtype: Any) -> list[int]:
    """Ask a partitioner for the number of parts along each axis, and check its answer.

    Raises ValueError: not callable, shape not fully known, not a sequence, wrong length, a count below 1, more than one
    axis cut, more parts than the axis is long.
    """
    static = TensorShape(shape)
    if not callable(partitioner):
        raise ValueError(message("partitioner", "is not callable", got=repr(partitioner)))
    if not static.is_fully_defined():
        raise ShapeError(message("partitioner", "needs a fully known shape", got=static))
    counts = partitioner(shape=static, dtype=as_dtype(dtype))
    if not isinstance(counts, Sequence) or isinstance(counts, str):
        raise ValueError(message("partitioner", "did not return a list", "a count for each axis", repr(counts)))
    if len(counts) != static.rank:
        raise ValueError(message("partitioner", "returned a list of another length", static.rank, list(counts)))
    if any(count < 1 for count in counts) or sum(count > 1 for count in counts) > 1:
        raise ValueError(message("partitioner", "must cut one axis at most", "counts of 1 or more", list(counts)))
    if any(count > max(size or 0, 1) for count, size in zip(counts, static, strict=True)):
        raise ValueError(message("partitioner", "cuts into more parts than there are", tuple(static), list(counts)))
    return [int(count) for count in counts]


def part_extents(shape: Sequence[int], counts: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return (shape, offset) of each part: contiguous, the first ``L % n`` of them one longer.

    >>> part_extents([7, 2], [3, 1])
    [([3, 2], [0, 0]), ([2, 2], [3, 0]), ([2, 2], [5, 0])]
    """
    axis = next((i for i, count in enumerate(counts) if count > 1), 0)
    length, count = shape[axis], counts[axis]
    extents, offset = [], 0
    for part in range(count):
        size = length // count + (part < length % count)
        extents.append(
            (
                [size if i == axis else n for i, n in enumerate(shape)],
                [offset if i == axis else 0 for i in range(len(shape))],
            )
        )
        offset += size
    return extents


def fixed_size_partitioner(num_shards: int, axis: int = 0) -> Callable[..., list[int]]:
    """Return a partitioner that cuts `axis` into ``min(num_shards, shape[axis])`` parts.

    Raises IndexError when used on a shape without that axis. Source: ``tf.compat.v1.fixed_size_partitioner``.

    >>> fixed_size_partitioner(3)(shape=(7, 2), dtype="float32")
    [3, 1]
    """

    def partitioner(shape: Any, **_: Any) -> list[int]:
        counts = [1] * len(shape)
        counts[axis] = min(num_shards, shape[axis])
        return counts

    return partitioner


def variable_axis_size_partitioner(
    max_shard_bytes: int, axis: int = 0, bytes_per_string_element: int = 16, max_shards: int | None = None
) -> Callable[..., list[int]]:
    """Return a partitioner that keeps each part of `axis` within `max_shard_bytes`, with at least one slice each.

    `max_shards` limits the number of parts (None or 0: no limit). Raises ValueError for sizes below 1 or a negative
    `max_shards`. Source: ``tf.compat.v1.variable_axis_size_partitioner``.

    >>> variable_axis_size_partitioner(64)(shape=(10, 4), dtype="float32")
    [3, 1]
    """
    name = "variable_axis_size_partitioner"
    for what, size in (("max_shard_bytes", max_shard_bytes), ("bytes_per_string_element", bytes_per_string_element)):
        if size < 1:
            raise ValueError(message(name, f"{what} is too small", "1 or more", size))
    if max_shards is not None and max_shards < 0:
        raise ValueError(message(name, "max_shards is negative", "0 (no limit) or more", max_shards))

    def partitioner(shape: Any, dtype: Any = "float32", **_: Any) -> list[int]:
        sizes = list(shape)
        if axis >= len(sizes) or axis < -len(sizes):
            raise IndexError(message(name, "the shape has no such axis", f"below {len(sizes)}", axis))
        kind = np.dtype(dtype)
        element = bytes_per_string_element if kind.kind in "SUO" else kind.itemsize
        bytes_per_slice = math.prod(sizes) // max(sizes[axis], 1) * element
        slices = max(1, max_shard_bytes // max(bytes_per_slice, 1))
        count = max(1, -(-sizes[axis] // slices))
        counts = [1] * len(sizes)
        counts[axis] = min(count, max_shards) if max_shards else count
        return counts

    return partitioner


def flat_variables(values: Any) -> list[Variable]:
    """Return the variables in a nested structure, the parts of partitioned ones singly."""
    found: list[Variable] = []
    for value in nest.flatten(values):
        found += list(value) if isinstance(value, PartitionedVariable) else [value]
    return found
