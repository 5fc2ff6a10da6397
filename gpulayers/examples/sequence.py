"""Train residual LSTM cells on English text, character by character: ``python -m gpulayers.examples.sequence``.

The text is Python's own manual, which the standard library carries for ``help()`` (`pydoc_data.topics`). Each cell of
the stack adds its input to its output, so that a gradient reaches the lowest one undiminished. The last twentieth of
the text is held out; its bits per character are printed before and after training, and the network writes a line.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import gpulayers as gl
from gpulayers.examples.command_line import choose_device, positive
from gpulayers.examples.progress import Progress

__all__ = ["Alphabet", "CharacterModel", "bits_per_character", "main", "text", "train", "write"]


def text() -> str:
    """Return the manual's topics, several hundred thousand characters of English."""
    from pydoc_data import topics

    return "\n".join(topics.topics[name] for name in sorted(topics.topics))


class Alphabet:
    """The characters of a text, and each one's number; rare ones share the number 0.

    >>> alphabet = Alphabet("abab", rare=2)
    >>> alphabet.numbers("ba?").tolist(), alphabet.characters([2, 1])
    ([2, 1, 0], 'ba')
    """

    def __init__(self, text: str, rare: int = 20) -> None:
        counts: dict[str, int] = {}
        for character in text:
            counts[character] = counts.get(character, 0) + 1
        self.known = ["?", *sorted(c for c, count in counts.items() if count >= rare and c != "?")]
        self._number = {character: number for number, character in enumerate(self.known)}

    def __len__(self) -> int:
        return len(self.known)

    def numbers(self, text: str) -> np.ndarray:
        """Return the number of each character, int32."""
        return np.array([self._number.get(character, 0) for character in text], np.int32)

    def characters(self, numbers: Any) -> str:
        """Return the text of some numbers."""
        return "".join(self.known[int(number)] for number in numbers)


class CharacterModel(gl.keras.layers.Layer):  # type: ignore[misc]
    """Embedding, a stack of residual LSTM cells, and a projection to logits.

    Called with numbers (N, T) and the states of the last call (None: zeros); returns logits (N, T, V) and the states.
    """

    def __init__(self, characters: int, units: int, depth: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        layers = gl.keras.layers
        self.characters, self.units = characters, units
        cells = [gl.nn.RNNCellResidualWrapper(layers.LSTMCell(units)) for _ in range(depth)]
        self.rnn = layers.RNN(cells, return_sequences=True, return_state=True)
        self.project = layers.Dense(characters)

    def build(self, input_shape: Any) -> None:
        """Make the embedding, one row of `units` numbers for each character."""
        self.embedding = self.add_weight("embedding", (self.characters, self.units), initializer="glorot_uniform")
        self.built = True

    def call(self, inputs: Any, states: Any = None) -> tuple[Any, Any]:
        """Return logits and states."""
        outputs, *states = self.rnn(gl.ops.take(self.embedding, inputs, 0), initial_state=states)
        return self.project(outputs), states


def _loss(logits: Any, targets: Any) -> Any:
    """Return the mean cross entropy in nats."""
    return gl.ops.mean(gl.ops.sparse_softmax_cross_entropy_with_logits(targets, logits))


def bits_per_character(model: CharacterModel, numbers: np.ndarray, rows: int = 16, window: int = 100) -> float:
    """Return how many bits the model needs for a character of `numbers`, read in `rows` pieces side by side."""
    length = (len(numbers) - 1) // rows
    x = numbers[: rows * length].reshape(rows, length)
    y = numbers[1 : rows * length + 1].reshape(rows, length)
    states, total = None, 0.0
    for start in range(0, length, window):
        logits, states = model(gl.asarray(x[:, start : start + window]), states)
        targets = y[:, start : start + window]
        total += float(_loss(logits, gl.asarray(targets))) * targets.size
    return total / (rows * length) / math.log(2)


def train(
    model: CharacterModel, numbers: np.ndarray, steps: int, batch: int, window: int, rate: float, progress: Any = None
) -> float:
    """Train on windows of a text that is read in `batch` places at once; states go on from window to window.

    Returns the bits per character of the last steps. `progress` has a method ``step(text)``.
    """
    optimizer = gl.keras.optimizers.Adam(
        gl.keras.optimizers.schedules.CosineDecay(rate, decay_steps=steps), clipnorm=1.0
    )
    length = len(numbers) // batch
    places = numbers[: batch * length].reshape(batch, length)
    states, smooth = None, 0.0
    for step in range(steps):
        start = (step * window) % (length - window - 1)
        if start < window:
            states = None  # a new pass over the text
        x, y = places[:, start : start + window], places[:, start + 1 : start + window + 1]
        with gl.GradientTape() as tape:
            logits, states = model(gl.asarray(x.copy()), states)
            loss = _loss(logits, gl.asarray(y.copy()))
        states = gl.nest.map_structure(lambda state: state.value, states)  # the gradient stops at the window's edge
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        bits = float(loss.value) / math.log(2)
        smooth = bits if not step else 0.9 * smooth + 0.1 * bits
        if progress is not None:
            progress.step(f"{smooth:.3f} bits per character")
    return smooth


def write(model: CharacterModel, alphabet: Alphabet, start: str, length: int, seed: int = 1) -> str:
    """Return `start` and `length` characters that the model draws behind it."""
    generator = np.random.default_rng(seed)
    logits, states = model(gl.asarray(alphabet.numbers(start)[None]), None)
    written = []
    for _ in range(length):
        scaled = gl.asnumpy(logits)[0, -1].astype(np.float64) / 0.6
        chances = np.exp(scaled - scaled.max())
        written.append(int(generator.choice(len(chances), p=chances / chances.sum())))
        logits, states = model(gl.asarray(np.array([[written[-1]]], np.int32)), states)
    return start + alphabet.characters(written)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gpulayers.examples.sequence",
        description="Train a stack of residual LSTM cells on the Python manual, character by character.",
    )
    parser.add_argument("--steps", type=positive(int), default=500, help="training steps (default 500)")
    parser.add_argument("--units", type=positive(int), default=128, help="width of the cells (default 128)")
    parser.add_argument("--depth", type=positive(int), default=2, help="cells in the stack (default 2)")
    parser.add_argument("--batch-size", type=positive(int), default=32, help="places read at once (default 32)")
    parser.add_argument("--window", type=positive(int), default=64, help="characters in a step (default 64)")
    parser.add_argument("--learning-rate", type=positive(float), default=4e-3, help="at the start (default 0.004)")
    parser.add_argument("--seed", type=int, default=1, help="of initial values and the written line (default 1)")
    parser.add_argument("--device", default=None, help="cpu, gpu or gpu:N (default: a GPU if one is usable)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; returns 0."""
    options = _arguments(argv)
    choose_device("python -m gpulayers.examples.sequence", options.device)
    gl.ops.set_seed(options.seed)
    whole = text()
    cut = len(whole) - len(whole) // 20
    if options.batch_size * (options.window + 2) > cut:
        raise SystemExit("python -m gpulayers.examples.sequence: error: --batch-size times --window exceeds the text")
    alphabet = Alphabet(whole[:cut])
    known, held_out = alphabet.numbers(whole[:cut]), alphabet.numbers(whole[cut:])
    model = CharacterModel(len(alphabet), options.units, options.depth)
    before = bits_per_character(model, held_out)
    print(
        f"device {gl.current_device()}, {len(whole):,} characters of {len(alphabet)} kinds, {len(held_out):,} held out"
    )
    print(f"{model.count_params():,} parameters; held out before: {before:.3f} bits per character", flush=True)
    began = time.perf_counter()
    with Progress(options.steps, "training") as progress:
        train(model, known, options.steps, options.batch_size, options.window, options.learning_rate, progress)
    after = bits_per_character(model, held_out)
    print(f"held out after: {after:.3f} bits per character, {time.perf_counter() - began:.0f} s")
    print("a line of its own: " + write(model, alphabet, "The ", 76, options.seed).replace("\n", " "))
    return 0


if __name__ == "__main__":
    sys.exit(main())
