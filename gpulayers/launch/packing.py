"""The bytes of a kernel's argument struct, from checked values.

CuPy checks neither dtype nor contiguity nor the C type of a scalar, so all of it is done here, on every launch: the
loop is written for speed, the explanations live in functions of their own.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpulayers.device import kind_of
from gpulayers.errors import DeviceError, DTypeError, KernelError, message
from gpulayers.launch.launcher import launcher_of
from gpulayers.launch.source import Field

if TYPE_CHECKING:
    from gpulayers.launch.kernel import Specialisation

__all__ = ["Slot", "pack"]

_NUMBERS = (int, float, np.integer, np.floating)
_INTEGERS = (int, np.integer)
_dtype_names: dict[np.dtype, str] = {}  # numpy.dtype.name is computed anew at every look


class Slot(NamedTuple):
    """A field as packing needs it: `element` is what an array's dtype must be called, or None."""

    name: str
    is_pointer: bool
    numbers: tuple[type, ...]
    length: int
    offset: int
    element: str | None


def slots(fields: Sequence[Field], offsets: Sequence[int], elements: Sequence[str | None]) -> tuple[Slot, ...]:
    """Return the slots of a specialisation."""
    return tuple(
        Slot(
            field.name,
            field.is_pointer,
            _NUMBERS if field.element.startswith("float") else _INTEGERS,
            field.length,
            offset,
            element if field.is_pointer else field.element,
        )
        for field, offset, element in zip(fields, offsets, elements, strict=True)
    )


def pack(specialisation: Specialisation, values: Mapping[str, Any]) -> tuple[Any, bytes, dict[int, Any]]:
    """Return (launcher, the struct's bytes, arrays by their offset in it).

    Raises DTypeError, KernelError and DeviceError as `Kernel.launch` says.
    """
    kernel = specialisation.kernel
    if len(values) != len(kernel.fields):
        raise KernelError(message(kernel.name, "wrong arguments", [f.name for f in kernel.fields], list(values)))
    flat: list[Any] = []
    arrays: dict[int, Any] = {}
    launcher: Any = None
    array_type: type | None = None
    for slot in specialisation.slots:
        name, is_pointer, numbers, length, offset, element = slot
        try:
            value = values[name]
        except KeyError as error:
            raise KernelError(message(kernel.name, f"argument {name!r} is missing")) from error
        items = _items(kernel.name, slot, value) if length else (value,)
        for item in items:
            if not is_pointer:
                if not isinstance(item, numbers):
                    raise _not_a_number(kernel.name, slot, item)
                flat.append(item)
                continue
            if item is None:
                flat.append(0)
            else:
                if type(item) is not array_type:
                    launcher = _only_launcher(kernel.name, name, item, launcher, arrays)
                    array_type = type(item)
                dtype = item.dtype
                if element is not None and (_dtype_names.get(dtype) or _name(dtype)) != element:
                    raise DTypeError(message(kernel.name, f"{name!r} has the wrong dtype", element, dtype.name))
                if not item.flags.c_contiguous:
                    raise _not_contiguous(kernel.name, name, item)
                arrays[offset] = item
                flat.append(launcher.pointer(item))
            offset += 8
        if length:  # null pointers or zeros behind the last one given
            flat += [0] * (length - len(items))
    if launcher is None:
        raise KernelError(message(kernel.name, "no array among the arguments", do="Pass at least one."))
    try:
        return launcher, kernel.packer.pack(*flat), arrays
    except (struct.error, OverflowError) as error:
        raise DTypeError(message(kernel.name, f"a scalar does not fit its C type ({error})", got=values)) from error


def _name(dtype: np.dtype) -> str:
    return _dtype_names.setdefault(dtype, dtype.name)


def _items(kernel: str, slot: Slot, value: Any) -> Sequence[Any]:
    """Return the values of a field with a length; it may have fewer."""
    items = value if isinstance(value, list) else list(value)
    if len(items) > slot.length:
        raise KernelError(message(kernel, f"{slot.name!r} is too long", f"at most {slot.length}", len(items)))
    return items


def _only_launcher(kernel: str, name: str, array: Any, known: Any, arrays: Mapping[int, Any]) -> Any:
    """Return the launcher of `array`, which must be that of the arrays before it."""
    if known is None:
        return launcher_of(array)
    kind, before = kind_of(array), kind_of(next(iter(arrays.values())))
    if kind != before:
        raise DeviceError(message(kernel, f"{name!r} lives elsewhere than the other arrays", before, kind))
    return known


def _not_a_number(kernel: str, slot: Slot, value: Any) -> DTypeError:
    return DTypeError(message(kernel, f"{slot.name!r} is not a host number", slot.element, type(value).__name__))


def _not_contiguous(kernel: str, name: str, array: Any) -> KernelError:
    return KernelError(
        message(
            kernel,
            f"{name!r} is not C-contiguous",
            got=f"shape {array.shape}, strides {array.strides}",
            do="Use ascontiguousarray before the launch.",
        )
    )
