"""The geometry that convolution and pooling share: what a window sees, and how far it moves."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from gpulayers.errors import ShapeError, message

__all__ = ["Window", "numbers", "out_size", "pads", "parse_format", "parse_padding", "taps"]


class Window(NamedTuple):
    """A sliding window over the spatial axes: `size`, `strides` and `dilation` for each, and the padding rule."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: str


def numbers(name: str, what: str, value: Any, rank: int) -> tuple[int, ...]:
    """Return one positive integer for each of `rank` axes. Raises ShapeError for anything else."""
    values = (value,) * rank if hasattr(value, "__index__") else tuple(value) if np.iterable(value) else ()
    if len(values) != rank or not all(hasattr(v, "__index__") and int(v) > 0 for v in values):
        raise ShapeError(message(name, f"{what} does not fit", f"one or {rank} positive integers", repr(value)))
    return tuple(int(v) for v in values)


def parse_padding(name: str, padding: str, causal: bool = False) -> str:
    """Return the padding rule in lower case. Raises ValueError for an unknown one."""
    known = ("valid", "same", "causal") if causal else ("valid", "same")
    if not isinstance(padding, str) or padding.lower() not in known:
        raise ValueError(message(name, "unknown padding", " or ".join(map(repr, known)), repr(padding)))
    return padding.lower()


def parse_format(name: str, data_format: str | None) -> bool:
    """Return whether the channels are the last axis: Keras names and TensorFlow's (``"NHWC"``) are understood."""
    if data_format is None:
        return True
    last = {"channels_last": True, "channels_first": False, "NWC": True, "NCW": False, "NHWC": True, "NCHW": False}
    last |= {"NDHWC": True, "NCDHW": False}
    if data_format not in last:
        raise ValueError(message(name, "unknown data_format", "'channels_last' or 'channels_first'", repr(data_format)))
    return last[data_format]


def out_size(size: int | None, kernel: int, stride: int, dilation: int, padding: str) -> int | None:
    """Return how many places the window has along an axis."""
    if size is None:
        return None
    if padding != "valid":
        return -(-size // stride)
    return max(-(-(size - (kernel - 1) * dilation) // stride), 0)


def pads(sizes: tuple[int, ...], window: Window) -> list[tuple[int, int]]:
    """Return the padding before and after each spatial axis; an odd one goes behind, a causal one in front."""
    result = []
    for size, kernel, stride, dilation in zip(sizes, window.size, window.strides, window.dilation, strict=True):
        reach = (kernel - 1) * dilation
        if window.padding == "valid":
            result.append((0, 0))
        elif window.padding == "causal":
            result.append((reach, 0))
        else:
            total = max((-(-size // stride) - 1) * stride + reach + 1 - size, 0)
            result.append((total // 2, total - total // 2))
    return result


def taps(window: Window, places: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Yield, for each position in the window, that position and the padded input's elements seen there."""
    for tap in product(*(range(kernel) for kernel in window.size)):
        yield (
            tap,
            tuple(
                slice(t * d, t * d + (count - 1) * s + 1 if count else t * d, s)
                for t, d, s, count in zip(tap, window.dilation, window.strides, places, strict=True)
            ),
        )
