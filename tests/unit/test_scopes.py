"""Variable scopes: names, sharing, defaults, and how openings are counted."""

import numpy as np
import pytest

import gpulayers as gl


@pytest.fixture(autouse=True)
def graph():
    with gl.Graph().as_default() as graph:
        yield graph


def uniquely(name="s"):
    """Open a scope with a default name and return what it is called."""
    with gl.variable_scope(None, default_name=name) as scope:
        return scope.name


# --- names ------------------------------------------------------------------------------------------------------------


def test_scopes_prefix_names():
    with gl.variable_scope("a"):
        v = gl.get_variable("v", (2,))
        with gl.variable_scope("b/c") as inner:
            w = gl.get_variable("w", (2,))
    assert (v.name, w.name, inner.name) == ("a/v:0", "a/b/c/w:0", "a/b/c")
    assert gl.get_variable_scope().name == ""


def test_a_scope_object_is_entered_exactly_from_anywhere():
    with gl.variable_scope("a"), gl.variable_scope("b") as inner:
        pass
    with gl.variable_scope("other"), gl.variable_scope(inner):
        assert gl.get_variable("v", (2,)).name == "a/b/v:0"
    assert inner.name == "a/b"


@pytest.mark.parametrize(("name", "wrong"), [(None, "no name"), (3, "wrong type"), (b"a", "wrong type")])
def test_a_scope_needs_a_name(name, wrong):
    with pytest.raises(TypeError, match=wrong), gl.variable_scope(name):
        pass


@pytest.mark.parametrize("name", ["a b", "é", "$"])
def test_names_that_are_not_legal(name):
    with pytest.raises(ValueError, match="not a valid scope name"), gl.variable_scope(name):
        pass


def test_default_names_are_counted():
    assert [uniquely(), uniquely(), uniquely()] == ["s", "s_1", "s_2"]


def test_an_explicit_name_counts_and_is_not_counted_up():
    for _ in range(2):
        with gl.variable_scope("s") as scope:
            assert scope.name == "s"
    assert uniquely() == "s_1"


def test_default_name_is_ignored_beside_a_name():
    with gl.variable_scope("a", default_name="b") as scope:
        assert scope.name == "a"


def test_openings_are_counted_for_each_parent():
    with gl.variable_scope("p"):
        assert [uniquely(), uniquely()] == ["p/s", "p/s_1"]
    with gl.variable_scope("q"):
        assert uniquely() == "q/s"
    assert uniquely() == "s"


def test_a_scope_that_was_entered_by_its_object_counts_as_opened():
    with gl.variable_scope("p"), gl.variable_scope("s") as inner:
        pass
    with gl.variable_scope(inner):
        pass
    with gl.variable_scope("p"):
        assert uniquely() == "p/s_1"


def test_leaving_a_scope_without_a_name_leaves_the_counts():
    assert uniquely() == "s"
    with gl.variable_scope(""):
        pass
    assert uniquely() == "s_1"


@pytest.mark.parametrize("reuse", [None, True, gl.AUTO_REUSE])
def test_entering_a_parent_again_starts_the_count_again(reuse):
    with gl.variable_scope("p"):
        assert [uniquely(), uniquely()] == ["p/s", "p/s_1"]
    with gl.variable_scope("p", reuse=reuse):
        assert uniquely() == "p/s"


def test_operations_are_named_after_the_scope_and_its_number():
    x = gl.placeholder(gl.float32, ())
    with gl.variable_scope("a"):
        assert (x * x).name.startswith("a/")
    with gl.variable_scope("a") as again:
        assert (x * x).name.startswith("a_1/")
        assert again.original_name_scope == "a_1/"
    with gl.variable_scope("a", auxiliary_name_scope=False):
        assert "/" not in (x * x).name
    with gl.name_scope("n"), gl.variable_scope("b", auxiliary_name_scope=False) as inner:
        assert inner.original_name_scope == "n/"


def test_a_default_name_is_counted_apart_for_operations_and_for_variables():
    x = gl.placeholder(gl.float32, ())
    with gl.name_scope("s"):
        pass
    with gl.variable_scope(None, default_name="s") as first:
        assert (first.name, (x * x).name.rpartition("/")[0]) == ("s", "s_1")
    with gl.variable_scope(None, default_name="s") as second:
        assert (second.name, (x * x).name.rpartition("/")[0]) == ("s_1", "s_2")


def test_a_scope_called_nothing_stays_in_the_name_scope():
    x = gl.placeholder(gl.float32, ())
    with gl.name_scope("n"), gl.variable_scope(gl.get_variable_scope()) as scope:
        assert (scope.name, (x * x).name.rpartition("/")[0]) == ("", "n")


# --- sharing ----------------------------------------------------------------------------------------------------------


def test_a_name_that_exists_is_refused_without_reuse():
    gl.get_variable("v", (2,))
    with pytest.raises(ValueError, match=r"v: Variable already exists, disallowed.*AUTO_REUSE"):
        gl.get_variable("v", (2,))


def test_reuse_shares_and_does_not_make():
    with gl.variable_scope("a"):
        v = gl.get_variable("v", (2,))
    with gl.variable_scope("a", reuse=True):
        assert gl.get_variable("v", (2,)) is v
        with pytest.raises(ValueError, match="a/w: Variable does not exist"):
            gl.get_variable("w", (2,))
    assert gl.global_variables() == [v]


def test_auto_reuse_makes_once():
    found = []
    for _ in range(3):
        with gl.variable_scope("a", reuse=gl.AUTO_REUSE):
            found.append(gl.get_variable("v", (2,)))
    assert found[0] is found[1] is found[2] and len(gl.global_variables()) == 1


def test_reuse_is_inherited_and_not_undone_inside():
    with gl.variable_scope("a"), gl.variable_scope("b"):
        v = gl.get_variable("v", (2,))
    with gl.variable_scope("a", reuse=True), gl.variable_scope("b"):
        assert gl.get_variable("v", (2,)) is v
    with gl.variable_scope("a", reuse=gl.AUTO_REUSE), gl.variable_scope("b") as inner:
        assert inner.reuse is gl.AUTO_REUSE
        assert gl.get_variable("v", (2,)) is v


def test_reuse_false_inherits_as_none_does():
    with gl.variable_scope("a", reuse=gl.AUTO_REUSE), gl.variable_scope("b", reuse=False) as inner:
        assert inner.reuse is gl.AUTO_REUSE


def test_a_scope_object_brings_its_own_reuse():
    with gl.variable_scope("a") as a, gl.variable_scope("b", reuse=True) as b:
        pass
    with gl.variable_scope("outer", reuse=True), gl.variable_scope(a) as again:
        assert again.reuse is False
        with gl.variable_scope(b, reuse=gl.AUTO_REUSE) as inner:
            assert inner.reuse is gl.AUTO_REUSE


@pytest.mark.parametrize("reuse", [True, gl.AUTO_REUSE])
def test_a_default_name_does_not_go_with_reuse(reuse):
    with pytest.raises(ValueError, match="cannot be used without name_or_scope"):
        gl.variable_scope(None, default_name="s", reuse=reuse).__enter__()
    assert uniquely() == "s"


@pytest.mark.parametrize("reuse", [1, "yes"])
def test_a_reuse_that_is_not_known(reuse):
    with pytest.raises(ValueError, match="reuse is not known"), gl.variable_scope("a", reuse=reuse):
        pass


def test_reuse_variables_switches_from_here_on():
    with gl.variable_scope("a") as scope:
        v = gl.get_variable("v", (2,))
        scope.reuse_variables()
        assert gl.get_variable("v", (2,)) is v
    with gl.variable_scope("a"), pytest.raises(ValueError, match="exists"):
        gl.get_variable("v", (2,))


def test_a_shared_variable_must_have_the_same_shape_and_dtype():
    gl.get_variable("v", (2, 3))
    with gl.variable_scope("", reuse=True):
        assert gl.get_variable("v").shape == (2, 3)
        assert gl.get_variable("v", (None, 3)).shape == (2, 3)
        with pytest.raises(
            ValueError, match=r"Trying to share variable v, but specified shape \(2, 4\) and found shape \(2, 3\)"
        ):
            gl.get_variable("v", (2, 4))
        with pytest.raises(ValueError, match="Trying to share variable v, but specified dtype float64.*float32"):
            gl.get_variable("v", (2, 3), gl.float64)


def test_a_variable_made_by_hand_is_not_shared():
    gl.Variable(1.0, name="v")
    with gl.variable_scope("", reuse=True), pytest.raises(ValueError, match="does not exist"):
        gl.get_variable("v", ())


# --- making -----------------------------------------------------------------------------------------------------------


def test_a_shape_that_is_not_fully_known():
    with pytest.raises(ValueError, match="fully defined"):
        gl.get_variable("v", (None, 2))


def test_an_array_is_an_initializer_and_gives_the_shape():
    with gl.Session() as session:
        v = gl.get_variable("v", initializer=np.arange(3.0, dtype="float32"))
        session.run(gl.global_variables_initializer())
        np.testing.assert_array_equal(session.run(v), [0.0, 1.0, 2.0])


@pytest.mark.parametrize(
    ("value", "shape", "dtype"),
    [(3.0, (), "float32"), (3, (), "int32"), ([1.0, 2.0], (2,), "float32"), (np.ones((2, 1)), (2, 1), "float64")],
)
def test_a_value_as_initializer_gives_shape_and_dtype(value, shape, dtype):
    with gl.Session() as session:
        v = gl.get_variable("v", initializer=value)
        assert (v.shape, v.dtype) == (shape, np.dtype(dtype))
        assert gl.get_variable("w", initializer=value, dtype=gl.float32).dtype == np.float32
        session.run(gl.global_variables_initializer())
        np.testing.assert_array_equal(session.run(v), value)
    with gl.variable_scope("", reuse=True):
        assert gl.get_variable("v", initializer=value) is v


def test_a_function_without_arguments_gives_the_shape():
    assert gl.get_variable("v", initializer=lambda: np.ones((3, 1), "float32")).shape == (3, 1)


@pytest.mark.parametrize("initializer", [None, "ones", gl.ones_initializer()])
def test_a_new_variable_needs_a_shape(initializer):
    with pytest.raises(ValueError, match="v: has no shape"):
        gl.get_variable("v", initializer=initializer)
    v = gl.get_variable("v", (2,))
    with gl.variable_scope("", reuse=True):
        assert gl.get_variable("v") is v


@pytest.mark.parametrize(("shape", "expected"), [(3, (3,)), ((), ()), (gl.TensorShape((2, 3)), (2, 3)), ([2], (2,))])
def test_kinds_of_shape(shape, expected):
    assert gl.get_variable("v", shape).shape == expected


def test_default_initializers_by_dtype():
    with gl.Session() as session:
        real = gl.get_variable("real", (200, 100))
        whole = gl.get_variable("whole", (3,), gl.int32)
        flag = gl.get_variable("flag", (3,), gl.bool)
        session.run(gl.global_variables_initializer())
        found, zeros, flags = session.run([real, whole, flag])
    limit = np.sqrt(6 / 300)
    assert np.abs(found).max() <= limit and found.std() == pytest.approx(limit / np.sqrt(3), rel=0.05)
    assert not zeros.any() and zeros.dtype == np.int32 and not flags.any() and flags.dtype == np.bool_
    with pytest.raises(ValueError, match="complex64"):
        gl.get_variable("c", (2,), gl.complex64)


def test_defaults_of_the_scope_and_their_inheritance():
    constraint = gl.constraints.NonNeg()
    with gl.Session() as session:
        with gl.variable_scope("a", initializer=gl.ones_initializer(), constraint=constraint, dtype=gl.float64):
            one = gl.get_variable("one", (2,))
            with gl.variable_scope("b"):
                two = gl.get_variable("two", (2,))
            zero = gl.get_variable("zero", (2,), gl.float32, initializer=gl.zeros_initializer())
        session.run(gl.global_variables_initializer())
        np.testing.assert_array_equal(session.run([one, two, zero]), [[1, 1], [1, 1], [0, 0]])
    assert one.dtype == two.dtype == np.float64 and zero.dtype == np.float32
    assert one.constraint is constraint and two.constraint is None  # the one that only holds where it was given


def test_variables_of_a_scope():
    with gl.variable_scope("a") as a:
        v, w = gl.get_variable("v", (2,)), gl.get_variable("w", (2,), trainable=False)
    with gl.variable_scope("ab"):
        other = gl.get_variable("v", (2,))
    assert a.global_variables() == [v, w] and a.trainable_variables() == [v]
    assert gl.get_variable_scope().global_variables() == [v, w, other]
    gl.add_to_collection("mine", w)
    assert a.get_collection("mine") == [w]
    gl.add_to_collections(["mine", "yours", "mine"], v)
    gl.add_to_collections("yours", other)
    assert gl.get_collection("mine") == [w, v] and gl.get_collection("yours") == [v, other]


def test_setters_of_a_scope():
    with gl.variable_scope("a") as scope:
        scope.set_initializer(gl.ones_initializer())
        scope.set_partitioner(gl.fixed_size_partitioner(2))
        scope.set_regularizer(lambda v: gl.reduce_sum(v))
        v = gl.get_variable("v", (4, 2))
    assert isinstance(v, gl.PartitionedVariable)
    assert len(gl.get_collection(gl.GraphKeys.REGULARIZATION_LOSSES)) == 2


def test_the_regularizer_adds_to_the_collection_once():
    with gl.variable_scope("a", regularizer=gl.regularizers.l2(0.5), initializer="ones"):
        gl.get_variable("v", (3,))
        gl.get_variable("w", (3,), regularizer=lambda w: None)
    with gl.variable_scope("a", regularizer=gl.regularizers.l2(0.5), reuse=True):
        gl.get_variable("v", (3,))
    losses = gl.get_collection(gl.GraphKeys.REGULARIZATION_LOSSES)
    assert len(losses) == 1
    with gl.Session() as session:
        session.run(gl.global_variables_initializer())
        assert session.run(losses[0]) == pytest.approx(1.5)


def test_the_partitioner_of_the_scope_applies_where_none_is_given():
    with gl.variable_scope("a", partitioner=gl.fixed_size_partitioner(2)):
        assert len(gl.get_variable("v", (4, 2))) == 2
        assert isinstance(gl.get_variable("s", ()), gl.Variable)
        assert len(gl.get_variable("w", (4, 2), partitioner=gl.fixed_size_partitioner(4))) == 4
        with gl.variable_scope("b"):
            assert isinstance(gl.get_variable("v", (4, 2)), gl.PartitionedVariable)


def test_partitioned_variables_are_shared_as_one():
    with gl.variable_scope("a", partitioner=gl.fixed_size_partitioner(2)):
        v = gl.get_variable("v", (4, 2))
    with gl.variable_scope("a", partitioner=gl.fixed_size_partitioner(2), reuse=True):
        assert gl.get_variable("v", (4, 2)) is v


# --- custom getters ---------------------------------------------------------------------------------------------------


def test_a_custom_getter_may_change_the_arguments_and_the_result():
    seen = []

    def getter(getter, name, *arguments, **keywords):
        seen.append(name)
        keywords["trainable"] = False
        return getter(name, *arguments, **keywords) * 2.0

    with gl.variable_scope("a", custom_getter=getter, initializer="ones"), gl.Session() as session:
        doubled = gl.get_variable("v", (2,))
        session.run(gl.global_variables_initializer())
        np.testing.assert_array_equal(session.run(doubled), [2.0, 2.0])
    assert seen == ["a/v"] and gl.trainable_variables() == []


def test_custom_getters_nest_the_innermost_first():
    order = []

    def note(label):
        def getter(getter, name, *arguments, **keywords):
            order.append(label)
            return getter(name, *arguments, **keywords)

        return getter

    with gl.variable_scope("a", custom_getter=note("outer")), gl.variable_scope("b", custom_getter=note("inner")):
        gl.get_variable("v", (2,), custom_getter=note("call"))
    assert order == ["call", "inner", "outer"]


# --- eager mode -------------------------------------------------------------------------------------------------------


def test_eager_mode_shares_by_reuse_only_and_never_refuses_a_new_variable():
    from gpulayers.trace import eager_mode

    with eager_mode():
        with gl.variable_scope("eager_scope_test"):
            v = gl.get_variable("v", (2,))
            again = gl.get_variable("v", (2,))
        assert v.name == again.name == "eager_scope_test/v:0" and v is not again
        with gl.variable_scope("eager_scope_test", reuse=gl.AUTO_REUSE):
            assert gl.get_variable("v", (2,)) is again
        with gl.variable_scope("eager_scope_test", reuse=True), pytest.raises(ValueError, match="does not exist"):
            gl.get_variable("never_made", (2,))


def test_scopes_of_two_graphs_are_apart():
    v = gl.get_variable("v", (2,))
    assert uniquely() == "s"
    with gl.Graph().as_default():
        assert gl.get_variable("v", (3,)) is not v
        assert uniquely() == "s"
