"""NumPy arrays for inner loops: aligned to a cache line, and large ones in memory that is used again.

Fresh memory costs a page fault every 4096 bytes, and BLAS kernels for small matrices run at half speed where a matrix
does not begin on a cache line, which NumPy's own arrays only do by chance.

A recurrent layer needs some ten megabytes for each call and frees them soon after. The allocator hands such blocks back
to the system, and touching them anew at the next call can cost as much as the arithmetic. `recycled` keeps the last
blocks and hands one out again when nothing refers to it any more. Nothing else is special: the result is an ordinary
uninitialised array that lives as long as somebody holds it or a view of it.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
from typing import Any

import numpy as np

__all__ = ["KEPT_BYTES", "aligned", "recycled", "release"]

KEPT_BYTES = 256 << 20
"""How much memory is kept for reuse at most, in bytes, over all threads."""

_SMALL = 1 << 16  # below this the allocator's own lists serve better
_LINE = 64  # bytes of a cache line, and of the widest vectors
_KEPT = 256  # blocks at most: looking at thousands costs more than fresh memory
_lock = threading.Lock()
_blocks: list[tuple[np.ndarray, int]] = []  # and where each one's first cache line begins


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)  # another thread of the parent may have held it


def _holders(blocks: list[tuple[np.ndarray, int]], index: int) -> int:
    """Return the number of references to one block, seen from here. Views of an array refer to the array itself."""
    return sys.getrefcount(blocks[index][0])


_UNUSED = _holders([(np.empty(0, np.uint8), 0)], 0)  # what it is for a block that only the list holds, on this Python


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an uninitialised C-contiguous array in memory of its own, beginning on a cache line.

    NumPy's own large arrays begin 16 bytes into one, so that every wide store touches two lines.

    >>> aligned((2, 3), np.float32).ctypes.data % 64
    0
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    return np.ndarray(shape, dtype, *_new(size))


def recycled(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an uninitialised C-contiguous array that begins on a cache line.

    Larger ones lie in memory used before, where some of the right size is free.

    >>> recycled((2, 3), np.float32).shape
    (2, 3)
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < _SMALL:
        return np.ndarray(shape, dtype, *_new(size))
    with _lock:
        return np.ndarray(shape, dtype, *_take(size))


def _new(size: int) -> tuple[np.ndarray, int]:
    """Return a fresh block with room for `size` bytes from a cache line on, and where that line begins."""
    block = np.empty(size + _LINE, np.uint8)  # `block.ctypes.data` would take longer
    return block, -ctypes.addressof(ctypes.c_char.from_buffer(block)) % _LINE  # type: ignore[arg-type]


def _take(size: int) -> tuple[np.ndarray, int]:
    """Return such a block that nobody uses; keep a new one if it fits the limit. Needs the lock."""
    for index in reversed(range(len(_blocks))):  # the last used is the likeliest to be in a cache
        if size + _LINE <= _blocks[index][0].size <= 2 * (size + _LINE) and _holders(_blocks, index) == _UNUSED:
            _blocks.append(_blocks.pop(index))  # the front of the list is what was used longest ago
            return _blocks[-1]
    fresh = _new(size)
    _blocks.append(fresh)
    kept = sum(block.size for block, _ in _blocks)
    while kept > KEPT_BYTES or len(_blocks) > _KEPT:  # dropped blocks live on for those who use them
        kept -= _blocks.pop(0)[0].size
    return fresh


def release() -> None:
    """Forget all kept memory; arrays that are in use stay valid.

    >>> release()
    """
    with _lock:
        _blocks.clear()
