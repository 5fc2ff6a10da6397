// One time step of the recurrent cells' elementwise work, forward and backward: LSTM, GRU in both forms, simple RNN.
// The residual add, masks and (backward) the sums of cotangents happen in the same launch.
//
// Layout: rows are the batch N, a row has U hidden values; gates are (N, G*U), each gate U neighbouring columns, so a
//   step reads and writes G separate coalesced streams. All arrays are contiguous. Null pointers leave a part out.
// Traffic in values per (row, hidden value), s bytes each, without mask, where the product is accumulated into `gates`
//   and the bias is in it: LSTM forward reads 4 gates, c, x, writes c', h', output: 9 s (7 s without the residual);
//   backward reads 4 gates, c and 3 cotangents, writes 4 gates and dc: 13 s. `product` adds its reads and one write of
//   the gates. Activations are never stored: the backward pass computes them again from the saved pre-activations.
// Access: 16 bytes per stream and thread where U is a multiple of that many values and every address allows it
//   (`vectors`), else one value per thread.
// Grid: 1-D, one packet of a row per thread; block: 256 threads. No shared memory, no atomics.
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

// Reads a gate's values, adds the step's product and the bias where given, and writes the sum back if there was any.
template <int N>
__device__ __forceinline__ void gather(STORAGE* sums, const STORAGE* more, const STORAGE* bias, A (&s)[N]) {
    load<N>(sums, s);
    if (more) {
        A a[N];
        load<N, cache::streaming>(more, a);
#pragma unroll
        for (int i = 0; i < N; ++i) s[i] += a[i];
    }
    if (bias) {
        A a[N];
        load<N>(bias, a);
#pragma unroll
        for (int i = 0; i < N; ++i) s[i] += a[i];
    }
    if (more || bias) store<N>(sums, s);
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

template <typename ARGUMENTS>
__device__ __forceinline__ bool counts(const ARGUMENTS& arguments, const place& p) {
    return !arguments.mask || arguments.mask[p.row] != 0;
}

// Writes h' and the output. Where the step does not count, h stays and the output repeats the row's previous one (zeros
// where `previous` is null).
template <int N, typename ARGUMENTS>
__device__ __forceinline__ void finish_step(const ARGUMENTS& arguments, const place& p, A (&h)[N]) {
    if (counts(arguments, p)) {
        store<N>(arguments.new_h + p.at, h);
        if (!arguments.output) return;
        if (arguments.x) {
            A x[N];
            load<N, cache::streaming>(arguments.x + p.at, x);
#pragma unroll
            for (int i = 0; i < N; ++i) h[i] += x[i];
        }
    } else {
        load<N>(arguments.h + p.at, h);
        store<N>(arguments.new_h + p.at, h);
        if (!arguments.output) return;
        load_or_zero<N>(behind(arguments.previous, p.at), h);
    }
    store<N>(arguments.output + p.at, h);
}

// Gives dh: the product with the recurrent weights (times the dropout mask) + what went around it + the output's.
// Where the step does not count the output's cotangent goes to `pending` (unless it was a zero), for the step before.
template <int N, typename ARGUMENTS>
__device__ __forceinline__ bool gather_cotangents(const ARGUMENTS& arguments, const place& p, A (&d_h)[N]) {
    const bool on = counts(arguments, p);
    A part[N];
    load_or_zero<N>(behind(arguments.d_h, p.at), d_h);
    if (arguments.recurrent_mask) {
        load<N>(arguments.recurrent_mask + p.at, part);
#pragma unroll
        for (int i = 0; i < N; ++i) d_h[i] *= part[i];
    }
    load<N>(arguments.carry + p.at, part);
#pragma unroll
    for (int i = 0; i < N; ++i) d_h[i] += part[i];
    A d_output[N];
    load_or_zero<N>(behind(arguments.d_output, p.at), d_output);
    if (arguments.mask) {
        load<N>(arguments.pending + p.at, part);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            d_output[i] += part[i];
            part[i] = on || arguments.zero_output ? A(0) : d_output[i];
            if (!on) d_output[i] = A(0);
        }
        store<N>(arguments.pending + p.at, part);
        if (arguments.d_counted) store<N>(arguments.d_counted + p.at, d_output);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) d_h[i] += d_output[i];
    return on;
}

// ---- LSTM ----------------------------------------------------------------------------------------------------------

#if defined(GL_ENTRY_gl_lstm_forward)
template <int N>
__device__ __forceinline__ void forward(const gl_lstm_forward_arguments& arguments) {
    const int64 units = arguments.units;
    const place p = own_place<N>(arguments.rows, arguments.units);
    if (!p.inside) return;
    A s[4][N], c[N], h[N];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const int64 column = arguments.order[k] * units + p.column, at = p.row * 4 * units + column;
        gather<N>(arguments.gates + at, behind(arguments.product, at), behind(arguments.bias, column), s[k]);
    }
    load<N>(arguments.c + p.at, c);
    if (counts(arguments, p)) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            c[i] = gate(s[1][i], arguments.hard) * c[i] + gate(s[0][i], arguments.hard) * hyperbolic_tangent(s[3][i]);
            h[i] = gate(s[2][i], arguments.hard) * hyperbolic_tangent(c[i]);
        }
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
    A d_h[N], d_c[N], c[N], s[4][N];
    const bool on = gather_cotangents<N>(arguments, p, d_h);
    load<N>(arguments.d_c + p.at, d_c);
    load<N>(arguments.c + p.at, c);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        load<N, cache::streaming>(arguments.gates + p.row * 4 * units + arguments.order[k] * units + p.column, s[k]);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        A slope_i, slope_f, slope_o;
        const A in = gate(s[0][i], arguments.hard, slope_i), keep = gate(s[1][i], arguments.hard, slope_f);
        const A out = gate(s[2][i], arguments.hard, slope_o), g = hyperbolic_tangent(s[3][i]);
        const A t = hyperbolic_tangent(keep * c[i] + in * g);
        const A d_new_c = d_c[i] + d_h[i] * out * (A(1) - t * t);
        s[0][i] = on ? d_new_c * g * slope_i : A(0);
        s[1][i] = on ? d_new_c * c[i] * slope_f : A(0);
        s[2][i] = on ? d_h[i] * t * slope_o : A(0);
        s[3][i] = on ? d_new_c * in * (A(1) - g * g) : A(0);
        d_c[i] = on ? d_new_c * keep : d_c[i];
        d_h[i] = on ? A(0) : d_h[i];
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        store<N>(arguments.d_gates + p.row * 4 * units + arguments.order[k] * units + p.column, s[k]);
    }
    store<N>(arguments.d_c + p.at, d_c);
    store<N>(arguments.carry + p.at, d_h);
}
GL_KERNEL(gl_lstm_backward, 256) {
    if (arguments.vectors) backward<vector_width<STORAGE>>(arguments); else backward<1>(arguments);
}
#endif

// ---- GRU, reset after the product: columns z, r, h -----------------------------------------------------------------

#if defined(GL_ENTRY_gl_gru_forward)
template <int N>
__device__ __forceinline__ void forward(const gl_gru_forward_arguments& arguments) {
    const int64 units = arguments.units;
    const place p = own_place<N>(arguments.rows, arguments.units);
    if (!p.inside) return;
    A z[N], r[N], n[N], inner[N], h[N], more[N];
    const int64 at = p.row * 3 * units + p.column;
    gather<N>(arguments.gates + at, arguments.product + at, behind(arguments.bias, p.column), z);
    gather<N>(arguments.gates + at + units, arguments.product + at + units, behind(arguments.bias, units + p.column), r);
    gather<N>(arguments.gates + at + 2 * units, nullptr, behind(arguments.bias, 2 * units + p.column), n);
    load<N, cache::streaming>(arguments.product + at + 2 * units, inner);
    load_or_zero<N>(behind(arguments.inner_bias, p.column), more);
    load<N>(arguments.h + p.at, h);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        inner[i] += more[i];
        const A keep = gate(z[i], arguments.hard);
        const A candidate = hyperbolic_tangent(n[i] + gate(r[i], arguments.hard) * inner[i]);
        h[i] = candidate + keep * (h[i] - candidate);
    }
    store<N>(arguments.inner + p.at, inner);
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
    A d_h[N], z[N], r[N], n[N], inner[N], h[N];
    const int64 at = p.row * 3 * units + p.column;
    load<N, cache::streaming>(arguments.gates + at + units, r);
    load<N, cache::streaming>(arguments.gates + at + 2 * units, n);
    load<N, cache::streaming>(arguments.inner + p.at, inner);
#pragma unroll
    for (int i = 0; i < N; ++i) {  // n becomes the candidate, r the reset gate's value: fewer registers live at once
        A slope;
        r[i] = gate(r[i], arguments.hard, slope);
        n[i] = hyperbolic_tangent(n[i] + r[i] * inner[i]);
        inner[i] *= slope;
    }
    const bool on = gather_cotangents<N>(arguments, p, d_h);
    load<N, cache::streaming>(arguments.gates + at, z);
    load<N>(arguments.h + p.at, h);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        A slope;
        const A keep = gate(z[i], arguments.hard, slope);
        z[i] = on ? d_h[i] * (h[i] - n[i]) * slope : A(0);
        n[i] = on ? d_h[i] * (A(1) - keep) * (A(1) - n[i] * n[i]) : A(0);
        inner[i] = on ? n[i] * inner[i] : A(0);
        r[i] = on ? n[i] * r[i] : A(0);
        d_h[i] = on ? d_h[i] * keep : d_h[i];
    }
    store<N>(arguments.d_input + at, z);
    store<N>(arguments.d_input + at + units, inner);
    store<N>(arguments.d_input + at + 2 * units, n);
    store<N>(arguments.d_state + at, z);
    store<N>(arguments.d_state + at + units, inner);
    store<N>(arguments.d_state + at + 2 * units, r);
    store<N>(arguments.carry + p.at, d_h);
}
GL_KERNEL(gl_gru_backward, 256) {
    if (arguments.vectors) backward<vector_width<STORAGE>>(arguments); else backward<1>(arguments);
}
#endif

// ---- GRU, reset before the product: two launches around the second product -------------------------------------------

#if defined(GL_ENTRY_gl_gru_reset_forward)
// Completes the sums of z and r and gives what enters the candidate's product, r * entering.
template <int N>
__device__ __forceinline__ void forward(const gl_gru_reset_forward_arguments& arguments) {
    const int64 units = arguments.units;
    const place p = own_place<N>(arguments.rows, arguments.units);
    if (!p.inside) return;
    A z[N], r[N], h[N];
    const int64 at = p.row * 3 * units + p.column, product_at = p.row * 2 * units + p.column;
    gather<N>(arguments.gates + at, arguments.product + product_at, behind(arguments.bias, p.column), z);
    gather<N>(arguments.gates + at + units, arguments.product + product_at + units,
              behind(arguments.bias, units + p.column), r);
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
    A z[N], n[N], h[N];
    const int64 at = p.row * 3 * units + p.column;
    load<N>(arguments.gates + at, z);
    gather<N>(arguments.gates + at + 2 * units, arguments.product + p.at, behind(arguments.bias, 2 * units + p.column),
              n);
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
    A d_h[N], z[N], n[N], h[N];
    const bool on = gather_cotangents<N>(arguments, p, d_h);
    const int64 at = p.row * 3 * units + p.column;
    load<N, cache::streaming>(arguments.gates + at, z);
    load<N, cache::streaming>(arguments.gates + at + 2 * units, n);
    load<N>(arguments.h + p.at, h);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        A slope;
        const A keep = gate(z[i], arguments.hard, slope), candidate = hyperbolic_tangent(n[i]);
        z[i] = on ? d_h[i] * (h[i] - candidate) * slope : A(0);
        n[i] = on ? d_h[i] * (A(1) - keep) * (A(1) - candidate * candidate) : A(0);
        d_h[i] = on ? d_h[i] * keep : d_h[i];
    }
    store<N>(arguments.d_input + at, z);
    store<N>(arguments.d_input + at + 2 * units, n);
    store<N>(arguments.d_candidate + p.at, n);
    store<N>(arguments.d_state + p.row * 2 * units + p.column, z);
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
    A q[N], r[N], h[N], dropped[N], carry[N];
    const int64 at = p.row * 3 * units + units + p.column;
    load<N, cache::streaming>(arguments.q + p.at, q);
    load<N, cache::streaming>(arguments.gates + at, r);
    load<N>(arguments.h + p.at, h);
    load_or_zero<N>(behind(arguments.recurrent_mask, p.at), dropped);
    load<N>(arguments.carry + p.at, carry);
    const bool on = counts(arguments, p);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        A slope;
        const A reset = gate(r[i], arguments.hard, slope), factor = arguments.recurrent_mask ? dropped[i] : A(1);
        if (on) carry[i] += q[i] * reset * factor;
        r[i] = on ? q[i] * h[i] * factor * slope : A(0);
    }
    store<N>(arguments.d_input + at, r);
    store<N>(arguments.d_state + p.row * 2 * units + units + p.column, r);
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
    A s[N], more[N];
    load<N, cache::streaming>(arguments.sums + p.at, s);
    load_or_zero<N>(behind(arguments.product, p.at), more);
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] += more[i];
    load_or_zero<N>(behind(arguments.bias, p.column), more);
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] = hyperbolic_tangent(s[i] + more[i]);
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
    const bool on = gather_cotangents<N>(arguments, p, d_h);
    load<N, cache::streaming>(arguments.new_h + p.at, h);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        h[i] = on ? d_h[i] * (A(1) - h[i] * h[i]) : A(0);
        d_h[i] = on ? A(0) : d_h[i];
    }
    store<N>(arguments.d_sums + p.at, h);
    store<N>(arguments.carry + p.at, d_h);
}
GL_KERNEL(gl_simple_rnn_backward, 256) {
    if (arguments.vectors) backward<vector_width<STORAGE>>(arguments); else backward<1>(arguments);
}
#endif
