"""Train a small network on the bundled handwritten digits; the main job, ``python -m gpulayers``, runs this.

The network has two branches. One reads an image as a picture: convolutions with batch normalisation. The other reads it
as a sequence, one row of pixels a step: a residual LSTM cell, whose input is added to its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

import gpulayers as gl
from gpulayers.data import load_digits

__all__ = ["History", "accuracy", "build_model", "digits", "fit"]


class History(NamedTuple):
    """What an epoch ended with: mean training loss, accuracy on the training digits and on those held out."""

    loss: list[float]
    train_accuracy: list[float]
    test_accuracy: list[float]


def digits() -> tuple[Any, Any, Any, Any]:
    """Return training images, labels, held-out images, labels: float32 (N, 8, 8, 1) in 0..1, and int32 (N,)."""
    data = load_digits()

    def prepared(images: Any, labels: Any) -> tuple[Any, Any]:
        return gl.asarray(images[..., None].astype("float32") / 16.0), gl.asarray(labels.astype("int32"))

    return (*prepared(data.train_images, data.train_labels), *prepared(data.test_images, data.test_labels))


def build_model() -> Any:
    """Return the two-branch network, from images (N, 8, 8, 1) to ten logits."""
    layers = gl.keras.layers
    image = gl.keras.Input((8, 8, 1), name="image")
    picture = image
    for index, filters in enumerate((32, 64)):
        picture = layers.Conv2D(filters, 3, padding="same", strides=index + 1, use_bias=False)(picture)
        picture = layers.BatchNormalization(momentum=0.9, activation="relu")(picture)
    picture = layers.Flatten()(picture)
    rows = layers.Dense(32)(layers.Reshape((8, 8))(image))
    rows = layers.RNN(gl.nn.RNNCellResidualWrapper(layers.LSTMCell(32)))(rows)
    joined = layers.Dropout(0.3)(layers.Concatenate()([picture, rows]))
    return gl.keras.Model(image, layers.Dense(10)(joined), name="digits")


def accuracy(model: Any, images: Any, labels: Any) -> float:
    """Return the share of images whose largest logit is at their label."""
    return float(np.mean(model.predict(images).argmax(axis=1) == gl.asnumpy(labels)))


def fit(
    model: Any, data: tuple[Any, Any, Any, Any], epochs: int, batch_size: int, learning_rate: float, seed: int
) -> Iterator[tuple[int, int, float, History]]:
    """Train `model`, yielding (epoch, batch, loss, history so far) after every step."""
    images, labels, test_images, test_labels = data
    generator = np.random.default_rng(seed)
    steps = -(-len(images) // batch_size)
    rate = gl.keras.optimizers.schedules.CosineDecay(learning_rate, decay_steps=steps * epochs)
    optimizer = gl.keras.optimizers.Adam(rate)
    loss_of = gl.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    history = History([], [], [])
    for epoch in range(epochs):
        order = generator.permutation(len(images))
        losses = []
        for batch in range(steps):
            rows = gl.asarray(order[batch * batch_size : (batch + 1) * batch_size])
            with gl.GradientTape() as tape:
                logits = model(images[rows], training=True)
                loss = loss_of(labels[rows], logits)
            variables = model.trainable_variables
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
            losses.append(float(loss))
            if batch == steps - 1:
                history.loss.append(float(np.mean(losses)))
                history.train_accuracy.append(accuracy(model, images, labels))
                history.test_accuracy.append(accuracy(model, test_images, test_labels))
            yield epoch, batch, losses[-1], history
