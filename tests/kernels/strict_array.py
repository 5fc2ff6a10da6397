"""A strict double of CuPy's ndarray on NumPy memory, and the device kind "emulated" that runs the kernel bodies on it.

It refuses what CuPy refuses: implicit conversion to NumPy, mixing with host arrays, turning a 0-d result into a host
number behind one's back. Its module `xp` has the functions that CuPy has; what CuPy lacks is missing here. Fresh memory
holds poison, not zeros.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import numpy as np

from gpulayers.device import register_array_type
from gpulayers.launch import register_launcher
from tests.kernels.cupy_names import NAMES
from tests.kernels.emulation import EmulatedLauncher

capture: Any = None
"""Who records device work instead of doing it (`fake_cuda.Machine`), while a CUDA graph is being captured."""


def _to_host() -> None:
    if capture is not None:
        raise RuntimeError("the current stream is capturing, so D2H transfers are disallowed")


def _to_device() -> None:
    if capture is not None:
        raise RuntimeError("the current stream is capturing, so H2D transfers are disallowed")


def _work(function: Any, inputs: Any, written: Any = ()) -> Any:
    """Do device work that reads `inputs` and writes the arrays `written` or returns new ones; None for a result."""
    return _wrap(function()) if capture is None else capture.record(lambda: _wrap(function()), inputs, written)


class StrictArray:
    """An array that behaves like `cupy.ndarray` but lives in NumPy memory."""

    __array_priority__ = 100
    __slots__ = ("__weakref__", "_memory")

    def __init__(self, shape: Any, dtype: Any = float) -> None:
        self._memory = _poisoned(np.empty(shape, dtype))

    @classmethod
    def _wrap(cls, memory: np.ndarray) -> StrictArray:
        self = cls.__new__(cls)
        self._memory = memory if isinstance(memory, np.ndarray) else np.asarray(memory)
        return self

    # what CuPy refuses
    def __array__(self, *unused: Any, **also_unused: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **keywords: Any) -> Any:
        if method != "__call__":
            return NotImplemented
        return _call(getattr(np, ufunc.__name__), *inputs, **keywords)

    def __array_function__(self, function: Any, kinds: Any, arguments: Any, keywords: Any) -> Any:
        own = getattr(xp, function.__name__, None)
        return NotImplemented if own is None else own(*arguments, **keywords)

    # what it is
    shape = property(lambda self: self._memory.shape)
    dtype = property(lambda self: self._memory.dtype)
    ndim = property(lambda self: self._memory.ndim)
    size = property(lambda self: self._memory.size)
    nbytes = property(lambda self: self._memory.nbytes)
    itemsize = property(lambda self: self._memory.itemsize)
    strides = property(lambda self: self._memory.strides)
    flags = property(lambda self: self._memory.flags)
    device = property(lambda self: "emulated")
    T = property(lambda self: StrictArray._wrap(self._memory.T))
    real = property(lambda self: StrictArray._wrap(self._memory.real))
    imag = property(lambda self: StrictArray._wrap(self._memory.imag))

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self._memory.ctypes.data, device_id=0)

    @property
    def base(self) -> Any:
        return None if self._memory.base is None else StrictArray._wrap(self._memory.base)

    def get(self) -> np.ndarray:
        _to_host()
        return self._memory.copy()

    def set(self, host: np.ndarray) -> None:
        _to_device()
        if not isinstance(host, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if host.dtype != self.dtype:
            raise TypeError(f"{host.dtype} array cannot be set to {self.dtype} array")
        if host.shape != self.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {host.shape}")
        np.copyto(self._memory, host)

    def item(self, *index: Any) -> Any:
        _to_host()
        return self._memory.item(*index)

    def tolist(self) -> Any:
        _to_host()
        return self._memory.tolist()

    def __len__(self) -> int:
        return len(self._memory)

    def __iter__(self) -> Any:
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        _to_host()
        return bool(self._memory)

    def __int__(self) -> int:
        _to_host()
        return int(self._memory)

    def __float__(self) -> float:
        _to_host()
        return float(self._memory)

    def __index__(self) -> int:
        _to_host()
        return self._memory.__index__()

    def __repr__(self) -> str:
        return f"Strict{self._memory!r}"

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> StrictArray:
        plain = _unwrap_index(index)
        if isinstance(plain, np.ndarray) and plain.dtype == bool:
            _to_host()  # the size of the result
        return _work(lambda: self._memory[plain], [self._memory])

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, np.ndarray):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        plain, source = _unwrap_index(index), _unwrap(value)
        _work(lambda: self._memory.__setitem__(plain, source), [], [self._memory])


def _poisoned(memory: np.ndarray) -> np.ndarray:
    """Fill with bytes that are NaN as any float, and return the array."""
    if memory.size:
        memory.reshape(-1).view(np.uint8)[:] = 0xFF if memory.dtype.kind != "b" else 1
    return memory


def _unwrap(value: Any) -> Any:
    """Return the NumPy memory behind strict arrays, also inside lists and tuples; refuse host arrays."""
    if isinstance(value, StrictArray):
        return value._memory
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, list | tuple):
        return type(value)(_unwrap(v) for v in value)
    return value


def _unwrap_index(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_unwrap_index(i) for i in index)
    return index._memory if isinstance(index, StrictArray) else index


def _wrap(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return StrictArray._wrap(np.asarray(value))
    if isinstance(value, tuple | list):
        return type(value)(_wrap(v) for v in value)
    return value


_CUBLAS = frozenset({"matmul", "__matmul__", "dot", "tensordot", "einsum", "inner", "vdot"})
_SIZE_FROM_DEVICE = frozenset({"nonzero", "flatnonzero", "argwhere", "unique", "compress", "extract"})


def _call(function: Any, *arguments: Any, **keywords: Any) -> Any:
    out = keywords.get("out")
    plain, named = [_unwrap(a) for a in arguments], {k: _unwrap(v) for k, v in keywords.items()}
    if capture is not None and function.__name__ in _CUBLAS:
        raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
    if function.__name__ in _SIZE_FROM_DEVICE:
        _to_host()
    written = [out._memory] if isinstance(out, StrictArray) else []
    if function.__name__ in ("copyto", "fill", "sort", "partition"):
        written = [plain[0] if function.__name__ == "copyto" else function.__self__]
    own = getattr(function, "__self__", None)
    result = _work(lambda: function(*plain, **named), [own, *plain, *named.values()], written)
    return out if isinstance(out, StrictArray) else result


# Keywords that NumPy's methods have and CuPy's have not.
_ONLY_NUMPY = frozenset({"where", "initial", "mean", "correction"})


def _method(name: str) -> Any:
    def method(self: StrictArray, *arguments: Any, **keywords: Any) -> Any:
        if not _ONLY_NUMPY.isdisjoint(keywords):
            raise TypeError(f"CuPy's ndarray.{name} has no keyword {sorted(_ONLY_NUMPY.intersection(keywords))}")
        return _call(getattr(self._memory, name), *arguments, **keywords)

    method.__name__ = name
    return method


_METHODS = (
    "all any argmax argmin argsort astype choose clip compress conj conjugate copy cumprod cumsum diagonal dot fill "
    "flatten max mean min nonzero partition prod ptp ravel repeat reshape round sort squeeze std sum swapaxes take "
    "trace transpose var view"
).split()
_BINARY = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split()
_COMPARE = "lt le eq ne gt ge".split()


def _operator(name: str) -> Any:
    def operator(self: StrictArray, other: Any) -> Any:
        if isinstance(other, np.ndarray):
            raise TypeError(f"Unsupported type {type(other)}")
        if not isinstance(other, StrictArray | int | float | complex | bool | np.generic):
            return NotImplemented
        if capture is not None and name in ("__matmul__", "__rmatmul__"):
            raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
        if name == "__matmul__" and isinstance(other, StrictArray):
            return _matmul(self, other)
        function, value = getattr(self._memory, name), _unwrap(other)
        result = function(value)
        if result is NotImplemented or capture is None:
            return result if result is NotImplemented else _wrap(result)
        return _work(lambda: function(value), [])

    operator.__name__ = name
    return operator


def _in_place(name: str) -> Any:
    def operator(self: StrictArray, other: Any) -> Any:
        if isinstance(other, np.ndarray):
            raise TypeError(f"Unsupported type {type(other)}")
        value = _unwrap(other)

        def change() -> None:
            if self.ndim:
                getattr(self._memory, name)(value)
            else:
                self._memory[...] = getattr(self._memory, name.replace("__i", "__", 1))(value)

        _work(change, [], [self._memory])
        return self

    operator.__name__ = name
    return operator


def _equip() -> None:
    for name in _METHODS:
        if hasattr(np.ndarray, name):
            setattr(StrictArray, name, _method(name))
    for name in _BINARY:
        setattr(StrictArray, f"__{name}__", _operator(f"__{name}__"))
        setattr(StrictArray, f"__r{name}__", _operator(f"__r{name}__"))
        if name != "matmul":
            setattr(StrictArray, f"__i{name}__", _in_place(f"__i{name}__"))
    for name in _COMPARE:
        setattr(StrictArray, f"__{name}__", _operator(f"__{name}__"))
    for name in ("__neg__", "__pos__", "__abs__", "__invert__"):
        setattr(StrictArray, name, _method(name))


_equip()

xp: Any = types.ModuleType("strict_xp")


def asnumpy(a: Any, **unused: Any) -> np.ndarray:
    return a.get() if isinstance(a, StrictArray) else np.asarray(a)


def asarray(a: Any, dtype: Any = None, order: Any = None, **unused: Any) -> StrictArray:
    """Copy a host value to the emulated device; return a strict array of the right dtype itself."""
    if isinstance(a, StrictArray):
        return a if dtype is None or a.dtype == dtype else a.astype(dtype)
    _to_device()
    return StrictArray._wrap(np.array(a, dtype=dtype, order="C"))


def array(a: Any, dtype: Any = None, copy: bool = True, **unused: Any) -> StrictArray:
    return asarray(a, dtype).copy() if isinstance(a, StrictArray) else asarray(a, dtype)


def empty(shape: Any, dtype: Any = float, order: str = "C") -> StrictArray:
    memory = _poisoned(np.empty(shape, dtype, order))
    if capture is not None:
        capture.hold(memory)
    return StrictArray._wrap(memory)


def empty_like(a: Any, dtype: Any = None, shape: Any = None, **unused: Any) -> StrictArray:
    return empty(a.shape if shape is None else shape, a.dtype if dtype is None else dtype)


def _creator(name: str) -> Any:
    return _creator_of(getattr(np, name), NAMES[name])


def _creator_of(function: Any, known: frozenset[str] | None = None) -> Any:
    @functools.wraps(function)
    def create(*arguments: Any, **keywords: Any) -> Any:
        if known is not None and not known.issuperset(keywords):
            raise TypeError(f"CuPy's {function.__name__} has no keyword {sorted(set(keywords) - known)}")
        return _call(function, *arguments, **keywords)

    return create


def _where(condition: Any, x: Any, y: Any) -> StrictArray:
    """As `cupy.where`, whose list of dtypes has no bfloat16: float32 is the first that both sides fit into."""
    result = _call(np.where, condition, x, y)
    sides = [getattr(side, "dtype", None) for side in (x, y)]
    return result.astype(np.float32) if any(dtype is not None and dtype.kind == "V" for dtype in sides) else result


def _matmul(a: StrictArray, b: StrictArray, out: StrictArray | None = None, **keywords: Any) -> StrictArray:
    """As `cupy.matmul`, which knows bfloat16 for matrices and vectors, not for batches (``_routines_linalg.pyx``)."""
    if np.result_type(a.dtype, b.dtype).kind != "V":
        return _call(np.matmul, a, b, **keywords, **({} if out is None else {"out": out}))
    if max(a.ndim, b.ndim) > 2:
        raise TypeError(a.dtype, b.dtype)
    product = _call(np.matmul, a, b, **keywords).astype(np.result_type(a.dtype, b.dtype))  # NumPy's is float32
    if out is not None:
        out[...] = product
    return product if out is None else out


def _as_strided(x: StrictArray, shape: Any = None, strides: Any = None) -> StrictArray:
    return StrictArray._wrap(np.lib.stride_tricks.as_strided(x._memory, shape, strides))


def _reduceat(array: StrictArray, indices: StrictArray, axis: int = 0) -> StrictArray:
    """As `cupy.add.reduceat`: differences of one running sum (``_routines_indexing.pyx``), for ascending indices."""

    def differences(memory: np.ndarray, starts: np.ndarray) -> np.ndarray:
        running = np.cumsum(memory, axis, memory.dtype)
        running = np.concatenate([np.zeros_like(running.take([0], axis)), running], axis)
        ends = np.append(starts[1:], memory.shape[axis])
        with np.errstate(invalid="ignore"):
            return running.take(ends, axis) - running.take(starts, axis)

    return _call(differences, array, indices)


class _Generator:
    """The methods of `cupy.random.Generator` that are used, on the emulated device.

    As CuPy's: the state lies on the device, and drawing is a kernel of its own that moves the state on.
    """

    def __init__(self, seed: Any = None) -> None:
        self._host = np.random.default_rng(seed)

    def _draw(self, name: str, *arguments: Any) -> StrictArray:
        method = getattr(self._host, name)
        if capture is not None:
            capture.save_generator(self._host)
        return _work(lambda: np.asarray(method(*arguments)), [])

    def random(self, size: Any = None, dtype: Any = np.float64, out: None = None) -> StrictArray:
        return self._draw("random", size, dtype)

    def standard_normal(self, size: Any = None, dtype: Any = np.float64, out: None = None) -> StrictArray:
        return self._draw("standard_normal", size, dtype)

    def integers(
        self, low: int, high: Any = None, size: Any = None, dtype: Any = np.int64, endpoint: bool = False
    ) -> StrictArray:
        return self._draw("integers", low, high, size, dtype, endpoint)


def _fill() -> None:
    """Offer every NumPy function that CuPy has, by the recorded list of names."""
    for name in NAMES:
        found = getattr(np, name, None)
        if found is None or isinstance(found, type) or not callable(found):
            if found is not None:
                setattr(xp, name, found)
            continue
        setattr(xp, name, _creator(name))
    for function in (asnumpy, asarray, array, empty, empty_like):
        setattr(xp, function.__name__, function)
    xp.ndarray, xp.where, xp.matmul = StrictArray, _where, _matmul
    xp.newaxis = None
    xp.add.reduceat = _reduceat
    xp.lib = types.SimpleNamespace(stride_tricks=types.SimpleNamespace(as_strided=_as_strided))
    xp.random = types.SimpleNamespace(default_rng=_Generator)


_fill()
launcher = EmulatedLauncher()
register_array_type(StrictArray, xp, "emulated")
register_launcher("emulated", launcher)
