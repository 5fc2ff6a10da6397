"""What every row must give, in float64, from the formulas: no blocks, no pivots, no fusion.

Batch normalisations take arrays of any module and compute with its own: a GPU says in a moment what takes the host
longer than all measurements.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.shapes import Case, axis_of

__all__ = ["EPSILON", "LIMITS", "truth"]

EPSILON = 1e-3
LIMITS = {"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0}


def _along(values: Any, x: np.ndarray, axis: tuple[int, ...]) -> Any:
    return values.reshape([n if a in axis else 1 for a, n in enumerate(x.shape)])


def _corrections(case: Case, d: dict[str, Any], mean: Any, variance: Any) -> tuple[Any, Any]:
    if case.op != "batch_norm_renorm":
        return np.ones_like(mean), np.zeros_like(mean)
    stddev, old = np.sqrt(variance + EPSILON), d["renorm_stddev"].astype(np.float64)
    r = np.clip(stddev / old, LIMITS["rmin"], LIMITS["rmax"])
    return r, np.clip((mean - d["renorm_mean"]) / old, -LIMITS["dmax"], LIMITS["dmax"])


def _norm_group(case: Case, d: dict[str, Any], rows: slice) -> dict[str, Any]:
    """Return the results of one sub-batch."""
    axis = axis_of(case)
    x = d["x"][rows].astype(np.float64)
    reduced = tuple(a for a in range(x.ndim) if a not in axis)
    gamma, beta = (_along(d[name].astype(np.float64), x, axis) for name in ("gamma", "beta"))
    if case.mode == "inference":
        mean, variance = (_along(d[f"moving_{n}"].astype(np.float64), x, axis) for n in ("mean", "variance"))
    else:
        mean = x.mean(axis=reduced, keepdims=True)
        variance = ((x - mean) ** 2).mean(axis=reduced, keepdims=True)
    flat_mean, flat_variance = mean.ravel(), variance.ravel()
    r, shift = (_along(v, x, axis) for v in _corrections(case, d, flat_mean, flat_variance))
    stddev = np.sqrt(variance + EPSILON)
    n = (x - mean) / stddev
    y = (n * r + shift) * gamma + beta
    if case.op.endswith("residual"):
        y = np.maximum(y + d["residual"][rows].astype(np.float64), 0)
    if case.mode == "inference":
        return {"y": y}
    forward = {"y": y, "mean": flat_mean, "variance": flat_variance}
    if case.mode == "forward":
        return forward
    dy = d["dy"][rows].astype(np.float64)
    if case.op.endswith("residual"):
        dy = dy * (y > 0)
    g = dy * gamma * r
    dx = (g - g.mean(axis=reduced, keepdims=True) - n * (g * n).mean(axis=reduced, keepdims=True)) / stddev
    dgamma, dbeta = ((dy * (n * r + shift)).sum(axis=reduced).ravel(), dy.sum(axis=reduced).ravel())
    found = {"dx": dx, "dgamma": dgamma, "dbeta": dbeta}
    if case.op.endswith("residual"):
        found["dresidual"] = dy
    return {**forward, **found} if case.mode == "step" else found


def _norm(case: Case, d: dict[str, Any]) -> dict[str, Any]:
    if case.groups == 1:
        return _norm_group(case, d, slice(None))
    parts = [_norm_group(case, d, slice(g, None, case.groups)) for g in range(case.groups)]
    found: dict[str, Any] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name in ("y", "dx"):  # row i of the batch is in group i mod groups
            found[name] = np.stack(values, axis=1).reshape(d["x"].shape)
        else:
            found[name] = sum(values) / (1 if name.startswith("d") else case.groups)
    return found


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _lstm(x: Any, h: Any, c: Any, w: Any, r: Any, b: Any) -> tuple[Any, Any, Any]:
    i, f, g, o = np.split(x @ w + h @ r + b, 4, axis=1)
    c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
    h = _sigmoid(o) * np.tanh(c)
    return h, c, (i, f, g, o)


def _gru(x: Any, h: Any, w: Any, r: Any, b: Any) -> Any:
    xz, xr, xn = np.split(x @ w + b[0], 3, axis=1)
    hz, hr, hn = np.split(h @ r + b[1], 3, axis=1)
    z, reset = _sigmoid(xz + hz), _sigmoid(xr + hr)
    return z * h + (1 - z) * np.tanh(xn + reset * hn)


def _recurrent(case: Case, d: dict[str, Any]) -> dict[str, Any]:
    """Return the outputs and the last state, or the gradients of a sequence."""
    d = {name: value.astype(np.float64) for name, value in d.items()}
    if case.mode == "backward":
        return _recurrent_backward(case, d)
    steps = d["x"] if case.op.endswith("sequence") else d["x"][None]
    h, c, outputs = d["h"], d.get("c"), []
    for x in steps:
        if case.op.startswith("lstm"):
            h, c, _ = _lstm(x, h, c, d["kernel"], d["recurrent_kernel"], d["bias"])
        else:
            h = _gru(x, h, d["kernel"], d["recurrent_kernel"], d["bias"])
        outputs.append(h + x)
    output = np.stack(outputs) if case.op.endswith("sequence") else outputs[0]
    return {"output": output, "h": h, "c": c} if case.op.startswith("lstm") else {"output": output, "h": h}


def _recurrent_backward(case: Case, d: dict[str, Any]) -> dict[str, Any]:
    """Return dx and dkernel by back-propagation through time, written out."""
    w, r, b = d["kernel"], d["recurrent_kernel"], d["bias"]
    hs, cs = [d["h"]], [d.get("c")]
    for x in d["x"]:
        if case.op.startswith("lstm"):
            h, c, _ = _lstm(x, hs[-1], cs[-1], w, r, b)
            cs.append(c)
        else:
            h = _gru(x, hs[-1], w, r, b)
        hs.append(h)
    dh, dc = np.zeros_like(d["h"]), np.zeros_like(d["h"])
    dx, dkernel, drecurrent = np.zeros_like(d["x"]), np.zeros_like(w), np.zeros_like(r)
    for t in range(len(d["x"]) - 1, -1, -1):
        x, h, dh = d["x"][t], hs[t], dh + d["dy"][t]
        if case.op.startswith("lstm"):
            _, _, (i, f, g, o) = _lstm(x, h, cs[t], w, r, b)
            i, f, g, o, tanh_c = _sigmoid(i), _sigmoid(f), np.tanh(g), _sigmoid(o), np.tanh(cs[t + 1])
            dc = dc + dh * o * (1 - tanh_c**2)
            ds = [dc * g * i * (1 - i), dc * cs[t] * f * (1 - f), dc * i * (1 - g * g), dh * tanh_c * o * (1 - o)]
            d_input = d_state = np.concatenate(ds, axis=1)
            dc, carried = dc * f, 0.0
        else:
            xz, xr, xn = np.split(x @ w + b[0], 3, axis=1)
            hz, hr, hn = np.split(h @ r + b[1], 3, axis=1)
            z, reset = _sigmoid(xz + hz), _sigmoid(xr + hr)
            n = np.tanh(xn + reset * hn)
            dn = dh * (1 - z) * (1 - n * n)
            dz, dr = dh * (h - n) * z * (1 - z), dn * hn * reset * (1 - reset)
            d_input, d_state = np.concatenate([dz, dr, dn], axis=1), np.concatenate([dz, dr, dn * reset], axis=1)
            carried = dh * z
        dx[t] = d_input @ w.T + d["dy"][t]
        dkernel += x.T @ d_input
        drecurrent += h.T @ d_state
        dh = d_state @ r.T + carried
    return {"dx": dx, "dkernel": dkernel, "drecurrent_kernel": drecurrent}


def _digits(d: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters after one step of momentum from rest: dense, batch norm, ReLU, dense, cross-entropy."""
    d = {name: value if name == "labels" else value.astype(np.float64) for name, value in d.items()}
    x, rate, rows = d["x"], 0.1, len(d["x"])
    u = x @ d["kernel_1"]
    mean, stddev = u.mean(axis=0), np.sqrt(u.var(axis=0) + EPSILON)
    n = (u - mean) / stddev
    v = n * d["gamma"] + d["beta"]
    h = np.maximum(v, 0)
    logits = h @ d["kernel_2"] + d["bias_2"]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(rows), d["labels"]] -= 1
    p /= rows
    dv = (p @ d["kernel_2"].T) * (v > 0)
    g = dv * d["gamma"]
    du = (g - g.mean(axis=0) - n * (g * n).mean(axis=0)) / stddev
    steps = {
        "kernel_1": x.T @ du, "gamma": (dv * n).sum(axis=0), "beta": dv.sum(axis=0), "kernel_2": h.T @ p,
        "bias_2": p.sum(axis=0),
    }  # fmt: skip
    return {name: d[name] - rate * step for name, step in steps.items()}


def _optimizer(case: Case, d: dict[str, Any]) -> dict[str, Any]:
    """Return the flat parameters after the first update with the learning rate 0.01."""
    w, g = d["parameters"].astype(np.float64), d["gradients"].astype(np.float64)
    if case.op == "momentum":
        return {"parameters": w - 0.01 * g}
    m, v = (1 - 0.9) * g, (1 - 0.999) * g * g  # from rest
    rate = 0.01 * np.sqrt(1 - 0.999) / (1 - 0.9)
    return {"parameters": w - rate * m / (np.sqrt(v) + 1e-7)}


def _conv2d(d: dict[str, Any]) -> dict[str, Any]:
    x, kernel = d["x"].astype(np.float64), d["kernel"].astype(np.float64)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return {
        "y": sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3))
    }


def truth(case: Case, data: dict[str, Any]) -> dict[str, Any]:
    """Return the results of a row by name, as float64."""
    if case.op.startswith("batch_norm"):
        return _norm(case, data)
    if case.op.endswith(("_cell", "_sequence")):
        return _recurrent(case, data)
    if case.op == "residual_add":
        return {"y": data["x"].astype(np.float64) + data["residual"]}
    if case.op == "dense":
        return {"y": data["x"].astype(np.float64) @ data["kernel"] + data["bias"]}
    if case.op == "conv2d":
        return _conv2d(data)
    return _digits(data) if case.op == "digits" else _optimizer(case, data)
