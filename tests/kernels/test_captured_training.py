"""Whole training steps as CUDA graphs, on the emulated device: the numbers are those of plain steps, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest

import gpulayers as gl
from gpulayers import ops, optimizers
from gpulayers.device import asarray
from gpulayers.errors import GradientError
from gpulayers.optimizers import schedules
from tests.kernels.emulation.build import compiler
from tests.kernels.fake_cuda import emulated_cuda
from tests.kernels.strict_array import launcher, xp

STEPS = 7
MAKERS = {
    "sgd": lambda: optimizers.SGD(0.1),
    "nesterov": lambda: optimizers.SGD(0.1, 0.8, nesterov=True),
    "adam": lambda: optimizers.Adam(0.05),
    "adamw": lambda: optimizers.AdamW(0.05, 0.3),
    "adam, cosine with warm-up": lambda: optimizers.Adam(
        schedules.CosineDecay(0.01, STEPS, warmup_target=0.1, warmup_steps=2)
    ),
    "exponential": lambda: optimizers.SGD(schedules.ExponentialDecay(0.1, 2, 0.5), 0.9),
    "piecewise": lambda: optimizers.SGD(schedules.PiecewiseConstantDecay([2, 4], [0.2, 0.1, 0.0])),
    "a function of the step": lambda: optimizers.SGD(lambda step: 0.1 / (1 + step)),
    "clipped by value": lambda: optimizers.SGD(0.1, clipvalue=0.01),
    "clipped by norm": lambda: optimizers.Adam(0.1, clipnorm=0.1),
    "clipped by all": lambda: optimizers.SGD(0.1, 0.5, global_clipnorm=0.05),
}


@pytest.fixture
def machine(monkeypatch):
    if compiler() is None:
        pytest.skip("needs g++")
    with emulated_cuda(monkeypatch) as machine:
        yield machine


class Program:
    """A small network with batch normalisation, and one training step of it."""

    def __init__(self, optimizer, dtype="float32", rate=0.0):
        self.optimizer, self.rate = optimizer, rate
        self.norm = gl.layers.BatchNormalization()
        self.scale = gl.Variable(np.linspace(0.5, 1.5, 5, dtype=dtype), name="scale")
        self.shift = gl.Variable(np.zeros(5, dtype), name="shift")

    def step(self, x):
        with gl.GradientTape() as tape:
            y = ops.relu(self.norm(x * self.scale, training=True) + self.shift)
            if self.rate:
                y = ops.dropout(y, self.rate)
            loss = ops.mean(ops.square(y - 0.3))
        variables = [self.scale, self.shift, *self.norm.trainable_variables]
        self.optimizer.apply_gradients(list(zip(tape.gradient(loss, variables), variables, strict=True)))
        return loss

    def state(self):
        norm = [self.norm.moving_mean, self.norm.moving_variance, *self.norm.trainable_variables]
        return [v.numpy() for v in (self.scale, self.shift, *norm, *self.optimizer.variables)]


def batches(dtype="float32"):
    return np.random.default_rng(3).standard_normal((STEPS, 6, 5)).astype(dtype)


def run(make, captured, dtype="float32", rate=0.0, between=None, place="emulated"):
    """Return (losses, states after each step, the program, the graph)."""
    ops.random.set_seed(5)
    with gl.device(place):
        program = Program(make(), dtype, rate)
        step = gl.cuda_graph(program.step) if captured else program.step
        losses, states = [], []
        for number, batch in enumerate(batches(dtype)):
            losses.append(gl.asnumpy(step(asarray(batch))))
            states.append(program.state())
            if between is not None:
                between(program, number)
    return losses, states, program, step


def check(make, **settings):
    """Compare a captured with a plain run, bit by bit, and return the graph."""
    losses, states, _, graph = run(make, True, **settings)
    truths, expected, _, _ = run(make, False, **settings)
    np.testing.assert_array_equal(losses, truths)
    for found, true in zip(states, expected, strict=True):
        for one, other in zip(found, true, strict=True):
            np.testing.assert_array_equal(one, other)
    return graph


@pytest.mark.parametrize("name", MAKERS)
def test_a_training_step_is_captured_with_its_optimizer(machine, name):
    graph = check(MAKERS[name])
    assert graph.reason == "" and graph.captures == 1
    assert machine.log.count("launch") == STEPS - 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", MAKERS)
def test_a_training_step_is_captured_on_a_gpu(name):
    graph = check(MAKERS[name], rate=0.25, place="gpu")
    assert graph.reason == "" and graph.captures == 1


def test_float64(machine):
    assert check(MAKERS["adamw"], dtype="float64").captures == 1


def test_dropout_draws_on_in_every_replay(machine):
    graph = check(MAKERS["adam"], rate=0.4)
    assert graph.captures == 1 and graph.reason == ""


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_training_and_inference_of_a_layer_in_one_step(machine, order):
    with gl.device("emulated"):
        layer = gl.layers.BatchNormalization(momentum=0.5)

        def step(x):
            with gl.GradientTape() as tape:
                loss = sum(ops.sum(ops.square(layer(x, training=training))) for training in order)
            return tape.gradient(loss, layer.gamma)

        plain = gl.layers.BatchNormalization(momentum=0.5)
        graph = gl.cuda_graph(step)
        found = [gl.asnumpy(graph(asarray(x))) for x in batches()]
        assert graph.captures == 1 and graph.reason == ""
        layer, statistics = plain, [v.numpy() for v in layer.variables]
        np.testing.assert_array_equal(found, [gl.asnumpy(step(asarray(x))) for x in batches()])
        for one, other in zip(statistics, plain.variables, strict=True):
            np.testing.assert_array_equal(one, other.numpy())


def test_restarted_generators_are_noticed(machine):
    def between(program, number):
        if number == 3:
            ops.random.set_seed(11)

    graph = check(MAKERS["sgd"], rate=0.4, between=between)
    assert machine.log.count("captured") == 2 and graph.reason == ""


def test_a_new_learning_rate_is_taken_up_by_the_next_replay(machine):
    def between(program, number):
        if number == 3:
            program.optimizer.learning_rate = 0.001

    assert check(MAKERS["adam"], between=between).captures == 1
    assert machine.log.count("captured") == 1


def test_a_rate_in_a_variable_is_read_before_each_replay(machine):
    def make():
        return optimizers.SGD(gl.Variable(0.1, name="rate", trainable=False))

    def between(program, number):
        program.optimizer.learning_rate.assign(0.1 / (number + 2))

    assert check(make, between=between).captures == 1


def test_a_rate_that_the_step_itself_changes_stays_plain(machine):
    with gl.device("emulated"):
        rate = gl.Variable(0.5, name="rate", trainable=False)
        w = gl.Variable(np.ones(3, "f"), name="w")
        optimizer = optimizers.SGD(rate)

        def step(x):
            optimizer.apply_gradients([(x, w)])
            rate.writable()[...] *= 0.5
            return w.value

        graph = gl.cuda_graph(step)
        for _ in range(4):
            graph(xp.ones(3, "f"))
    assert graph.reason == "rate:0 is changed by the step and gives an optimizer its learning rate"
    assert w.numpy().tolist() == [1 - 0.5 - 0.25 - 0.125 - 0.0625] * 3


def test_a_counter_on_the_device_that_the_host_moves_on(machine):
    """The global step of v1 programs, with a rate that follows it."""
    found = []
    for captured in (True, False):
        with gl.device("emulated"):
            w, counter = gl.Variable(np.ones(3, "f")), gl.Variable(0, trainable=False, dtype="int64", name="step")
            rate = gl.compat.v1.train.exponential_decay(0.5, counter, 1, 0.5)
            optimizer = gl.compat.v1.train.GradientDescentOptimizer(rate)

            def step(x, optimizer=optimizer, w=w, counter=counter):
                optimizer.apply_gradients([(x, w)], counter)
                return x

            graph = gl.cuda_graph(step) if captured else step
            for _ in range(6):
                graph(xp.ones(3, "f"))
            found.append([w.numpy().tolist(), int(counter.numpy())])
            assert not captured or graph.captures == 1
    assert found[0] == found[1] and found[0][1] == 6


def test_a_count_that_the_step_reads_stays_plain(machine):
    with gl.device("emulated"):
        w = gl.Variable(np.zeros(3, "f"))
        optimizer = optimizers.SGD(1.0)

        def step(x):
            optimizer.apply_gradients([(x * float(optimizer.iterations.numpy()), w)])
            return x

        graph = gl.cuda_graph(step)
        for _ in range(5):
            graph(xp.ones(3, "f"))
    assert graph.reason == "SGD/iterations:0 is read by the step and changed by the host before each replay"
    assert w.numpy().tolist() == [-10.0] * 3 and int(optimizer.iterations.numpy()) == 5


def test_two_updates_in_a_step_count_one_after_the_other(machine):
    found = []
    for captured in (True, False):
        with gl.device("emulated"):
            w = gl.Variable(np.ones(3, "f"))
            optimizer = optimizers.Adam(schedules.ExponentialDecay(0.1, 1, 0.5))

            def step(x, optimizer=optimizer, w=w):
                optimizer.apply_gradients([(x, w)])
                optimizer.apply_gradients([(x * 2, w)])
                return x

            graph = gl.cuda_graph(step) if captured else step
            for _ in range(5):
                graph(xp.ones(3, "f"))
            found.append(w.numpy().tolist())
            assert int(optimizer.iterations.numpy()) == 10
    assert found[0] == found[1]


def test_constraints_are_applied_in_place(machine):
    found = []
    for captured in (True, False):
        with gl.device("emulated"):
            w = gl.Variable(np.ones(3, "f"), constraint=lambda value: ops.clip(value, 0.2, 1.0))
            optimizer = optimizers.SGD(0.3)

            def step(x, optimizer=optimizer, w=w):
                optimizer.apply_gradients([(x, w)])
                return x

            graph = gl.cuda_graph(step) if captured else step
            for _ in range(6):
                graph(xp.asarray(np.array([1.0, 0.1, -1.0], "f")))
            found.append(w.numpy().tolist())
            assert not captured or graph.captures == 1, graph.reason
    assert found[0] == found[1]


def test_parameters_without_a_kernel_stay_plain(machine):
    with gl.device("emulated"):
        w = gl.Variable(np.ones((3, 2), "f"))
        w.store(xp.asarray(np.ones((2, 3), "f")).T)  # column by column
        optimizer = optimizers.SGD(0.5)

        def step(x):
            optimizer.apply_gradients([(x, w)])
            return x

        graph = gl.cuda_graph(step)
        for _ in range(5):
            graph(xp.ones((3, 2), "f"))
    assert "no kernel, so their update cannot be replayed" in graph.reason
    assert w.numpy().tolist() == [[-1.5] * 2] * 3 and int(optimizer.iterations.numpy()) == 5


def test_a_seeded_dropout_layer_stays_plain(machine):
    with gl.device("emulated"):
        layer = gl.layers.Dropout(0.5, seed=3)
        graph = gl.cuda_graph(lambda x: layer(x, training=True))
        masks = [gl.asnumpy(graph(xp.ones((4, 8), "f"))) for _ in range(4)]
    assert "has a seed" in graph.reason and not np.array_equal(masks[2], masks[3])


def test_a_clip_of_renorm_that_is_a_function_stays_plain(machine):
    limit = [1.5]
    with gl.device("emulated"):
        layer = gl.layers.BatchNormalization(renorm=True, renorm_clipping={"rmax": lambda: limit[0]})
        graph = gl.cuda_graph(lambda x: layer(x, training=True))
        for x in batches():
            graph(asarray(x))
    assert "renorm_clipping" in graph.reason and graph.captures == 0


def test_a_lent_value_is_not_overwritten_by_a_replay(machine):
    with gl.device("emulated"):
        w = gl.Variable(np.zeros(3, "f"))
        optimizer = optimizers.SGD(1.0)

        def step(x):
            optimizer.apply_gradients([(x, w)])
            return x

        graph = gl.cuda_graph(step)
        for _ in range(4):
            graph(xp.ones(3, "f"))
        kept, version = w.lend(), w.version
        graph(xp.ones(3, "f"))
        assert gl.asnumpy(kept).tolist() == [-4.0] * 3 and w.numpy().tolist() == [-5.0] * 3
        for _ in range(3):
            graph(xp.ones(3, "f"))
    assert graph.reason == "" and w.numpy().tolist() == [-8.0] * 3 and w.version > version + 3


def test_a_tape_notices_what_a_replay_changed(machine):
    with gl.device("emulated"):
        w = gl.Variable(np.ones(3, "f"))
        optimizer = optimizers.SGD(1.0)
        graph = gl.cuda_graph(lambda x: optimizer.apply_gradients([(x, w)]))
        for _ in range(4):
            graph(xp.ones(3, "f"))
        with gl.GradientTape() as tape:
            loss = ops.sum(ops.square(w))
        graph(xp.ones(3, "f"))
        with pytest.raises(GradientError, match="changed"):
            tape.gradient(loss, w)


def test_tables_and_workspaces_live_as_long_as_the_graph(machine):
    launcher.record.clear()
    _, _, _, graph = run(MAKERS["clipped by all"], True)
    (step,) = [step for step in graph._steps.values() if step.graph is not None]
    kept = [id(value) for value in step.kept.values]
    from gpulayers.ops import optimizer_kernels

    words = [id(table.words) for plan in optimizer_kernels._plans.values() for table in plan.tables]
    assert set(words) & set(kept), "the table of the update"
    assert {id(words) for words, _ in optimizer_kernels._norm_tables.values()} & set(kept), "the table of the norm"


def test_a_failing_learning_rate_changes_nothing(machine):
    with gl.device("emulated"):
        w = gl.Variable(np.zeros(3, "f"))

        def rate(step):
            if step == 4:
                raise ArithmeticError("no rate for this step")
            return 1.0

        optimizer = optimizers.SGD(rate)
        graph = gl.cuda_graph(lambda x: optimizer.apply_gradients([(x, w)]))
        for _ in range(4):
            graph(xp.ones(3, "f"))
        with pytest.raises(ArithmeticError, match="no rate"):
            graph(xp.ones(3, "f"))
    assert w.numpy().tolist() == [-4.0] * 3 and int(optimizer.iterations.numpy()) == 4


# ---- products --------------------------------------------------------------------------------------------------------


def dense_program():
    net = [gl.keras.layers.Dense(7), gl.keras.layers.BatchNormalization(), gl.keras.layers.Dense(3)]

    def forward(x):
        for layer in net:
            x = layer(x, training=True) if layer is net[1] else layer(x)
        return x

    return net, forward, (6, 5)


def convolution_program():
    net = [gl.keras.layers.Conv2D(4, 3, strides=2, padding="same")]
    return net, lambda x: ops.mean(net[0](x), axis=(1, 2)), (2, 6, 6, 3)


def sequence_program(cell):
    net = [gl.keras.layers.RNN(cell(4), return_sequences=True), gl.keras.layers.Dense(3)]
    return net, lambda x: net[1](net[0](x)), (2, 5, 3)


PROGRAMS = {
    "dense": dense_program,
    "convolution": convolution_program,
    "lstm": lambda: sequence_program(gl.keras.layers.LSTMCell),
    "gru": lambda: sequence_program(gl.keras.layers.GRUCell),
}


def trained(name, captured, place="emulated"):
    """Return the weights after some steps of a program with products, and its graph."""
    with gl.device(place):
        net, forward, shape = PROGRAMS[name]()
        forward(asarray(np.zeros(shape, "f")))
        weights = [v for layer in net for v in layer.trainable_variables]
        rng = np.random.default_rng(0)
        for v in weights:
            v.assign(rng.uniform(-0.5, 0.5, v.shape).astype("f"))
        optimizer = optimizers.Adam(0.01)

        def step(x):
            with gl.GradientTape() as tape:
                loss = ops.mean(ops.square(forward(x) - 1.0))
            optimizer.apply_gradients(list(zip(tape.gradient(loss, weights), weights, strict=True)))
            return loss

        graph = gl.cuda_graph(step) if captured else step
        losses = [float(gl.asnumpy(graph(asarray(rng.standard_normal(shape).astype("f"))))) for _ in range(6)]
    return losses, [v.numpy() for v in weights], graph


def compare_programs(name, place):
    losses, weights, graph = trained(name, True, place)
    truths, others, _ = trained(name, False, place)
    assert graph.reason == "" and graph.captures == 1
    np.testing.assert_allclose(losses, truths, rtol=1e-4)
    for one, other in zip(weights, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", PROGRAMS)
def test_products_are_captured_through_a_handle_of_our_own(machine, name):
    compare_programs(name, "emulated")
    handles = [handle for handle, stream in machine.cublas.streams.items() if stream > 1]
    assert handles and all(machine.library.workspaces[handle][1] == 32 << 20 for handle in handles)
    assert machine.cublas.pointer_mode == 1, "the pointer mode of others is put back"
    assert all(machine.cublas.math_modes[handle] == 16 for handle in handles)


@pytest.mark.parametrize(("major", "mebibytes"), [(8, 4), (9, 32), (10, 32), (12, 12)])
def test_the_workspace_has_the_size_that_cublas_recommends(machine, monkeypatch, major, mebibytes):
    monkeypatch.setattr(xp.cuda.runtime, "getDeviceProperties", lambda device: {"major": major})
    products_of(lambda x: ops.matmul(x, ops.transpose(x)))
    ((_, size),) = machine.library.workspaces.values()
    assert size == mebibytes << 20


@pytest.mark.gpu
@pytest.mark.parametrize("name", PROGRAMS)
def test_products_are_captured_on_a_gpu(name):
    compare_programs(name, "gpu")


def products_of(graph_of, steps=4):
    with gl.device("emulated"):
        graph = gl.cuda_graph(graph_of)
        x = xp.asarray(np.arange(12, dtype="f").reshape(3, 4))
        results = [gl.asnumpy(graph(x)) for _ in range(steps)]
    return graph, results


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.matmul(x, ops.transpose(x)),
        lambda x: ops.matmul(ops.transpose(x), x[:, 1:3]),
        lambda x: ops.matmul(x, x[0]),
        lambda x: ops.matmul(x[1], ops.transpose(x)),
        lambda x: ops.matmul(ops.reshape(x, (3, 2, 2)), x[:2, ::2]),
    ],
    ids=["transposed", "columns of a wider one", "vector", "vector first", "batch on the left, gaps on the right"],
)
def test_shapes_and_layouts_of_products(machine, function):
    graph, results = products_of(function)
    assert graph.captures == 1, graph.reason
    want = function(np.arange(12, dtype="f").reshape(3, 4))
    for found in results:
        np.testing.assert_allclose(found, want, rtol=1e-6)


def test_cupys_own_products_are_refused_with_its_reason(machine):
    graph, _ = products_of(lambda x: ops.einsum("ij,kj->ik", x, x))
    assert graph.reason.startswith("NotImplementedError: calling cuBLAS API during stream capture")


def test_without_the_library_products_are_refused(machine, monkeypatch):
    from gpulayers import _cupy

    monkeypatch.setattr(_cupy, "_cublas_library", lambda: None)
    graph, _ = products_of(lambda x: ops.matmul(x, ops.transpose(x)))
    assert graph.reason.startswith("NotImplementedError: calling cuBLAS API during stream capture")


def test_the_handle_goes_with_the_graph(machine):
    import gc

    graph, _ = products_of(lambda x: ops.matmul(x, ops.transpose(x)))
    assert not machine.cublas.destroyed
    del graph
    gc.collect()
    assert len(machine.cublas.destroyed) == 1


def test_the_librarys_symbols_are_found_through_cupy():
    """Without a device cuBLAS answers with a status; a null handle is 1 everywhere."""
    from gpulayers import _cupy

    pytest.importorskip("cupy")
    library, found = _cupy._cublas_library(), _cupy._cublas()
    assert library is not None and found is not None and callable(found.functions.gemmEx)
    assert library.cublasGemmEx(None, 0, 0, 1, 1, 1, *[None, None, 0, 1, None, 0, 1, None, None, 0, 1], 68, -1) == 1
    assert library.cublasSetWorkspace_v2(None, None, 0) == 1
