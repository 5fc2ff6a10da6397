// Batch normalisation: the factors of a channel, from its statistics to the threads that use them.
#pragma once
#include "batch_norm_merge.cuh"

// Largest value that becomes 0 when it is stored, where its rounding underflows: half of the smallest subnormal, which
// ties to even. A stored output is > 0 exactly if the value before rounding is > underflow<STORAGE>.
template <typename T> constexpr A underflow = A(0);
template <> constexpr A underflow<float16> = A(2.98023223876953125e-8);            // 2^-25
template <> constexpr A underflow<bfloat16> = A(4.591774807899560578003e-41);     // 2^-134

// a * b + c with one rounding, whatever the compiler thinks: two kernels must get the same bits.
__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

// y = (x - pivot) * a + b of one channel. Forward and backward get the same bits from it.
struct Affine {
    A pivot, a, b;

    __device__ __forceinline__ A of(STORAGE x) const { return fused(widen(x) - pivot, a, b); }
};

template <typename Arguments>
__device__ __forceinline__ A pivot_of(const Arguments& arguments, const Place& p, int64 c) {
    return arguments.saved ? arguments.saved[slot_index(p, p.group, c)] : arguments.given_mean[c];
}

// From what a training step saved, or (saved = null) from given statistics.
template <typename Arguments>
__device__ __forceinline__ Affine affine_of(const Arguments& arguments, const Place& p, int64 c) {
    const A gamma = arguments.gamma ? arguments.gamma[c] : A(1), beta = arguments.beta ? arguments.beta[c] : A(0);
    Affine result;
    result.pivot = pivot_of(arguments, p, c);
    if (!arguments.saved) {
        result.a = static_cast<A>(gamma / sqrt(static_cast<double>(arguments.given_variance[c]) + arguments.epsilon));
        result.b = beta;
        return result;
    }
    const int64 slot = slot_index(p, p.group, c), plane = slot_plane(p);
    result.a = gamma * arguments.saved[slot + 2 * plane];
    result.b = beta;
    if (arguments.renormed) {
        result.a *= arguments.saved[slot + 3 * plane];
        result.b = fused(gamma, arguments.saved[slot + 4 * plane], result.b);
    }
    result.b = fused(-arguments.saved[slot + plane], result.a, result.b);
    return result;
}

// Calls leave(column, make(channel)) for every column of the slab, between two barriers: what make finds costs a root and a
// division in double, and many loads, so each channel has a thread of its own. It goes to the scratch, to at most
// `tables` numbers for each column.
template <int32 tables, typename Make, typename Leave>
__device__ __forceinline__ void for_columns(const Place& p, Make make, Leave leave) {
    const int32 me = thread_number();
    const int64 channel = static_cast<int64>(p.slab) * p.slab_channels + me;
    __syncthreads();
    if constexpr (FOLDED) {  // once per channel, and from there to its columns
        typedef decltype(make(channel)) Made;
        Made* const made = reinterpret_cast<Made*>(reinterpret_cast<A*>(scratch()) + tables * widest_slab);
        static_assert(tables * widest_slab * sizeof(A) + most_folded * sizeof(Made) <= scratch_size, "both have room");
        if (me < p.slab_channels && channel < p.channels) made[me] = make(channel);
        __syncthreads();
        const int32 columns = p.slab_channels * static_cast<int32>(p.inner);
#pragma unroll 1
        for (int32 column = me; column < columns; column += threads_in_block())
            leave(column, made[divide(static_cast<uint64>(column), p.inner_multiplier, p.inner_shift)]);
    } else {
        if (me < p.slab_channels && channel < p.channels) leave(me, make(channel));
    }
    __syncthreads();
}

// This thread's numbers out of one for each channel of the slab.
__device__ __forceinline__ void own_channels(const A* table, A (&own)[held]) {
#pragma unroll
    for (int32 i = 0; i < held; ++i) own[i] = table[static_cast<int32>(threadIdx.x) * held + i];
}

// The same, read here and now, for one unit: where registers are scarce.
__device__ __forceinline__ void reload_channels(const A* table, A (&own)[held]) {
    constexpr int32 at_once = 16 / static_cast<int32>(sizeof(A));
    if constexpr (held % at_once == 0) {
#pragma unroll
        for (int32 start = 0; start < held; start += at_once) {
            union {
                uint4 words;
                A values[at_once];
            } some;
            some.words = reload_shared_16(table + static_cast<int32>(threadIdx.x) * held + start);
#pragma unroll
            for (int32 i = 0; i < at_once; ++i) own[start + i] = some.values[i];
        }
    } else {
        own_channels(table, own);
    }
}
