"""Optimizers on variables of a device: the emulated one, and a GPU where there is one (``-m gpu``)."""

from __future__ import annotations

import numpy as np
import pytest

import gpulayers as gl
from gpulayers import ops, optimizers
from gpulayers.device import asarray, asnumpy
from gpulayers.trace import GradientTape, Graph, Session
from gpulayers.variables import Variable, global_variables_initializer
from tests.kernels.strict_array import launcher

pytestmark = pytest.mark.emulated

MAKERS = {
    "sgd": lambda: optimizers.SGD(0.1),
    "nesterov": lambda: optimizers.SGD(0.1, 0.8, nesterov=True),
    "adam": lambda: optimizers.Adam(0.1, epsilon=1e-3),
    "adamw": lambda: optimizers.AdamW(0.1, 0.3),
    "clipped": lambda: optimizers.SGD(0.1, 0.8, global_clipnorm=0.25),
    "scheduled": lambda: optimizers.SGD(optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)),
}
STARTS = [np.linspace(-1, 1, 12).reshape(3, 4), np.linspace(0, 1, 4), np.array(0.5), np.linspace(1, 2, 4099)]


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def where(request):
    return request.param


@pytest.fixture(autouse=True)
def nothing_recorded():
    launcher.record.clear()


def entries():
    """Names of the optimizer kernels launched since the last look."""
    names = [entry[0].name for entry in launcher.record if entry[0].kernel.source == "optimizer.cu"]
    launcher.record.clear()
    return names


def trained(make, place, dtypes, steps=4):
    """Return the variables after some steps on ``sum((w - 3)^2)``, and the optimizer."""
    with gl.device(place):
        variables = [Variable(s.astype("f"), dtype=d) for s, d in zip(STARTS, dtypes, strict=True)]
        optimizer = make()
        for _ in range(steps):
            with GradientTape() as tape:
                loss = sum(ops.sum(ops.square(ops.cast(v, "float32") - 3.0)) for v in variables)
            optimizer.apply_gradients(list(zip(tape.gradient(loss, variables), variables, strict=True)))
    return variables, optimizer


def compare(make, where, dtypes):
    found, optimizer = trained(make, where, dtypes)
    truth, other = trained(make, "cpu", dtypes)
    for one, expected in zip([*found, *optimizer.variables], [*truth, *other.variables], strict=True):
        assert one.dtype == expected.dtype
        eps = 2.0**-7 if one.dtype.name == "bfloat16" else 2.0**-10 if one.dtype.name == "float16" else 1e-5
        np.testing.assert_allclose(one.numpy().astype("d"), expected.numpy().astype("d"), rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize(
    "dtypes", [["float32"] * 4, ["float16", "float32", "float32", "float64"]], ids=["one", "mixed"]
)
@pytest.mark.parametrize("name", MAKERS)
def test_training_gives_what_it_gives_on_the_host(name, dtypes, where):
    compare(MAKERS[name], where, dtypes)


@pytest.mark.parametrize(
    ("name", "entry"), [("sgd", "gl_sgd"), ("nesterov", "gl_momentum"), ("adam", "gl_adam"), ("adamw", "gl_adam")]
)
def test_a_step_is_one_launch(name, entry):
    trained(MAKERS[name], "emulated", ["float32"] * 4, steps=3)
    assert entries() == [entry] * 3
    trained(MAKERS[name], "emulated", ["float16", "float32", "float16", "float32"], steps=1)
    assert entries() == [entry] * 2


def test_variables_left_out_of_decay_are_in_the_same_launch(where):
    with gl.device(where):
        weight, bias = Variable(np.ones(3, "f"), name="weight"), Variable(np.ones(3, "f"), name="bias")
        optimizer = optimizers.AdamW(0.5, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        optimizer.apply_gradients([(np.zeros(3, "f"), weight), (np.zeros(3, "f"), bias)])
        assert weight.numpy().tolist() == [0.75] * 3 and bias.numpy().tolist() == [1.0] * 3
        optimizer.exclude_from_weight_decay([weight])  # noticed in the next step
        optimizer.apply_gradients([(np.zeros(3, "f"), weight), (np.zeros(3, "f"), bias)])
        assert weight.numpy().tolist() == [0.75] * 3 and bias.numpy().tolist() == [1.0] * 3
    if where == "emulated":
        assert entries() == ["gl_adam"] * 2


def test_a_value_that_was_lent_is_kept_and_the_variable_moves_on(where):
    """An update of an array that a tape or a caller still holds writes a copy: the table follows."""
    with gl.device(where):
        w = Variable(np.zeros(5, "f"))
        optimizer = optimizers.SGD(1.0, 0.5)
        seen = []
        for _ in range(3):
            seen.append(w.lend())
            optimizer.apply_gradients([(np.ones(5, "f"), w)])
    assert [asnumpy(a).tolist() for a in seen] == [[0.0] * 5, [-1.0] * 5, [-2.5] * 5]
    assert w.numpy().tolist() == [-4.25] * 5


def test_an_assigned_variable_is_found_again(where):
    with gl.device(where):
        w = Variable(np.zeros(5, "f"))
        optimizer = optimizers.Adam(1.0)
        optimizer.apply_gradients([(np.ones(5, "f"), w)])
        w.assign(np.full(5, 10, "f"))
        optimizer.apply_gradients([(np.ones(5, "f"), w)])
    np.testing.assert_allclose(w.numpy(), 9.0, rtol=1e-5)


def test_a_graph_updates_by_the_same_kernels():
    with gl.device("emulated"), Graph().as_default():
        w = Variable(np.ones((2, 3), "f"))
        train = optimizers.Adam(0.1).minimize(ops.sum(ops.square(w)), [w])
        session = Session()
        session.run(global_variables_initializer())
        launcher.record.clear()
        for _ in range(2):
            session.run(train)
        assert entries() == ["gl_adam"] * 2
        np.testing.assert_allclose(session.run(w), 0.8, rtol=1e-3)


def test_clipping_measures_all_gradients_at_once(where):
    """One launch for the length, and the same lengths as on the host, for the optimizer and for the function."""
    hosts = [np.full((2, 3), 2.0, "f"), None, np.full(5, -1.0, "f")]
    norm = np.sqrt(24.0 + 5.0)
    with gl.device(where):
        given = [None if h is None else asarray(h) for h in hosts]
        clipped, found = optimizers.clip_by_global_norm(given, 1.0)
    np.testing.assert_allclose(asnumpy(found), norm, rtol=1e-6)
    assert clipped[1] is None and found.shape == ()
    for index in (0, 2):
        np.testing.assert_allclose(asnumpy(clipped[index]), hosts[index] / norm, rtol=1e-6)
    if where == "emulated":
        assert entries() == ["gl_global_norm"]
        trained(MAKERS["clipped"], where, ["float32"] * 4, steps=2)
        assert entries() == ["gl_global_norm", "gl_momentum"] * 2


def test_the_gradient_of_the_length(where):
    with gl.device(where):
        x = asarray(np.array([3.0, 4.0], "f"))
        with GradientTape() as tape:
            tape.watch(x)
            norm = optimizers.global_norm([x])
        np.testing.assert_allclose(asnumpy(tape.gradient(norm, x)), [0.6, 0.8], rtol=1e-6)
