// Batch normalisation: the whole picture. Its parts are one header each: what a thread moves at once (access), where it
// works (place), the two passes and what stays on chip between them (passes), sums and their merging (merge), factors of
// channels (factors), and what the passes do (forward, backward).
//
// View of the input (contiguous, E = rows * groups * spread * channels * inner elements):
//   [rows, groups, spread, channels, inner]; statistics are per (group, channel), over `rows * spread` rows of `inner`.
//   A thread moves PACKET neighbours at once, 2 to 16 bytes: as many as the plan finds that rows and addresses allow.
//   CHANNELS_LAST (inner = 1): they are neighbouring channels of one row;
//   CHANNELS_LAST and FOLDED (inner > 1): they are neighbouring columns of one row of channels * inner, and may belong to
//     several channels. Each column is summed as if it were a channel; a block then folds the `inner` columns of each
//     channel, and everything per channel is as in the other layouts;
//   RAGGED: they are neighbours of one (row, channel), and of the rows before and behind where the row begins or ends
//     inside a packet: those are selected out of sums and not written, and no byte of a ReLU's bits is one row's alone;
//   else: they are neighbours of one (row, channel).
// Block: (lanes, depth) threads, both powers of two. `lanes` threads lie side by side over the columns of a slab
//   (1 if not CHANNELS_LAST), `depth` of them share a column's values. A slab is lanes * held channels; FOLDED, as many
//   channels (slab_channels, a power of two) as have their columns in them and end with a packet; the lanes behind these
//   columns have no work.
// Work: block = (group, slab, split); the splits of a slab take U / splits of its units each, the first U mod splits of
//   them one more, a unit being a row (CHANNELS_LAST) or a packet of neighbours.
// Loops: forward with and without a residual, backward without a ReLU, with one whose signs x tells, and for everything
//   else. What a loop asks at every packet is issued whatever the answer, and would be half of its instructions.
// Statistics: each thread sums x - p and (x - p)^2 around its own first value p; (count, mean, square) triples are merged
//   by Chan's formula in a fixed tree, blocks' triples in double in a fixed order. The means are kept relative to the
//   channel's first value, so that nothing is lost where mean / sigma is large: as that value is one of the N, the mean
//   squared is at most N - 1 variances, and double takes their difference with a relative error of 2^-52 N at most.
//   Saved per (group, channel): the mean rounded to float (pivot), the rest of it (offset), and
//   1 / sqrt(variance + epsilon).
// Deterministic: a fixed grid for a shape and device, fixed trees, no floating-point atomics.
// Source: Chan, Golub, LeVeque 1979 (merging); arXiv 1502.03167; arXiv 1702.03275 (renorm).
#pragma once
#include "batch_norm_forward.cuh"
#include "batch_norm_backward.cuh"
