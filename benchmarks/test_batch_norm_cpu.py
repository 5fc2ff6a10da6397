"""Batch normalisation on NumPy beside torch's CPU build, in one process: the two of a group are to be compared.

Run with ``pytest benchmarks/test_batch_norm_cpu.py`` and compare medians within a group. Torch runs with two threads;
ours uses its own small pool. The array functions are timed, without a layer around them; torch's numbers are its
modules'.
"""

import numpy as np
import pytest

from gpulayers.ops.batch_norm import arrays as bn

torch = pytest.importorskip("torch")
pytest.importorskip("pytest_benchmark")

# name -> (shape as torch names it, whether channels are last in memory)
SHAPES = {
    "32x56x56x64": ((32, 64, 56, 56), True),
    "32x14x14x1024": ((32, 1024, 14, 14), True),
    "8192x256": ((8192, 256), False),
    "32x64x56x56": ((32, 64, 56, 56), False),
    "32x1024x14x14": ((32, 1024, 14, 14), False),
    "8x16": ((8, 16), False),
}


def tensors(name):
    """Return torch's input and cotangent; NumPy's share their memory."""
    shape, last = SHAPES[name]
    torch.set_num_threads(2)
    torch.manual_seed(0)
    made = [torch.randn(shape) for _ in range(2)]
    return [t.to(memory_format=torch.channels_last) if last else t for t in made]


def ours(name, work):
    x, dy = (t.permute(0, 2, 3, 1).numpy() if SHAPES[name][1] else t.numpy() for t in tensors(name))
    axis = (x.ndim - 1,) if SHAPES[name][1] else (1,)
    channels = x.shape[axis[0]]
    gamma, beta = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    moving = bn.MovingStatistics(beta.copy(), gamma.copy(), 0.01)

    def run():
        if work == "inference":
            return bn.inference(x, gamma, beta, moving.mean, moving.variance, axis=axis)
        result = bn.forward(x, gamma, beta, axis=axis, moving=moving)
        return bn.backward(dy, x, gamma, result.saved, axis=axis) if work == "forward+backward" else result

    return run


def theirs(name, work):
    x, dy = tensors(name)
    module = (torch.nn.BatchNorm2d if x.ndim == 4 else torch.nn.BatchNorm1d)(x.shape[1])
    module.train(work != "inference")
    x.requires_grad_(work == "forward+backward")

    def run():
        with torch.set_grad_enabled(work == "forward+backward"):
            y = module(x)
        if work == "forward+backward":
            y.backward(dy)
            x.grad = None
        return y

    return run


@pytest.mark.parametrize("library", [ours, theirs], ids=["gpulayers", "torch"])
@pytest.mark.parametrize("work", ["forward", "forward+backward", "inference"])
@pytest.mark.parametrize("name", SHAPES)
def test_batch_norm(benchmark, name, work, library):
    benchmark.group = f"batch norm {name} {work}"
    run = library(name, work)
    run()
    benchmark(run)
