// Batch normalisation: where a block and its threads work.
#pragma once
#include "batch_norm_access.cuh"

struct Place {
    int64 rows, spread, channels, inner;
    int64 share;                                   // units of a split at least
    uint64 spread_multiplier, inner_multiplier;    // for divisions by spread and by units_of_row
    int32 spread_shift, inner_shift;
    int32 groups, group, slabs, slab, splits, split;
    int32 slab_channels;
    int64 start;  // where this thread's first column begins in a row
    bool inside;  // that column exists
};

__device__ __forceinline__ int32 lanes() { return static_cast<int32>(blockDim.x); }
__device__ __forceinline__ int32 depth() { return static_cast<int32>(blockDim.y); }
// The logarithm of a power of two: shifts in place of divisions.
__device__ __forceinline__ int32 shift_of(int32 power) { return 31 - __clz(power); }
// Of one channel. A ragged row is given the most packets that as many elements can touch; where it touches one less, the
// last unit is empty.
__device__ __forceinline__ int64 units_of_row(const Place& p) {
    return CHANNELS_LAST ? 1 : RAGGED ? (p.inner + 2 * width - 2) / width : p.inner / width;
}
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

// The first of this thread's channels, where columns are channels.
__device__ __forceinline__ int64 first_channel(const Place& p) {
    return (static_cast<int64>(p.slab) * lanes() + threadIdx.x) * held;
}

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
    p.inner = CHANNELS_LAST && !FOLDED ? 1 : arguments.inner;
    p.splits = static_cast<int32>(arguments.splits);
    p.slab_channels = FOLDED ? static_cast<int32>(arguments.slab_channels) : lanes() * held;
    p.slabs = static_cast<int32>((p.channels + p.slab_channels - 1) >> shift_of(p.slab_channels));
    p.split = block % p.splits;
    const int32 rest = block / p.splits;
    p.slab = rest % p.slabs;
    p.group = rest / p.slabs;
    if (FOLDED) {
        const int64 first = static_cast<int64>(p.slab) * p.slab_channels, behind = p.channels - first;
        const int32 column = static_cast<int32>(threadIdx.x) * held;
        p.start = first * p.inner + column;
        p.inside = column < (behind < p.slab_channels ? behind : p.slab_channels) * p.inner;
    } else {
        p.start = first_channel(p) * p.inner;
        p.inside = first_channel(p) < p.channels;
    }
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

// How far a packet boundary lies before the first element of a row.
__device__ __forceinline__ int32 elements_before(int64 row_offset) { return static_cast<int32>(row_offset & (width - 1)); }

// Values of a channel in a unit, where all units have as many.
__device__ __forceinline__ int64 values_of_unit(const Place& p) { return FOLDED ? p.inner : CHANNELS_LAST ? 1 : width; }

// In ragged rows: values of a channel in those of a group's units that come before this one.
__device__ __forceinline__ int64 values_before(const Place& p, int64 unit) {
    const int64 row = static_cast<int64>(divide(static_cast<uint64>(unit), p.inner_multiplier, p.inner_shift));
    const int64 position = unit - row * units_of_row(p);
    if (position == 0) return row * p.inner;
    const int64 of_row = position * width - elements_before(row_start(p, row) + p.start);
    return row * p.inner + (of_row < p.inner ? of_row : p.inner);
}
__device__ __forceinline__ int64 values_of_split(const Place& p, const Shares& shares, int32 split) {
    if (!RAGGED) return shares.count(split) * values_of_unit(p);
    const int64 first = shares.first(split);
    return values_before(p, first + shares.count(split)) - values_before(p, first);
}

// Walks over this thread's units of a range, forwards or backwards.
//
// Where the rows of a group are equally far apart (all but sub-batches of more than one row per image), the walk is over
// offsets, `at` that of the current unit: a step is an addition. Else `at` is a row, and its offset takes a division.
// In ragged rows it is the offset that a unit would have if its row began with a packet.
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
            at = row_start(p, 0) + row * pitch + p.start + position * width;
            step += step_positions * width;
            next_row -= RAGGED ? row_end * width : p.inner;
        }
        if (backwards) {
            step = -step;
            step_positions = -step_positions;
            next_row = -next_row;
        }
    }

    // The current unit; moves on to the next.
    __device__ __forceinline__ Unit next(const Place& p) {
        const Unit here = unit_at(p, even ? at : row_start(p, at) + p.start + position * width);
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

    __device__ __forceinline__ Unit unit_at(const Place& p, int64 offset) const {
        if (!RAGGED) return Unit{offset, all_elements};
        const int32 before = elements_before(offset);
        const int64 until_end = before + p.inner - position * width;  // of the row, from where the packet begins
        const int32 end = until_end >= width ? width : until_end <= 0 ? 0 : static_cast<int32>(until_end);
        const int32 first = position == 0 ? before : 0;
        // There may be no memory where an empty packet would lie, so that is the one before it.
        return Unit{offset - before - (end == 0 ? width : 0), all_elements << first & ((1u << end) - 1u)};
    }
};
