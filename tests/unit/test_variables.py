"""Variables: values, assignment, views of them, partitioned variables and the partitioners."""

import contextlib
import copy
import gc
import weakref

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.errors import StateError
from gpulayers.variables import PartitionInfo, part_extents, partition_counts

X = np.array([1.0, 2.0, 3.0])


def test_dtype_of_the_initial_value():
    assert gl.Variable(1.0).dtype == np.float32
    assert gl.Variable(1).dtype == np.int32
    assert gl.Variable([True]).dtype == np.bool_
    assert gl.Variable(X).dtype == np.float64
    assert gl.Variable(X, dtype="float16").dtype == np.float16
    assert gl.Variable(lambda: np.ones(2, "float32")).shape == (2,)


def test_names():
    assert gl.Variable(1.0).name == "Variable:0"
    assert gl.Variable(1.0, name="v").name == "v:0"
    assert gl.Variable(1.0, name="v").op.name == "v"
    with gl.Graph().as_default():
        assert [gl.Variable(1.0, name="v").name for _ in range(3)] == ["v:0", "v_1:0", "v_2:0"]


def test_the_initial_array_is_copied():
    x = X.copy()
    v = gl.Variable(x)
    x[:] = 0.0
    np.testing.assert_array_equal(v.numpy(), X)
    w = gl.Variable(v)
    v.assign(np.zeros(3))
    np.testing.assert_array_equal(w.numpy(), X)


def test_assign_casts_copies_counts_and_returns_the_variable():
    v = gl.Variable(X)
    value = np.array([1, 2, 4])
    assert v.assign(value) is v
    value[:] = 0
    np.testing.assert_array_equal(v.numpy(), [1.0, 2.0, 4.0])
    before = v.version
    v.assign_add([1.0, 1.0, 1.0])
    v.assign_sub(0.5)
    assert v.version == before + 2
    np.testing.assert_array_equal(v.numpy(), [1.5, 2.5, 4.5])
    assert v.dtype == np.float64


def test_assigning_another_shape_is_an_error_and_changes_nothing():
    v = gl.Variable(X, name="v")
    with pytest.raises(ValueError, match=r"v:0: a value of another shape.*\(3,\).*\(2,\)"):
        v.assign(np.zeros(2))
    np.testing.assert_array_equal(v.numpy(), X)


def test_numpy_is_a_copy_and_value_the_array():
    v = gl.Variable(X)
    v.numpy()[:] = 0.0
    np.testing.assert_array_equal(v.numpy(), X)
    assert v.value is v.read()
    assert type(v.value) is np.ndarray


def test_a_value_read_by_an_operation_survives_in_place_changes():
    v = gl.Variable(X)
    view, same = gl.ops.reshape(v, (3, 1)), v.read_value()
    v.writable()[...] = 0.0
    np.testing.assert_array_equal(view[:, 0], X)
    np.testing.assert_array_equal(same, X)
    np.testing.assert_array_equal(v.numpy(), np.zeros(3))


def test_operators_and_numpys_functions_give_arrays_in_eager_mode():
    v = gl.Variable(X)
    for result, expected in (
        (v + 1.0, X + 1),
        (2.0 * v, 2 * X),
        (X - v, 0 * X),
        (np.tanh(v), np.tanh(X)),
        (np.asarray(v), X),
        (v[1:], X[1:]),
        (v @ v, np.array(14.0)),
        (v > 1.5, X > 1.5),
        (v.mean(), np.array(2.0)),
        (0 + v, X),
    ):
        assert isinstance(result, np.ndarray | np.generic)
        np.testing.assert_array_equal(result, expected)


def test_hash_by_identity_and_elementwise_equality():
    v, w = gl.Variable(X), gl.Variable(X)
    assert len({v, w, v}) == 2
    np.testing.assert_array_equal(v == w, [True] * 3)


def test_numbers_length_and_properties():
    v = gl.Variable(X)
    assert len(v) == 3 and v.ndim == 1 and v.size == 3 and v.shape == (3,) and v.get_shape() == (3,)
    assert v.device == "cpu"
    s = gl.Variable(2.0)
    assert float(s) == 2.0 and int(s) == 2 and bool(s)
    with pytest.raises(TypeError, match="no length"):
        len(s)
    assert "Variable:0" in repr(s) and "2." in repr(s)


def test_no_cuda_array_interface_on_the_host():
    assert not hasattr(gl.Variable(X), "__cuda_array_interface__")


def test_cuda_array_interface_of_a_device_array_is_given_outside_recording_only():
    from tests.kernels import strict_array

    class WithInterface(strict_array.StrictArray):
        __slots__ = ()
        __cuda_array_interface__ = property(lambda self: {"shape": self.shape})

    from gpulayers.device import register_array_type

    register_array_type(WithInterface, strict_array.xp, "emulated")
    with gl.device("emulated"):
        v = gl.Variable(X)
    v.store(WithInterface._wrap(X.copy()))
    register_array_type(strict_array.StrictArray, strict_array.xp, "emulated")
    assert v.__cuda_array_interface__ == {"shape": (3,)}
    with gl.GradientTape():
        assert not hasattr(v, "__cuda_array_interface__")
        with pytest.raises(AttributeError, match="lose the recording"):
            _ = v.__cuda_array_interface__
    with gl.Graph().as_default(), pytest.raises(AttributeError, match="lose the recording"):
        _ = v.__cuda_array_interface__
    with pytest.raises(TypeError, match=r"variable\.numpy\(\)"):
        np.asarray(v)


def test_deepcopy_in_eager_mode():
    v = gl.Variable(X, name="v", trainable=False, constraint=gl.constraints.NonNeg())
    w = copy.deepcopy(v)
    assert (w.name, w.trainable, w.dtype) == ("v:0", False, np.float64) and w.constraint is v.constraint
    w.assign(np.zeros(3))
    np.testing.assert_array_equal(v.numpy(), X)


def test_deepcopy_of_a_graphs_variable_is_refused():
    with gl.Graph().as_default():
        v = gl.Variable(X)
        with pytest.raises(NotImplementedError, match="cannot be copied"):
            copy.deepcopy(v)


def test_a_constraint_is_stored_and_not_applied_by_assignment():
    v = gl.Variable([-1.0, 2.0], constraint=gl.constraints.NonNeg())
    np.testing.assert_array_equal(v.numpy(), [-1.0, 2.0])
    v.assign([-3.0, 1.0])
    np.testing.assert_array_equal(v.numpy(), [-3.0, 1.0])
    with gl.GradientTape() as tape:
        y = v * 1.0
    gl.optimizers.SGD(0.5).apply_gradients([(tape.gradient(y, v), v)])
    np.testing.assert_array_equal(v.numpy(), [0.0, 0.5])


def test_in_a_graph_variables_enter_the_collections_in_order():
    with gl.Graph().as_default():
        a = gl.Variable(1.0, name="a")
        b = gl.Variable(1.0, name="b", trainable=False)
        c = gl.get_variable("c", (2,), trainable=True)
        assert gl.get_collection(gl.GraphKeys.GLOBAL_VARIABLES) == [a, b, c]
        assert gl.get_collection(gl.GraphKeys.TRAINABLE_VARIABLES) == [a, c]
        local = gl.get_variable("d", (2,), trainable=False, collections=[gl.GraphKeys.LOCAL_VARIABLES])
        assert gl.get_collection(gl.GraphKeys.LOCAL_VARIABLES) == [local]
        assert gl.global_variables() == [a, b, c]


def test_an_initial_value_is_drawn_when_the_initializer_runs():
    drawn = []

    def initial():
        drawn.append(1)
        return np.full(2, float(len(drawn)))

    with gl.Graph().as_default(), gl.Session() as session:
        v = gl.get_variable("v", (2,), gl.float64, initializer=lambda shape, dtype: initial())
        assert not drawn
        session.run(v.initializer)
        np.testing.assert_array_equal(session.run(v), [1.0, 1.0])
        session.run(v.initializer)
        np.testing.assert_array_equal(session.run(v), [2.0, 2.0])


def test_a_variable_of_a_graph_is_used_eagerly_only_after_it_has_a_value():
    with gl.Graph().as_default():
        v = gl.get_variable("v", (2,), initializer="ones")
    with pytest.raises(RuntimeError, match="global_variables_initializer"):
        _ = v.value


def test_an_initial_value_may_be_a_tensor_of_the_graph():
    with gl.Graph().as_default(), gl.Session() as session:
        x = gl.placeholder(gl.float64, (2,))
        zeros, fed = gl.Variable(gl.zeros((2, 3)), name="zeros"), gl.Variable(x * 2.0)
        shared = gl.get_variable("shared", initializer=gl.constant([1, 2]))
        assert (zeros.shape, fed.dtype, shared.dtype) == ((2, 3), np.float64, np.int32)
        with pytest.raises(RuntimeError, match="global_variables_initializer"):
            session.run(zeros)
        for start in (1.0, 2.0):
            session.run(gl.global_variables_initializer(), {x: [start, 3.0]})
            np.testing.assert_array_equal(session.run(fed), [2 * start, 6.0])
        np.testing.assert_array_equal(session.run(zeros), np.zeros((2, 3)))
        np.testing.assert_array_equal(session.run(shared), [1, 2])
        with pytest.raises(ValueError, match="fully known"):
            gl.Variable(gl.placeholder(gl.float32, (None,)))
        assert len(gl.global_variables()) == 3


def test_a_function_cannot_make_a_variable_of_what_it_computes():
    with pytest.raises(StateError, match="graph tensor"):
        gl.function(lambda x: gl.Variable(x) * 1.0)(np.ones(2, "float32"))


def test_assigning_another_shape_in_a_graph_is_an_error_at_once():
    with gl.Graph().as_default():
        v = gl.get_variable("v", (2,))
        with pytest.raises(ValueError, match="v:0: a value of another shape"):
            v.assign(np.ones(3))
        v.assign(gl.placeholder(gl.float32, (None,)))


def test_eval_and_load():
    with gl.Graph().as_default():
        v = gl.get_variable("v", (2,))
        with pytest.raises(ValueError, match="no default session"):
            v.eval()
        with gl.Session() as session:
            v.load([1.0, 2.0])
            np.testing.assert_array_equal(v.eval(), [1.0, 2.0])
            v.load(np.array([3, 4]), session)
            np.testing.assert_array_equal(v.eval(session), [3.0, 4.0])
            with pytest.raises(ValueError, match="another shape"):
                v.load([1.0])


def test_assignments_as_functions():
    v = gl.Variable([1.0, 2.0])
    assert gl.assign(v, [3.0, 4.0]) is v
    gl.assign_add(v, 1.0)
    gl.assign_sub(v, [0.5, 0.0])
    np.testing.assert_array_equal(v.numpy(), [3.5, 5.0])
    with gl.Graph().as_default(), gl.Session() as session:
        v = gl.get_variable("v", (2,), initializer="ones")
        session.run(gl.global_variables_initializer())
        nodes = [gl.assign(v, [2.0, 3.0]), gl.assign_add(v, v), gl.assign_sub(v, [1.0, 1.0])]
        results = [session.run(node).tolist() for node in nodes]
    assert results == [[2.0, 3.0], [4.0, 6.0], [3.0, 5.0]]


def test_local_variables_are_initialized_apart():
    with gl.Graph().as_default(), gl.Session() as session:
        kept = gl.get_variable("kept", (), initializer="ones", collections=[gl.GraphKeys.LOCAL_VARIABLES])
        other = gl.get_variable("other", ())
        assert gl.local_variables() == [kept] and gl.local_variables("other") == [] and gl.global_variables() == [other]
        session.run(gl.local_variables_initializer())
        assert session.run(kept) == 1.0
    assert gl.local_variables() == [] and gl.local_variables_initializer() is None


def test_a_constraint_that_is_not_callable():
    with pytest.raises(ValueError, match="not callable"):
        gl.Variable([1.0], constraint=3)


def test_eager_variables_are_freed_when_nobody_holds_them():
    v = gl.get_variable("freed", (2,))
    reference = weakref.ref(v)
    del v
    gc.collect()
    assert reference() is None


# --- partitioners: the table of what they return ----------------------------------------------------------------------

FIXED, BY_SIZE = gl.fixed_size_partitioner, gl.variable_axis_size_partitioner


@pytest.mark.parametrize(
    ("partitioner", "shape", "counts", "parts"),
    [
        (FIXED(3), (7, 2), [3, 1], [(3, 2), (2, 2), (2, 2)]),
        (FIXED(3, axis=1), (2, 7), [1, 3], [(2, 3), (2, 2), (2, 2)]),
        (FIXED(5), (3, 2), [3, 1], [(1, 2)] * 3),
        (BY_SIZE(64), (10, 4), [3, 1], [(4, 4), (3, 4), (3, 4)]),
        (BY_SIZE(64, max_shards=2), (10, 4), [2, 1], [(5, 4), (5, 4)]),
        (BY_SIZE(64, axis=1), (4, 10), [1, 3], [(4, 4), (4, 3), (4, 3)]),
        (BY_SIZE(8), (4, 10), [4, 1], [(1, 10)] * 4),
        (BY_SIZE(8000), (4, 10), [1, 1], [(4, 10)]),
        (BY_SIZE(64, max_shards=0), (10, 4), [3, 1], [(4, 4), (3, 4), (3, 4)]),
        (BY_SIZE(64, axis=-1), (4, 10), [1, 3], [(4, 4), (4, 3), (4, 3)]),
        (FIXED(3, axis=-1), (2, 7), [1, 3], [(2, 3), (2, 2), (2, 2)]),
    ],
)
@pytest.mark.parametrize("eager", [True, False])
def test_partitioner_table(partitioner, shape, counts, parts, eager):
    assert list(partitioner(shape=gl.TensorShape(shape), dtype=gl.float32)) == counts
    with contextlib.nullcontext() if eager else gl.Graph().as_default():
        v = gl.get_variable("cut", shape, partitioner=partitioner)
        assert isinstance(v, gl.PartitionedVariable)
        assert [part.shape for part in v] == parts
        assert [part.name for part in v] == [f"cut/part_{i}:0" for i in range(len(parts))]
        assert tuple(v.shape) == shape and len(v) == len(parts) and v.partitions == counts


def test_doubles_halve_the_slices_and_strings_use_their_own_size():
    assert BY_SIZE(64)(shape=(10, 4), dtype="float64") == [5, 1]
    assert BY_SIZE(64)(shape=(10, 2), dtype=np.dtype(object)) == [5, 1]
    assert BY_SIZE(64, bytes_per_string_element=32)(shape=(10, 2), dtype=np.dtype(object)) == [10, 1]


@pytest.mark.parametrize("keywords", [{"max_shard_bytes": 0}, {"max_shard_bytes": -1}, {"max_shards": -1}])
def test_size_partitioner_refuses_at_construction(keywords):
    with pytest.raises(ValueError, match=next(iter(keywords))):
        BY_SIZE(**{"max_shard_bytes": 8, **keywords})
    with pytest.raises(ValueError, match="bytes_per_string_element"):
        BY_SIZE(8, bytes_per_string_element=0)


@pytest.mark.parametrize("partitioner", [FIXED(2, axis=2), BY_SIZE(8, axis=2), BY_SIZE(8, axis=-3)])
def test_an_axis_that_the_shape_does_not_have(partitioner):
    with pytest.raises(IndexError):
        gl.get_variable("cut", (4, 2), partitioner=partitioner)


@pytest.mark.parametrize(
    ("partitioner", "shape", "text"),
    [
        ("three", (4, 2), "not callable"),
        (lambda **_: 3, (4, 2), "did not return a list"),
        (lambda **_: [2], (4, 2), "another length"),
        (lambda **_: [0, 1], (4, 2), "one axis at most"),
        (lambda **_: [2, 2], (4, 2), "one axis at most"),
        (lambda **_: [5, 1], (4, 2), "more parts than there are"),
        (FIXED(2), (None, 2), "fully"),
    ],
)
def test_partitioner_answers_are_checked(partitioner, shape, text):
    with pytest.raises(ValueError, match=text):
        partition_counts(partitioner, shape, "float32")
    with pytest.raises(ValueError):
        gl.get_variable("cut", shape, partitioner=partitioner)


def test_a_partitioner_is_called_with_keywords():
    seen = {}

    def partitioner(*, shape, dtype):
        seen.update(shape=shape, dtype=dtype)
        return [1, 2]

    gl.get_variable("cut", (3, 4), gl.float64, partitioner=partitioner)
    assert seen["shape"].is_fully_defined() and seen["shape"] == (3, 4) and seen["dtype"] == np.float64


def test_a_scalar_ignores_the_partitioner():
    v = gl.get_variable("scalar", (), partitioner=lambda **_: 1 / 0)
    assert isinstance(v, gl.Variable)


def test_the_initializer_is_told_where_each_part_begins():
    told = []

    def initializer(shape, dtype=None, partition_info=None):
        told.append((list(shape), list(partition_info.full_shape), list(partition_info.var_offset)))
        rows = np.arange(partition_info.var_offset[0], partition_info.var_offset[0] + shape[0])
        return np.repeat(rows[:, None], 2, 1).astype(dtype)

    v = gl.get_variable("cut", (7, 2), initializer=initializer, partitioner=FIXED(3))
    assert told == [([3, 2], [7, 2], [0, 0]), ([2, 2], [7, 2], [3, 0]), ([2, 2], [7, 2], [5, 0])]
    np.testing.assert_array_equal(v.numpy()[:, 0], np.arange(7))


def test_an_initializer_may_demand_partition_info():
    v = gl.get_variable("whole", (2,), initializer=lambda shape, dtype, partition_info: np.ones(shape, dtype))
    assert v.shape == (2,)


def test_an_initializer_that_does_not_take_partition_info_gets_the_parts_shape():
    shapes = []

    def initializer(shape, dtype):
        shapes.append(tuple(shape))
        return np.zeros(shape, dtype)

    gl.get_variable("cut", (7, 2), initializer=initializer, partitioner=FIXED(3))
    assert shapes == [(3, 2), (2, 2), (2, 2)]


def test_partition_info_and_extents():
    info = PartitionInfo((7, 2), (3, 0))
    assert info.full_shape == [7, 2] and info.var_offset == [3, 0] and "[7, 2]" in repr(info)
    assert part_extents((5,), [1]) == [([5], [0])]


@pytest.mark.parametrize("axis", [0, 1])
def test_a_partitioned_variable_reads_as_one_tensor_and_has_gradients(axis):
    value = np.arange(12.0).reshape(3, 4)
    v = gl.get_variable("cut", (3, 4), gl.float64, initializer=value_by_part(value), partitioner=FIXED(2, axis=axis))
    np.testing.assert_array_equal(v.numpy(), value)
    np.testing.assert_array_equal(v * 2.0, 2 * value)
    np.testing.assert_array_equal(np.tanh(v), np.tanh(value))
    with gl.GradientTape() as tape:
        y = gl.ops.square(v)
    slopes = tape.gradient(y, list(v))
    np.testing.assert_array_equal(np.concatenate(slopes, axis=axis), 2 * value)
    v.assign(value + 1)
    np.testing.assert_array_equal(v.numpy(), value + 1)
    assert v.trainable and v.ndim == 2 and v.get_shape() == (3, 4) and "cut" in repr(v)


def value_by_part(value):
    def initializer(shape, dtype=None, partition_info=None):
        where = tuple(slice(o, o + n) for o, n in zip(partition_info.var_offset, shape, strict=True))
        return value[where].astype(dtype)

    return initializer


def test_a_partitioned_variable_in_a_graph():
    value = np.arange(8.0).reshape(4, 2)
    with gl.Graph().as_default(), gl.Session() as session:
        v = gl.get_variable("cut", (4, 2), gl.float64, initializer=value_by_part(value), partitioner=FIXED(3))
        parts = list(v)
        assert gl.global_variables() == parts == gl.trainable_variables()
        slopes = gl.gradients(gl.ops.square(v), parts)
        session.run(gl.global_variables_initializer())
        np.testing.assert_array_equal(session.run(v), value)
        np.testing.assert_array_equal(np.concatenate(session.run(slopes)), 2 * value)
        session.run(v.assign(value * 3))
        np.testing.assert_array_equal(session.run(v.as_tensor()), value * 3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_in_another_order_are_kept_contiguous(dtype):
    """Optimizers and layers update variables in place, and flat."""
    value = np.asfortranarray(np.arange(6, dtype=dtype).reshape(2, 3))
    made = gl.Variable(value, dtype="float32")
    assigned = gl.Variable(np.zeros((2, 3), "float32"))
    assigned.assign(value)
    for variable in (made, assigned):
        assert variable.value.flags.c_contiguous
        np.testing.assert_array_equal(variable.numpy(), value)
