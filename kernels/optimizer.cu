// One optimizer step for ALL parameters of a dtype in one launch: SGD, SGD with momentum or Nesterov's, Adam and AdamW.
//
//   gl_sgd:       w -= rate g
//   gl_momentum:  b <- momentum b + g;  w -= rate b, or with Nesterov's w -= rate (g + momentum b)
//   gl_adam:      m <- m + (1 - beta_1) (g - m);  v <- v + (1 - beta_2) (g^2 - v);
//                 w -= rate m / (sqrt(v) + epsilon) + decay w       (the host put the bias correction into the rate)
//   The numbers of a rule come by value, or, in a step that is replayed as a CUDA graph, from `given` in device memory,
//   which gl_store_numbers fills before each replay: a graph repeats its arguments, and the rate changes.
// and for clipping, gl_global_norm: out = sqrt(sum of g^2 over all gradients), in two stages of fixed order.
//
// Traffic per element of s bytes (gradient of t bytes, slots of 4 bytes, 8 for float64): every array is read once and all
//   but the gradient are written once: 2s + t, 2s + t + 8 and 2s + t + 16 (float32: 12, 20 and 28 bytes). The norm: t.
//   Gradients are streamed, slots are written as what nobody reads before the next step; parameters stay in the caches.
// Layout: every array is contiguous; its shape does not matter. `table` in device memory holds one row per tensor, then
//   one word per chunk of 4096 elements (number of the tensor in the upper half, of the chunk in the lower). It stays the
//   same from step to step. The gradients' addresses change, so they come by value in the argument struct.
//   16-byte accesses where all addresses of a tensor allow it, with the last few elements one by one; else element
//   accesses for that tensor. Chunks start at multiples of 16 bytes from the tensor's first element.
// Grid: one block per chunk; the norm has at most 6 per multiprocessor, which it holds at a time, and each of them takes
//   every gridDim-th chunk. Block: 256 threads, neighbouring threads on neighbouring vectors. Shared memory: none but the
//   norm's 32 partial sums.
// Arithmetic: float for 16-bit and 32-bit parameters, double for 64-bit; one rounding to the parameter's type. The norm
//   adds squares in double; for a norm in float the 8 of one vector of float16, which are exact in float, in float: a
//   relative error of at most 3 2^-24 in their sum, half of that in the norm.
// Deterministic: every element is computed by one thread; the norm's last block adds the blocks' sums in a fixed order,
//   which is the same on every run on devices with as many multiprocessors.
// Source: the update rules of tf.keras.optimizers; Sutskever et al. 2013; Kingma and Ba 2015, the form before section
//   2.1; Loshchilov and Hutter 2019, algorithm 2. One launch over a list of tensors: the multi-tensor-apply idea of Apex.

constexpr int64 chunk_elements = 4096;

// ---- where a block works -------------------------------------------------------------------------------------------

// What an entry of the chunk list says, which stands behind `rows` rows of `words` words each.
struct place {
    int32 tensor;
    int64 start;
    __device__ __forceinline__ explicit place(uint64 entry) {
        tensor = static_cast<int32>(entry >> 32);
        start = static_cast<int64>(entry & 0xffffffffu) * chunk_elements;
    }
};

__device__ __forceinline__ int32 elements_here(int64 count, int64 start) {
    return static_cast<int32>(count - start < chunk_elements ? count - start : chunk_elements);
}

__device__ __forceinline__ uint64 address_bits(const void* address) { return reinterpret_cast<uint64>(address); }

// N neighbours, N a multiple of the 16-byte width or 1.
template <int N, cache HINT, typename T, typename A>
__device__ __forceinline__ void load_run(const T* address, A (&values)[N]) {
    constexpr int width = N == 1 ? 1 : vector_width<T>;
    static_assert(N % width == 0, "a run is whole vectors");
#pragma unroll
    for (int part = 0; part < N; part += width) {
        A piece[width];
        load<width, HINT>(address + part, piece);
#pragma unroll
        for (int i = 0; i < width; ++i) values[part + i] = piece[i];
    }
}

template <int N, cache HINT, typename T, typename A>
__device__ __forceinline__ void store_run(T* address, const A (&values)[N]) {
    constexpr int width = N == 1 ? 1 : vector_width<T>;
#pragma unroll
    for (int part = 0; part < N; part += width) {
        A piece[width];
#pragma unroll
        for (int i = 0; i < width; ++i) piece[i] = values[part + i];
        store<width, HINT>(address + part, piece);
    }
}

#if defined(GL_ENTRY_gl_store_numbers)
// ---- numbers for a replay ------------------------------------------------------------------------------------------

GL_KERNEL(gl_store_numbers, 32) {
    const int32 which = static_cast<int32>(threadIdx.x);
    if (which < arguments.count) arguments.out[which] = arguments.numbers[which];
}

#elif !defined(GL_ENTRY_gl_global_norm)
// ---- updates -------------------------------------------------------------------------------------------------------

typedef accumulate_t<PARAMETER> real;

// A row of the table; `first` and `second` are null where a rule has no such slot. `decays` is 0 for a parameter that is
// left out of weight decay, else 1.
struct tensor_row {
    PARAMETER* parameter;
    real* first;
    real* second;
    int64 decays;
    int64 count;
};
constexpr int32 row_words = 5;

template <typename ARGUMENTS>
__device__ __forceinline__ real number(const ARGUMENTS& arguments, int32 which) {
    if (arguments.given != nullptr) return static_cast<real>(arguments.given[which]);
    if constexpr (sizeof(real) == 4) {
        return arguments.numbers[which];
    } else {
        return arguments.wide_numbers[which];
    }
}

template <int SLOTS, int N, typename RULE>
__device__ __forceinline__ void update_run(const tensor_row& row, const GRADIENT* gradient, int64 at, const RULE& rule) {
    real w[N], g[N], first[N], second[N];
    load_run<N, cache::streaming>(gradient + at, g);
    load_run<N, cache::keep>(row.parameter + at, w);
    if constexpr (SLOTS > 0) load_run<N, cache::keep>(row.first + at, first);
    if constexpr (SLOTS > 1) load_run<N, cache::keep>(row.second + at, second);
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] -= rule.step(w[i], g[i], first[i], second[i]);
    store_run<N, cache::keep>(row.parameter + at, w);
    if constexpr (SLOTS > 0) store_run<N, cache::streaming>(row.first + at, first);
    if constexpr (SLOTS > 1) store_run<N, cache::streaming>(row.second + at, second);
}

template <int SLOTS, int N, typename RULE>
__device__ __forceinline__ void update_part(const tensor_row& row, const GRADIENT* gradient, int64 start,
                                            const RULE& rule) {
    const int32 count = elements_here(row.count, start), whole = count / N * N;
    for (int32 at = static_cast<int32>(threadIdx.x) * N; at < whole; at += static_cast<int32>(blockDim.x) * N) {
        update_run<SLOTS, N>(row, gradient, start + at, rule);
    }
    if (N > 1) {
        const int32 behind = whole + static_cast<int32>(threadIdx.x);
        if (behind < count) update_run<SLOTS, 1>(row, gradient, start + behind, rule);
    }
}

// What one block does. RULE::begin sees the row; RULE::step returns what is taken off the parameter and changes the slots.
template <int SLOTS, typename RULE, typename ARGUMENTS>
__device__ __forceinline__ void update_chunk(const ARGUMENTS& arguments, RULE rule) {
    const place here(arguments.table[arguments.rows * row_words + blockIdx.x]);
    const tensor_row row = reinterpret_cast<const tensor_row*>(arguments.table)[here.tensor];
    rule.begin(row);
    const GRADIENT* const gradient = arguments.gradients[here.tensor];
    const uint64 bits = address_bits(gradient) | address_bits(row.parameter) | address_bits(row.first) |
                        address_bits(row.second);
    if (bits % 16u == 0u) {
        constexpr int wide = vector_width<PARAMETER> > vector_width<GRADIENT> ? vector_width<PARAMETER>
                                                                              : vector_width<GRADIENT>;
        update_part<SLOTS, wide>(row, gradient, here.start, rule);
    } else {
        update_part<SLOTS, 1>(row, gradient, here.start, rule);
    }
}

#if defined(GL_ENTRY_gl_sgd)
struct sgd_rule {
    real rate;
    __device__ __forceinline__ void begin(const tensor_row&) {}
    __device__ __forceinline__ real step(real, real g, real&, real&) const { return rate * g; }
};

GL_KERNEL(gl_sgd, 256) { update_chunk<0>(arguments, sgd_rule{number(arguments, 0)}); }
#endif

#if defined(GL_ENTRY_gl_momentum)
struct momentum_rule {
    real rate, momentum;
    bool nesterov;
    __device__ __forceinline__ void begin(const tensor_row&) {}
    __device__ __forceinline__ real step(real, real g, real& b, real&) const {
        b = b * momentum + g;
        return rate * (nesterov ? b * momentum + g : b);
    }
};

// Four blocks a multiprocessor: left alone, the compiler for sm_100 stops at 48 registers and spills one.
GL_KERNEL(gl_momentum, 256, 4) {
    update_chunk<1>(arguments, momentum_rule{number(arguments, 0), number(arguments, 1), arguments.nesterov != 0});
}
#endif

#if defined(GL_ENTRY_gl_adam)
struct adam_rule {
    real rate, keep_1, keep_2, epsilon, decay;  // keep_i = 1 - beta_i, formed on the host in double
    __device__ __forceinline__ void begin(const tensor_row& row) {
        if (row.decays == 0) decay = real(0);
    }
    __device__ __forceinline__ real step(real w, real g, real& m, real& v) const {
        m += (g - m) * keep_1;
        v += (g * g - v) * keep_2;
        const real moved = m / (sqrt(v) + epsilon) * rate;
        return decay != real(0) ? moved + w * decay : moved;  // 0 times an infinite parameter is no 0
    }
};

GL_KERNEL(gl_adam, 256) {
    update_chunk<2>(arguments, adam_rule{number(arguments, 0), number(arguments, 1), number(arguments, 2),
                                         number(arguments, 3), number(arguments, 4)});
}
#endif

#else
// ---- the length of all gradients -----------------------------------------------------------------------------------

// What a vector's squares are added in. Those of float16 have 22 bits and lie between 2^-48 and 2^32.
template <typename FROM, typename TO> struct square_of { typedef double type; };
template <> struct square_of<float16, float32> { typedef float type; };
typedef typename square_of<GRADIENT, NORM>::type square;

// The sum over a vector, in pairs of pairs: short chains of dependent additions, and few roundings.
template <int N>
__device__ __forceinline__ double squares(const neighbours<N, GRADIENT>& packet) {
    accumulate_t<GRADIENT> g[N];
    widen(packet, g);
    square s[N];
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] = static_cast<square>(g[i]) * static_cast<square>(g[i]);
#pragma unroll
    for (int half = N / 2; half > 0; half /= 2) {
#pragma unroll
        for (int i = 0; i < half; ++i) s[i] += s[i + half];
    }
    return static_cast<double>(s[0]);
}

template <int N>
__device__ __forceinline__ double squares(const GRADIENT* gradient) {
    neighbours<N, GRADIENT> packet;
    fetch<N, cache::streaming>(gradient, packet);
    return squares<N>(packet);
}

constexpr int threads = 256;

// A whole chunk: every thread has its loads under way before it waits for the first.
__device__ __forceinline__ double whole_chunk(const GRADIENT* chunk) {
    constexpr int width = vector_width<GRADIENT>, count = chunk_elements / (threads * width);
    neighbours<width, GRADIENT> packets[count];
#pragma unroll
    for (int i = 0; i < count; ++i) {
        fetch<width, cache::streaming>(chunk + (i * threads + static_cast<int32>(threadIdx.x)) * width, packets[i]);
    }
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < count; ++i) sum += squares<width>(packets[i]);
    return sum;
}

template <int N>
__device__ __forceinline__ double part_of_sum(const GRADIENT* chunk, int32 count) {
    const int32 whole = count / N * N;
    double sum = 0.0;
    for (int32 at = static_cast<int32>(threadIdx.x) * N; at < whole; at += threads * N) sum += squares<N>(chunk + at);
    const int32 behind = whole + static_cast<int32>(threadIdx.x);
    if (N > 1 && behind < count) sum += squares<1>(chunk + behind);
    return sum;
}

// Rows are one word: the number of elements. The launch with `out` is the last one over these partial sums: its last
// block adds those of all launches.
GL_KERNEL(gl_global_norm, 256, 6) {  // as many blocks as the host starts
    const uint64* const entries = arguments.table + arguments.rows;
    double sum = 0.0;
    uint64 entry = entries[blockIdx.x];
    for (int64 chunk = blockIdx.x; chunk < arguments.chunks; chunk += gridDim.x) {
        const place here(entry);
        if (chunk + gridDim.x < arguments.chunks) entry = entries[chunk + gridDim.x];  // on its way while this one is summed
        const GRADIENT* const gradient = arguments.gradients[here.tensor];
        const int32 count = elements_here(static_cast<int64>(arguments.table[here.tensor]), here.start);
        if (address_bits(gradient) % 16u != 0u) {
            sum += part_of_sum<1>(gradient + here.start, count);
        } else if (count == chunk_elements) {
            sum += whole_chunk(gradient + here.start);
        } else {
            sum += part_of_sum<vector_width<GRADIENT>>(gradient + here.start, count);
        }
    }
    sum = block_sum(sum);
    double* const sums = reinterpret_cast<double*>(arguments.sums);
    if (threadIdx.x == 0) sums[arguments.sums_before + blockIdx.x] = sum;
    if (arguments.out == nullptr || !last_block(arguments.counters, gridDim.x)) return;
    const int64 all = arguments.sums_before + gridDim.x;
    sum = 0.0;
    for (int64 i = threadIdx.x; i < all; i += threads) sum += sums[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *arguments.out = narrow<NORM>(sqrt(sum));
}
#endif
