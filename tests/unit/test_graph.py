"""Graphs, sessions, control flow and `function`: what is run, in which order, and with which gradients."""

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.errors import GradientError, GraphError, StateError, StructureError, UninitializedError
from gpulayers.ops.operation import OPERATIONS, Operation, Spec
from gpulayers.trace import Node, eager_mode
from gpulayers.trace.graph import enter_default_graph, leave_default_graph

X = np.array([0.5, -1.25, 2.0])
OLD = gl.compat.v1


@pytest.fixture
def graph():
    with gl.Graph().as_default() as graph:
        yield graph


@pytest.fixture
def session(graph):
    with gl.Session() as session:
        yield session


class Counted:
    """An operation that counts how often it runs, and raises if it is told to."""

    def __init__(self, name, stateful=False, fails=False):
        self.count, self.fails = 0, fails
        self.operation = Operation(
            name, self.forward, spec=lambda x: Spec(x.shape, x.dtype), stateful=stateful, doc="Count the runs."
        )

    def forward(self, xp, x):
        self.count += 1
        if self.fails:
            raise GraphError("this node was not to be run")
        return x * 1


@pytest.fixture
def counted():
    names = []

    def make(**options):
        names.append(f"counted_{len(names)}_for_tests")
        return Counted(names[-1], **options)

    yield make
    for name in names:
        del OPERATIONS[name]


# --- sessions: fetches and feeds --------------------------------------------------------------------------------------


def test_fetches_keep_their_structure_and_are_numpy_arrays(session):
    x = gl.placeholder(gl.float64, (3,), name="x")
    y = x * 2.0
    found = session.run({"a": [y, (x, y)], "none": gl.no_op()}, {x: X})
    assert found["none"] is None and isinstance(found["a"][1], tuple)
    assert type(found["a"][0]) is np.ndarray
    np.testing.assert_array_equal(found["a"][0], 2 * X)
    np.testing.assert_array_equal(found["a"][1][0], X)


def test_fetch_and_feed_by_name(session):
    x = gl.placeholder(gl.float32, (), name="x")
    y = x + 1.0
    assert session.run(y.name, {"x:0": 2}) == 3.0
    with pytest.raises(KeyError, match="nothing"):
        session.run("nothing:0")


def test_a_fetched_array_is_a_copy(session):
    v = gl.Variable(np.zeros(2), name="v")
    session.run(v.initializer)
    found = session.run(v)
    found[:] = 7.0
    np.testing.assert_array_equal(session.run(v), np.zeros(2))


def test_a_missing_feed_names_the_placeholder(session):
    x = gl.placeholder(gl.float32, (2,), name="images")
    with pytest.raises(ValueError, match="images.*feed_dict"):
        session.run(x * 2.0)


@pytest.mark.parametrize("value", [np.ones((3, 3)), np.ones(2), 1.0])
def test_a_feed_of_another_shape_is_refused(session, value):
    x = gl.placeholder(gl.float32, (None, 2), name="x")
    with pytest.raises(ValueError, match="x.*another shape"):
        session.run(x, {x: value})


def test_feeds_are_converted_to_the_placeholders_dtype(session):
    x = gl.placeholder(gl.float32, None)
    assert session.run(x, {x: [[1, 2]]}).dtype == np.float32
    assert session.run(x, {x: 3}).shape == ()
    with pytest.raises((TypeError, ValueError)):
        session.run(x, {x: ["a"]})


def test_any_tensor_can_be_fed(session):
    x = gl.placeholder(gl.float32, ())
    y = x + 1.0
    z = y * 2.0
    assert session.run(z, {y: 10.0}) == 20.0
    assert session.run([y, z], {y: 10.0}) == [10.0, 20.0]


def test_a_foreign_tensor_is_neither_fetched_nor_fed_nor_used(session):
    with gl.Graph().as_default():
        other = gl.placeholder(gl.float32, (), name="other")
    with pytest.raises(ValueError, match="other:0.*not an element of this graph"):
        session.run(other)
    mine = gl.placeholder(gl.float32, ())
    with pytest.raises(ValueError, match="other:0.*not an element"):
        session.run(mine, {other: 1.0})
    with pytest.raises(ValueError, match="another graph"):
        mine + other


@pytest.mark.parametrize("value", [3, None, object(), np.ones(2)])
def test_other_things_cannot_be_fetched(session, value):
    with pytest.raises(TypeError, match="cannot be fetched"):
        session.run([value])


def test_other_things_cannot_be_fed(session):
    x = gl.placeholder(gl.float32, ())
    with pytest.raises(TypeError, match="cannot be fed"):
        session.run(x, {3: 1.0})


def test_a_closed_session_does_not_run(graph):
    x = gl.placeholder(gl.float32, ())
    with gl.Session() as session:
        pass
    with pytest.raises(GraphError, match="closed"):
        session.run(x, {x: 1.0})


def test_eval_and_run_use_the_default_session(graph):
    x = gl.placeholder(gl.float32, ())
    y = x * 3.0
    with pytest.raises(GraphError, match="no default session"):
        y.eval({x: 1.0})
    with gl.Session():
        assert y.eval({x: 2.0}) == 6.0
        gl.no_op().run()
    assert y.eval({x: 2.0}, gl.Session()) == 6.0


def test_placeholder_needs_a_graph():
    with pytest.raises(RuntimeError, match="eager mode"):
        gl.placeholder(gl.float32)


def test_a_graph_tensor_is_not_a_value(graph):
    x = gl.placeholder(gl.float32, ())
    for use in (lambda: x.value, lambda: float(x), lambda: int(x), x.numpy):
        with pytest.raises(RuntimeError, match="session.run|Session"):
            use()
    with pytest.raises(TypeError, match="gl.cond"):
        bool(x)
    with pytest.raises(TypeError, match=r"gl\.ops"):
        np.asarray(x)


# --- only what is needed runs -----------------------------------------------------------------------------------------


def test_only_what_the_fetches_need_is_run(session, counted):
    bad, good = counted(fails=True), counted()
    x = gl.placeholder(gl.float32, ())
    bad.operation(x)
    y = good.operation(x)
    unfed = gl.placeholder(gl.float32, ()) + 1.0
    assert session.run(y, {x: 1.0}) == 1.0
    assert (good.count, bad.count) == (1, 0)
    assert unfed is not None


def test_what_lies_behind_a_fed_tensor_is_not_run(session, counted):
    bad = counted(fails=True)
    x = gl.placeholder(gl.float32, ())
    middle = bad.operation(x)
    assert session.run(middle * 2.0, {middle: 4.0}) == 8.0
    assert bad.count == 0


def test_a_node_runs_once_however_often_it_is_used(session, counted):
    one = counted()
    x = gl.placeholder(gl.float32, ())
    y = one.operation(x)
    assert session.run([y + y, y * 3.0, y], {x: 2.0}) == [4.0, 6.0, 2.0]
    assert one.count == 1


def test_a_stateful_node_runs_only_when_it_is_needed(session, counted):
    one = counted(stateful=True)
    x = gl.placeholder(gl.float32, ())
    effect = one.operation(x)
    assert session.run(x * 2.0, {x: 1.0}) == 2.0
    assert one.count == 0
    session.run(effect, {x: 1.0})
    assert one.count == 1


def test_nodes_added_between_runs_are_seen(session):
    x = gl.placeholder(gl.float32, ())
    assert session.run(x + 1.0, {x: 1.0}) == 2.0
    assert session.run(x + 2.0, {x: 1.0}) == 3.0


# --- variables, assignments and their order ---------------------------------------------------------------------------


def test_a_variable_has_no_value_before_its_initializer_ran(session):
    v = gl.get_variable("v", (2,), initializer="ones")
    with pytest.raises(UninitializedError, match=r"v:0.*global_variables_initializer"):
        session.run(v * 2.0)
    with pytest.raises(RuntimeError, match="v:0"):
        session.run(v)
    session.run(gl.global_variables_initializer())
    np.testing.assert_array_equal(session.run(v * 2.0), [2.0, 2.0])


def test_variables_initializer_initializes_only_those(session):
    a, b = gl.Variable(1.0), gl.Variable(2.0)
    session.run(gl.variables_initializer([a]))
    assert session.run(a) == 1.0
    with pytest.raises(UninitializedError):
        session.run(b)


def test_assign_returns_the_new_value_and_happens_only_when_run(session):
    v = gl.Variable(1.0, name="v")
    session.run(gl.global_variables_initializer())
    assign, add, subtract = v.assign(5.0), v.assign_add(2.0), v.assign_sub(1.0)
    assert session.run(v) == 1.0
    assert session.run(assign) == 5.0
    assert session.run(add) == 7.0
    assert session.run(subtract) == 6.0
    assert session.run(v) == 6.0


def test_assigning_another_shape_is_refused(session):
    v = gl.Variable(np.zeros(2))
    session.run(gl.global_variables_initializer())
    with pytest.raises(ValueError, match="another shape"):
        session.run(v.assign(np.zeros(3)))


def test_a_read_after_an_assignment_by_control_dependency_sees_the_new_value(session):
    v = gl.Variable(1.0)
    before = v + 0.0
    assignment = v.assign(before * 10.0)
    with gl.control_dependencies([assignment]):
        after = v + 0.0
    session.run(gl.global_variables_initializer())
    assert session.run([before, after]) == [1.0, 10.0]
    assert session.run(after) == 100.0
    assert session.run(before) == 100.0


def test_a_read_made_before_keeps_its_value_although_the_variable_is_changed_in_place(session):
    v = gl.Variable(np.zeros(2))
    before = v.read_value()
    with gl.control_dependencies([before]):
        added = v.assign_add(np.ones(2))
    session.run(gl.global_variables_initializer())
    old, new = session.run([before, added])
    np.testing.assert_array_equal(old, [0.0, 0.0])
    np.testing.assert_array_equal(new, [1.0, 1.0])


def test_control_dependencies_run_what_they_name(session, counted):
    one = counted(stateful=True)
    x = gl.placeholder(gl.float32, ())
    with gl.control_dependencies([one.operation(x)]):
        y = x * 2.0
    session.run(y, {x: 1.0})
    assert one.count == 1


def test_control_dependencies_nest_and_none_clears_them(session, counted):
    outer, inner = counted(stateful=True), counted(stateful=True)
    x = gl.placeholder(gl.float32, ())
    with gl.control_dependencies([outer.operation(x)]):
        with gl.control_dependencies([inner.operation(x)]):
            both = x + 1.0
        with gl.control_dependencies(None):
            neither = x + 2.0
    session.run(neither, {x: 1.0})
    assert (outer.count, inner.count) == (0, 0)
    session.run(both, {x: 1.0})
    assert (outer.count, inner.count) == (1, 1)


def test_group_runs_all_of_its_parts(session):
    a, b = gl.Variable(0.0), gl.Variable(0.0)
    session.run(gl.global_variables_initializer())
    together = gl.group(a.assign_add(1.0), [b.assign_add(2.0)])
    assert isinstance(together, Node)
    assert session.run(together) is None
    assert session.run([a, b]) == [1.0, 2.0]
    with gl.control_dependencies([together]):
        total = a + b
    assert session.run(total) == 6.0


def test_eager_mode_has_nothing_to_order():
    v = gl.Variable(1.0)
    with gl.control_dependencies([v.assign(2.0)]):
        assert float(v + 0.0) == 2.0
    assert gl.group() is None and gl.global_variables_initializer() is None


def test_an_assignment_by_a_node_reaches_a_second_session(graph):
    v = gl.Variable(1.0)
    with gl.Session() as first:
        first.run(gl.global_variables_initializer())
        first.run(v.assign(3.0))
    with gl.Session() as second:
        assert second.run(v) == 3.0


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradients_of_placeholders_and_variables(session):
    x = gl.placeholder(gl.float64, (3,))
    v = gl.get_variable("v", (3,), gl.float64, initializer="ones")
    y = x * x * v + v
    slope_x, slope_v = gl.gradients(y, [x, v])
    session.run(gl.global_variables_initializer())
    found_x, found_v = session.run([slope_x, slope_v], {x: X})
    np.testing.assert_allclose(found_x, 2 * X)
    np.testing.assert_allclose(found_v, X**2 + 1)


def test_gradients_of_gradients(session):
    x = gl.placeholder(gl.float64, (3,))
    y = gl.ops.exp(x * 2.0) * x
    [first] = gl.gradients(y, x)
    [second] = gl.gradients(first, x)
    [third] = gl.gradients(second, x)
    values = session.run([first, second, third], {x: X})
    e = np.exp(2 * X)
    for value, expected in zip(values, (e * (2 * X + 1), e * (4 * X + 4), e * (8 * X + 12)), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_grad_ys_stop_gradients_and_unconnected(session):
    x = gl.placeholder(gl.float64, (3,))
    z = gl.placeholder(gl.float64, (2,))
    middle = x * x
    y = middle * x
    weights = np.array([1.0, 2.0, 3.0])
    [weighted] = gl.gradients(y, x, grad_ys=[weights])
    [stopped] = gl.gradients(y, x, stop_gradients=[middle])
    assert gl.gradients(y, z) == [None]
    [zero] = gl.gradients(y, z, unconnected_gradients="zero")
    found = session.run([weighted, stopped, zero], {x: X, z: [1.0, 1.0]})
    np.testing.assert_allclose(found[0], 3 * X**2 * weights)
    np.testing.assert_allclose(found[1], X**2)
    np.testing.assert_array_equal(found[2], [0.0, 0.0])


def test_gradients_of_things_that_are_not_in_a_graph():
    with pytest.raises(GradientError, match="graph tensor"):
        gl.gradients(np.ones(2), np.ones(2))
    with gl.Graph().as_default():
        x = gl.placeholder(gl.float32, ())
        with pytest.raises(GradientError, match="cannot differentiate"):
            gl.gradients(x * 2.0, [np.ones(2)])


def test_gradients_with_unknown_sizes(session):
    x = gl.placeholder(gl.float64, (None, None))
    y = gl.reduce_mean(x * x, axis=0) + np.ones(3)
    [slope] = gl.gradients(y, x)
    value = np.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(session.run(slope, {x: value}), value)


def test_a_tape_in_a_graph_differentiates_the_graph(session):
    x = gl.placeholder(gl.float64, (3,))
    with gl.GradientTape() as tape:
        tape.watch(x)
        y = x * x
    np.testing.assert_allclose(session.run(tape.gradient(y, x), {x: X}), 2 * X)


# --- names, scopes, collections ---------------------------------------------------------------------------------------


def test_operations_are_named_by_type_and_counted(graph):
    x = gl.placeholder(gl.float32, (2, 2))
    assert x.name == "Placeholder:0" and x.op.type == "Placeholder"
    assert [gl.matmul(x, x).name for _ in range(3)] == ["MatMul:0", "MatMul_1:0", "MatMul_2:0"]
    assert gl.placeholder(gl.float32, (), name="x").name == "x:0"
    assert gl.placeholder(gl.float32, (), name="x").name == "x_1:0"


def test_name_scopes_prefix_nest_and_count(graph):
    x = gl.placeholder(gl.float32, ())
    with gl.name_scope("a") as prefix:
        assert prefix == "a/"
        assert (x * x).name.startswith("a/")
        with gl.name_scope("b"):
            assert (x * x).name.startswith("a/b/")
    with gl.name_scope("a") as prefix:
        assert prefix == "a_1/"
    with gl.name_scope("a/") as prefix:
        assert prefix == "a/"
    with gl.name_scope(None):
        assert "/" not in (x * x).name


@pytest.mark.parametrize("name", ["a b", "", "!"])
def test_a_name_that_is_not_legal(graph, name):
    if not name:
        with gl.name_scope(name) as prefix:
            assert prefix == ""
        return
    with pytest.raises(ValueError, match="not a valid scope name"), gl.name_scope(name):
        pass


def test_tensors_by_name_and_operations_in_order(graph):
    x = gl.placeholder(gl.float32, (), name="x")
    y = x + 1.0
    assert graph.get_tensor_by_name("x:0") is x
    assert graph.get_operations() == [x.op, y.op]


def test_collections(graph):
    gl.add_to_collection("mine", 1)
    gl.add_to_collection("mine", 2)
    copy = gl.get_collection("mine")
    copy.append(3)
    assert gl.get_collection("mine") == [1, 2]
    gl.get_collection_ref("mine").append(3)
    assert gl.get_collection("mine") == [1, 2, 3]
    assert gl.get_collection("nothing") == []
    a, b = gl.get_variable("a/w", ()), gl.get_variable("b/w", ())
    assert gl.get_collection(gl.GraphKeys.GLOBAL_VARIABLES, scope="a/") == [a]
    assert gl.global_variables() == [a, b] and gl.trainable_variables(scope="b") == [b]


def test_collections_belong_to_their_graph_and_eager_mode_has_none():
    with gl.Graph().as_default():
        gl.add_to_collection("mine", 1)
    with gl.Graph().as_default():
        assert gl.get_collection("mine") == []
    gl.add_to_collection("mine", 1)
    assert gl.get_collection("mine") == []


# --- modes ------------------------------------------------------------------------------------------------------------


def test_executing_eagerly_says_where_we_are():
    assert gl.executing_eagerly()
    with gl.Graph().as_default():
        assert not gl.executing_eagerly()
        with eager_mode():
            assert gl.executing_eagerly()
            assert type(gl.ops.tanh(X)) is np.ndarray
            v = gl.Variable(2.0)
            assert float(v) == 2.0
        assert not gl.executing_eagerly()


def test_eager_mode_is_left_for_good_and_restored():
    enter_default_graph()
    try:
        enter_default_graph()
        assert not gl.executing_eagerly()
        x = gl.placeholder(gl.float32, ())
        with gl.Session() as session:
            assert session.run(x * 2.0, {x: 2.0}) == 4.0
        gl.reset_default_graph()
        assert gl.get_default_graph().get_operations() == []
        assert not gl.executing_eagerly()
    finally:
        leave_default_graph()
    assert gl.executing_eagerly()


# --- cond -------------------------------------------------------------------------------------------------------------


def test_cond_with_a_known_predicate_calls_one_branch():
    assert gl.cond(np.array(False), lambda: 1, lambda: 2) == 2
    v = gl.Variable(X)
    with gl.GradientTape() as tape:
        y = gl.cond(gl.Variable(True, trainable=False), lambda: v * v, lambda: v)
    np.testing.assert_allclose(tape.gradient(y, v), 2 * X)


def test_cond_runs_only_the_chosen_branch(session, counted):
    yes, no = counted(stateful=True), counted(stateful=True)
    flag, x = gl.placeholder(gl.bool, ()), gl.placeholder(gl.float64, (3,))
    y = gl.cond(flag, lambda: yes.operation(x) * 2.0, lambda: no.operation(x) * 3.0)
    np.testing.assert_allclose(session.run(y, {flag: True, x: X}), 2 * X)
    assert (yes.count, no.count) == (1, 0)
    np.testing.assert_allclose(session.run(y, {flag: False, x: X}), 3 * X)
    assert (yes.count, no.count) == (1, 1)


def test_cond_gradients_reach_tensors_and_variables_read_inside(session):
    flag, x = gl.placeholder(gl.bool, ()), gl.placeholder(gl.float64, (3,))
    a = gl.get_variable("a", (3,), gl.float64, initializer="ones")
    b = gl.get_variable("b", (3,), gl.float64, initializer="ones")
    y = gl.cond(flag, lambda: x * x * a, lambda: gl.ops.exp(x) * b)
    slopes = gl.gradients(y, [x, a, b])
    session.run(gl.global_variables_initializer())
    for chosen, expected in ((True, (2 * X, X**2, 0 * X)), (False, (np.exp(X), 0 * X, np.exp(X)))):
        for value, wanted in zip(session.run(slopes, {flag: chosen, x: X}), expected, strict=True):
            np.testing.assert_allclose(value, wanted, rtol=1e-12)


def test_cond_second_derivative(session):
    flag, x = gl.placeholder(gl.bool, ()), gl.placeholder(gl.float64, (3,))
    y = gl.cond(flag, lambda: x**3, lambda: gl.ops.exp(x))
    [second] = gl.gradients(gl.gradients(y, x), x)
    np.testing.assert_allclose(session.run(second, {flag: True, x: X}), 6 * X)
    np.testing.assert_allclose(session.run(second, {flag: False, x: X}), np.exp(X))


def test_cond_with_side_effects(session):
    flag = gl.placeholder(gl.bool, ())
    v = gl.Variable(1.0)
    session.run(gl.global_variables_initializer())
    done = gl.cond(flag, lambda: v.assign_add(1.0), lambda: v.assign(100.0))
    session.run(done, {flag: True})
    assert session.run(v) == 2.0
    session.run(done, {flag: False})
    assert session.run(v) == 100.0


def test_cond_branches_that_return_nothing(session):
    flag, v = gl.placeholder(gl.bool, ()), gl.Variable(1.0)
    session.run(gl.global_variables_initializer())
    done = gl.cond(flag, lambda: gl.group(v.assign(5.0)), lambda: gl.no_op())
    session.run(done, {flag: False})
    assert session.run(v) == 1.0
    session.run(done, {flag: True})
    assert session.run(v) == 5.0


def test_a_read_behind_a_cond_that_assigns_sees_the_new_value(session):
    flag, v = gl.placeholder(gl.bool, ()), gl.Variable(1.0)
    session.run(gl.global_variables_initializer())
    done = gl.cond(flag, lambda: v.assign(5.0), lambda: v.read_value())
    with gl.control_dependencies([done]):
        after = v + 0.0
    assert session.run(after, {flag: False}) == 1.0
    assert session.run(after, {flag: True}) == 5.0


def test_cond_inside_cond(session):
    a, b, x = gl.placeholder(gl.bool, ()), gl.placeholder(gl.bool, ()), gl.placeholder(gl.float64, (3,))
    v = gl.get_variable("v", (3,), gl.float64, initializer="ones")
    y = gl.cond(a, lambda: gl.cond(b, lambda: x * v, lambda: x * x), lambda: x * 7.0)
    slope, slope_v = gl.gradients(y, [x, v])
    session.run(gl.global_variables_initializer())
    table = {(True, True): (X, 1.0, X), (True, False): (X * X, 2 * X, 0 * X), (False, True): (7 * X, 7.0, 0 * X)}
    for (first, second), expected in table.items():
        found = session.run([y, slope, slope_v], {a: first, b: second, x: X})
        for value, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(value, wanted + 0 * X)


def test_variables_made_in_a_branch_belong_to_the_graph(session):
    flag, x = gl.placeholder(gl.bool, ()), gl.placeholder(gl.float32, (None, 3))
    layer = gl.layers.Dense(2, kernel_initializer="ones")
    y = gl.cond(flag, lambda: layer(x), lambda: layer(x * 2.0))
    assert [v.name for v in gl.trainable_variables()] == ["dense/kernel:0", "dense/bias:0"]
    assert len(layer.weights) == 2 and gl.get_variable_scope().name == ""
    slope, _ = gl.gradients(y, layer.weights)
    session.run(gl.global_variables_initializer())
    data = np.ones((1, 3), "float32")
    for value, factor in ((True, 1.0), (False, 2.0)):
        found, gradient = session.run([y, slope], {flag: value, x: data})
        np.testing.assert_array_equal(found, np.full((1, 2), 3 * factor))
        np.testing.assert_array_equal(gradient, np.full((3, 2), factor))
    with gl.variable_scope("dense", reuse=True):
        assert gl.get_variable("kernel", (3, 2)) is layer.kernel


def test_cond_structures_and_unknown_shapes(session):
    flag = gl.placeholder(gl.bool, ())
    y = gl.cond(flag, lambda: {"a": np.ones(2), "b": 1.0}, lambda: {"a": np.zeros(3), "b": 2.0})
    assert y["a"].shape.as_list() == [None]
    found = session.run(y, {flag: False})
    np.testing.assert_array_equal(found["a"], np.zeros(3))
    assert found["b"] == 2.0


@pytest.mark.parametrize(
    "other", [lambda: [1.0, 2.0], lambda: np.ones(2, "int32"), lambda: None], ids=["structure", "dtype", "nothing"]
)
def test_cond_branches_must_agree(graph, other):
    flag = gl.placeholder(gl.bool, ())
    with pytest.raises(StructureError, match="branch"):
        gl.cond(flag, lambda: np.ones(2), other)


# --- function ---------------------------------------------------------------------------------------------------------


def test_function_traces_once_for_each_kind_of_arguments():
    traces = []

    @gl.function
    def scaled(x, factor=2.0, name="a"):
        traces.append((x.shape, x.dtype, factor, name))
        return x * factor

    np.testing.assert_array_equal(scaled(X), 2 * X)
    np.testing.assert_array_equal(scaled(X + 1), 2 * (X + 1))
    assert len(traces) == 1
    scaled(X[:2])
    scaled(X.astype("float32"))
    scaled(X, 3.0)
    scaled(X, factor=3.0)
    scaled(X, name="b")
    count = len(traces)
    assert count >= 5
    for _ in range(3):
        scaled(X[:2])
        np.testing.assert_array_equal(scaled(X, 3.0), 3 * X)
    assert len(traces) == count


def test_function_keeps_true_apart_from_one():
    @gl.function
    def f(x, flag):
        return x * 2.0 if flag is True else x * 3.0

    np.testing.assert_array_equal(f(X, True), 2 * X)
    np.testing.assert_array_equal(f(X, 1), 3 * X)


def test_function_takes_and_returns_structures():
    @gl.function
    def f(pair, *, more):
        return {"sum": pair[0] + pair[1], "rest": (more["z"], None, "text", 3)}

    found = f([X, X], more={"z": X})
    np.testing.assert_array_equal(found["sum"], 2 * X)
    np.testing.assert_array_equal(found["rest"][0], X)
    assert found["rest"][1:] == (None, "text", 3)
    assert type(found["sum"]) is np.ndarray


def test_function_under_a_tape():
    @gl.function
    def f(x, v):
        return gl.ops.tanh(x) * v

    x, v = X.copy(), gl.Variable(X)
    for _ in range(2):
        with gl.GradientTape() as tape:
            y = f(tape.watch(x), v)
        slope_x, slope_v = tape.gradient(y, [x, v])
        np.testing.assert_allclose(slope_x, (1 - np.tanh(X) ** 2) * X)
        np.testing.assert_allclose(slope_v, np.tanh(X))


def test_function_of_a_watched_array_known_by_identity():
    @gl.function
    def f(x):
        return x * x

    x = X.copy()
    with gl.GradientTape() as tape:
        tape.watch(x)
        y = f(x)
    np.testing.assert_allclose(tape.gradient(y, x), 2 * X)


def test_function_reads_variables_anew_at_each_call():
    v = gl.Variable(1.0)

    @gl.function
    def f(x):
        return x * v

    assert float(f(np.float32(2.0) * np.ones(()))) == 2.0
    v.assign(5.0)
    assert float(f(np.float32(2.0) * np.ones(()))) == 10.0


def test_function_with_variables_made_inside():
    class Counter:
        def __init__(self):
            self.v = None

        @gl.function
        def step(self, x):
            if self.v is None:
                self.v = gl.Variable(np.zeros(3))
            self.v.assign_add(x)
            return self.v * 1.0

    one, two = Counter(), Counter()
    np.testing.assert_array_equal(one.step(X), X)
    np.testing.assert_array_equal(one.step(X), 2 * X)
    np.testing.assert_array_equal(two.step(X), X)


def test_function_builds_a_layer_in_its_first_call():
    layer = gl.keras.layers.Dense(2, kernel_initializer="ones")
    f = gl.function(lambda x: layer(x))
    x = np.ones((4, 3), "float32")
    np.testing.assert_array_equal(f(x), np.full((4, 2), 3.0))
    assert len(layer.weights) == 2 and layer.weights[0].numpy().shape == (3, 2)
    np.testing.assert_array_equal(f(x), layer(x))


def test_assignments_in_a_function_happen_in_order_at_each_call():
    v = gl.Variable(1.0)

    @gl.function
    def f():
        before = v + 0.0
        v.assign_add(1.0)
        middle = v * 10.0
        v.assign(v * 2.0)
        return before, middle, v.read_value()

    assert [float(one) for one in f()] == [1.0, 20.0, 4.0]
    assert [float(one) for one in f()] == [4.0, 50.0, 10.0]


def test_an_effect_whose_result_is_not_returned_still_happens(counted):
    one = counted(stateful=True)

    @gl.function
    def f(x):
        one.operation(x)
        return x * 2.0

    f(X)
    f(X)
    assert one.count == 2


def test_training_step_with_tape_and_optimizer_inside_a_function():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(32, 3)), np.array([[1.0], [-2.0], [0.5]])
    y = x @ w
    v = gl.Variable(np.zeros((3, 1)), name="w")
    optimizer = gl.optimizers.SGD(0.1)

    @gl.function
    def step(x, y):
        with gl.GradientTape() as tape:
            loss = gl.reduce_mean((gl.matmul(x, v) - y) ** 2)
        optimizer.apply_gradients([(tape.gradient(loss, v), v)])
        return loss

    expected = np.zeros((3, 1))
    for _ in range(5):
        error = x @ expected - y
        loss = step(x, y)
        assert float(loss) == pytest.approx(float(np.mean(error**2)))
        expected = expected - 0.1 * 2 / len(x) * x.T @ error
        np.testing.assert_allclose(v.numpy(), expected, rtol=1e-6)


def test_function_inside_a_function_and_in_a_graph():
    inner = gl.function(lambda x: x * x)
    outer = gl.function(lambda x: inner(x) + 1.0)
    np.testing.assert_allclose(outer(X), X**2 + 1)
    with gl.Graph().as_default(), gl.Session() as session:
        x = gl.placeholder(gl.float64, (3,))
        np.testing.assert_allclose(session.run(outer(x), {x: X}), X**2 + 1)


def test_cond_on_a_tensor_inside_a_function():
    @gl.function
    def f(x):
        return gl.cond(gl.reduce_sum(x) > 0, lambda: x * 2.0, lambda: x * 3.0)

    np.testing.assert_array_equal(f(X), 2 * X)
    np.testing.assert_array_equal(f(-X), -3 * X)
    x = X.copy()
    with gl.GradientTape() as tape:
        y = f(tape.watch(x))
    np.testing.assert_array_equal(tape.gradient(y, x), np.full(3, 2.0))


def test_random_numbers_in_a_function_differ_at_each_call():
    f = gl.function(lambda x: x + gl.random_uniform((3,)))
    assert not np.array_equal(f(X), f(X))


def test_disable_eager_execution():
    OLD.disable_eager_execution()
    try:
        assert not gl.executing_eagerly()
        x = OLD.placeholder(OLD.float32, ())
        with OLD.Session() as session:
            assert session.run(x + 1.0, {x: 1.0}) == 2.0
    finally:
        leave_default_graph()
        gl.reset_default_graph()


def test_a_state_error_is_a_runtime_error():
    assert issubclass(StateError, RuntimeError)


def test_second_derivative_of_a_cond_in_a_function_by_nested_tapes():
    @gl.function
    def f(x, v):
        return gl.cond(gl.reduce_sum(x) > 0, lambda: x**3 * v, lambda: gl.ops.exp(x))

    x, v = X.copy(), gl.Variable(X)
    for sign, expected in ((1.0, 6 * X * X), (-1.0, np.exp(-X))):
        z = sign * x
        with gl.GradientTape() as outer:
            t = outer.watch(z)
            with gl.GradientTape() as inner:
                inner.watch(t)
                y = f(t, v)
            slope = inner.gradient(y, t)
        np.testing.assert_allclose(outer.gradient(slope, z), expected)


def test_a_placeholder_with_a_default_is_fed_or_not():
    with gl.Graph().as_default(), gl.Session() as session:
        x = gl.placeholder_with_default([1.0, 2.0], (None,))
        assert tuple(x.shape) == (None,)
        y = x * 3.0
        np.testing.assert_array_equal(session.run(y), [3.0, 6.0])
        np.testing.assert_array_equal(session.run(y, {x: [5.0]}), [15.0])
        with pytest.raises(ValueError, match="incompatible"):
            gl.placeholder_with_default([1.0, 2.0], (3,))
    np.testing.assert_array_equal(gl.placeholder_with_default([1.0, 2.0], (None,)), [1.0, 2.0])
