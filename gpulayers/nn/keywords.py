"""Which keywords the `call` of a cell takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

__all__ = ["takes_keyword"]


def takes_keyword(cell: Any, name: str) -> bool:
    """Say whether the `call` of a cell takes the keyword `name`.

    A wrapper whose `call` takes any keyword hands it on, so its cell is asked.
    """
    call = getattr(cell, "call", cell)
    parameters = _parameters(getattr(call, "__func__", call))
    if name in parameters:
        return True
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return False
    inner = getattr(cell, "cell", None)
    return inner is None or takes_keyword(inner, name)


@functools.lru_cache(maxsize=4096)
def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters
