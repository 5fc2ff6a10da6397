// One time step of the recurrent cells' elementwise work, forward and backward: LSTM, GRU in both forms, simple RNN.
// The bias, the residual add, masks and (backward) the sums of cotangents are part of the same launch.
//
// Layout: rows are the batch N, a row has U hidden values. A step's gate buffer is (N, G*U), each gate U neighbouring
//   columns, so a step reads and writes G separate coalesced streams. LSTM: 4 gates in the order the caller says; GRU
//   with the reset after the product: z, r, c = the state's part of the candidate, a = the inputs' part; GRU with the
//   reset before it: z, r, candidate; simple RNN: the buffer is where h' will be. The matmul has added the step's
//   product to the inputs' in this buffer, without the bias; nothing but d_gates is ever written to gates again, because
//   the backward pass computes the activations from these sums a second time.
// All arrays are contiguous. Null pointers leave a part out.
// Traffic of a counted step in values per (row, hidden value), s bytes each. Biases are a row for the whole batch and
//   masks one byte a row: they stay in cache. Nothing below is moved twice, so these are the floors of the launches.
//     LSTM forward          reads 4 gates, c; writes c', h'                                       7   (+ x, output: 9)
//     LSTM backward         reads 4 gates, c, dc, dh, d_output; writes 4 d_gates, dc             13
//     GRU after, forward    reads 4 sums, h; writes h'                                            6   (+ x, output: 8)
//     GRU after, backward   reads 4 sums, h, carry, d_output; writes 4 d_sums, carry             12
//     GRU before, forward   reads r, h; writes r h | reads z, n, h; writes h'                 3 + 4   (+ x, output: 9)
//     GRU before, backward  reads z, n, h, carry, d_output; writes dz, dn, carry
//                           | reads q, r, h, carry; writes dr, carry                          8 + 6
//     simple RNN forward    reads the sum; writes h' over it                                      2   (+ x, output: 4)
//     simple RNN backward   reads h', dh, d_output; writes d_sum                                  4
//   What goes around a GRU's product stays in `carry`, to which the matmul adds; LSTM and simple RNN have such a thing
//   for rows that skipped the step only. A mask adds h of skipped rows and, without residual, the output, since it then
//   differs from h'; skipped rows read no gates. A recurrent dropout mask adds itself and, for GRU, the product apart.
// Access: 16 bytes per stream and thread where U is a multiple of that many values and every address allows it
//   (`vectors`), else one value per thread.
// Grid: 1-D, one packet of a row per thread; block: 64, 128 or 256 threads, so that small steps reach all
//   multiprocessors. No shared memory, no atomics.
// Arithmetic: float for 16-bit and 32-bit storage, double for 64-bit; rounded once to the storage type.
// Deterministic: every value is computed by one thread.
// Source: Hochreiter and Schmidhuber 1997, Gers et al. 2000 (LSTM); Cho et al. 2014 (GRU, reset before the product), the
//   variant with the reset after it as in cuDNN; Elman 1990. Column orders are the caller's (`order`).

typedef accumulate_t<STORAGE> A;

__device__ __forceinline__ float power_of_e(float x) { return expf(x); }
__device__ __forceinline__ double power_of_e(double x) { return exp(x); }
__device__ __forceinline__ float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ __forceinline__ double hyperbolic_tangent(double x) { return tanh(x); }

// The gate function: logistic, or clip(0.2 x + 0.5, 0, 1) if `hard`; `slope` receives its derivative.
__device__ __forceinline__ A gate(A x, int32 hard, A& slope) {
    if (hard) {
        const A y = A(0.2) * x + A(0.5);
        slope = y >= A(0) && y <= A(1) ? A(0.2) : A(0);
        return y < A(0) ? A(0) : (y > A(1) ? A(1) : y);
    }
    const A y = A(1) / (A(1) + power_of_e(-x));
    slope = y * (A(1) - y);
    return y;
}
__device__ __forceinline__ A gate(A x, int32 hard) {
    A unused;
    return gate(x, hard, unused);
}

// Where a thread works: `at` in an (N, U) array; gate k is at `row * gates * U + k * U + column`.
struct place {
    int64 row, column, at;
    bool inside;
};
template <int N>
__device__ __forceinline__ place own_place(int32 rows, int32 units) {
    const uint32 per_row = static_cast<uint32>(units) / N;
    const uint32 index = blockIdx.x * blockDim.x + threadIdx.x;
    place p;
    p.row = index / per_row;
    p.column = static_cast<int64>(index % per_row) * N;
    p.at = p.row * units + p.column;
    p.inside = p.row < rows;
    return p;
}

__device__ __forceinline__ const STORAGE* behind(const STORAGE* start, int64 offset) {
    return start ? start + offset : nullptr;
}

template <int N>
__device__ __forceinline__ void load_or_zero(const STORAGE* address, A (&values)[N]) {
    if (address) {
        load<N>(address, values);
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = A(0);
    }
}

template <int N>
__device__ __forceinline__ void store_zeros(STORAGE* address) {
    A zeros[N];
#pragma unroll
    for (int i = 0; i < N; ++i) zeros[i] = A(0);
    store<N>(address, zeros);
}

// Reads a gate's sums at `column` of row `p.row` of a buffer of `width` columns, and adds the bias where given.
template <int N, cache HINT = cache::keep>
__device__ __forceinline__ void gather(const STORAGE* sums, const STORAGE* bias, const place& p, int64 width,
                                       int64 column, A (&s)[N]) {
    load<N, HINT>(sums + p.row * width + column, s);
    if (bias) {
        A more[N];
        load<N>(bias + column, more);
#pragma unroll
        for (int i = 0; i < N; ++i) s[i] += more[i];
    }
}

template <typename ARGUMENTS>
__device__ __forceinline__ bool counts(const ARGUMENTS& arguments, const place& p) {
    return !arguments.mask || arguments.mask[p.row] != 0;
}

// Writes h' and the output, where that is not h' itself.
template <int N, typename ARGUMENTS>
__device__ __forceinline__ void finish_step(const ARGUMENTS& arguments, const place& p, A (&h)[N]) {
    store<N>(arguments.new_h + p.at, h);
    if (!arguments.output) return;
    if (arguments.x) {
        A x[N];
        load<N, cache::streaming>(arguments.x + p.at, x);
#pragma unroll
        for (int i = 0; i < N; ++i) h[i] += x[i];
    }
    store<N>(arguments.output + p.at, h);
}

// A step that does not count: h stays, the output repeats the row's previous one (zeros where `previous` is null).
template <int N, typename ARGUMENTS>
__device__ __forceinline__ void skip_step(const ARGUMENTS& arguments, const place& p) {
    A values[N];
    load<N>(arguments.h + p.at, values);
    store<N>(arguments.new_h + p.at, values);
    load_or_zero<N>(behind(arguments.previous, p.at), values);
    store<N>(arguments.output + p.at, values);
}

// Gives dh: what arrived through the product with the recurrent weights (times the dropout mask), around it, and from
// the output. `later` is the mask of the step after this one: of rows that skipped it the product is zero, and only
// they have something in `pending` and, unless it is `always` in use, in `carry`. Returns whether the step counts; where
// not, everything is handed on to the step before: dh in `carry`, the output's cotangent in `pending`.
template <int N, typename ARGUMENTS>
__device__ __forceinline__ bool gather_cotangents(const ARGUMENTS& arguments, const place& p, A (&d_h)[N]) {
    const bool on = counts(arguments, p), held = arguments.later && arguments.later[p.row] == 0;
    A part[N];
    load_or_zero<N>(held ? nullptr : behind(arguments.d_h, p.at), d_h);
    if (arguments.recurrent_mask) {
        load<N>(arguments.recurrent_mask + p.at, part);
#pragma unroll
        for (int i = 0; i < N; ++i) d_h[i] *= part[i];
    }
    if (arguments.carry && (held || arguments.always || !arguments.later)) {
        load<N>(arguments.carry + p.at, part);
#pragma unroll
        for (int i = 0; i < N; ++i) d_h[i] += part[i];
    }
    A d_output[N];
    load_or_zero<N>(behind(arguments.d_output, p.at), d_output);
    if (held && arguments.pending) {
        load<N>(arguments.pending + p.at, part);
#pragma unroll
        for (int i = 0; i < N; ++i) d_output[i] += part[i];
    }
    if (on) {
        if (arguments.d_counted) store<N>(arguments.d_counted + p.at, d_output);
#pragma unroll
        for (int i = 0; i < N; ++i) d_h[i] += d_output[i];
        return true;
    }
    store<N>(arguments.carry + p.at, d_h);
    if (arguments.pending) store<N>(arguments.pending + p.at, d_output);
    if (arguments.d_counted) store_zeros<N>(arguments.d_counted + p.at);
    return false;
}

// ---- LSTM ----------------------------------------------------------------------------------------------------------

#if defined(GL_ENTRY_gl_lstm_forward)
template <int N>
__device__ __forceinline__ void forward(const gl_lstm_forward_arguments& arguments) {
    const int64 units = arguments.units;
    const place p = own_place<N>(arguments.rows, arguments.units);
    if (!p.inside) return;
    A s[4][N], c[N], h[N];
    load<N>(arguments.c + p.at, c);
    if (!counts(arguments, p)) {
        store<N>(arguments.new_c + p.at, c);
        return skip_step<N>(arguments, p);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        gather<N>(arguments.gates, arguments.bias, p, 4 * units, arguments.order[k] * units + p.column, s[k]);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        c[i] = gate(s[1][i], arguments.hard) * c[i] + gate(s[0][i], arguments.hard) * hyperbolic_tangent(s[3][i]);
        h[i] = gate(s[2][i], arguments.hard) * hyperbolic_tangent(c[i]);
    }
    store<N>(arguments.new_c + p.at, c);
    finish_step<N>(arguments, p, h);
}
GL_KERNEL(gl_lstm_forward, 256) {
    if (arguments.vectors) forward<vector_width<STORAGE>>(arguments); else forward<1>(arguments);
}
#endif

#if defined(GL_ENTRY_gl_lstm_backward)
template <int N>
__device__ __forceinline__ void backward(const gl_lstm_backward_arguments& arguments) {
    const int64 units = arguments.units;
    const place p = own_place<N>(arguments.rows, arguments.units);
    if (!p.inside) return;
    STORAGE* d_gates = arguments.d_gates + p.row * 4 * units + p.column;
    A d_h[N], d_c[N], c[N], s[4][N];
    if (!gather_cotangents<N>(arguments, p, d_h)) {  // dc stays as it is
#pragma unroll
        for (int k = 0; k < 4; ++k) store_zeros<N>(d_gates + k * units);
        return;
    }
    load<N>(arguments.d_c + p.at, d_c);
    load<N>(arguments.c + p.at, c);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        gather<N, cache::streaming>(arguments.gates, arguments.bias, p, 4 * units, arguments.order[k] * units + p.column, s[k]);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        A slope_i, slope_f, slope_o;
        const A in = gate(s[0][i], arguments.hard, slope_i), keep = gate(s[1][i], arguments.hard, slope_f);
        const A out = gate(s[2][i], arguments.hard, slope_o), g = hyperbolic_tangent(s[3][i]);
        const A t = hyperbolic_tangent(keep * c[i] + in * g);
        const A d_new_c = d_c[i] + d_h[i] * out * (A(1) - t * t);
        s[0][i] = d_new_c * g * slope_i;
        s[1][i] = d_new_c * c[i] * slope_f;
        s[2][i] = d_h[i] * t * slope_o;
        s[3][i] = d_new_c * in * (A(1) - g * g);
        d_c[i] = d_new_c * keep;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) store<N>(d_gates + arguments.order[k] * units, s[k]);
    store<N>(arguments.d_c + p.at, d_c);
}
GL_KERNEL(gl_lstm_backward, 256) {
    if (arguments.vectors) backward<vector_width<STORAGE>>(arguments); else backward<1>(arguments);
}
#endif

// ---- GRU, reset after the product: columns z, r, c, a --------------------------------------------------------------

#if defined(GL_ENTRY_gl_gru_forward)
template <int N>
__device__ __forceinline__ void forward(const gl_gru_forward_arguments& arguments) {
    const int64 units = arguments.units;
    const place p = own_place<N>(arguments.rows, arguments.units);
    if (!p.inside) return;
    if (!counts(arguments, p)) return skip_step<N>(arguments, p);
    A s[4][N], h[N];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        gather<N>(arguments.gates, arguments.bias, p, 4 * units, k * units + p.column, s[k]);
    }
    load<N>(arguments.h + p.at, h);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const A keep = gate(s[0][i], arguments.hard);
        const A candidate = hyperbolic_tangent(s[3][i] + gate(s[1][i], arguments.hard) * s[2][i]);
        h[i] = candidate + keep * (h[i] - candidate);
    }
    finish_step<N>(arguments, p, h);
}
GL_KERNEL(gl_gru_forward, 256) {
    if (arguments.vectors) forward<vector_width<STORAGE>>(arguments); else forward<1>(arguments);
}
#endif

#if defined(GL_ENTRY_gl_gru_backward)
template <int N>
__device__ __forceinline__ void backward(const gl_gru_backward_arguments& arguments) {
    const int64 units = arguments.units;
    const place p = own_place<N>(arguments.rows, arguments.units);
    if (!p.inside) return;
    STORAGE* d_gates = arguments.d_gates + p.row * 4 * units + p.column;
    A d_h[N], s[4][N], h[N];
    if (!gather_cotangents<N>(arguments, p, d_h)) {
#pragma unroll
        for (int k = 0; k < 4; ++k) store_zeros<N>(d_gates + k * units);
        return;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        gather<N, cache::streaming>(arguments.gates, arguments.bias, p, 4 * units, k * units + p.column, s[k]);
    }
    load<N>(arguments.h + p.at, h);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        A slope_z, slope_r;
        const A keep = gate(s[0][i], arguments.hard, slope_z), reset = gate(s[1][i], arguments.hard, slope_r);
        const A candidate = hyperbolic_tangent(s[3][i] + reset * s[2][i]);
        const A d_candidate = d_h[i] * (A(1) - keep) * (A(1) - candidate * candidate);
        s[0][i] = d_h[i] * (h[i] - candidate) * slope_z;
        s[1][i] = d_candidate * s[2][i] * slope_r;
        s[2][i] = d_candidate * reset;
        s[3][i] = d_candidate;
        d_h[i] *= keep;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) store<N>(d_gates + k * units, s[k]);
    store<N>(arguments.carry + p.at, d_h);
}
GL_KERNEL(gl_gru_backward, 256) {
    if (arguments.vectors) backward<vector_width<STORAGE>>(arguments); else backward<1>(arguments);
}
#endif

// ---- GRU, reset before the product: two launches around the second product -------------------------------------------

#if defined(GL_ENTRY_gl_gru_reset_forward)
// Gives what enters the candidate's product, r * entering; of rows that skip the step nothing is read afterwards.
template <int N>
__device__ __forceinline__ void forward(const gl_gru_reset_forward_arguments& arguments) {
    const int64 units = arguments.units;
    const place p = own_place<N>(arguments.rows, arguments.units);
    if (!p.inside) return;
    A r[N], h[N];
    gather<N>(arguments.gates, arguments.bias, p, 3 * units, units + p.column, r);
    load<N>(arguments.entering + p.at, h);
#pragma unroll
    for (int i = 0; i < N; ++i) h[i] *= gate(r[i], arguments.hard);
    store<N>(arguments.reset + p.at, h);
}
GL_KERNEL(gl_gru_reset_forward, 256) {
    if (arguments.vectors) forward<vector_width<STORAGE>>(arguments); else forward<1>(arguments);
}
#endif

#if defined(GL_ENTRY_gl_gru_candidate_forward)
template <int N>
__device__ __forceinline__ void forward(const gl_gru_candidate_forward_arguments& arguments) {
    const int64 units = arguments.units;
    const place p = own_place<N>(arguments.rows, arguments.units);
    if (!p.inside) return;
    if (!counts(arguments, p)) return skip_step<N>(arguments, p);
    A z[N], n[N], h[N];
    gather<N>(arguments.gates, arguments.bias, p, 3 * units, p.column, z);
    gather<N>(arguments.gates, arguments.bias, p, 3 * units, 2 * units + p.column, n);
    load<N>(arguments.h + p.at, h);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const A candidate = hyperbolic_tangent(n[i]);
        h[i] = candidate + gate(z[i], arguments.hard) * (h[i] - candidate);
    }
    finish_step<N>(arguments, p, h);
}
GL_KERNEL(gl_gru_candidate_forward, 256) {
    if (arguments.vectors) forward<vector_width<STORAGE>>(arguments); else forward<1>(arguments);
}
#endif

#if defined(GL_ENTRY_gl_gru_candidate_backward)
template <int N>
__device__ __forceinline__ void backward(const gl_gru_candidate_backward_arguments& arguments) {
    const int64 units = arguments.units;
    const place p = own_place<N>(arguments.rows, arguments.units);
    if (!p.inside) return;
    STORAGE* d_gates = arguments.d_gates + p.row * 3 * units + p.column;
    A d_h[N], z[N], n[N], h[N];
    if (!gather_cotangents<N>(arguments, p, d_h)) {
        store_zeros<N>(d_gates);
        return store_zeros<N>(d_gates + 2 * units);
    }
    gather<N, cache::streaming>(arguments.gates, arguments.bias, p, 3 * units, p.column, z);
    gather<N, cache::streaming>(arguments.gates, arguments.bias, p, 3 * units, 2 * units + p.column, n);
    load<N>(arguments.h + p.at, h);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        A slope;
        const A keep = gate(z[i], arguments.hard, slope), candidate = hyperbolic_tangent(n[i]);
        z[i] = d_h[i] * (h[i] - candidate) * slope;
        n[i] = d_h[i] * (A(1) - keep) * (A(1) - candidate * candidate);
        d_h[i] *= keep;
    }
    store<N>(d_gates, z);
    store<N>(d_gates + 2 * units, n);
    store<N>(arguments.carry + p.at, d_h);
}
GL_KERNEL(gl_gru_candidate_backward, 256) {
    if (arguments.vectors) backward<vector_width<STORAGE>>(arguments); else backward<1>(arguments);
}
#endif

#if defined(GL_ENTRY_gl_gru_reset_backward)
// From q, the gradient by r * entering: r's gradient, and what reaches h around the first product.
template <int N>
__device__ __forceinline__ void backward(const gl_gru_reset_backward_arguments& arguments) {
    const int64 units = arguments.units;
    const place p = own_place<N>(arguments.rows, arguments.units);
    if (!p.inside) return;
    STORAGE* d_r = arguments.d_gates + p.row * 3 * units + units + p.column;
    if (!counts(arguments, p)) return store_zeros<N>(d_r);
    A q[N], r[N], h[N], carry[N];
    load<N, cache::streaming>(arguments.q + p.at, q);
    if (arguments.recurrent_mask) {
        load<N>(arguments.recurrent_mask + p.at, h);
#pragma unroll
        for (int i = 0; i < N; ++i) q[i] *= h[i];
    }
    gather<N, cache::streaming>(arguments.gates, arguments.bias, p, 3 * units, units + p.column, r);
    load<N>(arguments.h + p.at, h);
    load<N>(arguments.carry + p.at, carry);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        A slope;
        carry[i] += q[i] * gate(r[i], arguments.hard, slope);
        r[i] = q[i] * h[i] * slope;
    }
    store<N>(d_r, r);
    store<N>(arguments.carry + p.at, carry);
}
GL_KERNEL(gl_gru_reset_backward, 256) {
    if (arguments.vectors) backward<vector_width<STORAGE>>(arguments); else backward<1>(arguments);
}
#endif

// ---- simple RNN ----------------------------------------------------------------------------------------------------

#if defined(GL_ENTRY_gl_simple_rnn_forward)
template <int N>
__device__ __forceinline__ void forward(const gl_simple_rnn_forward_arguments& arguments) {
    const place p = own_place<N>(arguments.rows, arguments.units);
    if (!p.inside) return;
    if (!counts(arguments, p)) return skip_step<N>(arguments, p);
    A s[N];
    gather<N>(arguments.new_h, arguments.bias, p, arguments.units, p.column, s);
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] = hyperbolic_tangent(s[i]);
    finish_step<N>(arguments, p, s);
}
GL_KERNEL(gl_simple_rnn_forward, 256) {
    if (arguments.vectors) forward<vector_width<STORAGE>>(arguments); else forward<1>(arguments);
}
#endif

#if defined(GL_ENTRY_gl_simple_rnn_backward)
template <int N>
__device__ __forceinline__ void backward(const gl_simple_rnn_backward_arguments& arguments) {
    const place p = own_place<N>(arguments.rows, arguments.units);
    if (!p.inside) return;
    A d_h[N], h[N];
    if (!gather_cotangents<N>(arguments, p, d_h)) return store_zeros<N>(arguments.d_gates + p.at);
    load<N, cache::streaming>(arguments.new_h + p.at, h);
#pragma unroll
    for (int i = 0; i < N; ++i) h[i] = d_h[i] * (A(1) - h[i] * h[i]);
    store<N>(arguments.d_gates + p.at, h);
}
GL_KERNEL(gl_simple_rnn_backward, 256) {
    if (arguments.vectors) backward<vector_width<STORAGE>>(arguments); else backward<1>(arguments);
}
#endif
