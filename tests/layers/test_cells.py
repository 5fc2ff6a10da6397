"""Cells of both families, their stacks and the other wrappers: equations, variables, errors."""

import hashlib
import itertools
import json

import numpy as np
import pytest

import gpulayers as gl
from gpulayers import nest, ops
from gpulayers.keras import layers
from gpulayers.nn import RNNCellDeviceWrapper, RNNCellDropoutWrapper, RNNCellResidualWrapper, rnn_cell
from gpulayers.trace import GradientTape, Graph, placeholder
from gpulayers.variables import PartitionedVariable
from tests.kernels.strict_array import StrictArray

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

RNG = np.random.default_rng(2)
X, H, C = (RNG.standard_normal((2, 3)) for _ in range(3))


def sigma(x):
    return 1 / (1 + np.exp(-x))


# --- modern cells -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [1, 2])
def test_lstm_is_torchs(implementation):
    torch = pytest.importorskip("torch")
    cell = layers.LSTMCell(4, dtype="float64", implementation=implementation)
    cell.build((2, 3))
    peer = torch.nn.LSTMCell(3, 4, dtype=torch.float64)
    cell.set_weights([w.detach().numpy().T for w in (peer.weight_ih, peer.weight_hh)] + [peer.bias_ih.detach().numpy()])
    h, c = RNG.standard_normal((2, 2, 4))
    with torch.no_grad():
        peer.bias_hh.zero_()
        expected = peer(torch.tensor(X), (torch.tensor(h), torch.tensor(c)))
    output, states = cell(X, [h, c])
    np.testing.assert_array_equal(output, states[0])
    for ours, theirs in zip(states, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12)


@pytest.mark.parametrize("implementation", [1, 2])
def test_gru_is_torchs(implementation):
    torch = pytest.importorskip("torch")
    cell = layers.GRUCell(4, dtype="float64", implementation=implementation)
    cell.build((2, 3))
    peer = torch.nn.GRUCell(3, 4, dtype=torch.float64)
    order = np.r_[4:8, 0:4, 8:12]  # torch has r, z, n
    parts = [w.detach().numpy()[order] for w in (peer.weight_ih, peer.weight_hh, peer.bias_ih, peer.bias_hh)]
    cell.set_weights([parts[0].T, parts[1].T, np.stack(parts[2:])])
    h = RNG.standard_normal((2, 4))
    expected = peer(torch.tensor(X), torch.tensor(h)).detach().numpy()
    np.testing.assert_allclose(cell(X, h)[0], expected, rtol=1e-12)


@pytest.mark.parametrize("kind", [layers.SimpleRNNCell, layers.GRUCell, layers.LSTMCell])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_bias": False}, {"activation": "relu"}, {"recurrent_activation": "hard_sigmoid"}, {"reset_after": False}],
    ids=str,
)
def test_fused_and_composed_step_agree(kind, options):
    if ("reset_after" in options and kind is not layers.GRUCell) or (
        "recurrent_activation" in options and kind is layers.SimpleRNNCell
    ):
        pytest.skip("not an option of this cell")
    cells = [kind(3, dtype="float64", implementation=number, **options) for number in (1, 2)]
    states = [H, C][: len(nest.flatten(cells[0].state_size))]
    for cell in cells:
        cell.build((2, 3))
        cell.set_weights([np.cos(np.arange(w.size)).reshape(w.shape) for w in cell.get_weights()])
    results = []
    for cell in cells:
        with GradientTape() as tape:
            tape.watch([X, *states])
            output, new = cell(X, states)
            total = ops.sum(output**2) + sum(ops.sum(s * 3) for s in new)
        results.append([output, *new, *tape.gradient(total, [X, *states, *cell.weights])])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(getattr(a, "value", a), getattr(b, "value", b), rtol=1e-10, atol=1e-12)


def test_hard_sigmoid_gates():
    cell = layers.LSTMCell(3, recurrent_activation="hard_sigmoid", dtype="float64")
    _, (h, c) = cell(X, [H, C])
    k, r, b = cell.get_weights()
    i, f, g, o = np.split(X @ k + H @ r + b, 4, 1)
    hard = lambda v: np.clip(0.2 * v + 0.5, 0, 1)  # noqa: E731
    expected = hard(f) * C + hard(i) * np.tanh(g)
    np.testing.assert_allclose(c, expected, rtol=1e-10)
    np.testing.assert_allclose(h, hard(o) * np.tanh(expected), rtol=1e-10)


def test_variables_initializers_regularizers_constraints():
    cell = layers.LSTMCell(
        2,
        kernel_initializer="ones",
        recurrent_initializer="zeros",
        bias_initializer="zeros",
        kernel_regularizer="l1",
        recurrent_regularizer="l2",
        bias_regularizer="l1",
        kernel_constraint="non_neg",
    )
    cell.build((None, 3))
    assert [w.name for w in cell.weights] == ["kernel:0", "recurrent_kernel:0", "bias:0"]
    assert [w.shape for w in cell.weights] == [(3, 8), (2, 8), (8,)]
    np.testing.assert_array_equal(cell.bias.numpy(), [0, 0, 1, 1, 0, 0, 0, 0])
    np.testing.assert_allclose([float(loss) for loss in cell.losses], [0.24, 0, 0.02], rtol=1e-6)
    assert cell.kernel.constraint is not None and cell.bias.constraint is None
    plain = layers.LSTMCell(2, unit_forget_bias=False)
    plain.build((None, 3))
    assert not plain.bias.numpy().any()
    assert layers.GRUCell(2).state_size == 2 and layers.LSTMCell(2).state_size == [2, 2]


def test_dropout_is_clamped_and_changes_the_implementation():
    cell = layers.GRUCell(2, dropout=-1, recurrent_dropout=7)
    assert (cell.dropout, cell.recurrent_dropout, cell.implementation) == (0.0, 1.0, 1)
    assert layers.GRUCell(2).implementation == 2


def test_cell_errors():
    for units in (0, -1):
        with pytest.raises(ValueError, match="units"):
            layers.LSTMCell(units)
    with pytest.raises(TypeError):
        layers.LSTMCell(2, nonsense=1)
    with pytest.raises(ValueError):
        layers.LSTMCell(2, activation="nonsense")
    with pytest.raises(ValueError, match="depth"):
        layers.LSTMCell(2).build((2, None))
    cell = layers.LSTMCell(3)
    with pytest.raises(ValueError, match="number of states"):
        cell(X, [H])
    with pytest.raises(ValueError, match="state 1"):
        cell(X, [H, RNG.standard_normal((2, 2))])
    with pytest.raises(ValueError):
        cell(RNG.standard_normal((2, 5)), [H, C])


@pytest.mark.parametrize("make", [layers.SimpleRNNCell, layers.GRUCell, layers.LSTMCell])
@pytest.mark.parametrize("implementation", [1, 2])
def test_integers_are_refused_not_rounded(make, implementation):
    cell = make(3, implementation=implementation)
    steps, states = np.ones((2, 3), "int32"), cell.get_initial_state(batch_size=2, dtype="float32")
    for call in (
        lambda: cell(steps, states),
        lambda: gl.nn.RNNCellResidualWrapper(cell)(steps, states),
        lambda: layers.RNN(make(3, implementation=implementation))(np.ones((2, 4, 3), "int64")),
    ):
        with pytest.raises(TypeError, match="not floating.*Cast them"):
            call()


# --- stacked cells ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_stacked_cells(reverse):
    cells = [layers.GRUCell(4, dtype="float64"), layers.LSTMCell(3, dtype="float64")]
    stack = layers.StackedRNNCells(cells, reverse_state_order=reverse, dtype="float64", name="stack")
    assert stack.state_size == (([3, 3], 4) if reverse else (4, [3, 3])) and stack.output_size == 3
    h = RNG.standard_normal((2, 4))
    output, states = stack(X, ([H, C], h) if reverse else (h, [H, C]))
    below, new_h = cells[0](X, h)
    above, new = cells[1](below, [H, C])
    np.testing.assert_allclose(output, above, rtol=1e-12)
    own = states[::-1] if reverse else states
    np.testing.assert_allclose(own[0], new_h, rtol=1e-12)
    np.testing.assert_allclose(own[1][1], new[1], rtol=1e-12)
    assert [w.name.split("/")[0] for w in stack.weights] == ["stack"] * 6
    zero = stack.get_initial_state(batch_size=2, dtype="float64")
    assert [z.shape for z in nest.flatten(zero)] == [tuple([2, s]) for s in nest.flatten(stack.state_size)]
    with pytest.raises(ValueError):
        layers.StackedRNNCells([layers.Dense(3)])
    twin = layers.StackedRNNCells.from_config(stack.get_config())
    assert twin.state_size == stack.state_size


# --- legacy cells -----------------------------------------------------------------------------------------------------


def weights_of(cell):
    return {w.name.partition("/")[2].removesuffix(":0"): w.numpy() for w in cell.weights}


@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
def test_legacy_equations(activation):
    act = np.tanh if activation != "relu" else lambda v: np.maximum(v, 0)
    joined = np.concatenate([X, H], 1)
    basic = rnn_cell.BasicRNNCell(3, activation=activation)
    output, state = basic(X, H)
    w = weights_of(basic)
    np.testing.assert_allclose(output, act(joined @ w["kernel"] + w["bias"]), rtol=1e-10)
    np.testing.assert_array_equal(output, state)
    gru = rnn_cell.GRUCell(3, activation=activation)
    output, _ = gru(X, H)
    w = weights_of(gru)
    assert w["gates/bias"].min() == 1 and not w["candidate/bias"].any()
    r, u = np.split(sigma(joined @ w["gates/kernel"] + w["gates/bias"]), 2, 1)
    c = act(np.concatenate([X, r * H], 1) @ w["candidate/kernel"] + w["candidate/bias"])
    np.testing.assert_allclose(output, u * H + (1 - u) * c, rtol=1e-10)
    lstm = rnn_cell.BasicLSTMCell(3, forget_bias=0.5, activation=activation)
    output, state = lstm(X, rnn_cell.LSTMStateTuple(C, H))
    w = weights_of(lstm)
    i, j, f, o = np.split(joined @ w["kernel"] + w["bias"], 4, 1)
    new_c = C * sigma(f + 0.5) + sigma(i) * act(j)
    np.testing.assert_allclose(state.c, new_c, rtol=1e-10)
    np.testing.assert_allclose(output, act(new_c) * sigma(o), rtol=1e-10)


@pytest.mark.parametrize("peepholes, clip, projection", list(itertools.product([False, True], [None, 0.2], [None, 2])))
def test_legacy_lstm(peepholes, clip, projection):
    cell = rnn_cell.LSTMCell(
        3, use_peepholes=peepholes, cell_clip=clip, num_proj=projection, proj_clip=0.1 if projection else None
    )
    h = RNG.standard_normal((2, projection or 3))
    assert cell.state_size == (3, projection or 3) and cell.output_size == (projection or 3)
    output, state = cell(X, rnn_cell.LSTMStateTuple(C, h))
    w = weights_of(cell)
    i, j, f, o = np.split(np.concatenate([X, h], 1) @ w["kernel"] + w["bias"], 4, 1)
    wf, wi, wo = (w.get(f"w_{gate}_diag", 0) for gate in "fio")
    c = sigma(f + 1 + wf * C) * C + sigma(i + wi * C) * np.tanh(j)
    c = np.clip(c, -clip, clip) if clip else c
    m = sigma(o + wo * c) * np.tanh(c)
    m = np.clip(m @ w["projection/kernel"], -0.1, 0.1) if projection else m
    np.testing.assert_allclose(state.c, c, rtol=1e-9)
    np.testing.assert_allclose(output, m, rtol=1e-9)
    np.testing.assert_array_equal(state.h, output)


def test_shards_cut_the_kernels():
    cell = rnn_cell.LSTMCell(3, num_unit_shards=2, num_proj=2, num_proj_shards=3)
    cell(X, cell.zero_state(2, "float64"))
    assert isinstance(cell.kernel, PartitionedVariable) and len(list(cell.kernel)) == 2
    assert len(cell.weights) == 2 + 1 + 3


def test_states_side_by_side():
    tuples, flat = rnn_cell.BasicLSTMCell(3), rnn_cell.BasicLSTMCell(3, state_is_tuple=False)
    assert flat.state_size == 6
    y, state = tuples(X, rnn_cell.LSTMStateTuple(C, H))
    flat(X, np.concatenate([C, H], 1))
    flat.set_weights(tuples.get_weights())
    z, joined = flat(X, np.concatenate([C, H], 1))
    np.testing.assert_array_equal(y, z)
    np.testing.assert_array_equal(joined, np.concatenate(state, 1))


def test_legacy_names_states_and_errors():
    with Graph().as_default():
        x, h = placeholder("float32", (2, 3)), placeholder("float32", (2, 3))
        cells = [rnn_cell.BasicRNNCell(3), rnn_cell.GRUCell(3), rnn_cell.BasicLSTMCell(3), rnn_cell.LSTMCell(3)]
        for cell in cells:
            cell(x, (h, h) if isinstance(cell.state_size, tuple) else h)
        prefixes = [cell.weights[0].name for cell in cells]
        assert [p.split("/")[0] for p in prefixes] == ["basic_rnn_cell", "gru_cell", "basic_lstm_cell", "lstm_cell"]
        with pytest.raises(ValueError, match="inputs.shape\\[-1\\] to be known"):
            rnn_cell.BasicRNNCell(3)(placeholder("float32", (2, None)), h)
        with pytest.raises(ValueError, match="ndim=2"):
            rnn_cell.BasicRNNCell(3)(placeholder("float32", (2, 3, 3)), h)
        shared = rnn_cell.BasicRNNCell(3, reuse=True, name="basic_rnn_cell")
        shared(x, h)
        assert shared.weights[0] is cells[0].weights[0]
    cell = rnn_cell.BasicRNNCell(3)
    with pytest.raises(ValueError, match="only supports floating point"):
        cell(X.astype(int), H)
    assert cell.zero_state(4, "float32").shape == (4, 3)
    with pytest.raises(ValueError, match="batch size"):
        cell.get_initial_state(inputs=X, batch_size=3)
    with pytest.raises(ValueError, match="dtype"):
        cell.get_initial_state(inputs=X, dtype="float32")
    with pytest.warns(DeprecationWarning):
        rnn_cell.LSTMCell(3)


def test_multi_cell():
    cells = [rnn_cell.BasicLSTMCell(3), rnn_cell.GRUCell(4)]
    multi = rnn_cell.MultiRNNCell(cells)
    assert multi.state_size == ((3, 3), 4) and multi.output_size == 4
    zero = multi.zero_state(2, "float64")
    output, states = multi(X, zero)
    below, first = cells[0](X, zero[0])
    above, second = cells[1](below, zero[1])
    np.testing.assert_array_equal(output, above)
    np.testing.assert_array_equal(states[0].c, first.c)
    assert [w.name for w in multi.weights][0] == f"{multi.scope_name}/cell_0/basic_lstm_cell/kernel:0"
    assert len(multi.trainable_weights) == 6
    twin = rnn_cell.MultiRNNCell.from_config(multi.get_config())
    assert [type(c) for c in twin.cells] == [type(c) for c in cells]
    with pytest.raises(ValueError):
        multi(X, X)
    with pytest.raises(ValueError):
        multi(X, (zero[0],))
    with pytest.raises(ValueError):
        rnn_cell.MultiRNNCell([])
    with pytest.raises(TypeError):
        rnn_cell.MultiRNNCell(cells[0])
    with pytest.raises(ValueError):
        rnn_cell.MultiRNNCell(cells, state_is_tuple=False)


def test_multi_cell_with_one_state():
    cells = [rnn_cell.GRUCell(3), rnn_cell.BasicRNNCell(4)]
    multi = rnn_cell.MultiRNNCell(cells, state_is_tuple=False)
    assert multi.state_size == 7
    output, state = multi(X, np.zeros((2, 7)))
    np.testing.assert_array_equal(state[:, 3:], output)
    np.testing.assert_array_equal(state[:, :3], cells[0](X, np.zeros((2, 3)))[0])


# --- dropout and device wrappers --------------------------------------------------------------------------------------

WRAPPERS = [RNNCellDropoutWrapper, rnn_cell.DropoutWrapper]
ONES = np.ones((64, 50), np.float32)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_dropped_parts(kind):
    cell = rnn_cell.BasicRNNCell(50)
    same, _ = cell(ONES, ONES)
    output, state = kind(cell, output_keep_prob=0.5, seed=3)(ONES, ONES)
    kept = output != 0
    assert 0.4 < kept.mean() < 0.6
    np.testing.assert_allclose(output[kept], 2 * np.asarray(same)[kept], rtol=1e-5)
    np.testing.assert_array_equal(state, same)
    output, state = kind(cell, state_keep_prob=0.5)(ONES, ONES)
    np.testing.assert_array_equal(output, same)
    assert 0.4 < (state != 0).mean() < 0.6
    output, _ = kind(cell, input_keep_prob=0.5)(ONES, ONES)
    assert not np.allclose(output, same)
    output, state = kind(cell)(ONES, ONES)
    np.testing.assert_array_equal(output, same)
    assert not kind(cell, output_keep_prob=0.0)(ONES, ONES)[0].any()


def test_memory_of_an_lstm_is_not_dropped_unless_asked():
    cell = rnn_cell.BasicLSTMCell(50)
    state = rnn_cell.LSTMStateTuple(ONES, ONES)
    _, new = rnn_cell.DropoutWrapper(cell, state_keep_prob=0.5)(ONES, state)
    assert (new.c != 0).all() and (new.h == 0).any()
    everything = rnn_cell.DropoutWrapper(cell, state_keep_prob=0.5, dropout_state_filter_visitor=lambda s: True)
    _, new = everything(ONES, state)
    assert (new.c == 0).any() and (new.h == 0).any()


@pytest.mark.parametrize("kind", WRAPPERS)
def test_variational_masks_stay(kind):
    cell = rnn_cell.BasicRNNCell(50)
    wrapper = kind(cell, 0.5, 0.5, 0.5, variational_recurrent=True, input_size=50, dtype="float32", seed=1)
    (a, s), (b, t) = wrapper(ONES, ONES), wrapper(ONES, ONES)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(s, t)
    np.testing.assert_array_equal((a != 0)[0], (a != 0)[1])
    assert 0.2 < (a != 0).mean() < 0.8


@pytest.mark.parametrize("kind", WRAPPERS)
def test_dropout_wrapper_errors(kind):
    cell = rnn_cell.BasicRNNCell(3)
    for keywords in (
        {"input_keep_prob": 1.5},
        {"output_keep_prob": -0.1},
        {"variational_recurrent": True},
        {"variational_recurrent": True, "dtype": "float32", "input_keep_prob": 0.5},
    ):
        with pytest.raises(ValueError):
            kind(cell, **keywords)
    with pytest.raises(TypeError):
        kind(cell, dropout_state_filter_visitor=3)
    with pytest.raises(ValueError, match="modern LSTMCell"):
        kind(layers.LSTMCell(3))


def test_seeds_depend_on_what_is_dropped():
    wrapper = RNNCellDropoutWrapper(layers.GRUCell(3), seed=5)
    seeds = [wrapper._dropout._seed_of(*which) for which in (("input", 0), ("output", 0), ("input", 1))]
    assert seeds == [
        int(hashlib.md5(t).hexdigest()[:8], 16) & 0x7FFFFFFF for t in (b"5input_0", b"5output_0", b"5input_1")
    ]


def test_dropout_wrapper_in_a_layer_and_its_config():
    wrapper = RNNCellDropoutWrapper(layers.GRUCell(3), output_keep_prob=0.5, seed=1)
    y = layers.RNN(wrapper, return_sequences=True)(np.ones((8, 6, 3), np.float32))
    assert (y == 0).any() and not np.array_equal(y[:, 0] == 0, y[:, 1] == 0)
    twin = RNNCellDropoutWrapper.from_config(wrapper.get_config())
    assert twin.get_config() == wrapper.get_config()


@pytest.mark.parametrize("kind", [RNNCellDeviceWrapper, rnn_cell.DeviceWrapper])
def test_device_wrapper(kind):
    cell = rnn_cell.BasicRNNCell(3)
    wrapper = kind(cell, "cpu")
    x, h = X.astype(np.float32), H.astype(np.float32)
    np.testing.assert_array_equal(wrapper(x, h)[0], cell(x, h)[0])
    assert wrapper.zero_state(2, "float32").shape == (2, 3) and wrapper.get_config()["device"] == "cpu"
    with pytest.raises(gl.errors.DeviceError):
        kind(cell, "nowhere")


def test_wrappers_keep_the_cells_variables():
    wrapper = RNNCellResidualWrapper(RNNCellDropoutWrapper(RNNCellDeviceWrapper(layers.GRUCell(3), "cpu")))
    wrapper(X, H)
    assert [w.name for w in wrapper.weights][0].endswith("/kernel:0") and len(wrapper.weights) == 3
    assert gl.nn.RNNCellResidualWrapper is RNNCellResidualWrapper


HOST_STATES = {
    "composed": lambda: (layers.GRUCell(3, implementation=1), [H]),
    "fused": lambda: (layers.LSTMCell(3), [H, C]),
    "wrapped": lambda: (RNNCellResidualWrapper(layers.LSTMCell(3, activation="relu")), [H, C]),
    "legacy": lambda: (rnn_cell.GRUCell(3), H),
    "peepholes": lambda: (rnn_cell.LSTMCell(3, use_peepholes=True), (C, H)),
    "stacked": lambda: (rnn_cell.MultiRNNCell([rnn_cell.GRUCell(3)]), (H,)),
    "dropped": lambda: (rnn_cell.DropoutWrapper(rnn_cell.GRUCell(3), state_keep_prob=0.5), H),
    "a user's": lambda: (RNNCellResidualWrapper(_Keeping()), H),
}


class _Keeping(layers.Layer):
    """A user's cell, which computes with what it is given."""

    state_size = output_size = 3

    def call(self, inputs, state, constants=()):
        for one in constants:
            inputs = inputs + one
        return inputs + nest.flatten(state)[0], state


@pytest.mark.parametrize("name", HOST_STATES)
def test_host_states_are_copied_to_the_cells_device(name):
    with gl.device("emulated"):
        cell, states = HOST_STATES[name]()
        output, new = cell(X.astype("float32"), nest.map_structure(lambda s: s.astype("float32"), states))
        assert all(isinstance(value, StrictArray) for value in nest.flatten([output, new]))


def test_host_constants_are_copied_to_the_layers_device():
    x, constant = np.ones((2, 4, 3), "float32"), np.full((2, 3), 5, "float32")
    with gl.device("emulated"):
        y = layers.RNN(_Keeping())(x, constants=[constant], initial_state=[constant])
    assert (y.get() == 11).all()


# --- subclasses that change how a cell is called ----------------------------------------------------------------------


def _doubling(kind):
    """Return a subclass of a cell or wrapper whose call gives twice the output."""

    class Doubling(kind):
        def __call__(self, inputs, state, *args, **kwargs):
            output, new_state = super().__call__(inputs, state, *args, **kwargs)
            return 2 * output, new_state

    return Doubling


@pytest.mark.parametrize(
    "make",
    [
        lambda change: change(rnn_cell.BasicRNNCell)(3),
        lambda change: change(rnn_cell.MultiRNNCell)([rnn_cell.BasicRNNCell(3)]),
        lambda change: rnn_cell.MultiRNNCell([change(rnn_cell.BasicRNNCell)(3)]),
        lambda change: change(rnn_cell.ResidualWrapper)(rnn_cell.BasicRNNCell(3)),
        lambda change: rnn_cell.ResidualWrapper(change(rnn_cell.BasicRNNCell)(3)),
        lambda change: change(layers.SimpleRNNCell)(3),
        lambda change: change(layers.StackedRNNCells)([layers.SimpleRNNCell(3)]),
        lambda change: change(RNNCellResidualWrapper)(layers.SimpleRNNCell(3)),
    ],
    ids=["legacy", "multi", "in multi", "legacy residual", "in legacy residual", "modern", "stacked", "residual"],
)
@pytest.mark.parametrize("run", ["dynamic_rnn", "RNN"])
def test_a_changed_call_operator_counts_in_sequences_too(make, run):
    cell = make(_doubling)
    x = np.stack([X] * 3, 1).astype("float32")
    if run == "dynamic_rnn":
        outputs, _ = gl.nn.dynamic_rnn(cell, x, dtype="float32")
    else:
        outputs = layers.RNN(cell, return_sequences=True)(x)
    states = cell.get_initial_state(batch_size=2, dtype="float32")
    for t in range(3):
        output, states = cell(x[:, t], states)
        np.testing.assert_allclose(outputs[:, t], output, rtol=1e-5, atol=1e-6)


def test_a_modern_residual_wrapper_runs_the_call_of_its_cell_not_its_call_operator():
    cell = _doubling(layers.SimpleRNNCell)(3)
    wrapper = RNNCellResidualWrapper(cell)
    x = np.stack([X] * 3, 1).astype("float32")
    outputs = layers.RNN(wrapper, return_sequences=True)(x)
    first = np.tanh(x[:, 0] @ cell.kernel.numpy())
    np.testing.assert_allclose(outputs[:, 0], x[:, 0] + first, rtol=1e-5)


@pytest.mark.parametrize(
    "around",
    [
        lambda cell: layers.RNN(cell),
        lambda cell: gl.keras.Sequential([layers.RNN(cell)]),
        lambda cell: layers.RNN(RNNCellResidualWrapper(cell)),
    ],
    ids=["RNN", "Sequential", "residual"],
)
def test_variables_of_a_stack_of_legacy_cells_belong_to_the_layer_around_it(around):
    stack = rnn_cell.MultiRNNCell([rnn_cell.BasicLSTMCell(3), rnn_cell.BasicRNNCell(3)])
    outer = around(stack)
    outer(np.ones((2, 4, 3), "float32"))
    assert len(outer.trainable_variables) == 4 and outer.weights == stack.weights
    stack.trainable = False
    assert not outer.trainable_variables and len(outer.non_trainable_variables) == 4


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_a_built_legacy_cell_refuses_integers_however_it_is_called(dtype):
    cell = rnn_cell.BasicRNNCell(3)
    wrapper = RNNCellResidualWrapper(cell)
    wrapper(X, H)
    step, sequence = np.ones((2, 3), dtype), np.ones((2, 4, 3), dtype)
    for call in (
        lambda: cell(step, H),
        lambda: wrapper(step, H),
        lambda: layers.RNN(cell)(sequence),
        lambda: rnn_cell.MultiRNNCell([cell])(step, (H,)),
    ):
        with pytest.raises(ValueError, match="RNN cell only supports floating point inputs"):
            call()


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"implementation": 1}, {"dropout": 0.5}], ids=str)
@pytest.mark.parametrize("kind", [layers.SimpleRNNCell, layers.GRUCell, layers.LSTMCell])
def test_results_have_the_compute_dtype_whatever_the_states_have(kind, options):
    cell = kind(3, dtype="mixed_float16", **options)
    states = [h.astype("float32") for h in (H, C)[: len(nest.flatten(cell.state_size))]]
    output, new_states = cell(X, states, training=True)
    assert {v.dtype.name for v in (output, *new_states)} == {"float16"}
    layer = layers.RNN(RNNCellResidualWrapper(kind(3, **options)), return_state=True)
    wide = [s.astype("float64") for s in states]
    results = layer(np.stack([X] * 3, 1), initial_state=wide, training=True)
    assert {v.dtype.name for v in results} == {"float32"}
    with Graph().as_default():  # a loop carries its states in the dtype that they start with
        x = placeholder("float64", (2, None, 3))
        output = layers.RNN(RNNCellResidualWrapper(kind(3, **options), dtype="mixed_float16"))(x, training=True)
        assert output.dtype.name == "float16"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (rnn_cell.LSTMCell, {"use_peepholes": True}),
        (rnn_cell.LSTMCell, {"cell_clip": 0.5}),
        (rnn_cell.LSTMCell, {"num_proj": 3, "proj_clip": 0.1}),
        (rnn_cell.BasicLSTMCell, {"activation": "relu"}),
        (rnn_cell.GRUCell, {"activation": "relu"}),
        (rnn_cell.BasicRNNCell, {"activation": "relu"}),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_composed_legacy_cells_keep_sixteen_bits(kind, options, dtype):
    cell = kind(3, **options)
    states = cell.zero_state(2, dtype)
    results = nest.flatten(cell(gl.cast(X, dtype), states))
    assert {v.dtype.name for v in results} == {dtype}
    results = nest.flatten(cell(gl.cast(X, dtype), nest.map_structure(lambda s: gl.cast(s, "float64"), states)))
    assert {v.dtype.name for v in results} == {dtype}


@pytest.mark.parametrize("kind", ["input", "output", "state"])
@pytest.mark.parametrize("keep", [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5)], ids=repr)
@pytest.mark.parametrize("variational", [False, True])
def test_dropout_wrappers_keep_sixteen_bits(kind, keep, variational):
    wrapper = rnn_cell.DropoutWrapper(
        rnn_cell.GRUCell(3),
        **{f"{kind}_keep_prob": keep},
        variational_recurrent=variational,
        dtype="bfloat16",
        input_size=3,
    )
    results = nest.flatten(wrapper(gl.cast(X, "bfloat16"), wrapper.zero_state(2, "bfloat16")))
    assert {v.dtype.name for v in results} == {"bfloat16"}


@pytest.mark.parametrize("variational", [False, True])
def test_a_dropout_wrapper_that_keeps_nothing_gives_zeros(variational):
    wrapper = rnn_cell.DropoutWrapper(
        rnn_cell.GRUCell(3), output_keep_prob=0.0, variational_recurrent=variational, dtype="float64"
    )
    np.testing.assert_array_equal(wrapper(X, H)[0], np.zeros((2, 3)))


@pytest.mark.parametrize("kind", [RNNCellDropoutWrapper, rnn_cell.DropoutWrapper])
@pytest.mark.parametrize("keep", [1.5, np.float32(1.5), np.float64(-0.5), np.int64(2)], ids=repr)
def test_probabilities_of_any_number_type_are_checked(kind, keep):
    with pytest.raises(ValueError, match="output_keep_prob is not a probability"):
        kind(rnn_cell.GRUCell(3), output_keep_prob=keep)


def test_a_gate_function_that_is_set_later_counts():
    cell, other = layers.LSTMCell(3), layers.LSTMCell(3, recurrent_activation="hard_sigmoid")
    cell.build((2, 3))
    other.build((2, 3))
    other.set_weights(cell.get_weights())
    cell.recurrent_activation = other.recurrent_activation
    np.testing.assert_array_equal(cell(X, [H, C])[0], other(X, [H, C])[0])
    x = np.stack([X] * 3, 1)
    np.testing.assert_array_equal(layers.RNN(cell)(x), layers.RNN(other)(x))


# --- states to start from ---------------------------------------------------------------------------------------------


class _StartingAtOne(rnn_cell.BasicRNNCell):
    def zero_state(self, batch_size, dtype):
        return ops.ones((batch_size, 3), dtype)


@pytest.mark.parametrize(
    "around",
    [
        lambda cell: cell,
        lambda cell: rnn_cell.MultiRNNCell([cell]),
        lambda cell: rnn_cell.ResidualWrapper(cell),
        lambda cell: rnn_cell.DropoutWrapper(cell),
        lambda cell: rnn_cell.DeviceWrapper(cell, "cpu"),
        lambda cell: layers.StackedRNNCells([cell]),
    ],
    ids=["cell", "multi", "residual", "dropout", "device", "stacked"],
)
def test_a_changed_zero_state_is_where_a_cell_starts(around):
    cell = around(_StartingAtOne(3))
    for arguments in ({"batch_size": 2, "dtype": "float32"}, {"inputs": np.zeros((2, 5), "float32")}):
        (state,) = nest.flatten(cell.get_initial_state(**arguments))
        np.testing.assert_array_equal(state, np.ones((2, 3), "float32"))
    x = np.zeros((2, 1, 3), "float32")
    first, _ = gl.nn.dynamic_rnn(cell, x, dtype="float32")
    np.testing.assert_allclose(layers.RNN(cell)(x), first[:, 0], rtol=1e-6)
    assert np.abs(first).min() > 0


def test_a_stack_of_legacy_and_modern_cells_starts_at_zero():
    stack = rnn_cell.MultiRNNCell([rnn_cell.GRUCell(3), layers.GRUCell(2)])
    assert [s.shape for s in stack.zero_state(2, "float32")] == [(2, 3), (2, 2)]
    assert [s.shape for s in stack.get_initial_state(batch_size=2, dtype="float32")] == [(2, 3), (2, 2)]


def test_a_legacy_device_wrapper_makes_every_state_on_its_device(monkeypatch):
    devices = []

    class Noting(rnn_cell.BasicRNNCell):
        def zero_state(self, batch_size, dtype):
            devices.append(gl.current_device())
            return super().zero_state(batch_size, dtype)

    entered = []
    from gpulayers.nn import wrappers_legacy

    original = wrappers_legacy.on_device
    monkeypatch.setattr(wrappers_legacy, "on_device", lambda name: entered.append(name) or original(name))
    wrapper = rnn_cell.DeviceWrapper(Noting(3), "cpu")
    wrapper.zero_state(2, "float32")
    wrapper.get_initial_state(batch_size=2, dtype="float32")
    assert entered == ["cpu"] * 2 and [d.kind for d in devices] == ["cpu"] * 2


# --- functions in configurations --------------------------------------------------------------------------------------


@gl.keras.utils.register_serializable("CellTests")
def _thrice_the_inputs(inputs, outputs):
    return 3 * inputs + outputs


@gl.keras.utils.register_serializable("CellTests")
def _drop_nothing(state):
    return False


def test_a_registered_residual_fn_of_a_legacy_wrapper_survives_json():
    cell = rnn_cell.GRUCell(3)
    wrapper = rnn_cell.ResidualWrapper(cell, _thrice_the_inputs)
    config = json.loads(gl.keras.utils.to_json(wrapper.get_config()))
    assert config["residual_fn"] == "CellTests>_thrice_the_inputs"
    twin = rnn_cell.ResidualWrapper.from_config({**config, "cell": cell})
    np.testing.assert_array_equal(twin(X, H)[0], wrapper(X, H)[0])
    other = rnn_cell.ResidualWrapper.from_config(
        {**config, "cell": cell, "residual_fn": "own"}, custom_objects={"own": lambda inputs, outputs: 0 * outputs}
    )
    assert not other(X, H)[0].any()
    with pytest.raises(ValueError, match="unheard"):
        rnn_cell.ResidualWrapper.from_config({**config, "cell": cell, "residual_fn": "unheard"})


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_registered_state_filter_survives_json(kind):
    cell = rnn_cell.GRUCell(3)
    wrapper = kind(cell, state_keep_prob=0.001, dropout_state_filter_visitor=_drop_nothing)
    config = json.loads(gl.keras.utils.to_json(wrapper.get_config()))
    assert config["dropout_state_filter_visitor"] == "CellTests>_drop_nothing"
    twin = kind.from_config({**config, "cell": cell})
    x, h = X.astype("float32"), H.astype("float32")
    np.testing.assert_array_equal(twin(x, h)[1], cell(x, h)[1])
    plain = kind.from_config({**kind(cell).get_config(), "cell": cell})
    np.testing.assert_array_equal(plain(x, h)[1], cell(x, h)[1])


# --- the face of TensorFlow 1 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_cells_and_layers_of_version_1_have_its_defaults(name):
    old = gl.compat.v1.keras.layers
    cell, layer = getattr(old, f"{name}Cell")(3), getattr(old, name)(3)
    for config in (cell.get_config(), layer.get_config()):
        assert config["recurrent_activation"] == "hard_sigmoid" and config["implementation"] == 1
        assert config.get("reset_after", False) is False
    x = np.stack([X] * 3, 1).astype("float32")
    expected = layer(x)
    changes = {"recurrent_activation": "hard_sigmoid", **({"reset_after": False} if name == "GRU" else {})}
    modern = getattr(layers, name)(3, **changes)
    modern.build(x.shape)
    modern.set_weights(layer.get_weights())
    np.testing.assert_allclose(modern(x), expected, rtol=1e-5, atol=1e-6)
    for twin in (type(layer).from_config(layer.get_config()), layers.RNN.from_config(layers.RNN(cell).get_config())):
        assert twin.cell.recurrent_activation is ops.activations.hard_sigmoid and twin.cell.implementation == 1
        twin.build(x.shape)
        twin.set_weights(layer.get_weights())
        np.testing.assert_allclose(twin(x), expected, rtol=1e-5, atol=1e-6)
    assert getattr(old, f"{name}Cell")(3, "relu", "tanh").get_config()["recurrent_activation"] == "tanh"


def test_the_rest_of_version_1s_keras_is_the_same():
    old = gl.compat.v1.keras
    assert old.layers.SimpleRNNCell is layers.SimpleRNNCell and old.layers.RNN is layers.RNN
    assert old.Model is gl.keras.Model and old.layers.__all__ == layers.__all__


# --- what does not fit one step ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.GRUCell(3),
        lambda: layers.GRUCell(3, implementation=1),
        lambda: rnn_cell.GRUCell(3),
        lambda: rnn_cell.BasicRNNCell(3, activation="relu"),
    ],
    ids=["fused", "composed", "legacy", "legacy composed"],
)
def test_inputs_and_states_of_other_sizes(make):
    cell = make()
    with pytest.raises(ValueError, match=r"the shape of state 0 does not fit. Expected \(2, 3\); got \(1, 3\)"):
        cell(X, H[:1])
    with pytest.raises(ValueError, match=r"not those of one step|expected ndim=2"):
        cell(np.stack([X] * 2), H)
    cell = make()
    with pytest.raises(ValueError, match=r"not those of one step.*\(batch, depth\)"):
        gl.nn.dynamic_rnn(cell, X, dtype="float32")
    assert not cell.built


def test_a_stack_of_legacy_cells_warns_like_its_cells():
    with pytest.warns(DeprecationWarning, match="MultiRNNCell is a legacy cell") as caught:
        stack = rnn_cell.MultiRNNCell([layers.GRUCell(3)])
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match="the state is not a tuple. Expected a tuple of 1; got ndarray"):
        stack(X, H)
    with pytest.warns(DeprecationWarning, match="GRUCell is a legacy cell") as caught:
        rnn_cell.GRUCell(3)
    assert caught[0].filename == __file__
