"""The recorded cases follow the equations, evaluated in float64 by the shortest program that can.

This checks the data, not the library: a recording that the reference spoiled (or a tolerance too tight for its dtype)
shows here, before a layer is blamed for it.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.reference.cases import Case, cases, residual_function


def decayed(old, value, momentum):
    """Return a moving statistic after one step; the reference keeps its decay in float32."""
    return old - (old - value) * np.float64(np.float32(1 - momentum))


class Equations:
    """Batch normalisation of one case in float64; `state` holds the variables by name."""

    def __init__(self, case: Case):
        self.config, self.ctor = case.config, case.config["ctor"]
        self.state = {name: array.astype(np.float64) for name, array in case.with_prefix("init.").items()}
        self.epsilon, self.momentum = self.ctor.get("epsilon", 1e-3), self.ctor.get("momentum", 0.99)
        self.groups = self.ctor.get("virtual_batch_size")

    def split(self, x):
        """Return x with the sub-batches on axis 1: interleaved rows."""
        return x.reshape(self.groups, -1, *x.shape[1:]) if self.groups else x

    def over(self, rank):
        """Return the reduced axes of the (split) input."""
        kept = [*self.config["built_axis"], *([1] if self.groups else [])]
        return tuple(axis for axis in range(rank) if axis not in kept)

    def shaped(self, values, rank):
        """Return a variable so that it broadcasts on its axis."""
        if values.ndim != 1 or rank == 1:
            return values
        shape = [1] * rank
        shape[self.config["built_axis"][0]] = -1
        return values.reshape(shape)

    def gains(self, rank, unshaped):
        """Return gamma, beta and the adjustment pair, ones and zeros where absent."""
        gamma = self.shaped(self.state.get("gamma", np.ones(unshaped)), rank)
        beta = self.shaped(self.state.get("beta", np.zeros(unshaped)), rank)
        pair = self.config.get("adjustment_returns", {"scale": 1.0, "bias": 0.0})
        return gamma, beta, np.asarray(pair["scale"]), np.asarray(pair["bias"])

    def infer(self, x):
        """Return y and d sum(y*w)/dx's factor from the moving statistics."""
        rank = x.ndim + bool(self.groups)
        gamma, beta, _, _ = self.gains(rank, self.state["moving_mean"].shape)
        if self.groups:
            x = x[None]  # the parameters have one axis more than the input
        mean = self.shaped(self.state["moving_mean"], rank)
        inverse = 1 / np.sqrt(self.shaped(self.state["moving_variance"], rank) + self.epsilon)
        factor = inverse * gamma
        y = (x - mean) * factor + beta
        return (y[0], np.broadcast_to(factor, x.shape)[0]) if self.groups else (y, np.broadcast_to(factor, x.shape))

    def train(self, x, w, update=True):
        """Return y and dx of sum(y*w) for one training step, and update the state."""
        shape, x = x.shape, self.split(x)
        w, over, rank = self.split(w), self.over(x.ndim), x.ndim
        mask = self.config.get("mask")
        use = np.ones(x.shape)
        if mask is not None and not self.config["fused_path_selected"]:
            use = np.broadcast_to(np.asarray(mask, np.float64)[..., None], x.shape)
        total = np.maximum(use.sum(over, keepdims=True), 1e-300)  # nothing in use: mean and variance are 0
        mean = (use * x).sum(over, keepdims=True) / total
        var = (use * (x - mean) ** 2).sum(over, keepdims=True) / total
        inverse = 1 / np.sqrt(var + self.epsilon)
        stored = self.state["moving_mean"].shape

        def pooled(values):
            return values.mean(1, keepdims=True) if self.groups else values

        r, d = self.corrections(pooled(mean), pooled(var), rank)
        gamma, beta, scale, bias = self.gains(rank, stored)
        normal = (x - mean) * inverse
        y = ((normal * r + d) * scale + bias) * gamma + beta
        cotangent = w * r * scale * gamma
        centred = cotangent.sum(over, keepdims=True) / total + normal * (
            (cotangent * normal).sum(over, keepdims=True) / total
        )
        dx = inverse * (cotangent - use * centred)
        if update and self.ctor.get("trainable", True):
            count = x.size / mean.size
            bessel = count / max(count - 1, 1) if self.config["fused_path_selected"] else 1.0
            self.update(pooled(mean).reshape(stored), pooled(var).reshape(stored), bessel)
        return y.reshape(shape), dx.reshape(shape)

    def corrections(self, mean, var, rank):
        """Return the renormalisation's r and d, 1 and 0 without it."""
        if not self.ctor.get("renorm"):
            return 1.0, 0.0
        clips = self.ctor.get("renorm_clipping") or {}
        floor = np.maximum(self.shaped(self.state["renorm_stddev"], rank), np.sqrt(self.epsilon))
        r = np.clip(np.sqrt(var + self.epsilon) / floor, clips.get("rmin", 0.0), clips.get("rmax", np.inf))
        d = (mean - self.shaped(self.state["renorm_mean"], rank)) / floor
        return r, np.clip(d, -clips.get("dmax", np.inf), clips.get("dmax", np.inf))

    def update(self, mean, var, bessel):
        """Fold one step into the moving statistics."""
        state, deviation = self.state, np.sqrt(var + self.epsilon)
        state["moving_mean"] = decayed(state["moving_mean"], mean, self.momentum)
        if not self.ctor.get("renorm"):
            state["moving_variance"] = decayed(state["moving_variance"], var * bessel, self.momentum)
            return
        slow = self.ctor.get("renorm_momentum", 0.99)
        state["renorm_mean"] = decayed(state["renorm_mean"], mean, slow)
        state["renorm_stddev"] = decayed(state["renorm_stddev"], deviation, slow)
        state["moving_stddev"] = decayed(state["moving_stddev"], deviation, self.momentum)
        state["moving_variance"] = np.maximum(state["moving_stddev"] ** 2 - self.epsilon, 0)


@pytest.mark.parametrize("case", cases("batch_normalization"), ids=str)
def test_recording_follows_the_equations(case):
    equations = Equations(case)
    for i, step in enumerate(case.config["steps"]):
        x = case.arrays[step["x"]].astype(np.float64)
        w = case.arrays.get("w", np.ones(x.shape)).astype(np.float64)
        if step["training"]:
            y, dx = equations.train(x, w)
        else:
            y, factor = equations.infer(x)
            dx = factor * w
        scale = max(1.0, np.abs(y).max())
        np.testing.assert_allclose(case.arrays[step["y"]], y, rtol=0, atol=case.tolerance * scale)
        for name, value in case.with_prefix(f"after{i}.").items():
            np.testing.assert_allclose(value, equations.state[name], rtol=0, atol=case.tolerance, err_msg=name)
    if "grad.x" in case.arrays:
        scale = max(1.0, np.abs(dx).max())
        np.testing.assert_allclose(case.arrays["grad.x"], dx, rtol=0, atol=case.tolerance * scale)


# -- one step of a modern cell -----------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


ACTIVATIONS = {
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "sigmoid": sigmoid,
    "hard_sigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
}


def cell_step(config, x, states, weights):
    """Return the raw output and the new states of one cell in float64."""
    act, gate = (
        ACTIVATIONS[config.get(k, d)] for k, d in [("activation", "tanh"), ("recurrent_activation", "sigmoid")]
    )
    h, units = states[0], config["units"]
    kernel, recurrent, bias = weights["kernel"], weights["recurrent_kernel"], weights.get("bias", 0.0)
    if config["cell"] == "SimpleRNNCell":
        new = act(x @ kernel + h @ recurrent + bias)
        return new, [new]
    if config["cell"] == "LSTMCell":
        i, f, c, o = np.split(x @ kernel + h @ recurrent + bias, 4, axis=1)
        memory = gate(f) * states[1] + gate(i) * act(c)
        return gate(o) * act(memory), [gate(o) * act(memory), memory]
    after = config.get("reset_after", True)
    bias = np.broadcast_to(bias, (2, 3 * units)) if after or np.ndim(bias) == 0 else np.stack([bias, 0 * bias])
    a_z, a_r, a_h = np.split(x @ kernel + bias[0], 3, axis=1)
    c_z, c_r, c_h = np.split(h @ recurrent + bias[1], 3, axis=1)
    z, r = gate(a_z + c_z), gate(a_r + c_r)
    new = z * h + (1 - z) * act(a_h + (r * c_h if after else (r * h) @ recurrent[:, 2 * units :]))
    return new, [new]


@pytest.mark.parametrize("case", cases("rnn_cell_step"), ids=str)
def test_cell_recording_follows_the_equations(case):
    x = case.arrays["x"].astype(np.float64)
    states = [state.astype(np.float64) for state in case.numbered("state")]
    weights = {name: value.astype(np.float64) for name, value in case.with_prefix("weight.").items()}
    y, new_states = cell_step(case.config, x, states, weights)
    residual = residual_function(case.config.get("residual_fn"), np.concatenate) or np.add
    for _ in range(case.config.get("wrappers", 0)):
        y = residual(x, y)
    np.testing.assert_allclose(case.arrays["y"], y, rtol=0, atol=case.tolerance)
    for recorded, expected in zip(case.numbered("new_state"), new_states, strict=True):
        np.testing.assert_allclose(recorded, expected, rtol=0, atol=case.tolerance)
