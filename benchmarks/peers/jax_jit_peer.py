"""JAX: the formulas under ``jax.jit``, and their gradients by ``jax.vjp`` compiled as one function."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from benchmarks.shapes import Case, axis_of
from benchmarks.truth import EPSILON, LIMITS

__all__ = ["OWN_STREAMS", "finish", "prepare", "to_numpy", "unavailable", "version"]

OWN_STREAMS = True
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # before JAX is imported: three quarters of the memory


def unavailable(on_gpu: bool) -> str:
    import jax

    platform = jax.default_backend()
    return f"this JAX runs on {platform}" if (platform == "gpu") != on_gpu else ""


def version() -> str:
    import jax

    return f"JAX {jax.__version__}"


def to_numpy(value: Any) -> np.ndarray:
    found = np.asarray(value)
    return found.astype(np.float32) if found.dtype.itemsize == 2 else found


def finish(results: Any) -> None:
    """Wait for the results: JAX returns before it has computed."""
    import jax

    jax.block_until_ready(results)


def _norm(case: Case, d: dict[str, Any]) -> Any:
    import jax
    import jax.numpy as jnp

    axis = axis_of(case)
    grouped = case.groups > 1
    shape = case.shape if not grouped else (case.shape[0] // case.groups, case.groups, *case.shape[1:])
    kept = axis if not grouped else (1, *(a + 1 for a in axis))
    reduced = tuple(a for a in range(len(shape)) if a not in kept)
    along = [n if a in kept and not (grouped and a == 1) else 1 for a, n in enumerate(shape)]
    dtype = d["x"].dtype
    wide = jnp.float32 if dtype.itemsize == 2 else dtype

    def norm(x: Any, gamma: Any, beta: Any, residual: Any, mm: Any, mv: Any, rm: Any, rs: Any) -> Any:
        x = x.reshape(shape).astype(wide)
        if case.mode == "inference":
            mean, variance = mm.reshape(along), mv.reshape(along)
        else:
            mean = x.mean(reduced, keepdims=True)
            variance = ((x - mean) ** 2).mean(reduced, keepdims=True)
        n = (x - mean) / jnp.sqrt(variance + EPSILON)
        if case.op == "batch_norm_renorm":
            stop, old = jax.lax.stop_gradient, rs.reshape(along)
            r = stop(jnp.clip(jnp.sqrt(variance + EPSILON) / old, LIMITS["rmin"], LIMITS["rmax"]))
            n = n * r + stop(jnp.clip((mean - rm.reshape(along)) / old, -LIMITS["dmax"], LIMITS["dmax"]))
        y = (n * gamma.reshape(along) + beta.reshape(along)).reshape(case.shape)
        if residual is not None:
            y = jax.nn.relu(y + residual)
        batch = [v.mean(1, keepdims=True) if grouped else v for v in (mean, variance)]
        moved = [s - (s - v.ravel()) * 0.01 for s, v in zip((mm, mv), batch, strict=True)]
        return y.astype(dtype), (batch[0].ravel(), batch[1].ravel(), *moved)

    rest = [d.get("residual"), d["moving_mean"], d["moving_variance"], d["renorm_mean"], d["renorm_stddev"]]
    arguments = [d["x"], d["gamma"], d["beta"], *rest]
    if case.mode in ("inference", "forward"):
        call = jax.jit(norm)

        def forward() -> dict[str, Any]:
            y, found = call(*arguments)
            return {"y": y} if case.mode == "inference" else {"y": y, "mean": found[0], "variance": found[1]}

        return forward

    def loss(x: Any, gamma: Any, beta: Any, residual: Any) -> Any:
        return norm(x, gamma, beta, residual, *rest[1:])[0]

    def named(found: Any) -> dict[str, Any]:
        gradients = {"dx": found[0], "dgamma": found[1], "dbeta": found[2]}
        return {**gradients, "dresidual": found[3]} if found[3] is not None else gradients

    @jax.jit
    def both(dy: Any, *inputs: Any) -> Any:
        y, pull, found = jax.vjp(lambda *inputs: norm(*inputs, *rest[1:]), *inputs, has_aux=True)
        return y, found, pull(dy)

    def step() -> dict[str, Any]:
        y, found, gradients = both(d["dy"], *arguments[:4])
        return {"y": y, "mean": found[0], "variance": found[1], **named(gradients)}

    if case.mode == "step":
        return step

    # The linearised function is a pytree: jitted, it is the backward pass alone, on residuals of its own choice.
    _, pull = jax.jit(lambda *a: jax.vjp(loss, *a))(*arguments[:4])
    back = jax.jit(lambda pull, dy: pull(dy))
    return lambda: named(back(pull, d["dy"]))


def _sequence(case: Case, d: dict[str, Any]) -> Any:
    import jax
    import jax.numpy as jnp

    lstm, sequence = case.op.startswith("lstm"), case.op.endswith("sequence")

    def step(state: Any, x: Any, w: Any, r: Any, b: Any) -> Any:
        if lstm:
            h, c = state
            i, f, g, o = jnp.split(x @ w + h @ r + b, 4, axis=1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h + x
        (h,) = state
        xz, xr, xn = jnp.split(x @ w + b[0], 3, axis=1)
        hz, hr, hn = jnp.split(h @ r + b[1], 3, axis=1)
        z = jax.nn.sigmoid(xz + hz)
        h = z * h + (1 - z) * jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn)
        return (h,), h + x

    def run(x: Any, w: Any, r: Any, b: Any, state: Any) -> Any:
        if sequence:
            state, output = jax.lax.scan(lambda s, one: step(s, one, w, r, b), state, x)
        else:
            state, output = step(state, x, w, r, b)
        return output, state

    state = (d["h"], d["c"]) if lstm else (d["h"],)
    arguments = d["x"], d["kernel"], d["recurrent_kernel"], d["bias"]
    if case.mode == "forward":
        call = jax.jit(run)

        def forward() -> dict[str, Any]:
            output, last = call(*arguments, state)
            return {"output": output, **dict(zip(("h", "c"), last, strict=False))}

        return forward
    _, pull = jax.jit(lambda *a: jax.vjp(lambda x, w, r: run(x, w, r, d["bias"], state)[0], *a))(*arguments[:3])
    back = jax.jit(lambda pull, dy: pull(dy))
    return lambda: dict(zip(("dx", "dkernel", "drecurrent_kernel"), back(pull, d["dy"]), strict=True))


def _digits(d: dict[str, Any]) -> Any:
    import jax
    import jax.numpy as jnp

    names = ("kernel_1", "gamma", "beta", "kernel_2", "bias_2")

    def loss(p: dict[str, Any], x: Any, labels: Any) -> Any:
        u = x @ p["kernel_1"]
        mean = u.mean(0)
        n = (u - mean) / jnp.sqrt(((u - mean) ** 2).mean(0) + EPSILON)
        logits = jax.nn.relu(n * p["gamma"] + p["beta"]) @ p["kernel_2"] + p["bias_2"]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
        return -chosen.mean()

    def update(p: dict[str, Any], slots: dict[str, Any], x: Any, labels: Any) -> Any:
        gradients = jax.grad(loss)(p, x, labels)
        slots = {name: 0.9 * slots[name] + gradients[name] for name in names}
        return {name: p[name] - 0.1 * slots[name] for name in names}, slots

    call = jax.jit(update, donate_argnums=(0, 1))
    state = [{name: d[name].copy() for name in names}, {name: jnp.zeros_like(d[name]) for name in names}]

    def step() -> dict[str, Any]:
        state[:] = call(*state, d["x"], d["labels"])
        return state[0]

    return step


def _optimizer(case: Case, data: dict[str, Any]) -> Any:
    """Return the update of all parameters as one compiled function that may write into its inputs."""
    import jax
    import jax.numpy as jnp

    from benchmarks.data import split_parameters

    parameters, gradients = ([jnp.array(p) for p in split_parameters(data[n])] for n in ("parameters", "gradients"))
    zeros = lambda: [jnp.zeros_like(p) for p in parameters]

    def momentum(w: Any, b: Any, count: Any, gradients: Any) -> Any:
        b = [0.9 * one + g for one, g in zip(b, gradients, strict=True)]
        return [p - 0.01 * one for p, one in zip(w, b, strict=True)], b, count + 1

    def adam(w: Any, slots: Any, count: Any, gradients: Any) -> Any:
        rate = 0.01 * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        m = [0.9 * one + 0.1 * g for one, g in zip(slots[0], gradients, strict=True)]
        v = [0.999 * one + 0.001 * g * g for one, g in zip(slots[1], gradients, strict=True)]
        w = [p - rate * a / (jnp.sqrt(b) + 1e-7) for p, a, b in zip(w, m, v, strict=True)]
        return w, (m, v), count + 1

    call = jax.jit(adam if case.op == "adam" else momentum, donate_argnums=(0, 1))
    state = [parameters, (zeros(), zeros()) if case.op == "adam" else zeros(), jnp.float32(1)]

    def step() -> dict[str, Any]:
        state[:] = call(*state, gradients)
        return {"parameters": state[0]}

    return step


def prepare(case: Case, data: dict[str, Any], on_gpu: bool) -> Any:
    import jax
    import jax.numpy as jnp

    if case.op in ("adam", "momentum"):
        return _optimizer(case, data)
    d = {name: jnp.asarray(value) for name, value in data.items()}
    if case.op.startswith("batch_norm"):
        return _norm(case, d)
    if case.op.endswith(("_cell", "_sequence")):
        return _sequence(case, d)
    if case.op == "digits":
        return _digits(d)
    if case.op == "residual_add":
        add = jax.jit(jnp.add)
        return lambda: {"y": add(d["x"], d["residual"])}
    if case.op == "conv2d":
        dimensions = ("NHWC", "HWIO", "NHWC")
        slide = jax.jit(lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=dimensions))
        return lambda: {"y": slide(d["x"], d["kernel"])}
    dense = jax.jit(lambda x, w, b: x @ w + b)
    return lambda: {"y": dense(d["x"], d["kernel"], d["bias"])}
