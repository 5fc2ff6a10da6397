"""The report's side of a peer in a Python of its own: it looks like a peer's module, and asks a worker for everything.

A sample is taken by the worker's own clock around the call, up to its finished results; the pipe is outside of it. The
worker inherits the processors that this process may use. On a GPU this process writes through the L2 and drains the
device before it asks: what JAX gets in this process, and the only way to time two processes alike.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import exchange
from benchmarks.shapes import Case

__all__ = ["Remote", "RemoteFunction"]

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600.0  # seconds for one answer: a compiler may have to run first


class _RowFiles:
    """The arrays of the row at hand, written once for all workers."""

    def __init__(self) -> None:
        self._case: Case | None = None
        self._folder: Any = None
        self._dtypes: dict[str, Any] = {}

    def of(self, case: Case, data: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the folder with the row's arrays, and their dtypes."""
        if case != self._case:
            self.clear()
            self._folder = tempfile.TemporaryDirectory(prefix="gpulayers-row-")
            self._dtypes = exchange.save(Path(self._folder.name), data)
            self._case = case
        return self._folder.name, self._dtypes

    def clear(self) -> None:
        """Remove the files."""
        if self._folder is not None:
            self._folder.cleanup()
        self._case = self._folder = None


_row_files = _RowFiles()


class RemoteFunction:
    """A prepared row in a worker: a call returns its results, `seconds` times it there."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def __call__(self) -> dict[str, Any]:
        """Compute the row once and return the results as NumPy arrays."""
        with tempfile.TemporaryDirectory(prefix="gpulayers-results-") as folder:
            return exchange.load(Path(folder), self._remote.ask("results", folder=folder)["dtypes"])

    def seconds(self, repeats: int) -> float:
        """Return the seconds of one call, averaged over `repeats`, by the worker's clock."""
        return float(self._remote.ask("seconds", repeats=repeats)["seconds"])


class Remote:
    """A peer that runs as ``PYTHON -m benchmarks.peers.worker NAME``."""

    OWN_STREAMS = True

    def __init__(self, name: str, python: str) -> None:
        self._name, self._python = name, python
        self._process: subprocess.Popen | None = None
        self._messages: Any = None
        self._hello: dict[str, Any] = {}

    def unavailable(self, on_gpu: bool) -> str:
        """Start the worker; say why it cannot be used, if it cannot."""
        try:
            self._start()
            self._hello = self.ask("hello", on_gpu=on_gpu)
        except (OSError, RuntimeError) as error:
            self.close()
            return f"{self._python}: {error}"
        if self._hello["reason"]:
            self.close()
        return self._hello["reason"]

    def version(self) -> str:
        """Return the peer's version and what it runs in."""
        return "{version} (a process of its own: {environment}, threads {threads})".format(**self._hello)

    def prepare(self, case: Case, data: dict[str, Any], on_gpu: bool) -> RemoteFunction | str:
        """Hand the row to the worker; return its function, or why it has none."""
        folder, dtypes = _row_files.of(case, data)
        reason = self.ask("prepare", case=list(case), folder=folder, dtypes=dtypes, on_gpu=on_gpu)["reason"]
        return reason or RemoteFunction(self)

    @staticmethod
    def to_numpy(value: np.ndarray) -> np.ndarray:
        """Return the value: a worker sends NumPy arrays."""
        return value

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return its answer. Raises RuntimeError if it failed, or if no answer came."""
        process = self._process
        if process is None:
            raise RuntimeError("its process has ended")
        try:
            process.stdin.write(json.dumps({"do": request, **arguments}).encode() + b"\n")
        except BrokenPipeError:
            self._give_up("its process ended")
        if not select.select([process.stdout], [], [], PATIENCE)[0]:
            self._give_up(f"no answer within {PATIENCE:.0f} s")
        line = process.stdout.readline()
        if not line:
            self._give_up("its process ended")
        answer = json.loads(line)
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return answer

    def close(self) -> None:
        """End the worker and remove the row's files; a later request fails."""
        _row_files.clear()
        process, self._process = self._process, None
        if process is None:
            return
        process.stdin.close()  # the worker's loop ends with its input
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._messages.close()

    def _start(self) -> None:
        self._messages = tempfile.TemporaryFile()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [self._python, "-m", "benchmarks.peers.worker", self._name]
        try:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self._messages,
            )  # fmt: skip
        except OSError:
            self._messages.close()
            raise

    def _give_up(self, why: str) -> None:
        process, messages = self._process, self._messages
        process.kill()
        process.wait()
        messages.seek(0)
        said = messages.read().decode(errors="replace").strip().splitlines()
        self.close()
        raise RuntimeError(f"{why}: {said[-1][:200]}" if said else why)
