"""The table of cases: every operation, what to compare it with, and on which arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.special

from gpulayers import ops

RANDOM = np.random.default_rng(20240607)


@dataclass
class Case:
    """`call(*arrays)` against `reference(*arrays)` (None: the same call of NumPy). `first`, `second`: check gradients.

    `static`: in a graph with known input sizes the result's shape is known, too.
    """

    name: str
    call: Callable[..., Any]
    arrays: tuple[np.ndarray, ...]
    reference: Callable[..., Any] | None
    first: bool = True
    second: bool = True
    static: bool = True
    tolerance: float = 1e-12
    note: str = ""

    @property
    def id(self) -> str:
        shapes = "-".join("x".join(map(str, a.shape)) or "scalar" for a in self.arrays)
        return f"{self.name}{self.note}:{shapes}"


CASES: list[Case] = []


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape)


def positive(*shape: int) -> np.ndarray:
    return RANDOM.random(shape) * 2 + 0.3


def apart(*shape: int) -> np.ndarray:
    """Values that stay clear of each other and of zero, so that finite differences cross no kink."""
    size = int(np.prod(shape))
    values = (np.arange(size) - size // 2) * 0.37 + 0.15
    return RANDOM.permutation(values).reshape(shape)


def strided(*shape: int) -> np.ndarray:
    """A view that is neither contiguous in C nor in Fortran order."""
    wide = RANDOM.standard_normal((*shape[:-1], 2 * shape[-1]))
    return wide[..., ::-2]


def case(name: str, call: Any, reference: Any, *arrays: np.ndarray, **options: Any) -> None:
    CASES.append(Case(name, call, arrays, reference, **options))


# --- elementwise ------------------------------------------------------------------------------------------------------

UNARY_SHAPES = [(), (3,), (2, 0, 3), (1, 1)]
_PI = float(np.pi)

UNARY: dict[str, tuple[Any, Callable[..., np.ndarray]]] = {
    "absolute": (np.absolute, apart),
    "ceil": (np.ceil, apart),
    "cos": (np.cos, normal),
    "exp": (np.exp, normal),
    "expm1": (np.expm1, normal),
    "floor": (np.floor, apart),
    "log": (np.log, positive),
    "log1p": (np.log1p, positive),
    "negative": (np.negative, normal),
    "reciprocal": (np.reciprocal, positive),
    "rint": (np.rint, apart),
    "rsqrt": (lambda x: 1 / np.sqrt(x), positive),
    "sign": (np.sign, apart),
    "sin": (np.sin, normal),
    "sqrt": (np.sqrt, positive),
    "square": (np.square, normal),
    "tanh": (np.tanh, normal),
    "sigmoid": (scipy.special.expit, normal),
    "erf": (scipy.special.erf, normal),
    "relu": (lambda x: np.where(x > 0, x, 0), apart),
    "relu6": (lambda x: np.clip(x, 0, 6), apart),
    "softplus": (lambda x: np.logaddexp(x, 0), normal),
    "softsign": (lambda x: x / (1 + np.abs(x)), apart),
    "elu": (lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))), apart),
    "selu": (lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x)), apart),
    "leaky_relu": (lambda x: np.where(x > 0, x, 0.2 * x), apart),
    "hard_sigmoid": (lambda x: np.clip(0.2 * x + 0.5, 0, 1), apart),
    "gelu": (lambda x: x * scipy.special.ndtr(x), normal),
    "silu": (lambda x: x * scipy.special.expit(x), normal),
    "mish": (lambda x: x * np.tanh(np.logaddexp(x, 0)), normal),
    "linear": (lambda x: x, normal),
    "exponential": (np.exp, normal),
    "identity": (lambda x: x, normal),
}
for _name, (_reference, _draw) in UNARY.items():
    for _shape in UNARY_SHAPES:
        case(_name, getattr(ops, _name), _reference, _draw(*_shape))
    case(_name, getattr(ops, _name), _reference, np.abs(strided(4, 3)) + 0.31, note="-strided")
case(
    "gelu",
    lambda x: ops.gelu(x, approximate=True),
    lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / _PI) * (x + 0.044715 * x**3))),
    normal(4),
    note="-tanh",
)
case("elu", lambda x: ops.elu(x, 0.3), lambda x: np.where(x > 0, x, 0.3 * np.expm1(x)), apart(4), note="-alpha")

BINARY_SHAPES = [((3,), (3,)), ((2, 3), (3,)), ((2, 1), (1, 3)), ((0, 3), (3,)), ((), (2,)), ((1,), (1, 1))]
for _name, _draws in {
    "add": (normal, normal),
    "subtract": (normal, normal),
    "multiply": (normal, normal),
    "divide": (normal, positive),
    "power": (positive, normal),
    "maximum": (normal, normal),
    "minimum": (normal, normal),
}.items():
    for _a, _b in BINARY_SHAPES:
        case(_name, getattr(ops, _name), getattr(np, _name), _draws[0](*_a), _draws[1](*_b))
case("floor_divide", ops.floor_divide, np.floor_divide, normal(2, 3), positive(3), first=False)
case("remainder", ops.remainder, np.remainder, np.array([5.3, -1.2, 0.4]), np.array([2.0, 0.9, 3.1]))
for _name in ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal"):
    case(_name, getattr(ops, _name), getattr(np, _name), np.array([1.0, 2.0, 3.0]), np.array([2.0]), first=False)
for _name in ("logical_and", "logical_or", "logical_xor"):
    case(
        _name,
        getattr(ops, _name),
        getattr(np, _name),
        np.array([True, False]),
        np.array([[True], [False]]),
        first=False,
    )
case("logical_not", ops.logical_not, np.logical_not, np.array([True, False]), first=False)
for _name in ("isnan", "isinf", "isfinite"):
    case(_name, getattr(ops, _name), getattr(np, _name), np.array([1.0, np.nan, np.inf, -np.inf]), first=False)
case("where", ops.where, np.where, np.array([[True], [False]]), normal(2, 3), normal(3))
case("clip", lambda x: ops.clip(x, -0.5, 0.7), lambda x: np.clip(x, -0.5, 0.7), apart(3, 4))
case("clip", lambda x: ops.clip(x, a_max=0.2), lambda x: np.minimum(x, 0.2), apart(3), note="-open")

# --- reductions -------------------------------------------------------------------------------------------------------

for _name in ("sum", "mean", "prod", "max", "min", "var", "std", "logsumexp"):
    _reference = scipy.special.logsumexp if _name == "logsumexp" else getattr(np, _name)
    for _axis in (None, 0, -1, (0, 2), (-1, 1)):
        for _keep in (False, True):

            def _call(x: Any, f: Any = getattr(ops, _name), axis: Any = _axis, keep: bool = _keep) -> Any:
                return f(x, axis=axis, keepdims=keep)

            def _truth(x: Any, f: Any = _reference, axis: Any = _axis, keep: bool = _keep) -> Any:
                return f(x, axis=axis, keepdims=keep)

            case(_name, _call, _truth, apart(2, 3, 2) * 0.3, note=f"[{_axis},{_keep}]")
case("sum", lambda x: ops.sum(x, 1), lambda x: np.sum(x, 1), normal(2, 0, 3), note="-empty")
case("sum", ops.sum, np.sum, normal(), note="-scalar")
case("sum", lambda x: ops.sum(x, 0), lambda x: np.sum(x, 0), strided(3, 4), note="-strided")
case("sum", lambda x: ops.sum(x, 0), lambda x: np.sum(x, 0), np.arange(6, dtype=np.int32).reshape(2, 3), first=False)
case("mean", lambda x: ops.mean(x, 0), lambda x: np.mean(x, 0), np.arange(6).reshape(2, 3), first=False, note="-int")
case("prod", lambda x: ops.prod(x, 1), lambda x: np.prod(x, 1), normal(0, 3), note="-empty")
case(
    "prod",
    lambda x: ops.prod(x, 1),
    lambda x: np.prod(x, 1),
    np.array([[2.0, 0.0, 3.0], [0.0, 0.0, 1.0]]),
    second=False,
)
case("var", lambda x: ops.var(x, 0, ddof=1), lambda x: np.var(x, 0, ddof=1), normal(4, 2), note="-ddof")
case("std", lambda x: ops.std(x, 0, ddof=1), lambda x: np.std(x, 0, ddof=1), normal(4, 2), note="-ddof")
for _name in ("all", "any"):
    case(
        _name,
        lambda x, f=getattr(ops, _name): f(x, 0),
        lambda x, f=getattr(np, _name): f(x, 0),
        normal(2, 3) > 0,
        first=False,
    )
for _name in ("argmax", "argmin"):
    for _axis in (None, 1, -2):
        case(
            _name,
            lambda x, f=getattr(ops, _name), axis=_axis: f(x, axis),
            lambda x, f=getattr(np, _name), axis=_axis: f(x, axis),
            normal(3, 4),
            first=False,
            note=f"[{_axis}]",
        )
case("count_nonzero", lambda x: ops.count_nonzero(x, 1), lambda x: np.count_nonzero(x, 1), np.eye(3), first=False)
for _axis in (None, 0, -1):
    case(
        "cumsum",
        lambda x, a=_axis: ops.cumsum(x, a),
        lambda x, a=_axis: np.cumsum(x, a),
        normal(2, 3),
        note=f"[{_axis}]",
    )
for _axis in (0, -1):
    case("softmax", lambda x, a=_axis: ops.softmax(x, a), lambda x, a=_axis: scipy.special.softmax(x, a), normal(3, 4))
    case(
        "log_softmax",
        lambda x, a=_axis: ops.log_softmax(x, a),
        lambda x, a=_axis: scipy.special.log_softmax(x, a),
        normal(3, 4),
        note=f"[{_axis}]",
    )
case("softmax", ops.softmax, lambda x: x, normal(2, 0), note="-empty")

# --- shaping ----------------------------------------------------------------------------------------------------------

for _note, _call, _truth, _x in [
    ("reshape", lambda x: ops.reshape(x, (3, -1)), lambda x: np.reshape(x, (3, -1)), normal(2, 3, 2)),
    ("reshape-empty", lambda x: ops.reshape(x, (0, 5)), lambda x: np.reshape(x, (0, 5)), normal(2, 0)),
    ("ravel", ops.ravel, np.ravel, normal(2, 3)),
    ("ravel-empty", ops.ravel, np.ravel, normal(0, 3)),
    ("ravel-strided", ops.ravel, np.ravel, strided(2, 3)),
    ("transpose", ops.transpose, np.transpose, normal(2, 3, 4)),
    ("transpose-axes", lambda x: ops.transpose(x, (1, -1, 0)), lambda x: np.transpose(x, (1, -1, 0)), normal(2, 3, 4)),
    ("swapaxes", lambda x: ops.swapaxes(x, 0, -1), lambda x: np.swapaxes(x, 0, -1), normal(2, 3, 4)),
    (
        "moveaxis",
        lambda x: ops.moveaxis(x, (0, 1), (-1, 0)),
        lambda x: np.moveaxis(x, (0, 1), (-1, 0)),
        normal(2, 3, 4),
    ),
    ("expand_dims", lambda x: ops.expand_dims(x, (0, -1)), lambda x: np.expand_dims(x, (0, -1)), normal(2, 3)),
    ("squeeze", ops.squeeze, np.squeeze, normal(1, 3, 1)),
    ("squeeze-axis", lambda x: ops.squeeze(x, -1), lambda x: np.squeeze(x, -1), normal(1, 3, 1)),
    ("split", lambda x: ops.split(x, 3, 1), lambda x: np.split(x, 3, 1), normal(2, 6)),
    ("split-at", lambda x: ops.split(x, [1, 4], -1), lambda x: np.split(x, [1, 4], -1), normal(2, 6)),
    ("split_sizes", lambda x: ops.split_sizes(x, [1, -1]), lambda x: np.split(x, [1]), normal(3, 2)),
    ("split_sizes-rest", lambda x: ops.split_sizes(x, [2, -1, 1], 1), lambda x: np.split(x, [2, 4], 1), normal(2, 5)),
    ("split_sizes-none", lambda x: ops.split_sizes(x, [1, 2]), lambda x: np.split(x, [1]), normal(3, 2)),
    ("unstack", lambda x: ops.unstack(x, 1), lambda x: [x[:, 0], x[:, 1], x[:, 2]], normal(2, 3)),
    ("tile", lambda x: ops.tile(x, (2, 1, 3)), lambda x: np.tile(x, (2, 1, 3)), normal(2, 3)),
    ("tile-short", lambda x: ops.tile(x, 2), lambda x: np.tile(x, 2), normal(2, 3)),
    ("repeat", lambda x: ops.repeat(x, 3, -2), lambda x: np.repeat(x, 3, -2), normal(2, 3)),
    ("repeat-flat", lambda x: ops.repeat(x, 2), lambda x: np.repeat(x, 2), normal(2, 3)),
    ("broadcast_to", lambda x: ops.broadcast_to(x, (4, 2, 3)), lambda x: np.broadcast_to(x, (4, 2, 3)), normal(2, 1)),
    ("flip", ops.flip, np.flip, normal(2, 3)),
    ("flip-axis", lambda x: ops.flip(x, -1), lambda x: np.flip(x, -1), normal(2, 3)),
    ("roll", lambda x: ops.roll(x, 2, 1), lambda x: np.roll(x, 2, 1), normal(2, 3)),
    ("roll-flat", lambda x: ops.roll(x, -1), lambda x: np.roll(x, -1), normal(2, 3)),
    ("pad", lambda x: ops.pad(x, ((1, 0), (2, 3))), lambda x: np.pad(x, ((1, 0), (2, 3))), normal(2, 3)),
    ("pad-value", lambda x: ops.pad(x, 1, constant_values=7), lambda x: np.pad(x, 1, constant_values=7), normal(0, 2)),
    ("cast", lambda x: ops.cast(x, "float64"), lambda x: x, normal(3)),
    ("reshape_like", lambda x: ops.shaping.reshape_like(x, np.ones((3, 2))), lambda x: x.reshape(3, 2), normal(6)),
    ("broadcast_like", lambda x: ops.broadcast_like(x, np.ones((2, 3))), lambda x: x + np.zeros((2, 3)), normal(3)),
    ("sum_to_like", lambda x: ops.sum_to_like(x, np.ones((1, 3))), lambda x: x.sum(0, keepdims=True), normal(2, 3)),
]:
    case(_note, _call, _truth, _x)
case("stop_gradient", ops.stop_gradient, lambda x: x, normal(3), first=False)
case(
    "concatenate",
    lambda *a: ops.concatenate(a, -1),
    lambda *a: np.concatenate(a, -1),
    normal(2, 3),
    normal(2, 0),
    normal(2, 1),
)
case(
    "concatenate",
    lambda *a: ops.concatenate(a, None),
    lambda *a: np.concatenate(a, None),
    normal(2, 3),
    normal(1),
    note="-flat",
)
case("stack", lambda *a: ops.stack(a, 1), lambda *a: np.stack(a, 1), normal(2, 3), strided(2, 3))
case("shape", ops.shape_of, lambda x: np.array(x.shape, np.int32), normal(2, 3), first=False)
case("size", ops.size, lambda x: np.array(x.size, np.int32), normal(2, 3), first=False)
case("rank", ops.rank, lambda x: np.array(x.ndim, np.int32), normal(2, 3), first=False)

# Shapes that are known only when the graph runs.
case(
    "dynamic_reshape",
    lambda x: ops.reshape(x, (ops.shape_of(x)[1], -1)),
    lambda x: x.reshape(x.shape[1], -1),
    normal(2, 3, 2),
    static=False,
)
case(
    "dynamic_broadcast_to",
    lambda x: ops.broadcast_to(x[:1], ops.shape_of(x)),
    lambda x: np.broadcast_to(x[:1], x.shape),
    normal(2, 3),
    static=False,
)
case(
    "dynamic_range",
    lambda x: ops.arange(ops.size(x)),
    lambda x: np.arange(x.size, dtype=np.int32),
    normal(2, 3),
    first=False,
    static=False,
)
case(
    "zeros",
    lambda x: ops.zeros(ops.shape_of(x), "float64"),
    np.zeros_like,
    normal(2, 3),
    first=False,
    static=False,
    note="-dynamic",
)
case(
    "ones",
    lambda x: ops.ones((ops.shape_of(x)[0], 2), "float64"),
    lambda x: np.ones((2, 2)),
    normal(2, 3),
    first=False,
    static=False,
)
case("getitem", lambda x: x[: ops.shape_of(x)[0]], lambda x: x[:2], normal(3, 2)[:2], static=False, note="-dynamic")

# --- creation ---------------------------------------------------------------------------------------------------------

case("zeros", lambda: ops.zeros((2, 3)), lambda: np.zeros((2, 3), np.float32), first=False)
case("ones", lambda: ops.ones(3, "int32"), lambda: np.ones(3, np.int32), first=False)
case("full", lambda: ops.full((2, 0), 7), lambda: np.full((2, 0), 7, np.int32), first=False)
case("full", lambda x: ops.full((2, 3), x), lambda x: np.full((2, 3), x), normal(), note="-tensor")
case("full_like", lambda x: ops.full_like(x, 3), lambda x: np.full_like(x, 3), normal(2, 3), first=False)
case("zeros_like", ops.zeros_like, np.zeros_like, normal(2, 3), first=False)
case("ones_like", lambda x: ops.ones_like(x, "int32"), lambda x: np.ones_like(x, np.int32), normal(2, 3), first=False)
case("eye", lambda: ops.eye(2, 3, 1), lambda: np.eye(2, 3, 1, dtype=np.float32), first=False)
case("arange", lambda: ops.arange(1, 2, 0.25), lambda: np.arange(1, 2, 0.25, np.float32), first=False)
case("arange", lambda: ops.arange(5, 0, -2), lambda: np.arange(5, 0, -2, np.int32), first=False, note="-down")
case("constant", lambda: ops.constant([[1.0, 2.0]]), lambda: np.array([[1, 2]], np.float32), first=False)
case(
    "constant", lambda: ops.constant(3, shape=(2, 2)), lambda: np.full((2, 2), 3, np.int32), first=False, note="-filled"
)

# --- indexing ---------------------------------------------------------------------------------------------------------

_rows, _columns = np.array([[0, 2], [2, 2]]), np.array([1, -1])
_mask = np.array([[True, False, True], [False, False, True]])
INDICES: dict[str, Any] = {
    "int": 1,
    "negative": -2,
    "slice": slice(1, None),
    "step": (slice(None, None, -1), slice(0, 3, 2)),
    "ellipsis": (Ellipsis, 0),
    "none": (None, slice(None), None, 1),
    "empty": slice(2, 1),
    "array": _rows,
    "list": [0, 0, 1],
    "pair": (_rows, _columns),
    "apart": (_columns, slice(None), _columns),
    "beside": (slice(None), _columns, slice(1, 3)),
    "number-and-array": (0, slice(None), _columns),
    "front-mask": np.array([True, False, True]),
    "no-row": np.zeros(3, bool),
}
for _note, _key in INDICES.items():
    case(
        "getitem",
        lambda x, k=_key: ops.getitem(x, k),
        lambda x, k=_key: x[k],
        normal(3, 4, 3),
        static="mask" not in _note and _note != "no-row",
        note=f"-{_note}",
    )
case("getitem", lambda x, i: x[i], lambda x, i: x[i], normal(4, 2), np.array([3, 0, 3]), note="-input")
case("getitem", lambda x, m: ops.getitem(x, m), lambda x, m: x[m], normal(2, 3), _mask, static=False, note="-mask")
case("boolean_mask", ops.boolean_mask, lambda x, m: x[m], normal(2, 3, 2), _mask, static=False)
case(
    "boolean_mask",
    lambda x: ops.boolean_mask(x, [True, False], 1),
    lambda x: x[:, [True, False]],
    normal(3, 2),
    static=False,
    note="-axis",
)
case(
    "take", lambda x, i: ops.take(x, i, 1), lambda x, i: np.take(x, i, 1), normal(2, 3, 2), np.array([[0, 2], [2, -1]])
)
case("take", ops.take, np.take, normal(2, 3), np.array([5, 0, 5]), note="-flat")
case("gather", ops.gather, lambda x, i: x[i], normal(3, 2), np.array([1, 1, 0]))
case("gather", ops.gather, lambda x, i: x[i], normal(3, 2), np.zeros(0, np.int64), note="-empty")
case(
    "take_along_axis",
    lambda x, i: ops.take_along_axis(x, i, 1),
    lambda x, i: np.take_along_axis(x, i, 1),
    normal(2, 3),
    np.array([[0, 0], [2, 1]]),
)
case(
    "one_hot",
    lambda i: ops.one_hot(i, 3),
    lambda i: np.eye(3, dtype=np.float32)[i],
    np.array([[0, 2], [1, 1]]),
    first=False,
)
case(
    "one_hot",
    lambda i: ops.one_hot(i, 3, 5, -1, 0, "float64"),
    lambda i: np.where(np.eye(3)[i].T > 0, 5.0, -1.0),
    np.array([0, 2]),
    first=False,
    note="-axis",
)

# --- products ---------------------------------------------------------------------------------------------------------

MATMUL_SHAPES = [
    ((2, 3), (3, 4)),
    ((3,), (3,)),
    ((2, 3), (3,)),
    ((3,), (3, 4)),
    ((5, 2, 3), (3, 4)),
    ((1, 2, 3), (5, 3, 1)),
    ((3,), (2, 3, 4)),
    ((2, 0), (0, 3)),
    ((0, 2), (2, 3)),
]
for _a, _b in MATMUL_SHAPES:
    case("matmul", ops.matmul, np.matmul, normal(*_a), normal(*_b))
case("matmul", ops.matmul, np.matmul, strided(3, 2).T, strided(3, 4), note="-strided")
for _subscripts, _shapes in {
    "ij,jk->ik": ((2, 3), (3, 4)),
    "bij,bjk->bik": ((2, 2, 3), (2, 3, 2)),
    "ij->ji": ((2, 3),),
    "ij->": ((2, 3),),
    "ij->i": ((2, 3),),
    "ii->i": ((3, 3),),
    "ii": ((3, 3),),
    "iij,j->i": ((2, 2, 3), (3,)),
    "i,j->ij": ((2,), (3,)),
    "i,i,i->": ((3,), (3,), (3,)),
    "...ij,...jk->...ik": ((2, 1, 2, 3), (4, 3, 2)),
    "...i->...": ((2, 3),),
    "ij,kj": ((2, 3), (4, 3)),
    "ij,k->i": ((2, 3), (4,)),
}.items():
    case(
        "einsum",
        lambda *a, s=_subscripts: ops.einsum(s, *a),
        lambda *a, s=_subscripts: np.einsum(s, *a),
        *(normal(*s) for s in _shapes),
        note=f"[{_subscripts}]",
    )
case(
    "tensordot",
    lambda a, b: ops.tensordot(a, b, 2),
    lambda a, b: np.tensordot(a, b, 2),
    normal(2, 3, 4),
    normal(3, 4, 2),
)
case(
    "tensordot",
    lambda a, b: ops.tensordot(a, b, ([0, -1], [1, 0])),
    lambda a, b: np.tensordot(a, b, ([0, -1], [1, 0])),
    normal(2, 3, 4),
    normal(4, 2),
    note="-axes",
)
case("dot", ops.dot, np.dot, normal(2, 3), normal(4, 3, 2))
case("outer", ops.outer, np.outer, normal(2), normal(2, 2))
