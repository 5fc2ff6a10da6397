"""The optimizer kernels against formulas in float64 and against the NumPy body, and the tables they work by."""

from __future__ import annotations

import gc
import math

import numpy as np
import pytest

from gpulayers.device import array_module
from gpulayers.errors import ShapeError
from gpulayers.launch import register_launcher
from gpulayers.launch import source as launch_source
from gpulayers.ops import optimizer_arrays, optimizer_kernels
from gpulayers.ops.optimizer_kernels import CHUNK, GRADIENTS
from tests.kernels.bfloat16 import BFLOAT16, HAS_BFLOAT16, finfo
from tests.kernels.emulation import EmulatedLauncher, EmulationError
from tests.kernels.strict_array import launcher, xp

pytestmark = pytest.mark.emulated

# parameter, gradient; slots are float32, for float64 float64
PAIRS = [("e", "e"), ("e", "f"), (BFLOAT16, BFLOAT16), (BFLOAT16, "f"), ("f", "f"), ("d", "d")]
NAMES = ["-".join(str(BFLOAT16 if d is BFLOAT16 else np.dtype(d)) for d in pair) for pair in PAIRS]
USABLE = [pair for pair in PAIRS if HAS_BFLOAT16 or BFLOAT16 not in pair]
SIZES = [0, 1, 7, 16, 1000, CHUNK - 1, CHUNK, CHUNK + 3, 3 * CHUNK + 21]
RULES = {
    "sgd": (0, {"learning_rate": 0.1}),
    "momentum": (1, {"learning_rate": 0.1, "momentum": 0.7}),
    "nesterov": (1, {"learning_rate": 0.1, "momentum": 0.7, "nesterov": True}),
    "adam": (2, {"learning_rate": 0.1, "beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-3}),
    "adamw": (2, {"learning_rate": 0.1, "beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-3, "weight_decay": 0.2}),
}
ENTRIES = {0: "gl_sgd", 1: "gl_momentum", 2: "gl_adam"}
GUARD = 3  # elements around every array that nobody may touch


@pytest.fixture(autouse=True)
def usual_launcher():
    yield
    register_launcher("emulated", launcher)


def expected(rule, member, t):
    """The update in float64: what [parameter, gradient, slots...] become, from their values before."""
    slots, s = RULES[rule]
    w, g, *state = (np.asarray(a, "d") for a in member)
    rate = s["learning_rate"]
    if slots == 0:
        return [w - rate * g]
    if slots == 1:
        b = s["momentum"] * state[0] + g
        return [w - rate * (g + s["momentum"] * b if s.get("nesterov") else b), b]
    b1, b2 = s["beta_1"], s["beta_2"]
    m, v = b1 * state[0] + (1 - b1) * g, b2 * state[1] + (1 - b2) * g * g
    corrected = rate * math.sqrt(1 - b2**t) / (1 - b1**t)
    return [w - rate * s.get("weight_decay", 0.0) * w - corrected * m / (np.sqrt(v) + s["epsilon"]), m, v]


class Guarded:
    """A device array in the midst of a larger one, at a chosen distance from an aligned address."""

    def __init__(self, arrays, values, offset):
        values = np.asarray(values)
        self.first = 16 // values.dtype.itemsize * 4 + offset
        host = np.full(self.first + values.size + 64, 77.0).astype(values.dtype)
        host[self.first : self.first + values.size] = values.reshape(-1)
        self.base = arrays.asarray(host)
        self.array = self.base[self.first : self.first + values.size].reshape(values.shape)

    def get(self):
        host = self.base.get()
        inside = slice(self.first, self.first + self.array.size)
        outside = np.concatenate([host[: inside.start], host[inside.stop :]])
        assert (outside.astype("d") == 77.0).all(), "memory beyond an array was written"
        return host[inside].reshape(self.array.shape)


def drawn(shape, dtype, seed):
    return np.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def make(arrays, rule, shapes, pair, offset=0):
    """Return lists of guarded arrays: parameters, then one list per slot."""
    parameter, slot = np.dtype(pair[0]), np.dtype("d" if pair[0] == "d" else "f")
    params = [Guarded(arrays, drawn(shape, parameter, i), offset) for i, shape in enumerate(shapes)]
    zeros = [[Guarded(arrays, np.zeros(shape, slot), offset) for shape in shapes] for _ in range(RULES[rule][0])]
    return [params, *zeros]


def update(rule, lists, grads, t):
    """Call the dispatching function on lists of arrays."""
    slots, settings = RULES[rule]
    module = array_module(*lists[0])
    if slots == 2:
        numbers = optimizer_arrays.adam_numbers(**settings, step=t)
        optimizer_arrays.adam_update(module, lists[0], grads, *lists[1:], numbers)
    else:
        numbers = optimizer_arrays.sgd_numbers(settings["learning_rate"], settings.get("momentum"))
        nesterov = settings.get("nesterov", False)
        optimizer_arrays.sgd_update(
            module, lists[0], grads, lists[1] if slots else None, numbers, nesterov=nesterov
        )


def check(arrays, rule, shapes, pair, offset=0, steps=3):
    lists = make(arrays, rule, shapes, pair, offset)
    given = [[one.array for one in members] for members in lists]
    hosts = [[one.get() for one in members] for members in lists]
    rounding = [float(finfo(members[0].dtype).eps) for members in hosts]
    for t in range(1, steps + 1):
        grads = [drawn(shape, pair[1], 1000 * t + i) for i, shape in enumerate(shapes)]
        wanted = [expected(rule, [*before], t) for before in zip(hosts[0], grads, *hosts[1:], strict=True)]
        update(rule, hosts, grads, t)  # NumPy's body
        on_device = [Guarded(arrays, g, offset) for g in grads]
        update(rule, given, [g.array for g in on_device], t)
        for kept, grad in zip(on_device, grads, strict=True):
            np.testing.assert_array_equal(kept.get(), grad)
        for which, members in enumerate(lists):
            for index, one in enumerate(members):
                found, eps = one.get().astype("d"), rounding[which]
                np.testing.assert_allclose(found, wanted[index][which], rtol=4 * eps, atol=4 * eps)
                np.testing.assert_allclose(found, hosts[which][index].astype("d"), rtol=4 * eps, atol=4 * eps)
        hosts = [[one.get() for one in members] for members in lists]  # from here on both go on together


@pytest.mark.parametrize("pair", PAIRS, ids=NAMES)
@pytest.mark.parametrize("rule", RULES)
def test_all_sizes(arrays, rule, pair):
    check(arrays, rule, [*SIZES, (), (3, 5), (2, 0)], pair)


@pytest.mark.parametrize("offset", [1, 2, 5])
@pytest.mark.parametrize("pair", PAIRS, ids=NAMES)
def test_addresses_that_are_no_multiples_of_16(arrays, pair, offset):
    check(arrays, "adamw", [1, 7, CHUNK + 3, (33, 9)], pair, offset, steps=1)
    check(arrays, "nesterov", [50], pair, offset, steps=1)
    check(arrays, "sgd", [50], pair, offset, steps=1)


def test_one_array_that_is_not_aligned_among_aligned_ones(arrays):
    for crooked in range(4):  # the parameter, the gradient, m, v
        members = [Guarded(arrays, drawn(300, "f", i) ** 2, int(i == crooked)) for i in range(4)]
        before = [one.get() for one in members]
        w, g, m, v = ([one.array] for one in members)
        update("adam", [w, m, v], g, 1)
        wanted = expected("adam", before, 1)
        for one, truth in zip((members[0], *members[2:]), wanted, strict=True):
            np.testing.assert_allclose(one.get(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_all_parameters_take_one_launch(rule):
    shapes = [(i % 7, 3) for i in range(GRADIENTS)]
    launcher.record.clear()
    check(xp, rule, shapes, ("f", "f"), steps=1)
    assert [entry[0].name for entry in launcher.record] == [ENTRIES[RULES[rule][0]]]


def test_the_arguments_fit_what_every_driver_takes():
    kernels = [value for value in vars(optimizer_kernels).values() if type(value).__name__ == "Kernel"]
    assert len(kernels) == 5 and all(kernel.packer.size <= 4096 for kernel in kernels)


def test_more_parameters_than_a_launch_takes(arrays):
    launcher.record.clear()
    check(arrays, "adam", [1 + i % 5 for i in range(2 * GRADIENTS + 9)], ("e", "f"), steps=2)
    if arrays is xp:
        assert len(launcher.record) == 2 * 3


def test_empty_arrays_take_no_place_and_nothing_launches_nothing():
    launcher.record.clear()
    check(xp, "momentum", [(0,), (4, 0)] * GRADIENTS, ("f", "f"), steps=1)
    update("sgd", [[]], [], 1)
    assert not launcher.record
    check(xp, "momentum", [(0,), (4,)] * GRADIENTS, ("f", "f"), steps=1)
    assert len(launcher.record) == 1


def test_a_list_of_several_dtypes(arrays):
    pairs = [*USABLE, *USABLE]
    hosts = [[drawn(100 + i, p, i) for i, (p, _) in enumerate(pairs)]]
    hosts += [[np.zeros(100 + i, "d" if p == "d" else "f") for i, (p, _) in enumerate(pairs)] for _ in "mv"]
    grads = [drawn(100 + i, g, 50 + i) for i, (_, g) in enumerate(pairs)]
    given = [[arrays.asarray(a) for a in members] for members in hosts]
    launcher.record.clear()
    update("adam", given, [arrays.asarray(g) for g in grads], 1)
    if arrays is xp:
        defines = [tuple(entry[0].defines.values()) for entry in launcher.record]
        assert defines == [(np.dtype(p).name, np.dtype(g).name) for p, g in USABLE]
    update("adam", hosts, grads, 1)
    for members, truths in zip(given, hosts, strict=True):
        for found, truth in zip(members, truths, strict=True):
            eps = float(finfo(truth.dtype).eps)
            np.testing.assert_allclose(found.get().astype("d"), truth.astype("d"), rtol=2 * eps, atol=2 * eps)


# ---- what the kernels do not take ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["column-major parameter", "strided parameter", "float64 slot", "float64 gradient"])
def test_members_without_a_kernel_are_updated_beside_the_others(layout):
    w, g, b = drawn((6, 8), "f", 1), drawn((6, 8), "f", 2), drawn((6, 8), "f", 3)
    change = {
        "column-major parameter": lambda: (xp.asarray(w.T.copy()).T, xp.asarray(g), xp.asarray(b)),
        "strided parameter": lambda: (xp.asarray(np.repeat(w, 2, axis=1))[:, ::2], xp.asarray(g), xp.asarray(b)),
        "float64 slot": lambda: (xp.asarray(w), xp.asarray(g), xp.asarray(b, "d")),
        "float64 gradient": lambda: (xp.asarray(w), xp.asarray(g, "d"), xp.asarray(b)),
    }
    odd, even = change[layout](), (xp.asarray(w), xp.asarray(g), xp.asarray(b))
    launcher.record.clear()
    params, grads, momentums = zip(odd, even, strict=True)
    update("momentum", [params, momentums], grads, 1)
    assert len(launcher.record) == 1
    wanted = expected("momentum", [w, g, b], 1)
    for member in (odd, even):
        np.testing.assert_allclose(member[0].get(), wanted[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(member[2].get(), wanted[1], rtol=1e-5, atol=1e-6)


def test_a_gradient_of_another_layout_is_copied(arrays):
    w, g = drawn((6, 8), "f", 1), drawn((6, 8), "f", 2)
    for laid_out in (arrays.asarray(g.T.copy()).T, arrays.asarray(np.repeat(g, 2, axis=1))[:, ::2]):
        parameter = arrays.asarray(w)
        update("sgd", [[parameter]], [laid_out], 1)
        np.testing.assert_allclose(parameter.get(), w - np.float32(0.1) * g, rtol=1e-6, atol=1e-7)


def test_arrays_that_share_memory_are_updated_one_after_the_other(arrays):
    host = drawn(3 * CHUNK, "f", 1)
    shared, apart = arrays.asarray(host), arrays.asarray(host)
    given = [shared[: 2 * CHUNK], apart, shared[CHUNK:], shared[5:9]]
    truth, alone = host.copy(), host.copy()
    views = [truth[: 2 * CHUNK], alone, truth[CHUNK:], truth[5:9]]
    grads = [drawn(v.size, "f", 2 + i) for i, v in enumerate(views)]
    update("sgd", [given], [arrays.asarray(g) for g in grads], 1)
    update("sgd", [views], grads, 1)
    np.testing.assert_allclose(shared.get(), truth, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(apart.get(), alone, rtol=1e-6, atol=1e-7)
    assert optimizer_kernels.sgd_update(given, given, (0.0,)) == [0, 2, 3]


def test_a_gradient_of_another_shape_is_refused(arrays):
    w = [arrays.asarray(drawn(shape, "f", 1)) for shape in ((4,), (3, 2))]
    for wrong in ([w[0], w[1].reshape(2, 3)], [w[1], w[0]]):
        kept = [one.get() for one in w]
        with pytest.raises(ShapeError, match="gradient [01] has another shape than its parameter"):
            update("sgd", [w], wrong, 1)
        for one, before in zip(w, kept, strict=True):
            np.testing.assert_array_equal(one.get(), before)
    with pytest.raises(ValueError):
        update("sgd", [w], w[:1], 1)


def test_decay_leaves_out_whom_it_is_told(arrays):
    """In the kernel, in the expressions for what the kernel does not take (the last one here), and in NumPy."""
    hosts = [drawn((6, 4), "f", i) for i in range(3)]
    zeros = [[np.zeros((6, 4), "f") for _ in hosts] for _ in "mv"]
    for decays in ([True, False, False], [False, True, True]):
        for put in (arrays.asarray, np.array):
            params = [*map(put, hosts[:2]), put(hosts[2].T.copy()).T]
            given = [params, *[[put(z) for z in members] for members in zeros]]
            grads = [put(np.zeros((6, 4), "f")) for _ in hosts]
            numbers = optimizer_arrays.adam_numbers(learning_rate=0.5, weight_decay=0.5)
            optimizer_arrays.adam_update(array_module(*params), params, grads, *given[1:], numbers, decays=decays)
            for host, one, decayed in zip(hosts, params, decays, strict=True):
                found = one if put is np.array else one.get()
                np.testing.assert_allclose(found, host * 0.75 if decayed else host, rtol=1e-6)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_infinities_and_nan(arrays):
    """What is not finite stays in its place, and no decay leaves an infinite parameter alone."""
    w = np.array([np.inf, 1, 1, 1], "f")
    given = [arrays.asarray(w), arrays.zeros(4, "f"), arrays.zeros(4, "f")]
    grad = arrays.asarray(np.array([0, np.nan, 0, 1], "f"))
    update("adam", [[one] for one in given], [grad], 1)
    found = given[0].get()
    assert found[0] == np.inf and np.isnan(found[1]) and found[2] == 1 and 0 < found[3] < 1


@pytest.mark.parametrize("rate", [0.0, 1e300, math.inf])
def test_rates_that_float32_does_not_hold(arrays, rate):
    w = arrays.asarray(np.ones(3, "f"))
    optimizer_arrays.sgd_update(arrays, [w], [arrays.asarray(np.ones(3, "f"))], None, (rate,))
    assert w.get().tolist() == ([1.0] * 3 if rate == 0 else [-math.inf] * 3)


def test_float64_numbers_are_not_rounded_to_float32(arrays):
    w = arrays.asarray(np.zeros(3))
    optimizer_arrays.sgd_update(arrays, [w], [arrays.asarray(np.ones(3))], None, (0.1,))
    assert w.get().tolist() == [-0.1] * 3


# ---- tables ----------------------------------------------------------------------------------------------------------


def made_tables(monkeypatch):
    made = []
    words = optimizer_kernels._words
    monkeypatch.setattr(optimizer_kernels, "_words", lambda *given: made.append(1) or words(*given))
    return made


def test_the_table_is_made_once_and_goes_with_its_arrays(monkeypatch):
    made = made_tables(monkeypatch)
    gc.collect()
    kept = len(optimizer_kernels._plans)
    params, momentums = ([xp.zeros(5, "f") for _ in range(3)] for _ in "ab")
    for t in range(1, 5):
        update("momentum", [params, momentums], [xp.asarray(drawn(5, "f", t)) for _ in params], t)
    assert len(made) == 1 and len(optimizer_kernels._plans) == kept + 1
    momentums[1] = momentums[1].copy()  # as a variable does whose value somebody holds
    for t in range(5, 8):
        update("momentum", [params, momentums], [xp.asarray(drawn(5, "f", t)) for _ in params], t)
    assert len(made) == 2 and len(optimizer_kernels._plans) == kept + 1
    truth = [np.zeros(5, "f"), np.zeros(5, "f")]
    for t in range(1, 8):
        update("momentum", [[truth[0]], [truth[1]]], [drawn(5, "f", t)], t)
    for member in zip(params, momentums, strict=True):
        np.testing.assert_allclose([one.get() for one in member], truth, rtol=1e-6, atol=1e-7)
    del params, momentums, member
    gc.collect()
    assert len(optimizer_kernels._plans) == kept


def test_gradients_of_another_dtype_get_another_table():
    w = [xp.asarray(np.zeros(9, "e"))]
    for t, dtype in enumerate("efef", 1):
        update("sgd", [w], [xp.asarray(np.ones(9, dtype))], t)
    np.testing.assert_allclose(w[0].get(), -0.4, rtol=1e-3)


def test_no_more_tables_are_kept_than_the_limit(monkeypatch):
    monkeypatch.setattr(optimizer_kernels, "TABLES", 3)
    params = [[xp.zeros(2, "f")] for _ in range(5)]
    for _ in range(2):
        for one in params:
            update("sgd", [one], [xp.asarray(np.ones(2, "f"))], 1)
    assert len(optimizer_kernels._plans) <= 3
    assert all(one[0].get().tolist() == pytest.approx([-0.2, -0.2]) for one in params)


# ---- the length of all gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", ["e", BFLOAT16, "f", "d"], ids=str)
def test_global_norm(arrays, dtype, offset):
    hosts = [drawn(shape, dtype, i) for i, shape in enumerate([*SIZES, (), (3, 5)])]
    found = optimizer_kernels.global_norm([Guarded(arrays, h, offset).array for h in hosts])
    truth = math.sqrt(math.fsum(float(x) ** 2 for h in hosts for x in h.reshape(-1).astype("d")))
    assert found.shape == () and found.dtype == ("d" if dtype == "d" else "f")
    np.testing.assert_allclose(found.get(), truth, rtol=1e-14 if dtype == "d" else 1e-7)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", ["e", BFLOAT16, "f", "d"], ids=str)
def test_global_norm_of_more_chunks_than_blocks(dtype, offset):
    """The blocks that the device holds at a time take several chunks each."""
    register_launcher("emulated", EmulatedLauncher(device=launcher.device._replace(multiprocessors=1)))
    hosts = [drawn(size, dtype, i) for i, size in enumerate([19 * CHUNK + 5, 3, 2 * CHUNK, 7 * CHUNK - 1])]
    found = optimizer_kernels.global_norm([Guarded(xp, h, offset).array for h in hosts])
    truth = math.sqrt(math.fsum(float(x) ** 2 for h in hosts for x in h.reshape(-1).astype("d")))
    np.testing.assert_allclose(found.get(), truth, rtol=1e-14 if dtype == "d" else 1e-7)


@pytest.mark.parametrize("value", [2.0**-24, 2.0**-14, 65504.0])
def test_squares_of_float16_are_not_rounded(arrays, value):
    """The smallest and the largest: as whole vectors they are added in float32."""
    found = optimizer_kernels.global_norm([arrays.asarray(np.full(CHUNK, value, "e"))])
    assert found.get() == np.float32(64 * value)


def test_global_norm_of_many_and_of_several_dtypes(arrays):
    hosts = [drawn(1 + i % 9, "fed"[i % 3], i) for i in range(4 * GRADIENTS)]
    launcher.record.clear()
    found = optimizer_kernels.global_norm([arrays.asarray(h) for h in hosts])
    truth = math.sqrt(math.fsum(float(x) ** 2 for h in hosts for x in h.astype("d")))
    np.testing.assert_allclose(found.get(), truth, rtol=1e-14)
    if arrays is xp:
        assert len(launcher.record) == 3 * 2
    again = optimizer_kernels.global_norm([arrays.asarray(h) for h in hosts])
    assert again.get().tobytes() == found.get().tobytes()


def test_each_stream_has_its_table_of_the_norm(monkeypatch):
    """A table is copied on the stream that meets its sizes first: another stream would read it before it is there."""
    asked, own = [], optimizer_kernels._words
    monkeypatch.setattr(optimizer_kernels, "_words", lambda *a: asked.append(a) or own(*a))
    grads = [xp.asarray(np.full(n, 2.0, np.float32)) for n in (3, 11, 4099)]
    for stream in (71, 72, 71, 72):
        monkeypatch.setattr(launcher, "queue", lambda stream=stream: (0, stream))
        assert float(optimizer_kernels.global_norm(grads).get()) == pytest.approx(2 * np.sqrt(3 + 11 + 4099))
    assert len(asked) == 2


def test_global_norm_does_not_overflow_and_shows_what_is_not_finite(arrays):
    large = arrays.asarray(np.full(100, 1e30, "f"))
    np.testing.assert_allclose(optimizer_kernels.global_norm([large]).get(), 1e31, rtol=1e-6)
    for wrong in (np.inf, np.nan):
        assert not np.isfinite(optimizer_kernels.global_norm([large, arrays.asarray(np.full(2, wrong, "e"))]).get())
    assert optimizer_kernels.global_norm([arrays.asarray(np.zeros((0, 3), "f"))]).get() == 0
    strided = arrays.asarray(np.ones((4, 4), "f"))[:, ::2]
    np.testing.assert_allclose(optimizer_kernels.global_norm([strided]).get(), math.sqrt(8), rtol=1e-7)


# ---- broken kernels --------------------------------------------------------------------------------------------------


def norm_check(arrays, shapes):
    hosts = [drawn(shape, "f", i) for i, shape in enumerate(shapes)]
    found = optimizer_kernels.global_norm([arrays.asarray(h) for h in hosts])
    truth = np.sqrt(sum((h.astype("d") ** 2).sum() for h in hosts))
    np.testing.assert_allclose(found.get(), truth, rtol=1e-6)


def looping_norm_check(arrays, shapes):
    register_launcher("emulated", EmulatedLauncher(device=launcher.device._replace(multiprocessors=1)))
    norm_check(arrays, [*shapes, 11 * CHUNK])


def adam_check(arrays, shapes):
    check(arrays, "adamw", shapes, ("e", "f"), steps=2)


def momentum_check(arrays, shapes):
    check(arrays, "nesterov", shapes, ("f", "f"), steps=2)


def unaligned_check(arrays, shapes):
    check(arrays, "sgd", shapes, ("f", "f"), offset=1, steps=1)


MUTANTS = {
    "one element too many": (
        "return static_cast<int32>(count - start < c",
        "return 1 + static_cast<int32>(count - start < c",
        adam_check,
    ),
    "one element too few": ("if (behind < count) update_run", "if (behind + 1 < count) update_run", adam_check),
    "the tail is forgotten": ("if (behind < count) update_run", "if (false) update_run", momentum_check),
    "one vector too many": ("at < whole;", "at <= whole;", adam_check),
    "the wrong chunk": ("entry & 0xffffffffu", "entry & 0u", momentum_check),
    "the wrong tensor": ("arguments.gradients[here.tensor]", "arguments.gradients[0]", momentum_check),
    "vectors at any address": ("if (bits % 16u == 0u)", "if (true)", unaligned_check),
    "Nesterov is forgotten": ("(nesterov ? b * momentum + g : b)", "b", momentum_check),
    "the slot is not written": ("store_run<N, cache::streaming>(row.first + at, first);", "", momentum_check),
    "no decay": ("moved + w * decay", "moved", adam_check),
    "nobody is told to decay": ("row.decays == 0", "row.decays != 0", adam_check),
    "epsilon under the root": ("(sqrt(v) + epsilon)", "sqrt(v + epsilon)", adam_check),
    "the last block does not wait": ("!last_block(arguments.counters, gridDim.x)", "blockIdx.x != 0", norm_check),
    "every block counts from 0": (
        "sums[arguments.sums_before + blockIdx.x] = sum;",
        "sums[blockIdx.x] = sum;",
        norm_check,
    ),
    "the norm forgets the tail": ("if (N > 1 && behind < count) sum +=", "if (false) sum +=", norm_check),
    "the norm forgets a vector of a chunk": ("i < count; ++i) sum +=", "i < count - 1; ++i) sum +=", norm_check),
    "the norm adds half a vector": ("int half = N / 2; half > 0", "int half = N / 2; half > 1", norm_check),
    "the norm's blocks take one chunk": ("chunk < arguments.chunks;", "chunk < gridDim.x;", looping_norm_check),
    "the norm's blocks stay at a chunk": ("= entries[chunk + gridDim.x]", "= entries[chunk]", looping_norm_check),
}
MUTANT_SHAPES = [CHUNK + 5, (3, 7), 2 * CHUNK]


@pytest.mark.parametrize("run", [adam_check, momentum_check, unaligned_check, norm_check, looping_norm_check])
@pytest.mark.parametrize("build", ["fibers", pytest.param("address", marks=pytest.mark.slow)])
def test_the_right_text_passes_the_mutants_checks(run, build):
    register_launcher("emulated", EmulatedLauncher(build=build))
    run(xp, mutant_shapes(run))


def mutant_shapes(run):
    many = [11] * GRADIENTS if run in (norm_check, looping_norm_check) else []  # so that there are several launches
    return [*many, *MUTANT_SHAPES]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(monkeypatch, mutant):
    """Each broken copy fails a check that the right text passes."""
    right, wrong, run = MUTANTS[mutant]
    read = launch_source.read_source
    assert right in "".join(read("optimizer.cu")), "the kernel changed: change the mutant too"
    monkeypatch.setattr(launch_source, "read_source", lambda name: tuple(p.replace(right, wrong) for p in read(name)))
    for value in vars(optimizer_kernels).values():
        if type(value).__name__ == "Kernel":
            monkeypatch.setattr(value, "_specialisations", {})
    register_launcher("emulated", EmulatedLauncher())
    with pytest.raises((AssertionError, EmulationError)):
        run(xp, mutant_shapes(run))


@pytest.mark.slow
@pytest.mark.parametrize("build", ["address", "threads"])
def test_under_sanitizers(build):
    register_launcher("emulated", EmulatedLauncher(build=build, runs=((0, 0xFF, 2),)))
    for make_one in (lambda a: xp.asarray(a), lambda a: xp.asarray(np.concatenate([a[:1], a]))[1:]):
        w, g, m, v = ([make_one(drawn(size, "f", i) ** 2) for size in (7, 300)] for i in range(4))
        before = [[one.get() for one in member] for member in zip(w, g, m, v, strict=True)]
        update("adam", [w, m, v], g, 1)
        norm = optimizer_kernels.global_norm(g)
        for index, member in enumerate(before):
            np.testing.assert_allclose(w[index].get(), expected("adam", member, 1)[0], rtol=1e-5, atol=1e-6)
        truth = math.sqrt(sum((one.get().astype("d") ** 2).sum() for one in g))
        np.testing.assert_allclose(norm.get(), truth, rtol=1e-6)


@pytest.mark.slow
def test_the_address_sanitizer_sees_one_element_too_many(monkeypatch):
    right, wrong, _ = MUTANTS["one element too many"]
    read = launch_source.read_source
    monkeypatch.setattr(launch_source, "read_source", lambda name: tuple(p.replace(right, wrong) for p in read(name)))
    monkeypatch.setattr(optimizer_kernels._sgd, "_specialisations", {})
    register_launcher("emulated", EmulatedLauncher(build="address", runs=((0, 0xFF, 1),)))
    with pytest.raises(EmulationError, match="heap-buffer-overflow"):
        update("sgd", [[xp.zeros(8, "f")]], [xp.zeros(8, "f")], 1)
