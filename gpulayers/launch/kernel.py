"""Kernels: declared once with their arguments and specialisations, launched with checked values."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import pkgutil
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gpulayers.errors import KernelError, message
from gpulayers.launch import source as _source
from gpulayers.launch.launcher import Geometry, Place, launcher_of, place_of
from gpulayers.launch.packing import slots
from gpulayers.launch.prepared import Prepared

__all__ = ["Kernel", "Specialisation", "alignment_of", "is_aligned", "kernel_list", "vector_width"]

_DEFINE_NAME = re.compile(r"[A-Z][A-Z0-9_]+")
_GRID_LIMITS = (2**31 - 1, 65535, 65535)
_kernels: dict[str, Kernel] = {}


class Specialisation:
    """One kernel with a value for each of its definitions: the unit that is compiled."""

    def __init__(self, kernel: Kernel, defines: Mapping[str, Any]) -> None:
        self.kernel = kernel
        self.defines = dict(defines)
        self.name = kernel.name
        # What an array must have, by field: a dtype name, or None where any will do.
        elements = [
            None if field.element == "void" else str(self.defines.get(field.element, field.element))
            for field in kernel.fields
        ]
        self.slots = slots(kernel.fields, kernel.offsets, elements)

    @functools.cached_property
    def text(self) -> str:
        """The whole text for the compiler."""
        kernel = self.kernel
        return _source.specialised_text(kernel.source, kernel.name, kernel.fields, self.defines, kernel.body)

    @property
    def cluster(self) -> int:
        """Blocks per hardware cluster (the definition CLUSTER), 1 for none."""
        return int(self.defines.get("CLUSTER", 1))

    @property
    def minimum_arch(self) -> int:
        """The oldest compute capability it compiles for."""
        return max(self.kernel.minimum_arch, 90 if self.cluster > 1 else 0)

    def resident_blocks(self, like: Any, threads: int, shared: int = 0) -> int:
        """Return how many blocks one multiprocessor of the device of `like` holds (for grids with a barrier)."""
        return launcher_of(like).resident_blocks(self, threads, shared)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.defines.items())
        return f"{self.name}[{values}]"


class Kernel:
    """An entry point of a ``.cu`` file.

    Parameters
    ----------
    source: file in ``kernels/``, such as ``"batch_norm.cu"``.
    name: entry point; the file writes ``GL_KERNEL(name, largest_block) {...}`` and reads ``arguments.<field>``.
    arguments: fields of the one struct argument, in order: (name, type). A type is a scalar (int32, int64, uint32,
        uint64, float32, float64), ``"const STORAGE*"`` (a pointer to a dtype or to a definition that names one; without
        const the kernel writes it), ``"pointer"`` (any dtype), or one of these with ``[n]`` behind it.
    defines: name in capitals -> allowed values: dtype names (they become typedefs), numbers, booleans (they become
        macros, 1 and 0) or other macro texts. Their product is what `kernel_list` compiles, less those that `where`
        refuses. ``CLUSTER`` above 1 makes clusters of that many blocks.
    where: function of a dictionary of values that says whether the combination exists.
    minimum_arch: oldest compute capability, 75 if not given.
    body: text instead of a file, for generated kernels.
    listed: whether `kernel_list` names it; tests leave their own kernels out.

    Raises KernelError for an argument type that is not known or a definition's name that is not in capitals.
    """

    def __init__(
        self,
        source: str,
        name: str,
        arguments: Sequence[tuple[str, str]],
        defines: Mapping[str, Sequence[Any]] | None = None,
        where: Callable[[dict[str, Any]], bool] | None = None,
        minimum_arch: int = 75,
        body: str | None = None,
        listed: bool = True,
    ) -> None:
        self.source, self.name, self.minimum_arch, self.body = source, name, minimum_arch, body
        self.fields = _source.parse_fields(name, arguments)
        self.defines = {key: tuple(values) for key, values in (defines or {}).items()}
        for key in self.defines:
            if not _DEFINE_NAME.fullmatch(key):
                raise KernelError(message(name, "a definition's name is not in capitals", "such as STORAGE", key))
        self._where = where
        self.packer = _source.struct_format(self.fields)
        self.offsets = tuple(
            struct.calcsize("@" + "".join(f.code for f in self.fields[:i]) + "0" + field.code[-1])
            for i, field in enumerate(self.fields)
        )
        self._pointers = tuple(field.name for field in self.fields if field.is_pointer)
        self._specialisations: dict[tuple[Any, ...], Specialisation] = {}
        if listed:
            _kernels[name] = self

    def __repr__(self) -> str:
        return f"Kernel({self.source!r}, {self.name!r})"

    def field_at(self, offset: int) -> _source.Field:
        """Return the field that holds this offset of the struct."""
        return next(
            f for f, start in zip(reversed(self.fields), reversed(self.offsets), strict=True) if start <= offset
        )

    def specialisations(self) -> Iterator[Specialisation]:
        """Yield every combination of the definitions that exists."""
        for values in itertools.product(*self.defines.values()):
            chosen = dict(zip(self.defines, values, strict=True))
            if self._where is None or self._where(chosen):
                yield self.specialise(chosen)

    def specialise(self, defines: Mapping[str, Any] | None = None) -> Specialisation:
        """Return the specialisation for these values; a dtype stands for its name.

        Raises KernelError for one that was not declared.
        """
        given = defines or {}
        try:
            key = tuple([given[name] for name in self.defines])
        except KeyError as error:
            raise KernelError(
                message(self.name, "a definition has no value", list(self.defines), list(given))
            ) from error
        found = self._specialisations.get(key)
        if found is None:
            values = [value.name if isinstance(value, np.dtype) else value for value in key]
            chosen = dict(zip(self.defines, values, strict=True))
            wrong = [name for name, value in chosen.items() if value not in self.defines[name]]
            if wrong or len(given) != len(chosen) or (self._where is not None and not self._where(chosen)):
                raise KernelError(message(self.name, "no such specialisation", self.defines, dict(given)))
            named = tuple(values)
            found = self._specialisations.get(named) or Specialisation(self, chosen)
            self._specialisations[named] = self._specialisations[key] = found
        return found

    def launch(
        self,
        values: Mapping[str, Any],
        *,
        grid: Sequence[int],
        block: Sequence[int],
        defines: Mapping[str, Any] | None = None,
        shared: int = 0,
        cooperative: bool = False,
        reached: Iterable[Any] = (),
    ) -> None:
        """Check the arguments and launch on the current stream.

        Parameters
        ----------
        values: one entry per field: a C-contiguous array of the declared dtype for a pointer (None for a null pointer),
            a host number for a scalar, a sequence for a field with ``[n]``.
        grid, block: one to three sizes. A grid with a 0 returns at once.
        defines: values of the specialisation.
        shared: bytes of dynamic shared memory per block.
        cooperative: all blocks must be resident at once (kernels that wait for each other).
        reached: arrays that the kernel writes through addresses in a table in device memory. They are not checked: who
            filled the table did that.

        Raises DTypeError for a wrong dtype or scalar, KernelError for what is missing, not contiguous or too large,
        DeviceError for arrays of two kinds or of another GPU.
        """
        place = self._place(values)
        prepared = _prepared(self.specialise(defines), place, tuple(grid), tuple(block), shared, cooperative)
        prepared(values, reached)

    def _place(self, values: Mapping[str, Any]) -> Place:
        """Return the place of the first array among the values."""
        for name in self._pointers:
            value = values.get(name)
            for array in value if isinstance(value, list | tuple) else (value,):
                if array is not None:
                    return place_of(array)
        raise KernelError(message(self.name, "no array among the arguments", do="Pass at least one."))

    def prepare(
        self,
        place: Place,
        fixed: Mapping[str, Any],
        *,
        grid: Sequence[int],
        block: Sequence[int],
        defines: Mapping[str, Any] | None = None,
        shared: int = 0,
        cooperative: bool = False,
    ) -> Prepared:
        """Return a launch for arrays of one `place`, to be called with the fields that `fixed` leaves open.

        `fixed` has numbers, and None for pointers that are always null. What is settled here is not looked at again;
        the values of a call are checked as by `launch`. Keep the result for further calls of the same shape, dtypes and
        mode. Arguments and errors are those of `launch`.
        """
        geometry = self._geometry(grid, block, shared, cooperative)
        return Prepared(self.specialise(defines), place, geometry, fixed)

    def nothing(self, given: Iterable[str]) -> dict[str, Any]:
        """Return null pointers, zeros and empty lists for the fields that are not `given`."""
        names = set(given)
        left = [field for field in self.fields if field.name not in names]
        return {field.name: [] if field.length else None if field.is_pointer else 0 for field in left}

    def _geometry(self, grid: Sequence[int], block: Sequence[int], shared: int, cooperative: bool) -> Geometry:
        grid3, block3 = (tuple(map(int, (*sizes, 1, 1)[:3])) for sizes in (grid, block))
        if 0 not in grid3 and not (0 < math.prod(block3) <= 1024 and min(block3) > 0):
            raise KernelError(message(self.name, "the block cannot be launched", "1 to 1024 threads", block3))
        if min(grid3) < 0 or any(size > most for size, most in zip(grid3, _GRID_LIMITS, strict=True)):
            raise KernelError(message(self.name, "the grid cannot be launched", f"at most {_GRID_LIMITS}", grid3))
        return Geometry(grid3, block3, shared, cooperative)


@functools.lru_cache(maxsize=4096)
def _prepared(
    specialisation: Specialisation,
    place: Place,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    shared: int,
    cooperative: bool,
) -> Prepared:
    """Return a launch with nothing fixed but its geometry, the one made before where there is one."""
    geometry = specialisation.kernel._geometry(grid, block, shared, cooperative)
    return Prepared(specialisation, place, geometry, {})


def alignment_of(*arrays: Any) -> int:
    """Return the largest power of two, at most 16, that the addresses of all arrays are multiples of."""
    bits = 16
    if arrays:
        pointer = launcher_of(arrays[0]).pointer
        for array in arrays:
            bits |= pointer(array)
    return bits & -bits


def is_aligned(*arrays: Any) -> bool:
    """Say whether the arrays start at multiples of 16 bytes, as 16-byte loads need."""
    return alignment_of(*arrays) == 16


def vector_width(arrays: Sequence[Any], *lengths: int) -> int:
    """Return how many elements a thread may move at once: those in 16 bytes, or 1.

    16 bytes need every array at a multiple of 16 and every one of `lengths` (such as the row length) a multiple of the
    width. Arrays of several dtypes get the width of the widest.
    """
    width = 16 // max(array.dtype.itemsize for array in arrays)
    fits = all(length % width == 0 for length in lengths) and is_aligned(*arrays)
    return width if fits else 1


def kernel_list() -> list[Specialisation]:
    """Return every specialisation of every kernel of the package, in a fixed order.

    Kernels are declared in the modules of ``gpulayers.ops`` whose names end in ``kernels``; they are imported here.
    """
    package = importlib.import_module("gpulayers.ops")
    for module in pkgutil.walk_packages(package.__path__, "gpulayers.ops."):
        if module.name.endswith("kernels"):
            importlib.import_module(module.name)
    own = [_kernels[name] for name in sorted(_kernels)]
    return [specialisation for kernel in own for specialisation in kernel.specialisations()]
