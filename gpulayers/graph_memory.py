"""The memory of a step that becomes a CUDA graph: a pool of its own, which is emptied when the step is given up."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

from gpulayers import _cupy
from gpulayers.errors import message

__all__ = ["GraphMemory"]

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


class GraphMemory:
    """Memory of the current device for one step.

    Blocks freed during a capture must never be handed to anybody else: kernels of the graph use them. So the memory is
    private, and it has to be released: a pool that dies gives nothing back, because its free blocks and the list that
    they are in keep each other alive (CuPy 14.2, ``cupy/cuda/memory.pyx``).
    """

    def __init__(self) -> None:
        cuda = _cupy.cupy().cuda
        _empty_released()
        self._device: int = cuda.runtime.getDevice()
        self._source = _Source()
        self._pool = cuda.MemoryPool(self._source.allocate)
        self.allocator = self._pool.malloc

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Say that kernels of a graph use the blocks that are freed in the block of code: none may leave the pool."""
        self._source.capturing = True
        try:
            yield
        finally:
            self._source.capturing = False

    @property
    def given_back(self) -> int:
        """The number of bytes that the pool has given back to the device by now."""
        with _cupy.cupy().cuda.Device(self._device):
            returned: int = self._source.allocated - self._pool.total_bytes()
        return returned

    def release(self) -> None:
        """Give the free blocks back to the device, and later those that somebody still uses.

        cudaFree waits for the device, so work under way may go on to use them.
        """
        _released.append(self)
        _empty_released()

    def empty(self) -> bool:
        """Give the free blocks back, and say whether those were all."""
        with _cupy.cupy().cuda.Device(self._device):
            self._pool.free_all_blocks()
            return not self._pool.total_bytes()


class _Source:
    """Where a pool gets its blocks: from the device, which CuPy's default pool may have to leave some room first."""

    def __init__(self) -> None:
        self.capturing, self.allocated = False, 0

    def allocate(self, size: int) -> Any:
        """Return new memory. Raises MemoryError in a capture, CuPy's error otherwise, where there is none."""
        cupy = _cupy.cupy()
        try:
            memory = cupy.cuda.Memory(size)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            if error.status != _OUT_OF_MEMORY:
                raise
            if self.capturing:  # CuPy's error would make the pool give back its free blocks, and try again
                raise MemoryError(
                    message("cuda_graph", "no device memory is left for the capture", got=f"a need of {size} bytes")
                ) from error
            cupy.get_default_memory_pool().free_all_blocks()
            memory = cupy.cuda.Memory(size)
        self.allocated += size
        return cupy.cuda.MemoryPointer(memory, 0)


_released: collections.deque[GraphMemory] = collections.deque()
"""Pools that were not empty when they were released: results, or variables made in a step, may outlive it."""


def _empty_released() -> None:
    """Look at each released pool once more. The collector may call this in the middle of itself, and other threads."""
    for _ in range(len(_released)):
        with contextlib.suppress(IndexError):  # somebody else has it
            memory = _released.popleft()
            if not memory.empty():
                _released.append(memory)
