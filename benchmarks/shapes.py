"""Which shapes are measured, and why: networks that exist, cells, tiny arrays, and sizes that kernels dislike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = [
    "Case", "axis_of", "cases", "cell_cases", "context_cases", "elements", "norm_cases", "resnet50", "small",
    "suite_cases",
]  # fmt: skip

# Height and width, channels, how often a batch normalisation of ResNet-50 sees them. Source: oneDNN's list of the
# network's 53 layers.
RESNET50 = [
    (112, 64, 1), (56, 256, 4), (56, 64, 6), (28, 512, 5), (28, 128, 8), (14, 1024, 7), (14, 256, 12), (7, 2048, 4),
    (7, 512, 6),
]  # fmt: skip
TRAINING = ("forward", "backward", "step")  # a step: the forward pass, and then the backward pass
PASSES = ("inference", *TRAINING)


class Case(NamedTuple):
    """One row: an operation, a pass, and the array it works on, `shape` being in the order of `layout`.

    Layouts: NC, NTC, NHWC, NDHWC (channels last), NCHW (channels first), TND for sequences (the shape is then time,
    batch, depth, units), ND for cells (batch, depth, units). `count` weighs the row in a total; `groups` is the number
    of sub-batches of a ghost batch normalisation. In the regime "unaligned" arrays begin one element into their memory.
    """

    op: str
    mode: str
    layout: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    regime: str = ""
    count: int = 1
    groups: int = 1

    @property
    def name(self) -> str:
        """A short name, unique within a report."""
        size = "x".join(map(str, self.shape))
        groups = f"/{self.groups}" if self.groups > 1 else ""
        return f"{self.op} {self.mode} {self.layout} {size}{groups} {self.dtype}"


def axis_of(case: Case) -> tuple[int, ...]:
    """Return the axes that batch normalisation keeps."""
    if case.op == "batch_norm_axes":
        return (1, 3)
    return (1,) if case.layout == "NCHW" else (len(case.shape) - 1,)


def elements(case: Case) -> int:
    """Return the number of elements of the main array."""
    return math.prod(case.shape)


def resnet50(batch: int, layout: str = "NHWC", op: str = "batch_norm", dtype: str = "float32") -> list[Case]:
    """Return the ResNet-50 list with its counts, in every pass."""
    found = []
    for side, channels, count in RESNET50:
        shape = (batch, side, side, channels) if layout == "NHWC" else (batch, channels, side, side)
        found += [Case(op, mode, layout, shape, dtype, f"resnet50 N={batch}", count) for mode in PASSES]
    return found


def norm_cases(dtype: str = "float32") -> list[Case]:
    """Return batch normalisation outside ResNet-50: other networks, renorm, ghost, several axes, and bad sizes."""
    plain = [
        ("NHWC", (4, 256, 256, 64), "unet"), ("NDHWC", (1, 64, 64, 64, 32), "unet"), ("NC", (1024, 512), "tabular"),
        ("NC", (8192, 1024), "tabular"), ("NTC", (16, 1000, 512), "speech"), ("NC", (8, 16), "tiny"),
        ("NHWC", (32, 57, 57, 1), "adversarial"), ("NHWC", (32, 56, 56, 3), "adversarial"),
        ("NHWC", (31, 55, 57, 7), "adversarial"), ("NC", (2, 8192), "adversarial"),
        ("NHWC", (31, 56, 56, 64), "unaligned"),
    ]  # fmt: skip
    found = [
        Case("batch_norm", mode, layout, shape, dtype, regime) for layout, shape, regime in plain for mode in PASSES
    ]
    for shape in ((32, 56, 56, 64), (32, 14, 14, 1024)):
        found += [Case("batch_norm_relu_residual", mode, "NHWC", shape, dtype, "fused") for mode in PASSES]
    for mode in TRAINING:
        for shape in ((32, 56, 56, 64), (32, 14, 14, 1024)):
            found.append(Case("batch_norm_renorm", mode, "NHWC", shape, dtype, "renorm"))
        for shape in ((1024, 512), (8192, 1024), (65536, 256)):  # virtual batches of 128
            found.append(Case("batch_norm_ghost", mode, "NC", shape, dtype, "ghost", groups=shape[0] // 128))
        found.append(Case("batch_norm_axes", mode, "NHWC", (64, 32, 32, 32), dtype, "several axes"))
    return found


def cell_cases(dtype: str = "float32") -> list[Case]:
    """Return residual additions, residual LSTM and GRU cells, and whole sequences."""
    found = [Case("residual_add", "forward", "ND", shape, dtype, "residual") for shape in ((64, 256), (4096, 2048))]
    for op in ("lstm_cell", "gru_cell"):
        for batch, units in ((32, 256), (256, 256), (64, 1024), (32, 2048), (256, 2048)):
            found.append(Case(op, "forward", "ND", (batch, units, units), dtype, "cell"))
    for op in ("lstm_sequence", "gru_sequence"):
        for mode in ("forward", "backward"):
            for time, batch, units in ((100, 32, 256), (50, 64, 512)):
                found.append(Case(op, mode, "TND", (time, batch, units, units), dtype, "sequence"))
    return found


def context_cases(dtype: str = "float32") -> list[Case]:
    """Return what stands around the layers of this library: dense, convolution, a training step, optimizers."""
    return [
        Case("dense", "forward", "NC", (256, 1024, 1024), dtype, "context"),
        Case("conv2d", "forward", "NHWC", (8, 28, 28, 64, 64), dtype, "context"),
        Case("digits", "step", "NC", (128, 64), dtype, "training"),
        Case("momentum", "step", "parameters", (25_557_032,), dtype, "optimizer"),
        Case("adam", "step", "parameters", (25_557_032,), dtype, "optimizer"),
    ]


def cases(batches: Sequence[int], dtype: str = "float32") -> list[Case]:
    """Return every row of the report, with the ResNet-50 list for each of `batches`."""
    lists = [resnet50(batch, layout, dtype=dtype) for batch in batches for layout in ("NHWC", "NCHW")]
    return [*itertools.chain(*lists), *norm_cases(dtype), *cell_cases(dtype), *context_cases(dtype)]


def small(case: Case) -> Case:
    """Return the case with a shape of a few thousand elements, for runs that only show that a body works."""
    tiny = {
        "NCHW": (4, 6, 5, 5), "NHWC": (4, 5, 5, 6), "NDHWC": (2, 3, 4, 3, 5), "NC": (8, 12), "NTC": (3, 7, 12),
        "ND": (4, 6, 6), "TND": (5, 3, 4, 4), "parameters": (4099,),
    }  # fmt: skip
    shape = {"dense": (8, 12, 10), "conv2d": (2, 6, 6, 3, 4), "residual_add": (4, 6)}.get(case.op, tiny[case.layout])
    return case._replace(shape=(16, 64) if case.op == "digits" else shape, groups=2 if case.groups > 1 else 1)


def suite_cases(quick: bool) -> list[Case]:
    """Return the rows of the pytest suites: one of every operation, pass, layout and regime; tiny ones if `quick`."""
    found: dict[tuple[str, ...], Case] = {}
    for dtype in ("float32", "float16"):
        chosen = [*resnet50(8, dtype=dtype), *resnet50(8, "NCHW", dtype=dtype), *norm_cases(dtype)]
        chosen += [*cell_cases(dtype), *context_cases(dtype)] if dtype == "float32" else []
        for case in chosen:
            found.setdefault((case.op, case.mode, case.layout, case.dtype, case.regime), case)
    return [small(case) if quick else case for case in found.values()]
