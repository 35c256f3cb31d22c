// Small matrix products on a warp's tensor cores, their operands in shared memory, and copies that arrive there later.
//
// A product adds a 16 x 32-byte matrix times a 32-byte x 8 matrix to 16 x 8 float32: 32 bytes are 16 float16 or bfloat16
// numbers, or 8 float32 ones, which are rounded to TF32. All 32 lanes of a warp take part. Lane l holds of the left
// matrix the words (32 bits) t = l % 4 and t + 4 of the rows g = l / 4 and g + 8; of the right matrix the words t and
// t + 4 of column g; of the result the columns 2t and 2t + 1 of rows g and g + 8. From compute capability 8.0 on.
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 / mma.m16n8k8", "ldmatrix", "cp.async".
//
// Tiles are rows of whole 32 bytes, PITCH bytes from row to row: 16 more than the row has, so that eight neighbouring
// rows of 16 bytes fall on all 32 banks.

#ifdef BRIM_EMULATION
#define WARP_PRODUCT(X, sums, a, b0, b1) emulation::warp_product<X>(EMULATION_SITE, sums, a, b0, b1)
#define LOAD_MATRICES(turned, to, row) emulation::load_matrices<turned>(EMULATION_SITE, to, row)
BRIM_FN void copy_later(void* to, const void* from, int bytes) { emulation::copy_later(to, from, bytes); }
BRIM_FN void close_copies() { emulation::close_copies(); }
template <int OPEN> BRIM_FN void await_copies() { emulation::await_copies(OPEN); }
BRIM_FN float power_of_two(float x) { return exp2f(x); }
BRIM_FN u32 rounded_tf32(float x) {  // to nearest, ties away from 0; NaN stays NaN
    const u32 bits = (u32)__float_as_int(x);
    return x != x ? bits & ~0x1fffu | 0x400000u : (bits + 0x1000u) & ~0x1fffu;
}
template <class X> BRIM_FN u32 two_numbers(float low, float high) {
    return (u32)cast<X>(low).bits | (u32)cast<X>(high).bits << 16;
}
#else
BRIM_FN u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

#define BRIM_MMA(shape, type)                                                 \
    asm("mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 "       \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"     \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])          \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <class X> BRIM_FN void warp_product(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (same<X, f16>) BRIM_MMA("m16n8k16", "f16");
    else if constexpr (same<X, bf16>) BRIM_MMA("m16n8k16", "bf16");
    else BRIM_MMA("m16n8k8", "tf32");
}
#define WARP_PRODUCT(X, sums, a, b0, b1) warp_product<X>(sums, a, b0, b1)

template <bool TURNED> BRIM_FN void load_matrices(u32 (&to)[4], const void* row) {
    if constexpr (TURNED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}
#define LOAD_MATRICES(turned, to, row) load_matrices<turned>(to, row)

// 16 bytes of shared memory: the first `bytes` of them from global memory, the rest zeros.
BRIM_FN void copy_later(void* to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes) : "memory");
}
BRIM_FN void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's copies, but for those of the last OPEN groups that were closed.
template <int OPEN> BRIM_FN void await_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(OPEN) : "memory"); }

BRIM_FN float power_of_two(float x) {  // within 2 units of the last place; 0 below 2^-126
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
BRIM_FN u32 rounded_tf32(float x) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}
template <class X> BRIM_FN u32 two_numbers(float low, float high) {
    u32 y;
    if constexpr (same<X, f16>) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
#endif

template <class X> constexpr int PER_PRODUCT = 32 / (int)sizeof(X);  // numbers of a row of the left matrix

template <class X> BRIM_FN void for_tensor_cores(u32 (&words)[4]) {
    if constexpr (same<X, float>) {
#pragma unroll
        for (int n = 0; n < 4; ++n) words[n] = rounded_tf32(__int_as_float((int)words[n]));
    }
}

// The left matrix: 16 rows of a tile, 32 bytes from byte `at` on.
template <class X, int PITCH> BRIM_FN void load_left(u32 (&a)[4], const unsigned char* tile, int row, int at) {
    const int lane = (int)threadIdx.x % 32;
    LOAD_MATRICES(false, a, tile + (row + lane % 16) * PITCH + at + lane / 16 * 16);
    for_tensor_cores<X>(a);
}

// Two right matrices whose 16 columns are rows of a tile: words 0 and 1 of the first eight, 2 and 3 of the others.
template <class X, int PITCH> BRIM_FN void load_columns(u32 (&b)[4], const unsigned char* tile, int row, int at) {
    const int lane = (int)threadIdx.x % 32;
    LOAD_MATRICES(false, b, tile + (row + lane % 8 + lane / 16 * 8) * PITCH + at + lane / 8 % 2 * 16);
    for_tensor_cores<X>(b);
}

// Two right matrices whose rows are rows of a tile, from column `column` on; for a left matrix made by `as_left`.
template <class X, int PITCH> BRIM_FN void load_across(u32 (&b)[4], const unsigned char* tile, int row, int column) {
    const int lane = (int)threadIdx.x % 32;
    if constexpr (same<X, float>) {
        const unsigned char* const at = tile + (row + lane % 4 * 2) * PITCH + (column + lane / 4) * 4;
#pragma unroll
        for (int n = 0; n < 4; ++n) b[n] = rounded_tf32(*(const float*)(at + n % 2 * PITCH + n / 2 * 32));
    } else {
        LOAD_MATRICES(true, b, tile + (row + lane % 16) * PITCH + (column + lane / 16 * 8) * 2);
    }
}

// PER_PRODUCT<X> columns of results, from column tile `n` on, as a left matrix. Float32 results lie in other columns
// than the words of a left matrix: word t is column 2t, and word t + 4 column 2t + 1, as `load_across` has it.
template <class X, int N> BRIM_FN void as_left(u32 (&a)[4], const float (&found)[N][4], int n) {
    if constexpr (same<X, float>) {
        a[0] = rounded_tf32(found[n][0]), a[1] = rounded_tf32(found[n][2]);
        a[2] = rounded_tf32(found[n][1]), a[3] = rounded_tf32(found[n][3]);
    } else {
        a[0] = two_numbers<X>(found[n][0], found[n][1]), a[1] = two_numbers<X>(found[n][2], found[n][3]);
        a[2] = two_numbers<X>(found[n + 1][0], found[n + 1][1]), a[3] = two_numbers<X>(found[n + 1][2], found[n + 1][3]);
    }
}
