// What every kernel shares: integer names, storage types with their conversions, 16-byte vectors, reductions in a fixed
// order, the grid barrier. The loader puts this file in front of every kernel; it includes no CUDA header, because a
// header costs more compile time than the kernel.
#pragma once
#include "ptx.cuh"

typedef int int32;
typedef long long int64;
typedef unsigned char uint8;
typedef unsigned short uint16;
typedef unsigned int uint32;
typedef unsigned long long uint64;
typedef float float32;
typedef double float64;

struct float16 {
    uint16 bits;
};
struct bfloat16 {
    uint16 bits;
};

// ---- divisions ----------------------------------------------------------------------------------------------------------

// number / divisor, exact for every number below 2^64, by one multiplication in place of some seventy instructions. For a
// divisor d > 1 the caller brings shift = ceil(log2(d)) and multiplier = floor(2^64 (2^shift - d) / d) + 1.
// Source: Granlund, Montgomery 1994, figure 4.1.
__device__ __forceinline__ uint64 divide(uint64 number, uint64 multiplier, int32 shift) {
    const uint64 high = __umul64hi(number, multiplier);
    return (high + ((number - high) >> 1)) >> (shift - 1);
}

// ---- storage types -------------------------------------------------------------------------------------------------
// Arithmetic is in `accumulate_t<T>`: float for 16-bit and 32-bit storage, double for 64-bit storage.

template <typename T> struct accumulate_of { typedef float type; };
template <> struct accumulate_of<float64> { typedef double type; };
template <typename T> using accumulate_t = typename accumulate_of<T>::type;

__device__ __forceinline__ float widen(float16 x) { return half_bits_to_float(x.bits); }
__device__ __forceinline__ float widen(bfloat16 x) { return __uint_as_float(static_cast<uint32>(x.bits) << 16); }
__device__ __forceinline__ float widen(float32 x) { return x; }
__device__ __forceinline__ double widen(float64 x) { return x; }

// narrow<T>(value): nearest value of the storage type.
template <typename T> struct narrow_to;
template <> struct narrow_to<float16> {
    static __device__ __forceinline__ float16 from(float x) { return float16{float_to_half_bits(x)}; }
};
template <> struct narrow_to<bfloat16> {
    static __device__ __forceinline__ bfloat16 from(float x) { return bfloat16{float_to_bfloat_bits(x)}; }
};
template <> struct narrow_to<float32> {
    static __device__ __forceinline__ float32 from(float x) { return x; }
    static __device__ __forceinline__ float32 from(double x) { return static_cast<float>(x); }
};
template <> struct narrow_to<float64> {
    static __device__ __forceinline__ float64 from(double x) { return x; }
};
template <typename T, typename A>
__device__ __forceinline__ T narrow(A value) { return narrow_to<T>::from(value); }

// ---- vectors -------------------------------------------------------------------------------------------------------

// Elements of T in 16 bytes.
template <typename T> constexpr int vector_width = 16 / static_cast<int>(sizeof(T));

enum class cache { keep, streaming };  // streaming: last touch, first to be evicted

template <int BYTES> struct word_of { typedef uint4 type; };
template <> struct word_of<2> { typedef uint16 type; };
template <> struct word_of<4> { typedef uint32 type; };
template <> struct word_of<8> { typedef uint2 type; };

// N neighbours as they lie in memory. A thread that needs several streams fetches all of them first, so that the loads are
// under way together, and widens them afterwards. Accesses are 2 to 16 bytes long, the largest word that N elements fill;
// longer packets are several words of 16 bytes. The address is a multiple of the word's size.
template <int N, typename T> union neighbours {
    typedef typename word_of<N * static_cast<int>(sizeof(T))>::type word;
    static constexpr int word_count = N * static_cast<int>(sizeof(T)) / static_cast<int>(sizeof(word));
    static_assert(word_count * sizeof(word) == N * sizeof(T), "a packet is whole words");
    T values[N];
    word words[word_count];
    __device__ __forceinline__ neighbours() {}
};

template <int N, cache HINT = cache::keep, typename T>
__device__ __forceinline__ void fetch(const T* address, neighbours<N, T>& packet) {
    typedef typename neighbours<N, T>::word word;
#pragma unroll
    for (int i = 0; i < neighbours<N, T>::word_count; ++i) {
        const word* const place = reinterpret_cast<const word*>(address) + i;
        packet.words[i] = HINT == cache::streaming ? load_word_streaming(place) : load_word(place);
    }
}

template <cache HINT = cache::keep, int N, typename T>
__device__ __forceinline__ void put(T* address, const neighbours<N, T>& packet) {
    typedef typename neighbours<N, T>::word word;
#pragma unroll
    for (int i = 0; i < neighbours<N, T>::word_count; ++i) {
        word* const place = reinterpret_cast<word*>(address) + i;
        if (HINT == cache::streaming) {
            store_word_streaming(place, packet.words[i]);
        } else {
            store_word(place, packet.words[i]);
        }
    }
}

template <int N, typename T>
__device__ __forceinline__ void widen(const neighbours<N, T>& packet, accumulate_t<T> (&values)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = widen(packet.values[i]);
}

// Reads N neighbours at `address` and widens them.
template <int N, cache HINT = cache::keep, typename T>
__device__ __forceinline__ void load(const T* address, accumulate_t<T> (&values)[N]) {
    neighbours<N, T> packet;
    fetch<N, HINT>(address, packet);
    widen(packet, values);
}

// Narrows N values and writes them at `address`.
template <int N, cache HINT = cache::keep, typename T>
__device__ __forceinline__ void store(T* address, const accumulate_t<T> (&values)[N]) {
    neighbours<N, T> packet;
#pragma unroll
    for (int i = 0; i < N; ++i) packet.values[i] = narrow<T>(values[i]);
    put<HINT>(address, packet);
}

// ---- reductions in a fixed order -----------------------------------------------------------------------------------

constexpr uint32 all_lanes = 0xffffffffu;

__device__ __forceinline__ int32 thread_number() {
    return static_cast<int32>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}
__device__ __forceinline__ int32 threads_in_block() { return static_cast<int32>(blockDim.x * blockDim.y * blockDim.z); }
__device__ __forceinline__ int32 lane_number() { return thread_number() & 31; }
__device__ __forceinline__ int32 warp_number() { return thread_number() >> 5; }

// Sum over the 32 lanes of a full warp; every lane gets it.
template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance >>= 1) value += __shfl_xor_sync(all_lanes, value, distance);
    return value;
}

// Sum over the block (a multiple of 32 threads, at most 1024); every thread gets it. All threads call it.
template <typename A>
__device__ __forceinline__ A block_sum(A value) {
    GL_SHARED(A, partial, [32]);
    value = warp_sum(value);
    __syncthreads();  // the previous call's readers are done
    if (lane_number() == 0) partial[warp_number()] = value;
    __syncthreads();
    const int32 warps = threads_in_block() >> 5;
    return warp_sum(lane_number() < warps ? partial[lane_number()] : A(0));
}

// ---- blocks that wait for each other -------------------------------------------------------------------------------

// True in all threads of the block that comes last of `blocks`; what the others wrote before their call is visible to
// it. The counter starts at zero and is zero again afterwards. All threads of every block call it.
__device__ __forceinline__ bool last_block(uint32* counter, uint32 blocks) {
    GL_SHARED(uint32, last, );
    __syncthreads();
    if (thread_number() == 0) {
        last = atomic_add_acquire_release(counter, 1u) == blocks - 1u;
        if (last) store_relaxed(counter, 0u);
    }
    __syncthreads();
    return last != 0u;
}

// Waits until `blocks` blocks, all resident at once, have arrived; `first` is true in exactly one of them. The counter's
// top bit flips with every use and the rest returns to what it was, so it is never cleared: it is a word of the caller's
// own, not one of the workspace, which every launch leaves zero.
__device__ __forceinline__ void grid_barrier(uint32* counter, uint32 blocks, bool first) {
    __syncthreads();
    if (thread_number() == 0) {
        const uint32 old = atomic_add_acquire_release(counter, first ? 0x80000000u - (blocks - 1u) : 1u);
        while (((load_relaxed(counter) ^ old) & 0x80000000u) == 0u) pause_thread(20);
        acquire_fence(counter);
    }
    __syncthreads();
}

// A gate for blocks that are all resident at once: shut until one of them opens it, and shut again when `blocks` have
// left. The word is zero before and after, so nothing clears it, and a launch does not depend on the one before: the top
// bit says open, the rest counts those that have left. All threads of a block call each of the three.

// What the block wrote before is visible to those who have passed the gate.
__device__ __forceinline__ void open_gate(uint32* gate) {
    __syncthreads();
    if (thread_number() == 0) atomic_add_acquire_release(gate, 0x80000000u);
}
__device__ __forceinline__ void pass_gate(const uint32* gate) {
    __syncthreads();
    if (thread_number() == 0) {
        while ((load_relaxed(gate) & 0x80000000u) == 0u) pause_thread(20);
        acquire_fence(gate);
    }
    __syncthreads();
}
// Once by each block that has passed, the one that opened it too. Nothing else hangs on it, so it orders nothing.
__device__ __forceinline__ void leave_gate(uint32* gate, uint32 blocks) {
    if (thread_number() == 0 && atomic_add_relaxed(gate, 1u) == 0x80000000u + blocks - 1u) store_relaxed(gate, 0u);
}
