"""Optimizers against float64 loops and PyTorch, in every way they run, and their arguments."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gpulayers import ops, optimizers
from gpulayers.compat.v1 import train
from gpulayers.constraints import NonNeg
from gpulayers.ops.optimizer_arrays import BLOCK_BYTES, adam_numbers, adam_update, sgd_update
from gpulayers.optimizers import (
    SGD,
    Adam,
    AdamOptimizer,
    AdamW,
    GradientDescentOptimizer,
    Momentum,
    MomentumOptimizer,
    clip_by_global_norm,
    clip_by_norm,
    exponential_decay,
    global_norm,
    piecewise_constant,
    schedules,
)
from gpulayers.trace import (
    GradientTape,
    Graph,
    GraphKeys,
    Session,
    control_dependencies,
    function,
    placeholder,
    reset_default_graph,
)
from gpulayers.variables import Variable, fixed_size_partitioner, global_variables_initializer

RANDOM = np.random.default_rng(0)
STEPS = 7


def loop(kind, w, grads, rate, **settings):
    """The update written for one number at a time, in float64."""
    result = np.array(w, np.float64)
    state = [np.zeros(result.shape), np.zeros(result.shape)]
    for t, gradient in enumerate(grads, 1):
        for index in np.ndindex(result.shape):
            g = float(gradient[index])
            if kind == "sgd":
                momentum = settings.get("momentum", 0.0)
                state[0][index] = momentum * state[0][index] + g
                step = g + momentum * state[0][index] if settings.get("nesterov") else state[0][index]
                result[index] -= rate * step
            else:
                b1, b2 = settings.get("beta_1", 0.9), settings.get("beta_2", 0.999)
                result[index] -= rate * settings.get("weight_decay", 0.0) * result[index]
                state[0][index] = b1 * state[0][index] + (1 - b1) * g
                state[1][index] = b2 * state[1][index] + (1 - b2) * g * g
                corrected = rate * math.sqrt(1 - b2**t) / (1 - b1**t)
                result[index] -= corrected * state[0][index] / (math.sqrt(state[1][index]) + settings["epsilon"])
    return result


MAKERS = {
    "sgd": (lambda rate: SGD(rate), "sgd", {}),
    "momentum": (lambda rate: SGD(rate, 0.8), "sgd", {"momentum": 0.8}),
    "nesterov": (lambda rate: SGD(rate, 0.8, nesterov=True), "sgd", {"momentum": 0.8, "nesterov": True}),
    "Momentum": (lambda rate: Momentum(rate), "sgd", {"momentum": 0.9}),
    "adam": (lambda rate: Adam(rate, epsilon=1e-3), "adam", {"epsilon": 1e-3}),
    "adam betas": (
        lambda rate: Adam(rate, 0.5, 0.7),
        "adam",
        {"beta_1": 0.5, "beta_2": 0.7, "epsilon": 1e-7},
    ),
    "adamw": (lambda rate: AdamW(rate, 0.1), "adam", {"weight_decay": 0.1, "epsilon": 1e-7}),
}
LEGACY = {
    "v1 sgd": (lambda rate: GradientDescentOptimizer(rate), "sgd", {}),
    "v1 nesterov": (
        lambda rate: MomentumOptimizer(rate, 0.8, use_nesterov=True),
        "sgd",
        {"momentum": 0.8, "nesterov": True},
    ),
    "v1 adam": (lambda rate: AdamOptimizer(rate), "adam", {"epsilon": 1e-8}),
}
EVERY = {**MAKERS, **LEGACY}


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 3)])
@pytest.mark.parametrize("name", EVERY)
def test_against_a_loop_over_numbers(name, shape):
    make, kind, settings = EVERY[name]
    start, grads = RANDOM.standard_normal(shape), RANDOM.standard_normal((STEPS, *shape))
    variable, optimizer = Variable(start), make(0.1)
    for gradient in grads:
        optimizer.apply_gradients([(gradient, variable)])
    np.testing.assert_allclose(variable.numpy(), loop(kind, start, grads, 0.1, **settings), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_graph_function_and_eager_agree(name):
    make, _, _ = EVERY[name]
    start, x = np.array([1.0, -2.0]), np.array([0.3, 0.7])

    eager, optimizer = Variable(start), make(0.1)
    for _ in range(STEPS):
        optimizer.minimize(lambda: ops.sum(ops.square(eager * x)), var_list=[eager])

    recorded, inner = Variable(start), make(0.1)

    @function
    def step(x):
        with GradientTape() as tape:
            loss = ops.sum(ops.square(recorded * x))
        inner.apply_gradients(zip(tape.gradient(loss, [recorded]), [recorded], strict=True))
        return loss

    for _ in range(STEPS):
        step(x)
    np.testing.assert_array_equal(recorded.numpy(), eager.numpy())

    with Graph().as_default():
        variable = Variable(start)
        fed = placeholder("float64", (2,))
        train = make(0.1).minimize(ops.sum(ops.square(variable * fed)))
        session = Session()
        session.run(global_variables_initializer())
        for _ in range(STEPS):
            assert session.run(train, {fed: x}) is None
        np.testing.assert_array_equal(session.run(variable), eager.numpy())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: SGD(0.1), lambda t, p: t.optim.SGD(p, 0.1)),
        (lambda: SGD(0.1, 0.9), lambda t, p: t.optim.SGD(p, 0.1, 0.9)),
        (lambda: SGD(0.1, 0.9, nesterov=True), lambda t, p: t.optim.SGD(p, 0.1, 0.9, nesterov=True)),
        # the two put epsilon in different places, so it is made too small to matter
        (lambda: Adam(0.1, epsilon=1e-30), lambda t, p: t.optim.Adam(p, 0.1, eps=1e-30)),
        (lambda: AdamW(0.1, 0.3, epsilon=1e-30), lambda t, p: t.optim.AdamW(p, 0.1, eps=1e-30, weight_decay=0.3)),
    ],
)
def test_against_torch(ours, theirs):
    torch = pytest.importorskip("torch")
    starts = [RANDOM.standard_normal((4, 3)), RANDOM.standard_normal(5)]
    parameters = [torch.nn.Parameter(torch.tensor(s)) for s in starts]
    variables, optimizer, peer = [Variable(s) for s in starts], ours(), theirs(torch, parameters)
    for _ in range(STEPS):
        grads = [RANDOM.standard_normal(s.shape) for s in starts]
        optimizer.apply_gradients(list(zip(grads, variables, strict=True)))
        for parameter, gradient in zip(parameters, grads, strict=True):
            parameter.grad = torch.tensor(gradient)
        peer.step()
    for variable, parameter in zip(variables, parameters, strict=True):
        np.testing.assert_allclose(variable.numpy(), parameter.detach().numpy(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("order", ["C", "F", "strided"])
def test_blocks_cover_large_and_oddly_laid_out_arrays(order):
    shape = (3, BLOCK_BYTES // 32 + 7)  # float64: two blocks of three arrays and a scratch, and more of four
    start, grad = RANDOM.standard_normal(shape), RANDOM.standard_normal(shape)

    def laid_out(array):
        if order == "strided":
            wide = np.zeros((shape[0], 2 * shape[1]))
            wide[:, ::2] = array
            return wide[:, ::2]
        return np.array(array, order=order)

    w, m, v = laid_out(start), laid_out(np.zeros(shape)), laid_out(np.zeros(shape))
    adam_update(np, [w], [laid_out(grad)], [m], [v], adam_numbers(learning_rate=0.1, weight_decay=0.2))
    expected = start - 0.02 * start - 0.1 * math.sqrt(0.001) / 0.1 * (0.1 * grad) / (np.sqrt(0.001 * grad**2) + 1e-7)
    np.testing.assert_allclose(w, expected, rtol=1e-9)
    w, b = laid_out(start), laid_out(np.zeros(shape))
    sgd_update(np, [w], [laid_out(grad)], [b], (0.1, 0.5), nesterov=True)
    np.testing.assert_allclose(w, start - 0.1 * 1.5 * grad, rtol=1e-12, atol=1e-15)


def whole_adam(w, g, m, v, rate, decay):
    """The update as expressions over whole arrays, in the order of rounding that is promised by comparing bits."""
    g = g.astype(np.float32) if g.dtype.itemsize == 2 else g
    m += (g - m) * (1.0 - 0.9)
    v += (g * g - v) * (1.0 - 0.999)
    step = m / (np.sqrt(v) + 1e-7) * (rate * math.sqrt(1.0 - 0.999) / (1.0 - 0.9))
    wide = w.astype(np.float32) if w.dtype.itemsize == 2 else w
    w[...] = (wide - (step + wide * (rate * decay))).astype(w.dtype)


def whole_momentum(w, g, b, rate, nesterov):
    b *= 0.9
    b += g
    step = (b * 0.9 + g) * rate if nesterov else b * rate
    w[...] = ((w.astype(np.float32) if w.dtype.itemsize == 2 else w) - step).astype(w.dtype)


def whole_descent(w, g, rate):
    g = g.astype(np.float32) if g.dtype.itemsize == 2 else g
    w[...] = ((w.astype(np.float32) if w.dtype.itemsize == 2 else w) - g * rate).astype(w.dtype)


EDGE = 64 * 600  # elements: a whole block of float32 has 39,296 (four arrays) or 49,152 (three)


@pytest.mark.parametrize("dtypes", ["fff", "ddd", "eef", "eff", "fdd", "fed"])
def test_blocks_and_their_scratch_change_no_bit(dtypes):
    """Parameters, gradients, slots of these dtypes in one call: sizes around the blocks, scalars, empty, strided."""
    shapes = [(), (0,), (1,), (39_295,), (39_296,), (39_297,), (49_153,), (3, EDGE - 1), (2, 5)]
    draw = lambda kind: [np.asarray(RANDOM.standard_normal(shape), kind) for shape in shapes]
    params, grads, slots = (draw(kind) for kind in dtypes)
    second = [np.abs(slot) for slot in slots]
    for arrays in (params, grads, slots, second):
        arrays.append(np.asarray(RANDOM.standard_normal((40, 2000)), arrays[0].dtype).T)  # columns first
    second[-1] = np.abs(second[-1])

    def lists(*given):
        return [[array.copy(order="K") for array in arrays] for arrays in given]

    def same(found, wanted):
        return all(np.array_equal(a, b) for ours, theirs in zip(found, wanted, strict=True)
                   for a, b in zip(ours, theirs, strict=True))  # fmt: skip

    found, wanted = lists(params, slots, second), lists(params, slots, second)
    adam_update(np, found[0], grads, *found[1:], adam_numbers(learning_rate=0.1, weight_decay=0.2))
    for w, g, m, v in zip(wanted[0], grads, *wanted[1:], strict=True):
        whole_adam(w, g, m, v, 0.1, 0.2)
    assert same(found, wanted)
    for nesterov in (False, True):
        found, wanted = lists(params, slots), lists(params, slots)
        sgd_update(np, found[0], grads, found[1], (0.1, 0.9), nesterov=nesterov)
        for w, g, b in zip(wanted[0], grads, wanted[1], strict=True):
            whole_momentum(w, g, b, 0.1, nesterov)
        assert same(found, wanted)
    found, wanted = lists(params), lists(params)
    sgd_update(np, found[0], grads, None, (0.1,))
    for w, g in zip(wanted[0], grads, strict=True):
        whole_descent(w, g, 0.1)
    assert same(found, wanted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", MAKERS)
def test_sixteen_bit_variables_have_float32_slots(name, dtype):
    make, kind, settings = MAKERS[name]
    variable, optimizer = Variable(np.ones(3, np.float32), dtype=dtype), make(0.125)
    grads = RANDOM.standard_normal((1, 3)).astype(np.float32)
    optimizer.apply_gradients([(grads[0], variable)])
    assert variable.numpy().dtype.name == dtype
    assert all(slot.dtype == np.float32 for slot in optimizer.variables[1:])
    expected = loop(kind, np.ones(3), grads, 0.125, **settings)
    rounding = 2.0**-8 if "b" in dtype else 2.0**-10
    np.testing.assert_allclose(variable.numpy().astype(np.float64), expected, rtol=rounding)


def test_updates_are_in_place_and_count():
    variable, optimizer = Variable(np.ones(4)), Adam(0.1)
    optimizer.build([variable])
    array, slot = variable.value, optimizer.get_slot(variable, "m").value
    before = variable.version
    optimizer.apply_gradients([(np.ones(4), variable)])
    assert variable.value is array and optimizer.get_slot(variable, "m").value is slot
    assert variable.version > before and int(optimizer.iterations.numpy()) == 1


def test_the_gradient_array_is_left_alone():
    gradient = RANDOM.standard_normal(5)
    kept = gradient.copy()
    for make, _, _ in EVERY.values():
        make(0.1).apply_gradients([(gradient, Variable(np.ones(5)))])
    assert np.array_equal(gradient, kept)


# --- minimize ---------------------------------------------------------------------------------------------------------


def test_minimize_in_three_ways():
    def loss():
        return ops.sum(ops.square(w))

    w = Variable([1.0, 2.0])
    SGD(0.25).minimize(loss, [w])
    assert w.numpy().tolist() == [0.5, 1.0]
    SGD(0.25).minimize(loss)  # the variables that were used
    assert w.numpy().tolist() == [0.25, 0.5]
    with GradientTape() as tape:
        value = loss()
    SGD(0.25).minimize(value, lambda: {"only": w}, tape=tape)
    assert w.numpy().tolist() == [0.125, 0.25]
    with pytest.raises(ValueError, match="no tape is given"):
        SGD(0.25).minimize(value, [w])


def test_minimize_a_partitioned_variable():
    from gpulayers.scopes import get_variable

    with Graph().as_default():
        w = get_variable("w", (3, 2), initializer="ones", partitioner=fixed_size_partitioner(2))
        train = GradientDescentOptimizer(0.25).minimize(ops.sum(ops.square(w)), var_list=[w])
        session = Session()
        session.run(global_variables_initializer())
        session.run(train)
        assert session.run(w).tolist() == [[0.5, 0.5]] * 3


def test_missing_gradients_warn_and_none_at_all_is_an_error():
    used, unused = Variable([1.0], name="used"), Variable([1.0], name="unused")
    with pytest.warns(UserWarning, match="unused:0"):
        SGD(0.5).minimize(lambda: used * 2.0, [used, unused])
    assert used.numpy().tolist() == [0.0] and unused.numpy().tolist() == [1.0]
    for empty in ([], [(None, used)]):
        with pytest.raises(ValueError, match="no gradients were given"):
            SGD().apply_gradients(empty)


@pytest.mark.parametrize(
    "pairs",
    [
        lambda a, b: [(np.ones(1), a), (np.ones(2), b)],
        lambda a, b: [(np.ones(1), a), (np.ones(1), a)],
        lambda a, b: [(np.ones(1), a), (np.ones(1), np.ones(1))],
        lambda a, b: [(np.ones(1), a), (np.ones(()), Variable(1))],
    ],
    ids=["shape", "twice", "no variable", "integers"],
)
def test_wrong_pairs_change_nothing(pairs):
    a, b = Variable([1.0]), Variable([1.0])
    optimizer = SGD(0.5)
    with pytest.raises(ValueError):
        optimizer.apply_gradients(pairs(a, b))
    assert a.numpy().tolist() == [1.0] and int(optimizer.iterations.numpy()) == 0


# --- constraints, clipping, learning rates ----------------------------------------------------------------------------


def test_constraint_is_applied_after_the_update_only():
    w = Variable([-1.0], constraint=NonNeg())
    assert w.numpy().tolist() == [-1.0]
    SGD(0.5).apply_gradients([(np.ones(1), w)])
    assert w.numpy().tolist() == [0.0]


def test_constraint_in_a_graph():
    with Graph().as_default():
        w = Variable([-1.0, 3.0], constraint=NonNeg())
        train = GradientDescentOptimizer(1.0).minimize(ops.sum(w))
        session = Session()
        session.run(global_variables_initializer())
        session.run(train)
        assert session.run(w).tolist() == [0.0, 2.0]


def test_clip_by_norm():
    t = RANDOM.standard_normal((4, 5))
    np.testing.assert_allclose(clip_by_norm(t, 0.5), t * 0.5 / np.linalg.norm(t), rtol=1e-12)
    np.testing.assert_array_equal(clip_by_norm(t, 100.0), t)
    rows = clip_by_norm(t, 0.5, axes=1)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 0.5, rtol=1e-12)
    assert clip_by_norm(np.zeros(3), 1.0).tolist() == [0.0, 0.0, 0.0]
    assert np.isfinite(clip_by_norm(np.full(4, 300.0, np.float16), 1.0)).all()  # 300^2 does not fit float16


def test_clip_by_global_norm():
    a, b = RANDOM.standard_normal(3), RANDOM.standard_normal((2, 2))
    norm = np.sqrt((a**2).sum() + (b**2).sum())
    (x, none, y), found = clip_by_global_norm([a, None, b], norm / 2)
    np.testing.assert_allclose([*x, *y.ravel()], np.array([*a, *b.ravel()]) / 2, rtol=1e-12)
    assert none is None and np.isclose(float(found), norm, rtol=1e-12)
    same, _ = clip_by_global_norm([a, b], norm * 2)
    np.testing.assert_allclose(same[0], a, rtol=1e-15)
    bad, _ = clip_by_global_norm([a, np.array([np.inf])], 1.0)
    assert np.isnan(bad[0]).all() and np.isnan(bad[1]).all()
    with pytest.raises(ValueError, match="nothing to measure"):
        global_norm([None])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"clipvalue": 0.5}, [[0.5, -0.5], [0.25]]),
        ({"clipnorm": 1.0}, [[0.6, -0.8], [0.25]]),
        ({"global_clipnorm": 1.0}, [np.array([3, -4]) / math.sqrt(25.0625), [0.25 / math.sqrt(25.0625)]]),
    ],
)
def test_optimizers_clip(settings, expected):
    a, b = Variable(np.zeros(2)), Variable(np.zeros(1))
    SGD(1.0, **settings).apply_gradients([(np.array([3.0, -4.0]), a), (np.array([0.25]), b)])
    np.testing.assert_allclose(a.numpy(), -np.array(expected[0]), rtol=1e-12)
    np.testing.assert_allclose(b.numpy(), -np.array(expected[1]), rtol=1e-12)
    with Graph().as_default():
        v = Variable(np.zeros(2))
        train = SGD(1.0, **settings).minimize(ops.sum(v * np.array([3.0, -4.0])), [v])
        session = Session()
        session.run(global_variables_initializer())
        session.run(train)
        alone = [0.6, -0.8] if "global_clipnorm" in settings else expected[0]
        np.testing.assert_allclose(session.run(v), -np.array(alone), rtol=1e-12)


def run_rates(rate, steps=3):
    variable, optimizer = Variable(np.zeros(())), SGD(rate)
    moves = []
    for _ in range(steps):
        before = float(variable.numpy())
        optimizer.apply_gradients([(np.ones(()), variable)])
        moves.append(before - float(variable.numpy()))
    return moves


def test_learning_rates_of_every_kind():
    assert np.allclose(run_rates(lambda step: 1.0 / (step + 1)), [1.0, 0.5, 1 / 3])
    assert np.allclose(run_rates(lambda: 0.25), [0.25] * 3)
    assert np.allclose(run_rates(Variable(0.5)), [0.5] * 3)
    assert np.allclose(run_rates(schedules.ExponentialDecay(1.0, 1, 0.5)), [1.0, 0.5, 0.25])


def test_the_learning_rate_can_be_set_between_updates():
    optimizer = SGD(0.5)

    @function
    def step(g):
        optimizer.apply_gradients([(g, variable)])

    variable = Variable(np.zeros(1))
    step(np.ones(1))
    optimizer.learning_rate = 0.25
    step(np.ones(1))
    assert variable.numpy().tolist() == [-0.75] and optimizer.lr == 0.25


def test_a_graph_tensor_as_learning_rate():
    with Graph().as_default():
        rate = placeholder("float32", ())
        variable = Variable(np.zeros(1))
        train = GradientDescentOptimizer(rate).minimize(ops.sum(variable))
        session = Session()
        session.run(global_variables_initializer())
        session.run(train, {rate: 0.5})
        session.run(train, {rate: 0.25})
        assert session.run(variable).tolist() == [-0.75]


def test_v1_decay_follows_the_global_step():
    with Graph().as_default():
        step = Variable(0, trainable=False, name="global_step", dtype="int64")
        variable = Variable(np.zeros(1))
        rate = exponential_decay(1.0, step, 1, 0.5)
        train = GradientDescentOptimizer(rate).minimize(ops.sum(variable), global_step=step)
        session = Session()
        session.run(global_variables_initializer())
        for _ in range(3):
            session.run(train)
        assert session.run(variable).tolist() == [-1.75] and session.run(step) == 3
    eager_step, w = Variable(0, trainable=False), Variable(np.zeros(1))
    optimizer = GradientDescentOptimizer(piecewise_constant(eager_step, [0], [1.0, 0.5]))
    for _ in range(2):
        optimizer.minimize(lambda: w * 1.0, eager_step, [w])
    assert w.numpy().tolist() == [-1.5] and int(eager_step.numpy()) == 2


SCHEDULES = {
    "exponential": (schedules.ExponentialDecay(0.5, 10, 0.3), lambda t: 0.5 * 0.3 ** (t / 10)),
    "staircase": (schedules.ExponentialDecay(0.5, 10, 0.3, staircase=True), lambda t: 0.5 * 0.3 ** (t // 10)),
    "cosine": (
        schedules.CosineDecay(0.5, 20, alpha=0.1),
        lambda t: 0.5 * (0.9 * 0.5 * (1 + math.cos(math.pi * min(t, 20) / 20)) + 0.1),
    ),
    "warmup": (
        schedules.CosineDecay(0.1, 20, warmup_target=0.5, warmup_steps=5),
        lambda t: 0.1 + 0.4 * t / 5 if t < 5 else 0.25 * (1 + math.cos(math.pi * min(t - 5, 20) / 20)),
    ),
    "piecewise": (
        schedules.PiecewiseConstantDecay([5, 15], [0.5, 0.2, 0.1]),
        lambda t: 0.5 if t <= 5 else 0.2 if t <= 15 else 0.1,
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    schedule, expected = SCHEDULES[name]
    for step in (0, 1, 4, 5, 6, 10, 15, 16, 30):
        assert isinstance(schedule(step), float) and np.isclose(schedule(step), expected(step), rtol=1e-12)
        assert np.isclose(float(schedule(Variable(step))), expected(step), rtol=1e-5)
    assert type(schedule).from_config(schedule.get_config())(7) == schedule(7)


def test_wrong_arguments():
    for make in (
        lambda: SGD(-0.1),
        lambda: SGD("fast"),
        lambda: SGD(momentum=2.0),
        lambda: SGD(nesterov=True),
        lambda: Adam(beta_1=1.0),
        lambda: Adam(epsilon=-1.0),
        lambda: AdamW(weight_decay=-1.0),
        lambda: SGD(clipnorm=1.0, global_clipnorm=1.0),
        lambda: SGD(clipvalue=0.0),
        lambda: schedules.PiecewiseConstantDecay([1], [1.0]),
        lambda: schedules.ExponentialDecay(0.1, 0, 0.5),
        lambda: optimizers.get("speedy"),
        lambda: optimizers.get(3),
    ):
        with pytest.raises(ValueError):
            make()


# --- state and configuration ------------------------------------------------------------------------------------------


def test_slots_and_variables():
    w = Variable(np.ones(2), name="w")
    optimizer = Adam(0.1, name="mine")
    assert optimizer.get_slot(w, "m") is None
    optimizer.build([w])
    assert [v.name for v in optimizer.variables] == ["mine/iterations:0", "mine/w/m:0", "mine/w/v:0"]
    assert not any(v.trainable for v in optimizer.variables)
    old = MomentumOptimizer(0.1, 0.9)
    old.apply_gradients([(np.ones(2), w)])
    assert old.get_slot(w, "momentum").numpy().tolist() == [1.0, 1.0]
    assert old.get_slot_names() == ["momentum"] and old.get_name() == "Momentum" and len(old.variables()) == 2


def test_training_goes_on_from_restored_variables():
    grads = RANDOM.standard_normal((6, 3))
    w, optimizer = Variable(np.zeros(3)), Adam(0.1)
    for g in grads[:3]:
        optimizer.apply_gradients([(g, w)])
    other, restored = Variable(w.numpy()), Adam(0.1)
    restored.build([other])
    for mine, theirs in zip(restored.variables, optimizer.variables, strict=True):
        mine.assign(theirs.numpy())
    for g in grads[3:]:
        optimizer.apply_gradients([(g, w)])
        restored.apply_gradients([(g, other)])
    assert np.array_equal(w.numpy(), other.numpy())


def test_adamw_leaves_excluded_variables_undecayed():
    kernel, bias, gamma = (Variable(np.ones(1), name=name) for name in ("kernel", "bias", "gamma"))
    optimizer = AdamW(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay([gamma], ["bias"])
    optimizer.apply_gradients([(np.zeros(1), v) for v in (kernel, bias, gamma)])
    assert [float(v.numpy()[0]) for v in (kernel, bias, gamma)] == [0.95, 1.0, 1.0]


@pytest.mark.parametrize("name", MAKERS)
def test_configurations_round_trip(name):
    optimizer = MAKERS[name][0](schedules.CosineDecay(0.1, 10))
    again = optimizers.deserialize(optimizers.serialize(optimizer))
    assert type(again) is type(optimizer) and again.get_config() == optimizer.get_config()
    assert again.learning_rate(3) == optimizer.learning_rate(3)
    plain = MAKERS[name][0](0.25)
    assert type(plain).from_config(plain.get_config()).learning_rate == 0.25


def test_a_function_as_learning_rate_has_no_data_form():
    with pytest.raises(ValueError, match="no data form"):
        SGD(lambda: 0.1).get_config()


# --- graphs -----------------------------------------------------------------------------------------------------------


def test_a_program_of_2018():
    with Graph().as_default() as graph:
        x = placeholder("float32", (None, 2))
        w = Variable(np.zeros((2, 1), np.float32), name="w")
        step = Variable(0, trainable=False, dtype="int64", name="global_step")
        loss = ops.mean(ops.square(ops.matmul(x, w) - 1.0))
        optimizer = AdamOptimizer(0.1)
        pairs = optimizer.compute_gradients(loss)
        assert [variable for _, variable in pairs] == [w]
        train = optimizer.apply_gradients([(clip_by_norm(g, 1.0), v) for g, v in pairs], global_step=step)
        with control_dependencies([train]):
            after = step.read_value()
        assert graph.get_collection(GraphKeys.TRAIN_OP) == [train]
        session = Session()
        session.run(global_variables_initializer())
        first = session.run(loss, {x: np.eye(2)})
        for _ in range(100):
            session.run(train, {x: np.eye(2)})
        assert session.run(loss, {x: np.eye(2)}) < 1e-3 * first
        assert session.run(after, {x: np.eye(2)}) == 101


def test_uninitialized_slots_are_named():
    with Graph().as_default():
        w = Variable([1.0], name="w")
        train = AdamOptimizer().minimize(ops.sum(w))
        session = Session()
        session.run(w.initializer)
        with pytest.raises(RuntimeError, match="Adam"):
            session.run(train)
        assert session.run(w).tolist() == [1.0]


def test_the_step_counter_is_made_once_and_counts():
    with Graph().as_default() as graph:
        assert train.get_global_step() is None
        step = train.get_or_create_global_step()
        assert train.get_or_create_global_step() is step and train.get_global_step(graph) is step
        assert (step.name, step.dtype, step.trainable) == ("global_step:0", np.int64, False)
        assert graph.get_collection("global_step") == [step] and graph.get_collection("variables") == [step]
        with pytest.raises(ValueError, match="already exists"):
            train.create_global_step()
    other = Graph()
    assert train.create_global_step(other) is not step and train.get_global_step(graph) is step


def test_a_step_counter_made_by_hand_is_found_by_its_name():
    with Graph().as_default():
        step = Variable(0, name="global_step", trainable=False)
        assert train.get_or_create_global_step() is step
    with Graph().as_default(), pytest.raises(TypeError, match="cannot count"):
        Variable(0.0, name="global_step")
        train.get_global_step()
    with Graph().as_default() as graph, pytest.raises(ValueError, match="several"):
        for name in ("a", "b"):
            graph.add_to_collection("global_step", Variable(0, name=name))
        train.get_global_step()


def test_the_step_counter_of_eager_mode():
    reset_default_graph()
    step = train.get_or_create_global_step()
    w = Variable([1.0])
    GradientDescentOptimizer(0.5).minimize(lambda: ops.sum(w), global_step=step, var_list=[w])
    assert train.get_global_step() is step and int(step.numpy()) == 1
    reset_default_graph()
    assert train.get_global_step() is None


# --- in-place updates and what was read before ------------------------------------------------------------------------

READS = {
    "identity": ops.identity,
    "read_value": lambda v: v.read_value(),
    "reshape": lambda v: ops.reshape(v, (1, 2)),
    "transpose": lambda v: ops.transpose(v),
    "index": lambda v: v[:1],
    "cast": lambda v: ops.cast(v, "float64"),
    "split": lambda v: ops.split(v, 2)[0],
}


@pytest.mark.parametrize("name", READS)
def test_a_value_read_before_an_update_stays(name):
    for recording in (False, True):
        variable = Variable(np.array([1.0, 2.0]))
        if recording:
            with GradientTape():
                before = READS[name](variable).value
        else:
            before = READS[name](variable)
        kept = before.copy()
        SGD(1.0).apply_gradients([(np.ones(2), variable)])
        assert np.array_equal(before, kept) and variable.numpy().tolist() == [0.0, 1.0]
