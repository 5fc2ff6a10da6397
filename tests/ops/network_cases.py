"""Cases for convolution, pooling, losses and the rest of what networks are made of; the truth is written in loops."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import scipy.special

from gpulayers import ops
from gpulayers.ops.norms import global_norm
from tests.ops.cases import CASES, apart, case, normal

__all__ = ["CASES", "naive_convolution", "naive_pool"]


def _padding(size: int, kernel: int, stride: int, dilation: int, padding: str) -> tuple[int, int]:
    reach = (kernel - 1) * dilation + 1
    if padding == "valid":
        return 0, max((size - reach) // stride + 1, 0)
    count = -(-size // stride)
    total = max((count - 1) * stride + reach - size, 0)
    return (reach - 1 if padding == "causal" else total // 2), count


def _places(sizes: Any, kernel: Any, strides: Any, dilation: Any, padding: str) -> tuple[Any, Any]:
    rows = [_padding(*row, padding) for row in zip(sizes, kernel, strides, dilation, strict=True)]
    return [row[0] for row in rows], [row[1] for row in rows]


def naive_convolution(
    x: Any, k: Any, strides: Any, padding: str, dilation: Any, last: bool = True, groups: int = 1
) -> Any:
    x = x if last else np.moveaxis(x, 1, -1)
    sizes, window = x.shape[1:-1], k.shape[:-2]
    before, counts = _places(sizes, window, strides, dilation, padding)
    y = np.zeros((x.shape[0], *counts, k.shape[-1]))
    per_in, per_out = k.shape[-2], k.shape[-1] // groups
    for place in product(*map(range, counts)):
        for tap in product(*map(range, window)):
            at = [p * s - b + t * d for p, s, b, t, d in zip(place, strides, before, tap, dilation, strict=True)]
            if all(0 <= a < n for a, n in zip(at, sizes, strict=True)):
                for group in range(groups):
                    ins, outs = (
                        slice(group * per_in, (group + 1) * per_in),
                        slice(group * per_out, (group + 1) * per_out),
                    )
                    y[(slice(None), *place, outs)] += x[(slice(None), *at, ins)] @ k[tap][:, outs]
    return y if last else np.moveaxis(y, -1, 1)


def naive_pool(x: Any, window: Any, strides: Any, padding: str, last: bool, function: Any) -> Any:
    x = x if last else np.moveaxis(x, 1, -1)
    sizes = x.shape[1:-1]
    before, counts = _places(sizes, window, strides, [1] * len(sizes), padding)
    y = np.zeros((x.shape[0], *counts, x.shape[-1]))
    for place in product(*map(range, counts)):
        inner = tuple(
            slice(max(p * s - b, 0), min(p * s - b + w, n))
            for p, s, b, w, n in zip(place, strides, before, window, sizes, strict=True)
        )
        y[(slice(None), *place)] = function(x[(slice(None), *inner)], axis=tuple(range(1, x.ndim - 1)))
    return y if last else np.moveaxis(y, -1, 1)


def _convolution_case(
    shape: Any, kernel: Any, strides: int, padding: str, dilation: int, last: bool, groups: int = 1
) -> None:
    rank = len(kernel) - 2
    data_format = "channels_last" if last else "channels_first"
    case(
        "convolution",
        lambda x, k: ops.convolution(x, k, strides, padding, data_format, dilation, groups),
        lambda x, k: naive_convolution(x, k, (strides,) * rank, padding, (dilation,) * rank, last, groups),
        normal(*shape),
        normal(*kernel),
        note=f"[{strides},{padding},{dilation},{data_format},{groups}]",
    )


for _padding_name in ("valid", "same"):
    for _last in (True, False):
        for _strides, _dilation in ((1, 1), (2, 1), (1, 2), (3, 2)):
            _convolution_case(
                (2, 6, 5, 2) if _last else (2, 2, 6, 5), (3, 2, 2, 3), _strides, _padding_name, _dilation, _last
            )
        _convolution_case((2, 7, 3) if _last else (2, 3, 7), (4, 3, 2), 2, _padding_name, 1, _last)
_convolution_case((2, 7, 3), (3, 3, 2), 1, "causal", 2, True)
_convolution_case((1, 4, 3, 3, 2), (2, 2, 2, 2, 3), 1, "same", 1, True)
_convolution_case((2, 4, 4, 4), (3, 3, 2, 6), 1, "same", 1, True, 2)
_convolution_case((2, 4, 5, 4), (2, 2, 1, 8), 2, "valid", 1, True, 4)
_convolution_case((0, 4, 4, 2), (3, 3, 2, 3), 1, "same", 1, True)
_convolution_case((2, 2, 2, 2), (3, 3, 2, 3), 1, "valid", 1, True)
_convolution_case((2, 3, 3, 0), (3, 3, 0, 3), 1, "same", 1, True)

for _name, _function in (("max_pool", np.max), ("avg_pool", np.mean)):
    for _padding_name in ("valid", "same"):
        for _shape, _last, _size, _strides in (
            ((2, 6, 5, 3), True, (2, 2), (2, 2)),
            ((2, 3, 6, 5), False, (3, 2), (1, 3)),
            ((2, 7, 2), True, (3,), (2,)),
            ((1, 4, 3, 4, 2), True, (2, 2, 2), (2, 1, 2)),
            ((0, 4, 4, 2), True, (2, 2), (2, 2)),
        ):
            case(
                _name,
                lambda x, f=getattr(ops, _name), s=_size, t=_strides, p=_padding_name, l=_last: f(
                    x, s, t, p, "channels_last" if l else "channels_first"
                ),
                lambda x, f=_function, s=_size, t=_strides, p=_padding_name, l=_last: naive_pool(x, s, t, p, l, f),
                apart(*_shape) * 0.1,
                note=f"[{_padding_name}]",
            )

_labels = scipy.special.softmax(normal(3, 4), -1)
case(
    "sigmoid_cross_entropy",
    ops.sigmoid_cross_entropy_with_logits,
    lambda z, x: -z * np.log(scipy.special.expit(x)) - (1 - z) * np.log(scipy.special.expit(-x)),
    _labels,
    apart(3, 4) * 0.3,
)
case(
    "softmax_cross_entropy",
    ops.softmax_cross_entropy_with_logits,
    lambda z, x: -(z * scipy.special.log_softmax(x, -1)).sum(-1),
    _labels * 1.3,
    normal(3, 4),
)
case(
    "sparse_softmax_cross_entropy",
    ops.sparse_softmax_cross_entropy_with_logits,
    lambda z, x: -np.take_along_axis(scipy.special.log_softmax(x, -1), z[..., None], -1)[..., 0],
    np.array([[0, 3], [1, 1]]),
    normal(2, 2, 4),
)
case(
    "l2_normalize",
    lambda x: ops.l2_normalize(x, -1),
    lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True),
    normal(2, 3),
)
for _axes, _keep in (([0, 2], False), ([1], True), ([-1], False)):
    case(
        "moments",
        lambda x, a=_axes, k=_keep: ops.moments(x, a, k),
        lambda x, a=_axes, k=_keep: [np.mean(x, tuple(a), keepdims=k), np.var(x, tuple(a), keepdims=k)],
        normal(2, 3, 4),
        second=False,
        note=f"[{_axes},{_keep}]",
    )
case("bias_add", ops.bias_add, np.add, normal(2, 3), normal(3))
case(
    "bias_add",
    lambda x, b: ops.bias_add(x, b, "NCHW"),
    lambda x, b: x + b[:, None, None],
    normal(2, 3, 2, 2),
    normal(3),
    note="-first",
)
case(
    "global_norm",
    lambda *x: global_norm(x),
    lambda *x: np.sqrt(sum((one**2).sum() for one in x)),
    normal(2, 3),
    normal(),
    normal(4),
)
