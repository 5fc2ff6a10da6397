"""Layer: construction, names and scopes, and the life of a call, in both families."""

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.layers.naming import snake_case

X = np.ones((2, 3), "float32")


class MyLayer2D(gl.layers.Layer):
    """A legacy layer with one variable."""

    def build(self, input_shape):
        self.kernel = self.add_variable("kernel", (3, 3), initializer="ones")

    def call(self, inputs):
        return gl.matmul(inputs, self.kernel)


class Modern(gl.keras.layers.Layer):
    """A modern layer with one variable."""

    def build(self, input_shape):
        self.kernel = self.add_weight("kernel", (input_shape[-1], 3), initializer="ones")

    def call(self, inputs):
        return gl.matmul(inputs, self.kernel)


@pytest.fixture
def graph():
    with gl.Graph().as_default() as graph:
        yield graph


@pytest.fixture
def x(graph):
    return gl.placeholder(gl.float32, (None, 3))


FAMILIES = pytest.mark.parametrize("base", [gl.layers.Layer, gl.keras.layers.Layer], ids=["legacy", "modern"])


# --- construction -----------------------------------------------------------------------------------------------------


@FAMILIES
def test_state_after_construction(base):
    layer = base()
    assert not layer.built and layer.trainable and not layer.dynamic and not layer.stateful
    assert not layer.supports_masking and layer.input_spec is None
    for empty in (layer.losses, layer.updates, layer.weights, layer.variables, layer.metrics):
        assert empty == []
    assert layer.trainable_weights == layer.non_trainable_weights == []


def test_dtype_after_construction():
    legacy, modern = gl.layers.Layer(), gl.keras.layers.Layer()
    assert legacy.dtype is None and repr(legacy.dtype_policy) == '<Policy "_infer">'
    assert modern.dtype == "float32" and repr(modern.dtype_policy) == '<Policy "float32">'


@FAMILIES
@pytest.mark.parametrize("dtype", ["float64", np.float64, gl.float64, gl.keras.mixed_precision.Policy("float64")])
def test_kinds_of_dtype(base, dtype):
    layer = base(dtype=dtype)
    assert layer.dtype == layer.variable_dtype == layer.compute_dtype == "float64"


@FAMILIES
@pytest.mark.parametrize("keyword", ["reuse", "shape", "scope", "kernel"])
def test_other_keywords_are_a_type_error_with_these_arguments(base, keyword):
    with pytest.raises(TypeError) as caught:
        base(**{keyword: 1})
    assert caught.value.args == ("Keyword argument not understood:", keyword)


def test_scope_keywords_belong_to_the_legacy_family():
    gl.layers.Layer(_scope="a", _reuse=False)
    for keyword in ("_scope", "_reuse"):
        with pytest.raises(TypeError):
            gl.keras.layers.Layer(**{keyword: "a"})


@FAMILIES
@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"input_dim": 3}, (None, 3)),
        ({"input_shape": (3, 4)}, (None, 3, 4)),
        ({"input_shape": (3,), "batch_size": 5}, (5, 3)),
        ({"batch_input_shape": (7, 3)}, (7, 3)),
    ],
)
def test_input_shape_keywords_are_reported_in_the_config(base, keywords, expected):
    layer = base(**keywords)
    assert layer._batch_input_shape == expected and layer.get_config()["batch_input_shape"] == expected


@FAMILIES
def test_keywords_that_are_taken(base):
    layer = base(dynamic=True, autocast=False, implementation=1, activity_regularizer="l2")
    assert layer.dynamic and callable(layer.activity_regularizer)


@pytest.mark.parametrize("cls", [MyLayer2D, Modern])
def test_weights_given_at_construction_are_assigned_after_build(cls):
    value = np.arange(9.0).reshape(3, 3)
    layer = cls(weights=[value])
    layer(X)
    np.testing.assert_array_equal(layer.kernel.numpy(), value)
    layer.kernel.assign(value * 0)
    layer(X)
    np.testing.assert_array_equal(layer.kernel.numpy(), value * 0)


def test_activity_regularizer_of_unknown_kind():
    with pytest.raises(ValueError):
        gl.layers.Layer(activity_regularizer="no_such_regularizer")


# --- automatic names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_name", "expected"),
    [
        ("Dense", "dense"),
        ("Conv2D", "conv2d"),
        ("BatchNormalization", "batch_normalization"),
        ("MyLayer2D", "my_layer2d"),
        ("HTTPServer2", "http_server2"),
        ("ABCLayer", "abc_layer"),
        ("LSTMCell", "lstm_cell"),
        ("BasicLSTMCell", "basic_lstm_cell"),
        ("MultiRNNCell", "multi_rnn_cell"),
        ("RNNCellResidualWrapper", "rnn_cell_residual_wrapper"),
        ("X1Y2Zz", "x1y2_zz"),
        ("_Private", "private__private"),
    ],
)
def test_snake_case(class_name, expected):
    assert snake_case(class_name) == expected
    with gl.Graph().as_default():
        assert type(class_name, (gl.keras.layers.Layer,), {})().name == expected
        assert type(class_name, (gl.layers.Layer,), {})().name == f"{expected}_2"


def test_one_counter_serves_both_families(graph):
    modern, legacy = gl.keras.layers.Dense, gl.layers.Dense
    names = [cls(1).name for cls in (modern, modern, legacy, legacy, modern)]
    assert names == ["dense", "dense_1", "dense_3", "dense_4", "dense_4"]


def test_each_graph_counts_for_itself(graph):
    assert gl.layers.Dense(1).name == "dense_1"
    with gl.Graph().as_default():
        assert gl.layers.Dense(1).name == "dense_1"
    assert gl.layers.Dense(1).name == "dense_2"


@FAMILIES
def test_an_empty_name_is_automatic(graph, base):
    assert base(name="").name.startswith("layer")


@pytest.mark.parametrize("name", [3, 0, b"dense"])
def test_a_modern_name_is_text(name):
    with pytest.raises(TypeError, match="name is of a wrong type"):
        gl.keras.layers.Dense(2, name=name)


def test_given_names_are_not_counted(graph):
    assert gl.layers.Dense(1, name="dense_1").name == "dense_1"
    assert gl.layers.Dense(1).name == "dense_1"


# --- scopes of legacy layers: the table -------------------------------------------------------------------------------


def names_of(layer):
    return layer.name, layer.scope_name, layer.kernel.name


def test_the_measured_table_of_names(x):
    def called(*arguments, **keywords):
        layer = MyLayer2D(*arguments, **keywords)
        layer(x)
        return layer

    first, second = called(), called()
    assert names_of(first) == ("my_layer2d_1", "my_layer2d", "my_layer2d/kernel:0")
    assert names_of(second) == ("my_layer2d_2", "my_layer2d_1", "my_layer2d_1/kernel:0")
    foo = called(name="foo")
    assert names_of(foo) == ("foo", "foo", "foo/kernel:0")
    assert names_of(called(name="foo")) == ("foo", "foo_1", "foo_1/kernel:0")
    with gl.variable_scope("outer"):
        assert names_of(called(name="foo")) == ("foo", "outer/foo", "outer/foo/kernel:0")
        assert names_of(called()) == ("my_layer2d_3", "outer/my_layer2d", "outer/my_layer2d/kernel:0")
    shared = called(name="foo", _scope="foo", _reuse=True)
    assert names_of(shared)[:2] == ("foo", "foo") and shared.kernel is foo.kernel
    reused = called(name="foo", _reuse=True)
    assert names_of(reused)[:2] == ("foo", "foo") and reused.kernel is foo.kernel
    with pytest.raises(ValueError, match="already exists"):
        called(_scope="foo")
    with pytest.raises(ValueError, match="does not exist"):
        called(_scope="nonexist", _reuse=True)
    assert names_of(called(name="nm", _scope="zip2")) == ("nm", "zip2", "zip2/kernel:0")
    named = MyLayer2D(name="foo")
    named(x, scope="callscope")
    assert names_of(named) == ("foo", "callscope", "callscope/kernel:0")
    assert names_of(called(name="x/y")) == ("x/y", "x/y", "x/y/kernel:0")


def test_scopes_are_counted_in_the_order_of_calls(x):
    a, b = gl.layers.Dense(1), gl.layers.Dense(1)
    b(x)
    a(x)
    assert (a.scope_name, b.scope_name) == ("dense_1", "dense")


@pytest.mark.parametrize("reuse", [True, gl.AUTO_REUSE])
def test_entering_a_scope_again_with_reuse_shares_by_explicit_name(x, reuse):
    with gl.variable_scope("outer"):
        one = MyLayer2D(name="q")
        one(x)
    with gl.variable_scope("outer", reuse=reuse):
        two = MyLayer2D(name="q")
        two(x)
    assert one.kernel is two.kernel and two.scope_name == "outer/q"


def test_without_entering_the_scope_again_the_second_instance_is_counted(x):
    with gl.variable_scope("outer", reuse=gl.AUTO_REUSE):
        one, two = MyLayer2D(name="q"), MyLayer2D(name="q")
        one(x)
        two(x)
    assert two.scope_name == "outer/q_1" and one.kernel is not two.kernel


def test_functional_wrappers_share_even_without_entering_again(x):
    with gl.variable_scope("outer", reuse=gl.AUTO_REUSE):
        gl.layers.dense(x, 2, name="q")
        gl.layers.dense(x, 2, name="q")
    assert [v.name for v in gl.global_variables()] == ["outer/q/kernel:0", "outer/q/bias:0"]


def test_scope_name_before_the_first_use():
    with pytest.raises(ValueError, match="No name available.*has not been used yet"):
        _ = MyLayer2D(name="a").scope_name


def test_the_scope_never_changes_once_captured(x):
    layer = MyLayer2D(name="foo")
    layer(x)
    with gl.variable_scope("elsewhere"):
        layer(x)
        layer(x, scope="other")
    assert layer.scope_name == "foo"


def test_a_name_that_is_no_legal_scope_is_refused_at_first_use(x):
    layer = MyLayer2D(name="a b")
    with pytest.raises(ValueError, match="not a valid scope name"):
        layer(x)


def test_a_scope_object_as_name(x):
    with gl.variable_scope("given") as scope:
        pass
    layer = MyLayer2D(name=scope)
    layer(x)
    assert layer.name == "my_layer2d_1" and layer.scope_name.startswith("given")


def test_names_of_operations(x):
    layer = MyLayer2D()
    assert layer(x).name == "my_layer2d/MatMul:0"
    assert layer(x).name == "my_layer2d/MatMul_1:0"
    assert MyLayer2D()(x).name == "my_layer2d_1/MatMul:0"


def test_layers_that_share_variables_have_operations_of_their_own(x):
    MyLayer2D(name="fc", _scope="fc")(x)
    y = MyLayer2D(name="fc", _scope="fc", _reuse=True)(x)
    assert y.name == "fc_1/MatMul:0"


# --- names of modern variables ----------------------------------------------------------------------------------------


class Outer(gl.keras.layers.Layer):
    """A layer around another."""

    def __init__(self, **keywords):
        super().__init__(**keywords)
        self.inner = Modern(name="b")

    def call(self, inputs):
        return self.inner(inputs)


def test_modern_variable_names():
    layer = Modern(name="a")
    layer(X)
    assert layer.kernel.name == "a/kernel:0"
    nested = Outer(name="two")
    nested(X)
    assert nested.inner.kernel.name == "two/b/kernel:0"
    by_hand = Modern(name="c")
    by_hand.build((None, 3))
    assert by_hand.kernel.name == "kernel:0"
    again = Modern(name="a")
    again(X)
    assert again.kernel.name == "a/kernel:0" and again.kernel is not layer.kernel


def test_modern_variable_names_in_a_graph(x):
    layer = Outer(name="two")
    layer(x)
    assert layer.inner.kernel.name == "two/b/kernel:0"


# --- the life of a call -----------------------------------------------------------------------------------------------


@FAMILIES
def test_the_base_layer_returns_its_input_itself(base):
    x = X.copy()
    assert base()(x) is x
    layer = base()
    layer.build((2, 3))
    assert layer.built


@FAMILIES
def test_build_gets_shapes_in_the_structure_of_the_inputs_and_is_called_once(base):
    shapes = []

    class Probe(base):
        def build(self, input_shape):
            shapes.append(input_shape)  # and does not set built

        def call(self, inputs):
            return gl.nest.flatten(inputs)[0]

    for inputs, expected in (
        (X, gl.TensorShape((2, 3))),
        ([X, X], [(2, 3), (2, 3)]),
        ((X, X[0]), ((2, 3), (3,))),
        ({"a": X}, {"a": (2, 3)}),
    ):
        layer = Probe()
        layer(inputs)
        layer(inputs)
        found = shapes.pop()
        assert not shapes and type(found) is type(expected) and found == expected
        assert layer.built
        assert all(isinstance(s, gl.TensorShape) for s in gl.nest.flatten(found))


@pytest.mark.parametrize("cls", [MyLayer2D, Modern])
def test_building_by_hand_comes_first_and_only_once(cls):
    layer = cls()
    layer.build(gl.TensorShape((None, 3)))
    kernel = layer.kernel
    layer(X)
    assert layer.kernel is kernel and len(layer.weights) == 1


@FAMILIES
def test_apply_is_a_call(base):
    class Plus(base):
        def call(self, inputs, more=0.0):
            return inputs + more

    np.testing.assert_array_equal(Plus().apply(X, more=2.0), X + 2)


def test_the_first_argument_of_a_legacy_call_is_named_inputs():
    with pytest.raises(TypeError, match="inputs"):
        MyLayer2D()(x=X)
    np.testing.assert_array_equal(MyLayer2D()(inputs=X), np.full((2, 3), 3.0))


@pytest.mark.parametrize(
    ("value", "dtype"), [(np.ones((1, 2)), "float64"), (2.0, "float32"), (2, "int32"), ([1.0, 2.0], "float32")]
)
def test_legacy_inputs_become_arrays_and_are_not_cast(value, dtype):
    seen = []

    class Probe(gl.layers.Layer):
        def call(self, inputs):
            seen.extend(gl.nest.flatten(inputs))
            return gl.nest.flatten(inputs)[0]

    layer = Probe()
    layer(value)
    assert all(type(v) is np.ndarray and v.dtype == dtype for v in seen)
    assert layer.dtype == dtype


class Training(gl.layers.Layer):
    """Says what `training` it was called with."""

    def call(self, inputs, training=None):
        self.seen = training
        return inputs * 1


class ModernTraining(gl.keras.layers.Layer):
    """The same, modern."""

    def call(self, inputs, training=None):
        self.seen = training
        return inputs * 1


class Around(gl.keras.layers.Layer):
    """Calls an inner layer without saying how."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, inputs, training=None):
        return self.inner(inputs)


class AroundWithout(gl.keras.layers.Layer):
    """The same, not taking `training` itself."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, inputs):
        return self.inner(inputs)


@pytest.mark.parametrize("inner_class", [Training, ModernTraining])
@pytest.mark.parametrize("around", [Around, AroundWithout])
def test_training_comes_from_the_enclosing_call(inner_class, around):
    inner = inner_class()
    layer = around(inner)
    layer(X, training=True)
    assert inner.seen is True
    layer(X)
    assert inner.seen is None
    Around(inner)(X, training=False)
    assert inner.seen is False


@pytest.mark.parametrize("cls", [Training, ModernTraining])
def test_an_explicit_training_wins_then_the_learning_phase(cls):
    layer = cls()
    gl.keras.backend.set_learning_phase(1)
    try:
        layer(X)
        assert layer.seen == 1
        layer(X, training=False)
        assert layer.seen is False
        layer(X, False)
        assert layer.seen is False
    finally:
        gl.keras.backend.set_learning_phase(None)
    layer(X)
    assert layer.seen is None


def test_in_a_graph_the_learning_phase_is_a_tensor_that_can_be_fed():
    x = np.array([[1.0], [3.0]], "float32")
    with gl.Graph().as_default() as graph:
        inputs = gl.placeholder(gl.float32, (None, 1))
        normalise, drop = gl.keras.layers.BatchNormalization(epsilon=0.0), gl.keras.layers.Dropout(0.5)
        y, z = normalise(inputs), drop(inputs)
        phase = gl.keras.backend.learning_phase()
        assert phase is gl.keras.backend.learning_phase() and phase.graph is graph
        told = gl.keras.layers.BatchNormalization(epsilon=0.0)(inputs, training=False)
        with gl.Session() as session:
            session.run(gl.global_variables_initializer())
            for fed, training in (({}, False), ({phase: 0}, False), ({phase: 1}, True)):
                mean = session.run(normalise.moving_mean)
                found = session.run([y, z, told, normalise.updates], {inputs: x, **fed})
                np.testing.assert_allclose(found[0], [[-1], [1]] if training else x, rtol=1e-6)
                assert np.isin(found[1], [0, 2, 6]).all() if training else (found[1] == x).all()
                np.testing.assert_array_equal(found[2], x)
                assert (session.run(normalise.moving_mean) != mean) == training
    with gl.Graph().as_default():
        assert gl.keras.backend.learning_phase() is not phase
    assert gl.keras.backend.learning_phase() is None


@FAMILIES
def test_training_is_dropped_where_call_does_not_take_it(base):
    class Plain(base):
        def call(self, inputs):
            return inputs * 2

    np.testing.assert_array_equal(Plain()(X, training=True), 2 * X)


def test_scope_in_a_legacy_call_is_the_layers_own(x):
    class Scoped(gl.layers.Layer):
        def call(self, inputs, scope=None):
            self.seen = scope
            return inputs * 1

    layer = Scoped(name="sc")
    layer(x)
    assert isinstance(layer.seen, gl.VariableScope) and layer.seen.name == "sc"
    layer(x, scope="other")
    assert layer.seen.name == "sc"
    with pytest.raises(TypeError, match="multiple values"):
        layer(x, "mine")


@FAMILIES
def test_a_failed_input_check_leaves_the_layer_unbuilt(base):
    layer = base()
    layer.input_spec = gl.keras.layers.InputSpec(ndim=4)
    with pytest.raises(ValueError):
        layer(X)
    assert not layer.built


@FAMILIES
def test_a_spec_set_by_build_is_checked_from_the_second_call_on(base):
    class Late(base):
        def build(self, input_shape):
            self.input_spec = gl.keras.layers.InputSpec(ndim=4)

    layer = Late()
    layer(X)
    with pytest.raises(ValueError, match="expected ndim=4, found ndim=2"):
        layer(X)


# --- variables are made while the layer is not built ------------------------------------------------------------------


class Creating(gl.layers.Layer):
    """Makes a variable in `call`."""

    def call(self, inputs):
        return inputs * self.add_variable("late", ())


@pytest.mark.parametrize("symbolic", [True, False])
def test_a_legacy_layer_cannot_make_variables_in_call(graph, symbolic):
    layer = Creating()
    with pytest.raises(ValueError, match="does not exist"):
        layer(gl.placeholder(gl.float32, (2,)) if symbolic else X)


def test_after_build_an_existing_name_is_returned_and_a_new_one_refused(x):
    layer = MyLayer2D()
    layer(x)
    assert layer.add_variable("kernel", (3, 3)) is layer.kernel
    assert layer.weights == [layer.kernel]
    with pytest.raises(ValueError, match="does not exist"):
        layer.add_variable("other", ())


def test_before_build_a_second_variable_of_the_name_is_refused(graph):
    layer = MyLayer2D()
    layer.add_variable("a", ())
    with pytest.raises(ValueError, match="already exists"):
        layer.add_variable("a", ())


def test_a_modern_layer_may_make_variables_in_call():
    class Lazy(gl.keras.layers.Layer):
        def call(self, inputs):
            if not self.weights:
                self.w = self.add_weight("w", (), initializer="ones")
            return inputs * self.w

    layer = Lazy()
    np.testing.assert_array_equal(layer(X), X)
    assert len(layer.weights) == 1


def test_a_layer_named_after_the_root_scope_puts_its_variables_there(x):
    layer = MyLayer2D(name=gl.get_variable_scope())
    with gl.name_scope("n"):
        y = layer(x)
    assert (layer.scope_name, [v.name for v in layer.variables]) == ("", ["kernel:0"])
    assert "/" not in y.name
