// out = x + y for up to 32 pairs of arrays of one dtype in ONE launch (the leaves of a nested structure of states).
//
// Traffic: 3 E s bytes for E elements of s bytes: x and y are read once, out is written once. All three are streamed.
// Layout: every leaf is contiguous; its shape does not matter. 16-byte accesses where a leaf's three addresses allow it
//   (bit i of `vectors`), with the last few elements one by one; element accesses for the other leaves.
// Grid: 1-D; leaf i owns the blocks first_block[i] .. first_block[i + 1] - 1. Block: 256 threads, 4 vectors per thread,
//   neighbouring threads on neighbouring vectors. No shared memory.
// Arithmetic: float for 16-bit and 32-bit storage, double for 64-bit; one rounding to the storage type.
// Deterministic: every element is computed by one thread.
// Source: the residual connection of tf.nn.RNNCellResidualWrapper, output = cell(x) + x.

constexpr int32 steps = 4;

template <int N>
__device__ __forceinline__ void add_neighbours(const STORAGE* x, const STORAGE* y, STORAGE* out) {
    typedef accumulate_t<STORAGE> A;
    A a[N], b[N];
    load<N, cache::streaming>(x, a);
    load<N, cache::streaming>(y, b);
#pragma unroll
    for (int i = 0; i < N; ++i) a[i] += b[i];
    store<N, cache::streaming>(out, a);
}

// One block's part of a leaf: `steps` times blockDim packets of N elements; the first block also takes the fewer than N
// elements behind the last whole packet.
template <int N>
__device__ __forceinline__ void add_part(const STORAGE* x, const STORAGE* y, STORAGE* out, int64 count, int64 part) {
    const int64 packets = count / N;
    const int64 first = part * steps * static_cast<int64>(blockDim.x) + threadIdx.x;
#pragma unroll
    for (int32 step = 0; step < steps; ++step) {
        const int64 packet = first + step * static_cast<int64>(blockDim.x);
        if (packet < packets) add_neighbours<N>(x + packet * N, y + packet * N, out + packet * N);
    }
    if (N > 1) {
        const int64 behind = packets * N + first;
        if (part == 0 && behind < count) add_neighbours<1>(x + behind, y + behind, out + behind);
    }
}

__device__ __forceinline__ void add_leaf(const STORAGE* x, const STORAGE* y, STORAGE* out, int64 count, int64 part,
                                         bool vector) {
    if (vector) {
        add_part<vector_width<STORAGE>>(x, y, out, count, part);
    } else {
        add_part<1>(x, y, out, count, part);
    }
}

// One pair, the usual case: no table to pack on the host.
#if defined(GL_ENTRY_gl_residual_add)
GL_KERNEL(gl_residual_add, 256) {
    add_leaf(arguments.x, arguments.y, arguments.out, arguments.count, blockIdx.x, arguments.vector != 0);
}
#endif

#if defined(GL_ENTRY_gl_residual_add_leaves)
GL_KERNEL(gl_residual_add_leaves, 256) {
    int32 leaf = 0;
    while (leaf + 1 < arguments.leaves && static_cast<int32>(blockIdx.x) >= arguments.first_block[leaf + 1]) ++leaf;
    add_leaf(arguments.x[leaf], arguments.y[leaf], arguments.out[leaf], arguments.counts[leaf],
             static_cast<int64>(blockIdx.x) - arguments.first_block[leaf], (arguments.vectors >> leaf) & 1u);
}
#endif
