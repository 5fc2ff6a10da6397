// out = x + y for up to 32 pairs of arrays of one dtype in ONE launch (the leaves of a nested structure of states).
//
// Traffic: 3 E s bytes for E elements of s bytes: x and y are read once, out is written once. All three are streamed.
// Layout: every leaf is contiguous; its shape does not matter. 16-byte accesses where a leaf's three addresses allow it
//   (bit i of `vectors`), with the last few elements one by one; element accesses for the other leaves.
// Grid: 1-D; leaf i owns the blocks first_block[i] .. first_block[i + 1] - 1. Block: 256 threads, STEPS vectors of x and
//   of y per thread, all of which are asked for before the first is waited for; neighbouring threads on neighbouring
//   vectors. STEPS is 4, and 2 or 1 where the grid would be too small for the device. No shared memory.
// Arithmetic: float for 16-bit and 32-bit storage, double for 64-bit; one rounding to the storage type.
// Deterministic: every element is computed by one thread.
// Source: the residual connection of tf.nn.RNNCellResidualWrapper, output = cell(x) + x.

template <int N>
__device__ __forceinline__ void add_neighbours(const neighbours<N, STORAGE>& x, const neighbours<N, STORAGE>& y,
                                               STORAGE* out) {
    accumulate_t<STORAGE> a[N], b[N];
    widen(x, a);
    widen(y, b);
#pragma unroll
    for (int i = 0; i < N; ++i) a[i] += b[i];
    store<N, cache::streaming>(out, a);
}

// COUNT packets of N elements, `stride` packets apart from `first`, but for those from `packets` on; a WHOLE part has none.
template <int N, int COUNT, bool WHOLE>
__device__ __forceinline__ void add_packets(const STORAGE* x, const STORAGE* y, STORAGE* out, int64 first, int64 stride,
                                            int64 packets) {
    neighbours<N, STORAGE> a[COUNT], b[COUNT];
#pragma unroll
    for (int step = 0; step < COUNT; ++step) {
        const int64 packet = first + step * stride;
        if (WHOLE || packet < packets) {
            fetch<N, cache::streaming>(x + packet * N, a[step]);
            fetch<N, cache::streaming>(y + packet * N, b[step]);
        }
    }
#pragma unroll
    for (int step = 0; step < COUNT; ++step) {
        const int64 packet = first + step * stride;
        if (WHOLE || packet < packets) add_neighbours<N>(a[step], b[step], out + packet * N);
    }
}

// One block's part of a leaf: STEPS times blockDim packets of N elements; the first block also takes the fewer than N
// elements behind the last whole packet.
template <int N>
__device__ __forceinline__ void add_part(const STORAGE* x, const STORAGE* y, STORAGE* out, int64 count, int64 part) {
    const int64 packets = count / N, threads = static_cast<int64>(blockDim.x);
    const int64 first = part * STEPS * threads + threadIdx.x;
    if ((part + 1) * STEPS * threads <= packets) {
        add_packets<N, STEPS, true>(x, y, out, first, threads, packets);
    } else {
        add_packets<N, STEPS, false>(x, y, out, first, threads, packets);
    }
    if (N > 1) {
        const int64 behind = packets * N + first;
        if (part == 0 && behind < count) add_packets<1, 1, false>(x, y, out, behind, 1, count);
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
