"""What a captured CUDA graph goes on using although nobody else may hold it: caches tell, the graph listens."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Kept", "keep", "keeping"]


class Kept:
    """Values that a capture met in caches, and the questions whether they are still what the caches hold."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.questions: list[Callable[[], bool]] = []

    def is_stale(self) -> bool:
        """Say whether a cache has something else by now."""
        return not all(question() for question in self.questions)


_own = threading.local()


@contextlib.contextmanager
def keeping(kept: Kept) -> Iterator[None]:
    """Collect in `kept` what is used inside the block in this thread."""
    outer = getattr(_own, "kept", None)
    _own.kept = kept
    try:
        yield
    finally:
        _own.kept = outer


def keep(*values: Any, is_current: Callable[[], bool] | None = None) -> None:
    """Tell a capture in progress that device work uses `values`, which live in a cache. Nothing happens outside one.

    `is_current` says later whether a call would still use them; if not, the graph is captured anew.

    >>> kept = Kept()
    >>> with keeping(kept):
    ...     keep("table", is_current=lambda: False)
    >>> kept.values, kept.is_stale()
    (['table'], True)
    """
    kept = getattr(_own, "kept", None)
    if kept is None:
        return
    kept.values.extend(values)
    if is_current is not None:
        kept.questions.append(is_current)
