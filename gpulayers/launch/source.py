"""Kernel sources: where they lie, how headers are inlined, and the C struct of a kernel's arguments.

One text goes to the compiler: the shared headers, the definitions of one specialisation, the struct of the arguments,
and the kernel file, with our own ``#include "..."`` lines replaced by the files. CuPy's disk cache knows only that
text, so an included file that changes would otherwise be missed.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gpulayers.errors import KernelError, message

__all__ = ["DTYPES", "Field", "argument_struct", "kernel_folder", "parse_fields", "read_source", "specialised_text"]

# Scalar type of an argument -> format code of Python's struct module. The names are common.cuh's.
_SCALAR_CODES = {"int32": "i", "int64": "q", "uint32": "I", "uint64": "Q", "float32": "f", "float64": "d"}
DTYPES = ("float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16", "uint16", *_SCALAR_CODES)

_FIELD = re.compile(r"(const )?([A-Za-z_]\w*)(\*)?(?:\[(\d+)\])?")
_INCLUDE = re.compile(r'^[ \t]*#include[ \t]+"([^"]+)".*$', re.MULTILINE)
_PRAGMA_ONCE = re.compile(r"^#pragma once\b.*\n", re.MULTILINE)


class Field(NamedTuple):
    """One member of the argument struct.

    `element` names the dtype, or the definition that stands for one, or is ``"void"``; `length` is 0 for a single
    value, else the length of the array.
    """

    name: str
    element: str
    is_pointer: bool
    is_const: bool
    length: int

    @property
    def code(self) -> str:
        """Format code of Python's struct module."""
        code = "Q" if self.is_pointer else _SCALAR_CODES[self.element]
        return f"{self.length}{code}" if self.length else code

    @property
    def declaration(self) -> str:
        """The member in C."""
        const = "const " if self.is_const else ""
        return (
            f"{const}{self.element}{'* ' if self.is_pointer else ' '}{self.name}"
            f"{f'[{self.length}]' if self.length else ''};"
        )


def parse_fields(kernel: str, arguments: Sequence[tuple[str, str]]) -> tuple[Field, ...]:
    """Parse ``[("x", "const STORAGE*"), ("rows", "int64"), ("parts", "void*[8]"), ("anything", "pointer")]``."""
    fields = []
    for name, text in arguments:
        match = _FIELD.fullmatch("void*" if text == "pointer" else text)
        if match is None or not (match[3] or match[2] in _SCALAR_CODES):
            expected = f"{', '.join(_SCALAR_CODES)}, 'pointer' or 'const TYPE*', and [n] behind it"
            raise KernelError(message(kernel, f"argument {name!r} has no known type", expected, repr(text)))
        fields.append(Field(name, match[2], bool(match[3]), bool(match[1]), int(match[4] or 0)))
    return tuple(fields)


def struct_format(fields: Sequence[Field]) -> struct.Struct:
    """Return the packer for the fields, laid out (and padded at the end) as C does."""
    codes = "".join(field.code for field in fields)
    widest = "Q" if any(field.code[-1] in "Qqd" for field in fields) else "I"
    return struct.Struct(f"@{codes}0{widest}")


def argument_struct(kernel: str, fields: Sequence[Field]) -> str:
    """Return the C struct of the arguments, with static assertions that its layout is the one Python packs."""
    name = f"{kernel}_arguments"
    lines = [f"struct {name} {{", *(f"    {field.declaration}" for field in fields), "};"]
    for index, field in enumerate(fields):
        offset = struct.calcsize("@" + "".join(f.code for f in fields[:index]) + "0" + field.code[-1])
        lines.append(f'static_assert(GL_LIES_AT({name}, {field.name}, {offset}), "{kernel}: {field.name}");')
    lines.append(f'static_assert(sizeof({name}) == {struct_format(fields).size}, "{kernel}: size of the arguments");')
    return "\n".join(lines) + "\n"


@functools.cache
def kernel_folder() -> Path:
    """Return the folder of the ``.cu`` files: inside an installed package, else beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_kernels", package.parent / "kernels"):
        if (folder / "common.cuh").is_file():
            return folder
    raise KernelError(
        message(
            "kernels",
            "the CUDA sources are missing",
            f"common.cuh in {package / '_kernels'} or {package.parent / 'kernels'}",
            do="Reinstall gpulayers.",
        )
    )


def _inline(name: str, seen: set[str]) -> str:
    if name in seen:
        return ""
    seen.add(name)
    path = kernel_folder() / name
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise KernelError(message("kernels", f"{name} cannot be read", str(path), str(error))) from error
    pieces, position = [f'#line 1 "{name}"\n'], 0
    text = _PRAGMA_ONCE.sub("\n", text)
    for match in _INCLUDE.finditer(text):
        next_line = text.count("\n", 0, match.end()) + 2
        pieces += [text[position : match.start()], _inline(match[1], seen), f'#line {next_line} "{name}"']
        position = match.end()
    return "".join(pieces) + text[position:]


@functools.cache
def read_source(name: str) -> tuple[str, str]:
    """Return (shared headers, kernel file) as text, our includes inlined, each file once."""
    seen: set[str] = set()
    return _inline("common.cuh", seen), _inline(name, seen)


def specialised_text(
    source: str, kernel: str, fields: Sequence[Field], defines: Mapping[str, object], body: str | None = None
) -> str:
    """Return the whole text for the compiler; `body` replaces the kernel file's contents for generated kernels."""
    macros = [f"#define GL_ENTRY_{kernel} 1"]
    types = []
    for name, value in defines.items():
        if value in DTYPES:
            types.append(f"typedef {value} {name};")
        else:
            macros.append(f"#define {name} {int(value) if isinstance(value, bool) else value}")
    headers, text = read_source(source) if body is None else (read_source("common.cuh")[0], body)
    parts = [*macros, headers, f'#line 1 "{kernel} arguments"', *types, argument_struct(kernel, fields), text]
    return "\n".join(parts) + "\n"
