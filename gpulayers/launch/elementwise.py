"""One-line kernels: a body per element, put into a generated loop that the GPU and the host build compile alike.

CuPy's own ElementwiseKernel would do, but its generated code cannot run on the test bench; here what is tested is what
runs, and 16-byte accesses come for free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpulayers.device import array_module
from gpulayers.dtypes import dtype_name
from gpulayers.errors import DTypeError, KernelError, ShapeError, message
from gpulayers.launch.kernel import Kernel, vector_width
from gpulayers.launch.launcher import contiguous, device_properties

__all__ = ["Elementwise"]

_THREADS, _BLOCKS_PER_MULTIPROCESSOR = 256, 8
_FLOATS = ("float16", "bfloat16", "float32", "float64")

_LOOP = """
// Generated: one pass, every input read once and every output written once; a grid-stride loop over packets of one
// element or 16 bytes, the elements behind the last whole packet one by one.
template <int N>
__device__ __forceinline__ void {name}_packet(const {name}_arguments& arguments, int64 first) {{
    typedef accumulate_t<STORAGE> A;
{loads}
#pragma unroll
    for (int i = 0; i < N; ++i) {{
{reads}
        {body}
{writes}
    }}
{stores}
}}

GL_KERNEL({name}, {threads}) {{
    constexpr int width = VECTOR ? vector_width<STORAGE> : 1;
    const int64 packets = arguments.count / width, step = static_cast<int64>(gridDim.x) * blockDim.x;
    const int64 mine = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (int64 packet = mine; packet < packets; packet += step) {name}_packet<width>(arguments, packet * width);
    if (width > 1 && packets * width + mine < arguments.count) {name}_packet<1>(arguments, packets * width + mine);
}}
"""


class Elementwise:
    """A kernel given by what happens to one element.

    Parameters
    ----------
    name: entry point.
    inputs, outputs: names of the arrays, which have one shape and one dtype.
    body: C statements that read the inputs and `scalars` and assign the outputs, all of type ``A``: float for 16-bit
        and 32-bit storage, double for 64-bit. Results are rounded once.
    scalars: names of host numbers.
    dtypes: storage dtypes to compile for.
    listed: as for `Kernel`.

    Calling it with the input arrays and the scalars by name returns the output, or a tuple of outputs.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        body: str,
        scalars: Sequence[str] = (),
        dtypes: Sequence[str] = _FLOATS,
        listed: bool = True,
    ) -> None:
        self.name, self.inputs, self.outputs, self.scalars = name, tuple(inputs), tuple(outputs), tuple(scalars)
        self.dtypes = tuple(dtypes)
        text = _LOOP.format(
            name=name,
            threads=_THREADS,
            body=body,
            loads="\n".join(
                [f"    A {x}_values[N]; load<N>(arguments.{x} + first, {x}_values);" for x in self.inputs]
                + [f"    A {x}_values[N];" for x in self.outputs]
            ),
            reads="\n".join(
                [f"        const A {x} = {x}_values[i];" for x in self.inputs]
                + [f"        const A {x} = static_cast<A>(arguments.{x});" for x in self.scalars]
                + [f"        A {x};" for x in self.outputs]
            ),
            writes="\n".join(f"        {x}_values[i] = {x};" for x in self.outputs),
            stores="\n".join(f"    store<N>(arguments.{x} + first, {x}_values);" for x in self.outputs),
        )
        arguments = [(x, "const STORAGE*") for x in self.inputs] + [(x, "STORAGE*") for x in self.outputs]
        arguments += [(x, "float64") for x in self.scalars] + [("count", "int64")]
        defines = {"STORAGE": self.dtypes, "VECTOR": (True, False)}
        self.kernel = Kernel("", name, arguments, defines=defines, body=text, listed=listed)

    def __call__(self, *arrays: Any, **scalars: float) -> Any:
        """Return the outputs for these inputs.

        Raises ShapeError or DTypeError if the arrays differ, KernelError for a wrong number of arrays or scalars.
        """
        if len(arrays) != len(self.inputs) or set(scalars) != set(self.scalars):
            expected, got = (*self.inputs, *self.scalars), f"{len(arrays)} arrays and {sorted(scalars)}"
            raise KernelError(message(self.name, "wrong arguments", expected, got))
        first = arrays[0]
        if any(array.shape != first.shape for array in arrays):
            raise ShapeError(message(self.name, "shapes differ", first.shape, [array.shape for array in arrays]))
        if dtype_name(first.dtype) not in self.dtypes or any(array.dtype != first.dtype for array in arrays):
            names = [array.dtype.name for array in arrays]
            raise DTypeError(message(self.name, "no kernel for these dtypes", self.dtypes, names))
        module = array_module(first)
        results = [module.ndarray(first.shape, first.dtype) for _ in self.outputs]
        if first.size:
            given = contiguous(*arrays)
            width = vector_width([*given, *results])
            most = _BLOCKS_PER_MULTIPROCESSOR * device_properties(first).multiprocessors
            values = dict(zip((*self.inputs, *self.outputs), (*given, *results), strict=True))
            self.kernel.launch(
                {**values, **scalars, "count": first.size},
                grid=(min(-(-first.size // (_THREADS * width)), most),),
                block=(_THREADS,),
                defines={"STORAGE": first.dtype, "VECTOR": width > 1},
            )
        return results[0] if len(results) == 1 else tuple(results)
