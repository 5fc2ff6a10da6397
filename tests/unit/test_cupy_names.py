"""Every array-module function that the package calls exists in the installed CuPy, with the arguments given.

Found by walking the syntax trees: calls of ``xp.<name>(...)``, and the names that the tables of operations look up.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import gpulayers

cupy = pytest.importorskip("cupy", reason="CuPy is not installed: there is nothing to compare with")

MODULES = {"xp"}
LOOKED_UP_BY = {"_ufunc", "_accumulated", "_plain"}
"""Functions of the operation tables whose first argument names a function of the array module."""
UFUNC_KEYWORDS = {"out", "dtype", "casting"}


class Call(NamedTuple):
    name: str
    positional: int | None  # None: unknown, because arguments are unpacked
    keywords: frozenset[str]
    where: str


def dotted(node: ast.expr) -> list[str]:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else []


def calls() -> Iterator[Call]:
    root = Path(gpulayers.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                name = dotted(node.func)
                unpacked = any(isinstance(a, ast.Starred) for a in node.args) or any(
                    k.arg is None for k in node.keywords
                )
                if len(name) > 1 and name[0] in MODULES:
                    keywords = frozenset(k.arg for k in node.keywords if k.arg)
                    yield Call(".".join(name[1:]), None if unpacked else len(node.args), keywords, where)
                elif name and name[-1] in LOOKED_UP_BY and node.args and isinstance(node.args[0], ast.Constant):
                    yield Call(str(node.args[0].value), None, frozenset(), where)
            elif isinstance(node, ast.Attribute) and len(name := dotted(node)) > 1 and name[0] in MODULES:
                yield Call(".".join(name[1:]), None, frozenset(), where)


FOUND = sorted(set(calls()), key=lambda c: (c.name, c.where, str(c.positional), sorted(c.keywords)))


def find(name: str) -> Any:
    found: Any = cupy
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_the_walk_finds_calls() -> None:
    names = {call.name for call in FOUND}
    assert {"sum", "tanh", "einsum", "add.reduceat", "random.default_rng", "lib.stride_tricks.as_strided"} <= names


@pytest.mark.parametrize("name", sorted({call.name for call in FOUND}))
def test_name_exists(name: str) -> None:
    assert find(name) is not None, [call.where for call in FOUND if call.name == name]


@pytest.mark.parametrize("call", [c for c in FOUND if c.positional is not None], ids=lambda c: f"{c.name}@{c.where}")
def test_arguments_fit(call: Call) -> None:
    function = find(call.name)
    if isinstance(function, cupy.ufunc):
        assert call.positional <= function.nargs
        assert call.keywords <= UFUNC_KEYWORDS
        return
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        assert callable(function)  # compiled functions may not say what they take
        return
    signature.bind(*[None] * call.positional, **dict.fromkeys(call.keywords))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (Call("count_nonzero", 1, frozenset({"keepdims"}), ""), TypeError),
        (Call("add", 2, frozenset({"where"}), ""), AssertionError),
        (Call("nan_to_none", 1, frozenset(), ""), AttributeError),
    ],
)
def test_what_cupy_lacks_is_noticed(call: Call, error: type[Exception]) -> None:
    with pytest.raises(error):
        test_arguments_fit(call)


GENERATOR_CALLS = {
    "random": {"size", "dtype"},
    "standard_normal": {"size", "dtype"},
    "integers": {"low", "high", "size"},
}


@pytest.mark.parametrize("name", GENERATOR_CALLS)
def test_generator_methods(name: str) -> None:
    method = getattr(cupy.random.Generator, name)
    text = str(method.__doc__).split("\n")[0]
    try:
        parameters = set(inspect.signature(method).parameters)
    except ValueError:
        parameters = {word.split("=")[0].strip(" ()") for word in text.replace(name, "").split(",")}
    assert GENERATOR_CALLS[name] <= parameters
