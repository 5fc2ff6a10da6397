"""Launchers: who compiles and runs a specialised kernel for one kind of array, and what its device can do.

The launcher is a seam. `CupyLauncher` serves CuPy arrays; the tests register one that compiles the same text for the
CPU. Planning code asks `device_properties` and never which launcher it talks to.
"""

from __future__ import annotations

import functools
import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from gpulayers import _cupy
from gpulayers.device import array_module, kind_of
from gpulayers.errors import DeviceError, KernelError, message
from gpulayers.launch.keeping import keep
from gpulayers.launch.packing import ArgumentMemory

if TYPE_CHECKING:
    from gpulayers.launch.kernel import Specialisation

__all__ = [
    "CupyLauncher",
    "DeviceProperties",
    "Geometry",
    "Launcher",
    "device_properties",
    "forget_stream",
    "has_kernels",
    "launcher_of",
    "register_launcher",
    "workspace",
]


_MOST_CARVED = 256  # sets of views kept of one workspace


class DeviceProperties(NamedTuple):
    """What planning code may ask about a device; sizes in bytes."""

    name: str
    compute_capability: int  # 90 for sm_90
    multiprocessors: int
    shared_per_block: int  # with the opt-in that large dynamic shared memory needs
    shared_per_multiprocessor: int
    registers_per_multiprocessor: int
    threads_per_multiprocessor: int
    threads_per_block: int
    l2_bytes: int
    cooperative_launch: bool = True  # whether the blocks of a launch may wait for each other

    @property
    def has_clusters(self) -> bool:
        """Whether blocks can form clusters that read each other's shared memory."""
        return self.compute_capability >= 90


class Geometry(NamedTuple):
    """The shape of a launch; `grid` and `block` have three sizes, `shared` is in bytes of dynamic memory per block."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int = 0
    cooperative: bool = False

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.grid[0] * self.grid[1] * self.grid[2]


# (memory with the packed arguments, current device, the values that were packed, arrays reached through tables)
LaunchFunction = Callable[[ArgumentMemory, int, Mapping[str, Any], Iterable[Any]], None]


class Launcher(Protocol):
    """What the kernels need from a kind of device. `like` is an array of that kind."""

    @property
    def facts(self) -> Callable[[Any], tuple[int, Any, bool, int]]:
        """Return the function of an array that gives (address, dtype, C-contiguous, number of its device)."""

    def current_device(self) -> int:
        """Return the number of the device that launches go to."""

    def queue(self) -> tuple[int, ...]:
        """Return what names the device and the stream that launches go to: what is done there is done in order."""

    def properties(self, like: Any) -> DeviceProperties:
        """Return the properties of the device of `like`."""

    @property
    def is_contiguous(self) -> Callable[[Any], bool]:
        """Return the function of an array that says whether it is C-contiguous."""

    @property
    def pointer(self) -> Callable[[Any], int]:
        """Return the function of an array that gives the address of its first element."""

    def workspace(self, array_type: type, counters: int, scratch: int) -> tuple[Any, Any]:
        """Return the cached (uint32 counters, uint8 scratch) of the device, stream and thread."""

    def carved(self, array_type: type, counters: int, pieces: Pieces) -> tuple[Any, ...]:
        """Return the counters and views of the scratch of `workspace`: what `carve` cuts."""

    def forget_stream(self, stream: int) -> None:
        """Drop what is cached for a stream (its handle as a number), which is going to be destroyed."""

    def resident_blocks(self, specialisation: Specialisation, threads: int, shared: int) -> int:
        """Return how many blocks of this size one multiprocessor holds at a time."""

    def prepare(self, specialisation: Specialisation, geometry: Geometry) -> LaunchFunction:
        """Return the function that runs the kernel on the current stream."""


Pieces = tuple[tuple[Any, int], ...]  # (dtype, number of elements) of each


def carve(scratch: Any, pieces: Pieces) -> list[Any]:
    """Return views of the scratch, one behind the other, each at a multiple of 256 bytes."""
    views, start = [], 0
    for dtype, count in pieces:
        size = count * dtype.itemsize
        views.append(scratch[start : start + size].view(dtype))
        start += round_up(size)
    return views


def round_up(size: int) -> int:
    """Return the least multiple of 256 that is not smaller."""
    return -(-size // 256) * 256


class _Workspace(NamedTuple):
    """Counters and scratch of a device, stream and thread, and the views that were cut from them."""

    counters: Any
    scratch: Any
    stream: Any  # held: a new one may get the address of one that is gone, whose work is still under way
    carved: dict[tuple[int, Pieces], tuple[Any, ...]]


class _Workspaces(dict[tuple[int, ...], _Workspace]):
    """The workspaces of a thread by `Launcher.queue`: a dict that can be referred to weakly."""


class _OfThread(threading.local):
    """What every thread has for itself: workspaces by device and stream, which `all_workspaces` lists by thread."""

    def __init__(self, all_workspaces: weakref.WeakValueDictionary[int, _Workspaces]) -> None:
        self.workspaces = all_workspaces[threading.get_ident()] = _Workspaces()
        self.devices: set[int] = set()  # those that have a context in this thread


class CupyLauncher:
    """Compiles with NVRTC through CuPy and launches on CuPy's current stream.

    CuPy always adds ``-ftz=true``: float32 arithmetic, which 16-bit data uses too, takes and gives 0 for magnitudes
    below 2^-126. float64 keeps its subnormal numbers.
    """

    pointer = operator.attrgetter("data.ptr")

    def __init__(self) -> None:
        self._functions: dict[tuple[int, Specialisation], Any] = {}
        self._static_shared: dict[tuple[int, Specialisation], int] = {}
        self._dynamic_shared: dict[tuple[int, Specialisation], int] = {}  # the most that was asked for
        self._all_workspaces: weakref.WeakValueDictionary[int, _Workspaces] = weakref.WeakValueDictionary()
        self._own = _OfThread(self._all_workspaces)
        self._properties: dict[int, DeviceProperties] = {}
        self._lock = threading.Lock()

    @functools.cached_property
    def _cuda(self) -> Any:
        return _cupy.cupy().cuda

    @functools.cached_property
    def facts(self) -> Callable[[Any], tuple[int, Any, bool, int]]:
        """See `Launcher`."""
        return operator.attrgetter("data.ptr", "dtype", self._contiguity, "data.device_id")

    @functools.cached_property
    def is_contiguous(self) -> Callable[[Any], bool]:
        """See `Launcher`."""
        return operator.attrgetter(self._contiguity)

    @functools.cached_property
    def _contiguity(self) -> str:
        """CuPy makes an object for ``flags`` at every look, so the field behind it is read if there is one."""
        return "_c_contiguous" if hasattr(_cupy.cupy().ndarray, "_c_contiguous") else "flags.c_contiguous"

    def current_device(self) -> int:
        """Return the number of CuPy's current device."""
        number: int = self._cuda.runtime.getDevice()
        return number

    def properties(self, like: Any) -> DeviceProperties:
        """Return the properties of the current device."""
        device = self.current_device()
        if device not in self._properties:
            found = _cupy.cupy().cuda.runtime.getDeviceProperties(device)
            name = found["name"]
            self._properties[device] = DeviceProperties(
                name=name.decode() if isinstance(name, bytes) else str(name),
                compute_capability=10 * found["major"] + found["minor"],
                multiprocessors=found["multiProcessorCount"],
                shared_per_block=found["sharedMemPerBlockOptin"],
                shared_per_multiprocessor=found["sharedMemPerMultiprocessor"],
                registers_per_multiprocessor=found["regsPerMultiprocessor"],
                threads_per_multiprocessor=found["maxThreadsPerMultiProcessor"],
                threads_per_block=found["maxThreadsPerBlock"],
                l2_bytes=found["l2CacheSize"],
                cooperative_launch=bool(found.get("cooperativeLaunch", 0)),
            )
        return self._properties[device]

    def workspace(self, array_type: type, counters: int, scratch: int) -> tuple[Any, Any]:
        """Return the workspace of the current device, stream and thread, grown if it is too small.

        An operation of two launches keeps its tables there in between, where another thread may launch on the same
        stream; and the per-thread default stream has one number in all threads.
        Growing inside a captured CUDA graph would record the clearing of the counters: call once before capturing.
        """
        key = self.queue()
        found = self._own.workspaces.get(key)
        if found is None or found.counters.size < counters or found.scratch.size < scratch:
            cupy, old = _cupy.cupy(), (0, 0) if found is None else (found.counters.size, found.scratch.size)
            found = self._own.workspaces[key] = _Workspace(
                cupy.zeros(max(counters, old[0], 4096), dtype=np.uint32),
                cupy.empty(max(scratch, old[1], 1 << 20), dtype=np.uint8),
                self._cuda.get_current_stream(),
                {},  # views of memory that is given up go with it
            )
        return found.counters, found.scratch

    def carved(self, array_type: type, counters: int, pieces: Pieces) -> tuple[Any, ...]:
        """Return the counters and views of the workspace, those of an earlier call where there was one like it."""
        known = self._own.workspaces.get(self.queue())
        views = None if known is None else known.carved.get((counters, pieces))
        if views is None:
            size = sum(round_up(count * dtype.itemsize) for dtype, count in pieces)
            zeros, scratch = self.workspace(array_type, counters, size)
            carved = self._own.workspaces[self.queue()].carved
            if len(carved) >= _MOST_CARVED:
                carved.clear()
            views = carved[counters, pieces] = (zeros, *carve(scratch, pieces))
        return views

    def forget_stream(self, stream: int) -> None:
        """Drop the stream's workspaces, those of other threads too."""
        for workspaces in list(self._all_workspaces.values()):
            for key in [key for key in list(workspaces) if key[1] == stream]:
                workspaces.pop(key, None)

    def queue(self) -> tuple[int, ...]:
        """Return CuPy's current device and stream, and the thread: the per-thread default stream has one number."""
        return self.current_device(), self._cuda.get_current_stream().ptr, threading.get_ident()

    def _compile(self, device: int, specialisation: Specialisation) -> Any:
        with self._lock:
            function = self._functions.get((device, specialisation))
            if function is None:
                cupy = _cupy.cupy()
                raw = cupy.RawKernel(specialisation.text, specialisation.name, options=("-std=c++17",))
                try:
                    function = raw.kernel
                except Exception as error:  # NVRTC, missing headers and driver errors have no common type
                    raise KernelError(self._compile_message(specialisation, error)) from error
                self._static_shared[device, specialisation] = int(raw.shared_size_bytes)
                self._functions[device, specialisation] = function  # last: whoever finds it needs the size too
        return function

    def _compile_message(self, specialisation: Specialisation, error: Exception) -> str:
        found = self.properties(None)
        return message(
            str(specialisation),
            f"the kernel cannot be compiled for {found.name} (sm_{found.compute_capability}): "
            f"{type(error).__name__}: {str(error).strip()[:2000]}",
            do="Install gpulayers[cuda12] or gpulayers[cuda13], whichever matches the driver: "
            "they bring NVRTC and the CUDA headers.",
        )

    def _function(self, specialisation: Specialisation, shared: int) -> Any:
        device = self.current_device()
        if device not in self._own.devices:
            self._make_context(device)
        key = (device, specialisation)
        function = self._functions.get(key)
        if function is None:
            function = self._compile(device, specialisation)
        if shared > self._dynamic_shared.get(key, 0):
            with self._lock:  # the limit is the function's: a thread that asks for less must not come last
                self._allow_shared(function.ptr, key, shared)
        return function

    def _allow_shared(self, function: int, key: tuple[int, Specialisation], shared: int) -> None:
        """Let the function have so much dynamic memory, and its multiprocessors as much of it as they can.

        What asks for dynamic memory keeps its input there, for as many blocks as fit beside each other.
        """
        before, driver = self._dynamic_shared.get(key, 0), _cupy.cupy().cuda.driver
        if before == 0:
            driver.funcSetAttribute(function, driver.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)
        if shared > max(before, 48 * 1024 - self._static_shared[key]):
            driver.funcSetAttribute(function, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        self._dynamic_shared[key] = max(before, shared)

    def resident_blocks(self, specialisation: Specialisation, threads: int, shared: int) -> int:
        """Return the driver's answer for the current device."""
        function = self._function(specialisation, shared)
        occupancy = _cupy.cupy().cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor
        return int(occupancy(function.ptr, threads, shared))

    def prepare(self, specialisation: Specialisation, geometry: Geometry) -> LaunchFunction:
        """Return the function that launches on CuPy's current stream; it compiles at its first call on a device.

        The driver is called without CuPy's function object around it: that one boxes the argument anew in every launch,
        and asks for the occupancy and shrinks the grid of a cooperative one. While a graph is captured, a cooperative
        launch becomes a node with that attribute.
        """
        sizes = (*geometry.grid, *geometry.block, geometry.shared)
        cooperative, own, handles = geometry.cooperative, self._own, dict[int, int]()
        cuda = self._cuda

        def launch(memory: ArgumentMemory, device: int, values: Mapping[str, Any], reached: Iterable[Any]) -> None:
            if device not in own.devices:
                self._make_context(device)
            handle = handles.get(device)
            if handle is None:
                handle = handles[device] = self._function(specialisation, geometry.shared).ptr
            stream = cuda.get_current_stream().ptr
            if cooperative:
                cuda.driver.launchCooperativeKernel(handle, *sizes, stream, memory.parameters)
            else:
                cuda.driver.launchKernel(handle, *sizes, stream, memory.parameters, 0)

        return launch

    def _make_context(self, device: int) -> None:
        """Give the thread a context: the driver, unlike the runtime, makes none by itself."""
        self._cuda.runtime.memGetInfo()
        self._own.devices.add(device)


class Place(NamedTuple):
    """Where arrays of one type live and who launches for them."""

    array_type: type
    kind: str
    launcher: Launcher


_launchers: dict[str, Launcher] = {"gpu": CupyLauncher()}
_places: dict[type, Place] = {}  # as array types are met


def register_launcher(kind: str, launcher: Launcher) -> None:
    """Make `launcher` serve the arrays of this kind of device (see `gpulayers.device.register_array_type`)."""
    _launchers[kind] = launcher
    _places.clear()


def has_kernels(array: Any) -> bool:
    """Say whether kernels run on arrays of this kind: True for CuPy arrays, False for NumPy's.

    >>> has_kernels(np.ones(3))
    False
    """
    return type(array) is not np.ndarray and (type(array) in _places or kind_of(array) in _launchers)


def place_of(array: Any) -> Place:
    """Return the place of an array. Raises DeviceError for one that no kernel can use."""
    found = _places.get(type(array))
    if found is None:
        kind = kind_of(array)
        if kind not in _launchers:
            raise DeviceError(
                message("launch", "kernels cannot use this array", f"an array on {' or '.join(_launchers)}", kind)
            )
        found = _places[type(array)] = Place(type(array), kind, _launchers[kind])
    return found


def launcher_of(array: Any) -> Launcher:
    """Return the launcher for an array. Raises DeviceError for one that no kernel can use."""
    return place_of(array).launcher


def contiguous(*arrays: Any) -> list[Any]:
    """Return the device arrays, those that are not C-contiguous as copies."""
    is_contiguous = launcher_of(arrays[0]).is_contiguous
    if all(map(is_contiguous, arrays)):
        return list(arrays)
    copy = array_module(arrays[0]).ascontiguousarray
    return [array if is_contiguous(array) else copy(array) for array in arrays]


def device_properties(like: Any) -> DeviceProperties:
    """Return what the device of an array can do."""
    return launcher_of(like).properties(like)


def workspace(like: Any, counters: int = 0, scratch: int = 0) -> tuple[Any, Any]:
    """Return (counters, scratch): arrays cached per device, stream and thread, at least this long.

    `counters` is uint32, zero at first; every launch must leave it zero, so a `grid_barrier` needs a word of its own.
    `scratch` is uint8 with any contents, 256-byte aligned, valid until the thread's next call that uses the
    stream.
    """
    found = launcher_of(like).workspace(type(like), counters, scratch)
    keep(*found)
    return found


def forget_stream(stream: int) -> None:
    """Drop what launchers keep for a stream that is going to be destroyed: another may get its number."""
    for launcher in _launchers.values():
        launcher.forget_stream(stream)


def workspace_pieces(place: Place, counters: int, pieces: Pieces) -> tuple[Any, ...]:
    """Return the counters and, one behind the other in the scratch of `workspace`, an array for each of `pieces`."""
    found = place.launcher.carved(place.array_type, counters, pieces)
    keep(*found)
    return found
