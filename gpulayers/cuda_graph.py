"""`cuda_graph`: record a step of fixed shapes once as a CUDA graph, then run it with one launch per call."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gpulayers import _cupy, nest
from gpulayers.device import current_device, is_array, kind_of
from gpulayers.errors import message
from gpulayers.graph_memory import GraphMemory
from gpulayers.launch import Kept, forget_stream, keeping
from gpulayers.trace import Replays, active_graph, active_tapes, following
from gpulayers.trace.stored import StoredValue, observe

__all__ = ["CudaGraph", "cuda_graph"]

_PLAIN_CALLS = 2  # the first builds and compiles, the second shows what every further call does


class CudaGraph:
    """A function that is captured and replayed; made by `cuda_graph`.

    `reason` says why the last call was a plain one, and is empty where it was a replay. `captures` counts the graphs
    made, one for each device and set of shapes, dtypes and other arguments.
    """

    def __init__(self, function: Callable[..., Any], plain_calls: int = _PLAIN_CALLS) -> None:
        if not callable(function):
            raise TypeError(message("cuda_graph", "not a function", "a callable", type(function).__name__))
        if plain_calls < 2:
            raise ValueError(message("cuda_graph", "too few plain calls", "2 or more", plain_calls))
        functools.update_wrapper(self, function, updated=())
        self._function, self._plain_calls = function, plain_calls
        self._steps: dict[Any, _Step] = {}
        self.reason = ""

    @property
    def captures(self) -> int:
        """The number of graphs made so far."""
        return sum(step.graph is not None for step in self._steps.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step once: plainly, or as a replay of its graph."""
        leaves = nest.flatten([args, kwargs])
        self.reason = self._obstacle(leaves)
        if self.reason:
            return self._function(*args, **kwargs)
        try:
            structure, device = str(nest.map_structure(lambda leaf: 0, [args, kwargs])), _device()
            key = (device, structure, *map(_description, leaves))
            step = self._steps.get(key)
        except TypeError:
            self.reason = "an argument is neither an array nor hashable"
            return self._function(*args, **kwargs)
        if step is None or step.is_stale():
            if step is not None:
                step.close()
            step = self._steps[key] = _Step()
        if step.graph is None and not step.reason and step.calls >= self._plain_calls:
            if not step.capture(self._function, args, kwargs):
                step.close()
        if step.graph is None:
            self.reason = step.reason or f"call {step.calls + 1} of {self._plain_calls} before the capture"
            return step.plain(self._function, args, kwargs)
        return step.replay(leaves)

    def _obstacle(self, leaves: list[Any]) -> str:
        """Return why a call with these arguments cannot even be considered, or an empty string."""
        if not any(map(_cupy.is_device_array, leaves)) and current_device().kind != "gpu":
            return "the arrays are on the host, where there are no CUDA graphs"
        if active_graph() is not None or active_tapes():
            return "a tape or a graph is recording, which a replay would bypass"
        return ""


class _Step:
    """One set of shapes: its plain calls, then its graph with the memory that belongs to it."""

    closed = True  # until everything is there

    def __init__(self) -> None:
        # The launcher's workspace is kept per stream: like the memory, it is private to the graph.
        self.stream, self.memory = _cupy.cupy().cuda.Stream(non_blocking=True), GraphMemory()
        self.calls, self.reason = 0, ""
        self._last_stream: Any = None
        self._hold_nothing()
        self.closed = False

    def _hold_nothing(self) -> None:
        self.graph: Any = None
        self.buffers: list[Any] = []
        self.results: Any = None
        self.kept, self.seen = Kept(), _Observed(capturing=False)
        self.cublas = _cupy.StreamCublas(self.stream)  # whose handle and workspace come with the first product

    def close(self) -> None:
        """Give up the graph and its memory: first what lies in the memory, then that itself."""
        if not self.closed:
            self.closed = True
            self._hold_nothing()
            forget_stream(self.stream.ptr)
            self.memory.release()

    def __del__(self) -> None:
        if not sys.is_finalizing():  # CuPy gives nothing back then either
            self.close()

    def plain(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the function on the graph's stream and memory, or, once a capture was given up, just call it."""
        if self.reason:
            return function(*args, **kwargs)
        outer, seen = _cupy.cupy().cuda.get_current_stream(), _Observed(capturing=False)
        self.stream.wait_event(outer.record())
        try:
            with self._watched(seen):
                results = function(*args, **kwargs)
        finally:  # the kernels that a failing call launched before it failed are under way
            outer.wait_event(self.stream.record())
        self.calls += 1
        if self.calls > 1:  # the first call also makes slots and other state
            self.reason = seen.complaint()
            if self.reason:
                self.close()
        return results

    @contextlib.contextmanager
    def _watched(self, seen: _Observed) -> Iterator[None]:
        """Run the block on the graph's stream and memory, seen by `seen`."""
        pool = _cupy.cupy().cuda.using_allocator(self.memory.allocator)
        self.cublas.may_create = not seen.replays.capturing
        with observe(seen.reading, seen.writing), following(seen.replays), _cupy.using(self.cublas), pool, self.stream:
            yield

    def capture(self, function: Callable[..., Any], args: Any, kwargs: Any) -> bool:
        """Record the function into `graph`; where that fails, say why in `reason` and leave the state as it was."""
        cupy, seen, kept = _cupy.cupy(), _Observed(capturing=True), Kept()
        graph = results = None
        given = [args, kwargs]
        with cupy.cuda.using_allocator(self.memory.allocator):
            buffers = [cupy.array(leaf, order="C") if is_array(leaf) else leaf for leaf in nest.flatten(given)]
        args, kwargs = nest.pack_sequence_as(given, buffers)
        cupy.cuda.get_current_stream().synchronize()  # the buffers are filled
        self.stream.synchronize()  # plain calls from other streams have left the memory
        given_back, refusals = self.memory.given_back, []  # texts: an error holds the arrays of the frames it left
        with self._watched(seen), keeping(kept), self.memory.capturing():
            self.stream.begin_capture()
            try:
                results = function(*args, **kwargs)
            except Exception as raised:  # refusals have many types; the caller's own errors come again plainly
                refusals.append(f"{type(raised).__name__}: {raised}")
            try:
                graph = self.stream.end_capture()
            except Exception as raised:
                refusals.append(f"{type(raised).__name__}: {raised}")
        if self.memory.given_back != given_back:
            refusals.append("memory that the graph uses was freed during the capture: there was too little")
        self.reason = refusals[0] if refusals else seen.complaint()
        if self.reason:
            seen.restore()
            return False
        seen.settle()
        self.graph, self.buffers, self.results, self.kept, self.seen = graph, buffers, results, kept, seen
        return True

    def is_stale(self) -> bool:
        """Say whether the graph works on what a plain call would not use any more."""
        return self.graph is not None and (self.kept.is_stale() or self.seen.is_stale())

    def replay(self, leaves: list[Any]) -> Any:
        """Copy the arguments into the buffers, do the host's part, and launch the graph on the current stream."""
        stream = _cupy.cupy().cuda.get_current_stream()
        if self._last_stream is not None and self._last_stream.ptr != stream.ptr:
            stream.wait_event(self._last_stream.record())  # the buffers may still be read
        self._last_stream = stream
        for buffer, leaf in zip(self.buffers, leaves, strict=True):
            if leaf is buffer or not is_array(leaf):
                continue
            if _cupy.is_device_array(leaf):
                buffer[...] = leaf
                continue
            host = np.asarray(leaf, buffer.dtype)  # `set` takes no scalar and no other order of bytes
            buffer.set(host)
            if _cupy.cupy().cuda.pinned_memory.is_memory_pinned(host.ctypes.data):
                stream.synchronize()  # copied later, from memory that the caller may write meanwhile
        self.seen.replays.before_replay()
        self.graph.launch()
        self.seen.count_changes()
        return self.results


class _Observed:
    """The variables that a call reads and writes: a graph repeats device work at the same addresses, and no more."""

    def __init__(self, capturing: bool) -> None:
        self.replays = Replays(capturing)
        self._read: dict[int, StoredValue] = {}
        self._previous: dict[int, tuple[StoredValue, Any]] = {}
        self._arrays: list[tuple[StoredValue, Any]] = []
        self._constants: list[tuple[StoredValue, int]] = []

    def reading(self, value: StoredValue) -> None:
        self._read[id(value)] = value

    def writing(self, value: StoredValue, previous: Any) -> None:
        self._previous.setdefault(id(value), (value, previous))

    def complaint(self) -> str:
        """Return why the call cannot become a graph, or an empty string."""
        for value, previous in self._previous.values():
            if self.replays.claims(value):
                continue
            if self.replays.consults(value):
                return f"{value.name} is changed by the step and gives an optimizer its learning rate"
            if kind_of(value.read()) == "cpu":
                return f"{value.name} lives on the host and changes in every call: leave its update outside"
            if value.read() is not previous:
                return f"{value.name} gets a new array in every call: a graph would go on reading the old one"
        if self.replays.capturing:
            for value in self._read.values():
                if self.replays.claims(value):
                    return f"{value.name} is read by the step and changed by the host before each replay"
        return self.replays.refusal

    def settle(self) -> None:
        """Remember what a captured graph works on; values of host variables became a part of it."""
        for value in self._read.values():
            self._arrays.append((value, value.read()))
            if kind_of(value.read()) == "cpu":
                self._constants.append((value, value.version))

    def is_stale(self) -> bool:
        """Say whether a variable has another array, another value on the host, or a reader that a write must spare."""
        return (
            any(value.read() is not array for value, array in self._arrays)
            or any(value.version != version for value, version in self._constants)
            or any(value.is_lent for value, _ in self._previous.values())
        )

    def count_changes(self) -> None:
        """Say to the variables that the graph changed them."""
        for value, _ in self._previous.values():
            value.changed()

    def restore(self) -> None:
        """Give the variables the arrays from before the call."""
        for value, previous in self._previous.values():
            if value.read() is not previous:
                value.store(previous)


def _device() -> int:
    number: int = _cupy.cupy().cuda.runtime.getDevice()  # streams and memory belong to it
    return number


def _description(leaf: Any) -> Any:
    if is_array(leaf):
        return ("array", tuple(leaf.shape), np.dtype(leaf.dtype).str)
    hash(leaf)
    return (type(leaf), leaf)


def cuda_graph(function: Callable[..., Any], *, plain_calls: int = _PLAIN_CALLS) -> CudaGraph:
    """Return a function that runs `function` as a CUDA graph: one launch per call instead of one per kernel.

    For steps of a few microseconds per kernel, where the host is what takes the time. Every call runs the step exactly
    once: the first `plain_calls` with the same shapes are plain, the next one is captured and launched, all others are
    launched. On NumPy every call is a plain one.

    Parameters: `function`, of arrays, in any nested structure, and of hashable values, which become part of the graph;
    `plain_calls`, at least 2: the first compiles and makes state, the second is observed.

    Returns a `CudaGraph`; its `reason` says why the last call was plain. Results of a replay are the graph's own
    arrays, which the next call overwrites: write ``.copy()`` to keep one. Arguments, host arrays too, are copied into
    buffers. A graph keeps its buffers and temporaries, in memory of its own, as long as it lives; they go back to the
    device when it is dropped or captured anew.

    A whole training step can be captured: forward, gradients, optimizer. Optimizers count and compute their learning
    rates, schedules and bias corrections on the host before each replay, and the kernels read them from device memory,
    so every replay computes what a plain call would, bit by bit; a learning rate may be assigned in between. Random
    operations and dropout draw on: their generators keep their state on the device.

    Everything else that the host computes is frozen at the capture. Calls stay plain, with the reason,

    - where another variable on the host changes, or one gets a new array in every call;
    - where the step reads an optimizer's `iterations`, or changes the variable that holds its learning rate;
    - where a parameter has no kernel of the optimizers (`gpulayers.ops.optimizer_kernels`), or the learning rate is a
      tensor of a graph;
    - where a dropout layer or wrapper has a seed: its masks come from seeds that the host draws;
    - where CuPy refuses a capture: copies between host and device (``asnumpy``, ``float(x)``, host arrays inside the
      step) and calls into cuRAND, cuSOLVER, cuSPARSE and, through CuPy itself, cuBLAS.

    CuPy's own products cannot be captured, because its wrappers set the stream before each call and refuse one that is
    capturing. Those of this library (`matmul` with a matrix or vector on the right, `Dense`, convolutions, recurrent
    cells and sequences) call cuBLAS through a handle of the step's own, that got its stream and workspace (4 to 32 MiB)
    before; `einsum` and products of batches of matrices are CuPy's. cuBLAS may choose another algorithm for another
    handle, so a product in a captured step agrees with that of a plain program to rounding.

    After a refused capture the function has run once more than the step on the device. A step is captured anew when a
    variable was assigned a new array outside, changed on the host, or is lent to somebody who may still read it, and
    when the random generators were restarted.

    Inside a tape or graph every call is plain: a replay would record nothing. Calls on several streams wait for each
    other.

    Raises TypeError for something that cannot be called, ValueError for fewer than 2 plain calls; what `function`
    raises is raised.

    Source: CUDA programming guide, "CUDA graphs". The relative is ``torch.cuda.make_graphed_callables``, whose warm-up
    runs the step more often than it is called; this one does not.

    >>> double = cuda_graph(lambda x: x * 2)
    >>> double(np.ones(2))
    array([2., 2.])
    >>> double.reason
    'the arrays are on the host, where there are no CUDA graphs'
    """
    return CudaGraph(function, plain_calls)
