"""The NumPy settings that arithmetic on the host runs with: no warnings, and small buffers.

Infinities and NaN pass through as they do on a GPU, without a word. NumPy's settings belong to the context, and threads
of the pool (``host.threads``) run in a copy of their caller's.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numpy as np

__all__ = ["BUFFER", "quiet"]

BUFFER = 1024
"""Elements of NumPy's buffers. Where one holds several rows of an operation that broadcasts one number along each row,
NumPy first writes the numbers out into a buffer, at a third of the speed; rows of at least this length escape it."""

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@functools.cache
def _settings() -> contextvars.Context:
    context = contextvars.Context()
    context.run(np.setbufsize, BUFFER)
    context.run(np.seterr, all="ignore")
    return context


def quiet(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let a function run with these settings, and without the caller's context variables.

    To enter a context that is ready takes a fraction of the time of ``np.errstate`` and ``np.setbufsize``.

    >>> @quiet
    ... def inverse(x):
    ...     return 1 / x
    >>> inverse(np.zeros(2))
    array([inf, inf])
    """

    @functools.wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return _settings().copy().run(function, *args, **kwargs)

    return run
