"""GradientTape: record operations while they run, then walk back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gpulayers import nest, ops
from gpulayers.device import is_array
from gpulayers.dtypes import is_floating
from gpulayers.errors import GradientError, StateError, message
from gpulayers.ops.operation import Operation, Recordable, state
from gpulayers.trace.gradients import UnconnectedGradients, backpropagate, seed
from gpulayers.trace.stored import CompositeValue, StoredValue, lend_aliased
from gpulayers.trace.tensor import GraphTensor, RecordedTensor

__all__ = ["GradientTape", "active_tapes", "as_recorded", "record_on_tapes", "stop_recording"]


class _Stack(threading.local):
    def __init__(self) -> None:
        self.tapes: list[GradientTape] = []


_stack = _Stack()


def active_tapes() -> list[GradientTape]:
    """Return the tapes that record in this thread, outermost first."""
    return [tape for tape in _stack.tapes if not tape._paused]


class TapeRecord:
    """One operation on a tape. `reads` lists (input index, variable, version) for every variable among the inputs."""

    __slots__ = ("attributes", "inputs", "operation", "outputs", "reads")

    def __init__(
        self,
        operation: Operation,
        inputs: tuple[Any, ...],
        outputs: tuple[Any, ...],
        attributes: dict[str, Any],
        reads: tuple[tuple[int, StoredValue, int], ...],
    ) -> None:
        self.operation, self.inputs, self.outputs = operation, inputs, outputs
        self.attributes, self.reads = attributes, reads


class _CheckedInputs(Sequence[Any]):
    """A record's inputs; looking at a variable that has changed since it was recorded raises."""

    def __init__(self, values: Sequence[Any], record: TapeRecord) -> None:
        self.unchecked, self._record = values, record

    def __len__(self) -> int:
        return len(self.unchecked)

    def __getitem__(self, index: Any) -> Any:
        for position, stored, version in self._record.reads:
            if position == index and stored.version != version:
                raise GradientError(
                    message(
                        self._record.operation.name,
                        f"the variable {stored.name!r} was changed after it was used and before `gradient`",
                        do="Call tape.gradient before assigning, or keep the old value with gl.identity(variable).",
                    )
                )
        return self.unchecked[index]


class GradientTape:
    """Record operations, to differentiate them afterwards.

    Parameters

    - `persistent`: allow several `gradient` calls; otherwise the records are dropped after the first.
    - `watch_accessed_variables`: watch every trainable variable that is used; otherwise only what `watch` is given.

    Values that depend on something watched are `RecordedTensor`; everything else stays a plain array. Plain arrays
    cannot be followed by themselves, so watch an input and use what `watch` returns, or hand the array to a layer or an
    operation of `gl.ops`: it is known by identity there.

    Source: ``tf.GradientTape``.

    >>> import numpy as np, gpulayers as gl
    >>> x = np.array([1.0, 2.0])
    >>> with gl.GradientTape() as tape:
    ...     t = tape.watch(x)
    ...     y = (t * t).sum()
    >>> tape.gradient(y, x)
    array([2., 4.])
    """

    def __init__(self, persistent: bool = False, watch_accessed_variables: bool = True) -> None:
        self._persistent, self._watch_variables = persistent, watch_accessed_variables
        self._records: list[TapeRecord] = []
        self._tracked: set[int] = set()
        self._keep: list[Any] = []  # identities stay valid while their owners live
        self._arrays: dict[int, RecordedTensor] = {}
        self._variables: dict[int, list[RecordedTensor]] = {}
        self._watched_variables: dict[int, StoredValue] = {}
        self._paused = True
        self._used = False

    # --- recording ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> GradientTape:
        if not self._paused:
            raise StateError(message("GradientTape", "is recording already"))
        _stack.tapes.append(self)
        state.recorders += 1
        self._paused = False
        return self

    def __exit__(self, *_: Any) -> None:
        self._paused = True
        state.recorders -= 1
        _stack.tapes.remove(self)

    def watch(self, tensor: Any) -> Any:
        """Follow an array, tensor or variable, or each of a nested structure; return the tensor(s) to compute with.

        Raises TypeError for integers, which have no gradient, and for anything that is not an array.
        """
        return nest.map_structure(self._watch_one, tensor)

    def _watch_one(self, value: Any) -> Any:
        if isinstance(value, GraphTensor):
            return value
        if isinstance(value, StoredValue):
            self._watched_variables[id(value)] = value
            return value
        if not (isinstance(value, RecordedTensor) or is_array(value)):
            raise TypeError(message("GradientTape.watch", "not an array", "an array or variable", type(value).__name__))
        if not is_floating(value.dtype):
            raise TypeError(message("GradientTape.watch", "has no gradient", "a floating dtype", value.dtype))
        if isinstance(value, RecordedTensor):
            self._track(value)
            return value
        found = self._arrays.get(id(value))
        if found is None:
            # An outer tape may know the array already: both must see the same tensor.
            known = (tape._arrays.get(id(value)) for tape in _stack.tapes)
            shared = next((t for t in known if t is not None), None)
            found = RecordedTensor(value) if shared is None else shared
            self._arrays[id(value)] = found
            self._keep.append(value)
            self._track(found)
        return found

    def _track(self, tensor: RecordedTensor) -> None:
        self._tracked.add(id(tensor))
        self._keep.append(tensor)

    def _tensor_of_variable(self, variable: StoredValue) -> RecordedTensor | None:
        watched = id(variable) in self._watched_variables or (self._watch_variables and variable.trainable)
        if not watched or not is_floating(variable.static_dtype):
            return None
        tensor = variable.tensor()
        if id(tensor) not in self._tracked:
            self._track(tensor)
            self._variables.setdefault(id(variable), []).append(tensor)
            self._watched_variables[id(variable)] = variable
        return tensor

    def follows(self, value: Any) -> bool:
        """Say whether `value` is a tensor that depends on something watched by this tape."""
        return id(value) in self._tracked

    def watched_variables(self) -> tuple[StoredValue, ...]:
        """Return the variables used so far, in the order they were first used."""
        return tuple(self._watched_variables.values())

    @contextlib.contextmanager
    def stop_recording(self) -> Iterator[None]:
        """Record nothing inside the block."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def reset(self) -> None:
        """Forget all that was recorded and watched."""
        paused = self._paused
        self.__init__(self._persistent, self._watch_variables)  # type: ignore[misc]
        self._paused = paused

    # --- differentiation ----------------------------------------------------------------------------------------------

    def gradient(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        unconnected_gradients: str = UnconnectedGradients.NONE,
    ) -> Any:
        """Return the gradient of the sum of `target` with respect to each of `sources`, in their structure.

        `target`: a tensor or nested structure of them. `sources`: what was watched: arrays, tensors, variables.
        `output_gradients`: cotangents in the structure of `target`, ones where None. A source that the target does not
        depend on gives None, or zeros with ``unconnected_gradients="zero"``.

        Gradients are plain arrays, unless another tape is recording. Raises GradientError if the target was not
        recorded, if a watched array reached no recorded operation, if a variable whose value is needed has changed,
        and (RuntimeError too) on a second call without ``persistent=True``.
        """
        targets = nest.flatten(target)
        if any(isinstance(t, GraphTensor) for t in targets):
            from gpulayers.trace.session import gradients  # graphs differentiate themselves; imported late: a cycle

            found = gradients(targets, nest.flatten(sources), nest.flatten(output_gradients), unconnected_gradients)
            return nest.pack_sequence_as(sources, found)
        if self._used and not self._persistent:
            raise GradientError(
                message("GradientTape", "gradient was called already", do="Use GradientTape(persistent=True).")
            )
        with self.stop_recording():
            result = self._gradient(
                targets, nest.flatten(sources), nest.flatten(output_gradients), unconnected_gradients
            )
        self._used = True
        if not self._persistent:
            self._records.clear()
        return nest.pack_sequence_as(sources, result)

    def _gradient(self, targets: list[Any], sources: list[Any], given: list[Any], unconnected: str) -> list[Any]:
        wanted = [self._tensors_of(source) for source in sources]
        given = given if len(given) == len(targets) else [None] * len(targets)
        cotangents: dict[int, Any] = {}
        for target, one in zip(targets, given, strict=True):
            tensor = self._target_tensor(target)
            start = seed(tensor if active_tapes() else tensor.value, one, ops.ones_like)
            held = cotangents.get(id(tensor))
            cotangents[id(tensor)] = start if held is None else held + start
        identities = {id(tensor) for tensors in wanted for tensor in tensors}
        cotangents = backpropagate(self._records, cotangents, identities, _view)
        return [
            self._result(source, tensors, cotangents, unconnected)
            for source, tensors in zip(sources, wanted, strict=True)
        ]

    def _target_tensor(self, target: Any) -> RecordedTensor:
        if isinstance(target, StoredValue) and id(target) in self._watched_variables:
            return target.tensor()
        tensor = target if isinstance(target, RecordedTensor) else self._arrays.get(id(target))
        if tensor is None or id(tensor) not in self._tracked:
            raise GradientError(
                message(
                    "GradientTape.gradient",
                    "the target was not recorded: it depends on nothing that was watched by a differentiable path",
                    do="Watch the input and compute with the tensor that tape.watch(x) returns.",
                )
            )
        return tensor

    def _tensors_of(self, source: Any) -> list[RecordedTensor]:
        if isinstance(source, StoredValue):
            return self._variables.get(id(source), [])
        if isinstance(source, RecordedTensor):
            return [source]
        if isinstance(source, CompositeValue):
            raise GradientError(
                message("GradientTape.gradient", "a source is stored in parts", do="Pass the parts: list(variable).")
            )
        found = self._arrays.get(id(source))
        return [] if found is None else [found]

    def _result(self, source: Any, tensors: list[Any], cotangents: dict[int, Any], unconnected: str) -> Any:
        total = None
        for tensor in tensors:
            one = cotangents.get(id(tensor))
            total = one if total is None else (total if one is None else total + one)
        if total is not None:
            return np.asarray(total) if isinstance(total, np.generic) else total  # NumPy's 0-d arithmetic gives scalars
        if unconnected == UnconnectedGradients.ZERO:
            return ops.zeros_like(source.read() if isinstance(source, StoredValue) else source)
        if not isinstance(source, Recordable):
            self._explain_unreached(source, tensors)
        return None

    def _explain_unreached(self, source: Any, tensors: list[RecordedTensor]) -> None:
        if not tensors:
            raise GradientError(
                message("GradientTape.gradient", "a source was never watched", do="Call tape.watch(x) inside the tape.")
            )
        if not any(value is tensors[0] for record in self._records for value in record.inputs):
            raise GradientError(
                message(
                    "GradientTape.gradient",
                    "a watched array reached no recorded operation: arithmetic on a plain array cannot be seen",
                    do="Compute with the tensor of tape.watch(x), or hand the array itself to a layer or gl.ops.",
                )
            )


def _view(record: TapeRecord) -> tuple[Sequence[Any], Sequence[Any]]:
    """Show a rule tensors if another tape records it, plain arrays otherwise."""
    inputs, outputs = record.inputs, record.outputs
    if not active_tapes():
        inputs = tuple(v._value if type(v) is RecordedTensor else v for v in inputs)
        outputs = tuple(v._value if type(v) is RecordedTensor else v for v in outputs)
    return (_CheckedInputs(inputs, record) if record.reads else inputs), outputs


def record_on_tapes(tapes: list[GradientTape], operation: Operation, inputs: Sequence[Any], attributes: Any) -> Any:
    """Run an operation, and record it on every tape that follows one of its inputs."""
    seen, values, reads = list(inputs), list(inputs), []
    recording: list[GradientTape] = []
    for index, value in enumerate(inputs):
        if isinstance(value, RecordedTensor):
            tensor: RecordedTensor | None = value
            values[index] = value._value
            recording += [tape for tape in tapes if id(value) in tape._tracked]
        elif isinstance(value, StoredValue):
            values[index] = seen[index] = value.read()
            reads.append((index, value, value.version))
            for tape in tapes:
                tensor = tape._tensor_of_variable(value)
                if tensor is not None:
                    seen[index] = tensor
                    recording.append(tape)
        elif not isinstance(value, bool | int | float):
            for tape in tapes:
                tensor = tape._arrays.get(id(value))
                if tensor is not None:
                    seen[index] = tensor
                    recording.append(tape)
    result = operation.run(values, attributes)
    if reads:
        lend_aliased(inputs, result)
    if not recording or operation.gradient is None:
        return result
    for index, array in enumerate(operation.as_arrays(values)[1]):
        # Rules compute with the arrays that the forward computed with: a host array beside device arrays was copied.
        if seen[index] is values[index] and hasattr(array, "dtype"):
            seen[index] = array
    several = isinstance(result, tuple | list)
    outputs = tuple(RecordedTensor(r) if is_floating(r.dtype) else r for r in (result if several else (result,)))
    record = TapeRecord(operation, tuple(seen), outputs, attributes, tuple(reads))
    for tape in {id(tape): tape for tape in recording}.values():
        tape._records.append(record)
        for output in outputs:
            if isinstance(output, RecordedTensor):
                tape._track(output)
    return outputs if several else outputs[0]


def as_recorded(structure: Any) -> Any:
    """Replace arrays that an active tape watches by their tensors, in a nested structure; the rest stays."""
    tapes = active_tapes()
    if not any(tape._arrays for tape in tapes):
        return structure

    def one(value: Any) -> Any:
        found = (tape._arrays.get(id(value)) for tape in tapes)
        return next((tensor for tensor in found if tensor is not None), value)

    return nest.map_structure(one, structure)


@contextlib.contextmanager
def stop_recording() -> Iterator[None]:
    """Record on no tape inside the block."""
    with contextlib.ExitStack() as stack:
        for tape in active_tapes():
            stack.enter_context(tape.stop_recording())
        yield
