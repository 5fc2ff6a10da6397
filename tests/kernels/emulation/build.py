"""Compile a specialised kernel with g++ into a shared library or a program, cached by the hash of all that goes in."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from gpulayers.launch import Specialisation
from tests.kernels.cache import cache_folder

FOLDER = Path(__file__).resolve().parent
COMMON = ("-std=c++17", "-g1", "-fno-strict-aliasing", "-ffp-contract=off", "-Wno-unknown-pragmas", "-w")

# build -> (options, is a program)
BUILDS = {
    "fibers": (("-O2", "-march=native", "-fPIC"), False),
    "address": (("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"), True),
    "threads": (("-O1", "-fsanitize=thread", "-DGL_EMULATION_THREADS", "-pthread"), True),
}


class BuildError(Exception):
    """g++ refused a kernel; the text is the compiler's."""


def compiler() -> str | None:
    """Return the path of g++, or None."""
    return shutil.which("g++")


@functools.cache
def _machine() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


def _run(arguments: list[str]) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(done.stderr[:4000])


def _cached(name: str, key: str, make: list[str]) -> Path:
    """Return the file for this key, made with `make` (``{}`` stands for the target) if it is not there."""
    target = cache_folder() / name.format(hashlib.sha256(key.encode()).hexdigest()[:24])
    if not target.exists():
        part = target.with_name(f"{target.stem}.{os.getpid()}{target.suffix}")
        _run([word.replace("{}", str(part)) for word in make])
        part.replace(target)  # at once: other processes may build the same
    return target


def _read(*names: str) -> str:
    return "".join((FOLDER / name).read_text(encoding="utf-8") for name in names)


@functools.cache
def _object(source: str, build: str) -> Path:
    options, _ = BUILDS[build]
    key = "\n".join((_read(source, "runtime.h"), *COMMON, *options, _machine()))
    make = [compiler() or "g++", *COMMON, *options, "-c", str(FOLDER / source), "-o", "{}"]
    return _cached(f"{source.split('.')[0]}-{{}}.o", key, make)


def text_for_host(specialisation: Specialisation) -> str:
    """Return the kernel's text with the emulation header in front and the entry for the runtime behind it."""
    name = specialisation.name
    return (
        '#include "emulation.h"\n'
        f"{specialisation.text}\n"
        f'extern "C" void emulation_entry(const void* p) {{ {name}(*static_cast<const {name}_arguments*>(p)); }}\n'
        f'extern "C" const int emulation_largest_block = {name}_largest_block;\n'
    )


def build(specialisation: Specialisation, kind: str) -> Path:
    """Return the shared library (kind "fibers") or program ("address", "threads") of a kernel."""
    options, is_program = BUILDS[kind]
    text = text_for_host(specialisation)
    pieces = [_object("runtime.cpp", kind)] + ([_object("main.cpp", kind)] if is_program else [])
    key = "\n".join((text, _read("emulation.h"), *COMMON, *options, *map(str, pieces)))
    source = cache_folder() / f"{specialisation.name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cpp"
    if not source.exists():
        source.write_text(text, encoding="utf-8")
    make = [compiler() or "g++", *COMMON, *options, *([] if is_program else ["-shared"]), f"-I{FOLDER}", str(source)]
    suffix = "" if is_program else ".so"
    return _cached(f"{specialisation.name}-{{}}{suffix}", key, [*make, *map(str, pieces), "-o", "{}"])
