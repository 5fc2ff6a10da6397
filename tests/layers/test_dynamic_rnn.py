"""dynamic_rnn and static_rnn: lengths, states, scopes, structures, errors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpulayers as gl
from gpulayers import nest, ops
from gpulayers.keras import layers
from gpulayers.nn import RNNCellResidualWrapper, dynamic_rnn, rnn_cell, static_rnn
from gpulayers.trace import GradientTape, Graph, Session, gradients, placeholder
from gpulayers.variables import global_variables_initializer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

RNG = np.random.default_rng(3)
X = RNG.standard_normal((3, 5, 4)).astype(np.float32)
CELLS = [
    lambda: rnn_cell.BasicRNNCell(4),
    lambda: rnn_cell.GRUCell(4),
    lambda: rnn_cell.BasicLSTMCell(4),
    lambda: rnn_cell.BasicLSTMCell(4, state_is_tuple=False),
    lambda: rnn_cell.LSTMCell(4, use_peepholes=True, cell_clip=0.5),
    lambda: rnn_cell.LSTMCell(6, num_proj=4),
    lambda: rnn_cell.ResidualWrapper(rnn_cell.GRUCell(4)),
    lambda: RNNCellResidualWrapper(layers.LSTMCell(4)),
    lambda: RNNCellResidualWrapper(rnn_cell.LSTMCell(4), lambda i, o: 2 * i - o),
    lambda: rnn_cell.MultiRNNCell([rnn_cell.GRUCell(4), rnn_cell.ResidualWrapper(rnn_cell.BasicLSTMCell(4))]),
]


def by_hand(cell, x, lengths):
    """The contract, written out for arrays (N, T, D)."""
    state = nest.flatten(cell.get_initial_state(batch_size=len(x), dtype=x.dtype.name))
    outputs = []
    for t in range(x.shape[1]):
        output, new = cell(x[:, t], nest.pack_sequence_as(cell.state_size, state))
        valid = (t < np.asarray(lengths))[:, None]
        outputs.append(np.where(valid, output, 0))
        state = [np.where(valid, a, b) for a, b in zip(nest.flatten(new), state, strict=True)]
    return np.stack(outputs, 1), state


@pytest.mark.parametrize("make", CELLS)
@pytest.mark.parametrize("lengths", [[5, 5, 5], [2, 0, 4], [0, 0, 0]], ids=str)
def test_lengths(make, lengths):
    cell = make()
    y, final = dynamic_rnn(cell, X, sequence_length=lengths, dtype="float32")
    expected, state = by_hand(cell, X, lengths)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    nest.assert_same_structure(final, cell.state_size)
    for ours, theirs in zip(nest.flatten(final), state, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@settings(max_examples=15)
@given(
    which=st.sampled_from(range(len(CELLS))),
    lengths=st.lists(st.integers(0, 5), min_size=3, max_size=3),
    time_major=st.booleans(),
)
def test_static_dynamic_and_graph_agree(which, lengths, time_major):
    cell = CELLS[which]()
    x = X.swapaxes(0, 1) if time_major else X
    y, final = dynamic_rnn(cell, x, sequence_length=lengths, dtype="float32", time_major=time_major)
    outputs, state = static_rnn(cell, list(X.swapaxes(0, 1)), sequence_length=lengths, dtype="float32")
    assert len(outputs) == 5
    np.testing.assert_allclose(np.stack(outputs, 0 if time_major else 1), y, rtol=1e-5, atol=1e-6)
    for a, b in zip(nest.flatten(state), nest.flatten(final), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    function = gl.function(
        lambda v: dynamic_rnn(cell, v, sequence_length=lengths, dtype="float32", time_major=time_major)
    )
    np.testing.assert_allclose(function(x)[0], y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", CELLS)
def test_gradients_match_finite_differences(make):
    x, along = X[:2, :3].astype(np.float64), RNG.standard_normal((2, 3, 4))
    cell = make()
    if isinstance(cell, RNNCellResidualWrapper):
        pytest.skip("its policy is float32; the layer's tests cover it in float64")
    w = RNG.standard_normal((2, 3, 4))

    def total(value):
        y, state = dynamic_rnn(cell, value, sequence_length=[2, 3], dtype="float64")
        return ops.sum(y * w) + sum(ops.sum(s) for s in nest.flatten(state))

    total(x)
    with GradientTape() as tape:
        tape.watch(x)
        value = total(x)
    slope = (float(total(x + 1e-5 * along)) - float(total(x - 1e-5 * along))) / 2e-5
    np.testing.assert_allclose(np.sum(tape.gradient(value, x) * along), slope, rtol=1e-6)


def test_nothing_flows_from_beyond_the_length():
    with GradientTape() as tape:
        tape.watch(X)
        y, _ = dynamic_rnn(rnn_cell.ResidualWrapper(rnn_cell.GRUCell(4)), X, sequence_length=[2, 0, 5], dtype="float32")
    slope = tape.gradient(y, X)
    assert not slope[0, 2:].any() and not slope[1].any() and slope[2].all()


def test_initial_state_and_zero_length():
    cell = rnn_cell.BasicLSTMCell(4)
    start = rnn_cell.LSTMStateTuple(*RNG.standard_normal((2, 3, 4)).astype(np.float32))
    y, final = dynamic_rnn(cell, X, sequence_length=[0, 0, 0], initial_state=start)
    assert not y.any()
    np.testing.assert_array_equal(final.c, start.c)
    np.testing.assert_array_equal(final.h, start.h)


def test_scopes_and_names():
    with Graph().as_default():
        x = placeholder("float32", (None, None, 4))
        multi = rnn_cell.MultiRNNCell([rnn_cell.GRUCell(4), rnn_cell.ResidualWrapper(rnn_cell.BasicRNNCell(4))])
        dynamic_rnn(multi, x, dtype="float32")
        dynamic_rnn(RNNCellResidualWrapper(rnn_cell.BasicRNNCell(4)), x, dtype="float32", scope="here")
        names = [v.name for v in gl.global_variables()]
    assert names[0] == "rnn/multi_rnn_cell/cell_0/gru_cell/gates/kernel:0"
    assert "rnn/multi_rnn_cell/cell_1/basic_rnn_cell/kernel:0" in names
    assert "here/basic_rnn_cell/kernel:0" in names


def test_a_loop_in_the_graph_draws_new_dropout_at_every_step_and_its_gradient_uses_the_same():
    x = np.ones((4, 6, 8), np.float32)
    with Graph().as_default(), Session() as session:
        p = placeholder("float32", (None, None, 8))

        class Echo(rnn_cell.RNNCell):
            state_size = output_size = 8

            def call(self, inputs, state):
                return inputs * 1.0, state

        cell = rnn_cell.DropoutWrapper(Echo(), output_keep_prob=0.5)
        y, _ = dynamic_rnn(cell, p, dtype="float32")
        slope = gradients(y, [p])[0]
        session.run(global_variables_initializer())
        value, gradient = session.run([y, slope], {p: x})
        again = session.run(y, {p: x})
    np.testing.assert_array_equal(value, gradient)
    assert not np.array_equal(value[:, 0], value[:, 1]) and not np.array_equal(value, again)


def test_lengths_that_do_not_fit():
    cell = rnn_cell.GRUCell(4)
    dynamic_rnn(cell, X, dtype="float32")
    for lengths in ([[1, 2, 3]], 2, [1, 2]):
        with pytest.raises(ValueError, match="vector of length batch_size"):
            dynamic_rnn(cell, X, sequence_length=lengths, dtype="float32")
    for lengths in ([6, 0, 0], [-1, 0, 0]):
        with pytest.raises(ValueError, match="beyond the time axis"):
            dynamic_rnn(cell, X, sequence_length=lengths, dtype="float32")
    with pytest.raises(TypeError, match="integers"):
        dynamic_rnn(cell, X, sequence_length=[1.0, 2.0, 3.0], dtype="float32")
    with Graph().as_default(), Session() as session:
        x, n = placeholder("float32", (None, None, 4)), placeholder("int32", (None,))
        y, _ = dynamic_rnn(rnn_cell.GRUCell(4), x, sequence_length=n, dtype="float32")
        session.run(global_variables_initializer())
        for lengths in ([6, 0, 0], [1, 2]):
            with pytest.raises(ValueError, match="sequence_length"):
                session.run(y, {x: X, n: lengths})
        with pytest.raises(ValueError, match="vector"):
            dynamic_rnn(rnn_cell.GRUCell(4), x, sequence_length=placeholder("int32", (None, 1)), dtype="float32")


def test_errors():
    cell = rnn_cell.GRUCell(4)
    with pytest.raises(ValueError, match="dtype"):
        dynamic_rnn(cell, X)
    with pytest.raises(TypeError, match="not a recurrent cell"):
        dynamic_rnn(layers.Dense(3), X, dtype="float32")
    with pytest.raises(ValueError, match="time axis"):
        dynamic_rnn(cell, np.ones(3, np.float32), dtype="float32")
    with pytest.raises(ValueError, match="state 0"):
        dynamic_rnn(cell, X, initial_state=np.zeros((3, 5), np.float32))
    with pytest.raises(ValueError, match="number of states"):
        dynamic_rnn(rnn_cell.LSTMCell(4), X, initial_state=[np.zeros((3, 4), np.float32)])
    with pytest.raises(ValueError, match="floating"):
        dynamic_rnn(cell, X.astype(np.int32), dtype="float32")
    with pytest.raises(ValueError, match="residual_fn that projects"):
        dynamic_rnn(rnn_cell.ResidualWrapper(rnn_cell.GRUCell(3)), X, dtype="float32")
    with pytest.raises(TypeError, match="sequence"):
        static_rnn(cell, X, dtype="float32")
    with pytest.raises(ValueError, match="empty"):
        static_rnn(cell, [], dtype="float32")


def test_a_cell_that_changes_its_state_is_refused_in_a_graph():
    class Growing(rnn_cell.RNNCell):
        state_size, output_size = 4, 4

        def call(self, inputs, state):
            return inputs, ops.concatenate([state, state], -1)

    with Graph().as_default(), pytest.raises(ValueError, match="changes its shape"):
        dynamic_rnn(Growing(), placeholder("float32", (None, None, 4)), dtype="float32")


class MakingInCall(rnn_cell.RNNCell):
    """A legacy cell as programs without `build` write them."""

    state_size = output_size = 3

    def call(self, inputs, state):
        kernel = gl.get_variable("kernel", (inputs.shape[-1], 3))
        output = ops.tanh(ops.matmul(inputs, kernel) + state)
        return output, output


@pytest.mark.parametrize(
    ("around", "names"),
    [
        (lambda cell: cell, ["making_in_call"]),
        (lambda cell: rnn_cell.ResidualWrapper(cell), ["making_in_call"]),
        (
            lambda cell: rnn_cell.MultiRNNCell([cell, rnn_cell.ResidualWrapper(MakingInCall())]),
            [f"multi_rnn_cell/cell_{i}/making_in_call" for i in range(2)],
        ),
    ],
    ids=["cell", "residual", "multi"],
)
@pytest.mark.parametrize("how", ["dynamic", "lengths", "static"])
def test_a_cell_may_make_its_variables_in_call(around, names, how):
    x = np.ones((2, 4, 3), "float32")
    with Graph().as_default():
        cell, fed = around(MakingInCall()), placeholder("float32", (2, 4, 3))
        if how == "static":
            outputs = ops.stack(static_rnn(cell, ops.unstack(fed, 1), dtype="float32")[0], 1)
        else:
            lengths = [4, 4] if how == "lengths" else None
            outputs, _ = dynamic_rnn(cell, fed, sequence_length=lengths, dtype="float32")
        assert [v.name for v in gl.global_variables()] == [f"rnn/{name}/kernel:0" for name in names]
        (slope,) = gradients(ops.sum(outputs), [gl.global_variables()[0]])
        with Session() as session:
            session.run(gl.global_variables_initializer())
            found, slope, kernels = session.run([outputs, slope, gl.global_variables()], {fed: x})
    states, residual = [np.zeros((2, 3))] * len(kernels), isinstance(cell, rnn_cell.ResidualWrapper)
    for t in range(4):
        above = x[:, t]
        for i, kernel in enumerate(kernels):
            below, states[i] = above, np.tanh(above @ kernel + states[i])
            above = below + states[i] if i or residual else states[i]
        np.testing.assert_allclose(found[:, t], above, rtol=1e-4, atol=1e-5)
    assert np.abs(slope).sum() > 0


def test_an_empty_batch_has_an_empty_list_of_lengths():
    outputs, state = dynamic_rnn(layers.GRUCell(4), X[:0], sequence_length=[], dtype="float32")
    assert outputs.shape == (0, 5, 4) and state.shape == (0, 4)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_no_steps(activation):
    outputs, state = dynamic_rnn(layers.GRUCell(3, activation=activation), X[:, :0], dtype="float32")
    assert outputs.shape == (3, 0, 3) and not state.any()
