// What the launcher hands to the runtime; emulation/launcher.py packs the same fields.
#pragma once
#include <stddef.h>

#ifdef GL_EMULATION_THREADS
#define GL_EMULATION_LOCAL __thread
#else
#define GL_EMULATION_LOCAL
#endif

extern "C" {
struct emulation_request {
    const void* arguments;
    size_t shared;        // bytes of dynamic shared memory
    size_t shared_limit;  // static and dynamic together
    unsigned grid[3], block[3];
    unsigned cluster;   // blocks per cluster, 1 for none
    unsigned resident;  // blocks alive at a time
    unsigned order;     // 0 forward, 1 reverse, 2 shuffled
    unsigned seed;
    unsigned poison;    // byte that shared memory starts with
};
// Defined at the end of the kernel's text.
void emulation_entry(const void* arguments);
extern const int emulation_largest_block;
// Returns 0, or 1 with a text in `error`.
int emulation_launch(const emulation_request* wanted, char* error, size_t error_size);
}
