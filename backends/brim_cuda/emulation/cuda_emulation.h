// CUDA C++ kernels on the CPU, for tests: blocks one after another, in each block one fiber per thread.
//
// A thread runs until it ends or waits at a barrier; threads that never wait share one stack. Caught, with a message:
// barriers and warp primitives that only some threads reach or that they reach at different places, access outside of
// guarded memory or at an address that is no multiple of its size (compiled with -fsanitize=alignment, trapping), integer
// division by zero. Shared memory is dynamic only (DYN_SHARED), filled with NaN before each
// block and ends at a guard page; the order of threads and blocks can be turned round or shuffled, so that a missing
// barrier shows. Tensor cores and asynchronous copies: tensor_cores.h. Not covered: cooperative groups, the memory
// model, speed.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <utility>

#define BRIM_EMULATION 1
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static_shared_memory_cannot_be_poisoned_use_DYN_SHARED

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
};

namespace emulation {

enum State : unsigned char { READY, AT_WARP, AT_BLOCK, DONE };

struct Thread {
    uint3 index;
    unsigned linear, mask;
    State state;
    const char* site;  // file and line of the barrier it waits at
    jmp_buf context;
};

constexpr size_t STACK_BYTES = 256 * 1024, SHARED_BYTES = 227 * 1024;
constexpr unsigned MAX_THREADS = 1024;

static dim3 grid, block;
static uint3 block_index;
static Thread threads[MAX_THREADS];
static Thread* current;
static unsigned order[MAX_THREADS], count, started;
static jmp_buf scheduler;
static sigjmp_buf fault;
static volatile sig_atomic_t running;
static char *stacks[MAX_THREADS + 1], *all_stacks[MAX_THREADS + 1];  // free ones, and all
static unsigned free_count, stack_count;
static uint64_t lanes[MAX_THREADS / 32][32];
static unsigned char* shared_end;
static unsigned char* shared;
static char message[256];
static void* fault_address;
static void (*entry)(void*);
static void* entry_argument;

static unsigned char* make_shared() {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), bytes = (SHARED_BYTES + page - 1) / page * page;
    void* made = mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED) abort();
    mprotect((char*)made + bytes, page, PROT_NONE);
    return (unsigned char*)made + bytes;
}

static char* worker_stack;

static void worker() {
    char* const mine = worker_stack;
    while (started < count) {
        current = &threads[order[started++]];
        entry(entry_argument);
        current->state = DONE;
    }
    stacks[free_count++] = mine;
    _longjmp(scheduler, 1);
}

static void start_worker() {
    if (free_count == 0) {
        void* made = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (made == MAP_FAILED) abort();
        stacks[free_count++] = all_stacks[stack_count++] = (char*)made;
    }
    static ucontext_t context;
    getcontext(&context);
    worker_stack = stacks[--free_count];
    context.uc_stack.ss_sp = worker_stack, context.uc_stack.ss_size = STACK_BYTES, context.uc_link = nullptr;
    makecontext(&context, worker, 0);
    if (_setjmp(scheduler) == 0) setcontext(&context);
}

static void wait(State state, const char* site, unsigned mask) {
    Thread* self = current;
    self->state = state, self->site = site, self->mask = mask;
    if (_setjmp(self->context) == 0) _longjmp(scheduler, 1);
}

static void resume(Thread& thread) {
    if (_setjmp(scheduler) == 0) {
        current = &thread, thread.state = READY;
        _longjmp(thread.context, 1);
    }
}

static const char* place(const Thread& thread) {
    return thread.state == DONE ? "its end" : thread.site;
}

// Lets those threads go whose whole warp group has come; 1: some went, 0: none waits, -1: they can never meet.
static int release_warps() {
    int released = 0;
    for (unsigned first = 0; first < count; first += 32) {
        const unsigned size = count - first < 32 ? count - first : 32;
        for (unsigned lane = 0; lane < size; ++lane) {
            Thread& thread = threads[first + lane];
            if (thread.state != AT_WARP) continue;
            if (!(thread.mask >> lane & 1)) {
                snprintf(message, sizeof message, "lane %u is not in its own mask %#x at %s", lane, thread.mask, thread.site);
                return -1;
            }
            for (unsigned other = 0; other < size; ++other) {
                Thread& partner = threads[first + other];
                if (!(thread.mask >> other & 1)) continue;
                if (partner.state != AT_WARP || partner.site != thread.site || partner.mask != thread.mask) {
                    snprintf(message, sizeof message, "divergent warp: lane %u waits at %s, lane %u is at %s", lane,
                             thread.site, other, place(partner));
                    return -1;
                }
            }
            for (unsigned other = 0; other < size; ++other)
                if (thread.mask >> other & 1) threads[first + other].state = READY;
            released = 1;
        }
    }
    return released;
}

static int release_block() {
    const Thread* waiting = nullptr;
    for (unsigned i = 0; i < count; ++i)
        if (threads[i].state == AT_BLOCK) waiting = &threads[i];
    if (waiting == nullptr) return 0;
    for (unsigned i = 0; i < count; ++i)
        if (threads[i].state != AT_BLOCK || threads[i].site != waiting->site) {
            snprintf(message, sizeof message, "__syncthreads at %s is not reached by every thread: thread %u is at %s",
                     waiting->site, i, place(threads[i]));
            return -1;
        }
    for (unsigned i = 0; i < count; ++i) threads[i].state = READY;
    return 1;
}

static void arrange(unsigned how) {  // 0: forward, 1: reverse, else a seed
    static unsigned seed;
    if (how == 1)
        for (unsigned i = 0; i < count / 2; ++i) std::swap(order[i], order[count - 1 - i]);
    if (how > 1) {
        seed = seed * 1664525u + how;
        for (unsigned i = count; i > 1; --i) {
            seed = seed * 1664525u + 1013904223u;
            std::swap(order[i - 1], order[(seed >> 8) % i]);
        }
    }
}

static void clear_votes();
static void forget_copies();

static bool run_block(unsigned how, size_t shared_bytes) {
    for (unsigned i = 0; i < count; ++i) {
        threads[i].index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
        threads[i].linear = i, threads[i].state = READY, order[i] = i;
    }
    shared = shared_end - (shared_bytes + 15) / 16 * 16;
    memset(shared, 0xff, (size_t)(shared_end - shared));
    clear_votes();
    forget_copies();
    arrange(how);
    for (started = 0; started < count;) start_worker();
    for (;;) {
        const int warps = release_warps();
        if (warps < 0) return false;
        if (warps == 0) {
            const int all = release_block();
            if (all <= 0) return all == 0;
        }
        arrange(how);
        for (unsigned i = 0; i < count; ++i)
            if (threads[order[i]].state == READY) resume(threads[order[i]]);
    }
}

static void on_fault(int signal_number, siginfo_t* info, void*) {
    if (!running) {  // not ours: happen again, without this handler
        signal(signal_number, SIG_DFL);
        return;
    }
    fault_address = info->si_addr;
    siglongjmp(fault, signal_number);
}

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL}, REFUSED = -1;  // REFUSED: no signal, the message is there

// 0: done; 1: see message; 2: see message and fault_address.
static int launch(void (*kernel)(void*), void* argument, const unsigned* sizes, unsigned how, size_t shared_bytes) {
    static stack_t own = {}, before = {};
    static struct sigaction action = {}, old[4];
    static int result;
    grid = {sizes[0], sizes[1], sizes[2]}, block = {sizes[3], sizes[4], sizes[5]};
    count = block.x * block.y * block.z, entry = kernel, entry_argument = argument;
    if (count == 0 || count > MAX_THREADS || shared_bytes > SHARED_BYTES) {
        snprintf(message, sizeof message, "a block has 1 to %u threads and at most %zu bytes of shared memory", MAX_THREADS,
                 SHARED_BYTES);
        return 1;
    }
    if (shared_end == nullptr) shared_end = make_shared();
    if (own.ss_sp == nullptr) own.ss_size = 64 * 1024, own.ss_sp = malloc(own.ss_size);
    sigaltstack(&own, &before);
    action.sa_sigaction = on_fault, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 4; ++i) sigaction(SIGNALS[i], &action, &old[i]);
    const int number = sigsetjmp(fault, 1);
    if (number == 0) {
        running = 1, result = 0;
        static uint64_t blocks, n;
        blocks = (uint64_t)grid.x * grid.y * grid.z;
        for (n = 0; n < blocks && result == 0; ++n) {
            const uint64_t at = how == 1 ? blocks - 1 - n : n;
            block_index = {(unsigned)(at % grid.x), (unsigned)(at / grid.x % grid.y), (unsigned)(at / grid.x / grid.y)};
            if (!run_block(how, shared_bytes)) result = 1;
        }
    } else if (number == REFUSED) {
        result = 1;
    } else {
        snprintf(message, sizeof message, "%s by thread (%u, %u, %u) of block (%u, %u, %u)",
                 number == SIGFPE   ? "integer division by zero"
                 : number == SIGILL ? "misaligned access"
                                    : "access outside of its memory",
                 current->index.x, current->index.y, current->index.z, block_index.x, block_index.y, block_index.z);
        result = number == SIGFPE || number == SIGILL ? 1 : 2;
    }
    running = 0;
    if (result != 0) memcpy(stacks, all_stacks, sizeof stacks), free_count = stack_count;
    for (int i = 0; i < 4; ++i) sigaction(SIGNALS[i], &old[i], nullptr);
    sigaltstack(&before, nullptr);
    return result;
}

template <class... A> struct Call {
    void (*kernel)(A...);
    void** arguments;
    template <size_t... I> void apply(std::index_sequence<I...>) {
        kernel(*reinterpret_cast<std::decay_t<A>*>(arguments[I])...);
    }
    static void go(void* self) { static_cast<Call*>(self)->apply(std::index_sequence_for<A...>{}); }
};
template <class... A>
static int start(void (*kernel)(A...), void** arguments, const unsigned* sizes, unsigned how, size_t shared_bytes) {
    Call<A...> call{kernel, arguments};
    return launch(&Call<A...>::go, &call, sizes, how, shared_bytes);
}

// ------------------------------------------------------------------------------------------------ warp primitives

struct Warp {
    const char* site;
    void meet(unsigned mask = 0xffffffffu) const { wait(AT_WARP, site, mask); }
};
template <class T> static T exchange(const char* site, unsigned mask, T value, unsigned source) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    const unsigned warp = current->linear / 32, lane = current->linear % 32;
    memcpy(&lanes[warp][lane], &value, sizeof(T));
    wait(AT_WARP, site, mask);
    T found;
    memset(&found, 0xff, sizeof(T));  // a lane that takes no part has no value
    const unsigned first = warp * 32;
    if (mask >> (source & 31) & 1 && first + source < count) memcpy(&found, &lanes[warp][source & 31], sizeof(T));
    wait(AT_WARP, site, mask);
    return found;
}
template <class T> static T shuffle(const char* site, unsigned mask, T v, int source, int width = 32) {
    const int lane = (int)(current->linear % 32);
    return exchange(site, mask, v, (unsigned)(lane / width * width + (source & (width - 1))));
}
template <class T> static T shuffle_xor(const char* site, unsigned mask, T v, int bits, int width = 32) {
    const int lane = (int)(current->linear % 32), source = lane ^ bits;
    return exchange(site, mask, v, (unsigned)(source / width > lane / width ? lane : source));
}
template <class T> static T shuffle_down(const char* site, unsigned mask, T v, unsigned by, int width = 32) {
    const unsigned lane = current->linear % 32;
    return exchange(site, mask, v, lane % width + by < (unsigned)width ? lane + by : lane);
}
template <class T> static T shuffle_up(const char* site, unsigned mask, T v, unsigned by, int width = 32) {
    const unsigned lane = current->linear % 32;
    return exchange(site, mask, v, lane % width >= by ? lane - by : lane);
}
static inline unsigned ballot(const char* site, unsigned mask, bool vote) {
    const unsigned warp = current->linear / 32;
    lanes[warp][current->linear % 32] = vote;
    wait(AT_WARP, site, mask);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1 && warp * 32 + lane < count && lanes[warp][lane]) votes |= 1u << lane;
    wait(AT_WARP, site, mask);
    return votes;
}

// ---------------------------------------------------------------------------------------------- half-width floats

static inline float float_of_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                       : exponent == 0 ? ldexpf((float)fraction, -24)
                                       : ldexpf((float)(fraction | 1024), exponent - 25);
    return bits >> 15 ? -size : size;
}
static inline uint16_t half_of_double(double x) {  // to nearest, ties to even
    const uint16_t sign = signbit(x) ? 0x8000 : 0;
    const double size = fabs(x);
    if (size != size) return sign | 0x7e00;
    if (size >= 65520.0) return sign | 0x7c00;
    if (size < ldexp(1.0, -14)) return sign | (uint16_t)rint(ldexp(size, 24));
    int exponent;
    const double mantissa = frexp(size, &exponent);                             // in [0.5, 1)
    const unsigned steps = (unsigned)rint(ldexp(mantissa, 11));                 // 1024..2048
    return sign | (uint16_t)(((unsigned)(exponent + 13) << 10) + steps);  // a carry moves to the exponent
}

static int votes[3];
static unsigned vote_number[MAX_THREADS];
static inline int vote_any(const char* site, int vote) {  // three places, so that one is cleared while none uses it
    unsigned& number = vote_number[current->linear];
    const unsigned mine = number++ % 3;
    votes[(mine + 1) % 3] = 0;
    if (vote) votes[mine] = 1;
    wait(AT_BLOCK, site, 0);
    return votes[mine];
}

static void clear_votes() {
    memset(votes, 0, sizeof votes), memset(vote_number, 0, sizeof vote_number);
}

}  // namespace emulation

#include "tensor_cores.h"

// ------------------------------------------------------------------------------------------------- CUDA's own names

#define EMULATION_TEXT_(x) #x
#define EMULATION_TEXT(x) EMULATION_TEXT_(x)
#define __syncthreads_or(vote) emulation::vote_any(EMULATION_SITE, vote)
#define EMULATION_SITE __FILE__ ":" EMULATION_TEXT(__LINE__)
#define threadIdx (emulation::current->index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block)
#define gridDim (emulation::grid)
#define warpSize 32
#define DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(emulation::shared)
#define __syncthreads() emulation::wait(emulation::AT_BLOCK, EMULATION_SITE, 0)
#define __syncwarp(...) emulation::Warp{EMULATION_SITE}.meet(__VA_ARGS__)
#define __shfl_sync(...) emulation::shuffle(EMULATION_SITE, __VA_ARGS__)
#define __shfl_xor_sync(...) emulation::shuffle_xor(EMULATION_SITE, __VA_ARGS__)
#define __shfl_down_sync(...) emulation::shuffle_down(EMULATION_SITE, __VA_ARGS__)
#define __shfl_up_sync(...) emulation::shuffle_up(EMULATION_SITE, __VA_ARGS__)
#define __ballot_sync(...) emulation::ballot(EMULATION_SITE, __VA_ARGS__)

template <class T> static inline T atomicAdd(T* at, T value) { T old = *at; *at = old + value; return old; }
template <class T> static inline T atomicMax(T* at, T value) { T old = *at; if (value > old) *at = value; return old; }
template <class T> static inline T atomicMin(T* at, T value) { T old = *at; if (value < old) *at = value; return old; }
template <class T> static inline T atomicOr(T* at, T value) { T old = *at; *at = old | value; return old; }
template <class T> static inline T atomicExch(T* at, T value) { T old = *at; *at = value; return old; }
template <class T> static inline T atomicCAS(T* at, T expected, T value) { T old = *at; if (old == expected) *at = value; return old; }
template <class T> static inline T __ldg(const T* at) { return *at; }
static inline void __threadfence() {}

template <class To, class From> static inline To emulation_bits(From x) { To y; memcpy(&y, &x, sizeof y); return y; }
static inline float __int_as_float(int x) { return emulation_bits<float>(x); }
static inline int __float_as_int(float x) { return emulation_bits<int>(x); }
static inline double __longlong_as_double(long long x) { return emulation_bits<double>(x); }
static inline long long __double_as_longlong(double x) { return emulation_bits<long long>(x); }
static inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return (unsigned long long)((unsigned __int128)x * y >> 64);
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
// Compiled with -ffp-contract=off: nothing is fused.
static inline float __fadd_rn(float x, float y) { return x + y; }
static inline float __fsub_rn(float x, float y) { return x - y; }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline float __fdiv_rn(float x, float y) { return x / y; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline double __dadd_rn(double x, double y) { return x + y; }
static inline double __dsub_rn(double x, double y) { return x - y; }
static inline double __dmul_rn(double x, double y) { return x * y; }
static inline double __ddiv_rn(double x, double y) { return x / y; }
static inline double __dsqrt_rn(double x) { return sqrt(x); }

#define EMULATION_EXPORT(kernel)                                                                                  \
    extern "C" int emulated_##kernel(const unsigned* sizes, void** arguments, unsigned how, size_t shared_bytes) { \
        return emulation::start(kernel, arguments, sizes, how, shared_bytes);                                      \
    }
extern "C" const char* emulation_message() { return emulation::message; }
extern "C" void* emulation_fault_address() { return emulation::fault_address; }
