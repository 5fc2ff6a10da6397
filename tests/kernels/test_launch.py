"""The launch boundary: sources, argument structs, checks before a launch, and what a failing compile says."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
import types
import weakref

import numpy as np
import pytest

from gpulayers import _cupy
from gpulayers.device import register_array_type
from gpulayers.errors import DeviceError, DTypeError, KernelError, ShapeError
from gpulayers.launch import (
    CupyLauncher,
    Elementwise,
    Kernel,
    device_properties,
    has_kernels,
    kernel_list,
    launcher_of,
    place_of,
    register_launcher,
    source,
    vector_width,
    workspace,
)
from tests.kernels.emulation import H200_LIKE
from tests.kernels.emulation.build import compiler
from tests.kernels.nvrtc import compile_for, unusable_reason
from tests.kernels.strict_array import launcher, xp

needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs g++")

MIXED = [
    ("small", "int32"),
    ("x", "const STORAGE*"),
    ("ratio", "float32"),
    ("exact", "float64"),
    ("flags", "uint32[3]"),
    ("table", "STORAGE*[2]"),
    ("long_one", "int64"),
    ("anything", "pointer"),
    ("last", "uint32"),
]
ECHO = """
GL_KERNEL(gl_echo, 1) {
    double* out = static_cast<double*>(arguments.anything);
    out[0] = arguments.small;
    out[1] = arguments.ratio;
    out[2] = arguments.exact;
    out[3] = arguments.flags[0] + 10.0 * arguments.flags[1] + 100.0 * arguments.flags[2];
    out[4] = static_cast<double>(arguments.long_one);
    out[5] = arguments.last;
    out[6] = arguments.x == nullptr;
    out[7] = arguments.table[1] == nullptr;
    out[8] = widen(arguments.table[0][0]);
}
"""


def echo_kernel():
    return Kernel("", "gl_echo", MIXED, defines={"STORAGE": ["float16", "float32"]}, body=ECHO, listed=False)


def values(**changes):
    given = {
        "small": -5,
        "x": None,
        "ratio": np.float32(0.1),
        "exact": 0.1,
        "flags": [1, 2, 3],
        "table": [xp.asarray(np.array([1.5], "f"))],
        "long_one": 2**40,
        "anything": xp.empty(9, "d"),
        "last": 2**32 - 1,
    }
    return {**given, **changes}


def launch(given, **keywords):
    echo_kernel().launch(given, **{"grid": (1,), "block": (1,), "defines": {"STORAGE": "float32"}, **keywords})


# ---- the struct ------------------------------------------------------------------------------------------------------


def test_layout_is_that_of_c():
    class Expected(ctypes.Structure):
        _fields_ = (
            ("small", ctypes.c_int),
            ("x", ctypes.c_void_p),
            ("ratio", ctypes.c_float),
            ("exact", ctypes.c_double),
            ("flags", ctypes.c_uint * 3),
            ("table", ctypes.c_void_p * 2),
            ("long_one", ctypes.c_longlong),
            ("anything", ctypes.c_void_p),
            ("last", ctypes.c_uint),
        )

    kernel = echo_kernel()
    assert kernel.packer.size == ctypes.sizeof(Expected)
    text = source.argument_struct("gl_echo", kernel.fields)
    for name, _ in MIXED:
        assert f"GL_LIES_AT(gl_echo_arguments, {name}, {getattr(Expected, name).offset})," in text
        assert kernel.field_at(getattr(Expected, name).offset).name == name


@needs_compiler
def test_values_arrive_as_they_were_packed():
    out = xp.empty(9, "d")
    launch(values(anything=out))
    expected = [-5, np.float32(0.1), 0.1, 321, 2**40, 2**32 - 1, 1, 1, 1.5]
    np.testing.assert_array_equal(out.get(), expected)


@pytest.mark.skipif(bool(unusable_reason()), reason=unusable_reason() or "NVRTC is there")
@pytest.mark.parametrize(
    "arguments", [MIXED, [("only", "int32")], [("a", "float32"), ("b", "float64")]], ids=["mixed", "one", "two"]
)
def test_nvrtc_accepts_the_asserted_layout(arguments):
    kernel = Kernel(
        "", "gl_x", arguments, defines={"STORAGE": ["float16"]}, body="GL_KERNEL(gl_x, 32) {}", listed=False
    )
    compile_for(kernel.specialise({"STORAGE": "float16"}).text, "gl_x", 75)


@pytest.mark.parametrize("wrong", ["int", "float16", "const STORAGE", "STORAGE**", "float32[n]", ""])
def test_unknown_argument_types_are_refused(wrong):
    with pytest.raises(KernelError, match="gl_x: argument 'a' has no known type"):
        Kernel("", "gl_x", [("a", wrong)], listed=False)


# ---- specialisations -------------------------------------------------------------------------------------------------


def test_specialisations_are_the_product_that_exists():
    kernel = Kernel(
        "residual.cu",
        "gl_x",
        [("x", "STORAGE*")],
        defines={"STORAGE": ["float16", "float32"], "WIDE": [True, False]},
        where=lambda d: d["STORAGE"] == "float16" or not d["WIDE"],
        listed=False,
    )
    assert [s.defines for s in kernel.specialisations()] == [
        {"STORAGE": "float16", "WIDE": True},
        {"STORAGE": "float16", "WIDE": False},
        {"STORAGE": "float32", "WIDE": False},
    ]
    first = kernel.specialise({"WIDE": True, "STORAGE": "float16"})
    assert first is kernel.specialise({"STORAGE": "float16", "WIDE": True})
    assert "typedef float16 STORAGE;" in first.text and "#define WIDE 1\n" in first.text
    for wrong in ({"STORAGE": "float32", "WIDE": True}, {"STORAGE": "int8", "WIDE": True}, {"STORAGE": "float16"}, {}):
        with pytest.raises(KernelError):
            kernel.specialise(wrong)
    with pytest.raises(KernelError, match="capitals"):
        Kernel("", "gl_x", [], defines={"wide": [1]}, listed=False)


def test_clusters_need_a_recent_gpu():
    kernel = Kernel("", "gl_x", [("x", "pointer")], defines={"CLUSTER": [1, 8]}, listed=False, body="")
    assert [s.minimum_arch for s in kernel.specialisations()] == [75, 90]


def test_every_listed_kernel_is_unique_and_has_a_text():
    names = [repr(s) for s in kernel_list()]
    assert len(set(names)) == len(names) > 0
    for specialisation in kernel_list():
        assert f"GL_KERNEL({specialisation.name}," in specialisation.text


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_headers_are_inlined_once(tmp_path, monkeypatch):
    (tmp_path / "common.cuh").write_text('#pragma once\n#include "ptx.cuh"\nint common;\n')
    (tmp_path / "ptx.cuh").write_text("#pragma once\nint ptx;\n")
    (tmp_path / "own.cuh").write_text('#include "ptx.cuh"\nint own;\n')
    (tmp_path / "op.cu").write_text('// op\n#include "common.cuh"\n#include "own.cuh"  // why\nint op;\n')
    monkeypatch.setattr(source, "kernel_folder", lambda: tmp_path)
    source.read_source.cache_clear()
    try:
        headers, text = source.read_source("op.cu")
    finally:
        source.read_source.cache_clear()
    assert "#include" not in headers + text
    assert [line for line in (headers + text).splitlines() if line.startswith("int")] == [
        "int ptx;",
        "int common;",
        "int own;",
        "int op;",
    ]
    lines = text.splitlines()
    assert lines[lines.index("int op;") - 1] == '#line 4 "op.cu"'


def test_a_missing_kernel_file_is_named():
    with pytest.raises(KernelError, match=r"no_such\.cu cannot be read"):
        _ = Kernel("no_such.cu", "gl_x", [("x", "pointer")], listed=False).specialise().text


def test_the_wheels_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "__file__", str(tmp_path / "gpulayers" / "launch" / "source.py"))
    find = source.kernel_folder.__wrapped__
    with pytest.raises(KernelError, match="the CUDA sources are missing"):
        find()
    for folder in ("kernels", "gpulayers/_kernels"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "common.cuh").write_text("")
        assert find() == (tmp_path / folder).resolve()


def test_no_inline_assembly_outside_its_header():
    for path in source.kernel_folder().glob("*.cu*"):
        text = path.read_text()
        assert path.name == "ptx.cuh" or "asm" not in text.replace("__nv_", ""), path.name
        assert path.name == "ptx.cuh" or "__shared__" not in text, path.name


# ---- checks before a launch ------------------------------------------------------------------------------------------


def test_arrays_are_checked():
    f = np.array([1, 2, 3], "f")
    with pytest.raises(DTypeError, match="gl_echo: 'x' has the wrong dtype. Expected float32; got float64"):
        launch(values(x=xp.zeros(2, "d")))
    with pytest.raises(DTypeError, match="Expected float16; got float32"):
        launch(values(), defines={"STORAGE": "float16"})
    with pytest.raises(KernelError, match="'x' is not C-contiguous. Got shape \\(3, 2\\)"):
        launch(values(x=xp.zeros((2, 3), "f").T))
    with pytest.raises(DeviceError, match="kernels cannot use this array"):
        launch(values(x=f))
    with pytest.raises(DeviceError, match="'table' lives elsewhere than the other arrays. Expected emulated; got cpu"):
        launch(values(x=xp.asarray(f), table=[f]))
    with pytest.raises(DeviceError, match="not an array"):
        launch(values(x=[1.0]))
    with pytest.raises(KernelError, match="'table' is too long"):
        launch(values(table=[None] * 3))
    with pytest.raises(KernelError, match="no array among the arguments"):
        launch(values(table=[], anything=None))


def test_scalars_are_checked():
    with pytest.raises(DTypeError, match="'small' is not a host number. Expected int32; got float"):
        launch(values(small=1.0))
    with pytest.raises(DTypeError, match="'ratio' is not a host number. Expected float32; got StrictArray"):
        launch(values(ratio=xp.ones((), "f")))
    for name, wrong in (("small", 2**31), ("last", -1), ("long_one", 2**63)):
        with pytest.raises(DTypeError, match="a scalar does not fit its C type"):
            launch(values(**{name: wrong}))


def test_argument_names_are_checked():
    given = values()
    del given["last"]
    with pytest.raises(KernelError, match="wrong arguments"):
        launch(given)
    with pytest.raises(KernelError, match="argument 'last' is missing"):
        launch({**given, "lost": 1})


@pytest.mark.parametrize(
    ("grid", "block", "complaint"),
    [((1,), (32, 33), "1 to 1024"), ((1,), (0,), "1 to 1024"), ((1, 65536), (1,), "grid"), ((-1,), (1,), "grid")],
)
def test_geometry_is_checked(grid, block, complaint):
    with pytest.raises(KernelError, match=complaint):
        launch(values(), grid=grid, block=block)


def test_an_empty_grid_returns_before_the_launch():
    launcher.record.clear()
    launch(values(), grid=(0,))
    launch(values(), grid=(4, 0))
    assert not launcher.record


def test_who_has_kernels():
    assert has_kernels(xp.ones(2)) and not has_kernels(np.ones(2))
    assert launcher_of(xp.ones(2)) is launcher
    assert device_properties(xp.ones(2)) is H200_LIKE
    assert H200_LIKE.has_clusters


def test_vector_width():
    x, y = xp.zeros(64, "f"), xp.zeros(64, "e")
    assert vector_width([y]) == 8
    assert vector_width([x, y]) == 4
    assert vector_width([x, y], 12, 64) == 4
    assert vector_width([x], 6) == 1
    assert vector_width([x[1:]]) == 1
    assert vector_width([x[4:]]) == 4


def test_the_workspace_is_cached_and_its_counters_are_zero():
    x = xp.ones(2)
    counters, scratch = workspace(x, counters=3, scratch=1000)
    assert counters.dtype == "u4" and scratch.dtype == "u1"
    assert counters.size >= 3 and scratch.size >= 1000 and not counters.get().any()
    again = workspace(x, counters=2, scratch=10)
    assert again[0].data.ptr == counters.data.ptr and again[1].data.ptr == scratch.data.ptr
    assert scratch.data.ptr % 256 == 0


# ---- CuPy's launcher, without a GPU ----------------------------------------------------------------------------------


class FakeCupy:
    """As much of CuPy as the launcher touches, with notes of what it was asked."""

    def __init__(self, error=None):
        self.error, self.calls, self.compiled, self.attributes = error, [], [], []
        properties = {
            "name": b"Fake GPU", "major": 9, "minor": 0, "multiProcessorCount": 3, "sharedMemPerBlockOptin": 232448,
            "sharedMemPerMultiprocessor": 233472, "regsPerMultiprocessor": 65536, "maxThreadsPerMultiProcessor": 2048,
            "maxThreadsPerBlock": 1024, "l2CacheSize": 1 << 20, "cooperativeLaunch": 1,
        }  # fmt: skip
        self.cuda = types.SimpleNamespace(
            runtime=types.SimpleNamespace(
                getDevice=lambda: 0,
                getDeviceProperties=lambda device: properties,
                memGetInfo=lambda: self.contexts.append(threading.get_ident()),
            ),
            driver=types.SimpleNamespace(
                CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
                CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT=9,
                funcSetAttribute=lambda *a: self.attributes.append(a),
                occupancyMaxActiveBlocksPerMultiprocessor=lambda *a: 4,
                launchKernel=lambda *a: self.launched("plain", *a),
                launchCooperativeKernel=lambda *a: self.launched("cooperative", *a, 0),
            ),
            get_current_stream=lambda: types.SimpleNamespace(ptr=77),
        )
        self.zeros, self.empty, self.contexts = np.zeros, np.empty, []
        self.ndarray = types.SimpleNamespace

    def launched(self, how, function, *rest):
        """Note a launch: how, the function, grid, block and shared bytes, the stream, the bytes at the one argument."""
        *sizes, stream, parameters, extra = rest
        assert extra == 0
        (argument,) = (ctypes.c_void_p * 1).from_address(parameters)
        self.calls.append((how, function, tuple(sizes), stream, ctypes.string_at(argument, echo_kernel().packer.size)))

    def RawKernel(self, text, name, options):  # noqa: N802
        fake = self

        class Raw:
            shared_size_bytes = 1024

            @property
            def kernel(self):
                if fake.error:
                    raise fake.error
                fake.compiled.append((name, options, text))
                return types.SimpleNamespace(ptr=1234)

        return Raw()


class FakeArray(types.SimpleNamespace):
    """As much of a CuPy array as a launch looks at."""

    def __init__(self, address=4096, device=0, dtype="float32", contiguous=True):
        super().__init__(
            data=types.SimpleNamespace(ptr=address, device_id=device),
            dtype=np.dtype(dtype),
            flags=types.SimpleNamespace(c_contiguous=contiguous),
            shape=(2, 3),
            strides=(4, 8),
        )


@pytest.fixture
def fake_cupy(monkeypatch):
    """Return a fake CuPy whose arrays, `FakeArray`, a launcher of its own serves."""
    fake = FakeCupy()
    monkeypatch.setattr(_cupy, "cupy", lambda: fake)
    register_array_type(FakeArray, fake, "fake")
    register_launcher("fake", CupyLauncher())
    return fake


def given(**changes):
    return values(**{"table": [FakeArray(512)], "anything": FakeArray(1024), **changes})


def test_cupy_gets_one_struct_by_value(fake_cupy):
    kernel = echo_kernel()
    for shared, cooperative in ((0, False), (40000, False), (100000, True), (90000, False)):
        kernel.launch(
            given(x=FakeArray(4096)), grid=(2,), block=(32,), defines={"STORAGE": "float32"}, shared=shared,
            cooperative=cooperative,
        )  # fmt: skip
    assert len(fake_cupy.compiled) == 1 and fake_cupy.compiled[0][:2] == ("gl_echo", ("-std=c++17",))
    # Once each: the preference with the first dynamic memory, the opt-in only beyond the 48 KB that need none.
    assert fake_cupy.attributes == [(1234, 9, 100), (1234, 8, 100000)]
    assert [call[0] for call in fake_cupy.calls] == ["plain", "plain", "cooperative", "plain"]
    _, function, sizes, stream, packed = fake_cupy.calls[2]
    assert (function, sizes, stream) == (1234, (2, 1, 1, 32, 1, 1, 100000), 77)
    flat = (-5, 4096, np.float32(0.1), 0.1, 1, 2, 3, 512, 0, 2**40, 1024, 2**32 - 1)
    assert packed == kernel.packer.pack(*flat)
    found = launcher_of(FakeArray())
    assert found.resident_blocks(kernel.specialise({"STORAGE": "float32"}), 256, 0) == 4
    assert found.properties(None).compute_capability == 90


def test_a_failing_compile_names_kernel_gpu_and_remedy(fake_cupy):
    fake_cupy.error = RuntimeError("CuPy failed to load libnvrtc.so.13")
    with pytest.raises(KernelError) as caught:
        launch(given())
    text = str(caught.value)
    for part in ("gl_echo[STORAGE=float32]", "Fake GPU (sm_90)", "libnvrtc.so.13", "gpulayers[cuda12]"):
        assert part in text
    assert not fake_cupy.calls


def test_cupy_arrays_of_another_gpu_are_refused(fake_cupy):
    for changes in ({"x": FakeArray(device=1)}, {"table": [FakeArray(), FakeArray(device=1)]}):
        with pytest.raises(DeviceError, match="Expected gpu:0; got gpu:1"):
            launch(given(**changes))
    assert not fake_cupy.calls


# ---- prepared launches -----------------------------------------------------------------------------------------------

FIXED = {"small": -5, "exact": 0.1, "flags": [1, 2, 3], "long_one": 2**40, "last": 7, "x": None}


def prepare(array, fixed, dtype="float32", **keywords):
    geometry = {"grid": (1,), "block": (1,), "defines": {"STORAGE": dtype}, **keywords}
    return echo_kernel().prepare(place_of(array), fixed, **geometry)


@needs_compiler
def test_a_prepared_launch_is_the_checked_one():
    """Same fields, some settled before: the same struct, for every set of arrays that it is called with."""
    prepared = prepare(xp.empty(1), FIXED)
    for number in (1.5, -2.0, 3.25):
        out, again = xp.empty(9, "d"), xp.empty(9, "d")
        changing = {"ratio": number, "table": [xp.asarray(np.array([number], "f"))]}
        prepared({**changing, "anything": out})
        launch({**FIXED, **changing, "anything": again})
        np.testing.assert_array_equal(out.get(), again.get())
        assert out.get()[1] == out.get()[8] == number and out.get()[5] == 7


def test_what_does_not_fit_a_prepared_launch_is_refused(fake_cupy):
    prepared = prepare(FakeArray(), {key: value for key, value in FIXED.items() if key != "x"})
    changing = {"x": FakeArray(), "ratio": 0.5, "table": [FakeArray()], "anything": FakeArray(dtype="int8")}
    for changes, error, complaint in [
        ({"x": FakeArray(dtype="float16")}, DTypeError, "'x' has the wrong dtype. Expected float32; got float16"),
        ({"x": FakeArray(dtype=">f4")}, DTypeError, "'x' has the wrong dtype"),
        ({"x": FakeArray(contiguous=False)}, KernelError, "'x' is not C-contiguous"),
        ({"x": FakeArray(device=1)}, DeviceError, "another GPU"),
        ({"x": xp.ones(2, "f")}, DeviceError, "'x' lives elsewhere than the other arrays. Expected fake; got emulated"),
        ({"table": [np.ones(2, "f")]}, DeviceError, "Expected fake; got cpu"),
        ({"table": [FakeArray()] * 3}, KernelError, "too long"),
        ({"ratio": "0.5"}, DTypeError, "'ratio' is not a host number"),
        ({"small": 1}, KernelError, "wrong arguments"),
    ]:
        with pytest.raises(error, match=complaint):
            prepared({**changing, **changes})
    with pytest.raises(KernelError, match="argument 'ratio' is missing"):
        prepared({"x": None, "table": [], "anything": None, "other": 1})
    assert not fake_cupy.calls
    prepared(changing)
    assert len(fake_cupy.calls) == 1


def test_every_array_of_a_field_is_checked(fake_cupy):
    # As long as the struct of gl_echo, which the fake reads.
    kernel = Kernel("", "gl_many", [("table", "const float32*[11]")], body="GL_KERNEL(gl_many, 1) {}", listed=False)
    for wrong, error, complaint in [
        (FakeArray(dtype="float16"), DTypeError, "'table' has the wrong dtype. Expected float32; got float16"),
        (FakeArray(contiguous=False), KernelError, "'table' is not C-contiguous"),
        (FakeArray(device=1), DeviceError, "another GPU"),
        (xp.ones(2, "f"), DeviceError, "Expected fake; got emulated"),
    ]:
        for position in (1, 7):
            arrays = [FakeArray()] * 8
            arrays[position] = wrong
            with pytest.raises(error, match=complaint):
                kernel.launch({"table": arrays}, grid=(1,), block=(1,))
    assert not fake_cupy.calls
    for arrays in (
        [FakeArray(16 * i) for i in range(1, 8)],
        [FakeArray(16), None, *map(FakeArray, range(48, 128, 16))],
    ):
        kernel.launch({"table": arrays}, grid=(1,), block=(1,))
        addresses = [0 if array is None else array.data.ptr for array in arrays]
        assert fake_cupy.calls[-1][4] == kernel.packer.pack(*addresses, *[0] * (11 - len(addresses)))


def test_what_is_settled_is_checked_once(fake_cupy):
    with pytest.raises(DTypeError, match="'small' is not a host number"):
        prepare(FakeArray(), {**FIXED, "small": 0.5})
    with pytest.raises(KernelError, match="'x' is fixed, but addresses change"):
        prepare(FakeArray(), {**FIXED, "x": FakeArray()})
    with pytest.raises(KernelError, match="1 to 1024"):
        prepare(FakeArray(), FIXED, block=(2000,))
    prepare(FakeArray(), FIXED, grid=(0,))({})
    assert not fake_cupy.calls


def test_a_prepared_launch_keeps_no_array(fake_cupy):
    array = FakeArray()
    prepared = prepare(array, FIXED)
    prepared({"ratio": 1.0, "table": [array], "anything": array})
    known = weakref.ref(array)
    del array
    assert known() is None
    assert fake_cupy.calls


def test_threads_share_a_prepared_launch(fake_cupy):
    """Each launch sees its own values, and every thread has a context before its first one."""
    prepared, together = prepare(FakeArray(), FIXED), threading.Barrier(4)
    inside, seen = fake_cupy.cuda.driver.launchKernel, []

    def slow(*arguments):  # all threads are in the driver at a time: each with memory of its own
        together.wait(10)
        inside(*arguments)
        seen.append(threading.get_ident() in fake_cupy.contexts)

    fake_cupy.cuda.driver.launchKernel = slow

    def work(number):
        for step in range(3):
            prepared({"ratio": 0.5, "table": [], "anything": FakeArray(100 * number + step)})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    place = echo_kernel().offsets[[name for name, _ in MIXED].index("anything")]
    addresses = sorted(int.from_bytes(call[4][place : place + 8], "little") for call in fake_cupy.calls)
    assert addresses == [100 * number + step for number in range(1, 5) for step in range(3)]
    assert all(seen) and len(fake_cupy.contexts) == 4


def test_a_thread_has_a_context_before_it_asks_what_a_multiprocessor_holds(fake_cupy):
    """Memory from the pool needs no context, so the question may be the first thing that a thread asks the driver."""
    specialisation, seen = echo_kernel().specialise({"STORAGE": "float32"}), []
    driver = fake_cupy.cuda.driver
    for name in ("occupancyMaxActiveBlocksPerMultiprocessor", "funcSetAttribute"):
        setattr(driver, name, lambda *a: seen.append(threading.get_ident() in fake_cupy.contexts) or 4)
    thread = threading.Thread(target=lambda: specialisation.resident_blocks(FakeArray(), 32, 100000))
    thread.start()
    thread.join()
    assert seen == [True, True, True]


def test_shared_memory_that_one_thread_asks_for_is_not_taken_back_by_another(fake_cupy):
    """The limit is one number of the function: it only grows, whoever comes last."""
    inside, together = fake_cupy.cuda.driver.funcSetAttribute, threading.Barrier(2)

    def slow(*arguments):
        with contextlib.suppress(threading.BrokenBarrierError):  # both at a time, or one alone after a moment
            together.wait(0.2)
        if arguments[2] == 100000:
            time.sleep(0.1)
        inside(*arguments)

    fake_cupy.cuda.driver.funcSetAttribute = slow
    specialisation = echo_kernel().specialise({"STORAGE": "float32"})
    specialisation.resident_blocks(FakeArray(), 32)  # compiled once
    threads = [
        threading.Thread(target=specialisation.resident_blocks, args=(FakeArray(), 32, shared))
        for shared in (100000, 120000)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake_cupy.attributes[-1][2] == 120000


def test_launches_of_one_shape_are_prepared_once(fake_cupy, monkeypatch):
    kernel, made = echo_kernel(), []
    own = launcher_of(FakeArray())
    monkeypatch.setattr(own, "prepare", lambda *a, before=own.prepare: made.append(a) or before(*a))
    for grid in (1, 1, 2, 1, 2):
        kernel.launch(given(), grid=(grid,), block=(1,), defines={"STORAGE": np.dtype("float32")})
    assert [geometry.grid[0] for _, geometry in made] == [1, 2]


def test_cupys_workspace_is_one_per_stream(monkeypatch):
    fake = FakeCupy()
    monkeypatch.setattr(_cupy, "cupy", lambda: fake)
    cupy_launcher = CupyLauncher()
    first = cupy_launcher.workspace(None, 10, 10)
    assert cupy_launcher.workspace(None, 5, 100)[0] is first[0]
    grown = cupy_launcher.workspace(None, 5, 2**21)
    assert grown[1].size >= 2**21 and cupy_launcher.workspace(None, 1, 1)[1] is grown[1]
    fake.cuda.get_current_stream = lambda: types.SimpleNamespace(ptr=78)
    assert cupy_launcher.workspace(None, 5, 5)[0] is not grown[0]


def test_a_stream_whose_workspace_is_cached_stays_alive(monkeypatch):
    """The driver gives the address of a destroyed stream to the next, and what the first has begun may still run."""

    class Stream:
        ptr = 77

    fake, streams = FakeCupy(), [Stream()]
    monkeypatch.setattr(_cupy, "cupy", lambda: fake)
    fake.cuda.get_current_stream = lambda: streams[-1]
    cupy_launcher, seen = CupyLauncher(), weakref.ref(streams[-1])
    cupy_launcher.workspace(None, 1, 1)
    streams[:] = [types.SimpleNamespace(ptr=0)]
    gc.collect()
    assert seen() is not None


def test_cupys_workspace_is_one_per_thread(monkeypatch):
    """Threads share the default stream: what one keeps between two launches, another must not overwrite."""
    fake, found = FakeCupy(), []
    monkeypatch.setattr(_cupy, "cupy", lambda: fake)
    cupy_launcher = CupyLauncher()
    first = cupy_launcher.workspace(None, 1, 1)
    thread = threading.Thread(
        target=lambda: found.extend([*cupy_launcher.workspace(None, 1, 1), cupy_launcher.queue()])
    )
    thread.start()
    thread.join()
    assert found[0] is not first[0] and found[1] is not first[1] and found[2] != cupy_launcher.queue()
    assert cupy_launcher.workspace(None, 1, 1)[1] is first[1]


def test_cupys_workspaces_of_a_stream_are_forgotten_in_every_thread(monkeypatch):
    fake, streams = FakeCupy(), threading.local()
    monkeypatch.setattr(_cupy, "cupy", lambda: fake)
    fake.cuda.get_current_stream = lambda: types.SimpleNamespace(ptr=streams.ptr)
    cupy_launcher, ready, forgotten, kept = CupyLauncher(), threading.Event(), threading.Event(), []

    def found(number):
        streams.ptr = number
        return cupy_launcher.workspace(None, 1, 1)[1]

    def work():
        before = [found(7), found(8)]
        ready.set()
        forgotten.wait()
        kept.extend(one is other for one, other in zip(before, [found(7), found(8)], strict=True))

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    before = found(7)
    cupy_launcher.forget_stream(7)
    forgotten.set()
    thread.join()
    assert kept == [False, True] and found(7) is not before


@pytest.mark.skipif(not _cupy.installed(), reason="needs CuPy")
def test_the_installed_cupy_has_what_the_launcher_uses():
    cupy = _cupy.cupy()
    driver = cupy.cuda.driver
    assert driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == 8
    assert driver.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT == 9
    names = ("funcSetAttribute", "occupancyMaxActiveBlocksPerMultiprocessor", "launchKernel", "launchCooperativeKernel")
    for name in names:
        assert callable(getattr(driver, name))
    for name in ("kernel", "shared_size_bytes"):
        assert hasattr(cupy.RawKernel, name)
    assert hasattr(cupy.cuda.function.Function, "ptr") and hasattr(cupy.ndarray, "_c_contiguous")
    assert callable(cupy.cuda.runtime.memGetInfo)
    assert callable(cupy.cuda.get_current_stream) and callable(cupy.cuda.runtime.getDeviceProperties)


# ---- one-line kernels ------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("start", [0, 1])
def test_elementwise(dtype, start):
    halves = Elementwise(
        "gl_test_halves", ["x", "y"], ["low", "high"], "low = x - s * y; high = x + s * y;", ["s"], listed=False
    )
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 1003)).astype(dtype)
    low, high = halves(xp.asarray(x)[start:], xp.asarray(y)[start:], s=0.5)
    wide = np.float64 if dtype == "float64" else np.float32
    x, y = x[start:].astype(wide), y[start:].astype(wide)
    np.testing.assert_array_equal(low.get(), (x - wide(0.5) * y).astype(dtype))
    np.testing.assert_array_equal(high.get(), (x + wide(0.5) * y).astype(dtype))


def test_elementwise_checks_its_input():
    double = Elementwise("gl_test_double", ["x"], ["out"], "out = x + x;", dtypes=["float32"], listed=False)
    assert double(xp.empty((0, 3), "f")).shape == (0, 3)
    with pytest.raises(DTypeError):
        double(xp.zeros(3, "d"))
    with pytest.raises(KernelError, match="wrong arguments"):
        double(xp.zeros(3, "f"), s=1.0)
    add = Elementwise("gl_test_add", ["x", "y"], ["out"], "out = x + y;", listed=False)
    with pytest.raises(ShapeError):
        add(xp.zeros(3, "f"), xp.zeros(4, "f"))


@pytest.mark.skipif(bool(unusable_reason()), reason=unusable_reason() or "NVRTC is there")
def test_elementwise_compiles_for_a_gpu():
    kernel = Elementwise("gl_test_add", ["x", "y"], ["out"], "out = x + a * y;", ["a"], listed=False).kernel
    for specialisation in kernel.specialisations():
        found = compile_for(specialisation.text, specialisation.name, 80)
        assert found.stack == found.spill_stores == 0
