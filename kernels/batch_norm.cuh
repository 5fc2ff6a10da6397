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

// g where its bit is set, else 0.
__device__ __forceinline__ void mask(Packet& g, uint32 bits) {
#pragma unroll
    for (int32 i = 0; i < width; ++i)
        if (!(bits >> i & 1u)) g.values[i] = STORAGE{};
}

// ---- where a block works -------------------------------------------------------------------------------------------

struct Place {
    int64 rows, spread, channels, inner;
    uint64 spread_multiplier;  // for divisions by spread
    int32 spread_shift;
    int32 groups, group, slabs, slab, splits, split;
    int64 channel;  // first of this thread's channels
    bool inside;    // that channel exists
};

__device__ __forceinline__ int32 lanes() { return static_cast<int32>(blockDim.x); }
__device__ __forceinline__ int32 depth() { return static_cast<int32>(blockDim.y); }
__device__ __forceinline__ int64 units(const Place& p) {
    return CHANNELS_LAST ? p.rows * p.spread : p.rows * p.spread * (p.inner / width);
}
// How the units are dealt out: split s has `share` of them, one more if s < `longer`.
struct Shares {
    int64 share, longer;

    __device__ __forceinline__ explicit Shares(const Place& p) {
        share = units(p) / p.splits;
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
    p.channels = arguments.channels;
    p.inner = CHANNELS_LAST ? 1 : arguments.inner;
    p.splits = static_cast<int32>(arguments.splits);
    p.slabs = static_cast<int32>((p.channels + lanes() * held - 1) / (lanes() * held));
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
struct Walk {
    int32 left, step_rows;
    int64 row, position, step_positions, inner_units;

    __device__ __forceinline__ Walk(const Place& p, const Range& range, bool backwards) {
        const int64 first = range.first, count = range.count;
        const int64 mine = threadIdx.y, step = depth();
        left = static_cast<int32>(p.inside && mine < count ? (count - mine + step - 1) / step : 0);
        const int64 unit = backwards ? first + count - 1 - mine : first + mine;
        inner_units = CHANNELS_LAST ? 1 : p.inner / width;
        if (CHANNELS_LAST || left == 0) {
            row = unit;
            position = 0;
            step_rows = static_cast<int32>(step);
            step_positions = 0;
        } else {
            row = unit / inner_units;
            position = unit - row * inner_units;
            step_rows = static_cast<int32>(step / inner_units);
            step_positions = step - step_rows * inner_units;
        }
        if (backwards) {
            step_rows = -step_rows;
            step_positions = -step_positions;
        }
    }

    // Offset of the current unit; moves on to the next.
    __device__ __forceinline__ int64 next(const Place& p) {
        const int64 here = row_start(p, row) + p.channel * p.inner + position * width;
        --left;
        row += step_rows;
        if (!CHANNELS_LAST) {
            position += step_positions;
            if (position >= inner_units) {
                position -= inner_units;
                ++row;
            } else if (position < 0) {
                position += inner_units;
                --row;
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
// a unit's place.
template <int32 ahead, typename PlaceAt, typename Fetch, typename Body>
__device__ __forceinline__ void for_batch(
    const Place& p, Walk& walk, int32 number, PlaceAt place_at, Fetch& fetch, Body& body) {
    int64 offsets[ahead];
    bool real[ahead];
#pragma unroll
    for (int32 slot = 0; slot < ahead; ++slot) {
        real[slot] = walk.left > 0;
        offsets[slot] = real[slot] ? walk.next(p) : 0;
        if (real[slot]) fetch(slot, offsets[slot], place_at(number + slot));
    }
#pragma unroll
    for (int32 slot = 0; slot < ahead; ++slot) {
        if (real[slot]) body(slot, offsets[slot], place_at(number + slot));
    }
}

// Goes through a range, `ahead` units at a time.
template <int32 ahead, typename PlaceAt, typename Fetch, typename Body>
__device__ __forceinline__ void for_units(
    const Place& p, const Range& range, bool backwards, PlaceAt place_at, Fetch& fetch, Body& body) {
    Walk walk(p, range, backwards);
    for (int32 number = 0; walk.left > 0; number += ahead) for_batch<ahead>(p, walk, number, place_at, fetch, body);
}

// Keepers say how the two passes go through a block's split. `packets` is what they keep of a unit; `first_ahead` and
// `second_ahead` are the most units in flight in a pass; `one_launch` says that the same launch does both passes.

// The second pass reads everything again, backwards: what was read last may still be in the L2 cache.
template <int32 packets> struct KeepNothing {
    static constexpr bool one_launch = false;
    static constexpr int32 first_ahead = 4 / packets, second_ahead = 2;

    template <typename Fetch, typename Body>
    __device__ __forceinline__ void first_pass(const Place& p, Fetch fetch, Body body) {
        for_units<first_ahead>(p, range_of_split(p), false, [](int32) { return Nowhere{}; }, fetch, body);
    }
    template <typename Fetch, typename Body>
    __device__ __forceinline__ void second_pass(const Place& p, Fetch fetch, Body body) {
        for_units<second_ahead>(p, range_of_split(p), true, [](int32) { return Nowhere{}; }, fetch, body);
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
        for_units<first_ahead>(
            p, range_of_split(p), false, [=](int32 number) { return InShared<packets>{copies, number}; }, fetch, body);
    }
    template <typename Fetch, typename Body>
    __device__ __forceinline__ void second_pass(const Place& p, Fetch fetch, Body body) {
        unsigned char* const copies = memory;
        for_units<second_ahead>(
            p, range_of_split(p), false, [=](int32 number) { return InShared<packets>{copies, number}; }, fetch, body);
    }
};

// ---- merging -------------------------------------------------------------------------------------------------------

// Sums a double over the `parts` threads of each column; thread = part * columns + column. All get their column's sum.
__device__ __forceinline__ double column_sum(double value, int32 columns) {
    GL_SHARED(double, sums, [largest]);
    const int32 me = thread_number();
    __syncthreads();
    sums[me] = value;
    __syncthreads();
    for (int32 half = threads_in_block() / 2; half >= columns; half >>= 1) {
        if (me < half) sums[me] += sums[me + half];
        __syncthreads();
    }
    return sums[me % columns];
}

// A slab's channels spread over the block for the per-channel steps.
struct Column {
    int32 columns, parts, part;
    int64 channel;
    bool inside;

    __device__ __forceinline__ Column(const Place& p) {
        columns = lanes() * held;
        parts = threads_in_block() / columns;
        part = thread_number() / columns;
        channel = static_cast<int64>(p.slab) * columns + thread_number() % columns;
        inside = channel < p.channels;
    }
};

__device__ __forceinline__ int64 part_index(const Place& p, int32 split, int64 channel) {
    return (static_cast<int64>(p.group) * p.splits + split) * p.channels + channel;
}
__device__ __forceinline__ int64 part_plane(const Place& p) {
    return static_cast<int64>(p.groups) * p.splits * p.channels;
}
__device__ __forceinline__ int64 slot_index(const Place& p, int32 group, int64 channel) {
    return group * p.channels + channel;
}
__device__ __forceinline__ int64 slot_plane(const Place& p) { return p.groups * p.channels; }

// Calls add(split, first, second) with both partial results of every split that this thread has of its column, in order.
// One block does this while the others have ended, so the loads of several splits are in flight together.
template <typename Arguments, typename Add>
__device__ __forceinline__ void for_parts(const Arguments& arguments, const Place& p, const Column& column, Add add) {
    constexpr int32 ahead = 4;
    if (!column.inside) return;
    const A* const parts = arguments.parts + part_index(p, 0, column.channel);
    const int64 plane = part_plane(p);
    for (int32 start = column.part; start < p.splits; start += ahead * column.parts) {
        A first[ahead], second[ahead];
#pragma unroll
        for (int32 slot = 0; slot < ahead; ++slot) {
            const int32 split = start + slot * column.parts;
            if (split >= p.splits) continue;
            first[slot] = parts[split * p.channels];
            second[slot] = parts[split * p.channels + plane];
        }
#pragma unroll
        for (int32 slot = 0; slot < ahead; ++slot) {
            const int32 split = start + slot * column.parts;
            if (split < p.splits) add(split, first[slot], second[slot]);
        }
    }
}

// Ends a split: true in the block that is to merge the splits of its slab and group.
template <typename Arguments> __device__ __forceinline__ bool last_split(const Arguments& arguments, const Place& p) {
    return last_block(arguments.counters + static_cast<int64>(p.group) * p.slabs + p.slab, static_cast<uint32>(p.splits));
}
// Ends a group: true in the block that is to merge the groups of its slab.
template <typename Arguments> __device__ __forceinline__ bool last_group(const Arguments& arguments, const Place& p) {
    if (p.groups == 1) {
        __syncthreads();
        return true;
    }
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
    GL_SHARED(A, counts, [largest]);
    GL_SHARED(A, means, [held][largest]);
    GL_SHARED(A, squares, [held][largest]);
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
    const int32 me = thread_number();
    const A count = A(seen) * A(CHANNELS_LAST ? 1 : width);
    A first[width];
    if (p.inside) load<width>(arguments.x + row_start(p, 0) + p.channel * p.inner, first);
    counts[me] = count;
#pragma unroll
    for (int32 i = 0; i < held; ++i) {
        const A mean = seen ? sum[i] / count : A(0);
        means[i][me] = seen ? (base[i] - first[i]) + mean : A(0);
        squares[i][me] = seen ? square[i] - sum[i] * mean : A(0);
    }
    __syncthreads();
    for (int32 half = depth() / 2; half > 0; half >>= 1) {
        if (static_cast<int32>(threadIdx.y) < half) {
            const int32 other = me + half * lanes();
            const A total = counts[me] + counts[other];
            const A share = total > A(0) ? counts[other] / total : A(0);
#pragma unroll
            for (int32 i = 0; i < held; ++i)
                merge(counts[me], share, means[i][me], squares[i][me], means[i][other], squares[i][other]);
            counts[me] = total;
        }
        __syncthreads();
    }
    if (threadIdx.y == 0 && p.inside) {
#pragma unroll
        for (int32 i = 0; i < held; ++i) {
            const int64 index = part_index(p, p.split, p.channel + i);
            arguments.parts[index] = means[i][me];
            arguments.parts[index + part_plane(p)] = squares[i][me];
        }
    }
}

// Merges the splits of one slab and group: writes `saved` (pivot, offset, 1 / s) and the moments in double.
template <typename Arguments>
__device__ __forceinline__ void finish_group(const Arguments& arguments, const Place& p) {
    const Column column(p);
    const double all = static_cast<double>(values_in_all(p));
    const Shares shares(p);
    double sum = 0.0, square = 0.0;
    for_parts(arguments, p, column, [&](int32 split, double part_mean, double part_square) {
        const double part_sum = static_cast<double>(shares.count(split) * (CHANNELS_LAST ? 1 : width)) * part_mean;
        sum += part_sum;
        square += part_square + part_sum * part_mean;
    });
    const double mean = column_sum(sum, column.columns) / all;
    double variance = column_sum(square, column.columns) / all - mean * mean;
    if (variance < 0.0) variance = 0.0;
    if (column.part == 0 && column.inside) {
        const int64 slot = slot_index(p, p.group, column.channel), plane = slot_plane(p);
        const double exact = mean + widen(arguments.x[row_start(p, 0) + column.channel * p.inner]);
        const A pivot = static_cast<A>(exact);
        arguments.saved[slot] = pivot;
        arguments.saved[slot + plane] = static_cast<A>(exact - pivot);
        arguments.saved[slot + 2 * plane] = static_cast<A>(1.0 / sqrt(variance + arguments.epsilon));
        arguments.moments[slot] = exact;
        arguments.moments[slot + plane] = variance;
        if (arguments.group_mean) {
            arguments.group_mean[slot] = pivot;
            arguments.group_variance[slot] = static_cast<A>(variance);
        }
    }
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
        const double q = stddev > floor ? stddev : floor;
        double r = s / q, d = (mean - arguments.old_mean[c]) / q;
        const double rmin = limit(arguments, 0), rmax = limit(arguments, 1), dmax = limit(arguments, 2);
        if (r < rmin) r = rmin;
        if (r > rmax) r = rmax;
        if (d < -dmax) d = -dmax;
        if (d > dmax) d = dmax;
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

// Averages the moments of a slab over the groups and finishes its channels.
template <typename Arguments>
__device__ __forceinline__ void finish_channels(const Arguments& arguments, const Place& p) {
    const Column column(p);
    double mean = 0.0, variance = 0.0;
    for (int32 group = column.part; column.inside && group < p.groups; group += column.parts) {
        mean += arguments.moments[slot_index(p, group, column.channel)];
        variance += arguments.moments[slot_index(p, group, column.channel) + slot_plane(p)];
    }
    mean = column_sum(mean, column.columns) / static_cast<double>(p.groups);
    variance = column_sum(variance, column.columns) / static_cast<double>(p.groups);
    if (column.part == 0 && column.inside) finish_channel(arguments, p, column.channel, mean, variance);
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

// Writes y, and for the backward of a ReLU, unless null: a and b of each channel to arguments.affine; arguments.bits.
template <typename Arguments, typename Keeper>
__device__ __forceinline__ void normalise_split(const Arguments& arguments, const Place& p, Keeper& keeper) {
    Affine affine[held];
    if (p.inside) {
#pragma unroll
        for (int32 i = 0; i < held; ++i) {
            affine[i] = affine_of(arguments, p, p.channel + i);
            if (arguments.affine && p.split == 0 && threadIdx.y == 0) {
                const int64 slot = slot_index(p, p.group, p.channel + i);
                arguments.affine[slot] = affine[i].a;
                arguments.affine[slot + slot_plane(p)] = affine[i].b;
            }
        }
    }
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
                A value = affine[CHANNELS_LAST ? i : 0].of(values[slot].values[i]);
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

// The forward's factors of channel c as it left them in arguments.affine (null: there was no ReLU, nobody asks).
template <typename Arguments>
__device__ __forceinline__ Affine saved_affine(const Arguments& arguments, const Place& p, int64 c) {
    if (!arguments.affine) return Affine{};
    const int64 slot = slot_index(p, p.group, c);
    return Affine{arguments.saved[slot], arguments.affine[slot], arguments.affine[slot + slot_plane(p)]};
}

// The forward's factors of this thread's channels; of(c) makes those of one. Several channels' factors stay in shared
// memory, `table`, and are read for every unit: registers are scarce there.
struct Factors {
    Affine own;
    A* table;

    static constexpr int32 at_once = 8 / sizeof(A);  // channels whose a and b make 16 bytes
    static constexpr int32 size = held > 1 ? 2 * held * widest : 1;

    template <typename Of> __device__ __forceinline__ Factors(const Place& p, A* shared, Of of) : table(shared) {
        if (held > 1) __syncthreads();  // the readers of the table before this one are done
#pragma unroll 1
        for (int32 i = 0; i < held; ++i) {
            if (p.inside && (held == 1 || threadIdx.y == 0)) {
                own = of(p.channel + i);
                if (held > 1) {
                    table[place(i, 0)] = own.a;
                    table[place(i, 1)] = own.b;
                }
            }
        }
        if (held > 1) __syncthreads();
    }

    // Neighbouring threads' 16 bytes lie side by side: no bank conflicts.
    static __device__ __forceinline__ int32 place(int32 i, int32 which) {
        const int32 first = ((i / at_once) * widest + static_cast<int32>(threadIdx.x)) * 2 * at_once;
        return first + 2 * (i % at_once) + which;
    }

    // Calls use(i, factors) for every element i of a unit.
    template <typename Use> __device__ __forceinline__ void for_each(const A (&pivot)[held], Use use) const {
        if constexpr (held == 1) {
#pragma unroll
            for (int32 i = 0; i < width; ++i) use(i, own);
        } else {
#pragma unroll
            for (int32 start = 0; start < held; start += at_once) {
                union {
                    uint4 words;
                    A values[2 * at_once];
                } pairs;
                pairs.words = reload_shared_16(table + place(start, 0));
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
    GL_SHARED(A, firsts, [held][largest]);
    GL_SHARED(A, seconds, [held][largest]);
    static_assert(Factors::size <= held * largest, "the factors stand in the memory that the sums need later");
    const Factors factors(p, &firsts[0][0], [&](int64 c) {
        return arguments.affine ? saved_affine(arguments, p, c) : affine_of(arguments, p, c);
    });
    A sum[held], product[held], pivot[held];
#pragma unroll
    for (int32 i = 0; i < held; ++i) {
        sum[i] = product[i] = A(0);
        if (p.inside) pivot[i] = pivot_of(arguments, p, p.channel + i);
    }
    Packet x[Keeper::first_ahead], g[Keeper::first_ahead];
    uint32 bits[Keeper::first_ahead];
    keeper.first_pass(
        p,
        [&](int32 slot, int64 offset, auto place) {
            x[slot] = take_first(place, arguments.x + offset);
            g[slot] = take_first(place, arguments.dy + offset);
            if (arguments.bits) bits[slot] = take_bits(arguments.bits, offset);
            if (arguments.y) bits[slot] = bits_of(take_first(place, arguments.y + offset));
        },
        [&](int32 slot, int64 offset, auto place) {
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
            if (Keeper::one_launch || arguments.tables) return;
            Packet& scaled = g[slot];
            factors.for_each(pivot, [&](int32 i, const Affine& affine) {
                scaled.values[i] = narrow<STORAGE>(widen(scaled.values[i]) * affine.a);
            });
            put(arguments.dx + offset, scaled);
        });
    if (held > 1) __syncthreads();  // nobody needs the factors any more
    const int32 me = thread_number();
#pragma unroll
    for (int32 i = 0; i < held; ++i) {
        firsts[i][me] = sum[i];
        seconds[i][me] = product[i];
    }
    __syncthreads();
    for (int32 half = depth() / 2; half > 0; half >>= 1) {
        if (static_cast<int32>(threadIdx.y) < half) {
            const int32 other = me + half * lanes();
#pragma unroll
            for (int32 i = 0; i < held; ++i) {
                firsts[i][me] += firsts[i][other];
                seconds[i][me] += seconds[i][other];
            }
        }
        __syncthreads();
    }
    if (threadIdx.y == 0 && p.inside) {
#pragma unroll
        for (int32 i = 0; i < held; ++i) {
            const int64 index = part_index(p, p.split, p.channel + i);
            arguments.parts[index] = firsts[i][me];
            arguments.parts[index + part_plane(p)] = seconds[i][me];
        }
    }
}

// Merges the splits of one slab and group: the factors of dx = g * a + (x - pivot) * slope + b, and the group's sums.
template <typename Arguments>
__device__ __forceinline__ void finish_group_sums(const Arguments& arguments, const Place& p) {
    const Column column(p);
    double sum = 0.0, product = 0.0;
    for_parts(arguments, p, column, [&](int32, double part_sum, double part_product) {
        sum += part_sum;
        product += part_product;
    });
    sum = column_sum(sum, column.columns);
    product = column_sum(product, column.columns);
    if (column.part != 0 || !column.inside) return;
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
    const double centred = product - sum * offset;
    arguments.moments[slot] = sum;
    arguments.moments[slot + plane] = centred * inverse * r + d * sum;
    if (!arguments.tables) return;
    const double all = static_cast<double>(values_in_all(p));
    const double a = (arguments.gamma ? static_cast<double>(arguments.gamma[c]) : 1.0) * inverse * r;
    const double slope = -a * centred * inverse * inverse / all;
    arguments.tables[slot] = arguments.affine ? arguments.affine[slot] : static_cast<A>(a);  // the forward's own rounding
    arguments.tables[slot + plane] = static_cast<A>(slope);
    arguments.tables[slot + 2 * plane] = static_cast<A>(-a * sum / all - offset * slope);
}

// Adds up the groups: dbeta and dgamma of a slab.
template <typename Arguments>
__device__ __forceinline__ void finish_channel_sums(const Arguments& arguments, const Place& p) {
    const Column column(p);
    double sum = 0.0, product = 0.0;
    for (int32 group = column.part; column.inside && group < p.groups; group += column.parts) {
        sum += arguments.moments[slot_index(p, group, column.channel)];
        product += arguments.moments[slot_index(p, group, column.channel) + slot_plane(p)];
    }
    sum = column_sum(sum, column.columns);
    product = column_sum(product, column.columns);
    if (column.part != 0 || !column.inside) return;
    arguments.dbeta[column.channel] = static_cast<A>(sum);
    arguments.dgamma[column.channel] = static_cast<A>(product);
}

// dx = g * a + (x - pivot) * slope + b over a split.
template <typename Arguments, typename Keeper>
__device__ __forceinline__ void apply_split(const Arguments& arguments, const Place& p, Keeper& keeper) {
    GL_SHARED(A, table, [2][Factors::size]);
    const Factors factors(p, table[0], [&](int64 c) {
        const int64 slot = slot_index(p, p.group, c);
        const A forward_b = arguments.affine ? arguments.affine[slot + slot_plane(p)] : A(0);
        return Affine{arguments.saved[slot], arguments.tables[slot], forward_b};
    });
    const Factors corrections(p, table[1], [&](int64 c) {
        const int64 slot = slot_index(p, p.group, c), plane = slot_plane(p);
        return Affine{arguments.saved[slot], arguments.tables[slot + plane], arguments.tables[slot + 2 * plane]};
    });
    A pivot[held];
    if (p.inside) {
#pragma unroll
        for (int32 i = 0; i < held; ++i) pivot[i] = arguments.saved[slot_index(p, p.group, p.channel + i)];
    }
    // The first pass of the same launch has left the masked gradient there: one array instead of two.
    bool masked_before = false;
    if constexpr (Keeper::one_launch) masked_before = arguments.dresidual != nullptr;
    Packet x[Keeper::second_ahead], g[Keeper::second_ahead];
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
                        g[slot] = take(arguments.dresidual + offset);
                        return;
                    }
                }
                g[slot] = take<cache::streaming>(arguments.dy + offset);
                if (arguments.bits) bits[slot] = take_bits(arguments.bits, offset);
                if (arguments.y) bits[slot] = bits_of(take<cache::streaming>(arguments.y + offset));
            }
        },
        [&](int32 slot, int64 offset, auto place) {
            if constexpr (!decltype(place)::keeps) {
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
