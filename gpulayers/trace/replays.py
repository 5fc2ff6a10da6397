"""What a step that becomes a CUDA graph leaves to the host: a replay repeats device work, and nothing else.

`gl.cuda_graph` follows its function with `Replays`. Code that counts or computes on the host in every call, such as an
optimizer, asks `active_replays` and hands over what has to be done again before each replay.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gpulayers.ops.optimizer_kernels import numbers_buffer, store_numbers
from gpulayers.trace.stored import StoredValue, observe

__all__ = ["Replays", "active_replays", "following"]


class Replays:
    """What one call of a step needs from the host. `capturing`: the device work is only recorded in this call.

    `refusal` says why the step cannot be replayed, and is empty where it can.
    """

    def __init__(self, capturing: bool = False) -> None:
        self.capturing, self.refusal = capturing, ""
        self._claimed: dict[int, StoredValue] = {}
        self._consulted: dict[int, StoredValue] = {}
        self._work: list[Callable[[], None]] = []

    def claim(self, *values: StoredValue) -> None:
        """Say that the host changes these in every call, and that `each_time` gets the work that does it."""
        self._claimed.update({id(value): value for value in values})

    def claims(self, value: StoredValue) -> bool:
        """Say whether the host changes `value` before each replay."""
        return id(value) in self._claimed

    def consults(self, value: StoredValue) -> bool:
        """Say whether `value` was read to compute numbers that a replay takes from the host."""
        return id(value) in self._consulted

    def ask(self, compute: Callable[[], Any]) -> Any:
        """Return ``compute()``, which a replay will call before the graph runs; notes what it reads."""

        def reading(value: StoredValue) -> None:
            self._consulted[id(value)] = value

        with observe(reading, lambda value, previous: None):
            return compute()

    def each_time(self, function: Callable[[], None]) -> None:
        """Call `function` before each replay, after what was handed over earlier."""
        self._work.append(function)

    def numbers(self, like: Any, compute: Callable[[], Sequence[float]]) -> Any:
        """Return a device array, beside `like`, that holds ``compute()`` whenever the graph runs."""
        buffer = numbers_buffer(like)
        self.each_time(lambda: store_numbers(buffer, compute()))
        return buffer

    def refuse(self, reason: str) -> None:
        """Say that calls must stay plain."""
        self.refusal = self.refusal or reason

    def before_replay(self) -> None:
        """Do the host's work for the replay that follows on the current stream."""
        for function in self._work:
            function()


_own = threading.local()


def active_replays() -> Replays | None:
    """Return what follows the step that this thread runs inside `gl.cuda_graph`, or None."""
    return getattr(_own, "replays", None)


@contextlib.contextmanager
def following(replays: Replays) -> Iterator[None]:
    """Let `replays` follow the block."""
    outer = active_replays()
    _own.replays = replays
    try:
        yield
    finally:
        _own.replays = outer
