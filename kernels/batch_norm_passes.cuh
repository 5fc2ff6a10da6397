// Batch normalisation: the two passes over a block's split, and what stays on chip between them.
#pragma once
#include "batch_norm_place.cuh"

// A place holds the packets of one unit (forward: x; backward: x and g) for the thread that put them there.

struct Nowhere {
    static constexpr bool keeps = false;
    __device__ __forceinline__ void keep(int32, const Packet&) const {}
};

template <int32 packets> struct InShared {
    static constexpr bool keeps = true;
    unsigned char* memory;
    int32 number;  // of the unit, among those of its thread

    __device__ __forceinline__ STORAGE* address(int32 which) const {
        return reinterpret_cast<STORAGE*>(memory) +
               (static_cast<int64>(packets * number + which) * threads_in_block() + thread_number()) * width;
    }
    __device__ __forceinline__ void keep(int32 which, const Packet& value) const { put(address(which), value); }
    __device__ __forceinline__ Packet recall(int32 which) const { return take(address(which)); }
};

// A load of the first pass: what is kept is not read again.
template <typename Where> __device__ __forceinline__ Packet take_first(const Where&, const STORAGE* address) {
    return take<Where::keeps ? last_touch : cache::keep>(address);
}

// The next `ahead` units of a walk, the first of them its unit `number`: fetch(slot, unit, place) is called for all of
// them first, so that their loads are in flight together, then body(slot, unit, place) for each. place_at(number) gives
// a unit's place. `full`: the walk has so many.
template <int32 ahead, bool full, typename PlaceAt, typename Fetch, typename Body>
__device__ __forceinline__ void for_batch(
    const Place& p, Walk& walk, int32 number, PlaceAt place_at, Fetch& fetch, Body& body) {
    Unit units[ahead];
    bool real[ahead];
#pragma unroll
    for (int32 slot = 0; slot < ahead; ++slot) {
        real[slot] = full || walk.left > 0;
        units[slot] = real[slot] ? walk.next(p) : Unit{0, all_elements};
        if (real[slot]) fetch(slot, units[slot], place_at(number + slot));
    }
#pragma unroll
    for (int32 slot = 0; slot < ahead; ++slot) {
        if (real[slot]) body(slot, units[slot], place_at(number + slot));
    }
}

// Goes through a range, `ahead` units at a time: full batches in a loop of their own, which asks nothing per unit, unless
// two loops take too many registers.
template <int32 ahead, bool full_apart, typename PlaceAt, typename Fetch, typename Body>
__device__ __forceinline__ void for_units(
    const Place& p, const Range& range, bool backwards, PlaceAt place_at, Fetch& fetch, Body& body) {
    Walk walk(p, range, backwards);
    int32 number = 0;
    if constexpr (full_apart) {
#pragma unroll 1
        for (; walk.left >= ahead; number += ahead) for_batch<ahead, true>(p, walk, number, place_at, fetch, body);
    }
#pragma unroll 1
    for (; walk.left > 0; number += ahead) for_batch<ahead, false>(p, walk, number, place_at, fetch, body);
}

// Whether full batches of this many packets per unit get a loop of their own: it takes registers and, in kernels of one
// launch, which have many loops, time to compile.
template <int32 packets, bool one_launch>
constexpr bool full_apart = packets == 1 || (!one_launch && held < 8 && sizeof(A) < 8);

// Keepers say how the two passes go through a block's split. `packets` is what they keep of a unit; `first_ahead` and
// `second_ahead<loaded>` are the most units in flight in a pass, the second one's by the packets that it loads for each;
// `one_launch` says that the same launch does both passes; `cases_apart`, whether backward has loops for each case.

// The second pass reads everything again, backwards: what was read last may still be in the L2 cache. A block of one launch
// has a multiprocessor nearly for itself, so it has more in flight; so have threads that load less than 16 bytes.
template <int32 packets> struct KeepNothing {
    static constexpr bool one_launch = false;
    // Forward, with all factors in registers, these leave few of them.
    static constexpr bool scarce = packets == 1 && (held == 8 || sizeof(A) == 8);
#if defined(GL_ENTRY_gl_bn_forward) || defined(GL_ENTRY_gl_bn_backward)
    static constexpr bool cases_apart = false;  // so small a slab is soon done, and more loops take more registers
    static constexpr int32 first_ahead = (scarce ? 4 : held == 8 ? 6 : 8) / packets;
    template <int32 loaded> static constexpr int32 second_ahead = loaded == 1 ? 4 : RAGGED ? 2 : FOLDED ? 3 : 4;
#else
    static constexpr bool cases_apart = true;
    // Fewer where the walk through the units of rows takes registers, and fewest where statistics take them, too.
#if defined(GL_ENTRY_gl_bn_statistics)
    static constexpr int32 more_of_rows = width == 2 && sizeof(STORAGE) == 4 ? -1 : 0;
#else
    static constexpr int32 more_of_rows = narrow_words ? 2 : 0;
#endif
    static constexpr bool wide = whole_words || (packets == 2 && sizeof(A) == 8);
    static constexpr int32 more_of_columns = wide ? 0 : narrow_words && packets == 1 ? 4 : 2;
    static constexpr int32 more = CHANNELS_LAST ? more_of_columns : more_of_rows;
    static constexpr int32 first_ahead = (4 + more) / packets;
    static constexpr bool rows_of_words = !CHANNELS_LAST && whole_words;
    template <int32 loaded>
    static constexpr int32 second_ahead = scarce ? 4 / loaded : rows_of_words && loaded > packets ? 3 : first_ahead;
#endif

    template <typename Fetch, typename Body>
    __device__ __forceinline__ void first_pass(const Place& p, Fetch fetch, Body body) {
        for_units<first_ahead, full_apart<packets, one_launch>>(
            p, range_of_split(p), false, [](int32) { return Nowhere{}; }, fetch, body);
    }
    template <int32 loaded, typename Fetch, typename Body>
    __device__ __forceinline__ void second_pass(const Place& p, Fetch fetch, Body body) {
        for_units<second_ahead<loaded>, full_apart<packets, one_launch>>(
            p, range_of_split(p), true, [](int32) { return Nowhere{}; }, fetch, body);
    }
};

// The whole split stays in dynamic shared memory. Such blocks fill a multiprocessor alone, so more loads are in flight; in
// the second pass they are those of a residual. Units of ragged rows take more registers.
template <int32 packets> struct KeepShared {
    static constexpr bool one_launch = true, cases_apart = true;
    static constexpr int32 first_ahead = (RAGGED && packets == 1 ? 6 : 8) / packets;
    template <int32 loaded> static constexpr int32 second_ahead = 4 / packets;
    unsigned char* memory;

    template <typename Fetch, typename Body>
    __device__ __forceinline__ void first_pass(const Place& p, Fetch fetch, Body body) {
        unsigned char* const copies = memory;
        for_units<first_ahead, full_apart<packets, one_launch>>(
            p, range_of_split(p), false, [=](int32 number) { return InShared<packets>{copies, number}; }, fetch, body);
    }
    template <int32 loaded, typename Fetch, typename Body>
    __device__ __forceinline__ void second_pass(const Place& p, Fetch fetch, Body body) {
        unsigned char* const copies = memory;
        for_units<second_ahead<loaded>, full_apart<packets, one_launch>>(
            p, range_of_split(p), false, [=](int32 number) { return InShared<packets>{copies, number}; }, fetch, body);
    }
};
