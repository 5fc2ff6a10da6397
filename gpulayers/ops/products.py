"""Products of matrices and of any arrays by index notation. 16-bit data is accumulated in float32."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpulayers.dtypes import broadcast_static_shape
from gpulayers.errors import ShapeError, message
from gpulayers.ops import device_products
from gpulayers.ops.creation import eye, zeros_like
from gpulayers.ops.operation import GradientContext, Operation, Shape, Spec, match, result_dtype
from gpulayers.ops.shaping import expand_dims, ravel, squeeze, swapaxes
from gpulayers.ops.static import axes_of, static_shape, widened

__all__ = ["dot", "einsum", "matmul", "outer", "tensordot"]


def _matmul_forward(xp: Any, x: Any, y: Any) -> Any:
    """Multiply matrices; on NumPy 16-bit ones as float32, because its own loop would neither be fast nor accurate."""
    if xp is not np:
        return device_products.matmul(xp, x, y)
    (x, y), narrow = widened([x, y])
    product = np.matmul(x, y)
    return product if narrow is None else product.astype(narrow)


def _matmul_spec(x: Spec, y: Spec) -> Spec:
    dtype = result_dtype(lambda xp, a, b: a * b, [Spec((), x.dtype), Spec((), y.dtype)])
    if x.shape is None or y.shape is None:
        return Spec(None, dtype)
    if not x.shape or not y.shape:
        raise ShapeError(message("matmul", "an operand has no axes", "1 or more", f"{x.shape} and {y.shape}"))
    a = (1, *x.shape) if len(x.shape) == 1 else x.shape
    b = (*y.shape, 1) if len(y.shape) == 1 else y.shape
    if None not in (a[-1], b[-2]) and a[-1] != b[-2]:
        raise ShapeError(
            message(
                "matmul",
                "inner sizes differ",
                "last of the first = last but one of the second",
                f"{x.shape} and {y.shape}",
            )
        )
    batch = broadcast_static_shape(a[:-2], b[:-2]) or ()
    rows = () if len(x.shape) == 1 else (a[-2],)
    columns = () if len(y.shape) == 1 else (b[-1],)
    return Spec((*batch, *rows, *columns), dtype)


def _rank(x: Any) -> int:
    shape = static_shape(x)
    if shape is None:
        raise ShapeError(message("matmul", "the rank is unknown", do="Give the tensor a shape: t.set_shape(...)."))
    return len(shape)


def _matmul_rule(c: GradientContext, g: Any) -> tuple[Any, ...]:
    x, y = c.inputs
    row, column = _rank(x) == 1, _rank(y) == 1
    a, b = expand_dims(x, 0) if row else x, expand_dims(y, -1) if column else y
    if column:
        g = expand_dims(g, -1)
    if row:
        g = expand_dims(g, -2)
    gradients: list[Any] = [None, None]
    if c.needs[0]:
        gx = match(matmul(g, swapaxes(b, -1, -2)), a)
        gradients[0] = squeeze(gx, 0) if row else gx
    if c.needs[1]:
        gy = match(matmul(swapaxes(a, -1, -2), g), b)
        gradients[1] = squeeze(gy, -1) if column else gy
    return tuple(gradients)


matmul = Operation(
    "matmul",
    _matmul_forward,
    spec=_matmul_spec,
    gradient=_matmul_rule,
    type="MatMul",
    doc="""Return the matrix product over the last two axes, the axes before them broadcast; vectors as in NumPy.

    On a GPU the same bits on every run as long as a thread multiplies on one stream: cuBLAS promises them to a handle
    that serves one stream at a time, and CuPy has one handle for each thread and device.
    """,
)


# --- index notation ---------------------------------------------------------------------------------------------------


def _parse(subscripts: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Return the letters of each operand and of the result; an ellipsis becomes capital or unused letters."""
    text = subscripts.replace(" ", "")
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise ShapeError(
            message("einsum", "operands do not match the subscripts", f"{len(terms)} operands", len(ranks))
        )
    free = [letter for letter in string.ascii_letters if letter not in text]
    hidden = [
        rank - len(term.replace("...", "")) if "..." in term else 0 for term, rank in zip(terms, ranks, strict=True)
    ]
    if any(
        count < 0 or (not count and "..." not in term and len(term) != rank)
        for count, term, rank in zip(hidden, terms, ranks, strict=True)
    ):
        raise ShapeError(message("einsum", "ranks do not fit the subscripts", subscripts, tuple(ranks)))
    most = max(hidden)
    batch = "".join(free[:most])
    full = [term.replace("...", batch[most - count :]) for term, count in zip(terms, hidden, strict=True)]
    if not arrow:
        letters = "".join(terms).replace(".", "")
        right = ("..." if "." in text else "") + "".join(sorted(a for a in set(letters) if letters.count(a) == 1))
    result = right.replace("...", batch)
    if len(set(result)) != len(result) or any(letter not in "".join(full) for letter in result):
        raise ShapeError(message("einsum", "the result repeats or invents an index", "each index once", subscripts))
    return full, result


def _einsum_forward(xp: Any, *operands: Any, subscripts: str) -> Any:
    """Sum products of elements over the indices that the result does not name."""
    wide, narrow = widened(operands)
    product = xp.einsum(subscripts, *wide, optimize=True)
    return product if narrow is None else product.astype(narrow)


def _einsum_spec(*specs: Spec, subscripts: str) -> Spec:
    dtype = np.result_type(*(s.dtype for s in specs))
    if any(s.shape is None for s in specs):
        return Spec(None, dtype)
    terms, result = _parse(subscripts, [len(s.shape) for s in specs if s.shape is not None])
    sizes: dict[str, int | None] = {}
    for term, spec in zip(terms, specs, strict=True):
        for letter, size in zip(term, spec.shape or (), strict=True):
            known = sizes.get(letter, 1)
            if 1 not in (known, size) and None not in (known, size) and known != size:
                raise ShapeError(message("einsum", f"sizes of index {letter!r} differ", known, size))
            sizes[letter] = known if size in (1, None) and known != 1 else size
    return Spec(tuple(sizes[letter] for letter in result), dtype)


def _operand_gradient(c: GradientContext, g: Any, index: int, terms: list[str], result: str) -> Any:
    term, operand = terms[index], c.inputs[index]
    others = [i for i in range(len(terms)) if i != index]
    unique = "".join(dict.fromkeys(term))
    present = set(result).union(*(terms[i] for i in others)) if others else set(result)
    reached = "".join(letter for letter in unique if letter in present)
    left = ",".join([result, *(terms[i] for i in others)])
    gradient = _einsum(g, *(c.inputs[i] for i in others), subscripts=f"{left}->{reached}")
    # An axis that only this operand has was summed alone, so its gradient is the same all along it; one that the
    # operand names twice lies on a diagonal.
    seen: set[str] = set()
    missing = []
    for place, letter in enumerate(term):
        if letter not in reached or letter in seen:
            missing.append(place)
        seen.add(letter)
    if missing:
        gradient = expand_dims(gradient, tuple(missing))
    if len(unique) < len(term):
        gradient = gradient * _diagonal_mask(term, static_shape(operand), gradient.dtype)
    if missing:
        gradient = gradient + zeros_like(operand)
    return match(gradient, operand)  # sums what broadcast


def _diagonal_mask(term: str, shape: Shape, dtype: np.dtype) -> Any:
    """Return ones where all axes with the same letter have the same index, zeros elsewhere."""
    mask: Any = 1
    for place, letter in enumerate(term):
        first = term.index(letter)
        if first == place:
            continue
        if shape is None or shape[place] is None:
            raise ShapeError(message("einsum", f"the size of the repeated index {letter!r} is unknown"))
        others = tuple(axis for axis in range(len(term)) if axis not in (first, place))
        mask = expand_dims(eye(shape[place], dtype=dtype), others) * mask
    return mask


def _einsum_rule(c: GradientContext, g: Any) -> tuple[Any, ...]:
    terms, result = _parse(c["subscripts"], [_rank(x) for x in c.inputs])
    return tuple(
        _operand_gradient(c, g, index, terms, result) if needed else None for index, needed in enumerate(c.needs)
    )


_einsum = Operation("einsum", _einsum_forward, spec=_einsum_spec, gradient=_einsum_rule)


def einsum(subscripts: str, *operands: Any) -> Any:
    """Return the sum of products that `subscripts` describe, such as ``"bij,bjk->bik"``; ``...`` stands for the rest.

    An operand may name an index twice (its diagonal), the result may not.

    >>> import numpy as np
    >>> einsum("ij,ij->i", np.ones((2, 3)), np.ones((2, 3)))
    array([3., 3.])
    """
    if not isinstance(subscripts, str):
        raise TypeError(message("einsum", "subscripts are not a string", "such as 'ij,jk->ik'", repr(subscripts)))
    return _einsum(*operands, subscripts=subscripts)


def tensordot(a: Any, b: Any, axes: Any = 2) -> Any:
    """Return the sum of products over pairs of axes: the last `axes` of `a` with the first of `b`, or two lists."""
    rank_a, rank_b = _rank(a), _rank(b)
    if hasattr(axes, "__index__"):
        first, second = tuple(range(rank_a - int(axes), rank_a)), tuple(range(int(axes)))
    else:
        first, second = axes_of("tensordot", axes[0], rank_a), axes_of("tensordot", axes[1], rank_b)
    if len(first) != len(second):
        raise ShapeError(message("tensordot", "the lists of axes differ in length", len(first), len(second)))
    letters_a = list(string.ascii_lowercase[:rank_a])
    letters_b = list(string.ascii_uppercase[:rank_b])
    for one, other in zip(first, second, strict=True):
        letters_b[other] = letters_a[one]
    result = [x for i, x in enumerate(letters_a) if i not in first]
    result += [x for i, x in enumerate(letters_b) if i not in second]
    return einsum(f"{''.join(letters_a)},{''.join(letters_b)}->{''.join(result)}", a, b)


def dot(a: Any, b: Any) -> Any:
    """Return NumPy's dot: a product for numbers, else the sum over the last axis of `a` and the last but one of `b`."""
    rank_a, rank_b = _rank(a), _rank(b)
    if not rank_a or not rank_b:
        return a * b
    if rank_a <= 2 and rank_b <= 2:
        return matmul(a, b)
    return tensordot(a, b, ((-1,), (max(rank_b - 2, 0),)))


def outer(a: Any, b: Any) -> Any:
    """Return all products of an element of `a` with an element of `b`, as a matrix."""
    return expand_dims(ravel(a), 1) * expand_dims(ravel(b), 0)
