"""What a layer call needs to know: the signature of `call`, and the calls that enclose this one."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from gpulayers.trace import active_graph, placeholder_with_default

__all__ = [
    "CallContext",
    "Signature",
    "call_context",
    "learning_phase",
    "no_state_updates",
    "probing",
    "set_learning_phase",
    "set_phase",
    "signature_of",
    "state_updates_allowed",
]


class Signature(NamedTuple):
    """Which keywords a `call` takes, and the position of `training` and `mask` behind the inputs."""

    training: bool
    mask: bool
    scope: bool
    keywords: bool
    names: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def _signature(function: Any) -> Signature:
    parameters = list(inspect.signature(function).parameters.values())
    keywords = any(p.kind is p.VAR_KEYWORD for p in parameters)
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return Signature(
        "training" in names, "mask" in names, "scope" in names, keywords, tuple(n for n in positional if n != "self")
    )


def signature_of(call: Any) -> Signature:
    """Return the signature of a bound or plain `call`."""
    return _signature(getattr(call, "__func__", call))


class CallContext(threading.local):
    """The layer call in progress in this thread: its depth, its `training`, the outermost layer, the name prefix.

    `number` counts the outermost calls. While `probing`, only the shapes of a call matter: nothing is kept of it.
    """

    depth = 0
    number = 0
    probing = False
    training: Any = None
    root: Any = None
    name_prefix = ""


call_context = CallContext()


@contextlib.contextmanager
def probing() -> Iterator[None]:
    """Keep no losses and metrics of layer calls inside the block."""
    before, call_context.probing = call_context.probing, True
    try:
        yield
    finally:
        call_context.probing = before


class _LearningPhase(threading.local):
    value: Any = None


_phase = _LearningPhase()


def learning_phase() -> Any:
    """Return what `training` is where a layer is told None: what was set; else in a `Graph` its own tensor; else None.

    The tensor is False unless a session is fed another value for it, ``session.run(y, {learning_phase(): 1})``; each
    graph has one. Batch normalisation, dropout and the dropout of cells follow it. In eager mode and in `function`
    there is None, which means False (TensorFlow: 0). Source: ``tf.keras.backend.learning_phase``.

    >>> import gpulayers as gl
    >>> gl.keras.backend.learning_phase() is None
    True
    """
    if _phase.value is not None:
        return _phase.value
    graph = active_graph()
    if graph is None or not graph.initializes_variables_in_session:
        return None
    owner = graph.owner
    if "learning_phase" not in owner.scope_state:
        with owner.as_default(), owner.control_dependencies(None):
            owner.scope_state["learning_phase"] = placeholder_with_default(False, (), "keras_learning_phase")
    return owner.scope_state["learning_phase"]


def set_phase() -> Any:
    """Return the globally set training mode: 0, 1, or None if it was never set."""
    return _phase.value


def set_learning_phase(value: Any) -> None:
    """Set what `training` is in calls that are not told: 0 or 1 (None: each layer's own default)."""
    if value not in (0, 1, None):
        raise ValueError(f"set_learning_phase: not a phase. Expected 0, 1 or None; got {value!r}.")
    _phase.value = value


class _StateUpdates(threading.local):
    allowed = True


_state_updates = _StateUpdates()


@contextlib.contextmanager
def no_state_updates() -> Iterator[None]:
    """Keep moving statistics as they are inside the block: for recomputing a forward pass that was counted already.

    >>> import numpy as np, gpulayers as gl
    >>> layer = gl.layers.BatchNormalization()
    >>> with gl.no_state_updates():
    ...     _ = layer(np.array([[1.0], [3.0]], "float32"), training=True)
    >>> layer.moving_mean.numpy()
    array([0.], dtype=float32)
    """
    before, _state_updates.allowed = _state_updates.allowed, False
    try:
        yield
    finally:
        _state_updates.allowed = before


def state_updates_allowed() -> bool:
    """Say whether a training call may change moving statistics now."""
    return _state_updates.allowed
