"""Run a cell over the time axis: as fused sequences where the cell has them, step by step where not.

Both give the same numbers. Time comes first here; states are flat lists in the order of the cell's `state_size`.
"""

from __future__ import annotations

import contextlib
from typing import Any

from gpulayers import nest, ops
from gpulayers.dtypes import TensorShape, as_dtype, is_floating
from gpulayers.errors import LayerError, ShapeError, StructureError, message
from gpulayers.layers.calling import probing, signature_of
from gpulayers.layers.core import CoreLayer
from gpulayers.layers.legacy import LegacyLayer
from gpulayers.layers.modern import Layer
from gpulayers.nn.dropout_masks import draw_masks, holding, is_held, may_drop
from gpulayers.nn.fused import FusedCell, Sequence, keeps
from gpulayers.nn.residual import check_depths
from gpulayers.nn.scan import scan
from gpulayers.nn.states import batch_of, cell_name, output_and_state
from gpulayers.trace import FunctionGraph, GraphTensor, active_graph, autocast
from gpulayers.trace.graph import new_placeholder

__all__ = ["Run", "is_symbolic", "run_cell"]


class Run:
    """How to run a cell: everything but the data.

    `mask` (T, N) or None; `keywords` for each call of the cell, which exclude fused sequences; `listed`: whether a
    state of one tensor is handed over in a list.
    """

    def __init__(
        self,
        mask: Any = None,
        training: Any = None,
        zero_output_for_mask: bool = False,
        go_backwards: bool = False,
        unroll: bool = False,
        keywords: dict[str, Any] | None = None,
        listed: bool = False,
    ) -> None:
        self.mask, self.training, self.zero_output_for_mask = mask, training, zero_output_for_mask
        self.go_backwards, self.unroll, self.keywords, self.listed = go_backwards, unroll, keywords or {}, listed


def is_symbolic(*structures: Any) -> bool:
    """Say whether operations on these values are recorded in a graph."""
    return active_graph() is not None or any(isinstance(v, GraphTensor) for s in structures for v in nest.flatten(s))


def run_cell(cell: Any, x: Any, states: list[Any], run: Run) -> tuple[Any, list[Any]]:
    """Run `cell` over `x` (T, N, ...), or a nested structure of such; return the outputs (T, N, ...) and last states.

    The cell is built. Raises ShapeError and StructureError where the cell's inputs, outputs or states do not fit.
    """
    parts = None if run.keywords or nest.is_nested(x) or TensorShape(x.shape).rank != 3 else fused_parts(cell)
    if parts is None:
        return _general(cell, x, states, run)
    return _fused(parts, _cast_for(cell, x), states, run)


# --- fused sequences --------------------------------------------------------------------------------------------------


class Part:
    """One fused sequence: the cell, whether its inputs are added to its outputs, and the layer whose dtype rules."""

    def __init__(self, cell: FusedCell, residual: bool, outer: Any) -> None:
        self.cell, self.residual, self.outer = cell, residual, outer


def fused_parts(cell: Any) -> list[Part] | None:
    """Return the sequences that compute `cell`, lowest first, or None where its steps have to be called one by one."""
    below = getattr(cell, "_fused_cells", None)
    if below is not None:
        cells = below()
        parts = None if cells is None or not _quiet(cell) else [fused_parts(one) for one in cells]
        return None if parts is None or None in parts else [p for some in parts for p in some or ()]
    if not _quiet(cell):
        return None
    if isinstance(cell, FusedCell):
        return [Part(cell, False, cell)] if cell.fuses() else None
    form = getattr(cell, "_fused_form", lambda: None)()
    if form is None or (isinstance(cell, LegacyLayer) and not _quiet(form[0])):
        return None
    return [Part(form[0], form[1], cell)]


def _quiet(cell: Any) -> bool:
    """Say whether calling a cell does no more than its `call`: no losses, no checks of inputs, no steps of a user's."""
    if not isinstance(cell, CoreLayer) or not keeps(cell, "__call__"):
        return False
    checked = cell.input_spec is not None and not isinstance(cell, LegacyLayer)
    return cell.activity_regularizer is None and not checked and not cell.dynamic


def _cast_for(cell: Any, x: Any) -> Any:
    """Return `x` as calling `cell` would cast it."""
    if not isinstance(cell, Layer) or not is_floating(x.dtype):
        return x
    compute = as_dtype(cell.compute_dtype)
    return x if x.dtype == compute else ops.cast(x, compute)


def _fused(parts: list[Part], x: Any, states: list[Any], run: Run) -> tuple[Any, list[Any]]:
    mask, backwards, new_states = run.mask, run.go_backwards, []
    for part in parts:
        count = len(nest.flatten(part.cell.state_size))  # type: ignore[attr-defined]
        own, states = states[:count], states[count:]
        x, new = _fused_part(part, x, own, mask, backwards, run)
        new_states += new
        if backwards:  # outputs come in processing order: the next sequence reads them forwards
            backwards, mask = False, None if mask is None else ops.flip(mask, 0)
    return x, new_states


def _fused_part(part: Part, x: Any, states: list[Any], mask: Any, backwards: bool, run: Run) -> tuple[Any, list[Any]]:
    cell: Any = part.cell
    if part.residual:
        shape = tuple(x.shape)
        check_depths(shape[1:], (*shape[1:-1], cell.output_size))
    context: Any = contextlib.nullcontext()
    if isinstance(part.outer, Layer):
        x = _cast_for(part.outer, x)
        context = autocast(as_dtype(part.outer.compute_dtype))
    with context:
        masks = cell.sequence_masks(x[0], states, run.training) if getattr(cell, "_drops", False) else (None, None)
        how = Sequence(mask, run.zero_output_for_mask, backwards, part.residual, masks)
        return cell.run_sequence(x, states, how)


# --- step by step -----------------------------------------------------------------------------------------------------


def _general(cell: Any, x: Any, states: list[Any], run: Run) -> tuple[Any, list[Any]]:
    leaves = nest.flatten(x)
    time = tuple(leaves[0].shape)[0]
    stepper = _Stepper(cell, x, run)
    looped = is_symbolic(x, states, run.mask) and not run.unroll
    with holding(_all_masks(cell, x, run.training, looped)):
        found = _scan_steps(stepper, leaves, states, run) if looped else None
        if found is None:
            if time is None:
                raise LayerError(
                    message(
                        cell_name(cell),
                        "losses and updates inside a loop need the number of steps",
                        do="Give the inputs a known time length.",
                    )
                )
            found = _call_steps(stepper, leaves, states, run) if time else (_no_steps(stepper, leaves, states), states)
    flat, states = found
    return nest.pack_sequence_as(stepper.output_structure, flat), states


class _Stepper:
    """Calls the cell for one step on flat lists."""

    def __init__(self, cell: Any, x: Any, run: Run) -> None:
        self.cell, self.input_structure, self.listed = cell, x, run.listed and not nest.is_nested(cell.state_size)
        self.keywords = dict(run.keywords)
        signature = signature_of(getattr(cell, "call", cell))
        if run.training is not None and signature.training:
            self.keywords["training"] = run.training
        self.output_structure: Any = None

    def __call__(self, slices: list[Any], states: list[Any]) -> tuple[list[Any], list[Any]]:
        state = nest.pack_sequence_as(self.cell.state_size, states)
        inputs = nest.pack_sequence_as(self.input_structure, slices)
        result = self.cell(inputs, [state] if self.listed else state, **self.keywords)
        output, new_state = output_and_state(self.cell, result)
        if any(leaf is None for leaf in nest.flatten(output)):
            raise LayerError(message(cell_name(self.cell), "the output of a step is None", "tensors"))
        new_states = nest.flatten(new_state)
        if len(new_states) != len(states):
            wrong = "the cell returned another number of states"
            raise StructureError(message(cell_name(self.cell), wrong, len(states), len(new_states)))
        self.output_structure = output
        return nest.flatten(output), new_states


def _call_steps(stepper: _Stepper, leaves: list[Any], states: list[Any], run: Run) -> tuple[list[Any], list[Any]]:
    slices = [ops.unstack(x, 0, tuple(leaves[0].shape)[0]) for x in leaves]
    masks = None if run.mask is None else ops.unstack(run.mask, 0, len(slices[0]))
    collected: list[list[Any]] = []
    order = range(len(slices[0]))
    for t in reversed(order) if run.go_backwards else order:
        outputs, new_states = stepper([x[t] for x in slices], states)
        if masks is not None:
            outputs, new_states = _held(
                masks[t], outputs, collected[-1] if collected else None, new_states, states, run
            )
        states = new_states
        collected.append(outputs)
    return [ops.stack(list(column), 0) for column in zip(*collected, strict=True)], states


def _no_steps(stepper: _Stepper, leaves: list[Any], states: list[Any]) -> list[Any]:
    """Return the outputs of no steps (0, N, ...), of the shapes and dtypes that a step has: one that is not kept."""
    graph = FunctionGraph()
    slices = [new_placeholder(graph, x.dtype, tuple(x.shape)[1:], "step") for x in leaves]
    carried = [new_placeholder(graph, s.dtype, s.shape, "state") for s in states]
    with probing(), graph.as_default():
        outputs, _ = stepper(slices, carried)
    return [ops.zeros((0, batch_of(leaves, 1), *tuple(o.shape)[1:]), o.dtype) for o in outputs]


def _held(
    mask: Any, outputs: list[Any], previous: list[Any] | None, new_states: list[Any], states: list[Any], run: Run
) -> tuple[list[Any], list[Any]]:
    """Return outputs and states of a step, those of rows where `mask` (N,) is false replaced."""
    if run.zero_output_for_mask or previous is None:
        previous = [ops.zeros_like(o) for o in outputs]
    return (
        [_where(mask, new, old) for new, old in zip(outputs, previous, strict=True)],
        [_where(mask, new, old) for new, old in zip(new_states, states, strict=True)],
    )


def _where(mask: Any, new: Any, old: Any) -> Any:
    return ops.where(ops.reshape(mask, (-1, *[1] * (len(new.shape) - 1))), new, old)


def _scan_steps(
    stepper: _Stepper, leaves: list[Any], states: list[Any], run: Run
) -> tuple[list[Any], list[Any]] | None:
    """Run the steps as a loop in the graph; None if a step adds losses or updates: they would be those of one step."""
    inside = _inside(stepper.cell)
    if any(one.activity_regularizer is not None for one in inside):
        return None
    books = [one._loss_book for one in inside]
    before = [book.state() for book in books]
    found = _recorded_loop(stepper, leaves, states, run)
    changed = [book.go_back(old) for book, old in zip(books, before, strict=True)]
    return None if any(changed) else found


def _recorded_loop(stepper: _Stepper, leaves: list[Any], states: list[Any], run: Run) -> tuple[list[Any], list[Any]]:
    if run.mask is None:
        return scan(stepper, leaves, states, run.go_backwards)
    count = len(states)
    previous: list[Any] = []
    if not run.zero_output_for_mask:
        previous = [
            ops.zeros((batch_of(leaves, 1), *shape), dtype) for shape, dtype in _output_specs(stepper, leaves, states)
        ]

    def step(slices: list[Any], carried: list[Any]) -> tuple[list[Any], list[Any]]:
        *inputs, mask = slices
        outputs, new_states = stepper(inputs, carried[:count])
        outputs, new_states = _held(mask, outputs, carried[count:] or None, new_states, carried[:count], run)
        return outputs, new_states + (outputs if previous else [])

    outputs, last = scan(step, [*leaves, run.mask], [*states, *previous], run.go_backwards)
    return outputs, last[:count]


def _output_specs(stepper: _Stepper, leaves: list[Any], states: list[Any]) -> list[tuple[tuple[int, ...], Any]]:
    """Return shape (without the batch) and dtype of each output of a step, by recording one that is not used."""
    outputs: list[Any] = []

    def step(slices: list[Any], carried: list[Any]) -> tuple[list[Any], list[Any]]:
        found, new_states = stepper(slices, carried)
        outputs.extend(found)
        return found, new_states

    scan(step, leaves, states)
    specs = []
    for output in outputs:
        shape = tuple(output.shape)[1:]
        if None in shape:
            raise ShapeError(message("RNN", "with a mask the cell's output shape has to be known", got=shape))
        specs.append((shape, output.dtype))
    return specs


# --- what lies inside a cell ------------------------------------------------------------------------------------------


def _inside(cell: Any) -> list[Any]:
    return [cell, *cell.submodules] if isinstance(cell, CoreLayer) else []


def _all_masks(cell: Any, x: Any, training: Any, looped: bool) -> list[tuple[Any, Any]]:
    """Draw the dropout masks of all cells inside `cell`, for one layer call.

    Cells that are not built yet, or may be called with a `training` of their own, get a place for masks of their first
    step. A recorded loop has no first step: such cells then draw at every step, and have to be built where `training`
    asks for dropout (where it is None, the learning phase may ask at each step).
    """
    found: list[tuple[Any, Any]] = []
    for one in _inside(cell):
        if not getattr(one, "_drops", False) or is_held(one):
            continue
        if may_drop(training) and one.built:
            batch, dtype = batch_of(x, 1), one.compute_dtype or nest.flatten(x)[0].dtype
            x_nd, h_nu = (ops.zeros((batch, width), as_dtype(dtype)) for width in (one.kernel.shape[0], one.units))
            found.append((one, draw_masks(x_nd, h_nu, training, one.dropout, one.recurrent_dropout)))
        elif not looped:
            found.append((one, None))
        elif training is not None and may_drop(training):
            wrong = f"the cell {one.name} inside it drops, and is not built before the loop"
            raise LayerError(message(cell_name(cell), wrong, do="Build it in the build method of the cell around it."))
    return found
