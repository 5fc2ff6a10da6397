// Batch normalisation, forward, backward and inference, over [rows, groups, spread, channels, inner] (batch_norm.cuh
// says how blocks share the work, and how sums are taken).
//
// Traffic, E elements of s bytes (per-channel vectors not counted):
//   gl_bn_statistics + gl_bn_normalise   forward, two sweeps: 3 E s (residual: 4 E s); the second sweep runs backwards and
//                                        streams, so what the L2 cache still holds of x is not read from memory again
//   gl_bn_normalise alone                inference: 2 E s (residual: 3 E s)
//   gl_bn_sums + gl_bn_apply             backward, two sweeps: 5 E s, also behind a ReLU: the sign of y is computed again
//                                        from x, bit for bit (ReLU and residual: 6 E s and the bits; the first sweep
//                                        writes the residual's gradient, the second reads it in place of dy)
//   gl_bn_sums alone                     inference backward: 3 E s (ReLU and residual: 5 E s, y is read)
//   gl_bn_forward, gl_bn_backward        everything in one launch: one block per slab for small arrays (x is re-read from
//                                        L1 and L2), or CLUSTER blocks per slab that keep their part of x (and dy) in
//                                        shared memory: 2 E s forward, 3 E s backward
//   gl_bn_forward_grid, gl_bn_backward_grid
//                                        everything in one cooperative launch that keeps what it can on chip: down to
//                                        2 E s forward, 3 E s backward (batch_norm_grid.cuh)
// The bits: with residual and ReLU the forward leaves a byte for every 16 bytes of x, so E / 8 bytes for 16-bit storage,
// and the backward reads them in place of y. Without 16-byte accesses, and where rows are ragged, there are none, and y is
// read: 7 E s backward. Packets at the ends of ragged rows are read for both rows.
// Moving statistics and renorm's r and d are finished by the last block of a slab, in the same launch.
// Grid: groups * slabs * splits (one-launch kernels: slabs * CLUSTER). Block: (lanes, depth), at most 256 threads.
// Access: 2 to 16 bytes, the most that the rows' lengths and all addresses are multiples of; or 16 bytes whatever the
//   length, of columns that are folded or rows that are ragged (batch_norm/plan.py decides).
// Shared memory: at most 9 KB static (17 KB where columns are folded), which all steps use in turn; the keeping kernels add
//   the accesses they hold.
// Registers: at most 80 in the sweeps, so that a multiprocessor holds the three blocks that the plan gives it: the grid is
//   one wave. At most 128 in the one-launch kernels.
// Deterministic; no floating-point atomics.
#include "batch_norm.cuh"
#include "batch_norm_grid.cuh"

#if defined(GL_ENTRY_gl_bn_statistics)
GL_KERNEL(gl_bn_statistics, 256, 3) {
    const Place p = place_of(arguments, static_cast<int32>(blockIdx.x));
    KeepNothing<1> keeper;
    moments_of_split(arguments, p, keeper);
    if (!last_split(arguments, p)) return;
    const Moments of_group = finish_group(arguments, p);
    if (!last_group(arguments, p)) return;
    finish_channels(arguments, p, of_group);
}
#endif

#if defined(GL_ENTRY_gl_bn_normalise)
GL_KERNEL(gl_bn_normalise, 256, 3) {
    KeepNothing<1> keeper;
    normalise_split(arguments, place_of(arguments, static_cast<int32>(blockIdx.x)), keeper);
}
#endif

#if defined(GL_ENTRY_gl_bn_sums)
GL_KERNEL(gl_bn_sums, 256, 3) {
    const Place p = place_of(arguments, static_cast<int32>(blockIdx.x));
    KeepNothing<2> keeper;
    sums_of_split(arguments, p, keeper);
    const Place again = place_of(arguments, block_number_again());
    if (!last_split(arguments, again)) return;
    const GroupSums of_group = finish_group_sums(arguments, again);
    if (!last_group(arguments, again)) return;
    finish_channel_sums(arguments, again, of_group);
}
#endif

#if defined(GL_ENTRY_gl_bn_apply)
GL_KERNEL(gl_bn_apply, 256, 3) {
    KeepNothing<2> keeper;
    apply_split(arguments, place_of(arguments, static_cast<int32>(blockIdx.x)), keeper);
}
#endif

#if defined(GL_ENTRY_gl_bn_forward)
GL_KERNEL(gl_bn_forward, 256, 2) {
#if CLUSTER > 1
    GL_DYNAMIC_SHARED(copies);
    const Place p = place_of(arguments, static_cast<int32>(blockIdx.x));
    KeepShared<1> keeper{copies};
    moments_of_split(arguments, p, keeper);
    cluster_barrier();
    const bool first = cluster_rank() == 0, renorm = arguments.old_mean != nullptr;
    Moments of_group;
    if (first) of_group = finish_group(arguments, p);
    if (first && renorm) finish_channels(arguments, p, of_group);  // else nobody waits for that
    cluster_barrier();
    if (first && !renorm) finish_channels(arguments, p, of_group);
    normalise_split(arguments, p, keeper);
#else
    Place p = place_of(arguments, static_cast<int32>(blockIdx.x));
    KeepNothing<1> keeper;
    Moments of_group;
    for (p.group = 0; p.group < p.groups; ++p.group) {
        moments_of_split(arguments, p, keeper);
        __syncthreads();
        of_group = finish_group(arguments, p);
        __syncthreads();
    }
    finish_channels(arguments, p, of_group);
    __syncthreads();
    for (p.group = 0; p.group < p.groups; ++p.group) normalise_split(arguments, p, keeper);
#endif
}
#endif

#if defined(GL_ENTRY_gl_bn_backward)
GL_KERNEL(gl_bn_backward, 256, 2) {
#if CLUSTER > 1
    GL_DYNAMIC_SHARED(copies);
    const Place p = place_of(arguments, static_cast<int32>(blockIdx.x));
    KeepShared<2> keeper{copies};
    sums_of_split(arguments, p, keeper);
    cluster_barrier();
    const bool first = cluster_rank() == 0;
    GroupSums of_group;
    if (first) of_group = finish_group_sums(arguments, p);
    cluster_barrier();
    if (first) finish_channel_sums(arguments, p, of_group);
    apply_split(arguments, p, keeper);
#else
    Place p = place_of(arguments, static_cast<int32>(blockIdx.x));
    KeepNothing<2> keeper;
    GroupSums of_group;
    for (p.group = 0; p.group < p.groups; ++p.group) {
        sums_of_split(arguments, p, keeper);
        __syncthreads();
        of_group = finish_group_sums(arguments, p);
        __syncthreads();
    }
    finish_channel_sums(arguments, p, of_group);
    for (p.group = 0; p.group < p.groups; ++p.group) apply_split(arguments, p, keeper);
#endif
}
#endif

#if defined(GL_ENTRY_gl_bn_forward_grid)
GL_KERNEL(gl_bn_forward_grid, 256, 2) { forward_in_grid(arguments); }
#endif

#if defined(GL_ENTRY_gl_bn_backward_grid)
GL_KERNEL(gl_bn_backward_grid, 256, 2) { backward_in_grid(arguments); }
#endif
