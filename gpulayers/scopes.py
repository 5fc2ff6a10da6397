"""Variable scopes: names, sharing and defaults of variables; name scopes; collections.

A graph has one store of variables by full name. Eager mode has a store too, which forgets variables that nobody holds
any more: there, a new variable may take the name of an old one, and only ``reuse`` finds the old one.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

from gpulayers import initializers
from gpulayers.device import asarray
from gpulayers.dtypes import TensorShape, as_dtype, float32, is_floating
from gpulayers.errors import LayerError, ShapeError, message
from gpulayers.ops.operation import Recordable
from gpulayers.trace import GraphKeys, active_graph
from gpulayers.trace.graph import check_scope_name
from gpulayers.variables import PartitionedVariable, PartitionInfo, Variable, part_extents, partition_counts

__all__ = [
    "AUTO_REUSE",
    "VariableScope",
    "add_to_collection",
    "add_to_collections",
    "find_variable",
    "get_collection",
    "get_collection_ref",
    "get_variable",
    "get_variable_scope",
    "local_variables",
    "name_scope",
    "trainable_variables",
    "variable_scope",
]


class _AutoReuse:
    def __repr__(self) -> str:
        return "AUTO_REUSE"


AUTO_REUSE: Any = _AutoReuse()
"""Share a variable of this name if there is one, make it otherwise."""


class VariableScope:
    """A prefix for names of variables, with defaults for making them. Entered with `variable_scope`.

    Source: ``tf.compat.v1.VariableScope``.
    """

    def __init__(self, name: str = "", original_name_scope: str = "", **defaults: Any) -> None:
        self.name, self.original_name_scope = name, original_name_scope
        self.reuse = defaults.get("reuse", False)
        self.initializer = defaults.get("initializer")
        self.regularizer = defaults.get("regularizer")
        self.partitioner = defaults.get("partitioner")
        self.custom_getter = defaults.get("custom_getter")
        self.constraint = defaults.get("constraint")
        self.dtype = defaults.get("dtype", float32)

    def reuse_variables(self) -> None:
        """Share existing variables from here on, in this scope."""
        self.reuse = True

    def set_partitioner(self, partitioner: Any) -> None:
        """Set the partitioner of variables made from here on."""
        self.partitioner = partitioner

    def set_initializer(self, initializer: Any) -> None:
        """Set the initializer of variables made from here on."""
        self.initializer = initializer

    def set_regularizer(self, regularizer: Any) -> None:
        """Set the regularizer of variables made from here on."""
        self.regularizer = regularizer

    def get_collection(self, key: str) -> list[Any]:
        """Return what a collection of the graph holds of this scope, by the names."""
        return get_collection(key, f"{self.name}/" if self.name else None)

    def global_variables(self) -> list[Variable]:
        """Return this scope's variables."""
        return self.get_collection(GraphKeys.GLOBAL_VARIABLES)

    def trainable_variables(self) -> list[Variable]:
        """Return this scope's variables that were made trainable."""
        return self.get_collection(GraphKeys.TRAINABLE_VARIABLES)

    def defaults(self) -> dict[str, Any]:
        """Return all but the names."""
        return {k: v for k, v in vars(self).items() if k not in ("name", "original_name_scope")}

    def get_variable(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        """As the function `get_variable`, in this scope."""
        return _get_variable(self, name, *arguments, **keywords)


class _ScopeState:
    """What scopes count and keep, for a graph or for eager mode."""

    def __init__(self, variables: MutableMapping[str, Any], shares_silently: bool) -> None:
        self.current = VariableScope()
        self.variables = variables
        self.opened: dict[str, int] = {}
        self.shares_silently = shares_silently

    def unique(self, name: str) -> str:
        prefix = f"{self.current.name}/" if self.current.name else ""
        if not self.opened.get(prefix + name):
            return name
        number = 1
        while self.opened.get(f"{prefix}{name}_{number}"):
            number += 1
        return f"{name}_{number}"

    def close_below(self, name: str) -> None:
        for other in self.opened:
            if other.startswith(f"{name}/"):
                self.opened[other] = 0


_eager = _ScopeState(weakref.WeakValueDictionary(), shares_silently=False)


def _state() -> _ScopeState:
    graph = active_graph()
    if graph is None or not graph.initializes_variables_in_session:
        return _eager
    found: _ScopeState = graph.scope_state.setdefault("scopes", None) or _ScopeState({}, shares_silently=True)
    graph.scope_state["scopes"] = found
    return found


def get_variable_scope() -> VariableScope:
    """Return the scope in force."""
    return _state().current


@contextlib.contextmanager
def variable_scope(
    name_or_scope: str | VariableScope | None = None,
    default_name: str | None = None,
    values: Any = None,
    initializer: Any = None,
    regularizer: Any = None,
    caching_device: Any = None,
    partitioner: Any = None,
    custom_getter: Callable[..., Any] | None = None,
    reuse: Any = None,
    dtype: Any = None,
    use_resource: Any = None,
    constraint: Any = None,
    auxiliary_name_scope: bool = True,
) -> Iterator[VariableScope]:
    """Prefix the names of variables made inside, and set defaults for them.

    Parameters

    - `name_or_scope`: a name, opened inside the present scope; or a `VariableScope`, entered exactly.
    - `default_name`: used if there is no name, with a number behind it if it was opened before in the present scope.
    - `reuse`: True shares existing variables only, `AUTO_REUSE` shares or makes them. None and False inherit: from the
      scope around a name, from a `VariableScope` itself.
    - `initializer`, `regularizer`, `partitioner`, `custom_getter`, `dtype`: defaults inside, and in scopes inside.
    - `constraint`: a default for variables made right here; scopes inside, and so layers, do not inherit it.
    - `auxiliary_name_scope`: open a name scope for operations too.

    Raises TypeError for no name at all or one of another type; ValueError for a name that is not legal, a `reuse` that
    is none of the above, and `reuse` beside a default name, which is always new.
    Source: ``tf.compat.v1.variable_scope``; `caching_device`, `use_resource` and `values` have no meaning here.

    >>> import gpulayers as gl
    >>> with gl.Graph().as_default(), gl.variable_scope("outer"):
    ...     print(gl.get_variable("w", (2,)).name)
    outer/w:0
    """
    reuse = _checked_reuse(name_or_scope, default_name, reuse)
    state = _state()
    before = state.current
    given = {
        "reuse": reuse,
        "initializer": initializer,
        "regularizer": regularizer,
        "partitioner": partitioner,
        "dtype": dtype,
    }
    with contextlib.ExitStack() as stack:
        if isinstance(name_or_scope, VariableScope):
            source, name, original = name_or_scope, name_or_scope.name, name_or_scope.original_name_scope
            _enter_name_scope(stack, name.rpartition("/")[2], auxiliary_name_scope)
        else:
            source, part = before, name_or_scope if name_or_scope is not None else str(default_name)
            original = _enter_name_scope(stack, part, auxiliary_name_scope)
            part = part if name_or_scope is not None else state.unique(part)
            name = f"{before.name}/{part}" if before.name else part
        defaults = {**source.defaults(), "constraint": constraint}
        defaults.update({key: value for key, value in given.items() if value is not None})
        if custom_getter is not None:
            defaults["custom_getter"] = _compose(custom_getter, source.custom_getter)
        state.opened[name] = state.opened.get(name, 0) + 1
        opened = dict(state.opened)
        state.current = scope = VariableScope(name, original, **defaults)
        try:
            yield scope
        finally:
            state.current = before
            if source is name_or_scope:
                state.opened = opened
            else:
                state.close_below(name)


def _checked_reuse(name_or_scope: Any, default_name: Any, reuse: Any) -> Any:
    """Return `reuse`, None where the scope inherits. Raises TypeError and ValueError as `variable_scope` says."""
    if name_or_scope is None and default_name is None:
        raise TypeError(message("variable_scope", "has no name", "name_or_scope or default_name"))
    if name_or_scope is not None and not isinstance(name_or_scope, str | VariableScope):
        raise TypeError(
            message("variable_scope", "name_or_scope is of a wrong type", "a str or a VariableScope", name_or_scope)
        )
    if reuse is None or reuse is False:
        return None
    if reuse is not True and reuse is not AUTO_REUSE:
        raise LayerError(message("variable_scope", "reuse is not known", "True, False, None or AUTO_REUSE", reuse))
    if name_or_scope is None:
        raise LayerError(
            message("variable_scope", f"reuse={reuse} cannot be used without name_or_scope: a default name is new")
        )
    return reuse


def _enter_name_scope(stack: contextlib.ExitStack, part: str, auxiliary: bool) -> str:
    """Open a scope for the names of operations, if it is asked for and has a name; return the prefix of `part`."""
    graph = active_graph()
    if part:
        check_scope_name(part)
    if graph is None:
        return f"{part}/" if part else ""
    if not auxiliary:
        return graph.current_name_scope
    return stack.enter_context(graph.name_scope(part)) if part else ""


def _compose(inner: Callable[..., Any], outer: Callable[..., Any] | None) -> Callable[..., Any]:
    if outer is None:
        return inner
    return lambda getter, *arguments, **keywords: inner(functools.partial(outer, getter), *arguments, **keywords)


def get_variable(name: str, *arguments: Any, **keywords: Any) -> Any:
    """Make a variable in the present scope, or share the one of this name.

    Parameters, in this order: `name`, `shape`, `dtype`, `initializer` (a callable, a name, or the initial value: an
    array, number, list or tensor, which gives the shape, and the dtype if none is asked for; a function without
    arguments gives the shape too), `regularizer`, `trainable`, `collections`, `caching_device`, `partitioner`,
    `validate_shape`, `use_resource`, `custom_getter`, `constraint`. What is not given is taken from the scope; without
    any initializer it is Glorot uniform for floating dtypes and zeros otherwise.

    Returns a `Variable`, or a `PartitionedVariable` where a partitioner is in force. State written: the graph's
    collections; the scope's regularizer adds to REGULARIZATION_LOSSES.
    Raises TypeError for a name that is no str; ValueError: it exists and the scope does not reuse, it does not exist
    and the scope only reuses, or it exists with another shape or dtype. Source: ``tf.compat.v1.get_variable``.
    """
    return get_variable_scope().get_variable(name, *arguments, **keywords)


def _get_variable(
    scope: VariableScope,
    name: str,
    shape: Any = None,
    dtype: Any = None,
    initializer: Any = None,
    regularizer: Any = None,
    trainable: bool | None = None,
    collections: Any = None,
    caching_device: Any = None,
    partitioner: Any = None,
    validate_shape: bool = True,
    use_resource: Any = None,
    custom_getter: Callable[..., Any] | None = None,
    constraint: Any = None,
    synchronization: Any = None,
    aggregation: Any = None,
    reuse: Any = None,
    experimental_autocast: bool = False,
) -> Any:
    if not isinstance(name, str):
        raise TypeError(message("get_variable", "the name is of a wrong type", "a str", repr(name)))
    full_name = f"{scope.name}/{name}" if scope.name else name
    partitioner = scope.partitioner if partitioner is None else partitioner
    initializer = scope.initializer if initializer is None else initializer
    if _is_value(initializer):
        initializer = initializer if hasattr(initializer, "dtype") else asarray(initializer)
        shape, dtype = initializer.shape if shape is None else shape, dtype or initializer.dtype
    if partitioner is not None and TensorShape(shape).rank == 0:
        partitioner = None
    keywords = {
        "shape": shape,
        "dtype": dtype if dtype is not None else scope.dtype,
        "initializer": initializer,
        "regularizer": scope.regularizer if regularizer is None else regularizer,
        "trainable": True if trainable is None else trainable,
        "collections": collections,
        "partitioner": None if partitioner is False else partitioner,
        "constraint": scope.constraint if constraint is None else constraint,
        "reuse": scope.reuse if reuse is None else reuse,
        "experimental_autocast": experimental_autocast,
    }
    getter = _compose(custom_getter, scope.custom_getter) if custom_getter is not None else scope.custom_getter
    if getter is not None:
        return getter(_create_or_share, full_name, **keywords)
    return _create_or_share(full_name, **keywords)


def _create_or_share(name: str, **keywords: Any) -> Any:
    """Share the variable of this full name, or make it, as `reuse` asks."""
    state = _state()
    reuse = keywords.pop("reuse", False)
    regularizer = keywords.pop("regularizer", None)
    found = state.variables.get(name)
    if found is not None and not (reuse is False and not state.shares_silently):
        if not reuse:
            raise LayerError(
                message(
                    name,
                    "Variable already exists, disallowed",
                    do="Set reuse=True or reuse=AUTO_REUSE in the variable scope, or use another name.",
                )
            )
        _check_shared(found, keywords["shape"], keywords["dtype"])
        return found
    if reuse is True:
        raise LayerError(
            message(
                name, "Variable does not exist, or was not made with get_variable", do="Set reuse=AUTO_REUSE or False."
            )
        )
    if active_graph() is not None:
        check_scope_name(name)
    keywords["shape"] = _known_shape(name, keywords["shape"], keywords["initializer"])
    made = _create(name, **keywords)
    state.variables[name] = made
    if regularizer is not None:
        for part in made if isinstance(made, PartitionedVariable) else [made]:
            loss = regularizer(part)
            if loss is not None:
                add_to_collection(GraphKeys.REGULARIZATION_LOSSES, loss)
    return made


def _check_shared(found: Any, shape: Any, dtype: Any) -> None:
    if shape is not None and not TensorShape(shape).is_compatible_with(found.shape):
        raise ShapeError(
            f"Trying to share variable {found.name.partition(':')[0]}, but specified shape {TensorShape(shape)} "
            f"and found shape {TensorShape(found.shape)}."
        )
    stored = found.static_dtype if isinstance(found, Variable) else found.dtype
    if as_dtype(dtype) != stored:
        raise LayerError(
            f"Trying to share variable {found.name.partition(':')[0]}, but specified dtype {as_dtype(dtype).name} "
            f"and found dtype {stored.name}."
        )


def _is_value(initializer: Any) -> bool:
    """Say whether `initializer` is the initial value itself: an array, a number, a list or a tensor."""
    return isinstance(initializer, Recordable) or not (
        initializer is None or callable(initializer) or isinstance(initializer, str | dict)
    )


def _known_shape(name: str, shape: Any, initializer: Any) -> tuple[int, ...] | None:
    """Return the shape of a new variable, or None where a function without arguments gives it."""
    if shape is None:
        function = callable(initializer) and not isinstance(initializer, type)
        if function and not inspect.signature(initializer).parameters:
            return None
        raise ShapeError(message(name, "has no shape", "a shape, or an initial value as initializer"))
    static = TensorShape(shape)
    if not static.is_fully_defined():
        raise ShapeError(message(name, "Shape of a new variable must be fully defined", got=static))
    return tuple(static)  # type: ignore[arg-type]


def _create(
    name: str,
    *,
    shape: tuple[int, ...] | None,
    dtype: Any,
    initializer: Any,
    trainable: bool,
    partitioner: Any,
    collections: Any,
    constraint: Any,
    experimental_autocast: bool,
) -> Any:
    dtype = as_dtype(dtype)
    make = functools.partial(
        Variable, trainable=trainable, dtype=dtype, constraint=constraint, collections=collections,
        autocast=experimental_autocast, unique_name=False,
    )  # fmt: skip
    if shape is None:
        return make(initializer, name=name)
    if partitioner is None:
        return make(initial_value_maker(initializer, shape, dtype), name=name, shape=shape)
    counts = partition_counts(partitioner, shape, dtype)
    parts = []
    for index, (part_shape, offset) in enumerate(part_extents(shape, counts)):
        initial = initial_value_maker(initializer, tuple(part_shape), dtype, PartitionInfo(shape, offset))
        parts.append(make(initial, name=f"{name}/part_{index}", shape=part_shape))
    return PartitionedVariable(name, shape, dtype, parts, counts)


def initial_value_maker(initializer: Any, shape: tuple[int, ...], dtype: Any, partition_info: Any = None) -> Any:
    """Return what `Variable` takes as its initial value: a function that draws it, or the given array."""
    if initializer is None:
        if dtype.kind == "c":
            raise LayerError(
                message("get_variable", f"no default initializer for {dtype.name}", do="Pass an initializer.")
            )
        initializer = "glorot_uniform" if is_floating(dtype) else "zeros"
    if isinstance(initializer, str | dict | type):
        initializer = initializers.get(initializer)
    if not callable(initializer) or isinstance(initializer, Recordable):
        return initializer
    keywords = {"dtype": dtype}
    try:
        signature = inspect.signature(initializer)
    except (TypeError, ValueError):  # a built-in function may not say what it takes
        return functools.partial(initializer, shape, **keywords)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    if "partition_info" in signature.parameters or (takes_any and partition_info is not None):
        keywords["partition_info"] = partition_info
    signature.bind(shape, **keywords)  # the TypeError belongs here: a graph calls it later
    return functools.partial(initializer, shape, **keywords)


def find_variable(full_name: str) -> Any:
    """Return the variable of this full name, or None."""
    return _state().variables.get(full_name)


# --- names and collections --------------------------------------------------------------------------------------------


def name_scope(name: str | None, default_name: str | None = None, values: Any = None) -> Any:
    """Prefix the names of nodes recorded inside the block; in eager mode it only yields the prefix.

    Source: ``tf.name_scope``.
    """
    graph = active_graph()
    chosen = name if name is not None else default_name
    if graph is None:
        return contextlib.nullcontext(f"{chosen}/" if chosen else "")
    return graph.name_scope(chosen)


def add_to_collection(name: str, value: Any) -> None:
    """Add `value` to a collection of the graph; eager mode has no collections, so nothing happens there."""
    graph = active_graph()
    if graph is not None:
        graph.add_to_collection(name, value)


def add_to_collections(names: str | Iterable[str], value: Any) -> None:
    """Add `value` to each of several collections of the graph; one name is taken too. In eager mode nothing happens.

    Source: ``tf.compat.v1.add_to_collections``.

    >>> import gpulayers as gl
    >>> with gl.Graph().as_default():
    ...     gl.add_to_collections(["losses", "mine"], 1.0)
    ...     print(gl.get_collection("losses"), gl.get_collection("mine"))
    [1.0] [1.0]
    """
    for name in dict.fromkeys([names] if isinstance(names, str) else names):
        add_to_collection(name, value)


def get_collection(key: str, scope: str | None = None) -> list[Any]:
    """Return a copy of a collection of the graph; an empty list in eager mode.

    `scope`: only items whose name matches this regular expression. Source: ``tf.compat.v1.get_collection``.
    """
    graph = active_graph()
    return [] if graph is None else graph.get_collection(key, scope)


def get_collection_ref(key: str) -> list[Any]:
    """Return a collection of the graph itself, to be changed in place; an empty list in eager mode."""
    graph = active_graph()
    return [] if graph is None else graph.get_collection_ref(key)


def trainable_variables(scope: str | None = None) -> list[Variable]:
    """Return the graph's variables that were made trainable."""
    return get_collection(GraphKeys.TRAINABLE_VARIABLES, scope)


def global_variables(scope: str | None = None) -> list[Variable]:
    """Return all of the graph's variables."""
    return get_collection(GraphKeys.GLOBAL_VARIABLES, scope)


def local_variables(scope: str | None = None) -> list[Variable]:
    """Return the graph's variables of the collection LOCAL_VARIABLES, where a variable's `collections` may put it.

    Metrics are not among them: they keep their values elsewhere.
    Source: ``tf.compat.v1.local_variables``.
    """
    return get_collection(GraphKeys.LOCAL_VARIABLES, scope)
