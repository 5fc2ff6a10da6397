"""Turn objects into plain data and back, by name.

A configuration is data: a name, or a dictionary with ``class_name`` and ``config``. Reading one looks the name up in
tables of known classes and functions. Nothing is ever imported, unpickled or executed because a configuration names it;
what is not in a table has to be registered or handed in.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from gpulayers.errors import message

__all__ = [
    "custom_object_scope",
    "deserialize",
    "find",
    "register_serializable",
    "registered_name",
    "serialize",
    "to_json",
]

Registered = TypeVar("Registered", bound=Callable[..., Any])

_registered: dict[str, Any] = {}
_names: dict[Any, str] = {}


class _Scopes(threading.local):
    def __init__(self) -> None:
        self.stack: list[Mapping[str, Any]] = []


_scopes = _Scopes()


def register_serializable(package: str = "Custom", name: str | None = None) -> Callable[[Registered], Registered]:
    """Decorator: make a class or function known to `deserialize` as ``package>name``, and as plain `name`.

    `name`: the object's own name if not given. Raises ValueError for a class without `get_config`.
    Source: ``tf.keras.utils.register_keras_serializable``.

    >>> @register_serializable("Mine")
    ... def double(x):
    ...     return 2 * x
    >>> serialize(double), deserialize("Mine>double")(4)
    ('Mine>double', 8)
    """

    def decorate(thing: Registered) -> Registered:
        if inspect.isclass(thing) and not hasattr(thing, "get_config"):
            raise ValueError(
                message("register_serializable", f"{thing.__name__} cannot be written as data", "a get_config method")
            )
        full = f"{package}>{name or thing.__name__}"
        _registered[full] = thing
        _names[thing] = full
        return thing

    return decorate


def registered_name(thing: Any) -> str | None:
    """Return the ``package>name`` that a class or function was registered under, or None.

    >>> registered_name(int) is None
    True
    """
    try:
        return _names.get(thing)
    except TypeError:  # not hashable, so never registered
        return None


@contextlib.contextmanager
def custom_object_scope(objects: Mapping[str, Any]) -> Iterator[None]:
    """Make the named classes and functions known to `deserialize` inside the block.

    >>> with custom_object_scope({"seven": lambda: 7}):
    ...     deserialize("seven")()
    7
    """
    _scopes.stack.append(objects)
    try:
        yield
    finally:
        _scopes.stack.pop()


def serialize(thing: Any) -> Any:
    """Return plain data from which `deserialize` makes `thing` again.

    An object with `get_config` gives ``{"module", "class_name", "config", "registered_name"}``; a function or a class
    gives its name; None gives None. Raises ValueError for anything else, a lambda included: it has no name.

    >>> from gpulayers import regularizers
    >>> serialize(regularizers.L1(0.5))["config"]
    {'l1': 0.5}
    """
    if thing is None or isinstance(thing, str):
        return thing
    if hasattr(thing, "get_config") and not inspect.isclass(thing):
        kind = type(thing)
        return {
            "module": kind.__module__,
            "class_name": kind.__name__,
            "config": thing.get_config(),
            "registered_name": registered_name(kind),
        }
    name = registered_name(thing) or getattr(thing, "__name__", None)
    if name is None or name == "<lambda>":
        raise ValueError(
            message("serialize", "cannot be written as data", "a get_config method or a named function", repr(thing))
        )
    return name


def to_json(config: Any, **options: Any) -> str:
    """Return a configuration as JSON text. `options` go to ``json.dumps``.

    A function or other object that stands in it as itself serves within this process only, so it is refused: ValueError
    says how to register it. NumPy numbers and shapes become numbers and lists.

    >>> to_json({"units": 2, "name": None})
    '{"units": 2, "name": null}'
    """
    return json.dumps(config, default=_as_json, **options)


def _as_json(thing: Any) -> Any:
    """Return the JSON form of what the encoder does not know, or refuse it."""
    name = registered_name(thing)
    if name is not None:
        return name
    if hasattr(thing, "tolist"):
        return thing.tolist()
    if hasattr(thing, "as_list"):
        return thing.as_list()
    raise ValueError(
        message(
            "to_json",
            f"{thing!r} is an object of this process and cannot be written",
            "names, numbers, lists and dictionaries",
            type(thing).__name__,
            "Decorate the function with @gl.keras.utils.register_serializable('MyPackage') and make the configuration "
            "again: it then stands there by its name.",
        )
    )


def _tables(custom_objects: Mapping[str, Any] | None, table: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the tables to look into, first come first served: what the caller gives goes before what we know."""
    return [custom_objects or {}, *reversed(_scopes.stack), _registered, table or {}]


def find(
    name: str,
    custom_objects: Mapping[str, Any] | None = None,
    table: Mapping[str, Any] | None = None,
    what: str = "name",
) -> Any:
    """Return the class or function known as `name`. Raises ValueError, listing the known ones, if there is none."""
    for known in _tables(custom_objects, table):
        if name in known:
            return known[name]
    matches = [thing for full, thing in _registered.items() if full.partition(">")[2] == name]
    if matches:
        return matches[-1]
    raise ValueError(
        message(
            what,
            f"{name!r} is not known",
            ", ".join(sorted(table or _registered)) or "a registered name",
            repr(name),
            "Register it with gl.keras.utils.register_serializable, or pass it in custom_objects.",
        )
    )


def deserialize(
    config: Any,
    custom_objects: Mapping[str, Any] | None = None,
    table: Mapping[str, Any] | None = None,
    what: str = "deserialize",
) -> Any:
    """Return the object that `config` describes.

    - a name of a function: the function; a name of a class: an instance made without arguments;
    - ``{"class_name": ..., "config": {...}}``, with or without the other entries of `serialize`: an instance made by
      the class's `from_config`, or by calling the class with the entries of ``config``;
    - None: None.

    Names are looked up in `custom_objects`, the enclosing `custom_object_scope`, what was registered, and `table`.
    ``module`` is ignored: nothing is imported. `what` names the caller in errors.
    Raises ValueError for an unknown name or another form.

    >>> from gpulayers import regularizers
    >>> deserialize({"class_name": "L1", "config": {"l1": 0.5}}, table=regularizers.NAMES).get_config()
    {'l1': 0.5}
    """
    if config is None:
        return None
    if isinstance(config, str):
        found = find(config, custom_objects, table, what)
        return found() if inspect.isclass(found) else found
    if not isinstance(config, Mapping) or not isinstance(config.get("class_name"), str):
        wanted = "a name, or a dictionary with class_name"
        raise ValueError(message(what, "not a configuration", wanted, repr(config)))
    settings = config.get("config")
    if config["class_name"] == "function" and isinstance(settings, str):
        return find(config.get("registered_name") or settings, custom_objects, table, what)
    name = config.get("registered_name")
    if not isinstance(name, str) or not _is_known(name, custom_objects, table):
        name = config["class_name"]
    return _make(find(name, custom_objects, table, what), settings, what)


def _is_known(name: str, custom_objects: Mapping[str, Any] | None, table: Mapping[str, Any] | None) -> bool:
    return any(name in known for known in _tables(custom_objects, table))


def _make(found: Any, settings: Any, what: str) -> Any:
    """Make an instance of `found` from the entries of its configuration."""
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping):
        raise ValueError(message(what, "config is not a dictionary", "a dictionary", repr(settings)))
    if not inspect.isclass(found):
        return found if not settings else found(**settings)
    if hasattr(found, "from_config"):
        return found.from_config(dict(settings))
    return found(**settings)
