"""A plain repeated call may take a shorter path; it must be the same call."""

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.ops.batch_norm import arrays as batch_norm_arrays

FAMILIES = [gl.layers.BatchNormalization, gl.keras.layers.BatchNormalization]
RNG = np.random.default_rng(7)


def reference(layer, x):
    """The function under the layer, with the variables the layer has now."""
    return batch_norm_arrays.forward(x, layer.gamma.value, layer.beta.value, axis=(1,), epsilon=layer.epsilon).y


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [True, False])
def test_the_same_numbers_and_the_same_state(family, training):
    calls = [RNG.normal(size=(6, 3)).astype("float32") for _ in range(4)]
    short, long = family(momentum=0.8), family(momentum=0.8)
    for x in calls:
        y = short(x, training=training)
        with gl.GradientTape() as tape:  # where something records, no shortcut is taken
            tape.watch(x)
            expected = long(x, training=training)
        np.testing.assert_array_equal(y, expected.value)
    for mine, theirs in zip(short.variables, long.variables, strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy())
    assert any(short._shortcuts.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_changed_between_calls_counts(family):
    x = RNG.normal(size=(5, 3)).astype("float32")
    layer = family()
    for _ in range(2):
        layer(x, training=True)
    layer.gamma.assign([2.0, 3.0, 4.0])
    layer.epsilon = 0.5
    np.testing.assert_array_equal(layer(x, training=True), reference(layer, x))
    layer.set_weights([np.full(3, v, "float32") for v in (1, 2, 3, 4)])
    expected = (x - 3) / np.sqrt(4 + 0.5) + 2
    np.testing.assert_allclose(layer(x, training=False), expected, rtol=1e-5, atol=1e-6)
    before = layer.moving_mean.numpy()
    with gl.no_state_updates():
        layer(x, training=True)
    np.testing.assert_array_equal(layer.moving_mean.numpy(), before)


def changed(name, value):
    def change(layer):
        setattr(layer, name, value)

    return change


CHANGES = {
    "activation": changed("activation", gl.ops.activations.relu),
    "adjustment": changed("adjustment", lambda shape: (np.full(3, 2.0, "float32"), np.ones(3, "float32"))),
    "beta": changed("beta", None),
    "gamma": changed("gamma", None),
    "virtual_batch_size": changed("virtual_batch_size", 2),
    "call": lambda layer: setattr(layer, "call", lambda inputs, training=None, mask=None: inputs * 0),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_set_after_the_first_call_counts(family, change):
    x = RNG.normal(size=(6, 3)).astype("float32")
    short, long = (family(beta_initializer="ones", gamma_initializer=gl.constant_initializer(2.0)) for _ in range(2))
    short(x, training=True)
    with gl.no_state_updates():
        long(x)
    long.set_weights([v.numpy() for v in short.variables])
    before = short(x, training=True)
    with gl.GradientTape() as tape:  # where something records, no shortcut is taken
        tape.watch(x)
        long(x, training=True)
        change(short)
        change(long)
        expected = long(x, training=True)
    y = short(x, training=True)
    np.testing.assert_array_equal(y, getattr(expected, "value", expected))
    np.testing.assert_array_equal(short.moving_variance.numpy(), long.moving_variance.numpy())
    for _ in range(2):  # also once the changed call has been made
        last = short(x, training=True)
    np.testing.assert_array_equal(last, y)
    assert np.abs(y - before).max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_an_activity_regularizer_set_after_the_first_call_adds_its_losses(family):
    x = RNG.normal(size=(5, 3)).astype("float32")
    layer = family()
    for _ in range(2):
        layer(x)
    layer.activity_regularizer = gl.keras.regularizers.L2(0.1)
    for _ in range(2):
        y = layer(x)
        np.testing.assert_allclose(layer.losses, [0.1 * (y**2).sum() / 5], rtol=1e-5)


def test_trainable_false_freezes_the_statistics_of_a_layer_that_trained():
    x = RNG.normal(size=(5, 3)).astype("float32")
    legacy, modern = (family() for family in FAMILIES)
    for layer in (legacy, modern):
        for _ in range(2):
            layer(x, training=True)
        layer.trainable = False
    before = legacy.moving_mean.numpy(), modern.moving_mean.numpy()
    np.testing.assert_array_equal(legacy(x, training=True), reference(legacy, x))
    np.testing.assert_array_equal(modern(x, training=True), modern(x, training=False))
    np.testing.assert_array_equal(legacy.moving_mean.numpy(), before[0])
    np.testing.assert_array_equal(modern.moving_mean.numpy(), before[1])


def test_a_subclass_with_its_own_call_is_called():
    class Doubled(gl.keras.layers.BatchNormalization):
        def call(self, inputs, training=None, mask=None):
            return 2 * super().call(inputs, training=training, mask=mask)

    x = RNG.normal(size=(5, 3)).astype("float32")
    layer, plain = Doubled(), gl.keras.layers.BatchNormalization()
    for _ in range(3):
        np.testing.assert_allclose(layer(x, training=True), 2 * plain(x, training=True), rtol=1e-6)


def test_a_masked_input_is_not_taken_for_a_plain_one():
    x = np.array([[[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]], "float32")
    layer = gl.keras.layers.BatchNormalization(momentum=0.0)
    for _ in range(2):
        layer(x, training=True)
    np.testing.assert_allclose(layer.moving_mean.numpy(), [4 / 3, 2.0], rtol=1e-6)
    layer(gl.keras.layers.Masking()(x), training=True)
    np.testing.assert_allclose(layer.moving_mean.numpy(), [2.0, 3.0], rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_inputs_are_still_refused(family):
    layer = family()
    x = np.ones((4, 3), "float32")
    for _ in range(2):
        layer(x)
    with pytest.raises(ValueError, match="axis"):
        layer(np.ones((4, 2), "float32"))
    with pytest.raises(ValueError, match="ndim"):
        layer(np.ones((4, 3, 3), "float32"))
    with pytest.raises(TypeError):
        gl.layers.BatchNormalization(dtype="float32")(np.ones((4, 3), "int32"))


def test_the_number_of_plans_is_bounded():
    layer = gl.layers.BatchNormalization()
    for rows in range(1, 200):
        layer(np.ones((rows, 3), "float32"))
    assert len(layer._shortcuts) <= 64
    np.testing.assert_allclose(layer(np.ones((300, 3), "float32")), np.ones((300, 3)) / np.sqrt(1.001), rtol=1e-6)
