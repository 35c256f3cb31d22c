// A warp's matrix products, its loads of matrices from shared memory, and asynchronous copies, on the CPU.
//
// Each is what the PTX ISA says of the instruction, stated for itself: no layout is shared with ``kernels/mma.cuh``.
// Copies are as late as they may be: until a thread waits for them, NaN lies where they go.
#pragma once

#include <type_traits>

struct f16;
struct bf16;

namespace emulation {

struct Operands {
    uint32_t a[4], b[2];
};
static Operands given[MAX_THREADS];
static const void* rows[MAX_THREADS];

[[noreturn]] static void refuse(const char* why) {
    snprintf(message, sizeof message, "%s, by thread %u", why, current->linear);
    siglongjmp(fault, REFUSED);
}

// Number `which` of a word: of two half-width ones, or the only TF32 one.
template <class X> static double number_in(uint32_t word, int which) {
    if constexpr (std::is_same_v<X, float>) {
        float x;
        memcpy(&x, &word, 4);
        if (word & 0x1fff) refuse("an operand of a product of float32 is not rounded to TF32");
        return x;
    } else {
        const uint16_t bits = (uint16_t)(word >> 16 * which);
        if constexpr (std::is_same_v<X, f16>) return float_of_half(bits);
        const uint32_t wide = (uint32_t)bits << 16;
        float x;
        memcpy(&x, &wide, 4);
        return x;
    }
}

// mma.sync.aligned.m16n8k16 (f16, bf16) and m16n8k8 (tf32), .row.col, float32 sums.
template <class X>
static void warp_product(const char* site, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const unsigned lane = current->linear % 32, first = current->linear - lane;
    Operands& mine = given[current->linear];
    memcpy(mine.a, a, sizeof mine.a), mine.b[0] = b0, mine.b[1] = b1;
    wait(AT_WARP, site, 0xffffffffu);
    constexpr int WORD = std::is_same_v<X, float> ? 1 : 2, K = 8 * WORD;
    for (int i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + (i & 1);
        double sum = sums[i];
        for (int k = 0; k < K; ++k) {
            // A: its words are a0 (row g, k word t), a1 (g + 8, t), a2 (g, t + 4), a3 (g + 8, t + 4); B: b0, b1 alike.
            const int word = k / WORD;
            const Operands& left = given[first + row % 8 * 4 + word % 4];
            const Operands& right = given[first + column * 4 + word % 4];
            sum += number_in<X>(left.a[row / 8 + word / 4 * 2], k % WORD) * number_in<X>(right.b[word / 4], k % WORD);
        }
        sums[i] = (float)sum;
    }
    wait(AT_WARP, site, 0xffffffffu);
}

// ldmatrix.sync.aligned.m8n8.x4(.trans).shared.b16: lane 8n + r says where row r of matrix n starts.
template <bool TURNED> static void load_matrices(const char* site, uint32_t (&to)[4], const void* row) {
    const unsigned lane = current->linear % 32, first = current->linear - lane;
    if ((uintptr_t)row % 16) refuse("ldmatrix reads rows that start at multiples of 16 bytes");
    if ((const unsigned char*)row < shared || (const unsigned char*)row + 16 > shared_end)
        refuse("ldmatrix reads shared memory only");
    rows[current->linear] = row;
    wait(AT_WARP, site, 0xffffffffu);
    for (int n = 0; n < 4; ++n)
        if constexpr (TURNED) {
            uint16_t low, high;
            memcpy(&low, (const char*)rows[first + 8 * n + lane % 4 * 2] + lane / 4 * 2, 2);
            memcpy(&high, (const char*)rows[first + 8 * n + lane % 4 * 2 + 1] + lane / 4 * 2, 2);
            to[n] = low | (uint32_t)high << 16;
        } else {
            memcpy(&to[n], (const char*)rows[first + 8 * n + lane / 4] + lane % 4 * 4, 4);
        }
    wait(AT_WARP, site, 0xffffffffu);
}

// ------------------------------------------------------------------------------------------------------------ copies

struct Copy {
    unsigned char* to;
    const void* from;
    int bytes;
    unsigned group;
};
struct Copies {
    Copy open[512];
    unsigned count, group;
};
static Copies copies[MAX_THREADS];

static void copy_later(void* to, const void* from, int bytes) {
    Copies& mine = copies[current->linear];
    if ((uintptr_t)to % 16 || (bytes > 0 && (uintptr_t)from % 16)) refuse("cp.async copies between multiples of 16 bytes");
    if ((unsigned char*)to < shared || (unsigned char*)to + 16 > shared_end) refuse("cp.async writes to shared memory");
    if (bytes < 0 || bytes > 16) refuse("cp.async copies 0 to 16 bytes");
    if (mine.count == sizeof mine.open / sizeof *mine.open) refuse("more copies are under way than are emulated");
    memset(to, 0xff, 16);
    mine.open[mine.count++] = {(unsigned char*)to, from, bytes, mine.group};
}
static void close_copies() { ++copies[current->linear].group; }
static void await_copies(unsigned open) {
    Copies& mine = copies[current->linear];
    unsigned left = 0;
    for (unsigned n = 0; n < mine.count; ++n) {
        const Copy& one = mine.open[n];
        if (one.group + open < mine.group) {
            memset(one.to, 0, 16);
            if (one.bytes) memcpy(one.to, one.from, (size_t)one.bytes);
        } else {
            mine.open[left++] = one;
        }
    }
    mine.count = left;
}
static void forget_copies() {
    for (unsigned i = 0; i < count; ++i) copies[i].count = copies[i].group = 0;
}

}  // namespace emulation
