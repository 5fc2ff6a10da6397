"""What the recurrent sequences on device arrays share: sizes and masks, the inputs' part, the way back through time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpulayers.device import array_module
from gpulayers.launch import Prepared
from gpulayers.ops.device_products import product_into
from gpulayers.ops.recurrent.kernels import prepare_step

__all__ = ["Inputs", "Onward", "Return", "Run", "States"]


class Run:
    """What every sequence needs on the way there and back: module, dtype, sizes, direction, masks, products."""

    def __init__(
        self, x: Any, units: int, mask: Any, input_mask: Any, recurrent_mask: Any, go_backwards: bool, zero: bool
    ) -> None:
        self.xp, self.dtype = array_module(x), x.dtype
        self.time, self.batch, self.depth = x.shape
        self.units, self.go_backwards, self.zero = units, go_backwards, zero
        self.steps = range(self.time if self.batch else 0)
        self.product = product_into(self.xp)
        self.mask: Any = None
        if mask is not None:
            self.mask = self.directed(self.xp.asarray(mask, dtype=np.bool_)).view(np.uint8)
        self.input_mask, self.recurrent_mask = (
            None if m is None else self.xp.ascontiguousarray(self.xp.asarray(m).astype(self.dtype))
            for m in (input_mask, recurrent_mask)
        )

    def directed(self, array: Any) -> Any:
        """Return `array` contiguous, its time axis reversed for go_backwards."""
        return self.xp.ascontiguousarray(array[::-1] if self.go_backwards else array)

    def own(self, array: Any) -> Any:
        """Return an array contiguous and of the loop's dtype, or None for None."""
        return None if array is None else self.xp.ascontiguousarray(array.astype(self.dtype, copy=False))

    def empty(self, *shape: int) -> Any:
        """Return fresh memory in the dtype of the loop."""
        return self.xp.empty(shape, dtype=self.dtype)

    def cotangent_or_zeros(self, array: Any) -> Any:
        """Return a copy of a cotangent in the dtype of `wide` that the loop may write, zeros for None."""
        if array is None:
            return self.xp.zeros((self.batch, self.units), dtype=self.wide())
        return self.xp.array(array, dtype=self.wide(), copy=True, order="C")

    def rows(self, array: Any) -> Any:
        """Return an array (T, N, columns) as (T*N, columns)."""
        return array.reshape(self.time * self.batch, array.shape[-1])

    def dropped(self, x: Any) -> Any:
        """Return the rows (T*N, D) that enter the projection."""
        return self.rows(x if self.input_mask is None else x * self.input_mask)

    def entered(self, h: States) -> Any:
        """Return the states (T, N, U) that entered the steps' products."""
        return h.before() if self.recurrent_mask is None else h.before() * self.recurrent_mask

    def step(self, name: str, *arrays: Any, hard: bool = False, **numbers: Any) -> Prepared:
        """Return the launch of a kernel for every step; see `prepare_step`."""
        return prepare_step(name, self.batch, self.units, arrays, hard=hard, **numbers)

    def d_weights(self, entering: Any, d_sums: Any, out: Any = None) -> Any:
        """Return the gradient of weights as one product over all steps; float32 for 16-bit data."""
        if out is None:
            out = self.xp.empty((entering.shape[-1], d_sums.shape[-1]), dtype=self.wide())
        self.product(entering.T, d_sums, out, False)
        return out

    def d_bias(self, d_sums: Any) -> Any:
        """Return the sum over steps and rows, float32 for 16-bit data: a product with ones, which fills the device.

        A reduction along the first axis would give a block to a few columns, and the gates have not enough of them.
        """
        rows = self.rows(d_sums)
        total = self.xp.empty((1, rows.shape[1]), dtype=self.wide())
        self.product(self.xp.ones((1, rows.shape[0]), dtype=self.dtype), rows, total, False)
        return total[0]

    def wide(self) -> Any:
        """Return the dtype of what is added up over the steps: gradients of weights, cotangents of states."""
        return np.dtype(np.float32) if self.dtype.itemsize == 2 else self.dtype


class Inputs:
    """The inputs' part of a sequence: which columns of the kernel belong to which columns of the gate buffer."""

    def __init__(self, run: Run, kernel: Any, parts: Sequence[tuple[slice, slice]] = ((slice(None), slice(None)),)):
        self.run, self.kernel, self.parts = run, kernel, parts

    def project(self, x: Any, sums: Any) -> None:
        """Write the projections of all steps into the gate buffer (T, N, columns)."""
        rows, entering = self.run.rows(sums), self.run.dropped(x)
        for of_sums, of_kernel in self.parts:
            self.run.product(entering, self.kernel[:, of_kernel], rows[:, of_sums], False)

    def d_kernel(self, x: Any, d_sums: Any) -> Any:
        """Return the gradient of the kernel; float32 for 16-bit data."""
        run = self.run
        rows, entering = run.rows(d_sums), run.dropped(x)
        out = run.xp.empty(self.kernel.shape, dtype=run.wide())
        for of_sums, of_kernel in self.parts:
            run.d_weights(entering, rows[:, of_sums], out[:, of_kernel])
        return out

    def d_x(self, d_sums: Any, added: Any) -> Any:
        """Return dx (T, N, D), in the inputs' direction; `added`: what the residual addition passes on, or None."""
        run = self.run
        d_x, rows = run.empty(run.time, run.batch, run.depth), run.rows(d_sums)
        for index, (of_sums, of_kernel) in enumerate(self.parts):
            run.product(rows[:, of_sums], self.kernel[:, of_kernel].T, run.rows(d_x), index > 0)
        if run.input_mask is not None:
            d_x *= run.input_mask
        if added is not None:
            d_x += added
        return run.directed(d_x)


class States:
    """The states before and after every step: T + 1 arrays (N, U) in `each`, the first one `start`.

    Several steps write into one buffer. A single one reads the caller's array and writes an array of its own, so that
    no state is copied on its way in or out.
    """

    def __init__(self, run: Run, start: Any) -> None:
        start, self.units = run.own(start), run.units
        self._whole: Any = None
        if run.time == 1:
            self.each = [start, run.empty(run.batch, run.units)]
            return
        self._whole = run.empty(run.time + 1, run.batch, run.units)
        self._whole[0] = start
        self.each = list(self._whole)

    def before(self) -> Any:
        """Return the states (T, N, U) before the steps."""
        return self.each[0][None] if self._whole is None else self._whole[:-1]

    def after(self) -> Any:
        """Return the states (T, N, U) after the steps."""
        return self.each[1][None] if self._whole is None else self._whole[1:]

    def last(self) -> Any:
        """Return the state after the last step, as an array of its own."""
        return self.each[1] if self._whole is None else self.each[-1].copy()


class Onward:
    """The way through time: what every forward step reads and writes besides its gates.

    The outputs are the states, and share their memory, unless a residual or a mask makes them differ, or there is one
    step, whose state is returned as it is.
    """

    def __init__(self, run: Run, h: States, x: Any) -> None:
        self.run, self.h, self.x = run, h, x
        self.differ = x is not None or run.mask is not None or run.time == 1
        self.outputs = run.empty(run.time, run.batch, run.units) if self.differ else h.after()
        self.dropped: Any = None
        if run.recurrent_mask is not None:
            self.dropped = run.xp.multiply(h.each[0], run.recurrent_mask)
        self._output: Any = None

    def arrays(self) -> tuple[Any, ...]:
        """Return the arrays of all steps that `fields` takes from; they begin with one that is there."""
        return self.outputs, *self.h.each[:2], self.x, self.run.recurrent_mask, self.dropped

    def entering(self, t: int) -> Any:
        """Return what of the state (N, U) enters the product of step `t`."""
        return self.h.each[t] if self.dropped is None else self.dropped

    def fields(self, t: int) -> dict[str, Any]:
        """Return the kernel's pointers that every forward step ends with; to be asked for in order."""
        run, previous = self.run, self._output
        drops = self.dropped is not None and t < run.time - 1
        self._output = self.outputs[t] if self.differ else None
        return {
            "h": self.h.each[t],
            "new_h": self.h.each[t + 1],
            "output": self._output,
            "x": None if self.x is None else self.x[t],
            "mask": None if run.mask is None else run.mask[t],
            "previous": None if run.mask is None or run.zero else previous,
            "recurrent_mask": run.recurrent_mask if drops else None,
            "dropped": self.dropped if drops else None,
        }


class Return:
    """The way back through time: the gradient by h that one step leaves to the step before.

    `around` says that something goes around the product at every step (GRU), not only where a row skips its step. Then
    the product is added to `carry`, unless a dropout mask of the state has to multiply it first.
    """

    def __init__(self, run: Run, d_h_last: Any, d_outputs: Any, residual: bool, around: bool) -> None:
        self.run, self.around, self.d_outputs = run, around, d_outputs
        masked = run.mask is not None
        self.carry = run.cotangent_or_zeros(d_h_last)
        self.adds = around and run.recurrent_mask is None
        self.d_h: Any = None if self.adds else run.xp.empty_like(self.carry)
        self.pending: Any = run.xp.empty_like(self.carry) if masked and not run.zero else None
        self._later: Any = None
        self.d_counted: Any = run.empty(run.time, run.batch, run.units) if masked and residual else None
        self.added = (d_outputs if self.d_counted is None else self.d_counted) if residual else None

    def arrays(self) -> tuple[Any, ...]:
        """Return the arrays of all steps that `fields` takes from."""
        return self.carry, self.d_h, self.pending, self.d_outputs, self.d_counted, self.run.recurrent_mask

    def fields(self, t: int) -> dict[str, Any]:
        """Return the kernel's pointers that every backward step starts with; to be asked for from the last step on.

        The last step has no product yet.
        """
        run, last, later = self.run, t == self.run.time - 1, self._later
        masked = run.mask is not None
        self._later = run.mask[t] if masked else None
        return {
            "d_h": None if last else self.d_h,
            "recurrent_mask": None if last else run.recurrent_mask,
            "d_output": None if self.d_outputs is None else self.d_outputs[t],
            "mask": self._later,
            "later": later,
            "carry": self.carry if last or masked or self.around else None,
            "pending": self.pending,
            "d_counted": None if self.d_counted is None else self.d_counted[t],
        }

    def through(self, d_sums: Any, transposed: Any) -> None:
        """Send a step's gradients through the product with the recurrent weights."""
        self.run.product(d_sums, transposed, self.carry if self.adds else self.d_h, self.adds)

    def first(self) -> Any:
        """Return the gradient of h0 after the loop."""
        return self.run.own(self._first())

    def _first(self) -> Any:
        run = self.run
        if self.adds or not run.time:
            return self.carry
        d_h = self.d_h if run.recurrent_mask is None else self.d_h * run.recurrent_mask
        if self.around:
            return d_h + self.carry
        return d_h if run.mask is None else run.xp.where(run.mask[0][:, None], d_h, self.carry)
