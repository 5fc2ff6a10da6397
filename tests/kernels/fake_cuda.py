"""A double of CuPy's streams, memory pools and graphs: work is recorded while a stream captures, and repeated later.

What CuPy 14.2 does in a capture, by its source (`stream.pyx`, `memory.pyx`, `cublas.pyx`): copies between host and
device raise RuntimeError, calls into cuBLAS NotImplementedError; memory comes from the current allocator as always;
nothing is executed until the graph is launched. A pool keeps what is freed, and what it keeps when it dies is lost.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import sys
import weakref
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.kernels import strict_array
from tests.kernels.fake_cublas import CUBLAS_POINTER_MODE_HOST, HANDLE, FakeCublas


class CUDARuntimeError(RuntimeError):
    """An error of the driver."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class OutOfMemoryError(MemoryError):
    """What a pool raises when the driver has no memory left for it."""


class Memory:
    """Device memory that is given back when this object dies."""

    def __init__(self, machine: Machine, size: int) -> None:
        self._machine, self.size = machine, 0
        if machine.allocated + size > machine.capacity:
            raise CUDARuntimeError(2)
        machine.allocated += size
        self.size = size

    def __del__(self) -> None:
        self._machine.allocated -= self.size


class MemoryPointer(SimpleNamespace):
    """A place in memory, which it keeps alive."""

    def __init__(self, mem: Any, offset: int) -> None:
        super().__init__(mem=mem, offset=offset)


class PooledMemory:
    """A block of a pool, which gets it back; nobody gets it back where the pool is gone."""

    def __init__(self, pool: MemoryPool, mem: Memory) -> None:
        self._pool, self.mem, self.size = weakref.ref(pool), mem, mem.size

    def __del__(self) -> None:
        pool = self._pool()
        if pool is not None:
            pool.free.append(self.mem)


class MemoryPool:
    """CuPy's pool on one device, without splitting blocks."""

    def __init__(self, machine: Machine, allocator: Any = None) -> None:
        self._machine = machine
        self._allocator = allocator or (lambda size: MemoryPointer(Memory(machine, size), 0))
        self.free: list[Memory] = []
        self._total, self.limit = 0, None

    def __del__(self) -> None:
        self._machine.leaked += self.free  # blocks and arena hold each other, and no collector sees it

    def malloc(self, size: int) -> MemoryPointer:
        for place, mem in enumerate(self.free):
            if mem.size == size:
                return MemoryPointer(PooledMemory(self, self.free.pop(place)), 0)
        if self.limit is not None and self._total + size > self.limit:
            self.free_all_blocks()
            if self._total + size > self.limit:
                raise OutOfMemoryError(size)
        for _ in range(3):
            try:
                mem = self._allocator(size).mem
            except CUDARuntimeError as error:
                if error.status != 2:
                    raise
                self.free_all_blocks()
            else:
                self._total += size
                return MemoryPointer(PooledMemory(self, mem), 0)
        raise OutOfMemoryError(size)

    def free_all_blocks(self) -> None:
        self._total -= sum(mem.size for mem in self.free)
        self.free = []

    def total_bytes(self) -> int:
        return self._total


class Machine:
    """A device with one stream that may be capturing; work is a list of functions."""

    def __init__(self) -> None:
        self.work: list[Any] | None = None
        self.current: Any = None
        self.serial, self.allocators, self.log = 0, [], []
        self.capacity, self.allocated, self.leaked = 1 << 40, 0, []
        self.devices, self.device = 1, 0
        self.pinned: set[int] = set()  # addresses
        self.copies: list[Any] = []  # from pinned memory, under way
        self.default_pool = MemoryPool(self)
        self._memory: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._generators: dict[int, tuple[Any, Any]] = {}
        self._fresh: list[Any] = []
        self._held: list[Any] = []  # by the pools of the graphs

    def allocate(self, size: int) -> MemoryPointer:
        """Return memory of the current allocator."""
        allocator = self.allocators[-1] if self.allocators else self.default_pool.malloc
        return allocator(size)

    def launch(self, function: Any) -> None:
        """Run a kernel, or record it while a stream is capturing."""
        if self.work is None:
            function()
        else:
            self.work.append(function)

    def begin(self) -> None:
        self.work = []
        strict_array.capture = self

    def end(self) -> list[Any]:
        """Undo what was done to find shapes and dtypes, and return the work."""
        strict_array.capture = None
        for memory, before in reversed(self._memory.values()):
            np.copyto(memory, before)
        for generator, state in self._generators.values():
            generator.bit_generator.state = state
        self._memory, self._generators = {}, {}
        self._held.append(self._fresh)
        self._fresh = []
        work, self.work = self.work, None
        return work or []

    def save(self, memory: np.ndarray) -> None:
        """Keep what an array holds before the capture writes it for the first time."""
        while memory.base is not None and isinstance(memory.base, np.ndarray):
            memory = memory.base
        self._memory.setdefault(id(memory), (memory, memory.copy()))

    def hold(self, memory: np.ndarray) -> None:
        """Keep memory that was allocated in a capture, as the graph's pool does."""
        self._fresh.append(memory)

    def save_generator(self, generator: Any) -> None:
        self._generators.setdefault(id(generator), (generator, copy.deepcopy(generator.bit_generator.state)))

    def record(self, function: Any, inputs: Any, written: Any) -> Any:
        """Do the work once, for the shapes, and record it to be done into the same arrays."""
        for memory in written:
            self.save(memory)
        result = function()
        made = [one for one in (result if isinstance(result, tuple | list) else [result]) if hasattr(one, "_memory")]
        arrays = [value for value in inputs if isinstance(value, np.ndarray)]
        if made and any(np.may_share_memory(one._memory, array) for one in made for array in arrays):
            return result  # a view has no work of its own

        def again() -> None:
            repeated = function()
            pieces = repeated if isinstance(repeated, tuple | list) else [repeated]
            for one, other in zip(made, pieces if made else [], strict=True):
                np.copyto(one._memory, other._memory)

        self.launch(again)
        return result


def _recorded_launches(machine: Machine, launch: Any) -> Any:
    """Return the emulated launcher's `launch`, which a capture records."""

    def recorded(specialisation: Any, packed: bytes, arrays: Any, geometry: Any, reached: Any) -> None:
        def function() -> None:
            launch(specialisation, packed, arrays, geometry, reached)

        if machine.work is not None:
            for array in (*arrays.values(), *reached):
                machine.save(array._memory)
            function()
        machine.launch(function)

    return recorded


class WrappedCublas(FakeCublas):
    """CuPy's module of cuBLAS: every product first sets the current stream, which is refused in a capture."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine, self.streams, self.destroyed = machine, {HANDLE: 0}, []

    def create(self) -> int:
        handle = HANDLE + len(self.streams)
        self.streams[handle] = self.math_modes[handle] = 0
        return handle

    def destroy(self, handle: int) -> None:
        self.destroyed.append(handle)

    def setStream(self, handle: int, stream: int) -> None:  # noqa: N802
        if self._machine.work is not None:
            raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
        self.streams[handle] = stream

    def check_status(self, status: int) -> None:
        if status:
            raise RuntimeError(f"cuBLAS status {status}")

    def gemmEx(self, handle: int, *arguments: int) -> None:  # noqa: N802
        self.setStream(handle, self._machine.current.ptr)
        super().gemmEx(handle, *arguments)


class Library:
    """cuBLAS itself: it works on the stream that its handle has, capturing or not, and needs a workspace there."""

    def __init__(self, machine: Machine, wrapped: WrappedCublas) -> None:
        self._machine, self._wrapped, self.workspaces = machine, wrapped, {}

    def cublasSetWorkspace_v2(self, handle: int, address: int, size: int) -> int:  # noqa: N802
        self.workspaces[handle] = (address, size)
        return 0

    def cublasGemmEx(self, handle: int, *arguments: int) -> int:  # noqa: N802
        if self._wrapped.streams[handle] != self._machine.current.ptr or handle not in self.workspaces:
            return 14

        def product() -> None:
            self._wrapped.pointer_mode, mode = CUBLAS_POINTER_MODE_HOST, self._wrapped.pointer_mode
            FakeCublas.gemmEx(self._wrapped, handle, *arguments)
            self._wrapped.pointer_mode = mode

        if self._machine.work is not None:
            rows, columns, out, out_type, leading = arguments[2], arguments[3], *arguments[13:16]
            size = {0: 4, 1: 8, 2: 2, 14: 2}[out_type] * (leading * (columns - 1) + rows)
            self._machine.save(np.frombuffer((ctypes.c_char * size).from_address(out), np.uint8))
            product()
        self._machine.launch(product)
        return 0


def fake_cuda(machine: Machine) -> SimpleNamespace:
    """Return what stands for ``cupy.cuda``."""

    class Event:
        pass

    class Graph:
        def __init__(self, work: list[Any]) -> None:
            self.work = work

        def launch(self) -> None:
            machine.log.append("launch")
            while machine.copies:  # they come before it, but only now
                machine.copies.pop(0)()
            for function in self.work:
                function()

    class Stream:
        def __init__(self, non_blocking: bool = False) -> None:
            machine.serial += 1
            self.ptr, self.non_blocking, self.outer = machine.serial, non_blocking, []

        def __enter__(self) -> Any:
            self.outer.append(machine.current)
            machine.current = self
            return self

        def __exit__(self, *_: Any) -> None:
            machine.current = self.outer.pop()

        def record(self) -> Event:
            return Event()

        def wait_event(self, event: Any) -> None:
            assert isinstance(event, Event)
            machine.log.append(f"stream {self.ptr} waits")

        def synchronize(self) -> None:
            assert machine.work is None
            machine.log.append(f"stream {self.ptr} is done")
            while machine.copies:
                machine.copies.pop(0)()

        def begin_capture(self) -> None:
            assert self.non_blocking and machine.current is self and machine.work is None
            machine.begin()

        def end_capture(self) -> Graph:
            work = machine.end()
            machine.log.append("captured")
            return Graph(work)

    class Device:
        def __init__(self, number: int) -> None:
            self.id, self.outer = number, []

        def use(self) -> None:
            if self.id >= machine.devices:
                raise CUDARuntimeError(101)
            machine.device = self.id

        def __enter__(self) -> Any:
            self.outer.append(machine.device)
            self.use()
            return self

        def __exit__(self, *_: Any) -> None:
            machine.device = self.outer.pop()

    @contextmanager
    def using_allocator(allocator: Any) -> Any:
        machine.allocators.append(allocator)
        try:
            yield
        finally:
            machine.allocators.pop()

    machine.current = Stream()
    return SimpleNamespace(
        Stream=Stream,
        Device=Device,
        Memory=functools.partial(Memory, machine),
        MemoryPointer=MemoryPointer,
        MemoryPool=functools.partial(MemoryPool, machine),
        pinned_memory=SimpleNamespace(is_memory_pinned=lambda address: address in machine.pinned),
        using_allocator=using_allocator,
        get_current_stream=lambda: machine.current,
        runtime=SimpleNamespace(
            getDevice=lambda: machine.device,
            getDeviceCount=lambda: machine.devices,
            getDeviceProperties=lambda device: {"major": 9},
            CUDARuntimeError=CUDARuntimeError,
        ),
    )


@contextlib.contextmanager
def emulated_cuda(monkeypatch: Any) -> Any:
    """Let the emulated device stand for CuPy, streams and captures included; yield the machine."""
    from gpulayers import _cupy

    machine, module = Machine(), strict_array.xp
    monkeypatch.setattr(module, "cuda", fake_cuda(machine), raising=False)
    monkeypatch.setattr(module, "get_default_memory_pool", lambda: machine.default_pool, raising=False)
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(_cupy, "cupy", lambda: module)
    machine.cublas = WrappedCublas(machine)
    machine.library = Library(machine, machine.cublas)
    monkeypatch.setattr(_cupy, "_cublas", lambda: _cupy.Cublas(machine.cublas, lambda: HANDLE))
    monkeypatch.setattr(_cupy, "_cublas_library", lambda: machine.library)
    launcher = strict_array.launcher
    monkeypatch.setattr(launcher, "launch", _recorded_launches(machine, launcher.launch))
    try:
        yield machine
    finally:
        strict_array.capture = None
