"""The strict array double refuses what CuPy refuses, and offers what CuPy offers."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from gpulayers import _cupy
from gpulayers.device import array_module, asarray, asnumpy, current_device, device, kind_of
from gpulayers.errors import DeviceError
from tests.kernels.cupy_names import NAMES
from tests.kernels.strict_array import StrictArray, xp


def given(*shape):
    return xp.asarray(np.arange(1, 1 + int(np.prod(shape)), dtype="f").reshape(shape))


def test_no_implicit_conversion_to_numpy():
    x = given(3)
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(x)
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.array([x, x])
    np.testing.assert_array_equal(x.get(), [1, 2, 3])
    x.get()[0] = 9
    assert float(x[0]) == 1


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, h: x + h,
        lambda x, h: h + x,
        lambda x, h: x.__iadd__(h),
        lambda x, h: np.add(x, h),
        lambda x, h: xp.add(x, h),
        lambda x, h: xp.concatenate([x, h]),
        lambda x, h: x.__setitem__(0, h[0:1]),
        lambda x, h: x.dot(h),
        lambda x, h: h.__iadd__(x),
        lambda x, h: x == h,
    ],
)
def test_host_arrays_do_not_mix(mix):
    with pytest.raises(TypeError):
        mix(given(3), np.ones(3, "f"))


def test_results_stay_arrays():
    x = given(2, 3)
    for result in (
        x.sum(),
        x[0, 0],
        xp.mean(x),
        x.max(axis=None),
        x[0] @ x[1],
        np.float32(2) * x,
        2 * x,
        -x,
        x.T,
        abs(x),
    ):
        assert isinstance(result, StrictArray)
    assert x.sum().shape == () and float(x.sum()) == 21 and int(x[0, 1]) == 2 and bool(x[0, 0] == 1)
    assert isinstance(np.exp(x), StrictArray) and isinstance(np.mean(x, axis=0), StrictArray)
    assert [float(v) for v in x[0]] == [1, 2, 3] and len(x) == 2


def test_memory_is_shared_as_cupy_shares_it():
    x = given(2, 6)
    x[:, 1:3] = 0
    view = x.reshape(3, 4)
    view += 1
    assert x.data.ptr == view.data.ptr and float(x[0, 1]) == 1
    assert x[:, 1].data.ptr == x.data.ptr + 4
    assert not x.T.flags.c_contiguous and xp.ascontiguousarray(x.T).flags.c_contiguous
    assert xp.add(x, 1, out=x) is x
    assert asarray(x, device="emulated") is x


def test_in_place_on_a_scalar_keeps_the_memory():
    total = xp.zeros((), "f")
    same = total
    total += given(3).sum()
    total *= 2
    assert same is total and float(same) == 12


def test_fresh_memory_is_poison():
    assert np.isnan(xp.empty((2, 2), "f").get()).all() and np.isnan(xp.empty_like(given(3)).get()).all()
    assert np.isnan(StrictArray(3, "e").get().astype("f")).all()
    assert not xp.zeros(3).get().any()


def test_it_is_a_device():
    with device("emulated"):
        assert str(current_device()) == "emulated"
        x = asarray([1.0, 2.0])
    assert isinstance(x, StrictArray) and kind_of(x) == "emulated" and array_module(x) is xp
    assert type(asnumpy(x)) is np.ndarray
    with pytest.raises(DeviceError, match="asnumpy"):
        asarray(x, device="cpu")


def test_what_cupy_lacks_is_missing():
    for name in ("vectorize", "bitwise_count", "matvec"):
        assert hasattr(xp, name) == (name in NAMES)
    assert not hasattr(xp, "spacing")


def test_keywords_that_cupy_lacks_are_refused():
    x = given(3)
    for call in (
        lambda: xp.add(x, x, where=x > 1),
        lambda: xp.sum(x, initial=1),
        lambda: x.sum(where=x > 1),
        lambda: xp.var(x, correction=1),
    ):
        with pytest.raises(TypeError, match="has no keyword"):
            call()
    assert float(xp.sum(x, axis=0, keepdims=False)) == 6
    assert float(xp.add(x, x, dtype="d").sum()) == 12


@pytest.mark.skipif(not _cupy.installed(), reason="needs CuPy")
def test_every_keyword_offered_is_in_the_installed_cupy():
    cupy = _cupy.cupy()
    for name, known in NAMES.items():
        function = getattr(cupy, name)
        if known is None or isinstance(function, cupy.ufunc):
            continue
        assert known <= set(inspect.signature(function).parameters) | {""}, name


@pytest.mark.skipif(not _cupy.installed(), reason="needs CuPy")
def test_every_name_offered_is_in_the_installed_cupy():
    cupy = _cupy.cupy()
    offered = {name for name in vars(xp) if not name.startswith("_")}
    assert {name for name in offered if not hasattr(cupy, name)} == set()
    methods = {name for name in vars(StrictArray) if not name.startswith("_") and name != "device"}
    assert {name for name in methods if not hasattr(cupy.ndarray, name)} == set()
