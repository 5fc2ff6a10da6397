"""The launcher under test: runs kernels on NumPy memory, each several times, and refuses what no GPU forgives."""

from __future__ import annotations

import ctypes
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpulayers.launch import DeviceProperties, Geometry, Specialisation
from gpulayers.launch.launcher import LaunchFunction, carve, round_up
from gpulayers.launch.packing import ArgumentMemory, arrays_by_offset
from tests.kernels.emulation.build import build
from tests.kernels.nvrtc import compile_for

H200_LIKE = DeviceProperties(
    name="emulated H200",
    compute_capability=90,
    multiprocessors=132,
    shared_per_block=227 * 1024,
    shared_per_multiprocessor=228 * 1024,
    registers_per_multiprocessor=65536,
    threads_per_multiprocessor=2048,
    threads_per_block=1024,
    l2_bytes=50 * 2**20,
)
# Few multiprocessors and little memory: plans that need more blocks than it holds are caught here.
SMALL = DeviceProperties("emulated small GPU", 75, 4, 64 * 1024, 64 * 1024, 65536, 1024, 1024, 1 << 20)

FORWARD, REVERSE, SHUFFLED = 0, 1, 2


class EmulationError(Exception):
    """A launch did what a GPU would not forgive: the text says what."""


class _Request(ctypes.Structure):
    """The struct of runtime.h."""

    _fields_ = (
        ("arguments", ctypes.c_void_p),
        ("shared", ctypes.c_size_t),
        ("shared_limit", ctypes.c_size_t),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("cluster", ctypes.c_uint),
        ("resident", ctypes.c_uint),
        ("order", ctypes.c_uint),
        ("seed", ctypes.c_uint),
        ("poison", ctypes.c_uint),
    )


def host_memory(array: Any) -> np.ndarray:
    """Return the NumPy array behind a strict array."""
    return array._memory


def _bytes(memory: np.ndarray) -> np.ndarray:
    return memory.reshape(-1).view(np.uint8)


class EmulatedLauncher:
    """Runs kernels on the CPU.

    Parameters: `device`, what planning code sees; `build`, one of ``"fibers"`` (in this process), ``"address"``
    (Address- and UndefinedBehaviorSanitizer) and ``"threads"`` (ThreadSanitizer), both as programs of their own;
    `registers` per thread, for the number of resident blocks (None: what NVRTC reports for the emulated GPU); `runs`,
    (order, poison byte, blocks alive at a time) of each run. All runs must write the same bits, leave const arrays
    alone and the counters zero.

    `record` holds (specialisation, grid, block, shared) of each launch.
    """

    def __init__(
        self,
        device: DeviceProperties = H200_LIKE,
        build: str = "fibers",
        registers: int | None = 64,
        runs: tuple[tuple[int, int, int], ...] = ((FORWARD, 0xFF, 1), (SHUFFLED, 0x5A, 3), (REVERSE, 0xFF, 2)),
    ) -> None:
        self.device, self.build, self.registers, self.runs = device, build, registers, runs
        self.record: list[tuple[Specialisation, tuple[int, ...], tuple[int, ...], int]] = []
        self._libraries: dict[Specialisation, Any] = {}
        self._counters = np.zeros(0, np.uint32)
        self._scratch = np.zeros(0, np.uint8)
        self._requests = 0

    def properties(self, like: Any) -> DeviceProperties:
        """Return the emulated device."""
        return self.device

    def facts(self, array: Any) -> tuple[int, Any, bool, int]:
        """Return (address, dtype, C-contiguous, device) of a strict array."""
        memory = host_memory(array)
        return memory.ctypes.data, memory.dtype, memory.flags.c_contiguous, 0

    def is_contiguous(self, array: Any) -> bool:
        """Say whether a strict array is C-contiguous."""
        return host_memory(array).flags.c_contiguous

    def current_device(self) -> int:
        """Return the number of the one device there is."""
        return 0

    def queue(self) -> tuple[int, int]:
        """Return the one device and its one stream."""
        return 0, 0

    def pointer(self, array: Any) -> int:
        """Return the address of the memory behind a strict array."""
        return host_memory(array).ctypes.data

    def workspace(self, array_type: type, counters: int, scratch: int) -> tuple[Any, Any]:
        """Return the workspace, its scratch filled with poison."""
        if self._counters.size < counters:
            self._counters = np.zeros(counters, np.uint32)
        if self._scratch.size < scratch:
            raw = np.empty(scratch + 256, np.uint8)
            start = -raw.ctypes.data % 256
            self._scratch = raw[start : start + scratch]
        self._requests += 1
        self._scratch[:] = 0xFF if self._requests % 2 else 0x5A
        wrap: Any = array_type._wrap  # type: ignore[attr-defined]
        return wrap(self._counters), wrap(self._scratch)

    def carved(self, array_type: type, counters: int, pieces: Any) -> tuple[Any, ...]:
        """Return the counters and views of the workspace."""
        size = sum(round_up(count * dtype.itemsize) for dtype, count in pieces)
        zeros, scratch = self.workspace(array_type, counters, size)
        return zeros, *carve(scratch, pieces)

    def forget_stream(self, stream: int) -> None:
        """Do nothing: there is one workspace."""

    def resident_blocks(self, specialisation: Specialisation, threads: int, shared: int) -> int:
        """Return how many blocks one multiprocessor holds: by threads, registers and shared memory."""
        device, warps = self.device, (threads + 31) // 32
        registers, static = self.registers, 0
        if registers is None:
            report = compile_for(specialisation.text, specialisation.name, device.compute_capability)
            registers, static = -(-report.registers // 8) * 8, report.shared  # given out in eights
        by_registers = device.registers_per_multiprocessor // (warps * 32 * registers)
        by_shared = device.shared_per_multiprocessor // (shared + static + 1024)
        return max(0, min(device.threads_per_multiprocessor // (warps * 32), by_registers, by_shared, 32))

    def prepare(self, specialisation: Specialisation, geometry: Geometry) -> LaunchFunction:
        """Return the function that launches."""

        def launch(memory: ArgumentMemory, device: int, values: Mapping[str, Any], reached: Iterable[Any]) -> None:
            packed = bytes(memory.memory)[: specialisation.kernel.packer.size]
            self.launch(specialisation, packed, arrays_by_offset(specialisation, values), geometry, list(reached))

        return launch

    def launch(
        self,
        specialisation: Specialisation,
        packed: bytes,
        arrays: Mapping[int, Any],
        geometry: Geometry,
        reached: Sequence[Any],
    ) -> None:
        """Run the kernel once per entry of `runs` from the same memory, and compare."""
        grid, block, shared, cooperative = geometry
        self.record.append((specialisation, grid, block, shared))
        self._check_limits(specialisation, grid, block, shared, cooperative)
        memory = {offset: host_memory(array) for offset, array in arrays.items()}
        beyond = [host_memory(array) for array in reached]
        constant, written = self._split(specialisation, memory, beyond)
        before = [_bytes(m).copy() for m in written]
        untouched = [_bytes(m).copy() for m in constant]
        first: list[np.ndarray] = []
        for number, (order, poison, resident) in enumerate(self.runs):
            for target, saved in zip(written, before, strict=True):
                _bytes(target)[:] = saved
            alive = grid[0] * grid[1] * grid[2] if cooperative else max(resident, specialisation.cluster)
            request = _Request(
                None,
                shared,
                self.device.shared_per_block,
                grid,
                block,
                specialisation.cluster,
                alive,
                order,
                number,
                poison,
            )
            self._run(specialisation, packed, memory, beyond, request)
            results = [_bytes(m).copy() for m in written]
            first = first or results
            if any(not np.array_equal(a, b) for a, b in zip(first, results, strict=True)):
                raise EmulationError(
                    f"{specialisation}: the result depends on the order of threads or on memory nobody wrote"
                )
        if any(not np.array_equal(_bytes(m), saved) for m, saved in zip(constant, untouched, strict=True)):
            raise EmulationError(f"{specialisation}: an array declared const was written")
        if self._counters.any():
            raise EmulationError(f"{specialisation}: the counters of the workspace are not zero after the launch")

    def _check_limits(
        self,
        specialisation: Specialisation,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        shared: int,
        cooperative: bool,
    ) -> None:
        threads = block[0] * block[1] * block[2]
        if specialisation.minimum_arch > self.device.compute_capability:
            raise EmulationError(f"{specialisation}: needs sm_{specialisation.minimum_arch}")
        if shared > self.device.shared_per_block:
            raise EmulationError(f"{specialisation}: {shared} bytes of shared memory are more than a block can have")
        if cooperative and specialisation.cluster > 1:
            raise EmulationError(f"{specialisation}: clusters and the cooperative flag exclude each other")
        holds = self.resident_blocks(specialisation, threads, shared) * self.device.multiprocessors
        if cooperative and grid[0] * grid[1] * grid[2] > holds:
            raise EmulationError(
                f"{specialisation}: {grid} blocks wait for each other, but only {holds} fit the device"
            )

    @staticmethod
    def _split(
        specialisation: Specialisation, memory: Mapping[int, np.ndarray], beyond: list[np.ndarray]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return (arrays only read, arrays written); one that shares memory with a written one counts as neither."""
        written = [m for offset, m in memory.items() if not specialisation.kernel.field_at(offset).is_const] + beyond
        constant = [m for offset, m in memory.items() if specialisation.kernel.field_at(offset).is_const]
        alone = [m for m in constant if not any(np.may_share_memory(m, other) for other in written)]
        return alone, written

    def _run(
        self,
        specialisation: Specialisation,
        packed: bytes,
        memory: Mapping[int, np.ndarray],
        beyond: list[np.ndarray],
        request: _Request,
    ) -> None:
        if self.build == "fibers":
            self._run_here(specialisation, packed, request)
        else:
            self._run_program(specialisation, packed, memory, beyond, request)

    def _run_here(self, specialisation: Specialisation, packed: bytes, request: _Request) -> None:
        library = self._libraries.get(specialisation)
        if library is None:
            library = self._libraries[specialisation] = ctypes.CDLL(str(build(specialisation, "fibers")))
        words = np.frombuffer(packed.ljust(-(-len(packed) // 8) * 8, b"\0"), np.uint64)
        request.arguments = words.ctypes.data
        error = ctypes.create_string_buffer(1024)
        if library.emulation_launch(ctypes.byref(request), error, ctypes.c_size_t(len(error))):
            raise EmulationError(f"{specialisation}: {error.value.decode()}")

    def _run_program(
        self,
        specialisation: Specialisation,
        packed: bytes,
        memory: Mapping[int, np.ndarray],
        beyond: list[np.ndarray],
        request: _Request,
    ) -> None:
        program = build(specialisation, self.build)
        buffers = _merge([*memory.values(), *beyond])
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "request", Path(folder) / "result"
            source.write_bytes(_recorded(packed, memory, beyond, buffers, request))
            done = subprocess.run(
                [str(program), str(source), str(target)], capture_output=True, text=True, check=False, timeout=300
            )
            if done.returncode:
                raise EmulationError(f"{specialisation}: {done.stderr[:4000]}")
            result = target.read_bytes()
        position = 0
        for start, size in buffers:
            ctypes.memmove(start, result[position : position + size], size)
            position += size


def _merge(arrays: Any) -> list[tuple[int, int]]:
    """Return (address, size) of the separate pieces of memory behind the arrays; overlapping ones become one."""
    pieces: list[tuple[int, int]] = []
    for start, size in sorted((m.ctypes.data, m.nbytes) for m in arrays):
        if pieces and start < sum(pieces[-1]):
            first, length = pieces[-1]
            pieces[-1] = (first, max(length, start + size - first))
        else:
            pieces.append((start, size))
    return pieces


def _recorded(
    packed: bytes,
    memory: Mapping[int, np.ndarray],
    beyond: list[np.ndarray],
    buffers: list[tuple[int, int]],
    request: _Request,
) -> bytes:
    """Return the file that main.cpp reads."""

    def place(address: int, size: int) -> tuple[int, int]:
        """Return (number of the buffer, offset in it)."""
        number = next(
            i for i, (start, length) in enumerate(buffers) if start <= address and address + size <= start + length
        )
        return number, address - buffers[number][0]

    parts = [bytes(request), struct.pack("Q", len(packed)), packed.ljust(-(-len(packed) // 8) * 8, b"\0")]
    parts.append(struct.pack("Q", len(buffers)))
    for start, size in buffers:
        parts += [struct.pack("QQ", start % 16, size), ctypes.string_at(start, size)]
    parts.append(struct.pack("Q", len(memory)))
    for offset, array in memory.items():
        parts.append(struct.pack("QQQ", offset, *place(array.ctypes.data, array.nbytes)))
    # Addresses inside tables of 64-bit words: the copies lie elsewhere.
    sizes = {array.ctypes.data: array.nbytes for array in beyond if array.size}
    words = [
        (place(table.ctypes.data + 8 * int(index), 8), place(int(table[index]), sizes[int(table[index])]))
        for table in (array.reshape(-1) for array in memory.values() if beyond and array.dtype == np.uint64)
        for index in np.flatnonzero(np.isin(table, np.array([*sizes], np.uint64)))
    ]
    parts.append(struct.pack("Q", len(words)))
    parts += [struct.pack("QQQQ", *word, *target) for word, target in words]
    return b"".join(parts)
