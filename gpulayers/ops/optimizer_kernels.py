"""Optimizer updates on device arrays: all parameters of a dtype in one launch.

What stays the same from step to step (addresses of parameters and slots, lengths, the list of chunks) lies in a table
in device memory, made when a list of arrays is first seen and kept until one of them is gone. The gradients are new
arrays in every step: their addresses travel by value in the argument struct, so a step copies nothing to the device.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpulayers.device import array_module, is_array, kind_of
from gpulayers.dtypes import dtype_name
from gpulayers.errors import DeviceError, ShapeError, message
from gpulayers.launch import Kernel, contiguous, device_properties, keep, launcher_of, remember, workspace

__all__ = ["adam_update", "global_norm", "momentum_update", "numbers_buffer", "sgd_update", "store_numbers"]

GRADIENTS = 480  # addresses per launch: with the scalars they stay below the 4 KB that every driver takes
CHUNK = 4096  # elements per block
TABLES = 256  # kept at a time
_THREADS = 256
_RESIDENT = 6  # blocks of the norm per multiprocessor: its launch bounds in optimizer.cu
_SHAPE, _DTYPE = operator.attrgetter("shape"), operator.attrgetter("dtype")
_NUMBERS = 5  # the most numbers that a rule has

# Parameter -> dtype of its slots, dtypes its gradient may have.
_DTYPES = {
    "float16": ("float32", ("float16", "float32")),
    "bfloat16": ("float32", ("bfloat16", "float32")),
    "float32": ("float32", ("float32",)),
    "float64": ("float64", ("float64",)),
}


def _kernel(name: str, scalars: int, more: Sequence[tuple[str, str]] = ()) -> Kernel:
    return Kernel(
        "optimizer.cu",
        name,
        arguments=[
            ("table", "const uint64*"),
            ("rows", "int64"),
            ("given", "const float64*"),
            ("wide_numbers", f"float64[{scalars}]"),
            ("numbers", f"float32[{scalars}]"),
            *more,
            ("gradients", f"const GRADIENT*[{GRADIENTS}]"),
        ],
        defines={"PARAMETER": tuple(_DTYPES), "GRADIENT": tuple(_DTYPES)},
        where=lambda chosen: chosen["GRADIENT"] in _DTYPES[chosen["PARAMETER"]][1],
    )


_sgd = _kernel("gl_sgd", 1)
_momentum = _kernel("gl_momentum", 2, [("nesterov", "int32")])
_adam = _kernel("gl_adam", _NUMBERS)
_store_numbers = Kernel(
    "optimizer.cu",
    "gl_store_numbers",
    arguments=[("out", "float64*"), ("count", "int64"), ("numbers", f"float64[{_NUMBERS}]")],
)
_global_norm = Kernel(
    "optimizer.cu",
    "gl_global_norm",
    arguments=[
        ("table", "const uint64*"),
        ("rows", "int64"),
        ("chunks", "int64"),
        ("sums", "pointer"),
        ("sums_before", "int64"),
        ("counters", "uint32*"),
        ("out", "NORM*"),
        ("gradients", f"const GRADIENT*[{GRADIENTS}]"),
    ],
    defines={"GRADIENT": tuple(_DTYPES), "NORM": ("float32", "float64")},
    where=lambda chosen: chosen["NORM"] == "float64" or chosen["GRADIENT"] != "float64",
)


class _Table(NamedTuple):
    """One launch: which members of the list it serves, their dtypes, and the table in device memory."""

    members: list[int]
    parameter: str
    gradient: str
    words: Any
    blocks: int
    written: list[Any]  # weak references


class _Plan(NamedTuple):
    """What is kept for a list of arrays."""

    tables: list[_Table]
    rest: list[int]  # members that no kernel takes
    shapes: list[tuple[int, ...]]
    references: list[Any]


_plans: dict[Any, _Plan] = {}
_norm_tables: dict[Any, tuple[Any, int]] = {}


def numbers_buffer(like: Any) -> Any:
    """Return an empty device array that can stand for the numbers of any rule, beside `like`."""
    return array_module(like).empty(_NUMBERS, np.float64)


def store_numbers(out: Any, numbers: Sequence[float]) -> None:
    """Write up to 5 numbers to the beginning of a float64 array by one small launch, which waits for nothing."""
    _store_numbers.launch({"out": out, "count": len(numbers), "numbers": numbers}, grid=(1,), block=(32,))


def sgd_update(params: Sequence[Any], grads: Sequence[Any], numbers: Any) -> list[int]:
    """Do ``w -= rate g`` in place, `numbers` being (rate,); see `adam_update` for arrays, returns and errors."""
    return _update(_sgd, params, grads, (), numbers, {})


def momentum_update(
    params: Sequence[Any], grads: Sequence[Any], momentums: Sequence[Any], numbers: Any, *, nesterov: bool = False
) -> list[int]:
    """Do ``b <- momentum b + g``, ``w -= rate b`` in place, with `nesterov` ``w -= rate (g + momentum b)``.

    `numbers` are (rate, momentum); see `adam_update` for arrays, returns and errors.
    """
    return _update(_momentum, params, grads, (momentums,), numbers, {"nesterov": int(nesterov)})


def adam_update(
    params: Sequence[Any],
    grads: Sequence[Any],
    m: Sequence[Any],
    v: Sequence[Any],
    numbers: Any,
    *,
    decays: Sequence[bool] | None = None,
) -> list[int]:
    """Do Adam's step in place; `numbers` are (rate, 1 - beta_1, 1 - beta_2, epsilon, decay).

    ``m <- m + (1 - beta_1) (g - m)``, ``v <- v + (1 - beta_2) (g^2 - v)``, then
    ``w -= rate m / (sqrt(v) + epsilon) + decay w``, without the decay for parameters that `decays` leaves out. The rate
    has the correction for the number of the step in it. Instead of host numbers, `numbers` may be an array made by
    `numbers_buffer`, which the kernels read when they run: for steps that are replayed.

    Parameters: equally long lists of device arrays. Kernels take C-contiguous parameters of float16, bfloat16, float32
    or float64 with C-contiguous slots of float32 (float64 for float64) and gradients of the parameter's dtype (or
    float32 for 16 bits); a gradient that is not C-contiguous is copied first.

    Launches: one for up to 480 parameters of one pair of dtypes (parameter, gradient), one more for each 480 beyond.
    Returns the indexes of the members that the kernels do not take: the caller updates those by expressions. Members
    whose written memory overlaps are never taken, since blocks have no order.

    Numerics: float32 for 16-bit and 32-bit parameters, else float64; the same bits on every run. 12, 20 and 28 bytes
    per float32 parameter for `sgd_update`, `momentum_update` and `adam_update`.

    Raises ShapeError for a gradient of another shape than its parameter.
    """
    return _update(_adam, params, grads, (m, v), numbers, {}, decays)


def _update(
    kernel: Kernel,
    params: Sequence[Any],
    grads: Sequence[Any],
    slots: Sequence[Sequence[Any]],
    numbers: Any,
    more: dict[str, Any],
    decays: Sequence[bool] | None = None,
) -> list[int]:
    plan = _plan(params, grads, slots, None if decays is None else tuple(decays))
    shapes = list(map(_SHAPE, grads))
    if shapes != plan.shapes:
        wrong = next(i for i, (a, b) in enumerate(itertools.zip_longest(shapes, plan.shapes)) if a != b)
        expected, got = (s[wrong] if wrong < len(s) else "no array" for s in (plan.shapes, shapes))
        raise ShapeError(message(kernel.name, f"gradient {wrong} has another shape than its parameter", expected, got))
    given = numbers if is_array(numbers) else None
    wide = () if given is not None else numbers
    narrow = [ctypes.c_float(number).value for number in wide]  # too large a number becomes infinite
    for table in plan.tables:
        keep(table.words)
        values = {
            "table": table.words,
            "rows": len(table.members),
            "given": given,
            "wide_numbers": wide,
            "numbers": narrow,
            **more,
            "gradients": contiguous(*[grads[i] for i in table.members]),
        }
        defines = {"PARAMETER": table.parameter, "GRADIENT": table.gradient}
        written = (reference() for reference in table.written)  # asked for by launchers that look at memory
        kernel.launch(values, grid=(table.blocks,), block=(_THREADS,), defines=defines, reached=written)
    return plan.rest


# --- tables -----------------------------------------------------------------------------------------------------------


def _plan(
    params: Sequence[Any],
    grads: Sequence[Any],
    slots: Sequence[Sequence[Any]],
    decays: tuple[bool, ...] | None,
) -> _Plan:
    """Return the plan for these parameters, slots and gradient dtypes, that of an earlier step for the same arrays.

    An array that lives keeps its address and size, so its identity is enough; a plan goes when one of its arrays does.
    """
    arrays = [*params, *itertools.chain.from_iterable(slots)]
    key = (len(slots), tuple(map(id, arrays)), tuple(map(_DTYPE, grads)), decays)
    plan = _plans.get(key)
    if plan is None:
        forget = functools.partial(_forget, key)
        references = [weakref.ref(array, forget) for array in arrays]
        plan = _make_plan(params, grads, slots, decays or (True,) * len(params), references)
        remember(_plans, key, plan, TABLES)
    return plan


def _forget(key: Any, _: Any, pop: Any = _plans.pop) -> None:
    pop(key, None)  # its own reference: at the interpreter's end the module's names may be gone


def _make_plan(
    params: Sequence[Any],
    grads: Sequence[Any],
    slots: Sequence[Sequence[Any]],
    decays: Sequence[bool],
    references: list[Any],
) -> _Plan:
    members = list(zip(params, *slots, strict=True))
    tangled = _overlapping(members)
    groups: dict[tuple[str, str], list[int]] = {}
    rest = []
    for index, (member, grad) in enumerate(zip(members, grads, strict=True)):
        if index in tangled or not _has_kernel(member, grad):
            rest.append(index)
        elif member[0].size:
            groups.setdefault((member[0].dtype.name, grad.dtype.name), []).append(index)
    tables = []
    for (parameter, gradient), indexes in groups.items():
        for start in range(0, len(indexes), GRADIENTS):
            served = indexes[start : start + GRADIENTS]
            words, blocks = _words([_row(members[index], decays[index]) for index in served], params[0])
            written = [references[index + part * len(params)] for index in served for part in range(1 + len(slots))]
            tables.append(_Table(served, parameter, gradient, words, blocks, written))
    return _Plan(tables, rest, [parameter.shape for parameter in params], references)


def _has_kernel(member: Sequence[Any], grad: Any) -> bool:
    slot, gradients = _DTYPES.get(member[0].dtype.name, ("", ()))
    return (
        grad.dtype.name in gradients
        and all(one.dtype.name == slot and one.shape == member[0].shape for one in member[1:])
        and all(one.flags.c_contiguous for one in member)
        and len({kind_of(one) for one in (*member, grad)}) == 1
        and all(one.device == grad.device for one in member)
    )


def _overlapping(members: Sequence[Sequence[Any]]) -> set[int]:
    """Return the members that share memory with another one, or with themselves."""
    spans = []
    for index, member in enumerate(members):
        for array in member:
            if array.size:
                start = launcher_of(array).pointer(array)
                steps = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
                low = start + sum(step for step in steps if step < 0)
                high = start + sum(step for step in steps if step > 0) + array.dtype.itemsize
                spans.append((low, high, index))
    found: set[int] = set()
    end, owner = 0, -1
    for low, high, index in sorted(spans):
        if low < end:
            found |= {index, owner}
        if high > end:
            end, owner = high, index
    return found


def _row(member: Sequence[Any], decays: bool) -> list[int]:
    pointer = launcher_of(member[0]).pointer
    return [*map(pointer, member), *[0] * (3 - len(member)), int(decays), member[0].size]


def _words(rows: Sequence[Sequence[int]], like: Any) -> tuple[Any, int]:
    """Return (table on the device, number of chunks): the rows, whose last word is a length, then the chunk list."""
    chunks = [-(-row[-1] // CHUNK) for row in rows]
    tensors = np.repeat(np.arange(len(rows), dtype=np.uint64), chunks)
    numbers = np.concatenate([np.arange(n, dtype=np.uint64) for n in chunks])
    host = np.concatenate([np.array(rows, np.uint64).reshape(-1), tensors << np.uint64(32) | numbers])
    words = array_module(like).asarray(host)
    if words.device != like.device:
        wrong = "the arrays lie on another GPU than the current one"
        raise DeviceError(message("optimizer", wrong, words.device, like.device, "Use gl.device(...) around the call."))
    return words, len(numbers)


# --- the length of all gradients --------------------------------------------------------------------------------------


def global_norm(grads: Sequence[Any]) -> Any:
    """Return the Euclidean length of all arrays together, ``sqrt(sum of squares)``, as an array of shape ().

    Parameters: device arrays of float16, bfloat16, float32 or float64, at least one. Returns float64 if one of them is,
    else float32. Squares are added in float64 (for a float32 result those of 8 neighbours of float16 in float32), in an
    order that depends on shapes, dtypes, addresses modulo 16 and the device only: the bits are the same on every run.
    One launch per dtype and 480 arrays; every array is read once.
    """
    xp = array_module(*grads)
    groups: dict[str, list[Any]] = {}
    for grad in grads:
        if grad.size:
            groups.setdefault(dtype_name(grad.dtype), []).extend(contiguous(grad))
    wide = "float64" if any(grad.dtype == np.float64 for grad in grads) else "float32"
    if not groups:
        return xp.zeros((), wide)
    out = xp.empty((), wide)
    launches = [
        (dtype, arrays[start : start + GRADIENTS])
        for dtype, arrays in groups.items()
        for start in range(0, len(arrays), GRADIENTS)
    ]
    tables = [_norm_table(arrays) for _, arrays in launches]
    most = _RESIDENT * device_properties(out).multiprocessors
    grids = [min(chunks, most) for _, chunks in tables]
    counters, sums = workspace(out, counters=1, scratch=8 * sum(grids))
    before = 0
    for number, ((dtype, arrays), (words, chunks), blocks) in enumerate(zip(launches, tables, grids, strict=True)):
        values = {
            "table": words,
            "rows": len(arrays),
            "chunks": chunks,
            "sums": sums,
            "sums_before": before,
            "counters": counters,
            "out": out if number == len(launches) - 1 else None,
            "gradients": arrays,
        }
        defines = {"GRADIENT": dtype, "NORM": wide}
        _global_norm.launch(values, grid=(blocks,), block=(_THREADS,), defines=defines)
        before += blocks
    return out


def _norm_table(arrays: Sequence[Any]) -> tuple[Any, int]:
    """Return (the table of these lengths on the current device, number of chunks); addresses are not in it.

    Each stream has its own: it is copied there in order, and nothing else holds another stream back until it is.
    """
    sizes = tuple([array.size for array in arrays])
    key = (type(arrays[0]), launcher_of(arrays[0]).queue(), sizes)
    found = _norm_tables.get(key)
    if found is None:
        found = remember(_norm_tables, key, _words([[size] for size in sizes], arrays[0]), TABLES)
    keep(found[0])
    return found
