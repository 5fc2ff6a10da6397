"""Initializers: distributions against their moments, seeds, dtypes, parts, names and errors."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from scipy import stats

from gpulayers import initializers, ops
from gpulayers.initializers import fans, get, legacy, modern
from gpulayers.variables import PartitionInfo

MODERN = [name for name in modern.__all__ if name != "Initializer"]
RANDOM = [name for name in MODERN if "seed" in getattr(modern, name)().get_config()]
LEGACY_RANDOM = [name for name in legacy.__all__ if "seed" in getattr(legacy, name)().get_config()]
SHAPE = (200, 300)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((), (1, 1)), ((7,), (7, 7)), ((3, 5), (3, 5)), ((3, 3, 4, 8), (36, 72)), ((2, 4, 8), (8, 16))],
)
def test_fans(shape, expected):
    assert fans(shape) == expected


def moments(initializer, shape=SHAPE):
    values = initializer(shape, "float64")
    return values.mean(), values.std(), np.abs(values).max()


@pytest.mark.parametrize(
    ("make", "mean", "stddev", "limit"),
    [
        (lambda: modern.RandomUniform(seed=1), 0.0, 0.1 / np.sqrt(12), 0.05),
        (lambda: legacy.random_uniform_initializer(seed=1), 0.5, 1 / np.sqrt(12), 1.0),
        (lambda: modern.RandomNormal(mean=2.0, seed=1), 2.0, 0.05, np.inf),
        (lambda: legacy.random_normal_initializer(seed=1), 0.0, 1.0, np.inf),
        (lambda: modern.TruncatedNormal(stddev=1.0, seed=1), 0.0, 0.87962566103423978, 2.0),
        (lambda: legacy.truncated_normal_initializer(seed=1), 0.0, 0.87962566103423978, 2.0),
        (lambda: modern.VarianceScaling(seed=1), 0.0, np.sqrt(1 / 200), 2 * np.sqrt(1 / 200) / 0.8796256),
        (lambda: modern.VarianceScaling(2.0, "fan_out", "untruncated_normal", 1), 0.0, np.sqrt(2 / 300), np.inf),
        (lambda: modern.VarianceScaling(1.0, "fan_avg", "uniform", 1), 0.0, np.sqrt(1 / 250), np.sqrt(3 / 250)),
        (lambda: legacy.variance_scaling_initializer(seed=1), 0.0, np.sqrt(1 / 200), 2 * np.sqrt(1 / 200) / 0.8796256),
        (lambda: modern.GlorotUniform(1), 0.0, np.sqrt(2 / 500), np.sqrt(6 / 500)),
        (lambda: modern.GlorotNormal(1), 0.0, np.sqrt(2 / 500), np.inf),
        (lambda: modern.HeUniform(1), 0.0, np.sqrt(2 / 200), np.sqrt(6 / 200)),
        (lambda: modern.HeNormal(1), 0.0, np.sqrt(2 / 200), np.inf),
        (lambda: modern.LecunUniform(1), 0.0, np.sqrt(1 / 200), np.sqrt(3 / 200)),
        (lambda: modern.LecunNormal(1), 0.0, np.sqrt(1 / 200), np.inf),
    ],
)
def test_moments_of_60000_draws(make, mean, stddev, limit):
    found_mean, found_stddev, largest = moments(make())
    assert abs(found_mean - mean) < 5 * stddev / np.sqrt(60000)  # five standard errors
    assert abs(found_stddev / stddev - 1) < 0.015
    assert largest <= limit * (1 + 1e-12)


def test_truncated_normal_has_its_distribution():
    values = modern.TruncatedNormal(stddev=1.0, seed=3)((20000,), "float64")
    assert stats.kstest(values, stats.truncnorm(-2, 2).cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", LEGACY_RANDOM)
def test_both_families_share_the_maths(name):
    stem = "".join(part.capitalize() for part in name.removesuffix("_initializer").split("_"))
    old, new = getattr(legacy, name)(seed=5), getattr(modern, stem)(seed=5)
    for attribute in ("minval", "maxval", "stddev"):  # where the families' defaults differ
        if hasattr(new, attribute):
            setattr(new, attribute, 1.0 if getattr(old, attribute) is None else getattr(old, attribute))
    assert np.array_equal(old((4, 6)), new((4, 6)))


@pytest.mark.parametrize("name", RANDOM)
def test_a_modern_instance_repeats_itself_and_others_differ(name):
    made = getattr(modern, name)
    one = made()
    assert np.array_equal(one((4, 5)), one((4, 5)))
    assert not np.array_equal(one((4, 5)), made()((4, 5)))
    assert np.array_equal(made(seed=7)((4, 5)), made(seed=7)((4, 5)))
    assert np.array_equal(one((4, 5)), copy.deepcopy(one)((4, 5)))


@pytest.mark.parametrize("name", LEGACY_RANDOM)
def test_a_legacy_instance_goes_on(name):
    made = getattr(legacy, name)
    one, two = made(seed=7), made(seed=7)
    first = one((4, 5))
    assert not np.array_equal(first, one((4, 5)))
    assert np.array_equal(first, two((4, 5)))


def test_set_seed_settles_unseeded_instances():
    ops.set_seed(11)
    first = modern.GlorotUniform()((3, 4))
    ops.set_seed(11)
    assert np.array_equal(first, modern.GlorotUniform()((3, 4)))


def test_negative_seeds_are_seeds():
    assert not np.array_equal(modern.RandomNormal(seed=-1)((3,)), modern.RandomNormal(seed=1)((3,)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", [*MODERN, *legacy.__all__])
def test_floating_dtypes(name, dtype):
    family = modern if name in MODERN else legacy
    assert getattr(family, name)()((4, 4), dtype).dtype.name == dtype


def test_sixteen_bits_are_the_rounded_float32_values():
    one = modern.GlorotNormal(seed=3)
    assert np.array_equal(one((5, 5), "float16"), one((5, 5), "float32").astype(np.float16))


@pytest.mark.parametrize("name", ["Zeros", "Ones", "Constant", "RandomUniform"])
def test_integers(name):
    arguments = (0, 5) if name == "RandomUniform" else ()
    values = getattr(modern, name)(*arguments)((50,), "int32")
    assert values.dtype == np.int32 and values.min() >= 0 and values.max() <= 4


@pytest.mark.parametrize("name", sorted(set(MODERN) - {"Zeros", "Ones", "Constant", "RandomUniform"}))
def test_random_integers_are_refused(name):
    for kind in (ValueError, TypeError):
        with pytest.raises(kind, match="floating dtype"):
            getattr(modern, name)()((3, 3), "int32")


def test_booleans():
    assert modern.Ones()((2,), "bool").tolist() == [True, True]
    assert modern.Zeros()((2,), "bool").tolist() == [False, False]


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6), (3, 3, 4, 8), (2, 2, 1, 9)])
def test_orthogonal(shape):
    w = modern.Orthogonal(gain=2.0, seed=1)(shape, "float64").reshape(-1, shape[-1])
    product = w @ w.T if w.shape[0] < w.shape[1] else w.T @ w
    np.testing.assert_allclose(product, 4 * np.eye(len(product)), atol=1e-12)


def test_orthogonal_matrices_are_spread_over_both_signs():
    signs = [np.sign(modern.Orthogonal(seed=seed)((2, 2), "float64")[0, 0]) for seed in range(40)]
    assert 5 < sum(sign > 0 for sign in signs) < 35


@pytest.mark.parametrize("shape", [(), (3,)])
def test_orthogonal_and_identity_need_axes(shape):
    for initializer in (modern.Orthogonal(), modern.Identity(), legacy.orthogonal_initializer()):
        with pytest.raises(ValueError, match="2 axes"):
            initializer(shape)


def test_identity_needs_exactly_two_axes():
    with pytest.raises(ValueError, match="2 axes"):
        modern.Identity()((2, 2, 2))
    assert np.array_equal(legacy.identity_initializer(3.0)((2, 3)), 3 * np.eye(2, 3))


def test_v1_constant_fills():
    make = legacy.constant_initializer
    assert make(7)((2, 2)).tolist() == [[7, 7], [7, 7]]
    assert make([1, 2, 3, 4, 5, 6])((2, 3)).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert make([[1], [2]])((4,)).tolist() == [1, 2, 2, 2]
    with pytest.raises(ValueError, match="too many values"):
        make([1, 2, 3])((2,))
    with pytest.raises(TypeError, match="another shape"):
        make([1, 2], verify_shape=True)((2, 2))
    assert make([1, 2], verify_shape=True)((2,)).tolist() == [1, 2]
    with pytest.raises(TypeError, match="number, list or array"):
        make(object())


def test_v1_uniform_integers_need_an_upper_end():
    with pytest.raises(ValueError, match="maxval"):
        legacy.random_uniform_initializer()((3,), "int32")


def test_uniform_stays_below_its_open_end():
    values = modern.RandomUniform(1.0, 1.0000001, seed=1)((10000,), "float32")
    assert values.max() < np.float32(1.0000001)


@pytest.mark.parametrize("name", ["GlorotUniform", "RandomNormal", "Orthogonal", "Identity"])
def test_modern_parts_make_up_the_whole(name):
    initializer = getattr(modern, name)()
    whole = initializer((7, 2))
    parts = [
        initializer(shape, partition_info=PartitionInfo([7, 2], [offset, 0]))
        for shape, offset in [((3, 2), 0), ((2, 2), 3), ((2, 2), 5)]
    ]
    assert np.array_equal(np.concatenate(parts), whole)


def test_v1_parts_are_scaled_by_the_whole():
    initializer = legacy.glorot_uniform_initializer(seed=1)
    part = initializer((1, 5000), partition_info=PartitionInfo([10000, 5000], [3, 0]))
    assert np.abs(part).max() <= np.sqrt(6 / 15000)
    assert np.array_equal(
        legacy.identity_initializer()((1, 3), partition_info=PartitionInfo([3, 3], [2, 0])), [[0, 0, 1]]
    )


@pytest.mark.parametrize("name", [*MODERN, *legacy.__all__])
def test_configurations_round_trip(name):
    family = modern if name in MODERN else legacy
    made = getattr(family, name)
    initializer = made(seed=3) if "seed" in made().get_config() else made()
    data = initializers.serialize(initializer)
    assert data["class_name"] == name and ("dtype" in data["config"]) == (family is legacy)
    again = initializers.deserialize(data)
    assert type(again) is made and again.get_config() == initializer.get_config()
    assert np.array_equal(again((3, 3)), made.from_config(initializer.get_config())((3, 3)))


def test_v1_dtype_is_the_default_one():
    assert legacy.zeros_initializer("float64")((2,)).dtype == np.float64
    assert legacy.zeros_initializer("float64")((2,), "float32").dtype == np.float32
    assert modern.Zeros.from_config({"dtype": "float32"})((2,)).dtype == np.float32


@pytest.mark.parametrize(
    "arguments", [{"scale": 0}, {"scale": -1.0}, {"mode": "fan_up"}, {"distribution": "cauchy"}, {"seed": "one"}]
)
def test_variance_scaling_arguments(arguments):
    for made in (modern.VarianceScaling, legacy.variance_scaling_initializer):
        with pytest.raises(ValueError):
            made(**arguments)


def test_unknown_sizes_and_empty_shapes():
    with pytest.raises(ValueError, match="fully known"):
        modern.Zeros()((None, 2))
    assert modern.HeNormal()((0, 3)).shape == (0, 3)
    assert modern.TruncatedNormal()(()).shape == ()


def test_get():
    assert get(None) is None
    assert isinstance(get("glorot_uniform"), modern.GlorotUniform)
    assert isinstance(get("GlorotUniform"), modern.GlorotUniform)
    assert isinstance(get("zeros_initializer"), legacy.zeros_initializer)
    assert isinstance(get(modern.Ones), modern.Ones)
    assert get({"class_name": "RandomUniform", "config": {"minval": 0.0, "maxval": 2.0}}).maxval == 2.0
    own = lambda shape, dtype: np.ones(shape, dtype)
    assert get(own) is own


@pytest.mark.parametrize("wrong", ["unknown", 3, 2.5, np.ones(2), [1.0], {"config": {}}])
def test_get_refuses(wrong):
    with pytest.raises(ValueError):
        get(wrong)
