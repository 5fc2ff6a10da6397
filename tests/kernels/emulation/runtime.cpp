// Runs a kernel's CUDA threads on the CPU: as fibers in a chosen order, or as OS threads (GL_EMULATION_THREADS).
//
// What it refuses, with a message instead of a wrong number: threads that meet at different barriers, lanes missing from
// a warp operation, waiting for ever, shared memory beyond the block's limit, clusters whose blocks have ended. Shared
// memory starts with poison, and only as many blocks are alive as the emulated GPU holds.
#include "runtime.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#ifdef GL_EMULATION_THREADS
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#elif !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__) && !defined(GL_EMULATION_THREADS)
#include <sanitizer/common_interface_defs.h>
#define GL_FIBER_ANNOTATIONS 1
#endif

struct uint3 {
    unsigned int x, y, z;
};
struct emulation_position {  // as in emulation.h
    uint3 thread, block, block_size, grid_size;
};
extern "C" GL_EMULATION_LOCAL const emulation_position* emulation_here;

namespace {

#ifdef GL_FIBER_ANNOTATIONS
constexpr size_t stack_size = 1024 * 1024;  // AddressSanitizer writes its reports on the stack of the culprit
#else
constexpr size_t stack_size = 96 * 1024;
#endif
constexpr int largest_static_count = 64;

// A place where a known set of threads meets: __syncthreads, a warp operation, a cluster barrier.
struct meeting {
    unsigned arrived = 0, generation = 0;
    int line = 0;
#ifdef GL_EMULATION_THREADS
    std::mutex mutex;
    std::condition_variable changed;
#endif
};

struct warp_group : meeting {
    unsigned mask = 0;
    unsigned long long values[2][32];
};

struct warp {
    std::deque<warp_group> groups;
#ifdef GL_EMULATION_THREADS
    std::mutex mutex;
#endif
    warp_group& group(unsigned mask) {
#ifdef GL_EMULATION_THREADS
        std::lock_guard<std::mutex> hold(mutex);
#endif
        for (auto& candidate : groups)
            if (candidate.mask == mask) return candidate;
        groups.emplace_back();
        groups.back().mask = mask;
        return groups.back();
    }
};

// One shared variable of a block. The fields are read without a lock, so that finding a variable orders nothing.
struct static_variable {
    const void* tag = nullptr;
    void* memory = nullptr;
    size_t size = 0;
};

struct cluster_state;

struct block_state {
    uint3 index;
    unsigned rank = 0, threads_left = 0;
    cluster_state* cluster = nullptr;
    meeting barrier;
    std::deque<warp> warps;
    static_variable statics[largest_static_count];
    unsigned char* dynamic = nullptr;
    size_t shared_used = 0;
    bool ended = false;
#ifdef GL_EMULATION_THREADS
    // ThreadSanitizer takes malloc for a write, so the memory is there before the threads are.
    std::mutex mutex;
    unsigned char* arena = nullptr;
    size_t arena_used = 0;
#endif
    ~block_state() {
#ifdef GL_EMULATION_THREADS
        free(arena);
#else
        for (auto& variable : statics) free(variable.memory);
#endif
        free(dynamic);
    }
};

struct cluster_state {
    std::deque<block_state> blocks;
    meeting barrier;
    unsigned blocks_left = 0;
};

enum class state { ready, waiting, spinning, done };

struct cuda_thread {
    emulation_position position;
    block_state* block = nullptr;
    unsigned number = 0;
    state now = state::ready;
    const unsigned* waits_for = nullptr;
    unsigned old_value = 0;
#ifndef GL_EMULATION_THREADS
    unsigned char* stack = nullptr;
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
#ifdef GL_FIBER_ANNOTATIONS
    void* fake_stack = nullptr;
#endif
#endif
};

const emulation_request* request;
GL_EMULATION_LOCAL cuda_thread* self;
char failure[1024];
bool failed;

unsigned block_threads() { return request->block[0] * request->block[1] * request->block[2]; }

// memset that no sanitizer takes for an access of the calling thread.
__attribute__((no_sanitize("thread", "address"))) void poison(void* memory, size_t size) {
    volatile unsigned char* bytes = static_cast<unsigned char*>(memory);
    for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<unsigned char>(request->poison);
}

// ---- giving way to other threads -----------------------------------------------------------------------------------

#ifndef GL_EMULATION_THREADS

#if defined(__x86_64__)
void* scheduler_pointer;
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.type emulation_switch, @function
.hidden emulation_switch
.globl emulation_switch
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_switch, .-emulation_switch
)");
#else
ucontext_t scheduler_context;
#endif
#ifdef GL_FIBER_ANNOTATIONS
const void* scheduler_stack;
size_t scheduler_stack_size;
void* scheduler_fake_stack;
#endif

void to_scheduler() {
    cuda_thread* me = self;
#ifdef GL_FIBER_ANNOTATIONS
    __sanitizer_start_switch_fiber(me->now == state::done ? nullptr : &me->fake_stack, scheduler_stack, scheduler_stack_size);
#endif
#if defined(__x86_64__)
    emulation_switch(&me->stack_pointer, scheduler_pointer);
#else
    swapcontext(&me->context, &scheduler_context);
#endif
#ifdef GL_FIBER_ANNOTATIONS
    __sanitizer_finish_switch_fiber(me->fake_stack, nullptr, nullptr);
#endif
}

void fiber_main() {
#ifdef GL_FIBER_ANNOTATIONS
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
    emulation_entry(request->arguments);
    self->now = state::done;
    to_scheduler();
    abort();
}

void prepare(cuda_thread& thread) {
    memset(thread.stack, 0x5c, 16);  // overwritten: the stack was too small
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(thread.stack + stack_size) - 1;
    top[0] = nullptr;  // the return address of a function that never returns, 8 below a multiple of 16
    *--top = reinterpret_cast<void*>(fiber_main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    thread.stack_pointer = top;
#else
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack;
    thread.context.uc_stack.ss_size = stack_size;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, fiber_main, 0);
#endif
}

void run(cuda_thread& thread) {
    self = &thread;
    emulation_here = &thread.position;
    thread.now = state::ready;
#ifdef GL_FIBER_ANNOTATIONS
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, thread.stack, stack_size);
#endif
#if defined(__x86_64__)
    emulation_switch(&scheduler_pointer, thread.stack_pointer);
#else
    swapcontext(&scheduler_context, &thread.context);
#endif
#ifdef GL_FIBER_ANNOTATIONS
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
    for (int i = 0; i < 16; ++i)
        if (thread.stack[i] != 0x5c && !failed) {
            failed = true;
            snprintf(failure, sizeof failure, "a thread's stack overflowed (%zu bytes)", stack_size);
        }
}
#endif

[[noreturn]] void fail(const char* format, ...) {
    char text[800];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    const emulation_position& p = self->position;
    char whole[1024];
    snprintf(whole, sizeof whole, "%s (block %u,%u,%u thread %u,%u,%u)", text, p.block.x, p.block.y, p.block.z, p.thread.x,
             p.thread.y, p.thread.z);
#ifdef GL_EMULATION_THREADS
    fprintf(stderr, "emulation: %s\n", whole);
    fflush(stderr);
    _Exit(3);
#else
    memcpy(failure, whole, sizeof failure);
    failed = true;
    self->now = state::done;
    to_scheduler();
    abort();
#endif
}

// The calling thread arrives: all must come from the same line.
void arrive(meeting& place, int line, const char* what) {
    if (++place.arrived == 1) place.line = line;
    if (place.line != line) fail("threads meet at two different %s (lines %d and %d)", what, place.line, line);
}

}  // namespace

GL_EMULATION_LOCAL const emulation_position* emulation_here;

extern "C" {

void emulation_fail(const char* what) { fail("%s", what); }

#ifdef GL_EMULATION_THREADS

static void meet_counted(meeting& place, unsigned expected, int line, const char* what) {
    std::unique_lock<std::mutex> hold(place.mutex);
    arrive(place, line, what);
    if (place.arrived == expected) {
        place.arrived = 0;
        ++place.generation;
        place.changed.notify_all();
        return;
    }
    const unsigned mine = place.generation;
    if (!place.changed.wait_for(hold, std::chrono::seconds(20), [&] { return place.generation != mine; }))
        fail("threads wait for ever at line %d", line);
}

void emulation_spin(void) {
    static thread_local unsigned long long spins = 0;
    if (++spins > 20000000ull) fail("a thread spins for ever");
    std::this_thread::yield();
}

#else

static void meet_counted(meeting& place, unsigned expected, int line, const char* what) {
    arrive(place, line, what);
    if (place.arrived == expected) {
        place.arrived = 0;
        ++place.generation;
        return;
    }
    self->now = state::waiting;
    self->waits_for = &place.generation;
    self->old_value = place.generation;
    to_scheduler();
}

void emulation_spin(void) {
    self->now = state::spinning;
    to_scheduler();
}

#endif

void emulation_syncthreads(int line) { meet_counted(self->block->barrier, block_threads(), line, "__syncthreads"); }

const unsigned long long* emulation_warp_meet(unsigned mask, unsigned long long value, int line) {
    const unsigned lane = self->number & 31u;
    const unsigned first = self->number & ~31u;
    const unsigned present = block_threads() - first >= 32u ? 0xffffffffu : (1u << (block_threads() - first)) - 1u;
    if (!(mask >> lane & 1u)) fail("a lane calls a warp operation (line %d) whose mask leaves it out", line);
    if (mask & ~present) fail("a warp operation (line %d) names lanes that the block does not have", line);
    warp_group& place = self->block->warps[self->number / 32u].group(mask);
    unsigned slot;
    {
#ifdef GL_EMULATION_THREADS
        std::lock_guard<std::mutex> hold(place.mutex);
#endif
        slot = place.generation & 1u;
        place.values[slot][lane] = value;
    }
    meet_counted(place, static_cast<unsigned>(__builtin_popcount(mask)), line, "warp operations");
    return place.values[slot];
}

void* emulation_static_shared(const void* tag, size_t size) {
    block_state& block = *self->block;
    for (auto& variable : block.statics) {
        const void* known = __atomic_load_n(&variable.tag, __ATOMIC_RELAXED);
        if (known == tag) return __atomic_load_n(&variable.memory, __ATOMIC_RELAXED);
        if (known != nullptr) continue;
#ifdef GL_EMULATION_THREADS
        std::unique_lock<std::mutex> hold(block.mutex);
        known = __atomic_load_n(&variable.tag, __ATOMIC_RELAXED);
        if (known == tag) return __atomic_load_n(&variable.memory, __ATOMIC_RELAXED);
        if (known != nullptr) continue;
#endif
        block.shared_used += size;
        if (block.shared_used > request->shared_limit)
            fail("the block needs %zu bytes of shared memory, more than %zu", block.shared_used, request->shared_limit);
#ifdef GL_EMULATION_THREADS
        void* memory = block.arena + block.arena_used;
        block.arena_used += (size + 15) / 16 * 16;
#else
        void* memory = malloc(size);
#endif
        poison(memory, size);
        variable.size = size;
        __atomic_store_n(&variable.memory, memory, __ATOMIC_RELAXED);
        __atomic_store_n(&variable.tag, tag, __ATOMIC_RELAXED);
        return memory;
    }
    fail("a kernel has more than %d shared variables", largest_static_count);
}

void* emulation_dynamic_shared(void) { return self->block->dynamic; }
unsigned emulation_cluster_rank(void) { return self->block->rank; }

void emulation_cluster_barrier(void) {
    meet_counted(self->block->cluster->barrier, block_threads() * request->cluster, 1, "cluster barriers");
}

void* emulation_cluster_shared(void* mine, unsigned rank) {
    cluster_state& cluster = *self->block->cluster;
    if (rank >= cluster.blocks.size()) fail("rank %u is not in the cluster", rank);
    block_state& other = cluster.blocks[rank];
    if (other.ended) fail("the block whose shared memory is read has ended");
    auto* address = static_cast<unsigned char*>(mine);
    if (request->shared && address >= self->block->dynamic && address < self->block->dynamic + request->shared)
        return other.dynamic + (address - self->block->dynamic);
    for (auto& variable : self->block->statics) {
        auto* start = static_cast<unsigned char*>(variable.memory);
        if (start == nullptr || address < start || address >= start + variable.size) continue;
        block_state* own = self->block;
        self->block = &other;  // the other block may not have reached its declaration yet
        void* theirs = emulation_static_shared(variable.tag, variable.size);
        self->block = own;
        return static_cast<unsigned char*>(theirs) + (address - start);
    }
    fail("the address is not in this block's shared memory");
}
}

// ---- launching -----------------------------------------------------------------------------------------------------

namespace {

struct launch_state {
    std::mt19937 random{1};
    std::vector<uint64_t> clusters;  // first block of each, in the order they start
    size_t next = 0;
    std::deque<cluster_state> alive;
    std::vector<cuda_thread*> order;
};

uint3 block_index(uint64_t number) {
    const unsigned x = request->grid[0], y = request->grid[1];
    return {static_cast<unsigned>(number % x), static_cast<unsigned>(number / x % y), static_cast<unsigned>(number / x / y)};
}

void start_block(block_state& block, cluster_state& cluster, uint64_t number, unsigned rank) {
    block.index = block_index(number);
    block.rank = rank;
    block.cluster = &cluster;
    block.threads_left = block_threads();
    block.warps.resize((block_threads() + 31) / 32);
    block.shared_used = request->shared;
    block.dynamic = static_cast<unsigned char*>(malloc(request->shared));  // exact: a sanitizer sees the first byte beyond
    poison(block.dynamic, request->shared);
#ifdef GL_EMULATION_THREADS
    block.arena = static_cast<unsigned char*>(malloc(request->shared_limit + 16 * largest_static_count));
#endif
}

cuda_thread make_thread(block_state& block, unsigned number) {
    cuda_thread thread;
    const unsigned x = request->block[0], y = request->block[1];
    thread.position.thread = {number % x, number / x % y, number / x / y};
    thread.position.block = block.index;
    thread.position.block_size = {x, y, request->block[2]};
    thread.position.grid_size = {request->grid[0], request->grid[1], request->grid[2]};
    thread.block = &block;
    thread.number = number;
    return thread;
}

void arrange(launch_state& launch, std::vector<uint64_t>& items) {
    if (request->order == 1) std::reverse(items.begin(), items.end());
    if (request->order == 2) std::shuffle(items.begin(), items.end(), launch.random);
}

void start_cluster(launch_state& launch, std::deque<cuda_thread>& threads) {
    launch.alive.emplace_back();
    cluster_state& cluster = launch.alive.back();
    const uint64_t first = launch.clusters[launch.next++];
    cluster.blocks.resize(request->cluster);
    cluster.blocks_left = request->cluster;
    for (unsigned rank = 0; rank < request->cluster; ++rank) {
        start_block(cluster.blocks[rank], cluster, first + rank, rank);
        for (unsigned number = 0; number < block_threads(); ++number)
            threads.push_back(make_thread(cluster.blocks[rank], number));
    }
}

#ifdef GL_EMULATION_THREADS

void run_all(launch_state& launch) {
    while (launch.next < launch.clusters.size()) {
        std::deque<cuda_thread> threads;
        for (unsigned alive = 0; alive < request->resident && launch.next < launch.clusters.size(); alive += request->cluster)
            start_cluster(launch, threads);
        std::vector<std::thread> running;
        for (auto& thread : threads)
            running.emplace_back([&thread] {
                self = &thread;
                emulation_here = &thread.position;
                emulation_entry(request->arguments);
            });
        for (auto& thread : running) thread.join();
        launch.alive.clear();
    }
}

#else

struct stack_slab {
    unsigned char* memory = nullptr;
    size_t count = 0;
    std::vector<unsigned char*> unused;
    void reserve(size_t wanted) {
        if (wanted > count) {
            release();
            void* got = mmap(nullptr, wanted * stack_size, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (got == MAP_FAILED) abort();
            memory = static_cast<unsigned char*>(got);
            count = wanted;
        }
        unused.clear();
        for (size_t i = count; i-- > 0;) unused.push_back(memory + i * stack_size);
    }
    void release() {
        if (memory) munmap(memory, count * stack_size);
        memory = nullptr;
        count = 0;
    }
};
stack_slab stacks;

void admit(launch_state& launch, std::deque<cuda_thread>& threads, unsigned& alive) {
    if (alive > 0 || launch.next == launch.clusters.size()) return;  // blocks start in waves, and memory ends with its wave
    while (alive + request->cluster <= std::max(request->resident, request->cluster) && launch.next < launch.clusters.size()) {
        const size_t before = threads.size();
        start_cluster(launch, threads);
        alive += request->cluster;
        for (size_t i = before; i < threads.size(); ++i) {
            threads[i].stack = stacks.unused.back();
            stacks.unused.pop_back();
            prepare(threads[i]);
        }
    }
    launch.order.clear();
    for (auto& thread : threads)
        if (thread.now != state::done) launch.order.push_back(&thread);
    if (request->order == 1) std::reverse(launch.order.begin(), launch.order.end());
    if (request->order == 2) std::shuffle(launch.order.begin(), launch.order.end(), launch.random);
}

// A thread ended: its block, and then its cluster, may be over.
void retire(launch_state& launch, std::deque<cuda_thread>& threads, cuda_thread& thread, unsigned& alive) {
    stacks.unused.push_back(thread.stack);
    block_state& block = *thread.block;
    if (--block.threads_left != 0) return;
    block.ended = true;
    if (--block.cluster->blocks_left != 0) return;
    alive -= request->cluster;
    if (alive == 0) {  // nobody points at these any more
        launch.order.clear();
        threads.clear();
        launch.alive.clear();
    }
}

void report_stuck(const std::vector<cuda_thread*>& order, bool spinning) {
    size_t waiting = 0, spins = 0, done = 0;
    int line = 0;
    for (auto* thread : order) {
        waiting += thread->now == state::waiting;
        spins += thread->now == state::spinning;
        done += thread->now == state::done;
        if (thread->now == state::waiting && thread->block->barrier.arrived) line = thread->block->barrier.line;
    }
    failed = true;
    snprintf(failure, sizeof failure,
             "%s: %zu threads wait at a barrier or warp operation (__syncthreads of line %d), %zu spin, %zu have returned",
             spinning ? "a spin does not end" : "deadlock", waiting, line, spins, done);
}

void run_all(launch_state& launch) {
    std::deque<cuda_thread> threads;
    unsigned alive = 0;
    size_t idle = 0;
    const uint64_t blocks = launch.clusters.size() * request->cluster;
    const uint64_t most = std::min<uint64_t>(blocks, std::max(request->resident, request->cluster));
    stacks.reserve(most * block_threads());
    while (!failed && (alive > 0 || launch.next < launch.clusters.size())) {
        admit(launch, threads, alive);
        bool progress = false, spinning = false;
        const size_t count = launch.order.size();
        for (size_t i = 0; i < count && !failed; ++i) {
            cuda_thread& thread = *launch.order[i];
            if (thread.now == state::done || (thread.now == state::waiting && *thread.waits_for == thread.old_value)) continue;
            run(thread);
            if (thread.now == state::spinning) {
                spinning = true;
            } else {
                progress = true;
            }
            if (thread.now == state::done && !failed) {
                retire(launch, threads, thread, alive);
                if (alive == 0) break;
            }
        }
        idle = progress ? 0 : idle + 1;
        if (!failed && idle > (spinning ? 2000u : 0u)) report_stuck(launch.order, spinning);
    }
    if (stacks.count > 2048) stacks.release();
}

#endif

}  // namespace

extern "C" int emulation_launch(const emulation_request* wanted, char* error, size_t error_size) {
    request = wanted;
    failed = false;
    launch_state launch;
    launch.random.seed(wanted->seed);
    const uint64_t blocks = static_cast<uint64_t>(wanted->grid[0]) * wanted->grid[1] * wanted->grid[2];
    if (wanted->cluster > 1 && wanted->grid[0] % wanted->cluster != 0) {
        snprintf(error, error_size, "the grid (%u) is no multiple of the cluster (%u)", wanted->grid[0], wanted->cluster);
        return 1;
    }
    if (block_threads() > static_cast<unsigned>(emulation_largest_block)) {
        snprintf(error, error_size, "%u threads in a block, more than the kernel's %d", block_threads(), emulation_largest_block);
        return 1;
    }
    for (uint64_t first = 0; first < blocks; first += wanted->cluster) launch.clusters.push_back(first);
    arrange(launch, launch.clusters);
    run_all(launch);
    if (failed) snprintf(error, error_size, "%s", failure);
    return failed ? 1 : 0;
}
