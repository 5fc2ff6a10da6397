"""Nested structures."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpulayers import nest

Pair = collections.namedtuple("Pair", "left right")
STRUCTURES = st.recursive(
    st.integers(),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.builds(Pair, inner, inner),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
    ),
    max_leaves=8,
)


@given(STRUCTURES)
def test_packing_what_was_flattened_gives_the_structure_back(structure):
    assert nest.pack_sequence_as(structure, nest.flatten(structure)) == structure
    assert nest.map_structure(lambda x: x, structure) == structure
    nest.assert_same_structure(structure, structure)


@given(STRUCTURES)
def test_mapping_visits_the_leaves_in_the_order_of_flatten(structure):
    seen = []
    nest.map_structure(seen.append, structure)
    assert seen == nest.flatten(structure)


def test_dictionaries_are_taken_in_key_order_and_keep_their_own():
    d = {"b": 1, "a": 2}
    assert nest.flatten(d) == [2, 1]
    packed = nest.pack_sequence_as(d, [20, 10])
    assert packed == {"a": 20, "b": 10} and list(packed) == ["b", "a"]
    assert nest.flatten({1: "x", "a": "y"}) == ["x", "y"]


def test_kinds_of_containers_are_kept():
    ordered = collections.OrderedDict(b=1, a=2)
    assert type(nest.map_structure(str, ordered)) is collections.OrderedDict
    assert nest.map_structure(str, Pair(1, (2,))) == Pair("1", ("2",))
    assert nest.flatten("ab") == ["ab"] and nest.flatten(None) == [None]
    assert nest.flatten([]) == [] and nest.map_structure(str, {}) == {}


def test_several_structures_side_by_side():
    assert nest.map_structure(lambda a, b: a + b, [1, {"x": 2}], [10, {"x": 20}]) == [11, {"x": 22}]


@pytest.mark.parametrize(
    ("a", "b", "error"),
    [
        ([1], [1, 2], ValueError),
        ([1], 1, ValueError),
        ({"a": 1}, {"b": 1}, ValueError),
        ([1], (1,), TypeError),
        ([1], {"a": 1}, TypeError),
        ((1, 2), Pair(1, 2), TypeError),
        ([[1], 2], [1, [2]], ValueError),
    ],
)
def test_structures_that_differ(a, b, error):
    with pytest.raises(error, match="nest"):
        nest.assert_same_structure(a, b)
    with pytest.raises(error):
        nest.map_structure(lambda x, y: None, a, b)


def test_types_of_containers_may_be_left_unchecked():
    nest.assert_same_structure([1], (1,), check_types=False)


@pytest.mark.parametrize(("structure", "leaves"), [([1, 2], [1]), ([1], [1, 2]), (1, []), ({"a": 1}, [1, 2])])
def test_another_number_of_leaves(structure, leaves):
    with pytest.raises(ValueError, match="nest"):
        nest.pack_sequence_as(structure, leaves)
