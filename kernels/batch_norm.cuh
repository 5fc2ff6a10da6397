// Batch normalisation: where a block works, sums and their merging, the per-channel step, the two sweeps.
//
// View of the input (contiguous, E = rows * groups * spread * channels * inner elements):
//   [rows, groups, spread, channels, inner]; statistics are per (group, channel), over `rows * spread` rows of `inner`.
//   CHANNELS_LAST (inner = 1): a thread holds `width` neighbouring channels (16 bytes) of one row;
//   else: a thread holds `width` neighbours of one (row, channel).
// Block: (lanes, depth) threads, both powers of two. `lanes` threads lie side by side over the channels of a slab
//   (1 if not CHANNELS_LAST), `depth` of them share a channel's values. A slab is lanes * held channels.
// Work: block = (group, slab, split); the splits of a slab take U / splits of its units each, the first U mod splits of
//   them one more, a unit being a row (CHANNELS_LAST) or `width` neighbours.
// Statistics: each thread sums x - p and (x - p)^2 around its own first value p; (count, mean, square) triples are merged
//   by Chan's formula in a fixed tree, blocks' triples in double in a fixed order. The means are kept relative to the
//   channel's first value, so that nothing is lost where mean / sigma is large: as that value is one of the N, the mean
//   squared is at most N - 1 variances, and double takes their difference with a relative error of 2^-52 N at most. Saved per (group, channel): the mean
//   rounded to float (pivot), the rest of it (offset), and 1 / sqrt(variance + epsilon).
// Deterministic: a fixed grid for a shape and device, fixed trees, no floating-point atomics.
// Source: Chan, Golub, LeVeque 1979 (merging); arXiv 1502.03167; arXiv 1702.03275 (renorm).
#pragma once

typedef accumulate_t<STORAGE> A;

constexpr int32 width = VECTOR ? vector_width<STORAGE> : 1;  // elements of one access
constexpr int32 held = CHANNELS_LAST ? width : 1;            // channels of one thread
constexpr int32 largest = 256;                               // threads of a block
constexpr int32 widest = 16;                                 // lanes of a block where threads hold several channels
constexpr int32 widest_slab = held > 1 ? held * widest : 32;  // channels of a slab

// What one access moves, as it lies in memory: a quarter of the registers that widened 16-bit values would take.
typedef packet<STORAGE, width> Packet;

template <cache HINT = cache::keep, int N = width>
__device__ __forceinline__ packet<STORAGE, N> take(const STORAGE* address) {
    packet<STORAGE, N> result;
    if constexpr (N == 1) {
        result.values[0] = *address;
    } else if constexpr (HINT == cache::streaming) {
        result.words = load_16_streaming(address);
    } else {
        result.words = load_16(address);
    }
    return result;
}

template <int N> __device__ __forceinline__ void put(STORAGE* address, const packet<STORAGE, N>& value) {
    if constexpr (N == 1) {
        *address = value.values[0];
    } else {
        store_16(address, value.words);
    }
}

// Largest value that becomes 0 when it is stored, where its rounding underflows: half of the smallest subnormal, which
// ties to even. A stored output is > 0 exactly if the value before rounding is > underflow<STORAGE>.
template <typename T> constexpr A underflow = A(0);
template <> constexpr A underflow<float16> = A(2.98023223876953125e-8);            // 2^-25
template <> constexpr A underflow<bfloat16> = A(4.591774807899560578003e-41);     // 2^-134

// a * b + c with one rounding, whatever the compiler thinks: two kernels must get the same bits.
__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

// The bits of a ReLU behind a residual: one byte for every 16 bytes of x, in memory order; bit i says that the i-th of the
// elements there is > 0. Threads with 16-byte accesses own their bytes. All accesses can read them.
constexpr int32 elements_of_byte = vector_width<STORAGE>;
constexpr uint32 own_bits = (1u << width) - 1u;

__device__ __forceinline__ uint32 take_bits(const uint8* bits, int64 offset) {
    const uint32 whole = bits[offset / elements_of_byte];
    return width == 1 ? whole >> static_cast<int32>(offset % elements_of_byte) & own_bits : whole;
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

// ---- where a block works -------------------------------------------------------------------------------------------

struct Place {
    int64 rows, spread, channels, inner;
    int64 share;                                   // units of a split at least
    uint64 spread_multiplier, inner_multiplier;    // for divisions by spread and by units_of_row
    int32 spread_shift, inner_shift;
    int32 groups, group, slabs, slab, splits, split;
    int64 channel;  // first of this thread's channels
    bool inside;    // that channel exists
};

__device__ __forceinline__ int32 lanes() { return static_cast<int32>(blockDim.x); }
__device__ __forceinline__ int32 depth() { return static_cast<int32>(blockDim.y); }
// The logarithm of a power of two: shifts in place of divisions.
__device__ __forceinline__ int32 shift_of(int32 power) { return 31 - __clz(power); }
__device__ __forceinline__ int64 units_of_row(const Place& p) { return CHANNELS_LAST ? 1 : p.inner / width; }
__device__ __forceinline__ int64 units(const Place& p) { return p.rows * p.spread * units_of_row(p); }
// How the units are dealt out: split s has `share` of them, one more if s < `longer`.
struct Shares {
    int64 share, longer;

    __device__ __forceinline__ explicit Shares(const Place& p) {
        share = p.share;
        longer = units(p) - share * p.splits;
    }
    __device__ __forceinline__ int64 first(int32 split) const { return share * split + (split < longer ? split : longer); }
    __device__ __forceinline__ int64 count(int32 split) const { return share + (split < longer); }
};
// Some of the units, `depth()` of them at a time.
struct Range {
    int64 first, count;
};
__device__ __forceinline__ Range range_of_split(const Place& p) {
    const Shares shares(p);
    return Range{shares.first(p.split), shares.count(p.split)};
}
__device__ __forceinline__ int64 values_in_all(const Place& p) { return p.rows * p.spread * p.inner; }

template <typename Arguments> __device__ __forceinline__ Place place_of(const Arguments& arguments, int32 block) {
    Place p;
    p.rows = arguments.rows;
    p.groups = static_cast<int32>(arguments.groups);
    p.spread = arguments.spread;
    p.spread_multiplier = arguments.spread_multiplier;
    p.spread_shift = arguments.spread_shift;
    p.inner_multiplier = arguments.inner_multiplier;
    p.inner_shift = arguments.inner_shift;
    p.share = arguments.share;
    p.channels = arguments.channels;
    p.inner = CHANNELS_LAST ? 1 : arguments.inner;
    p.splits = static_cast<int32>(arguments.splits);
    p.slabs = static_cast<int32>((p.channels + lanes() * held - 1) >> shift_of(lanes() * held));
    p.split = block % p.splits;
    const int32 rest = block / p.splits;
    p.slab = rest % p.slabs;
    p.group = rest / p.slabs;
    p.channel = (static_cast<int64>(p.slab) * lanes() + threadIdx.x) * held;
    p.inside = p.channel < p.channels;
    return p;
}

// Offset of the first element of a group's row.
__device__ __forceinline__ int64 row_start(const Place& p, int64 row) {
    const int64 length = p.channels * p.inner;
    if (p.groups == 1) return row * length;
    if (p.spread == 1) return (row * p.groups + p.group) * length;
    const int64 outer = static_cast<int64>(divide(static_cast<uint64>(row), p.spread_multiplier, p.spread_shift));
    return ((outer * p.groups + p.group) * p.spread + (row - outer * p.spread)) * length;
}

// Walks over this thread's units of a range, forwards or backwards.
//
// Where the rows of a group are equally far apart (all but sub-batches of more than one row per image), the walk is over
// offsets, `at` that of the current unit: a step is an addition. Else `at` is a row, and its offset takes a division.
struct Walk {
    bool even;
    int32 left;
    int64 at, step;                       // offsets, or rows
    int64 position, step_positions;       // of the unit in its row, if that has several
    int64 row_end, next_row;              // units of a row; what `at` gains where the row changes

    __device__ __forceinline__ Walk(const Place& p, const Range& range, bool backwards) {
        const int64 first = range.first, count = range.count;
        const int64 mine = threadIdx.y;
        left = static_cast<int32>(p.inside && mine < count ? (count - mine + depth() - 1) >> shift_of(depth()) : 0);
        const int64 unit = left == 0 ? 0 : backwards ? first + count - 1 - mine : first + mine;  // there may be none
        even = p.groups == 1 || p.spread == 1;
        const int64 pitch = even ? p.groups * p.channels * p.inner : 1;  // from row to row
        row_end = units_of_row(p);
        position = step_positions = 0;
        int64 row = unit;
        int32 step_rows = depth();
        if (!CHANNELS_LAST && row_end > 1) {
            row = static_cast<int64>(divide(static_cast<uint64>(unit), p.inner_multiplier, p.inner_shift));
            position = unit - row * row_end;
            step_rows = row_end > depth() ? 0 : depth() / static_cast<int32>(row_end);
            step_positions = depth() - step_rows * row_end;
        }
        at = row;
        step = step_rows * pitch;
        next_row = pitch;
        if (even) {
            at = row_start(p, 0) + row * pitch + p.channel * p.inner + position * width;
            step += step_positions * width;
            next_row -= p.inner;
        }
        if (backwards) {
            step = -step;
            step_positions = -step_positions;
            next_row = -next_row;
        }
    }

    // Offset of the current unit; moves on to the next.
    __device__ __forceinline__ int64 next(const Place& p) {
        const int64 here = even ? at : row_start(p, at) + p.channel * p.inner + position * width;
        --left;
        at += step;
        if (!CHANNELS_LAST) {
            position += step_positions;
            if (position >= row_end) {
                position -= row_end;
                at += next_row;
            } else if (position < 0) {
                position += row_end;
                at += next_row;
            }
        }
        return here;
    }
};

// ---- what stays on chip between the two passes ---------------------------------------------------------------------
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
    return take<Where::keeps ? cache::streaming : cache::keep>(address);
}

// The next `ahead` units of a walk, the first of them its unit `number`: fetch(slot, offset, place) is called for all of
// them first, so that their loads are in flight together, then body(slot, offset, place) for each. place_at(number) gives
// a unit's place. `full`: the walk has so many.
template <int32 ahead, bool full, typename PlaceAt, typename Fetch, typename Body>
__device__ __forceinline__ void for_batch(
    const Place& p, Walk& walk, int32 number, PlaceAt place_at, Fetch& fetch, Body& body) {
    int64 offsets[ahead];
    bool real[ahead];
#pragma unroll
    for (int32 slot = 0; slot < ahead; ++slot) {
        real[slot] = full || walk.left > 0;
        offsets[slot] = real[slot] ? walk.next(p) : 0;
        if (real[slot]) fetch(slot, offsets[slot], place_at(number + slot));
    }
#pragma unroll
    for (int32 slot = 0; slot < ahead; ++slot) {
        if (real[slot]) body(slot, offsets[slot], place_at(number + slot));
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

// Whether full batches of this many packets per unit get a loop of their own: it takes registers.
template <int32 packets> constexpr bool full_apart = packets == 1 || (held < 8 && sizeof(A) < 8);

// Keepers say how the two passes go through a block's split. `packets` is what they keep of a unit; `first_ahead` and
// `second_ahead` are the most units in flight in a pass; `one_launch` says that the same launch does both passes.

// The second pass reads everything again, backwards: what was read last may still be in the L2 cache. A block of one launch
// has a multiprocessor nearly for itself, so it has more in flight; so have threads that load single elements.
template <int32 packets> struct KeepNothing {
    static constexpr bool one_launch = false;
    // Forward, with all factors in registers, these leave few of them.
    static constexpr bool scarce = packets == 1 && (held == 8 || sizeof(A) == 8);
#if defined(GL_ENTRY_gl_bn_forward) || defined(GL_ENTRY_gl_bn_backward)
    static constexpr int32 first_ahead = (scarce ? 4 : held == 8 ? 6 : 8) / packets, second_ahead = 4;
#else
    static constexpr int32 first_ahead = (VECTOR || sizeof(A) == 8 || packets == 2 ? 4 : 6) / packets;
    static constexpr int32 second_ahead = scarce ? 3 : first_ahead;
#endif

    template <typename Fetch, typename Body>
    __device__ __forceinline__ void first_pass(const Place& p, Fetch fetch, Body body) {
        for_units<first_ahead, full_apart<packets>>(p, range_of_split(p), false, [](int32) { return Nowhere{}; }, fetch, body);
    }
    template <typename Fetch, typename Body>
    __device__ __forceinline__ void second_pass(const Place& p, Fetch fetch, Body body) {
        for_units<second_ahead, full_apart<packets>>(p, range_of_split(p), true, [](int32) { return Nowhere{}; }, fetch, body);
    }
};

// The whole split stays in dynamic shared memory. Such blocks fill a multiprocessor alone, so more loads are in flight.
template <int32 packets> struct KeepShared {
    static constexpr bool one_launch = true;
    static constexpr int32 first_ahead = 8 / packets, second_ahead = 2;
    unsigned char* memory;

    template <typename Fetch, typename Body>
    __device__ __forceinline__ void first_pass(const Place& p, Fetch fetch, Body body) {
        unsigned char* const copies = memory;
        for_units<first_ahead, full_apart<packets>>(
            p, range_of_split(p), false, [=](int32 number) { return InShared<packets>{copies, number}; }, fetch, body);
    }
    template <typename Fetch, typename Body>
    __device__ __forceinline__ void second_pass(const Place& p, Fetch fetch, Body body) {
        unsigned char* const copies = memory;
        for_units<second_ahead, full_apart<packets>>(
            p, range_of_split(p), false, [=](int32 number) { return InShared<packets>{copies, number}; }, fetch, body);
    }
};

// ---- merging -------------------------------------------------------------------------------------------------------

// Memory of the block that its steps use one after the other: each begins with a barrier before it writes there.
__device__ __forceinline__ unsigned char* scratch() {
    // Of every warp, and of every lane, a thread's sums; or two sums in double of every thread.
    constexpr int32 sums = (2 * held + 1) * (held > 1 ? largest / 2 : largest) * static_cast<int32>(sizeof(A));
    constexpr int32 size = sums > 2 * largest * 8 ? sums : 2 * largest * 8;
    GL_SHARED(unsigned char, memory, [size]);
    return memory;
}

// Merges what the threads of each column hold, thread = part * columns + column, in a fixed tree. The threads of part 0
// get the result. merge(mine, theirs) calls theirs(i) once for each i, and before it changes mine[i]: another set of
// registers is not there. `columns` is a power of two.
template <typename T, int32 count, typename Merge>
__device__ __forceinline__ void merge_columns(T (&mine)[count], int32 columns, Merge merge) {
#pragma unroll 1
    for (int32 distance = columns; distance < 32; distance <<= 1)
        merge(mine, [&](int32 i) { return __shfl_xor_sync(all_lanes, mine[i], distance); });
    // The threads of a warp that share a column hold the same columns now: one of them goes on.
    const int32 me = thread_number_again(), lane = me & 31, of_warp = columns < 32 ? columns : 32;
    const int32 left = (threads_in_block() >> 5) * of_warp;
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
        columns = lanes() * held;
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

// ---- forward: statistics -------------------------------------------------------------------------------------------

// Merges the triple (count, mean, square) of another set of values into this one; `share` is other / (this + other).
__device__ __forceinline__ void merge(A count, A share, A& mean, A& square, A other_mean, A other_square) {
    const A delta = other_mean - mean;
    mean += delta * share;
    square += other_square + delta * delta * count * share;
}

// Leaves this block's merged (mean - first value of the channel, sum of squares) in arguments.parts.
template <typename Arguments, typename Keeper>
__device__ __forceinline__ void moments_of_split(const Arguments& arguments, const Place& p, Keeper& keeper) {
    A base[held], sum[held], square[held];
    Packet values[Keeper::first_ahead];
#pragma unroll
    for (int32 i = 0; i < held; ++i) base[i] = sum[i] = square[i] = A(0);
    int32 seen = 0;
    keeper.first_pass(
        p,
        [&](int32 slot, int64 offset, auto place) {
            values[slot] = take_first(place, arguments.x + offset);
        },
        [&](int32 slot, int64, auto place) {
            place.keep(0, values[slot]);
            if (seen == 0) {
#pragma unroll
                for (int32 i = 0; i < held; ++i) base[i] = widen(values[slot].values[i]);
            }
            ++seen;
#pragma unroll
            for (int32 i = 0; i < width; ++i) {
                const int32 c = CHANNELS_LAST ? i : 0;
                const A shifted = widen(values[slot].values[i]) - base[c];
                sum[c] += shifted;
                square[c] += shifted * shifted;
            }
        });
    // What a thread has of its channels: the number of values, the means, and the sums of squares.
    A moments[1 + 2 * held];
    moments[0] = A(seen) * A(CHANNELS_LAST ? 1 : width);
    const A inverse = seen ? A(1) / moments[0] : A(0);
    Packet first;
    if (seen) first = take(arguments.x + row_start(p, 0) + p.channel * p.inner);
#pragma unroll
    for (int32 i = 0; i < held; ++i) {
        const A mean = sum[i] * inverse;
        moments[1 + i] = seen ? (base[i] - widen(first.values[i])) + mean : A(0);
        moments[1 + held + i] = square[i] - sum[i] * mean;
    }
    merge_columns(moments, lanes(), [](A (&mine)[1 + 2 * held], auto theirs) {
        const A other = theirs(0), total = mine[0] + other;
        const A share = total > A(0) ? other / total : A(0);
#pragma unroll
        for (int32 i = 0; i < held; ++i)
            merge(mine[0], share, mine[1 + i], mine[1 + held + i], theirs(1 + i), theirs(1 + held + i));
        mine[0] = total;
    });
    if (threadIdx.y == 0 && p.inside) {
#pragma unroll
        for (int32 i = 0; i < held; ++i)
            *part_of(arguments, p, p.split, p.channel + i) = Part{moments[1 + i], moments[1 + held + i]};
    }
}

struct Moments {
    double mean, variance;
};

// Merges the splits of one slab and group: writes `saved` (pivot, offset, 1 / s). The threads of part 0 get the moments of
// their columns; of several groups they are left in arguments.moments.
template <typename Arguments>
__device__ __forceinline__ Moments finish_group(const Arguments& arguments, const Place& p) {
    const Column column(p);
    const Shares shares(p);
    double sums[2] = {0.0, 0.0};
    for_parts(arguments, p, column, [&](int32 split, const Part& part) {
        const double mean = part.first, count = static_cast<double>(shares.count(split) * (CHANNELS_LAST ? 1 : width));
        sums[0] += count * mean;
        sums[1] += part.second + count * mean * mean;
    });
    add_columns(sums, column.columns);
    if (column.part != 0 || !column.inside) return Moments{0.0, 0.0};
    const double part = 1.0 / static_cast<double>(values_in_all(p)), mean = sums[0] * part;
    const double spread = sums[1] * part - mean * mean, variance = spread < 0.0 ? 0.0 : spread;
    const int64 slot = slot_index(p, p.group, column.channel), plane = slot_plane(p);
    const double exact = mean + widen(arguments.x[row_start(p, 0) + column.channel * p.inner]);
    const A pivot = static_cast<A>(exact);
    arguments.saved[slot] = pivot;
    arguments.saved[slot + plane] = static_cast<A>(exact - pivot);
    arguments.saved[slot + 2 * plane] = static_cast<A>(1.0 / sqrt(variance + arguments.epsilon));
    if (p.groups > 1) {
        arguments.moments[slot] = exact;
        arguments.moments[slot + plane] = variance;
    }
    if (arguments.group_mean) {
        arguments.group_mean[slot] = pivot;
        arguments.group_variance[slot] = static_cast<A>(variance);
    }
    return Moments{exact, variance};
}

__device__ __forceinline__ bool is_finite(double value) { return value - value == 0.0; }

__device__ __forceinline__ void step(A* variable, int64 channel, double value, double decay) {
    const double old = variable[channel];
    variable[channel] = static_cast<A>(old - (old - value) * decay);
}

template <typename Arguments>
__device__ __forceinline__ double limit(const Arguments& arguments, int32 which) {
    return arguments.limit_arrays[which] ? static_cast<double>(*arguments.limit_arrays[which]) : arguments.limits[which];
}

// What happens once per channel: r and d of renorm from the old statistics, then the moving statistics.
template <typename Arguments>
__device__ __forceinline__ void finish_channel(
    const Arguments& arguments, const Place& p, int64 c, double mean, double variance) {
    arguments.mean[c] = static_cast<A>(mean);
    arguments.variance[c] = static_cast<A>(variance);
    const double s = sqrt(variance + arguments.epsilon);
    if (arguments.old_mean) {
        const double floor = sqrt(arguments.epsilon), stddev = arguments.old_stddev[c];
        const double inverse = 1.0 / (stddev > floor ? stddev : floor);
        double r = s * inverse, d = (mean - arguments.old_mean[c]) * inverse;
        const double rmin = limit(arguments, 0), rmax = limit(arguments, 1), dmax = limit(arguments, 2);
        if (r < rmin) r = rmin;
        if (r > rmax) r = rmax;
        if (d < -dmax) d = -dmax;
        if (d > dmax) d = dmax;
#pragma unroll 1
        for (int32 group = 0; group < p.groups; ++group) {
            arguments.saved[slot_index(p, group, c) + 3 * slot_plane(p)] = static_cast<A>(r);
            arguments.saved[slot_index(p, group, c) + 4 * slot_plane(p)] = static_cast<A>(d);
        }
    }
    if (!arguments.moving_mean) return;
    if (arguments.skip_nonfinite && !(is_finite(mean) && is_finite(variance))) {
        if (arguments.skipped) atomicAdd(reinterpret_cast<uint64*>(arguments.skipped), uint64(1));
        return;
    }
    step(arguments.moving_mean, c, mean, arguments.decay);
    if (!arguments.moving_stddev) {
        step(arguments.moving_variance, c, variance * arguments.unbiased, arguments.decay);
        return;
    }
    step(arguments.renorm_mean, c, mean, arguments.renorm_decay);
    step(arguments.renorm_stddev, c, s, arguments.renorm_decay);
    step(arguments.moving_stddev, c, s, arguments.decay);
    const double stddev = arguments.moving_stddev[c], derived = stddev * stddev - arguments.epsilon;
    arguments.moving_variance[c] = static_cast<A>(derived < 0.0 ? 0.0 : derived);
}

// Finishes a slab's channels: by the moments of its only group, or by their average over the groups.
template <typename Arguments>
__device__ __forceinline__ void finish_channels(const Arguments& arguments, const Place& p, const Moments& of_group) {
    const Column column(p);
    double sums[2] = {of_group.mean, of_group.variance};
    if (p.groups > 1) {
        sums[0] = sums[1] = 0.0;
#pragma unroll 1
        for (int32 group = column.part; column.inside && group < p.groups; group += column.parts) {
            sums[0] += arguments.moments[slot_index(p, group, column.channel)];
            sums[1] += arguments.moments[slot_index(p, group, column.channel) + slot_plane(p)];
        }
        add_columns(sums, column.columns);
        const double part = 1.0 / static_cast<double>(p.groups);
        sums[0] *= part;
        sums[1] *= part;
    }
    if (column.part == 0 && column.inside) finish_channel(arguments, p, column.channel, sums[0], sums[1]);
}

// ---- forward: normalise --------------------------------------------------------------------------------------------

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

// Calls make(column, channel) for every channel of the slab, each in a thread of its own, between two barriers: factors
// cost a root and a division in double, and many loads. They go to the scratch.
template <typename Make> __device__ __forceinline__ void for_channels(const Place& p, Make make) {
    const int32 column = thread_number(), columns = lanes() * held;
    const int64 channel = static_cast<int64>(p.slab) * columns + column;
    __syncthreads();
    if (column < columns && channel < p.channels) make(column, channel);
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

// Writes y, and for the backward of a ReLU, unless null: a and b of each channel to arguments.affine; arguments.bits.
template <typename Arguments, typename Keeper>
__device__ __forceinline__ void normalise_split(const Arguments& arguments, const Place& p, Keeper& keeper) {
    A* const table = reinterpret_cast<A*>(scratch());
    for_channels(p, [&](int32 column, int64 c) {
        const Affine affine = affine_of(arguments, p, c);
        table[column] = affine.pivot;
        table[widest_slab + column] = affine.a;
        table[2 * widest_slab + column] = affine.b;
        if (arguments.affine && p.split == 0) {
            const int64 slot = slot_index(p, p.group, c);
            arguments.affine[slot] = affine.a;
            arguments.affine[slot + slot_plane(p)] = affine.b;
        }
    });
    A pivot[held], a[held], b[held];
    own_channels(table, pivot);
    own_channels(table + widest_slab, a);
    own_channels(table + 2 * widest_slab, b);
    Packet values[Keeper::second_ahead], extra[Keeper::second_ahead];
    keeper.second_pass(
        p,
        [&](int32 slot, int64 offset, auto place) {
            if constexpr (decltype(place)::keeps) {
                values[slot] = place.recall(0);
            } else {
                values[slot] = take<cache::streaming>(arguments.x + offset);
            }
            if (arguments.residual) extra[slot] = take<cache::streaming>(arguments.residual + offset);
        },
        [&](int32 slot, int64 offset, auto) {
            A result[width];
#pragma unroll
            for (int32 i = 0; i < width; ++i) {
                const int32 c = CHANNELS_LAST ? i : 0;
                A value = Affine{pivot[c], a[c], b[c]}.of(values[slot].values[i]);
                if (arguments.residual) value += widen(extra[slot].values[i]);
                if (arguments.relu && value < A(0)) value = A(0);
                result[i] = value;
            }
            if (VECTOR && arguments.bits) {
                uint32 bits = 0u;
#pragma unroll
                for (int32 i = 0; i < width; ++i)
                    if (result[i] > underflow<STORAGE>) bits |= 1u << i;
                arguments.bits[offset / width] = static_cast<uint8>(bits);
            }
            store<width, cache::streaming>(arguments.y + offset, result);
        });
}

// ---- backward ------------------------------------------------------------------------------------------------------

// Two factors, a and b, of each of this thread's channels. Several channels' stay in shared memory and are read for every
// unit: registers are scarce there.
struct Factors {
    A* table;
    A a, b;  // of a thread with one channel

    static constexpr int32 at_once = held > 1 ? 8 / static_cast<int32>(sizeof(A)) : 1;  // whose a and b make 16 bytes
    static constexpr int32 size = 2 * widest_slab;

    // Neighbouring threads' 16 bytes lie side by side: no bank conflicts.
    static __device__ __forceinline__ int32 place(int32 lane, int32 i) {
        return 2 * ((i / at_once * (widest_slab / held) + lane) * at_once + i % at_once);
    }
    // Leaves the factors of one column of the slab; a barrier later, own() takes this thread's.
    __device__ __forceinline__ void leave(int32 column, A first, A second) const {
        const int32 at = place(column / held, column % held);
        table[at] = first;
        table[at + 1] = second;
    }
    __device__ __forceinline__ void own() {
        if (held > 1) return;
        a = table[place(static_cast<int32>(threadIdx.x), 0)];
        b = table[place(static_cast<int32>(threadIdx.x), 0) + 1];
    }

    // Calls use(i, factors) for every element i of a unit.
    template <typename Use> __device__ __forceinline__ void for_each(const A (&pivot)[held], Use use) const {
        if constexpr (held == 1) {
#pragma unroll
            for (int32 i = 0; i < width; ++i) use(i, Affine{pivot[0], a, b});
        } else {
#pragma unroll
            for (int32 start = 0; start < held; start += at_once) {
                union {
                    uint4 words;
                    A values[2 * at_once];
                } pairs;
                pairs.words = reload_shared_16(table + place(static_cast<int32>(threadIdx.x), start));
#pragma unroll
                for (int32 i = 0; i < at_once; ++i)
                    use(start + i, Affine{pivot[start + i], pairs.values[2 * i], pairs.values[2 * i + 1]});
            }
        }
    }
};

// Where the forward's ReLU let x pass, by the forward's own arithmetic.
__device__ __forceinline__ uint32 bits_of(const Packet& x, const A (&pivot)[held], const Factors& factors) {
    uint32 bits = 0u;
    factors.for_each(pivot, [&](int32 i, const Affine& affine) {
        if (affine.of(x.values[i]) > underflow<STORAGE>) bits |= 1u << i;
    });
    return bits;
}

// Leaves this block's sums of g and g * (x - pivot) in arguments.parts. g is dy, with a ReLU where its output is > 0:
// the bits or y are read unless null, else x tells. Writes g to arguments.dresidual unless null and, in inference, g * gamma / s to dx.
template <typename Arguments, typename Keeper>
__device__ __forceinline__ void sums_of_split(const Arguments& arguments, const Place& p, Keeper& keeper) {
    // The sign is found by the forward's factors: as it left them, or (in inference) as it made them. Inference's dx needs
    // them too.
    const bool ends_here = !Keeper::one_launch && !arguments.tables;
    A* const pivots = reinterpret_cast<A*>(scratch());
    Factors factors{pivots + widest_slab};
    for_channels(p, [&](int32 column, int64 c) {
        pivots[column] = pivot_of(arguments, p, c);
        if (arguments.affine) {
            const int64 slot = slot_index(p, p.group, c);
            factors.leave(column, arguments.affine[slot], arguments.affine[slot + slot_plane(p)]);
        } else if (arguments.recompute || ends_here) {
            const Affine affine = affine_of(arguments, p, c);
            factors.leave(column, affine.a, affine.b);
        }
    });
    A sum[held], product[held], pivot[held];
#pragma unroll
    for (int32 i = 0; i < held; ++i) sum[i] = product[i] = A(0);
    own_channels(pivots, pivot);
    factors.own();
    Packet x[Keeper::first_ahead], g[Keeper::first_ahead], y[Keeper::first_ahead];
    uint32 bits[Keeper::first_ahead];
    keeper.first_pass(
        p,
        [&](int32 slot, int64 offset, auto place) {
            x[slot] = take_first(place, arguments.x + offset);
            g[slot] = take_first(place, arguments.dy + offset);
            if (arguments.bits) bits[slot] = take_bits(arguments.bits, offset);
            if (arguments.y) {
                y[slot] = take_first(place, arguments.y + offset);
                if (!signs_late) bits[slot] = bits_of(y[slot]);
            }
        },
        [&](int32 slot, int64 offset, auto place) {
            if (held > 1) reload_channels(pivots, pivot);
            if (signs_late && arguments.y) bits[slot] = bits_of(y[slot]);
            if (arguments.recompute) bits[slot] = bits_of(x[slot], pivot, factors);
            if (arguments.recompute || arguments.bits || arguments.y) mask(g[slot], bits[slot]);
            place.keep(0, x[slot]);
            place.keep(1, g[slot]);
            if (arguments.dresidual) put(arguments.dresidual + offset, g[slot]);
#pragma unroll
            for (int32 i = 0; i < width; ++i) {
                const int32 c = CHANNELS_LAST ? i : 0;
                const A gradient = widen(g[slot].values[i]);
                sum[c] += gradient;
                product[c] += gradient * (widen(x[slot].values[i]) - pivot[c]);
            }
            if (!ends_here) return;
            Packet& scaled = g[slot];
            factors.for_each(pivot, [&](int32 i, const Affine& affine) {
                scaled.values[i] = narrow<STORAGE>(widen(scaled.values[i]) * affine.a);
            });
            put(arguments.dx + offset, scaled);
        });
    A sums[2 * held];
#pragma unroll
    for (int32 i = 0; i < held; ++i) {
        sums[i] = sum[i];
        sums[held + i] = product[i];
    }
    merge_columns(sums, lanes(), [](A (&mine)[2 * held], auto theirs) {
#pragma unroll
        for (int32 i = 0; i < 2 * held; ++i) mine[i] += theirs(i);
    });
    if (threadIdx.y == 0 && p.inside) {
#pragma unroll
        for (int32 i = 0; i < held; ++i)
            *part_of(arguments, p, p.split, p.channel + i) = Part{sums[i], sums[held + i]};
    }
}

struct GroupSums {
    double dbeta, dgamma;
};

// Merges the splits of one slab and group: the factors of dx = g * a + (x - pivot) * slope + b. The threads of part 0 get
// the group's sums of their columns; of several groups they are left in arguments.moments.
template <typename Arguments>
__device__ __forceinline__ GroupSums finish_group_sums(const Arguments& arguments, const Place& p) {
    const Column column(p);
    double sums[2] = {0.0, 0.0};
    for_parts(arguments, p, column, [&](int32, const Part& part) {
        sums[0] += part.first;
        sums[1] += part.second;
    });
    add_columns(sums, column.columns);
    if (column.part != 0 || !column.inside) return GroupSums{0.0, 0.0};
    const double sum = sums[0];
    const int64 c = column.channel, slot = slot_index(p, p.group, c), plane = slot_plane(p);
    double inverse, offset = 0.0, r = 1.0, d = 0.0;
    if (arguments.saved) {
        offset = arguments.saved[slot + plane];
        inverse = arguments.saved[slot + 2 * plane];
        if (arguments.renormed) {
            r = arguments.saved[slot + 3 * plane];
            d = arguments.saved[slot + 4 * plane];
        }
    } else {
        inverse = 1.0 / sqrt(static_cast<double>(arguments.given_variance[c]) + arguments.epsilon);
    }
    const double centred = sums[1] - sum * offset;
    const GroupSums of_group{sum, centred * inverse * r + d * sum};
    if (p.groups > 1) {
        arguments.moments[slot] = of_group.dbeta;
        arguments.moments[slot + plane] = of_group.dgamma;
    }
    if (!arguments.tables) return of_group;
    const double part = 1.0 / static_cast<double>(values_in_all(p));
    const double a = (arguments.gamma ? static_cast<double>(arguments.gamma[c]) : 1.0) * inverse * r;
    const double slope = -a * centred * inverse * inverse * part;
    arguments.tables[slot] = arguments.affine ? arguments.affine[slot] : static_cast<A>(a);  // the forward's own rounding
    arguments.tables[slot + plane] = static_cast<A>(slope);
    arguments.tables[slot + 2 * plane] = static_cast<A>(-a * sum * part - offset * slope);
    return of_group;
}

// dbeta and dgamma of a slab: the sums of its only group, or those of all groups added up.
template <typename Arguments>
__device__ __forceinline__ void finish_channel_sums(
    const Arguments& arguments, const Place& p, const GroupSums& of_group) {
    const Column column(p);
    double sums[2] = {of_group.dbeta, of_group.dgamma};
    if (p.groups > 1) {
        sums[0] = sums[1] = 0.0;
#pragma unroll 1
        for (int32 group = column.part; column.inside && group < p.groups; group += column.parts) {
            sums[0] += arguments.moments[slot_index(p, group, column.channel)];
            sums[1] += arguments.moments[slot_index(p, group, column.channel) + slot_plane(p)];
        }
        add_columns(sums, column.columns);
    }
    if (column.part != 0 || !column.inside) return;
    arguments.dbeta[column.channel] = static_cast<A>(sums[0]);
    arguments.dgamma[column.channel] = static_cast<A>(sums[1]);
}

// dx = g * a + (x - pivot) * slope + b over a split.
template <typename Arguments, typename Keeper>
__device__ __forceinline__ void apply_split(const Arguments& arguments, const Place& p, Keeper& keeper) {
    A* const pivots = reinterpret_cast<A*>(scratch());
    Factors factors{pivots + widest_slab}, corrections{factors.table + Factors::size};
    for_channels(p, [&](int32 column, int64 c) {
        const int64 slot = slot_index(p, p.group, c), plane = slot_plane(p);
        pivots[column] = arguments.saved[slot];
        factors.leave(column, arguments.tables[slot], arguments.affine ? arguments.affine[slot + plane] : A(0));
        corrections.leave(column, arguments.tables[slot + plane], arguments.tables[slot + 2 * plane]);
    });
    A pivot[held];
    own_channels(pivots, pivot);
    factors.own();
    corrections.own();
    // The first pass of the same launch has left the masked gradient there: one array instead of two.
    // NVRTC before CUDA 12.4 looks at what `if constexpr` leaves out in a lambda, so the field is named out here.
    decltype(arguments.dy) masked_gradients = nullptr;
    if constexpr (Keeper::one_launch) masked_gradients = arguments.dresidual;
    const bool masked_before = masked_gradients != nullptr;
    Packet x[Keeper::second_ahead], g[Keeper::second_ahead], y[Keeper::second_ahead];
    uint32 bits[Keeper::second_ahead];
    keeper.second_pass(
        p,
        [&](int32 slot, int64 offset, auto place) {
            if constexpr (decltype(place)::keeps) {
                x[slot] = place.recall(0);
                g[slot] = place.recall(1);
            } else {
                x[slot] = take<cache::streaming>(arguments.x + offset);
                if constexpr (Keeper::one_launch) {
                    if (masked_before) {
                        g[slot] = take(masked_gradients + offset);
                        return;
                    }
                }
                g[slot] = take<cache::streaming>(arguments.dy + offset);
                if (arguments.bits) bits[slot] = take_bits(arguments.bits, offset);
                if (arguments.y) {
                    y[slot] = take<cache::streaming>(arguments.y + offset);
                    if (!signs_late) bits[slot] = bits_of(y[slot]);
                }
            }
        },
        [&](int32 slot, int64 offset, auto place) {
            if constexpr (!decltype(place)::keeps) {
                if (signs_late && !masked_before && arguments.y) bits[slot] = bits_of(y[slot]);
                if (!masked_before && (arguments.bits || arguments.y)) mask(g[slot], bits[slot]);
            }
            constexpr bool masked = decltype(place)::keeps;  // what was kept has no need of it
            A result[width];
            factors.for_each(pivot, [&](int32 i, const Affine& affine) {
                result[i] = widen(g[slot].values[i]) * affine.a;
                if (!masked && arguments.recompute && !(affine.of(x[slot].values[i]) > underflow<STORAGE>)) result[i] = A(0);
            });
            corrections.for_each(
                pivot, [&](int32 i, const Affine& affine) { result[i] += affine.of(x[slot].values[i]); });
            store<width, cache::streaming>(arguments.dx + offset, result);
        });
}
