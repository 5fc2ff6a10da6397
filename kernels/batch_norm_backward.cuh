// Batch normalisation: sums of gradients, what becomes of them per channel, and dx.
#pragma once
#include "batch_norm_passes.cuh"
#include "batch_norm_merge.cuh"
#include "batch_norm_factors.cuh"

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

// How a pass learns where a ReLU let the gradient pass. Each case has loops of its own.
enum class Signs {
    all,       // there was no ReLU, and the pass does what it is for, no more
    of_input,  // x tells, by the forward's factors; else as `all`
    any        // whatever the arguments say
};

template <Signs signs> struct Case {
    static constexpr Signs value = signs;
};

// Calls use(case) with the case at hand, which is `any` unless cases are apart; `more`: the pass has more to do.
template <bool apart, typename Arguments, typename Use>
__device__ __forceinline__ void for_signs(const Arguments& arguments, bool more, Use use) {
    if (!apart || more || arguments.bits || arguments.y) {
        use(Case<Signs::any>{});
    } else if (arguments.recompute) {
        use(Case<Signs::of_input>{});
    } else {
        use(Case<Signs::all>{});
    }
}

// Adds up g and g * (x - pivot) over a split. g is dy, with a ReLU where its output is > 0: the bits or y are read unless
// null, else x tells. Writes g to arguments.dresidual unless null and, where `ends_here`, g * a to dx.
template <Signs signs, typename Arguments, typename Keeper>
__device__ __forceinline__ void sum_packets(
    const Arguments& arguments, const Place& p, Keeper& keeper, bool ends_here, const A* pivots, const Factors& factors,
    A (&pivot)[held], A (&sum)[held], A (&product)[held]) {
    constexpr bool any = signs == Signs::any;
    const bool by_bits = any && arguments.bits, by_output = any && arguments.y;
    const bool by_input = any ? static_cast<bool>(arguments.recompute) : signs == Signs::of_input;
    Packet x[Keeper::first_ahead], g[Keeper::first_ahead], y[any ? Keeper::first_ahead : 1];
    uint32 bits[Keeper::first_ahead];
    keeper.first_pass(
        p,
        [&](int32 slot, const Unit& unit, auto place) {
            x[slot] = take_first(place, arguments.x + unit.offset);
            g[slot] = take_first(place, arguments.dy + unit.offset);
            if (by_bits) bits[slot] = take_bits(arguments.bits, unit.offset);
            if (by_output) {
                y[any ? slot : 0] = take_first(place, arguments.y + unit.offset);
                if (!signs_late) bits[slot] = bits_of(y[any ? slot : 0]);
            }
        },
        [&](int32 slot, const Unit& unit, auto place) {
            if (held > 1) reload_channels(pivots, pivot);
            if (signs_late && by_output) bits[slot] = bits_of(y[any ? slot : 0]);
            if (by_input) bits[slot] = bits_of(x[slot], pivot, factors);
            if (by_input || by_bits || by_output) mask(g[slot], bits[slot]);
            place.keep(0, x[slot]);
            place.keep(1, g[slot]);
            if (any && arguments.dresidual) put_unit(arguments.dresidual, unit, g[slot]);
            replace_others(unit, x[slot], STORAGE{});
            replace_others(unit, g[slot], STORAGE{});
#pragma unroll
            for (int32 i = 0; i < width; ++i) {
                const int32 c = CHANNELS_LAST ? i : 0;
                const A gradient = widen(g[slot].values[i]);
                sum[c] += gradient;
                product[c] += gradient * (widen(x[slot].values[i]) - pivot[c]);
            }
            if (!any || !ends_here) return;
            Packet& scaled = g[slot];
            factors.for_each(pivot, [&](int32 i, const Affine& affine) {
                scaled.values[i] = narrow<STORAGE>(widen(scaled.values[i]) * affine.a);
            });
            put_unit(arguments.dx, unit, scaled);
        });
}

// Leaves this block's sums of g and g * (x - pivot) in arguments.parts.
template <typename Arguments, typename Keeper>
__device__ __forceinline__ void sums_of_split(const Arguments& arguments, const Place& p, Keeper& keeper) {
    // The sign is found by the forward's factors: as it left them, or (in inference) as it made them. Inference's dx needs
    // them too.
    const bool ends_here = !Keeper::one_launch && !arguments.tables;
    A* const pivots = reinterpret_cast<A*>(scratch());
    Factors factors{pivots + widest_slab};
    for_columns<3>(
        p,
        [&](int64 c) {
            if (!arguments.affine && (arguments.recompute || ends_here)) return affine_of(arguments, p, c);
            const int64 slot = slot_index(p, p.group, c);
            const bool left = arguments.affine != nullptr;
            return Affine{
                pivot_of(arguments, p, c),
                left ? arguments.affine[slot] : A(0),
                left ? arguments.affine[slot + slot_plane(p)] : A(0)};
        },
        [&](int32 column, const Affine& affine) {
            pivots[column] = affine.pivot;
            factors.leave(column, affine.a, affine.b);
        });
    A sum[held], product[held], pivot[held];
#pragma unroll
    for (int32 i = 0; i < held; ++i) sum[i] = product[i] = A(0);
    own_channels(pivots, pivot);
    factors.own();
    for_signs<Keeper::cases_apart>(arguments, ends_here || arguments.dresidual, [&](auto found) {
        sum_packets<decltype(found)::value>(arguments, p, keeper, ends_here, pivots, factors, pivot, sum, product);
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
    leave_parts(
        arguments, p, sums,
        [](double (&of_channel)[2], int64, int32, A first, A second) {
            of_channel[0] += first;
            of_channel[1] += second;
        },
        [](const double (&of_channel)[2]) { return Part{static_cast<A>(of_channel[0]), static_cast<A>(of_channel[1])}; });
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
template <Signs signs, typename Arguments, typename Keeper>
__device__ __forceinline__ void apply_packets(
    const Arguments& arguments, const Place& p, Keeper& keeper, const Factors& factors, const Factors& corrections,
    const A (&pivot)[held]) {
    constexpr bool any = signs == Signs::any;
    // The first pass of the same launch has left the masked gradient there: one array instead of two. Not in ragged rows:
    // a packet at an end has elements that another block may be writing.
    // NVRTC before CUDA 12.4 looks at what `if constexpr` leaves out in a lambda, so the field is named out here.
    decltype(arguments.dy) masked_gradients = nullptr;
    if constexpr (Keeper::one_launch && any && !RAGGED) masked_gradients = arguments.dresidual;
    const bool masked_before = masked_gradients != nullptr;
    const bool by_bits = any && !masked_before && arguments.bits, by_output = any && !masked_before && arguments.y;
    const bool by_input = any ? static_cast<bool>(arguments.recompute) : signs == Signs::of_input;
    constexpr int32 ahead = Keeper::template second_ahead<2>;
    Packet x[ahead], g[ahead], y[any ? ahead : 1];
    uint32 bits[ahead];
    keeper.template second_pass<2>(
        p,
        [&](int32 slot, const Unit& unit, auto place) {
            if constexpr (decltype(place)::keeps) {
                x[slot] = place.recall(0);
                g[slot] = place.recall(1);
            } else {
                x[slot] = take<last_touch>(arguments.x + unit.offset);
                if (masked_before) {
                    g[slot] = take(masked_gradients + unit.offset);
                    return;
                }
                g[slot] = take<last_touch>(arguments.dy + unit.offset);
                if (by_bits) bits[slot] = take_bits(arguments.bits, unit.offset);
                if (by_output) {
                    y[any ? slot : 0] = take<last_touch>(arguments.y + unit.offset);
                    if (!signs_late) bits[slot] = bits_of(y[any ? slot : 0]);
                }
            }
        },
        [&](int32 slot, const Unit& unit, auto place) {
            constexpr bool kept = decltype(place)::keeps;  // what was kept is masked
            if constexpr (!kept) {
                if (signs_late && by_output) bits[slot] = bits_of(y[any ? slot : 0]);
                if (by_bits || by_output) mask(g[slot], bits[slot]);
            }
            A result[width];
            factors.for_each(pivot, [&](int32 i, const Affine& affine) {
                result[i] = widen(g[slot].values[i]) * affine.a;
                if (!kept && by_input && !(affine.of(x[slot].values[i]) > underflow<STORAGE>)) result[i] = A(0);
            });
            corrections.for_each(
                pivot, [&](int32 i, const Affine& affine) { result[i] += affine.of(x[slot].values[i]); });
            store_unit<last_touch>(arguments.dx, unit, result);
        });
}

// dx over a split.
template <typename Arguments, typename Keeper>
__device__ __forceinline__ void apply_split(const Arguments& arguments, const Place& p, Keeper& keeper) {
    A* const pivots = reinterpret_cast<A*>(scratch());
    Factors factors{pivots + widest_slab}, corrections{factors.table + Factors::size};
    struct Line {
        Affine factors;
        A slope, shift;
    };
    for_columns<5>(
        p,
        [&](int64 c) {
            const int64 slot = slot_index(p, p.group, c), plane = slot_plane(p);
            const A b = arguments.affine ? arguments.affine[slot + plane] : A(0);
            return Line{
                {arguments.saved[slot], arguments.tables[slot], b},
                arguments.tables[slot + plane],
                arguments.tables[slot + 2 * plane]};
        },
        [&](int32 column, const Line& line) {
            pivots[column] = line.factors.pivot;
            factors.leave(column, line.factors.a, line.factors.b);
            corrections.leave(column, line.slope, line.shift);
        });
    A pivot[held];
    own_channels(pivots, pivot);
    factors.own();
    corrections.own();
    for_signs<Keeper::cases_apart>(arguments, false, [&](auto found) {
        apply_packets<decltype(found)::value>(arguments, p, keeper, factors, corrections, pivot);
    });
}
