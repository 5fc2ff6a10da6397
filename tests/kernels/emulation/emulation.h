// CUDA's device language for g++, as far as kernels/ uses it. The runtime (runtime.cpp) runs every CUDA thread as a
// fiber, or as an OS thread when GL_EMULATION_THREADS is defined (for ThreadSanitizer).
#pragma once
#include <math.h>
#include <stddef.h>
#include <string.h>

#define GL_HOST 1
#define __CUDA_ARCH__ 900
#define __device__
#define __host__
#define __global__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
// __shared__ is left out on purpose: GL_SHARED gives every block its own copy, a raw __shared__ could not.

struct uint3 {
    unsigned int x, y, z;
};
typedef uint3 dim3;
struct alignas(8) uint2 {
    unsigned int x, y;
};
struct alignas(16) uint4 {
    unsigned int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) double2 {
    double x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

struct emulation_position {
    uint3 thread, block, block_size, grid_size;
};

#ifdef GL_EMULATION_THREADS
#define GL_EMULATION_LOCAL __thread
#else
#define GL_EMULATION_LOCAL
#endif

extern "C" {
extern GL_EMULATION_LOCAL const emulation_position* emulation_here;
[[noreturn]] void emulation_fail(const char* what);
void emulation_syncthreads(int line);
// All lanes of `mask` meet; returns the 32 values they brought (others are poison).
const unsigned long long* emulation_warp_meet(unsigned mask, unsigned long long value, int line);
void emulation_spin(void);
void* emulation_static_shared(const void* tag, size_t size);
void* emulation_dynamic_shared(void);
unsigned emulation_cluster_rank(void);
void emulation_cluster_barrier(void);
void* emulation_cluster_shared(void* mine, unsigned rank);
}

#define threadIdx (emulation_here->thread)
#define blockIdx (emulation_here->block)
#define blockDim (emulation_here->block_size)
#define gridDim (emulation_here->grid_size)
#define warpSize 32

inline void emulation_check_alignment(const void* address, size_t alignment) {
    if (reinterpret_cast<size_t>(address) % alignment != 0) emulation_fail("a vector access is not aligned");
}

// ---- barriers, votes, shuffles -------------------------------------------------------------------------------------

#define __syncthreads() emulation_syncthreads(__LINE__)
#define __syncwarp(...) ((void)emulation_warp_meet(emulation_mask(__VA_ARGS__), 0, __LINE__))
#define __ballot_sync(mask, predicate) emulation_ballot(mask, (predicate) ? 1 : 0, __LINE__)
#define __any_sync(mask, predicate) (emulation_ballot(mask, (predicate) ? 1 : 0, __LINE__) != 0u)
#define __all_sync(mask, predicate) (emulation_ballot(mask, (predicate) ? 1 : 0, __LINE__) == (mask))
#define __shfl_sync(mask, value, ...) emulation_shuffle(0, mask, value, __LINE__, __VA_ARGS__)
#define __shfl_up_sync(mask, value, ...) emulation_shuffle(1, mask, value, __LINE__, __VA_ARGS__)
#define __shfl_down_sync(mask, value, ...) emulation_shuffle(2, mask, value, __LINE__, __VA_ARGS__)
#define __shfl_xor_sync(mask, value, ...) emulation_shuffle(3, mask, value, __LINE__, __VA_ARGS__)

inline unsigned emulation_mask(unsigned mask = 0xffffffffu) { return mask; }
inline unsigned emulation_lane() {
    const emulation_position* p = emulation_here;
    return (p->thread.x + p->block_size.x * (p->thread.y + p->block_size.y * p->thread.z)) & 31u;
}
inline unsigned emulation_ballot(unsigned mask, unsigned long long bit, int line) {
    const unsigned long long* values = emulation_warp_meet(mask, bit, line);
    unsigned result = 0;
    for (int lane = 0; lane < 32; ++lane)
        if ((mask >> lane & 1u) && values[lane]) result |= 1u << lane;
    return result;
}
template <typename T>
inline T emulation_shuffle(int kind, unsigned mask, T value, int line, int operand, int width = 32) {
    static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
    unsigned long long word = 0;
    memcpy(&word, &value, sizeof(T));
    const unsigned long long* values = emulation_warp_meet(mask, word, line);
    const int lane = static_cast<int>(emulation_lane()), first = lane & ~(width - 1), last = first + width - 1;
    int source = lane;
    if (kind == 0) source = first + (operand & (width - 1));
    if (kind == 1) source = lane - operand < first ? lane : lane - operand;
    if (kind == 2) source = lane + operand > last ? lane : lane + operand;
    if (kind == 3) source = (lane ^ operand) > last ? lane : lane ^ operand;
    if (!(mask >> source & 1u)) emulation_fail("a shuffle reads from a lane that takes no part");
    memcpy(&value, &values[source], sizeof(T));
    return value;
}

// ---- atomics -------------------------------------------------------------------------------------------------------

#define __threadfence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define __threadfence_block() __atomic_thread_fence(__ATOMIC_SEQ_CST)
template <typename T> inline T atomicAdd(T* address, T value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }
template <typename T> inline T atomicOr(T* address, T value) { return __atomic_fetch_or(address, value, __ATOMIC_RELAXED); }
template <typename T> inline T atomicAnd(T* address, T value) { return __atomic_fetch_and(address, value, __ATOMIC_RELAXED); }
template <typename T> inline T atomicExch(T* address, T value) { return __atomic_exchange_n(address, value, __ATOMIC_RELAXED); }
template <typename T> inline T atomicCAS(T* address, T expected, T value) {
    __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}
template <typename T> inline T atomicMax(T* address, T value) {
    T old = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (old < value && !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}
template <typename T> inline T atomicMin(T* address, T value) {
    T old = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (value < old && !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}

// ---- arithmetic ----------------------------------------------------------------------------------------------------

inline unsigned __float_as_uint(float x) { unsigned r; memcpy(&r, &x, 4); return r; }
inline int __float_as_int(float x) { int r; memcpy(&r, &x, 4); return r; }
inline float __uint_as_float(unsigned x) { float r; memcpy(&r, &x, 4); return r; }
inline float __int_as_float(int x) { float r; memcpy(&r, &x, 4); return r; }
inline long long __double_as_longlong(double x) { long long r; memcpy(&r, &x, 8); return r; }
inline double __longlong_as_double(long long x) { double r; memcpy(&r, &x, 8); return r; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
#define GL_EMULATION_MINMAX(T)                           \
    inline T min(T a, T b) { return b < a ? b : a; }     \
    inline T max(T a, T b) { return a < b ? b : a; }
GL_EMULATION_MINMAX(int)
GL_EMULATION_MINMAX(unsigned)
GL_EMULATION_MINMAX(long long)
GL_EMULATION_MINMAX(unsigned long long)
#undef GL_EMULATION_MINMAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
