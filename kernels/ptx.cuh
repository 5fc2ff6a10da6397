// The one header with inline PTX. Every instruction stands behind a named function with a host twin (GL_HOST is defined
// in the build that the tests run on a CPU), so that kernels are the same text in both builds.
//
// Rules: loads with a hint read only memory that the launch does not write. Order between blocks comes from the
// acquire and release functions here, never from plain loads and stores of a counter.
#pragma once

#ifdef GL_HOST
#define GL_PTX(device_code, host_code) host_code
#else
#define GL_PTX(device_code, host_code) device_code
#endif

// Whether a field of a struct lies at an offset. NVRTC before CUDA 13.4 has no offsetof: there the struct's size is
// checked alone, and the same struct's offsets in the other builds.
#ifdef GL_HOST
#define GL_LIES_AT(type, field, offset) (__builtin_offsetof(type, field) == (offset))
#elif __has_builtin(__builtin_offsetof)
#define GL_LIES_AT(type, field, offset) (__builtin_offsetof(type, field) == (offset))
#else
#define GL_LIES_AT(type, field, offset) true
#endif

// ---- kernel entries and shared memory ------------------------------------------------------------------------------

#ifndef CLUSTER
#define CLUSTER 1  // blocks per hardware cluster; a specialisation may define it as 2, 4 or 8 (sm_90 and later)
#endif

#ifdef GL_HOST
// The launcher under test reads the largest block from the second symbol.
#define GL_FIRST(first, ...) first
#define GL_KERNEL(name, ...)                                                     \
    extern "C" const int name##_largest_block = GL_FIRST(__VA_ARGS__, 0); \
    extern "C" void name(const name##_arguments& arguments)
// Each block owns its shared memory, also when several blocks are alive: a static would be shared between them.
#define GL_SHARED(type, name, dimensions)         \
    typedef type name##_shared_type dimensions;   \
    static char name##_shared_tag;                \
    name##_shared_type& name = *static_cast<name##_shared_type*>( \
        emulation_static_shared(&name##_shared_tag, sizeof(name##_shared_type)))
#define GL_DYNAMIC_SHARED(name) unsigned char* const name = static_cast<unsigned char*>(emulation_dynamic_shared())
#else
#if CLUSTER > 1
#define GL_CLUSTER_ATTRIBUTE __cluster_dims__(CLUSTER, 1, 1)
#else
#define GL_CLUSTER_ATTRIBUTE
#endif
// GL_KERNEL(name, largest_block) or GL_KERNEL(name, largest_block, blocks): `blocks` that one multiprocessor shall hold.
#define GL_KERNEL(name, ...)                                                   \
    extern "C" __global__ void GL_CLUSTER_ATTRIBUTE __launch_bounds__(__VA_ARGS__) \
        name(const __grid_constant__ name##_arguments arguments)
// 16 bytes for 16-byte accesses: the compiler itself gives a variable no more than its element needs.
#define GL_SHARED(type, name, dimensions) __shared__ __align__(16) type name dimensions
#define GL_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

// blockIdx.x, and the number of a thread in a block of (x, y), read here and now: what is computed from them is computed
// again, and takes no registers in between.
__device__ __forceinline__ int block_number_again() {
#ifdef GL_HOST
    return static_cast<int>(blockIdx.x);
#else
    int number;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(number));
    return number;
#endif
}

__device__ __forceinline__ int thread_number_again() {
#ifdef GL_HOST
    return static_cast<int>(threadIdx.x + blockDim.x * threadIdx.y);
#else
    int x, y;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    asm volatile("mov.u32 %0, %%tid.y;" : "=r"(y));
    return x + static_cast<int>(blockDim.x) * y;
#endif
}

// ---- 16-bit floats -------------------------------------------------------------------------------------------------

// Value of an IEEE binary16.
__device__ __forceinline__ float half_bits_to_float(unsigned short bits) {
#ifdef GL_HOST
    unsigned int sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, fraction = bits & 0x3ffu;
    if (exponent == 31u) return __uint_as_float(sign | 0x7f800000u | (fraction << 13));
    if (exponent != 0u) return __uint_as_float(sign | ((exponent + 112u) << 23) | (fraction << 13));
    float value = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24: subnormal halves are exact floats
    return sign ? -value : value;
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#endif
}

// Nearest binary16, ties to even; overflow gives infinity.
__device__ __forceinline__ unsigned short float_to_half_bits(float value) {
#ifdef GL_HOST
    unsigned int bits = __float_as_uint(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<unsigned short>(0x7fffu);
    if (magnitude >= 0x477ff000u) return static_cast<unsigned short>(sign | 0x7c00u);  // 65520 and more
    if (magnitude >= 0x38800000u) {  // 2^-14: a normal half
        unsigned int rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
        return static_cast<unsigned short>(sign | (rounded >> 13));
    }
    // Adding 0.5 puts the subnormal half's unit at the float's last bit; the FPU rounds to even.
    float shifted = __uint_as_float(magnitude) + 0.5f;
    return static_cast<unsigned short>(sign | (__float_as_uint(shifted) - 0x3f000000u));
#else
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#endif
}

// Nearest bfloat16, ties to even.
__device__ __forceinline__ unsigned short float_to_bfloat_bits(float value) {
#if !defined(GL_HOST) && __CUDA_ARCH__ >= 800
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    unsigned int bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<unsigned short>(0x7fffu);
    return static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

// The larger of a value and a floor that is a number; NaN stays NaN.
__device__ __forceinline__ float at_least(float value, float floor) {
#if !defined(GL_HOST) && __CUDA_ARCH__ >= 800
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(value), "f"(floor));
    return result;
#else
    return value <= floor ? floor : value;
#endif
}
__device__ __forceinline__ double at_least(double value, double floor) { return value <= floor ? floor : value; }

// ---- vector accesses and cache hints -------------------------------------------------------------------------------

// 16 bytes from global memory. The address is a multiple of 16 (the host build checks it).
__device__ __forceinline__ uint4 load_16(const void* address) {
    GL_PTX(, emulation_check_alignment(address, 16));
    return *static_cast<const uint4*>(address);
}

__device__ __forceinline__ void store_16(void* address, uint4 value) {
    GL_PTX(, emulation_check_alignment(address, 16));
    *static_cast<uint4*>(address) = value;
}

// The same for data that nobody reads again soon: it is the first to leave the caches.
__device__ __forceinline__ uint4 load_16_streaming(const void* address) {
#ifdef GL_HOST
    return load_16(address);
#else
    uint4 v;
    asm volatile("ld.global.cs.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
#endif
}

__device__ __forceinline__ void store_16_streaming(void* address, uint4 v) {
#ifdef GL_HOST
    store_16(address, v);
#else
    asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};"
                 ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
}

// 16 bytes of shared memory, read here and now: not kept in registers from one round of a loop to the next. What they hold
// was written before the last __syncthreads.
__device__ __forceinline__ uint4 reload_shared_16(const void* address) {
#ifdef GL_HOST
    return load_16(address);
#else
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(static_cast<unsigned int>(__cvta_generic_to_shared(address)))
                 : "memory");
    return v;
#endif
}

// ---- order between blocks ------------------------------------------------------------------------------------------

// Between threads of a block, __syncthreads orders what they wrote, and an atomic with release by one of them behind it
// passes all of that on (causality order in the memory model of PTX is transitive): one instruction does it, no further
// fence. The host twins order no more than that, so that ThreadSanitizer sees where something is missing.

// Adds and returns the old value. Everything this thread (and, through a preceding __syncthreads, its block) wrote is
// visible to whoever adds with atomic_add_acquire_release later, or reads the new value and then calls acquire_fence.
__device__ __forceinline__ unsigned int atomic_add_acquire_release(unsigned int* address, unsigned int value) {
#ifdef GL_HOST
    return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
#else
    unsigned int old;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(value) : "memory");
    return old;
#endif
}

// The same where nobody reads anything else because of it.
__device__ __forceinline__ unsigned int atomic_add_relaxed(unsigned int* address, unsigned int value) {
#ifdef GL_HOST
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
#else
    unsigned int old;
    asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(value) : "memory");
    return old;
#endif
}

// Reads a word that other blocks change. In the host build it lets other threads run first, so a loop around it ends.
__device__ __forceinline__ unsigned int load_relaxed(const unsigned int* address) {
#ifdef GL_HOST
    emulation_spin();
    return __atomic_load_n(address, __ATOMIC_RELAXED);
#else
    unsigned int value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
#endif
}

// After a load_relaxed from `address`: what was written before the value it read was released is visible from here on.
__device__ __forceinline__ void acquire_fence(const unsigned int* address) {
#ifdef GL_HOST
    (void)__atomic_load_n(address, __ATOMIC_ACQUIRE);  // ThreadSanitizer knows no fences; later values are of the same chain
#else
    (void)address;
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}

// Writes a word that nobody reads before the next launch, or whose reader is ordered by something else.
__device__ __forceinline__ void store_relaxed(unsigned int* address, unsigned int value) {
#ifdef GL_HOST
    __atomic_store_n(address, value, __ATOMIC_RELAXED);
#else
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
#endif
}

// Steps aside for about `nanoseconds` inside a loop that waits.
__device__ __forceinline__ void pause_thread(unsigned int nanoseconds) {
#ifdef GL_HOST
    (void)nanoseconds;
    emulation_spin();
#else
    asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds));
#endif
}

// ---- clusters (sm_90 and later) ------------------------------------------------------------------------------------

#if CLUSTER > 1
// Number of this block in its cluster, from 0.
__device__ __forceinline__ unsigned int cluster_rank() {
#ifdef GL_HOST
    return emulation_cluster_rank();
#else
    unsigned int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#endif
}

// All threads of all blocks of the cluster meet; shared and global writes before it are seen by all of them after it.
__device__ __forceinline__ void cluster_barrier() {
#ifdef GL_HOST
    emulation_cluster_barrier();
#else
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Address of another block's copy of this block's shared variable. That block must have started (a cluster_barrier
// before the first use) and must not have ended (a cluster_barrier after the last use).
template <typename T>
__device__ __forceinline__ T* cluster_shared(T* mine, unsigned int rank) {
#ifdef GL_HOST
    return static_cast<T*>(emulation_cluster_shared(const_cast<void*>(static_cast<const void*>(mine)), rank));
#else
    unsigned long long address;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(mine), "r"(rank));
    return reinterpret_cast<T*>(address);
#endif
}
#endif

// ---- accesses of 2 to 16 bytes ---------------------------------------------------------------------------------------

// One word (uint4, uint2 or an integer) at a multiple of its size.
template <typename WORD>
__device__ __forceinline__ WORD load_word(const WORD* address) {
    GL_PTX(, emulation_check_alignment(address, sizeof(WORD)));
    return *address;
}

template <typename WORD>
__device__ __forceinline__ void store_word(WORD* address, WORD value) {
    GL_PTX(, emulation_check_alignment(address, sizeof(WORD)));
    *address = value;
}

// The same for data that nobody reads again soon.
__device__ __forceinline__ uint4 load_word_streaming(const uint4* address) { return load_16_streaming(address); }

__device__ __forceinline__ uint2 load_word_streaming(const uint2* address) {
#ifdef GL_HOST
    return load_word(address);
#else
    uint2 v;
    asm volatile("ld.global.cs.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
    return v;
#endif
}

__device__ __forceinline__ unsigned int load_word_streaming(const unsigned int* address) {
#ifdef GL_HOST
    return load_word(address);
#else
    unsigned int v;
    asm volatile("ld.global.cs.u32 %0, [%1];" : "=r"(v) : "l"(address));
    return v;
#endif
}

__device__ __forceinline__ unsigned short load_word_streaming(const unsigned short* address) {
#ifdef GL_HOST
    return load_word(address);
#else
    unsigned short v;
    asm volatile("ld.global.cs.u16 %0, [%1];" : "=h"(v) : "l"(address));
    return v;
#endif
}

__device__ __forceinline__ void store_word_streaming(uint4* address, uint4 value) { store_16_streaming(address, value); }

__device__ __forceinline__ void store_word_streaming(uint2* address, uint2 v) {
#ifdef GL_HOST
    store_word(address, v);
#else
    asm volatile("st.global.cs.v2.u32 [%0], {%1,%2};" ::"l"(address), "r"(v.x), "r"(v.y) : "memory");
#endif
}

__device__ __forceinline__ void store_word_streaming(unsigned int* address, unsigned int v) {
#ifdef GL_HOST
    store_word(address, v);
#else
    asm volatile("st.global.cs.u32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
#endif
}

__device__ __forceinline__ void store_word_streaming(unsigned short* address, unsigned short v) {
#ifdef GL_HOST
    store_word(address, v);
#else
    asm volatile("st.global.cs.u16 [%0], %1;" ::"l"(address), "h"(v) : "memory");
#endif
}

// ---- approximations: one instruction, where the exact operation takes a dozen and a branch ---------------------------

// 1 / x within 1 unit in the last place; subnormal numbers and results are 0, and 1 / 0 and 1 / infinity are exact.
__device__ __forceinline__ float approximate_reciprocal(float x) {
#ifdef GL_HOST
    return 1.0f / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// 2^x within 2 units in the last place; subnormal numbers and results are 0.
__device__ __forceinline__ float approximate_power_of_2(float x) {
#ifdef GL_HOST
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
