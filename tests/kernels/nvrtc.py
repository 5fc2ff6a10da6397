"""Compiles kernels for a GPU that is not there, and reads what ptxas says about registers, spills and shared memory."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from gpulayers.launch import Specialisation, kernel_list
from tests.kernels.cache import cache_folder

OPTIONS = ("-std=c++17", "--device-as-default-execution-space", "-ftz=true")  # the launcher's and CuPy's own
ARCHITECTURES = 75, 90, 120  # the oldest, the one that more is written for, the newest
BETWEEN = 80, 86, 89, 100
RELATIVES = 103, 110  # of 100, whose registers and instructions they have


def one_of_each() -> list[Specialisation]:
    """Return of each kernel the specialisation with the largest text."""
    return list({s.name: s for s in sorted(kernel_list(), key=lambda s: len(s.text))}.values())


class Resources(NamedTuple):
    """What one entry point needs: registers per thread, bytes per thread that fell out of them, bytes shared."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


@functools.cache
def unusable_reason() -> str:
    """Return why nothing can be compiled here, or an empty string. Does not touch a driver."""
    try:
        module = importlib.import_module("cupy_backends.cuda.libs.nvrtc")
        module.getVersion()
    except Exception as error:  # CuPy raises several types for a library that is not found
        return f"needs CuPy's NVRTC: {type(error).__name__}: {error}"
    return ""


def supported(architecture: int) -> bool:
    """Say whether this NVRTC knows the architecture."""
    return architecture in _nvrtc().getSupportedArchs()


def _nvrtc() -> Any:
    return importlib.import_module("cupy_backends.cuda.libs.nvrtc")


def compile_for(text: str, name: str, architecture: int) -> Resources:
    """Compile with the options that CuPy adds and return the resources of entry `name`; AssertionError with the log.

    Reports are kept by the hash of the text, the options and the compiler's version, so that only what changed is
    compiled again.
    """
    options = (*OPTIONS, f"-arch=sm_{architecture}", "--ptxas-options=-v")
    key = "\n".join((text, name, *options, str(_nvrtc().getVersion())))
    kept = cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if not kept.exists():
        report = _compile(text, name, options)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(report), encoding="utf-8")
        part.replace(kept)
    return Resources(*json.loads(kept.read_text(encoding="utf-8")))


def _compile(text: str, name: str, options: tuple[str, ...]) -> Resources:
    return parse(_compiled(text, name, options, _nvrtc().getProgramLog), name)


def ptx_for(text: str, name: str, architecture: int) -> str:
    """Return what the compiler makes of the text before ptxas; AssertionError with the log."""
    ptx = _compiled(text, name, (*OPTIONS, f"-arch=sm_{architecture}"), _nvrtc().getPTX)
    return ptx.decode() if isinstance(ptx, bytes) else str(ptx)


def _compiled(text: str, name: str, options: tuple[str, ...], wanted: Callable[[int], Any]) -> Any:
    """Compile and return what `wanted` gets from the program."""
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(text, f"{name}.cu", (), ())
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError:
            raise AssertionError(nvrtc.getProgramLog(program)) from None
        return wanted(program)
    finally:
        nvrtc.destroyProgram(program)


def parse(log: str, name: str) -> Resources:
    """Read ptxas's report on entry `name`."""
    part = log[log.index(f"Compiling entry function '{name}'") :]
    stack, stores, loads = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
    ).groups()
    registers = re.search(r"Used (\d+) registers", part)[1]
    shared = re.search(r"(\d+) bytes smem", part)
    return Resources(int(registers), int(stack), int(stores), int(loads), int(shared[1]) if shared else 0)
