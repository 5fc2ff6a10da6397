// Batch normalisation: what a thread moves at once, and the bits of a ReLU (batch_norm.cuh has the whole picture).
#pragma once

typedef accumulate_t<STORAGE> A;

constexpr int32 width = PACKET;                    // elements of one access
constexpr int32 held = CHANNELS_LAST ? width : 1;  // columns of one thread: channels, or what is folded to channels
constexpr int32 largest = 256;                     // threads of a block
constexpr int32 widest = FOLDED ? 64 : 16;         // lanes of a block where threads hold several columns
constexpr int32 widest_slab = held > 1 ? held * widest : 32;  // columns of a slab
constexpr int32 most_folded = 64;                             // channels of a slab whose columns are folded
constexpr bool whole_words = width == vector_width<STORAGE>;  // an access is of 16 bytes
constexpr bool narrow_words = width * sizeof(STORAGE) <= 4;
static_assert(!FOLDED || (CHANNELS_LAST && whole_words), "columns are folded where rows are read 16 bytes at a time");
static_assert(!RAGGED || (!CHANNELS_LAST && whole_words), "ragged are a channel's rows, read 16 bytes at a time");

// What one access moves, as it lies in memory: a quarter of the registers that widened 16-bit values would take.
typedef neighbours<width, STORAGE> Packet;

// How memory is accessed that is touched for the last time. Single elements are not: neighbours share their lines.
constexpr cache last_touch = width == 1 ? cache::keep : cache::streaming;

template <cache HINT = cache::keep> __device__ __forceinline__ Packet take(const STORAGE* address) {
    Packet result;
    fetch<width, HINT>(address, result);
    return result;
}

constexpr uint32 all_elements = (1u << width) - 1u;

// What a thread works on at once: the packet at an offset, and which of its elements are the thread's. All of them are,
// except in ragged rows: there, packets at the ends have elements of the neighbouring rows, too, which are loaded with the
// others and are used for nothing.
struct Unit {
    int64 offset;
    uint32 elements;  // a bit for each, in ragged rows

    __device__ __forceinline__ bool has(int32 i) const { return !RAGGED || (elements >> i & 1u) != 0u; }
    __device__ __forceinline__ bool whole() const { return !RAGGED || elements == all_elements; }
    // Values of each of the thread's columns.
    __device__ __forceinline__ int32 values() const { return RAGGED ? __popc(elements) : CHANNELS_LAST ? 1 : width; }
};

// Puts `value` in place of what a unit does not have, which may be infinite or NaN: no product with it is to be taken.
__device__ __forceinline__ void replace_others(const Unit& unit, Packet& packet, STORAGE value) {
    if (unit.whole()) return;
#pragma unroll
    for (int32 i = 0; i < width; ++i)
        if (!unit.has(i)) packet.values[i] = value;
}

// Writes the elements that a unit has. The others belong to other threads: a packet that has some of them is not written
// as a whole.
template <cache HINT = cache::keep>
__device__ __forceinline__ void put_unit(STORAGE* array, const Unit& unit, const Packet& packet) {
    if (unit.whole()) {
        put<HINT>(array + unit.offset, packet);
        return;
    }
#pragma unroll
    for (int32 i = 0; i < width; ++i)
        if (unit.has(i)) array[unit.offset + i] = packet.values[i];
}

template <cache HINT = cache::keep>
__device__ __forceinline__ void store_unit(STORAGE* array, const Unit& unit, const A (&values)[width]) {
    Packet packet;
#pragma unroll
    for (int32 i = 0; i < width; ++i) packet.values[i] = narrow<STORAGE>(values[i]);
    put_unit<HINT>(array, unit, packet);
}

// The bits of a ReLU behind a residual: one byte for every 16 bytes of x, in memory order; bit i says that the i-th of the
// elements there is > 0. Threads that have 16 bytes to themselves own their byte and write it; the plan knows who does. All
// accesses can read them.
constexpr bool leaves_bits = whole_words && !RAGGED;
constexpr int32 elements_of_byte = vector_width<STORAGE>;

__device__ __forceinline__ uint32 take_bits(const uint8* bits, int64 offset) {
    const uint32 whole = bits[offset / elements_of_byte];
    return whole_words ? whole : whole >> static_cast<int32>(offset % elements_of_byte) & all_elements;
}

// Which of the outputs y are > 0.
__device__ __forceinline__ uint32 bits_of(const Packet& y) {
    uint32 bits = 0u;
#pragma unroll
    for (int32 i = 0; i < width; ++i)
        if (widen(y.values[i]) > A(0)) bits |= 1u << i;
    return bits;
}

// Whether an output that was loaded is asked for its sign only when the loads behind it are under way. Several elements are
// asked at once, as their bits take fewer registers.
constexpr bool signs_late = width == 1;

// g where its bit is set, else 0.
__device__ __forceinline__ void mask(Packet& g, uint32 bits) {
#pragma unroll
    for (int32 i = 0; i < width; ++i)
        if (!(bits >> i & 1u)) g.values[i] = STORAGE{};
}
