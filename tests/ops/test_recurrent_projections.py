"""Input projections by blocks: each block's numbers, on one thread or beside the steps, in memory for a few."""

import numpy as np
import pytest

from gpulayers.ops.host import threads as host_threads
from gpulayers.ops.recurrent import arrays as recurrent_arrays
from gpulayers.ops.recurrent import common as recurrent_common
from gpulayers.ops.recurrent import projections as recurrent_projections
from gpulayers.ops.recurrent.products import weight_strips
from gpulayers.ops.recurrent.projections import inputs_of, projected_blocks, steps_kept


@pytest.fixture(params=[True, False], ids=["beside", "alone"])
def pool(request, monkeypatch):
    made = host_threads._Pool({0, 1}) if request.param else None
    monkeypatch.setattr(host_threads, "_pool", lambda: made)
    return made


@pytest.mark.parametrize(
    ("time", "batch", "depth", "units"), [(23, 4, 6, 128), (9, 3, 5, 192), (23, 4, 6, 10), (1, 2, 3, 128)]
)
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("source", ["ready", "batch first", "backwards", "float16", "masked", "masked backwards"])
def test_blocks_are_the_projections(monkeypatch, pool, time, batch, depth, units, save, source):
    monkeypatch.setattr(recurrent_common, "_BLOCK_BYTES", 4 * 4 * 3 * batch * units)  # four steps
    monkeypatch.setattr(recurrent_projections, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(recurrent_projections, "_BLOCKS_KEPT", 3)
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(time, batch, depth)).astype("f"), rng.normal(size=(3, depth, units)).astype("f")
    if source == "batch first":
        x = np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1)
    x = x.astype("e") if source == "float16" else x
    mask = rng.uniform(size=(batch, depth)).astype("f") if "masked" in source else None
    inputs = inputs_of(x, "backwards" in source, kernel.dtype, mask)
    assert (inputs.x is x) == (source in ("ready", "masked") or (source == "batch first" and time == 1))
    x = x[::-1] if "backwards" in source else x
    entering = x.astype("d") if mask is None else x * mask.astype("d")
    offset = rng.normal(size=(3, units)).astype("f")
    kept = time if save else steps_kept(time, 3 * batch * units * 4)
    assert kept == (time if save else min(time, 4 * 3))
    strips = weight_strips(kernel.transpose(1, 0, 2).reshape(depth, -1), batch, kernel.dtype, range(3))
    gates, seen = np.full((kept, 3, batch, units), np.nan, "f"), []
    for start, part in projected_blocks(inputs, strips, offset, gates):
        want = np.einsum("tnd,gdu->tgnu", entering[start : start + len(part)], kernel) + offset[:, None]
        np.testing.assert_allclose(part, want, rtol=1e-4, atol=1e-4)
        part *= 0  # what the steps do to a block is not undone by the next
        seen += range(start, start + len(part))
    assert seen == list(range(time))
    np.testing.assert_array_equal(inputs.x, x)


def test_an_error_of_the_other_thread_arrives(monkeypatch, pool):
    monkeypatch.setattr(recurrent_common, "_BLOCK_BYTES", 4 * 4 * 3 * 4 * 128)
    monkeypatch.setattr(recurrent_projections, "WORTH_A_THREAD", 1)
    made = recurrent_projections.run_ahead
    monkeypatch.setattr(recurrent_projections, "run_ahead", lambda works: made([lambda: 1 / 0] * len(works)))
    blocks = projected_blocks(
        inputs_of(np.ones((23, 4, 6), "f"), False, np.dtype("f"), None),
        np.ones((3, 2, 6, 64), "f"),
        np.zeros((3, 128), "f"),
        np.ones((23, 3, 4, 128), "f"),
    )
    with pytest.raises(ZeroDivisionError):
        list(blocks)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("shape", [(0, 2, 128), (3, 0, 128), (20, 0, 128), (12, 2, 0)])
def test_empty_sequences(kind, shape):
    time, batch, depth = shape
    count, states = (4, 2) if kind == "lstm" else (3, 1)
    weights = np.ones((depth, count * 128), "f"), np.ones((128, count * 128), "f")
    zeros = [np.zeros((batch, 128), "f")] * states
    for save in (True, False):
        outputs, *_ = getattr(recurrent_arrays, f"{kind}_sequence")(np.ones(shape, "f"), *zeros, *weights, save=save)
        assert outputs.shape == (time, batch, 128)
