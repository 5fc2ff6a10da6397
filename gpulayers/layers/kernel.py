"""What layers with a kernel and a bias share: their settings, making the two variables, the activation at the end."""

from __future__ import annotations

from typing import Any

from gpulayers import constraints, initializers, ops, regularizers
from gpulayers.dtypes import TensorShape, as_dtype, is_floating
from gpulayers.errors import DTypeError, ShapeError, message
from gpulayers.layers.config_part import as_shape_structure
from gpulayers.layers.core import CoreLayer
from gpulayers.ops.windows import Window, out_size

__all__ = ["KernelMixin", "checked_count", "one_shape", "window_places"]


class KernelMixin(CoreLayer):
    """Settings of a kernel, a bias and an activation, for both families."""

    kernel: Any
    bias: Any

    def __init__(
        self,
        *,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.activation = ops.activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.kernel_regularizer = regularizers.get(kernel_regularizer)
        self.bias_regularizer = regularizers.get(bias_regularizer)
        self.kernel_constraint = constraints.get(kernel_constraint)
        self.bias_constraint = constraints.get(bias_constraint)

    def _make_kernel(self, shape: tuple[int, ...]) -> None:
        """Make `kernel` of this shape, and `bias` as long as its last axis. Raises TypeError for an integer dtype."""
        dtype = as_dtype(self.dtype or "float32")
        if not is_floating(dtype) and dtype.kind != "c":
            raise DTypeError(
                message(
                    self._name,
                    "cannot be built for this dtype",
                    "a floating dtype",
                    dtype.name,
                    "Cast the input first: gl.cast(x, gl.float32).",
                )
            )
        self.kernel = self.add_weight(
            "kernel",
            shape,
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
            trainable=True,
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                "bias",
                shape[-1:],
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
                trainable=True,
            )

    def _in_compute_dtype(self, inputs: Any) -> Any:
        """Return the inputs in the dtype of the kernel: both families cast here, integers too."""
        dtype = as_dtype(self.compute_dtype or "float32")
        return inputs if inputs.dtype == dtype else ops.cast(inputs, dtype)

    def _activated(self, outputs: Any) -> Any:
        """Return the activation of `outputs`; without one they are the result themselves."""
        return outputs if self.activation is ops.activations.linear else self.activation(outputs)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        config: dict[str, Any] = {"activation": ops.activations.serialize(self.activation), "use_bias": self.use_bias}
        for part in ("kernel", "bias"):
            config[f"{part}_initializer"] = initializers.serialize(getattr(self, f"{part}_initializer"))
        for part in ("kernel", "bias"):
            config[f"{part}_regularizer"] = regularizers.serialize(getattr(self, f"{part}_regularizer"))
        config["activity_regularizer"] = regularizers.serialize(self.activity_regularizer)
        for part in ("kernel", "bias"):
            config[f"{part}_constraint"] = constraints.serialize(getattr(self, f"{part}_constraint"))
        return {**super().get_config(), **config}


def checked_count(name: str, what: str, value: Any) -> int:
    """Return a positive integer. Raises TypeError for another type, ValueError for another size."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        if not (isinstance(value, float) and value.is_integer()):
            raise DTypeError(message(name, f"{what} is not an integer", "a positive integer", repr(value)))
    if int(value) <= 0:
        raise ShapeError(message(name, f"Received an invalid value for `{what}`", "a positive integer", value))
    return int(value)


def one_shape(name: str, input_shape: Any, ranks: range | None = None) -> TensorShape:
    """Return a layer's single input shape as a `TensorShape`.

    Raises TypeError for something that is no shape or several shapes, ValueError for unknown rank or one outside
    `ranks`.
    """
    shape = as_shape_structure(input_shape, name)
    if not isinstance(shape, TensorShape):
        raise DTypeError(message(name, "takes one input", "one shape", repr(input_shape)))
    if shape.rank is None:
        raise ShapeError(message(name, "the shape is incomplete", "a known rank", shape))
    if ranks is not None and shape.rank not in ranks:
        wanted = f"{ranks.start}" if len(ranks) == 1 else f"{ranks.start} or more"
        raise ShapeError(message(name, "the rank does not fit", f"{wanted} axes", shape))
    return shape


def window_places(name: str, sizes: Any, window: Window) -> list[int | None]:
    """Return how many places a layer's window has along each spatial axis; None where the size is not known.

    Raises ValueError where it is longer than the input, dilation counted, and nothing is padded: nothing would be left.
    """
    sizes = list(sizes)
    reach = [(kernel - 1) * gap + 1 for kernel, gap in zip(window.size, window.dilation, strict=True)]
    if window.padding == "valid" and any(n is not None and n < r for n, r in zip(sizes, reach, strict=True)):
        raise ShapeError(
            message(
                name,
                "the window is longer than the input",
                f"sizes of at least {reach}",
                sizes,
                "Use padding='same' or a smaller window.",
            )
        )
    rows = zip(sizes, window.size, window.strides, window.dilation, strict=True)
    return [out_size(*row, window.padding) for row in rows]
