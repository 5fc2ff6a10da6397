"""Where arrays live: the default device, the array module of an array, and moving between host and device.

Work is launched on CuPy's current stream and current device. Nothing moves from device to host by itself: `asnumpy` is
the only way, and a call that fails on a GPU fails; it never continues on NumPy in silence.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from gpulayers import _cupy
from gpulayers.errors import DeviceError, message

__all__ = [
    "Device",
    "array_module",
    "asarray",
    "asnumpy",
    "current_device",
    "device",
    "gpu_available",
    "gpu_unavailable_reason",
    "is_array",
    "module_of",
    "parse_device",
    "placed",
    "register_array_type",
    "set_device",
]

ENVIRONMENT_VARIABLE = "GPULAYERS_DEVICE"


class Device(NamedTuple):
    """A place for arrays: `kind` is ``"cpu"`` or ``"gpu"`` (tests add others), `number` counts GPUs from 0.

    >>> print(Device("gpu", 1))
    gpu:1
    """

    kind: str
    number: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind != "gpu" else f"gpu:{self.number}"


CPU = Device("cpu")
_CURRENT_GPU = Device("gpu", -1)  # whichever is CuPy's current one, at each look

# Array type -> (module with NumPy's functions, kind of device). CuPy's entry is added when CuPy is first imported.
_modules: dict[type, tuple[ModuleType, str]] = {np.ndarray: (np, "cpu")}
_by_kind: dict[str, ModuleType] = {"cpu": np}
_default: Device | None = None
_local = threading.local()


def register_array_type(array_type: type, module: Any, kind: str) -> None:
    """Make `array_type`, whose functions live in `module`, known as the arrays of devices of this `kind`."""
    _modules[array_type] = (module, kind)
    _by_kind[kind] = module


def _lookup(value: Any) -> tuple[ModuleType, str] | None:
    """Return the (module, kind) of an array, or None for anything that is not one."""
    found = _modules.get(type(value))
    if found is None:
        if isinstance(value, np.ndarray | np.generic):
            return _modules[np.ndarray]
        if _cupy.is_device_array(value):
            register_array_type(type(value), _cupy.cupy(), "gpu")
            found = _modules[type(value)]
    return found


def is_array(value: Any) -> bool:
    """Say whether `value` is an array of a known module (NumPy scalars count).

    >>> is_array(np.ones(2)), is_array([1.0])
    (True, False)
    """
    return type(value) is np.ndarray or _lookup(value) is not None


def array_module(*values: Any) -> Any:
    """Return the module with the functions for these arrays: CuPy if any of them is a device array, else NumPy.

    >>> array_module(np.ones(3), 2.0).__name__
    'numpy'
    """
    for value in values:
        if type(value) is not np.ndarray:
            found = _lookup(value)
            if found is not None and found[0] is not np:
                return found[0]
    return np


def kind_of(value: Any) -> str:
    """Return the kind of device an array lives on: ``"cpu"`` or ``"gpu"``."""
    found = _lookup(value)
    if found is None:
        raise DeviceError(message("kind_of", "not an array", "a NumPy or CuPy array", type(value).__name__))
    return found[1]


def gpu_available() -> bool:
    """Say whether a GPU is usable: CuPy is installed and a small allocation on the device succeeds.

    >>> gpu_available() == (gpu_unavailable_reason() == "")
    True
    """
    return not _cupy.unusable_reason()


def gpu_unavailable_reason() -> str:
    """Return why no GPU is used, in a sentence, or an empty string if one is usable."""
    return _cupy.unusable_reason()


def parse_device(name: str | Device) -> Device:
    """Turn ``"cpu"``, ``"gpu"`` or ``"gpu:1"`` into a `Device`; a GPU without a number is CuPy's current one.

    Raises DeviceError for other names, for a number that no GPU has, and for a GPU where none is usable. TensorFlow's
    spellings ``"/cpu:0"``, ``"/gpu:1"`` and ``"/device:GPU:1"`` are understood too.

    >>> parse_device("/cpu:0")
    Device(kind='cpu', number=0)
    """
    return _resolved(_parse(name))


def _parse(name: str | Device) -> Device:
    """Return the device of this name, `_CURRENT_GPU` for a GPU without a number."""
    if isinstance(name, Device):
        if name.kind != "gpu":
            return name
        kind, index = name.kind, str(name.number)
    elif isinstance(name, str):
        kind, _, index = name.lower().removeprefix("/").removeprefix("device:").partition(":")
    else:
        raise DeviceError(message("device", "not a device name", "'cpu', 'gpu' or 'gpu:1'", repr(name)))
    kind = {"cuda": "gpu"}.get(kind, kind)
    known = kind == "gpu" or kind in _by_kind
    if not known or (index and not index.isdigit()):
        raise DeviceError(message("device", "unknown device", "'cpu', 'gpu' or 'gpu:1'", repr(name)))
    if kind != "gpu":
        return Device(kind)
    if not gpu_available():
        raise DeviceError(
            message("device", f"{str(name)!r} was asked for, but no GPU is usable", do=gpu_unavailable_reason())
        )
    register_array_type(_cupy.cupy().ndarray, _cupy.cupy(), "gpu")
    if not index:
        return _CURRENT_GPU
    count = _cupy.cupy().cuda.runtime.getDeviceCount()
    if int(index) >= count:
        raise DeviceError(message("device", "there is no such GPU", f"gpu:0 to gpu:{count - 1}", f"gpu:{index}"))
    return Device(kind, int(index))


def _resolved(where: Device) -> Device:
    """Return the device with its number."""
    return Device("gpu", _cupy.cupy().cuda.runtime.getDevice()) if where is _CURRENT_GPU else where


def current_device() -> Device:
    """Return the device where variables and converted inputs are placed.

    In this order: the innermost `device` context, `set_device`, the environment variable ``GPULAYERS_DEVICE``, a GPU if
    one is usable, the CPU. A GPU that was chosen without a number is CuPy's current one.
    """
    stack = getattr(_local, "stack", None)
    if stack:
        chosen: Device = stack[-1]
        return chosen
    if _default is None:
        wanted = os.environ.get(ENVIRONMENT_VARIABLE)
        return set_device(wanted or ("gpu" if gpu_available() else "cpu"))
    return _resolved(_default)


def set_device(name: str | Device) -> Device:
    """Make `name` the default device of the process, and return it.

    A GPU with a number also becomes CuPy's current device in this thread, to which kernels are launched. In another
    thread do its work inside `device`.

    >>> set_device("cpu")
    Device(kind='cpu', number=0)
    """
    global _default
    _default = _parse(name)
    if _default.kind == "gpu" and _default is not _CURRENT_GPU:
        _cupy.cupy().cuda.Device(_default.number).use()
    return _resolved(_default)


def module_of(where: Device) -> Any:
    """Return the module with the functions for the arrays of a device: NumPy or CuPy.

    >>> module_of(Device("cpu", 0)).__name__
    'numpy'
    """
    return _by_kind[where.kind] if where.kind in _by_kind else _cupy.cupy()


def placed(where: Device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which CuPy makes arrays on `where`; one without effect where that is no GPU."""
    return _cupy.cupy().cuda.Device(where.number) if where.kind == "gpu" else contextlib.nullcontext()


@contextlib.contextmanager
def device(name: str | Device) -> Iterator[Device]:
    """Place what is created inside the block on `name`; for a GPU, also make it CuPy's current device.

    >>> with device("cpu") as where:
    ...     print(where)
    cpu
    """
    chosen = parse_device(name)
    stack = _local.__dict__.setdefault("stack", [])
    stack.append(chosen)
    try:
        with placed(chosen):
            yield chosen
    finally:
        stack.pop()


def _import_foreign(value: Any) -> Any:
    """Return a NumPy or CuPy array for a DLPack or ``__cuda_array_interface__`` producer, or None for anything else."""
    if not isinstance(value, type) and getattr(value, "__dlpack_device__", None) is not None:
        detached = value.detach() if getattr(value, "requires_grad", False) else value
        if detached.__dlpack_device__()[0] in (1, 3):  # DLPack's codes for host memory, the second for pinned one
            return np.from_dlpack(detached)
        return _cupy.cupy().from_dlpack(detached)
    if not isinstance(value, type) and hasattr(value, "__cuda_array_interface__"):
        return _cupy.cupy().asarray(value)
    return None


_PYTHON_DTYPES = {"f": np.float32, "i": np.int32}  # what TensorFlow gives Python numbers


def asarray(value: Any, dtype: Any = None, device: Device | str | None = None) -> Any:
    """Return `value` as an array on `device` (the default device if not given).

    Accepts NumPy and CuPy arrays, anything with DLPack or ``__cuda_array_interface__`` (PyTorch tensors on either
    side), Python numbers and nested lists. Python floats become float32 and Python integers int32, as in TensorFlow;
    arrays keep their dtype unless `dtype` is given. An array that is already right is returned itself, not copied.

    Raises DeviceError for a device array where a host array is wanted: write ``gl.asnumpy(x)``; and for an array on
    another GPU than the one that is asked for.

    >>> asarray([1.0, 2.0]).dtype
    dtype('float32')
    """
    where = current_device() if device is None else parse_device(device)
    found = _lookup(value)
    if found is None:
        foreign = _import_foreign(value)
        if foreign is None:
            value = np.asarray(value)
            dtype = dtype or _PYTHON_DTYPES.get(value.dtype.kind)
        else:
            value = foreign
        found = _lookup(value)
    if found is None or (found[1] == "cpu" and value.dtype == object):
        raise DeviceError(message("asarray", "cannot be made an array", "numbers", type(value).__name__))
    module = module_of(where)
    if found[1] != "cpu" and found[0] is not module:
        raise DeviceError(
            message(
                "asarray",
                f"a {found[1]} array is given where a {where} array is needed",
                do="Nothing moves off a device by itself: write gl.asnumpy(x) to copy it to the host.",
            )
        )
    if where.kind != "gpu":
        return module.asarray(value, dtype=dtype)
    if found[1] == "gpu" and value.data.device_id != where.number:
        here = Device("gpu", value.data.device_id)
        raise DeviceError(
            message(
                "asarray",
                f"an array on {here} is given where one on {where} is needed",
                do=f"Nothing moves by itself: copy it with CuPy, or work inside gl.device('{here}').",
            )
        )
    with placed(where):
        return module.asarray(value, dtype=dtype)


def asnumpy(value: Any) -> np.ndarray:
    """Return a NumPy array with the contents of `value`; device arrays are copied to the host (this waits for the GPU).

    >>> asnumpy([1, 2])
    array([1, 2], dtype=int32)
    """
    if hasattr(value, "numpy") and not is_array(value) and hasattr(value, "value"):
        return np.asarray(value.numpy())
    if not is_array(value):
        foreign = _import_foreign(value)
        value = asarray(value, device=CPU) if foreign is None else foreign
    found = _lookup(value)
    if found is None or found[0] is np:
        return np.asarray(value)
    return np.asarray(found[0].asnumpy(value))
