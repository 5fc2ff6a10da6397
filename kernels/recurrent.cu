// One time step of the recurrent cells' elementwise work, forward and backward: LSTM, GRU in both forms, simple RNN.
// The bias, the residual add, masks, the dropout of the state that enters the next step, and (backward) the sums of
// cotangents are part of the same launch.
//
// Layout: rows are the batch N, a row has U hidden values. A step's gate buffer is (N, G*U), each gate U neighbouring
//   columns, so a step reads and writes G separate coalesced streams. LSTM: 4 gates in the order the caller says; GRU
//   with the reset after the product: z, r, c = the state's part of the candidate, a = the inputs' part; GRU with the
//   reset before it: z, r, candidate; simple RNN: the buffer is where h' will be. The matmul has added the step's
//   product to the inputs' in this buffer, without the bias; nothing but d_gates is ever written to gates again, because
//   the backward pass computes the activations from these sums a second time.
// All arrays are contiguous. Null pointers leave a part out.
// Dtypes: STORAGE, but WIDE (float32 for 16-bit storage, else the same) for what the backward pass adds up over the
//   steps: dh, carry, pending, dc and q. The cell state is rounded to STORAGE at every step, as h is: c and c' in float32
//   would be 2 of the forward's 7 streams at twice the bytes, 29 % more.
// Traffic of a counted step in values per (row, hidden value). Biases are a row for the whole batch and masks one byte a
//   row: they stay in cache. Nothing below is moved twice, so these are the floors of the launches.
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
//   differs from h'; skipped rows read no gates. A recurrent dropout mask adds itself and what enters the next step
//   (backward: itself and, for GRU, the product apart). The WIDE streams are those that the launch before has written,
//   N U values each: they come from the L2 cache.
// Access: PACKET values per stream and thread, 16 bytes if U and all addresses are multiples of them and the step is
//   large enough, else 8, 4 or one value, so that a small step still gives every multiprocessor some warps. All loads of
//   a thread are issued before it waits for the first, but for those that a row's mask decides on.
// Grid: 1-D, one packet of a row per thread; block: 64, 128 or 256 threads, so that small steps reach all
//   multiprocessors. No shared memory, no atomics.
// Arithmetic: float for 16-bit and 32-bit storage, double for 64-bit; rounded once to the storage type. The logistic
//   function is 1 / (1 + e^-x) with an approximate reciprocal: a relative error below 4 2^-23 in float; and for 16-bit
//   storage with an approximate e^-x too: its error is far below the rounding of such a gate's sum. It reaches 0 and 1.
// Deterministic: every value is computed by one thread.
// Source: Hochreiter and Schmidhuber 1997, Gers et al. 2000 (LSTM); Cho et al. 2014 (GRU, reset before the product), the
//   variant with the reset after it as in cuDNN; Elman 1990. Column orders are the caller's (`order`).

typedef accumulate_t<STORAGE> A;
constexpr int N = PACKET;
typedef neighbours<N, STORAGE> packet_here;

__device__ __forceinline__ float power_of_e(float x) {
    if constexpr (sizeof(STORAGE) == 2) {
        return approximate_power_of_2(x * 1.44269504f);
    } else {
        return expf(x);
    }
}
__device__ __forceinline__ double power_of_e(double x) { return exp(x); }
__device__ __forceinline__ float reciprocal(float x) { return approximate_reciprocal(x); }
__device__ __forceinline__ double reciprocal(double x) { return 1.0 / x; }
__device__ __forceinline__ float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ __forceinline__ double hyperbolic_tangent(double x) { return tanh(x); }

// The gate function: logistic, or clip(0.2 x + 0.5, 0, 1) if HARD; `slope` receives its derivative.
__device__ __forceinline__ A gate(A x, A& slope) {
#if HARD
    const A y = A(0.2) * x + A(0.5);
    slope = y >= A(0) && y <= A(1) ? A(0.2) : A(0);
    return y < A(0) ? A(0) : (y > A(1) ? A(1) : y);
#else
    const A y = reciprocal(A(1) + power_of_e(-x));
    slope = y * (A(1) - y);
    return y;
#endif
}
__device__ __forceinline__ A gate(A x) {
    A unused;
    return gate(x, unused);
}

// Where a thread works: `at` in an (N, U) array; gate k is at `row * gates * U + k * U + column`.
struct place {
    int64 row, column, at;
    bool inside;
};
template <typename ARGUMENTS>
__device__ __forceinline__ place own_place(const ARGUMENTS& arguments) {
    const uint32 packets = static_cast<uint32>(arguments.units) / N;  // of a row
    const uint32 index = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32 row = packets == 1u ? index
                                     : static_cast<uint32>(divide(index, arguments.row_multiplier, arguments.row_shift));
    place p;
    p.row = row;
    p.column = static_cast<int64>(index - row * packets) * N;
    p.at = p.row * arguments.units + p.column;
    p.inside = p.row < arguments.rows;
    return p;
}

template <typename T>
__device__ __forceinline__ void load_here(const T* address, A (&values)[N]) {
    neighbours<N, T> packet;
    fetch<N>(address, packet);
    widen(packet, values);
}

template <typename T>
__device__ __forceinline__ void add_here(const T* address, A (&values)[N]) {
    A more[N];
    load_here(address, more);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += more[i];
}

__device__ __forceinline__ void set_zero(A (&values)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = A(0);
}

__device__ __forceinline__ void put_zeros(STORAGE* address) {
    A zeros[N];
    set_zero(zeros);
    store<N>(address, zeros);
}

// Some gates' sums and their bias, where there is one.
template <int COUNT, cache HINT = cache::keep>
struct gate_sums {
    packet_here sums[COUNT], bias[COUNT];
    bool biased;

    // Asks for the columns of row `p.row` of a buffer of `width` columns.
    __device__ __forceinline__ void request(const STORAGE* buffer, const STORAGE* bias_row, const place& p, int64 width,
                                            const int64 (&columns)[COUNT]) {
        biased = bias_row != nullptr;
#pragma unroll
        for (int k = 0; k < COUNT; ++k) fetch<N, HINT>(buffer + p.row * width + columns[k], sums[k]);
        if (biased) {
#pragma unroll
            for (int k = 0; k < COUNT; ++k) fetch<N>(bias_row + columns[k], bias[k]);
        }
    }
    __device__ __forceinline__ void add_up(A (&s)[COUNT][N]) const {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) widen(sums[k], s[k]);
        if (!biased) return;
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
            A more[N];
            widen(bias[k], more);
#pragma unroll
            for (int i = 0; i < N; ++i) s[k][i] += more[i];
        }
    }
};

template <typename ARGUMENTS>
__device__ __forceinline__ bool counts(const ARGUMENTS& arguments, const place& p) {
    return !arguments.mask || arguments.mask[p.row] != 0;
}

// The end of a step that counts. What it reads is asked for at the step's beginning.
struct step_end {
    packet_here x, recurrent_mask;

    template <typename ARGUMENTS>
    __device__ __forceinline__ void request(const ARGUMENTS& arguments, const place& p) {
        if (arguments.x) fetch<N, cache::streaming>(arguments.x + p.at, x);
        if (arguments.dropped) fetch<N>(arguments.recurrent_mask + p.at, recurrent_mask);
    }
    // Writes h', what of it enters the next step's product, and the output, where these are not h' itself.
    template <typename ARGUMENTS>
    __device__ __forceinline__ void write(const ARGUMENTS& arguments, const place& p, A (&h)[N]) const {
        store<N>(arguments.new_h + p.at, h);
        A more[N];
        if (arguments.dropped) {
            widen(recurrent_mask, more);
#pragma unroll
            for (int i = 0; i < N; ++i) more[i] *= widen(narrow<STORAGE>(h[i]));  // the backward pass reads h' as stored
            store<N>(arguments.dropped + p.at, more);
        }
        if (!arguments.output) return;
        if (arguments.x) {
            widen(x, more);
#pragma unroll
            for (int i = 0; i < N; ++i) h[i] += more[i];
        }
        store<N>(arguments.output + p.at, h);
    }
};

// A step that does not count: h stays, and with it what enters the product; the output repeats the row's previous one
// (zeros where `previous` is null).
template <typename ARGUMENTS>
__device__ __forceinline__ void skip_step(const ARGUMENTS& arguments, const place& p) {
    A values[N];
    load_here(arguments.h + p.at, values);
    store<N>(arguments.new_h + p.at, values);
    if (arguments.previous) {
        load_here(arguments.previous + p.at, values);
    } else {
        set_zero(values);
    }
    store<N>(arguments.output + p.at, values);
}

// The gradient by h that reaches a step. `later` is the mask of the step after this one: of rows that skipped it the
// product is zero, and only they have something in `pending` and, unless it is `always` in use, in `carry`.
struct cotangents {
    packet_here d_output;
    bool on, held;  // whether the step counts; whether the row skipped the step after it

    template <typename ARGUMENTS>
    __device__ __forceinline__ void request(const ARGUMENTS& arguments, const place& p) {
        if (arguments.d_output) fetch<N>(arguments.d_output + p.at, d_output);
        held = arguments.later && arguments.later[p.row] == 0;
        on = counts(arguments, p);
    }
    // Gives dh: what arrived through the product with the recurrent weights (times the dropout mask), around it, and from
    // the output. Where the step does not count, everything is handed on to the step before: dh in `carry`, the output's
    // cotangent in `pending`.
    template <typename ARGUMENTS>
    __device__ __forceinline__ void add_up(const ARGUMENTS& arguments, const place& p, A (&d_h)[N]) const {
        set_zero(d_h);
        if (arguments.d_h && !held) {
            load_here(arguments.d_h + p.at, d_h);
            if (arguments.recurrent_mask) {
                A part[N];
                load_here(arguments.recurrent_mask + p.at, part);
#pragma unroll
                for (int i = 0; i < N; ++i) d_h[i] *= part[i];
            }
        }
        if (arguments.carry && (held || arguments.always || !arguments.later)) add_here(arguments.carry + p.at, d_h);
        A d_out[N];
        set_zero(d_out);
        if (arguments.d_output) widen(d_output, d_out);
        if (held && arguments.pending) add_here(arguments.pending + p.at, d_out);
        if (on) {
            if (arguments.d_counted) store<N>(arguments.d_counted + p.at, d_out);
#pragma unroll
            for (int i = 0; i < N; ++i) d_h[i] += d_out[i];
            return;
        }
        store<N>(arguments.carry + p.at, d_h);
        if (arguments.pending) store<N>(arguments.pending + p.at, d_out);
        if (arguments.d_counted) put_zeros(arguments.d_counted + p.at);
    }
};

// ---- LSTM ----------------------------------------------------------------------------------------------------------

#if defined(GL_ENTRY_gl_lstm_forward)
GL_KERNEL(gl_lstm_forward, 256) {
    const int64 units = arguments.units;
    const place p = own_place(arguments);
    if (!p.inside) return;
    packet_here before;
    fetch<N>(arguments.c + p.at, before);
    A s[4][N], c[N], h[N];
    if (!counts(arguments, p)) {
        widen(before, c);
        store<N>(arguments.new_c + p.at, c);
        return skip_step(arguments, p);
    }
    gate_sums<4> sums;
    sums.request(arguments.gates, arguments.bias, p, 4 * units,
                 {arguments.order[0] * units + p.column, arguments.order[1] * units + p.column,
                  arguments.order[2] * units + p.column, arguments.order[3] * units + p.column});
    step_end end;
    end.request(arguments, p);
    sums.add_up(s);
    widen(before, c);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        c[i] = gate(s[1][i]) * c[i] + gate(s[0][i]) * hyperbolic_tangent(s[3][i]);
        h[i] = gate(s[2][i]) * hyperbolic_tangent(c[i]);
    }
    store<N>(arguments.new_c + p.at, c);
    end.write(arguments, p, h);
}
#endif

#if defined(GL_ENTRY_gl_lstm_backward)
GL_KERNEL(gl_lstm_backward, 256) {
    const int64 units = arguments.units;
    const place p = own_place(arguments);
    if (!p.inside) return;
    STORAGE* d_gates = arguments.d_gates + p.row * 4 * units + p.column;
    cotangents arrived;
    arrived.request(arguments, p);
    gate_sums<4, cache::streaming> sums;
    packet_here before;
    neighbours<N, WIDE> after;
    if (arrived.on) {
        sums.request(arguments.gates, arguments.bias, p, 4 * units,
                     {arguments.order[0] * units + p.column, arguments.order[1] * units + p.column,
                      arguments.order[2] * units + p.column, arguments.order[3] * units + p.column});
        fetch<N>(arguments.c + p.at, before);
        fetch<N>(arguments.d_c + p.at, after);
    }
    A d_h[N], d_c[N], c[N], s[4][N];
    arrived.add_up(arguments, p, d_h);
    if (!arrived.on) {  // dc stays as it is
#pragma unroll
        for (int k = 0; k < 4; ++k) put_zeros(d_gates + k * units);
        return;
    }
    sums.add_up(s);
    widen(before, c);
    widen(after, d_c);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        A slope_i, slope_f, slope_o;
        const A in = gate(s[0][i], slope_i), keep = gate(s[1][i], slope_f), out = gate(s[2][i], slope_o);
        const A g = hyperbolic_tangent(s[3][i]);
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
#endif

// ---- GRU, reset after the product: columns z, r, c, a --------------------------------------------------------------

#if defined(GL_ENTRY_gl_gru_forward)
// Two blocks a multiprocessor: left alone, the compiler for sm_90 stops at 80 registers and spills for bfloat16.
GL_KERNEL(gl_gru_forward, 256, 2) {
    const int64 units = arguments.units;
    const place p = own_place(arguments);
    if (!p.inside) return;
    if (!counts(arguments, p)) return skip_step(arguments, p);
    gate_sums<4> sums;
    sums.request(arguments.gates, arguments.bias, p, 4 * units,
                 {p.column, units + p.column, 2 * units + p.column, 3 * units + p.column});
    packet_here before;
    fetch<N>(arguments.h + p.at, before);
    step_end end;
    end.request(arguments, p);
    A s[4][N], h[N];
    sums.add_up(s);
    widen(before, h);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const A keep = gate(s[0][i]);
        const A candidate = hyperbolic_tangent(s[3][i] + gate(s[1][i]) * s[2][i]);
        h[i] = candidate + keep * (h[i] - candidate);
    }
    end.write(arguments, p, h);
}
#endif

#if defined(GL_ENTRY_gl_gru_backward)
GL_KERNEL(gl_gru_backward, 256) {
    const int64 units = arguments.units;
    const place p = own_place(arguments);
    if (!p.inside) return;
    STORAGE* d_gates = arguments.d_gates + p.row * 4 * units + p.column;
    cotangents arrived;
    arrived.request(arguments, p);
    gate_sums<4, cache::streaming> sums;
    packet_here before;
    if (arrived.on) {
        sums.request(arguments.gates, arguments.bias, p, 4 * units,
                     {p.column, units + p.column, 2 * units + p.column, 3 * units + p.column});
        fetch<N>(arguments.h + p.at, before);
    }
    A d_h[N], s[4][N], h[N];
    arrived.add_up(arguments, p, d_h);
    if (!arrived.on) {
#pragma unroll
        for (int k = 0; k < 4; ++k) put_zeros(d_gates + k * units);
        return;
    }
    sums.add_up(s);
    widen(before, h);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        A slope_z, slope_r;
        const A keep = gate(s[0][i], slope_z), reset = gate(s[1][i], slope_r);
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
#endif

// ---- GRU, reset before the product: two launches around the second product -------------------------------------------

#if defined(GL_ENTRY_gl_gru_reset_forward)
// Gives what enters the candidate's product, r * entering; of rows that skip the step nothing is read afterwards.
GL_KERNEL(gl_gru_reset_forward, 256) {
    const int64 units = arguments.units;
    const place p = own_place(arguments);
    if (!p.inside) return;
    gate_sums<1> sums;
    sums.request(arguments.gates, arguments.bias, p, 3 * units, {units + p.column});
    packet_here entering;
    fetch<N>(arguments.entering + p.at, entering);
    A r[1][N], h[N];
    sums.add_up(r);
    widen(entering, h);
#pragma unroll
    for (int i = 0; i < N; ++i) h[i] *= gate(r[0][i]);
    store<N>(arguments.reset + p.at, h);
}
#endif

#if defined(GL_ENTRY_gl_gru_candidate_forward)
GL_KERNEL(gl_gru_candidate_forward, 256) {
    const int64 units = arguments.units;
    const place p = own_place(arguments);
    if (!p.inside) return;
    if (!counts(arguments, p)) return skip_step(arguments, p);
    gate_sums<2> sums;
    sums.request(arguments.gates, arguments.bias, p, 3 * units, {p.column, 2 * units + p.column});
    packet_here before;
    fetch<N>(arguments.h + p.at, before);
    step_end end;
    end.request(arguments, p);
    A s[2][N], h[N];
    sums.add_up(s);
    widen(before, h);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const A candidate = hyperbolic_tangent(s[1][i]);
        h[i] = candidate + gate(s[0][i]) * (h[i] - candidate);
    }
    end.write(arguments, p, h);
}
#endif

#if defined(GL_ENTRY_gl_gru_candidate_backward)
GL_KERNEL(gl_gru_candidate_backward, 256) {
    const int64 units = arguments.units;
    const place p = own_place(arguments);
    if (!p.inside) return;
    STORAGE* d_gates = arguments.d_gates + p.row * 3 * units + p.column;
    cotangents arrived;
    arrived.request(arguments, p);
    gate_sums<2, cache::streaming> sums;
    packet_here before;
    if (arrived.on) {
        sums.request(arguments.gates, arguments.bias, p, 3 * units, {p.column, 2 * units + p.column});
        fetch<N>(arguments.h + p.at, before);
    }
    A d_h[N], s[2][N], h[N];
    arrived.add_up(arguments, p, d_h);
    if (!arrived.on) {
        put_zeros(d_gates);
        return put_zeros(d_gates + 2 * units);
    }
    sums.add_up(s);
    widen(before, h);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        A slope;
        const A keep = gate(s[0][i], slope), candidate = hyperbolic_tangent(s[1][i]);
        s[0][i] = d_h[i] * (h[i] - candidate) * slope;
        s[1][i] = d_h[i] * (A(1) - keep) * (A(1) - candidate * candidate);
        d_h[i] *= keep;
    }
    store<N>(d_gates, s[0]);
    store<N>(d_gates + 2 * units, s[1]);
    store<N>(arguments.carry + p.at, d_h);
}
#endif

#if defined(GL_ENTRY_gl_gru_reset_backward)
// From q, the gradient by r * entering: r's gradient, and what reaches h around the first product.
GL_KERNEL(gl_gru_reset_backward, 256) {
    const int64 units = arguments.units;
    const place p = own_place(arguments);
    if (!p.inside) return;
    STORAGE* d_r = arguments.d_gates + p.row * 3 * units + units + p.column;
    if (!counts(arguments, p)) return put_zeros(d_r);
    gate_sums<1, cache::streaming> sums;
    sums.request(arguments.gates, arguments.bias, p, 3 * units, {units + p.column});
    neighbours<N, WIDE> through, around;
    packet_here before, drop;
    fetch<N>(arguments.q + p.at, through);
    fetch<N>(arguments.carry + p.at, around);
    fetch<N>(arguments.h + p.at, before);
    if (arguments.recurrent_mask) fetch<N>(arguments.recurrent_mask + p.at, drop);
    A q[N], r[1][N], h[N], carry[N];
    sums.add_up(r);
    widen(through, q);
    if (arguments.recurrent_mask) {
        widen(drop, h);
#pragma unroll
        for (int i = 0; i < N; ++i) q[i] *= h[i];
    }
    widen(around, carry);
    widen(before, h);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        A slope;
        carry[i] += q[i] * gate(r[0][i], slope);
        r[0][i] = q[i] * h[i] * slope;
    }
    store<N>(d_r, r[0]);
    store<N>(arguments.carry + p.at, carry);
}
#endif

// ---- simple RNN ----------------------------------------------------------------------------------------------------

#if defined(GL_ENTRY_gl_simple_rnn_forward)
GL_KERNEL(gl_simple_rnn_forward, 256) {
    const place p = own_place(arguments);
    if (!p.inside) return;
    if (!counts(arguments, p)) return skip_step(arguments, p);
    gate_sums<1> sums;
    sums.request(arguments.new_h, arguments.bias, p, arguments.units, {p.column});
    step_end end;
    end.request(arguments, p);
    A s[1][N];
    sums.add_up(s);
#pragma unroll
    for (int i = 0; i < N; ++i) s[0][i] = hyperbolic_tangent(s[0][i]);
    end.write(arguments, p, s[0]);
}
#endif

#if defined(GL_ENTRY_gl_simple_rnn_backward)
GL_KERNEL(gl_simple_rnn_backward, 256) {
    const place p = own_place(arguments);
    if (!p.inside) return;
    cotangents arrived;
    arrived.request(arguments, p);
    packet_here after;
    if (arrived.on) fetch<N, cache::streaming>(arguments.new_h + p.at, after);
    A d_h[N], h[N];
    arrived.add_up(arguments, p, d_h);
    if (!arrived.on) return put_zeros(arguments.d_gates + p.at);
    widen(after, h);
#pragma unroll
    for (int i = 0; i < N; ++i) h[i] = d_h[i] * (A(1) - h[i] * h[i]);
    store<N>(arguments.d_gates + p.at, h);
}
#endif
