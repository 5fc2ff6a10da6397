"""A peer in a Python of its own, where it need not live with the versions that gpulayers and the other peers want.

``python -m benchmarks.peers.worker NAME`` is started by `benchmarks.peers.remote` and answers requests, one JSON object
a line, on standard input and output. It times with the same function as the report, to the end of the results, and
only when it is asked: while another variant's turn lasts, this process waits. gpulayers is not imported here.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import exchange
from benchmarks.shapes import Case
from benchmarks.timing_cpu import thread_count, time_once

__all__ = ["Worker", "main", "serve"]


class Worker:
    """The requests that are answered, by method name; every answer is an object of JSON."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._module: Any = None
        self._function: Callable[[], Any] | None = None

    def hello(self, on_gpu: bool) -> dict[str, Any]:
        """Import the peer; say what it is and what it may use."""
        self._module = importlib.import_module(f"benchmarks.peers.{self._name}_peer")
        reason = self._module.unavailable(on_gpu)
        if on_gpu and not reason and not hasattr(self._module, "finish"):
            reason = "nothing here waits for its results: on a GPU it is measured in the report's own process"
        return {
            "reason": reason,
            "version": self._module.version(),
            "environment": f"Python {platform.python_version()}, NumPy {np.__version__}",
            "threads": thread_count(),
        }

    def prepare(self, case: list[Any], folder: str, dtypes: dict[str, Any], on_gpu: bool) -> dict[str, Any]:
        """Prepare a row from the arrays in `folder`; an empty reason means that it can be measured."""
        self._function = None  # lets go of the last row's arrays before this one's are there
        op, mode, layout, shape, *rest = case
        found = self._module.prepare(
            Case(op, mode, layout, tuple(shape), *rest), exchange.load(Path(folder), dtypes), on_gpu
        )
        if isinstance(found, str):
            return {"reason": found}
        self._function = found
        return {"reason": ""}

    def results(self, folder: str) -> dict[str, Any]:
        """Call the function once and write what it returns into `folder`."""

        def convert(value: Any) -> Any:
            return [convert(part) for part in value] if isinstance(value, list) else np.asarray(to_numpy(value))

        to_numpy = self._module.to_numpy
        found = {name: convert(value) for name, value in self._function().items()}
        return {"dtypes": exchange.save(Path(folder), found)}

    def seconds(self, repeats: int) -> dict[str, Any]:
        """Return the seconds of one call, averaged over `repeats` calls in a row."""
        return {"seconds": time_once(self._function, repeats, getattr(self._module, "finish", None))}


def serve(worker: Worker, requests: Any, answers: Any) -> None:
    """Answer every line of `requests`; what a request raises is its answer."""
    for line in requests:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except ImportError as error:
            answer = {"failed": f"not installed ({error})"}
        except Exception as error:  # the peer's business: a skipped entry of the report with this reason
            answer = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Serve the peer that the first argument names until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints would stand between the answers
    serve(Worker(sys.argv[1]), sys.stdin, answers)


if __name__ == "__main__":
    main()
