"""The first thing a newcomer runs: say which device there is, train on real digits, show that saving works."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpulayers as gl
from gpulayers.examples import digits
from gpulayers.examples.command_line import choose_device, positive
from gpulayers.examples.progress import Progress

__all__ = ["main"]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gpulayers",
        description="Train a small network on 1,797 handwritten digits, plot the curve, save and load the weights.",
    )
    parser.add_argument("--epochs", type=positive(int), default=8, help="passes over the digits (default 8)")
    parser.add_argument("--batch-size", type=positive(int), default=48, help="digits in a step (default 48)")
    parser.add_argument("--learning-rate", type=positive(float), default=3e-3, help="at the start (default 0.003)")
    parser.add_argument("--seed", type=int, default=1, help="of initial values and shuffling (default 1)")
    parser.add_argument("--device", default=None, help="cpu, gpu or gpu:N (default: a GPU if one is usable)")
    parser.add_argument("--output", type=Path, default=Path("gpulayers-run"), help="folder for the curve and weights")
    return parser.parse_args(argv)


def _say_device(wanted: str | None) -> None:
    choose_device("python -m gpulayers", wanted)
    device = gl.current_device()
    if wanted is not None:
        print(f"device: {device} (asked for)")
    elif device.kind == "gpu":
        print(f"device: {device} (a GPU answered)")
    else:
        print(f"device: {device}, through NumPy. {gl.gpu_unavailable_reason()}".rstrip())


def _plot(history: Any, path: Path) -> str:
    """Write the curves; return a line about it."""
    try:
        import matplotlib
    except ImportError:
        return "curve: not drawn, matplotlib is missing (pip install 'gpulayers[plot]')"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    epochs = range(1, len(history.loss) + 1)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.plot(epochs, history.loss)
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.plot(epochs, history.train_accuracy, label="training digits")
    right.plot(epochs, history.test_accuracy, label="held-out digits")
    right.set(xlabel="epoch", ylabel="accuracy")
    right.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"curve: {path}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return the exit status: 0 if the loaded weights give the same accuracy, else 1."""
    options = _arguments(argv)
    _say_device(options.device)

    options.output.mkdir(parents=True, exist_ok=True)
    gl.ops.random.set_seed(options.seed)
    data = digits.digits()
    model = digits.build_model()
    model.summary()
    steps = -(-len(data[0]) // options.batch_size)
    started = time.perf_counter()
    with Progress(steps * options.epochs, "training") as progress:
        fitting = digits.fit(model, data, options.epochs, options.batch_size, options.learning_rate, options.seed)
        for epoch, _, loss, history in fitting:
            held_out = f", held out {history.test_accuracy[-1]:.2%}" if history.test_accuracy else ""
            progress.step(f"epoch {epoch + 1}, loss {loss:.4f}{held_out}")
    print(f"trained {options.epochs} epochs in {time.perf_counter() - started:.1f} s")
    print(f"accuracy on the held-out digits: {history.test_accuracy[-1]:.2%}")
    print(_plot(history, options.output / "curve.png"))

    weights = options.output / "digits.npz"
    model.save_weights(weights)
    loaded = digits.build_model()
    loaded.load_weights(weights)
    again = digits.accuracy(loaded, *data[2:])
    print(f"weights: {weights}; loaded into a new model they give {again:.2%}")
    return 0 if again == history.test_accuracy[-1] else 1


if __name__ == "__main__":
    sys.exit(main())
