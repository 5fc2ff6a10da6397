"""Configurations are data: names are looked up, nothing is imported or run."""

from __future__ import annotations

import sys

import pytest

from gpulayers import initializers, regularizers, serialization
from gpulayers.serialization import custom_object_scope, deserialize, register_serializable, serialize


class Plain:
    def __init__(self, size=1):
        self.size = size

    def get_config(self):
        return {"size": self.size}


def test_an_instance_round_trips_through_its_registered_name():
    @register_serializable("RoundTrip")
    class Kept(Plain):
        pass

    data = serialize(Kept(3))
    assert data["registered_name"] == "RoundTrip>Kept" and data["config"] == {"size": 3}
    again = deserialize(data)
    assert type(again) is Kept and again.size == 3
    assert type(deserialize("Kept")) is Kept and type(deserialize("RoundTrip>Kept")) is Kept


def test_a_registered_name_may_differ():
    @register_serializable("Other", "short")
    def a_long_name(x):
        return x

    assert serialize(a_long_name) == "Other>short" and deserialize("Other>short") is a_long_name


def test_registering_needs_get_config():
    with pytest.raises(ValueError, match="get_config"):

        @register_serializable()
        class Bare:
            pass


def test_custom_objects_and_scope_go_first():
    class Mine(Plain):
        pass

    data = {"class_name": "L1", "config": {"size": 4}}
    assert type(deserialize(data, {"L1": Mine}, regularizers.NAMES)) is Mine
    with custom_object_scope({"L1": Mine}):
        assert type(deserialize(data, table=regularizers.NAMES)) is Mine
    with pytest.raises(TypeError):
        deserialize(data, table=regularizers.NAMES)  # L1 has no size


def test_a_foreign_module_is_ignored():
    data = {"module": "keras.initializers", "class_name": "Constant", "config": {"value": 2}, "registered_name": None}
    assert initializers.deserialize(data).value == 2


@pytest.mark.parametrize(
    "data",
    [
        "antigravity",
        {"module": "antigravity", "class_name": "fly", "config": {}},
        {"class_name": "os.system", "config": {"command": "true"}},
        {"class_name": "__lambda__", "config": {"value": "4wEAAAAA"}},
        {"class_name": "function", "config": "os.system", "module": "builtins"},
        {"class_name": "eval", "config": {}},
    ],
)
def test_nothing_is_imported_or_run(data):
    with pytest.raises(ValueError, match="not known"):
        initializers.deserialize(data)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("data", [3, [], {}, {"class_name": 3}, {"class_name": "L1", "config": [1]}])
def test_other_forms_are_refused(data):
    with pytest.raises(ValueError):
        deserialize(data, table=regularizers.NAMES)


def test_functions_by_name():
    def half(x):
        return x / 2

    assert serialize(half) == "half" and deserialize("half", {"half": half}) is half
    assert deserialize({"class_name": "function", "config": "half"}, {"half": half}) is half
    assert serialize(None) is None and deserialize(None) is None


def test_a_lambda_has_no_name():
    with pytest.raises(ValueError, match="named function"):
        serialize(lambda x: x)


def test_the_error_lists_what_is_known():
    with pytest.raises(ValueError, match="OrthogonalRegularizer") as error:
        deserialize("l3", table=regularizers.NAMES, what="regularizer")
    assert "regularizer: 'l3' is not known" in str(error.value)


def test_the_latest_registration_of_a_short_name_wins():
    @register_serializable("First", "twice")
    def one(x):
        return 1

    @register_serializable("Second", "twice")
    def two(x):
        return 2

    assert serialization.find("twice") is two and serialization.find("First>twice") is one
