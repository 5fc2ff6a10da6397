"""Dtypes, static shapes and policies."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpulayers as gl
from gpulayers import dtypes
from gpulayers.dtypes import Policy, TensorShape, broadcast_static_shape

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["float32", np.float32, np.dtype("float32"), Policy("float32")])
def test_as_dtype(value):
    assert dtypes.as_dtype(value) == np.float32 and dtypes.dtype_name(value) == "float32"


@pytest.mark.parametrize("value", ["float33", None, 3, [1.0]])
def test_things_that_are_no_dtype(value):
    with pytest.raises(TypeError, match="dtype"):
        dtypes.as_dtype(value)


def test_bfloat16_is_a_floating_dtype_of_two_bytes():
    pytest.importorskip("ml_dtypes")
    assert dtypes.as_dtype("bfloat16") == dtypes.bfloat16 and dtypes.bfloat16.itemsize == 2
    assert dtypes.is_floating("bfloat16") and dtypes.parameter_dtype("bfloat16") == np.float32


def test_bfloat16_stands_in_both_faces():
    assert gl.compat.v1.bfloat16 is gl.bfloat16 and gl.bfloat16.name == "bfloat16"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = gl.compat.v1.no_such_name


def test_parameter_dtype_is_float32_for_16_bits():
    names = ["float16", "float32", "float64", "int16"]
    assert [dtypes.parameter_dtype(d).name for d in names] == ["float32", "float32", "float64", "int16"]


def test_floating_dtypes():
    assert [d for d in ("float16", "float64", "int8", "bool", "complex64") if dtypes.is_floating(d)] == [
        "float16",
        "float64",
    ]


# --- static shapes ----------------------------------------------------------------------------------------------------


def test_a_shape_compares_with_tuples_and_lists():
    shape = TensorShape((None, 3))
    assert shape == (None, 3) and shape == [None, 3] and shape == TensorShape([None, 3])
    assert shape != (2, 3) and shape != "ab" and TensorShape(None) == None  # noqa: E711
    assert hash(shape) == hash(TensorShape((None, 3)))


def test_what_a_shape_knows():
    shape = TensorShape((None, 3))
    assert (shape.rank, shape.ndims, shape.dims, shape.as_list(), len(shape)) == (2, 2, [None, 3], [None, 3], 2)
    assert list(shape) == [None, 3] and shape[-1] == 3 and shape[1:] == (3,) and isinstance(shape[1:], TensorShape)
    assert not shape.is_fully_defined() and shape.num_elements() is None
    assert TensorShape((2, 3)).num_elements() == 6 and TensorShape(()).num_elements() == 1
    assert TensorShape(4) == (4,) and TensorShape(np.int64(4)) == (4,) and TensorShape(TensorShape(4)) == (4,)
    assert repr(shape) == "TensorShape([None, 3])" and str(shape) == "(None, 3)"


def test_a_shape_of_unknown_rank():
    unknown = TensorShape(None)
    assert unknown.rank is None and unknown.dims is None and not unknown and not unknown.is_fully_defined()
    assert repr(unknown) == "TensorShape(None)" and str(unknown) == "<unknown>"
    for use in (len, list, lambda s: s[0], lambda s: s.as_list()):
        with pytest.raises(ValueError, match="unknown rank"):
            use(unknown)
    assert unknown.is_compatible_with((1, 2)) and unknown.merge_with((1, 2)) == (1, 2)
    assert unknown.concatenate((1,)).rank is None
    assert bool(TensorShape(()))


@pytest.mark.parametrize("dims", ["ab", {"a": 1}, 1.5, [1.5], [True], ["a"], object()])
def test_things_that_are_no_shape(dims):
    with pytest.raises(TypeError, match="TensorShape"):
        TensorShape(dims)


def test_negative_sizes():
    with pytest.raises(ValueError, match="negative"):
        TensorShape([2, -1])


def test_merging_concatenating_and_ranks():
    a = TensorShape((None, 3))
    assert a.merge_with((2, None)) == (2, 3) and a + (4,) == (None, 3, 4) and (4,) + a == (4, None, 3)
    assert a.with_rank(2) == a
    assert a.is_compatible_with((7, 3)) and not a.is_compatible_with((7, 4)) and not a.is_compatible_with((3,))
    for wrong in (lambda: a.merge_with((2, 4)), lambda: a.with_rank(3), lambda: a.assert_is_compatible_with((3,))):
        with pytest.raises(ValueError, match=r"\(None, 3\).*incompatible"):
            wrong()


@given(SHAPES, SHAPES)
def test_broadcasting_is_numpys(a, b):
    try:
        expected = np.broadcast_shapes(a, b)
    except ValueError:
        with pytest.raises(ValueError, match="broadcast"):
            broadcast_static_shape(a, b)
        return
    assert broadcast_static_shape(a, b) == expected


@given(SHAPES, SHAPES, st.data())
def test_broadcasting_with_unknown_sizes_never_contradicts_what_comes_out(a, b, data):
    try:
        expected = np.broadcast_shapes(a, b)
    except ValueError:
        return
    hidden = tuple(None if data.draw(st.booleans()) else size for size in a)
    assert TensorShape(broadcast_static_shape(hidden, b)).is_compatible_with(expected)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((None, 3), (1,), (None, 3)),
        ((None,), (1,), (None,)),
        ((None,), (4,), (4,)),
        ((None,), (None,), (None,)),
        ((), (None, 2), (None, 2)),
        (None, (2,), None),
        ((0,), (1,), (0,)),
        ((0, 1), (1, 3), (0, 3)),
    ],
)
def test_broadcasting_with_unknown_sizes(a, b, expected):
    assert broadcast_static_shape(a, b) == expected == broadcast_static_shape(b, a)


# --- policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "compute", "variable"),
    [
        ("float32", "float32", "float32"),
        ("float16", "float16", "float16"),
        ("float64", "float64", "float64"),
        ("int32", "int32", "int32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("mixed_float16", "float16", "float32"),
        ("mixed_bfloat16", "bfloat16", "float32"),
        ("_infer", None, None),
    ],
)
def test_policy_table(name, compute, variable):
    policy = Policy(name)
    assert (policy.name, policy.compute_dtype, policy.variable_dtype) == (name, compute, variable)
    assert repr(policy) == f'<Policy "{name}">'
    assert policy.get_config() == {"name": name}
    assert Policy.from_config(policy.get_config()).name == name


def test_policies_are_not_equal_by_value():
    assert Policy("float32") != Policy("float32")


@pytest.mark.parametrize("name", [np.float32, np.dtype("float32"), 32, None])
def test_a_policys_name_is_a_string(name):
    with pytest.raises(TypeError, match="not a string"):
        Policy(name)


@pytest.mark.parametrize("name", ["float31", "mixed_float64", "float16_with_float32_vars", "infer_float32_vars", ""])
def test_unknown_policies(name):
    with pytest.raises(ValueError, match="unknown policy"):
        Policy(name)


def test_the_global_policy():
    assert dtypes.global_policy().name == "float32"
    try:
        dtypes.set_global_policy("mixed_float16")
        assert dtypes.global_policy().compute_dtype == "float16"
        for wrong in ("int32", "_infer", Policy("bool")):
            with pytest.raises(ValueError, match="floating"):
                dtypes.set_global_policy(wrong)
    finally:
        dtypes.set_global_policy(None)
    assert dtypes.global_policy().name == "float32"
