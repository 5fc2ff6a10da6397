// The gradient of a selection: rows that were selected from one place are added up, in the order they were selected in.
//
//   out[p][c] = sum over i = 0, 1, 2, ... with places[i] = p of rows[order[i]][c];  places ascend, `order` sorts the rows
//   stably by them. Rows of `out` that no place names are not touched: the caller clears it.
//
// Traffic for n rows of w elements of s bytes: n w s bytes of rows are read once and 8 bytes of `order` and `places` for
//   each element come from the caches; each named row of `out` is written once.
// Layout: all contiguous; `rows` (n, w), `order` and `places` (n,), `out` (any number of rows, w).
// Grid: 1-D over the n w elements, 256 threads per block, neighbouring threads on neighbouring columns. The threads of
//   the first row of a place add up all of its rows; the others have nothing to do. No shared memory.
// Arithmetic: float for 16-bit and 32-bit storage, double for 64-bit; one rounding to the storage type.
// Deterministic: one thread adds up an element, front to back. No atomics.

GL_KERNEL(gl_add_rows, 256) {
    const int64 element = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (element >= arguments.count * arguments.width) return;
    int64 row = element / arguments.width;
    const int64 column = element - row * arguments.width;
    const int64 place = arguments.places[row];
    if (row > 0 && arguments.places[row - 1] == place) return;
    accumulate_t<STORAGE> sum = 0;
    do {
        sum += widen(arguments.rows[arguments.order[row] * arguments.width + column]);
        ++row;
    } while (row < arguments.count && arguments.places[row] == place);
    arguments.out[place * arguments.width + column] = narrow<STORAGE>(sum);
}
