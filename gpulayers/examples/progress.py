"""A progress bar where tqdm is installed, a line now and then where it is not."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

__all__ = ["Progress"]


class Progress:
    """Show how far `total` steps are, with a short text; use as a context and call `step`."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what, self.done = total, what, 0
        self._shown = 0.0
        self._bar: Any = None
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(total=total, desc=what, unit="step", file=sys.stdout, dynamic_ncols=True, mininterval=0.2)

    def step(self, text: str = "") -> None:
        """Count one step and show `text`."""
        self.done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(1)
        elif self.done == self.total or time.monotonic() - self._shown > 2:
            self._shown = time.monotonic()
            print(f"{self.what}: {self.done}/{self.total} {text}", flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
