"""CUDA graphs on a double of CuPy's streams and memory pools: when a step is captured, replayed, or left plain."""

from __future__ import annotations

import collections
import gc
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import gpulayers as gl
from gpulayers import _cupy, graph_memory
from gpulayers.trace.stored import StoredValue
from tests.kernels.fake_cuda import Machine, fake_cuda


class FakeArray(np.ndarray):
    """Stands for cupy.ndarray; `block` is the memory that it would lie in on a device."""

    def __array_finalize__(self, base):
        self.block = getattr(base, "block", None)

    def set(self, host):
        if not isinstance(host, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if host.dtype != self.dtype:
            raise TypeError(f"{host.dtype} array cannot be set to {self.dtype} array")
        if host.shape != self.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {host.shape}")
        if not (self.flags.c_contiguous or self.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        if host.ctypes.data in self.machine.pinned:
            self.machine.copies.append(lambda: np.copyto(self, host))
        else:
            np.copyto(self, host)


def fake_cupy(machine):
    FakeArray.machine = machine

    def array(a, order="K"):
        made = np.array(a, np.asarray(a).dtype.newbyteorder("="), order=order).view(FakeArray)
        made.block = machine.allocate(made.nbytes)
        return made

    return SimpleNamespace(
        cuda=fake_cuda(machine), ndarray=FakeArray, array=array, get_default_memory_pool=lambda: machine.default_pool
    )


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    module = fake_cupy(machine)
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(_cupy, "cupy", lambda: module)
    monkeypatch.setattr(graph_memory, "_released", collections.deque())
    machine.array = module.array
    machine.Stream = module.cuda.Stream
    return machine


def doubling(machine, counts):
    """Return a function that doubles on the device, and counts how often the host and the device ran it."""

    def double(x, factor=2):
        counts["host"] += 1
        out = np.zeros_like(x)

        def kernel():
            counts["device"] += 1
            np.multiply(x, factor, out=out)

        machine.launch(kernel)
        return {"out": out}

    return double


def test_every_call_runs_the_step_once(machine):
    counts = {"host": 0, "device": 0}
    graph = gl.cuda_graph(doubling(machine, counts))
    reasons = []
    for number in range(6):
        result = graph(machine.array([number, 1.0]))
        assert result["out"].tolist() == [2.0 * number, 2.0]
        assert counts["device"] == number + 1
        reasons.append(graph.reason)
    assert counts["host"] == 3 and graph.captures == 1
    assert reasons[0].startswith("call 1 of 2") and reasons[1].startswith("call 2 of 2") and reasons[2:] == [""] * 4
    assert machine.log.count("captured") == 1 and machine.log.count("launch") == 4
    assert not machine.allocators


def test_results_are_the_graphs_own_arrays(machine):
    graph = gl.cuda_graph(doubling(machine, {"host": 0, "device": 0}))
    for _ in range(3):
        first = graph(machine.array([1.0]))["out"]
    second = graph(machine.array([5.0]))["out"]
    assert second is first and first.tolist() == [10.0]


def test_each_shape_dtype_and_value_has_its_graph(machine):
    graph = gl.cuda_graph(doubling(machine, {"host": 0, "device": 0}))
    calls = [((machine.array([1.0]),), {}), ((machine.array([1.0, 2.0]),), {}), ((machine.array([1]),), {})]
    calls += [((machine.array([1.0]),), {"factor": 3}), ((machine.array([1.0]),), {"factor": 3.0})]
    for number, (args, kwargs) in enumerate(calls, 1):
        for _ in range(4):
            out = graph(*args, **kwargs)["out"]
        assert out.tolist() == [value * kwargs.get("factor", 2) for value in args[0].tolist()]
        assert graph.captures == number


def test_each_device_has_its_graph(machine):
    """Streams and memory belong to a device: the buffers of one are not where arrays of another are expected."""
    graph, x = gl.cuda_graph(doubling(machine, {"host": 0, "device": 0})), machine.array([1.0])
    results, machine.devices = [], 2
    for machine.device in (0, 1, 0):
        results.append([graph(x)["out"] for _ in range(4)][-1])
    assert graph.captures == 2 and results[0] is results[2] and results[1] is not results[0]


def test_host_arguments_are_copied_into_the_buffers(machine):
    counts = {"host": 0, "device": 0}
    double = doubling(machine, counts)
    graph = gl.cuda_graph(lambda x, bias: double(x)["out"])
    for number in range(5):
        out = graph(np.full(2, float(number)), machine.array([0.0]))
    assert out.tolist() == [8.0, 8.0] and graph.reason == ""


def test_numpys_scalars_are_copied_into_the_buffers(machine):
    double = doubling(machine, {"host": 0, "device": 0})
    graph = gl.cuda_graph(lambda x, bias: double(x)["out"])
    for number in range(5):
        out = graph(np.float32(number), machine.array([0.0]))
    assert out == 8.0 and out.dtype == np.float32 and graph.reason == ""


def test_host_arguments_of_any_layout_and_byte_order(machine):
    double = doubling(machine, {"host": 0, "device": 0})
    graph = gl.cuda_graph(lambda x, bias: double(x)["out"])
    for number in range(5):
        x = np.full((2, 3, 4), number, ">f4").transpose(1, 2, 0)  # contiguous neither by rows nor by columns
        out = graph(x, machine.array([0.0]))
        assert (out == 2 * number).all()
    assert graph.reason == ""


def test_pinned_memory_may_be_written_after_the_call(machine):
    """A copy from pinned memory is made when the device comes to it: it must have come to it when the call returns."""
    double = doubling(machine, {"host": 0, "device": 0})
    graph = gl.cuda_graph(lambda x, bias: double(x)["out"])
    x = np.zeros(2)
    machine.pinned.add(x.ctypes.data)
    for number in range(5):
        x[:] = number
        if graph.captures:  # the device comes to it when the host is already further
            (step,) = graph._steps.values()
            step.seen.replays.before_replay = lambda: x.fill(np.nan)
        out = graph(x, machine.array([0.0]))
        assert out.tolist() == [2.0 * number] * 2
    assert graph.reason == ""


@pytest.mark.parametrize("error", [NotImplementedError("cuBLAS calls during capture"), RuntimeError("invalidated")])
def test_a_refused_capture_leaves_plain_calls_with_the_reason(machine, error):
    calls = []

    def step(x):
        calls.append(machine.work is not None)
        if machine.work is not None:
            raise error
        return x + 1

    graph = gl.cuda_graph(step)
    for number in range(5):
        assert graph(machine.array([number]))[0] == number + 1
    assert calls == [False, False, True, False, False, False]  # tried once
    assert graph.reason == f"{type(error).__name__}: {error}" and graph.captures == 0
    assert machine.work is None


def test_errors_of_the_function_are_raised(machine):
    graph = gl.cuda_graph(lambda x: {}["missing"])
    for _ in range(4):
        with pytest.raises(KeyError):
            graph(machine.array([1.0]))
    assert not machine.allocators


def stored(array, name="state:0"):
    return StoredValue(array, name, False, array.shape, array.dtype)


def on_device(monkeypatch):
    """Let StoredValues with a FakeArray count as device arrays."""
    module = sys.modules["gpulayers.cuda_graph"]  # gl.cuda_graph is the function
    monkeypatch.setattr(module, "kind_of", lambda array: "gpu" if isinstance(array, FakeArray) else "cpu")


def test_a_variable_on_the_host_that_changes_keeps_calls_plain(machine):
    counter = stored(np.zeros(1), "iterations:0")

    def step(x):
        counter.writable()[...] += 1
        return x

    graph = gl.cuda_graph(step)
    for _ in range(5):
        graph(machine.array([1.0]))
    assert counter.read()[0] == 5
    assert graph.reason.startswith("iterations:0 lives on the host") and "captured" not in machine.log


def test_a_variable_updated_in_place_is_captured(machine, monkeypatch):
    on_device(monkeypatch)
    state = stored(machine.array([0.0]))

    def step(x):
        array = state.writable()
        machine.launch(lambda: np.add(array, x, out=array))
        return x

    graph = gl.cuda_graph(step)
    for number in range(1, 6):
        graph(machine.array([1.0]))
        assert state.read()[0] == number
    assert graph.reason == "" and graph.captures == 1


def test_a_variable_that_gets_a_new_array_keeps_calls_plain(machine, monkeypatch):
    on_device(monkeypatch)
    state = stored(machine.array([0.0]))

    def step(x):
        state.store(state.read() + x)
        return x

    graph = gl.cuda_graph(step)
    for number in range(1, 6):
        graph(machine.array([1.0]))
        assert state.read()[0] == number
    assert "gets a new array" in graph.reason


def test_a_new_array_during_the_capture_alone_is_undone(machine, monkeypatch):
    on_device(monkeypatch)
    state = stored(machine.array([0.0]))

    def step(x):
        if machine.work is not None:
            state.store(machine.array([np.nan]))
        return state.read() + x

    graph = gl.cuda_graph(step)
    for _ in range(4):
        assert graph(machine.array([1.0]))[0] == 1.0
    assert state.read()[0] == 0.0 and "gets a new array" in graph.reason


def test_a_variable_assigned_outside_is_noticed(machine, monkeypatch):
    on_device(monkeypatch)
    scale = stored(machine.array([2.0]))

    def step(x):
        array, out = scale.read(), np.zeros_like(x)
        machine.launch(lambda: np.multiply(array, x, out=out))
        return out

    graph = gl.cuda_graph(step)
    for _ in range(4):
        assert graph(machine.array([3.0]))[0] == 6.0
    scale.store(machine.array([10.0]))
    for _ in range(4):
        assert graph(machine.array([3.0]))[0] == 30.0
    assert graph.reason == "" and machine.log.count("captured") == 2


def test_replays_on_two_streams_wait_for_each_other(machine):
    graph = gl.cuda_graph(doubling(machine, {"host": 0, "device": 0}))
    for _ in range(4):
        graph(machine.array([1.0]))
    before = len(machine.log)
    with machine.Stream(non_blocking=True):
        stream = machine.current
        graph(machine.array([1.0]))
    assert f"stream {stream.ptr} waits" in machine.log[before:]


def test_under_a_tape_calls_are_plain(machine):
    graph = gl.cuda_graph(lambda x: x + 1)
    with gl.GradientTape():
        graph(machine.array([1.0]))
    assert graph.reason.startswith("a tape or a graph is recording")


def test_an_argument_that_cannot_be_a_key(machine):
    graph = gl.cuda_graph(lambda x, y: x)
    graph(machine.array([1.0]), {1, 2})
    assert graph.reason == "an argument is neither an array nor hashable"


# ---- memory ----------------------------------------------------------------------------------------------------------


def scratching(machine, size=1000):
    """Return a function that needs temporaries of so many bytes, and makes a result of its own."""

    def step(x):
        for _ in range(3):
            machine.array(np.zeros(size, np.uint8))
        return machine.array(x)

    return step


def held(machine):
    """Return the bytes that are allocated but for what the default pool keeps, after a collection."""
    gc.collect()
    machine.default_pool.free_all_blocks()
    return machine.allocated


def next_step(machine, x):
    """Make a step and drop it: what was in use when others were dropped is given back at such occasions."""
    graph = gl.cuda_graph(scratching(machine))
    graph(x)


def test_a_dropped_graph_gives_its_memory_back(machine):
    graph, x = gl.cuda_graph(scratching(machine)), machine.array([1.0])
    for _ in range(4):
        graph(x)
    assert graph.captures == 1 and held(machine) > 1000
    del graph
    assert held(machine) == x.nbytes and not machine.leaked


def test_a_graph_captured_anew_gives_the_memory_of_the_old_one_back(machine, monkeypatch):
    on_device(monkeypatch)
    scale, scratch = stored(machine.array([2.0])), scratching(machine)
    graph, x = gl.cuda_graph(lambda x: scratch(x * scale.read())), machine.array([1.0])
    sizes = []
    for number in range(4):
        scale.store(machine.array([float(number)]))
        for _ in range(4):
            graph(x)
        sizes.append(held(machine))
    assert machine.log.count("captured") == 4 and len(set(sizes)) == 1 and not machine.leaked


def test_a_refused_capture_gives_its_memory_back(machine):
    scratch = scratching(machine)

    def step(x):
        scratch(x)
        if machine.work is not None:
            raise RuntimeError("invalidated")

    graph, x = gl.cuda_graph(step), machine.array([1.0])
    for _ in range(4):
        graph(x)
    assert graph.reason == "RuntimeError: invalidated" and held(machine) == x.nbytes and not machine.leaked


def test_a_step_that_cannot_be_captured_gives_its_memory_back(machine):
    counter, scratch = stored(np.zeros(1), "iterations:0"), scratching(machine)

    def step(x):
        counter.writable()[...] += 1
        return scratch(x)

    graph, x = gl.cuda_graph(step), machine.array([1.0])
    for _ in range(4):
        graph(x)
    assert "lives on the host" in graph.reason and not machine.leaked
    next_step(machine, x)
    assert held(machine) == x.nbytes


def test_results_that_outlive_their_graph_give_their_memory_back_later(machine):
    graph, x = gl.cuda_graph(scratching(machine)), machine.array([1.0])
    results = [graph(x) for _ in range(4)]
    del graph
    assert held(machine) == x.nbytes + sum({id(r): r.nbytes for r in results}.values())
    del results
    next_step(machine, x)
    assert held(machine) == x.nbytes and not machine.leaked


def test_a_step_finds_room_that_the_default_pool_hoards(machine):
    machine.capacity = 10_000
    hoard = machine.array(np.zeros(8000, np.uint8))
    del hoard
    graph, x = gl.cuda_graph(scratching(machine, 3000)), machine.array([1.0])
    for _ in range(4):
        graph(x)
    assert graph.captures == 1, graph.reason


@pytest.mark.parametrize("limited", [False, True])
def test_a_capture_without_room_is_refused_and_frees_nothing_that_it_uses(machine, limited):
    """A pool without room gives its free blocks back and tries again; kernels of the capture may use those."""
    freed = []

    def step(x):
        machine.array(np.zeros(1000, np.uint8))  # a temporary, whose block is free again
        if machine.work is not None:
            (pool,) = {allocator.__self__ for allocator in machine.allocators}
            pool.limit = 2000 if limited else None
            machine.capacity = 1 << 40 if limited else machine.allocated + 500
            try:
                machine.array(np.zeros(1500, np.uint8))
            finally:
                machine.capacity = 1 << 40
                freed.append(1000 not in [block.size for block in pool.free])
        return machine.array(x)

    graph, x = gl.cuda_graph(step), machine.array([1.0])
    for _ in range(4):
        assert graph(x) == 1.0
    assert graph.captures == 0 and freed == [limited]
    assert ("was freed during the capture" if limited else "no device memory is left") in graph.reason


def test_the_workspaces_of_a_step_go_with_it(machine, monkeypatch):
    forgotten = []
    monkeypatch.setattr(sys.modules["gpulayers.cuda_graph"], "forget_stream", forgotten.append)
    graph, x = gl.cuda_graph(scratching(machine)), machine.array([1.0])
    graph(x)
    (stream,) = [step.stream.ptr for step in graph._steps.values()]
    del graph
    gc.collect()
    assert forgotten == [stream]


# ---- streams ---------------------------------------------------------------------------------------------------------


def test_a_plain_call_that_raises_is_waited_for_too(machine):
    """What it launched before it raised may still write what the caller's stream reads next."""
    graph, outer = gl.cuda_graph(lambda x: {}["missing"]), machine.current
    with pytest.raises(KeyError):
        graph(machine.array([1.0]))
    assert machine.log[-1] == f"stream {outer.ptr} waits"


def test_a_capture_begins_when_both_streams_are_done(machine):
    """Plain calls from another stream may still use the memory that the graph is going to use."""
    graph = gl.cuda_graph(doubling(machine, {"host": 0, "device": 0}))
    for _ in range(3):
        graph(machine.array([1.0]))
    (step,) = graph._steps.values()
    before = machine.log[: machine.log.index("captured")]
    assert {f"stream {machine.current.ptr} is done", f"stream {step.stream.ptr} is done"} <= set(before)


def test_on_numpy_it_does_nothing():
    layer = gl.layers.BatchNormalization()
    graph = gl.cuda_graph(lambda x: layer(x, training=True))
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    with gl.device("cpu"):
        results = [graph(x) for _ in range(4)]
    assert results[0] is not results[1] and np.array_equal(results[0], results[3])
    assert graph.captures == 0 and graph.reason == "the arrays are on the host, where there are no CUDA graphs"
    assert layer.moving_mean.version >= 4


def test_wrong_arguments():
    with pytest.raises(TypeError, match="cuda_graph: not a function"):
        gl.cuda_graph(3)
    with pytest.raises(ValueError, match="2 or more; got 1"):
        gl.cuda_graph(abs, plain_calls=1)


@pytest.mark.gpu
def test_batch_normalisation_is_captured_on_a_gpu():
    cupy = _cupy.cupy()
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((16, 8)).astype(np.float32) for _ in range(6)]
    plain_layer, layer = gl.layers.BatchNormalization(), gl.layers.BatchNormalization()
    graph = gl.cuda_graph(lambda x: layer(x, training=True))
    for batch in batches:
        x = cupy.asarray(batch)
        assert cupy.array_equal(graph(x), plain_layer(x, training=True))
    assert graph.captures == 1, graph.reason
    assert cupy.array_equal(layer.moving_mean.value, plain_layer.moving_mean.value)
