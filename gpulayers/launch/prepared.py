"""Prepared launches: what does not change from call to call is settled once, the rest is checked and packed per call.

CuPy checks neither dtype nor contiguity nor the C type of a scalar, so every value is looked at in every call: the
loop is written for speed, the explanations live in functions of their own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gpulayers.device import kind_of
from gpulayers.dtypes import as_dtype
from gpulayers.errors import DeviceError, DTypeError, KernelError, message
from gpulayers.launch.launcher import Geometry, Place
from gpulayers.launch.packing import ArgumentMemory, Slot

if TYPE_CHECKING:
    from gpulayers.launch.kernel import Specialisation

__all__ = ["Prepared", "remember"]


class Prepared:
    """A launch with specialisation, grid, block and the `fixed` values settled; made by `Kernel.prepare`.

    It holds numbers and code, never an array: addresses come with every call. Several threads may call it at a time.
    """

    def __init__(
        self, specialisation: Specialisation, place: Place, geometry: Geometry, fixed: Mapping[str, Any]
    ) -> None:
        launcher = place.launcher
        self._specialisation, self._array_type, self._kind = specialisation, place.array_type, place.kind
        self._facts, self._current_device = launcher.facts, launcher.current_device
        self._changing = [_row(slot) for slot in specialisation.slots if slot.name not in fixed]
        self._template: list[Any] = [0] * sum(slot.length or 1 for slot in specialisation.slots)
        settled = [slot for slot in specialisation.slots if slot.name in fixed]
        for slot in settled:
            value = fixed[slot.name]
            if slot.is_pointer and not (value is None or (slot.length and not len(value))):
                wrong = f"{slot.name!r} is fixed, but addresses change"
                raise KernelError(message(specialisation.name, wrong, "a number or None"))
        self._put(self._template, map(_row, settled), fixed, 0)
        self._free: list[ArgumentMemory] = []
        self._launch = launcher.prepare(specialisation, geometry) if geometry.blocks else None

    def __call__(self, values: Mapping[str, Any], reached: Iterable[Any] = ()) -> None:
        """Check the values, one for each field that is not fixed, and launch on the current stream.

        Values, `reached` and errors are those of `Kernel.launch`.
        """
        if self._launch is None:
            return
        if len(values) != len(self._changing):
            expected = [row[0] for row in self._changing]
            raise KernelError(message(self._specialisation.name, "wrong arguments", expected, list(values)))
        flat, device = self._template.copy(), self._current_device()
        self._put(flat, self._changing, values, device)
        try:
            memory = self._free.pop()  # taken, not shared: another thread or a signal handler may launch meanwhile
        except IndexError:
            memory = ArgumentMemory(self._specialisation.kernel.packer)
        try:
            memory.fill(*flat)
        except (struct.error, OverflowError) as error:
            wrong = f"a scalar does not fit its C type ({error})"
            raise DTypeError(message(self._specialisation.name, wrong, got=values)) from error
        self._launch(memory, device, values, reached)
        self._free.append(memory)

    def _put(self, flat: list[Any], rows: Iterable[tuple[Any, ...]], values: Mapping[str, Any], device: int) -> None:
        """Put checked numbers and addresses at their places; behind too few for a field with a length stand zeros."""
        array_type, facts = self._array_type, self._facts
        for name, numbers, length, index, wanted in rows:
            try:
                value = values[name]
            except KeyError as error:
                raise KernelError(message(self._specialisation.name, f"argument {name!r} is missing")) from error
            for item in self._items(name, length, value) if length else (value,):
                if numbers is not None:
                    if not isinstance(item, numbers):
                        raise self._not_a_number(name, item)
                    flat[index] = item
                elif item is not None:
                    if type(item) is not array_type:
                        self._check_kind(name, item)
                    flat[index], dtype, contiguous, where = facts(item)
                    if dtype is not wanted and wanted is not None and dtype != wanted:
                        raise self._wrong_dtype(name, wanted, dtype)
                    if not contiguous:
                        raise self._not_contiguous(name, item)
                    if where != device:
                        raise _elsewhere(device, where)
                index += 1

    def _items(self, name: str, length: int, value: Any) -> Sequence[Any]:
        items = value if isinstance(value, list) else list(value)
        if len(items) > length:
            wrong = f"{name!r} is too long"
            raise KernelError(message(self._specialisation.name, wrong, f"at most {length}", len(items)))
        return items

    def _check_kind(self, name: str, array: Any) -> None:
        """Refuse arrays of another kind of device; a subclass of an array type passes."""
        kind = kind_of(array)
        if kind != self._kind:
            wrong = f"{name!r} lives elsewhere than the other arrays"
            raise DeviceError(message(self._specialisation.name, wrong, self._kind, kind))

    def _not_a_number(self, name: str, value: Any) -> DTypeError:
        slot = next(slot for slot in self._specialisation.slots if slot.name == name)
        wrong = f"{name!r} is not a host number"
        return DTypeError(message(self._specialisation.name, wrong, slot.element, type(value).__name__))

    def _wrong_dtype(self, name: str, wanted: Any, got: Any) -> DTypeError:
        return DTypeError(message(self._specialisation.name, f"{name!r} has the wrong dtype", wanted.name, got.name))

    def _not_contiguous(self, name: str, array: Any) -> KernelError:
        return KernelError(
            message(
                self._specialisation.name,
                f"{name!r} is not C-contiguous",
                got=f"shape {array.shape}, strides {array.strides}",
                do="Use ascontiguousarray before the launch.",
            )
        )


def remember(known: dict[Any, Any], key: Any, value: Any, most: int = 1024) -> Any:
    """Keep `value`, such as a prepared launch, under `key`, and return it; the oldest of `most` gives way.

    >>> known = {}
    >>> remember(known, (8, 16), "plan"), known
    ('plan', {(8, 16): 'plan'})
    """
    while len(known) >= most:
        known.pop(next(iter(tuple(known)), None), None)  # a copy: another thread may be adding
    known[key] = value
    return value


def _row(slot: Slot) -> tuple[Any, ...]:
    """Return a slot as `_put` wants it: (name, number types or None, length, first place, dtype or None)."""
    if not slot.is_pointer:
        return slot.name, slot.numbers, slot.length, slot.first, None
    return slot.name, None, slot.length, slot.first, None if slot.element is None else as_dtype(slot.element)


def _elsewhere(current: int, found: int) -> DeviceError:
    return DeviceError(
        message(
            "launch",
            "an array lies on another GPU than the current one",
            f"gpu:{current}",
            f"gpu:{found}",
            "Use gl.device(...) around the call, or copy the array.",
        )
    )
