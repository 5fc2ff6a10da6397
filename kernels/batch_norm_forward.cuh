// Batch normalisation: statistics, what happens once per channel, and the normalised output.
#pragma once
#include "batch_norm_passes.cuh"
#include "batch_norm_merge.cuh"
#include "batch_norm_factors.cuh"

// Merges the triple (count, mean, square) of another set of values into this one; `share` is other / (this + other).
__device__ __forceinline__ void merge(A count, A share, A& mean, A& square, A other_mean, A other_square) {
    const A delta = other_mean - mean;
    mean += delta * share;
    square += other_square + delta * delta * count * share;
}

// The first of a packet's values of each of this thread's columns.
__device__ __forceinline__ void first_values(const Packet& packet, const Unit& unit, A (&first)[held]) {
#pragma unroll
    for (int32 i = (RAGGED ? width : held) - 1; i >= 0; --i)
        if (unit.has(i)) first[i < held ? i : 0] = widen(packet.values[i]);
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
        [&](int32 slot, const Unit& unit, auto place) {
            values[slot] = take_first(place, arguments.x + unit.offset);
        },
        [&](int32 slot, const Unit& unit, auto place) {
            place.keep(0, values[slot]);
            if (seen == 0) first_values(values[slot], unit, base);
            seen += unit.values();
            replace_others(unit, values[slot], narrow<STORAGE>(base[0]));  // which is 0 from the base
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
    moments[0] = A(seen);
    const A inverse = seen ? A(1) / moments[0] : A(0);
    Packet first;
    const STORAGE* const start = arguments.x + row_start(p, 0) + p.start;
    if (seen && held == 1) first.values[0] = *start;
    if (seen && held > 1) first = take(start);
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
    // Columns that are folded all have the same number of values. Their means are relative to their own first values; the
    // channel's becomes relative to that of its first column, and double takes sums and differences as in finish_group.
    const double count = static_cast<double>(Shares(p).count(p.split));
    leave_parts(
        arguments, p, moments,
        [&](double (&sums)[2], int64 channel, int32 number, A of_column, A squares) {
            const STORAGE* const values = arguments.x + row_start(p, 0) + channel * p.inner;
            const double mean = (widen(values[number]) - widen(values[0])) + of_column;
            sums[0] += mean;
            sums[1] += squares + count * mean * mean;
        },
        [&](const double (&sums)[2]) {
            const double mean = sums[0] / static_cast<double>(p.inner), squares = sums[1] - sums[0] * mean * count;
            return Part{static_cast<A>(mean), static_cast<A>(squares < 0.0 ? 0.0 : squares)};
        });
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
        const double mean = part.first, count = static_cast<double>(values_of_split(p, shares, split));
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

// What the output of a ReLU, or without one any output, is not less than.
template <typename Arguments> __device__ __forceinline__ A floor_of(const Arguments& arguments) {
    return arguments.relu ? A(0) : static_cast<A>(__uint_as_float(0xff800000u));  // -infinity
}

// Writes y over a split, and the bits of a ReLU behind a residual unless null. `added`: there is a residual.
template <bool added, typename Arguments, typename Keeper>
__device__ __forceinline__ void normalise_packets(
    const Arguments& arguments, const Place& p, Keeper& keeper, const A (&pivot)[held], const A (&a)[held], const A (&b)[held]) {
    const A floor = floor_of(arguments);
    constexpr int32 loaded = added ? 2 : 1, ahead = Keeper::template second_ahead<loaded>;
    Packet values[ahead], extra[added ? ahead : 1];
    keeper.template second_pass<loaded>(
        p,
        [&](int32 slot, const Unit& unit, auto place) {
            if constexpr (decltype(place)::keeps) {
                values[slot] = place.recall(0);
            } else {
                values[slot] = take<last_touch>(arguments.x + unit.offset);
            }
            if (added) extra[added ? slot : 0] = take<last_touch>(arguments.residual + unit.offset);
        },
        [&](int32 slot, const Unit& unit, auto) {
            A result[width];
#pragma unroll
            for (int32 i = 0; i < width; ++i) {
                const int32 c = CHANNELS_LAST ? i : 0;
                A value = Affine{pivot[c], a[c], b[c]}.of(values[slot].values[i]);
                if (added) value += widen(extra[added ? slot : 0].values[i]);
                result[i] = at_least(value, floor);
            }
            if (added && leaves_bits && arguments.bits) {
                uint32 bits = 0u;
#pragma unroll
                for (int32 i = 0; i < width; ++i)
                    if (result[i] > underflow<STORAGE>) bits |= 1u << i;
                arguments.bits[unit.offset / width] = static_cast<uint8>(bits);
            }
            store_unit<last_touch>(arguments.y, unit, result);
        });
}

// Writes y, and for the backward of a ReLU, unless null: a and b of each channel to arguments.affine; arguments.bits.
template <typename Arguments, typename Keeper>
__device__ __forceinline__ void normalise_split(const Arguments& arguments, const Place& p, Keeper& keeper) {
    A* const table = reinterpret_cast<A*>(scratch());
    for_columns<3>(
        p,
        [&](int64 c) {
            const Affine affine = affine_of(arguments, p, c);
            if (arguments.affine && p.split == 0) {
                const int64 slot = slot_index(p, p.group, c);
                arguments.affine[slot] = affine.a;
                arguments.affine[slot + slot_plane(p)] = affine.b;
            }
            return affine;
        },
        [&](int32 column, const Affine& affine) {
            table[column] = affine.pivot;
            table[widest_slab + column] = affine.a;
            table[2 * widest_slab + column] = affine.b;
        });
    A pivot[held], a[held], b[held];
    own_channels(table, pivot);
    own_channels(table + widest_slab, a);
    own_channels(table + 2 * widest_slab, b);
    if (arguments.residual) {
        normalise_packets<true>(arguments, p, keeper, pivot, a, b);
    } else {
        normalise_packets<false>(arguments, p, keeper, pivot, a, b);
    }
}
