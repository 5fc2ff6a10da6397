"""Which session is the default: what a tensor or node asks when it is told to run itself."""

from __future__ import annotations

import threading
from typing import Any

from gpulayers.errors import GraphError, message

__all__ = ["get_default_session", "open_sessions", "session_for"]


class _Stack(threading.local):
    def __init__(self) -> None:
        self.sessions: list[Any] = []


_stack = _Stack()


def open_sessions() -> list[Any]:
    """Return the sessions entered with ``with`` in this thread, outermost first; a session adds and removes itself."""
    return _stack.sessions


def get_default_session() -> Any:
    """Return the innermost session entered with ``with``, or None."""
    return _stack.sessions[-1] if _stack.sessions else None


def session_for(name: str, given: Any) -> Any:
    """Return `given`, or the default session. Raises GraphError, naming `name`, if there is neither."""
    chosen = given or get_default_session()
    if chosen is None:
        raise GraphError(message(name, "there is no default session", do="Use it inside `with Session():`."))
    return chosen
