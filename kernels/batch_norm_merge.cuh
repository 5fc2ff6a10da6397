// Batch normalisation: sums of threads, columns and splits become those of a channel, in a fixed order.
#pragma once
#include "batch_norm_place.cuh"

// Memory of the block that its steps use one after the other: each begins with a barrier before it writes there.
// Of every warp, and of every lane, a thread's sums; or two sums in double of every thread.
constexpr int32 with_sums = held > 1 && widest < 32 ? largest / 2 : largest;
constexpr int32 size_of_sums = (2 * held + 1) * with_sums * static_cast<int32>(sizeof(A));
constexpr int32 scratch_size = size_of_sums > 2 * largest * 8 ? size_of_sums : 2 * largest * 8;

__device__ __forceinline__ unsigned char* scratch() {
    GL_SHARED(unsigned char, memory, [scratch_size]);
    return memory;
}

// Sums that a block leaves in its scratch for each thread of the first `columns`, left_in_scratch(columns) apart.
__device__ __forceinline__ int32 left_in_scratch(int32 columns) {
    return (threads_in_block() >> 5) * (columns < 32 ? columns : 32);
}

// Merges what the threads of each column hold, thread = part * columns + column, in a fixed tree. The threads of part 0
// get the result, and leave it in the scratch: its i-th number at i * left_in_scratch(columns) + thread.
// merge(mine, theirs) calls theirs(i) once for each i, and before it changes mine[i]: another set of registers is not
// there. `columns` is a power of two.
template <typename T, int32 count, typename Merge>
__device__ __forceinline__ void merge_columns(T (&mine)[count], int32 columns, Merge merge) {
#pragma unroll 1
    for (int32 distance = columns; distance < 32; distance <<= 1)
        merge(mine, [&](int32 i) { return __shfl_xor_sync(all_lanes, mine[i], distance); });
    // The threads of a warp that share a column hold the same columns now: one of them goes on.
    const int32 me = thread_number_again(), lane = me & 31, of_warp = columns < 32 ? columns : 32;
    const int32 left = left_in_scratch(columns);
    T* const memory = reinterpret_cast<T*>(scratch());
    __syncthreads();
    if (lane < of_warp) {
#pragma unroll
        for (int32 i = 0; i < count; ++i) memory[i * left + (me >> 5) * of_warp + lane] = mine[i];
    }
#pragma unroll 1
    for (int32 half = left / 2; half >= columns; half >>= 1) {
        __syncthreads();
        if (me < half) {
#pragma unroll
            for (int32 i = 0; i < count; ++i) mine[i] = memory[i * left + me];
            merge(mine, [&](int32 i) { return memory[i * left + me + half]; });
#pragma unroll
            for (int32 i = 0; i < count; ++i) memory[i * left + me] = mine[i];
        }
    }
}

// Two sums over the threads of each column, for part 0.
__device__ __forceinline__ void add_columns(double (&sums)[2], int32 columns) {
    merge_columns(sums, columns, [](double (&mine)[2], auto theirs) {
        mine[0] += theirs(0);
        mine[1] += theirs(1);
    });
}

// A slab's channels spread over the block for the per-channel steps.
struct Column {
    int32 columns, parts, part;
    int64 channel;
    bool inside;

    __device__ __forceinline__ Column(const Place& p) {
        columns = p.slab_channels;
        const int32 me = thread_number_again(), shift = shift_of(columns);
        parts = threads_in_block() >> shift;
        part = me >> shift;
        channel = static_cast<int64>(p.slab) * columns + (me & (columns - 1));
        inside = channel < p.channels;
    }
};

// What a split leaves of a channel: forward the mean and the sum of squares, backward two sums.
struct alignas(2 * sizeof(A)) Part {
    A first, second;
};

template <typename Arguments>
__device__ __forceinline__ Part* part_of(const Arguments& arguments, const Place& p, int32 split, int64 channel) {
    return reinterpret_cast<Part*>(arguments.parts) + (static_cast<int64>(p.group) * p.splits + split) * p.channels + channel;
}

// Ends a first pass: leaves in arguments.parts what the slab's channels have, from the numbers that merge_columns has
// merged, in which the firsts of this thread's columns, and behind them the seconds, come last. Columns that are folded
// are added up in double: add(sums, channel, number, first, second) takes in a channel's column of that number, and
// part_from(sums) is the channel's part.
template <typename Arguments, int32 count, typename Add, typename PartFrom>
__device__ __forceinline__ void leave_parts(
    const Arguments& arguments, const Place& p, const A (&merged)[count], Add add, PartFrom part_from) {
    constexpr int32 firsts = count - 2 * held, seconds = count - held;
    if constexpr (FOLDED) {  // the threads of a channel share its columns, which are in the scratch
        const Column channel(p);
        const A* const of_columns = reinterpret_cast<const A*>(scratch());
        const int32 left = left_in_scratch(lanes()), inner = static_cast<int32>(p.inner);
        const int32 start = (thread_number_again() & (channel.columns - 1)) * inner;
        double sums[2] = {0.0, 0.0};
        __syncthreads();
#pragma unroll 1
        for (int32 number = channel.part; channel.inside && number < inner; number += channel.parts) {
            const int32 lane = (start + number) / held, i = (start + number) % held;
            const A *const first = of_columns + (firsts + i) * left + lane, *const second = first + held * left;
            add(sums, channel.channel, number, *first, *second);
        }
        add_columns(sums, channel.columns);
        if (channel.part == 0 && channel.inside) *part_of(arguments, p, p.split, channel.channel) = part_from(sums);
    } else if (threadIdx.y == 0 && p.inside) {
#pragma unroll
        for (int32 i = 0; i < held; ++i)
            *part_of(arguments, p, p.split, first_channel(p) + i) = Part{merged[firsts + i], merged[seconds + i]};
    }
}

__device__ __forceinline__ int64 slot_index(const Place& p, int32 group, int64 channel) {
    return group * p.channels + channel;
}
__device__ __forceinline__ int64 slot_plane(const Place& p) { return p.groups * p.channels; }

// Calls add(split, part) with every part that this thread has of its column, in order. One block does this while the others
// have ended or wait, so the loads of several splits are in flight together.
template <typename Arguments, typename Add>
__device__ __forceinline__ void for_parts(const Arguments& arguments, const Place& p, const Column& column, Add add) {
    constexpr int32 ahead = sizeof(A) == 8 ? 2 : 6;
    if (!column.inside) return;
    const Part* from = part_of(arguments, p, column.part, column.channel);
    const int64 step = column.parts * p.channels;
#pragma unroll 1
    for (int32 start = column.part; start < p.splits; start += ahead * column.parts) {
        Part parts[ahead];
#pragma unroll
        for (int32 slot = 0; slot < ahead; ++slot, from += step)
            if (start + slot * column.parts < p.splits) parts[slot] = *from;
#pragma unroll
        for (int32 slot = 0; slot < ahead; ++slot) {
            const int32 split = start + slot * column.parts;
            if (split < p.splits) add(split, parts[slot]);
        }
    }
}

// Ends a split: true in the block that is to merge the splits of its slab and group.
template <typename Arguments> __device__ __forceinline__ bool last_split(const Arguments& arguments, const Place& p) {
    return last_block(arguments.counters + static_cast<int64>(p.group) * p.slabs + p.slab, static_cast<uint32>(p.splits));
}
// Ends a group: true in the block that is to merge the groups of its slab.
template <typename Arguments> __device__ __forceinline__ bool last_group(const Arguments& arguments, const Place& p) {
    if (p.groups == 1) return true;
    return last_block(arguments.counters + static_cast<int64>(p.groups) * p.slabs + p.slab, static_cast<uint32>(p.groups));
}
