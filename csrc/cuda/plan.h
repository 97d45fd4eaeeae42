// How the CUDA kernels divide their work. It depends on sizes alone, never on the device, so that a sum has the same
// order, and the same bits, wherever it is taken.
#pragma once

#include "product.h"

namespace lora_kernels {
namespace cuda {

// A sum over `extent` in `count` slices of `length`, a multiple of the kernel's step (the last one may be shorter).
// Slice i is [i * length, min(extent, (i + 1) * length)); second stages add the slices in order of i.
struct Slices {
    int64_t count;
    int64_t length;
};

// Blocks that keep the largest of the GPUs busy: 148 multiprocessors, three or four blocks on each.
constexpr int64_t BUSY_BLOCKS = 512;

// As many slices as bring `tiles` tiles to BUSY_BLOCKS blocks, none shorter than `minimum` steps but the last.
LORA_HD Slices slices_of(int64_t extent, int64_t step, int64_t tiles, int64_t minimum) {
    const int64_t steps = ceil_div(extent, step);
    int64_t wanted = ceil_div(BUSY_BLOCKS, tiles > 0 ? tiles : 1);
    const int64_t most = steps / minimum;
    if (wanted > most) wanted = most;
    if (wanted < 1) wanted = 1;
    int64_t length = ceil_div(steps, wanted);
    if (length < 1) length = 1;
    const int64_t count = ceil_div(steps, length);
    return {count > 0 ? count : 1, length * step};
}

LORA_HD int64_t slice_begin(const Slices& slices, int64_t slice) { return slice * slices.length; }
LORA_HD int64_t slice_end(const Slices& slices, int64_t slice, int64_t extent) {
    const int64_t end = (slice + 1) * slices.length;
    return end < extent ? end : extent;
}

}  // namespace cuda
}  // namespace lora_kernels
