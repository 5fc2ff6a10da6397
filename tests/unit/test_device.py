"""Where arrays live: the default device, moving, foreign arrays, and the border between host and device."""

import copy
import importlib
import os
import subprocess
import sys
import types

import numpy as np
import pytest

import gpulayers as gl
from gpulayers import _cupy
from gpulayers.errors import DeviceError
from tests.kernels.fake_cuda import Machine, fake_cuda
from tests.kernels.strict_array import StrictArray, xp

device = importlib.import_module("gpulayers.device")  # the package's attribute of this name is the function

X = np.array([[1.0, 2.0], [3.0, 5.0]], "float32")


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(device, "_default", device._default)


def without_gpu(monkeypatch, reason="no driver here"):
    monkeypatch.setattr(_cupy, "unusable_reason", lambda: reason)


class GpuArray(np.ndarray):
    """Stands for cupy.ndarray: it knows on which GPU it was made."""

    def __array_finalize__(self, base):
        self.data_device = getattr(base, "data_device", None)

    @property
    def data(self):
        return types.SimpleNamespace(device_id=self.data_device)

    def copy(self):
        return _cupy.cupy().asarray(np.array(self))  # to the current GPU


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs; what is made lies on CuPy's current one."""
    machine = Machine()
    machine.devices = 2

    def asarray(value, dtype=None):
        if isinstance(value, GpuArray) and dtype in (None, value.dtype):
            return value
        made = np.array(value, dtype).view(GpuArray)
        made.data_device = machine.device
        return made

    module = types.ModuleType("fake_cupy")
    module.cuda, module.ndarray, module.asarray = fake_cuda(machine), GpuArray, asarray
    module.zeros = lambda shape, dtype: asarray(np.zeros(shape, dtype))
    module.full = lambda shape, value, dtype: asarray(np.full(shape, value, dtype))
    without_gpu(monkeypatch, reason="")
    monkeypatch.delenv("GPULAYERS_DEVICE", raising=False)
    monkeypatch.setattr(device, "_default", None)
    monkeypatch.setattr(device, "_by_kind", dict(device._by_kind))
    monkeypatch.setattr(device, "_modules", dict(device._modules))
    monkeypatch.setattr(_cupy, "cupy", lambda: module)
    monkeypatch.setitem(sys.modules, "cupy", module)
    return machine


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=os.getcwd(),
        check=False,
    )


# --- the default device -----------------------------------------------------------------------------------------------


def test_the_cpu_is_the_default_where_no_gpu_is_usable(monkeypatch):
    without_gpu(monkeypatch)
    monkeypatch.delenv("GPULAYERS_DEVICE", raising=False)
    monkeypatch.setattr(device, "_default", None)
    assert gl.current_device() == gl.Device("cpu")
    assert not gl.gpu_available() and gl.gpu_unavailable_reason() == "no driver here"


def test_the_gpu_is_the_default_where_an_allocation_succeeds(gpus):
    assert gl.current_device() == gl.Device("gpu", 0)


def test_the_environment_variable_decides_in_a_fresh_process():
    code = "import gpulayers as gl; print(gl.current_device(), type(gl.Variable(1.0).value).__name__)"
    assert python(code, GPULAYERS_DEVICE="cpu").stdout.split() == ["cpu", "ndarray"]
    wrong = python(code, GPULAYERS_DEVICE="abacus")
    assert wrong.returncode and "unknown device" in wrong.stderr and "'abacus'" in wrong.stderr


@pytest.mark.skipif(gl.gpu_available(), reason="there is a GPU")
def test_asking_for_a_gpu_by_the_environment_where_there_is_none_is_an_error_not_the_cpu():
    found = python("import gpulayers as gl; gl.current_device()", GPULAYERS_DEVICE="gpu")
    assert found.returncode and "no GPU is usable" in found.stderr


def test_importing_loads_no_cupy():
    found = python("import sys, gpulayers; print(any(m.startswith('cupy') for m in sys.modules))")
    assert found.stdout.strip() == "False", found.stderr


# --- choosing one -----------------------------------------------------------------------------------------------------


def test_device_is_a_context_that_nests():
    before = gl.current_device()
    with gl.device("emulated") as where:
        assert where == gl.current_device() == gl.Device("emulated")
        with gl.device("cpu"):
            assert gl.current_device().kind == "cpu"
        assert gl.current_device().kind == "emulated"
    assert gl.current_device() == before


def test_device_is_restored_after_an_error():
    before = gl.current_device()
    with pytest.raises(KeyError), gl.device("emulated"):
        raise KeyError
    assert gl.current_device() == before


def test_set_device_changes_the_default():
    assert gl.set_device("emulated") == gl.Device("emulated")
    assert isinstance(gl.Variable(1.0).value, StrictArray)
    with gl.device("cpu"):
        assert type(gl.Variable(1.0).value) is np.ndarray


@pytest.mark.parametrize("spelling", ["cpu", "CPU", "/cpu:0", "/device:CPU:0", gl.Device("cpu")])
def test_spellings(spelling):
    with gl.device(spelling) as where:
        assert where == gl.Device("cpu") and str(where) == "cpu"
    assert str(gl.Device("gpu", 2)) == "gpu:2"


@pytest.mark.parametrize("choose", [gl.set_device, lambda name: gl.device(name).__enter__()])
@pytest.mark.parametrize("name", ["tpu", "gpu:x", "", 3, None])
def test_unknown_devices(choose, name):
    with pytest.raises(DeviceError, match="device.*'cpu', 'gpu' or 'gpu:1'"):
        choose(name)


@pytest.mark.parametrize("choose", [gl.set_device, lambda name: gl.device(name).__enter__()])
def test_a_gpu_that_is_not_usable_is_refused_with_the_reason(monkeypatch, choose):
    without_gpu(monkeypatch)
    for name in ("gpu", "gpu:1", "cuda", "/device:GPU:0"):
        with pytest.raises(DeviceError, match="no GPU is usable.*no driver here"):
            choose(name)


# --- several GPUs -----------------------------------------------------------------------------------------------------


def by_environment(monkeypatch, name):
    monkeypatch.setenv("GPULAYERS_DEVICE", name)
    return gl.current_device()


@pytest.mark.parametrize("choose", [lambda monkeypatch, name: gl.set_device(name), by_environment])
def test_what_is_made_by_default_lies_on_the_chosen_gpu(gpus, monkeypatch, choose):
    assert choose(monkeypatch, "gpu:1") == gl.Device("gpu", 1)
    assert gpus.device == 1, "kernels are launched on CuPy's current device"
    gpus.device = 0  # as in another thread
    v = gl.Variable(X)
    assert gl.asarray(X).data_device == v.value.data_device == 1 and v.device == "gpu:1"
    assert gl.ops.zeros((2,)).data_device == gl.asarray(1.0).data_device == 1 and gpus.device == 0
    v.assign(X * 2)
    assert v.value.data_device == 1 and copy.deepcopy(v).value.data_device == 1


def test_asarray_takes_the_number_of_a_gpu(gpus):
    for number in (0, 1):
        assert gl.asarray(X, device=f"gpu:{number}").data_device == number
        assert gl.asarray([1.0], device=gl.Device("gpu", number)).data_device == number
    assert gpus.device == 0


def test_a_gpu_without_a_number_is_cupys_current_one(gpus):
    for number in (0, 1, 0):
        gpus.device = number
        assert gl.current_device() == device.parse_device("gpu") == gl.Device("gpu", number)
        assert gl.asarray(X).data_device == gl.Variable(X).value.data_device == number
    gl.set_device("gpu")
    gpus.device = 1
    assert gl.current_device() == gl.Device("gpu", 1)


def test_an_array_is_not_moved_between_gpus(gpus):
    x = gl.asarray(X, device="gpu:1")
    assert gl.asarray(x, device="gpu:1") is x
    with pytest.raises(DeviceError, match="an array on gpu:1 is given where one on gpu:0 is needed"):
        gl.asarray(x, device="gpu:0")


@pytest.mark.parametrize(
    "choose", [gl.set_device, lambda name: gl.device(name).__enter__(), lambda name: gl.asarray(X, device=name)]
)
@pytest.mark.parametrize("name", ["gpu:2", gl.Device("gpu", 2)])
def test_a_gpu_that_does_not_exist(gpus, choose, name):
    with pytest.raises(DeviceError, match="there is no such GPU.*gpu:0 to gpu:1.*gpu:2"):
        choose(name)
    assert gpus.device == 0 and gl.current_device() == gl.Device("gpu", 0)


# --- arrays -----------------------------------------------------------------------------------------------------------


def test_asarray_of_python_values():
    assert gl.asarray(1.0).dtype == np.float32 and gl.asarray([1, 2]).dtype == np.int32
    assert gl.asarray(True).dtype == np.bool_ and gl.asarray([1.0], dtype="float64").dtype == np.float64
    assert gl.asarray(X) is X
    assert gl.asarray(X, dtype="float16").dtype == np.float16
    with pytest.raises(TypeError, match="asarray"):
        gl.asarray([object()])


def test_array_module():
    assert gl.array_module(X) is np and gl.array_module(1.0, None) is np
    assert gl.array_module(X, StrictArray._wrap(X)) is xp


def test_asnumpy_copies_from_the_device():
    strict = xp.asarray(X)
    found = gl.asnumpy(strict)
    assert type(found) is np.ndarray
    found[:] = 0
    np.testing.assert_array_equal(strict.get(), X)
    assert gl.asnumpy(X) is X
    np.testing.assert_array_equal(gl.asnumpy(gl.Variable(X)), X)
    with gl.GradientTape() as tape:
        np.testing.assert_array_equal(gl.asnumpy(tape.watch(X.copy())), X)


def test_a_host_array_goes_to_the_device_and_not_back_by_itself():
    with gl.device("emulated"):
        moved = gl.asarray(X)
        assert isinstance(moved, StrictArray) and gl.asarray(moved) is moved
    with gl.device("cpu"), pytest.raises(DeviceError, match=r"gl\.asnumpy\(x\)"):
        gl.asarray(moved)


def test_a_failing_call_on_the_device_does_not_continue_on_the_host():
    with pytest.raises(TypeError):
        np.asarray(xp.asarray(X))


# --- foreign arrays ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
def test_torch_tensors_come_in_without_a_copy(requires_grad):
    torch = pytest.importorskip("torch")
    tensor = torch.tensor(X.tolist(), requires_grad=requires_grad)
    found = gl.asarray(tensor)
    assert type(found) is np.ndarray and found.dtype == np.float32
    np.testing.assert_array_equal(found, X)
    assert found.__array_interface__["data"][0] == tensor.data_ptr()
    np.testing.assert_array_equal(gl.asnumpy(tensor), X)
    np.testing.assert_array_equal(gl.ops.add(tensor, 1.0), X + 1)


class PinnedTensor:
    """Stands for a PyTorch tensor in pinned host memory, which DLPack has a code of its own for."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return (3, 0)

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__()


def test_pinned_tensors_come_in_as_host_arrays():
    x = X.copy()
    found = gl.asarray(PinnedTensor(x))
    assert type(found) is np.ndarray and found.ctypes.data == x.ctypes.data
    np.testing.assert_array_equal(gl.asnumpy(PinnedTensor(x)), X)


@pytest.mark.parametrize("family", [gl.layers, gl.keras.layers])
def test_layers_take_torch_tensors(family):
    torch = pytest.importorskip("torch")
    layer = family.Dense(2, kernel_initializer="ones")
    found = layer(torch.tensor(X.tolist(), requires_grad=True))
    assert type(found) is np.ndarray
    np.testing.assert_array_equal(found, X.sum(1, keepdims=True).repeat(2, 1))


def test_a_torch_tensor_goes_to_the_device():
    torch = pytest.importorskip("torch")
    with gl.device("emulated"):
        found = gl.asarray(torch.tensor(X.tolist()))
    assert isinstance(found, StrictArray)
    np.testing.assert_array_equal(found.get(), X)


# --- layers and variables at the border -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [gl.layers, gl.keras.layers])
def test_a_host_array_given_to_a_device_layer_is_copied(family):
    with gl.device("emulated"):
        layer = family.Dense(2, kernel_initializer="ones")
    found = layer(X)  # outside the context: the layer knows where it lives
    assert isinstance(found, StrictArray)
    assert all(isinstance(v.value, StrictArray) for v in layer.variables)
    np.testing.assert_array_equal(found.get(), X.sum(1, keepdims=True).repeat(2, 1))


@pytest.mark.parametrize("family", [gl.layers, gl.keras.layers])
def test_a_device_array_given_to_a_cpu_layer_names_the_conversion(family):
    layer = family.Dense(2, name="on_host")
    with pytest.raises(DeviceError, match=r"on_host.*gl\.device\('gpu'\).*gl\.asnumpy\(x\)"):
        layer(xp.asarray(X))
    assert not layer.built


def test_a_host_array_beside_a_device_tensor_or_variable_is_copied():
    with gl.device("emulated"):
        v = gl.Variable(X)
        x = gl.asarray(X)
    for result in (v * X, X * v, gl.ops.add(x, X)):
        assert isinstance(result, StrictArray)
    with gl.GradientTape() as tape:
        t = tape.watch(x)
        y = X * t * v + X
    found = tape.gradient(y, [x, v])
    for gradient in found:
        assert isinstance(gradient, StrictArray)
        np.testing.assert_allclose(gradient.get(), X * X)


def test_a_device_value_is_not_assigned_to_a_host_variable():
    v = gl.Variable(X)
    with pytest.raises(DeviceError, match="asnumpy"):
        v.assign(xp.asarray(X))
    with gl.device("emulated"):
        w = gl.Variable(X)
    w.assign(X * 2)
    np.testing.assert_array_equal(w.numpy(), X * 2)


def test_a_session_takes_and_returns_host_arrays_on_a_device():
    with gl.device("emulated"), gl.Graph().as_default(), gl.Session() as session:
        x = gl.placeholder(gl.float32, (2, 2))
        v = gl.get_variable("v", (2, 2), initializer="ones")
        y = gl.ops.tanh(x) + v
        [slope] = gl.gradients(y, x)
        session.run(gl.global_variables_initializer())
        for fed in (X, gl.asarray(X)):
            found, gradient = session.run([y, slope], {x: fed})
            assert type(found) is np.ndarray and type(gradient) is np.ndarray
            np.testing.assert_allclose(found, np.tanh(X) + 1, rtol=1e-6)
            np.testing.assert_allclose(gradient, 1 - np.tanh(X) ** 2, rtol=1e-4, atol=1e-7)


def test_a_function_and_a_model_return_device_arrays():
    with gl.device("emulated"):
        f = gl.function(lambda x: gl.ops.tanh(x) * 2.0)
        assert isinstance(f(gl.asarray(X)), StrictArray)
        inputs = gl.keras.Input((2,))
        model = gl.keras.Model(inputs, gl.keras.layers.Dense(3)(inputs))
        assert isinstance(model(X), StrictArray)


def test_a_numpy_array_of_another_byte_order_and_scalars():
    swapped = X.astype(">f4")
    np.testing.assert_array_equal(gl.ops.add(swapped, 1.0), X + 1)
    assert gl.ops.add(np.float32(1), np.float32(2)) == 3
