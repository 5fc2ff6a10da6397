"""The argument struct of a kernel: where its fields stand, which values they take, and the memory it is packed into."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpulayers.launch.source import Field

if TYPE_CHECKING:
    from gpulayers.launch.kernel import Specialisation

__all__ = ["ArgumentMemory", "Slot", "arrays_by_offset", "slots"]

_NUMBERS = (int, float, np.integer, np.floating)
_INTEGERS = (int, np.integer)


class Slot(NamedTuple):
    """A field as packing needs it.

    `first`: the number of its first value among those that are packed. `element`: what an array's dtype must be
    called, or None where any will do; for a scalar its C type.
    """

    name: str
    is_pointer: bool
    numbers: tuple[type, ...]
    length: int
    offset: int
    first: int
    element: str | None


def slots(fields: Sequence[Field], offsets: Sequence[int], elements: Sequence[str | None]) -> tuple[Slot, ...]:
    """Return the slots of a specialisation."""
    found, index = [], 0
    for field, offset, element in zip(fields, offsets, elements, strict=True):
        numbers = _NUMBERS if field.element.startswith("float") else _INTEGERS
        wanted = element if field.is_pointer else field.element
        found.append(Slot(field.name, field.is_pointer, numbers, field.length, offset, index, wanted))
        index += field.length or 1
    return tuple(found)


def arrays_by_offset(specialisation: Specialisation, values: Mapping[str, Any]) -> dict[int, Any]:
    """Return the arrays among a launch's values by their place in the struct, for launchers that look at memory."""
    arrays: dict[int, Any] = {}
    for slot in specialisation.slots:
        value = values.get(slot.name)
        if slot.is_pointer and value is not None:
            items = value if slot.length else [value]
            arrays.update({slot.offset + 8 * i: item for i, item in enumerate(items) if item is not None})
    return arrays


class ArgumentMemory:
    """Memory for one struct that stays where it is, so that its address has to be found only once.

    `fill` packs all values. `parameters` is the address of the array of pointers to arguments that a driver's launch
    takes; the driver copies what they point to before it returns, so the memory can be filled again.
    """

    def __init__(self, packer: struct.Struct) -> None:
        self.memory = (ctypes.c_uint64 * -(-packer.size // 8))()
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.memory))
        self.parameters = ctypes.addressof(self._pointers)
        self.fill = functools.partial(packer.pack_into, self.memory, 0)
