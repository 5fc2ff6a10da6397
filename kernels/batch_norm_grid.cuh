// Batch normalisation in one launch of blocks that are all resident at once and wait for each other: what a block read
// in the first pass stays on chip for the second.
//
// Traffic, E elements of s bytes, a part p of them kept (the plan knows p; 1 where the input fits the chip):
//   forward (3 - p) E s (residual: (4 - p) E s), backward (5 - 2 p) E s (ReLU and residual: (7 - 2 p) E s). What is not
//   kept is read a second time backwards, before anything else: the L2 cache may still hold some of it.
// Layout: as in batch_norm.cuh; a block has one split of one slab and group. Of its units a thread keeps the first
//   `register_units` in registers, the next `kept_units` in shared memory, no further ones. A unit is a packet of x
//   forward, and one of x and one of the gradient backward.
// Grid: groups * slabs * splits, at most as many as the device holds at a time: the launch is cooperative, so none waits
//   for one that has not started. Block: (lanes, depth), at most 256 threads; registers for two blocks on a multiprocessor.
// Shared memory: as the sweeps, and kept_units * packets accesses per thread.
// Waiting: for a slab, not for the grid. The block that ends a slab's last split merges the splits, as in the sweeps,
//   and opens the slab's gate; the others wait there. Gate and counters are zero again afterwards.
// Deterministic: splits are merged in the order of their numbers, whoever comes last; no floating-point atomics.
// Hardware clusters of 16 blocks would need no gate for slabs of at most 16 blocks' memory. They are not used: they need
//   a launch attribute beyond the portable 8, sm_90 places few of them at a time (a processing cluster has 16 to 18
//   multiprocessors, so a tenth of the device stays idle), and slabs of that size are held by the grid as well.
// Source: the scheme of persistent batch normalisation (registers, shared memory, reversed second pass) is that of the
//   kernels in NVIDIA Apex; keeping, merging and the gate are as batch_norm.cuh has them.
#pragma once
#include "batch_norm.cuh"

// Units that a thread keeps in registers; the plan counts on them. Backward has more sums and factors to hold per channel.
template <int32 packets> constexpr int32 register_units = packets == 1 ? 4 : 1;

// A place in the registers of the thread.
struct InRegisters {
    static constexpr bool keeps = true;
    Packet* unit;

    __device__ __forceinline__ void keep(int32 which, const Packet& value) const { unit[which] = value; }
    __device__ __forceinline__ Packet recall(int32 which) const { return unit[which]; }
};

// The first units of a split stay in registers, the next ones in shared memory, the rest is read twice.
template <int32 packets> struct KeepOnChip {
    static constexpr int32 units = register_units<packets>;
    static constexpr bool one_launch = true, cases_apart = true;
    // Pairs of doubles, and the walk through the units of rows beside them, take many registers.
    static constexpr bool scarce = packets == 2 && sizeof(STORAGE) == 8 && width == 1 && !CHANNELS_LAST;
    static constexpr int32 first_ahead = scarce ? 1 : 4 / packets;
    // Of what is not kept; the factors take registers, too.
    template <int32 loaded>
    static constexpr int32 second_ahead = packets == 2 || (width == 8 && loaded == 2) ? 2 : whole_words ? 3 : 4;
    static constexpr int32 recall_ahead = 2 / packets;  // on chip all is near but a residual
    unsigned char* memory;
    int64 shared_units;
    Packet registers[units][packets];

    __device__ __forceinline__ KeepOnChip(unsigned char* memory, int32 shared_units)
        : memory(memory), shared_units(shared_units) {}

    // The units that a block's threads meet in their steps `from` to `to`; to = all_steps: up to the end.
    static constexpr int64 all_steps = int64(1) << 48;
    __device__ __forceinline__ Range steps(const Place& p, int64 from, int64 to) const {
        const Range all = range_of_split(p);
        const int64 start = from * depth() < all.count ? from * depth() : all.count;
        const int64 end = to * depth() < all.count ? to * depth() : all.count;
        return Range{all.first + start, end - start};
    }

    template <int32 ahead, typename Fetch, typename Body>
    __device__ __forceinline__ void kept(const Place& p, Fetch& fetch, Body& body) {
        constexpr int32 batch = ahead < units ? ahead : units;
        static_assert(units % batch == 0, "a batch has only units that are there");
        Walk walk(p, steps(p, 0, units), false);
        const auto in_register = [&](int32 number) { return InRegisters{registers[number]}; };
#pragma unroll
        for (int32 number = 0; number < units; number += batch)
            for_batch<batch, false>(p, walk, number, in_register, fetch, body);
        unsigned char* const copies = memory;
        for_units<ahead, full_apart<packets, one_launch>>(
            p, steps(p, units, units + shared_units), false,
            [=](int32 number) { return InShared<packets>{copies, number}; }, fetch, body);
    }
    template <int32 ahead, typename Fetch, typename Body>
    __device__ __forceinline__ void not_kept(const Place& p, bool backwards, Fetch& fetch, Body& body) {
        for_units<ahead, full_apart<packets, one_launch>>(
            p, steps(p, units + shared_units, all_steps), backwards, [](int32) { return Nowhere{}; }, fetch, body);
    }
    template <typename Fetch, typename Body>
    __device__ __forceinline__ void first_pass(const Place& p, Fetch fetch, Body body) {
        kept<first_ahead>(p, fetch, body);
        not_kept<first_ahead>(p, false, fetch, body);
    }
    template <int32 loaded, typename Fetch, typename Body>
    __device__ __forceinline__ void second_pass(const Place& p, Fetch fetch, Body body) {
        static_assert(recall_ahead <= second_ahead<loaded>, "a pass has slots for second_ahead units");
        not_kept<second_ahead<loaded>>(p, true, fetch, body);
        kept<recall_ahead>(p, fetch, body);
    }
};

// The gate of a block's slab lies behind the counters of the splits and groups, alone in its 128 bytes: those that wait
// there do not slow down those that count.
template <typename Arguments> __device__ __forceinline__ uint32* gate_of(const Arguments& arguments, const Place& p) {
    const int64 counts = (static_cast<int64>(p.groups) + 1) * p.slabs;
    return arguments.counters + ((counts + 31) / 32 + p.slab) * 32;
}
__device__ __forceinline__ uint32 blocks_of_slab(const Place& p) { return static_cast<uint32>(p.groups) * p.splits; }

template <typename Arguments> __device__ __forceinline__ void forward_in_grid(const Arguments& arguments) {
    GL_DYNAMIC_SHARED(copies);
    const Place p = place_of(arguments, static_cast<int32>(blockIdx.x));
    KeepOnChip<1> keeper(copies, arguments.kept_units);
    moments_of_split(arguments, p, keeper);
    if (last_split(arguments, p)) {
        const Moments of_group = finish_group(arguments, p);
        if (last_group(arguments, p)) {
            const bool renorm = arguments.old_mean != nullptr;  // else nobody waits for what is finished per channel
            if (!renorm) open_gate(gate_of(arguments, p));
            finish_channels(arguments, p, of_group);
            if (renorm) open_gate(gate_of(arguments, p));
        }
    }
    pass_gate(gate_of(arguments, p));
    const Place again = place_of(arguments, block_number_again());
    normalise_split(arguments, again, keeper);
    leave_gate(gate_of(arguments, again), blocks_of_slab(again));
}

template <typename Arguments> __device__ __forceinline__ void backward_in_grid(const Arguments& arguments) {
    GL_DYNAMIC_SHARED(copies);
    const Place p = place_of(arguments, static_cast<int32>(blockIdx.x));
    KeepOnChip<2> keeper(copies, arguments.kept_units);
    sums_of_split(arguments, p, keeper);
    if (last_split(arguments, p)) {
        const GroupSums of_group = finish_group_sums(arguments, p);
        if (last_group(arguments, p)) {
            open_gate(gate_of(arguments, p));
            finish_channel_sums(arguments, p, of_group);
        }
    }
    pass_gate(gate_of(arguments, p));
    apply_split(arguments, p, keeper);
    leave_gate(gate_of(arguments, p), blocks_of_slab(p));
}
