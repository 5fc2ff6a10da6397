"""The one step counter of a graph: what ``minimize(loss, global_step)`` adds 1 to."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from gpulayers.errors import message
from gpulayers.scopes import get_variable
from gpulayers.trace import GraphKeys, get_default_graph
from gpulayers.trace.graph import Graph, active_graph

__all__ = ["create_global_step", "get_global_step", "get_or_create_global_step"]


def get_global_step(graph: Graph | None = None) -> Any:
    """Return the step counter of `graph`, or None if it has none.

    That is the variable in the collection GLOBAL_STEP, else one named ``global_step``. `graph`: None for the graph in
    force; eager mode keeps its counter with the process's default graph. Raises TypeError if the counter is no scalar
    of an integer dtype, ValueError for several in the collection (TensorFlow: None).
    Source: ``tf.compat.v1.train.get_global_step``.
    """
    graph = (graph or get_default_graph()).owner
    found = graph.get_collection(GraphKeys.GLOBAL_STEP)
    if len(found) > 1:
        names = [step.name for step in found]
        raise ValueError(message("get_global_step", "there are several step counters", "one in GLOBAL_STEP", names))
    named = [v for v in graph.get_collection(GraphKeys.GLOBAL_VARIABLES) if v.name == "global_step:0"]
    step = next(iter(found + named), None)
    if step is not None and (tuple(step.shape) != () or np.dtype(step.dtype).kind not in "iu"):
        got = f"{np.dtype(step.dtype).name}{list(step.shape)}"
        raise TypeError(message("get_global_step", "the step counter cannot count", "a scalar integer variable", got))
    return step


def create_global_step(graph: Graph | None = None) -> Any:
    """Make the step counter of `graph`: an int64 variable 0 named ``global_step``, in the collection GLOBAL_STEP.

    Raises ValueError if there is one. Otherwise as `get_global_step`.
    Source: ``tf.compat.v1.train.create_global_step``.
    """
    if get_global_step(graph) is not None:
        raise ValueError(message("create_global_step", '"global_step" already exists', do="Use get_global_step()."))
    keys = [GraphKeys.GLOBAL_VARIABLES, GraphKeys.GLOBAL_STEP]
    with contextlib.nullcontext() if graph is None else graph.as_default():
        step = get_variable("global_step", (), "int64", "zeros", trainable=False, collections=keys, partitioner=False)
        if active_graph() is None:
            get_default_graph().add_to_collection(GraphKeys.GLOBAL_STEP, step)
    return step


def get_or_create_global_step(graph: Graph | None = None) -> Any:
    """Return the step counter of `graph`; it is made if there is none.

    Source: ``tf.compat.v1.train.get_or_create_global_step``.

    >>> import gpulayers as tf
    >>> with tf.Graph().as_default(), tf.Session() as session:
    ...     w = tf.get_variable("w", ())
    ...     step = tf.train.get_or_create_global_step()
    ...     train = tf.train.GradientDescentOptimizer(0.1).minimize(w * w, global_step=step)
    ...     session.run(tf.global_variables_initializer())
    ...     for _ in range(3):
    ...         session.run(train)
    ...     print(session.run(tf.train.get_global_step()))
    3
    """
    step = get_global_step(graph)
    return create_global_step(graph) if step is None else step
