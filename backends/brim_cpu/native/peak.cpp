// How fast the processor multiplies and adds at most: what measurements of kernels are compared with.
#include "simd.hpp"
#include "team.hpp"

namespace brim {
namespace {

typedef float Vector __attribute__((vector_size(kVectorBytes)));

// Sums that do not wait for each other: two to four units, each of which takes four or five cycles for a step. Together
// with two constants they fit in the 16 registers of AVX2 and SSE; AVX-512 and NEON have 32.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 24;
#else
constexpr int kSums = 12;
#endif
constexpr int kLanes = kVectorBytes / int(sizeof(float));

inline Vector step(Vector sum, Vector factor, Vector term) {
    Vector made;
    for (int lane = 0; lane < kLanes; lane++) made[lane] = fma_(sum[lane], factor[lane], term[lane]);
    return made;
}

}  // namespace
}  // namespace brim

using namespace brim;

// Multiplies and adds in every piece: flops[piece] = how many multiplications and additions it made; sums[piece] = what
// came of them, which would otherwise be left out.
BRIM_EXPORT void brim_peak_f32(float* sums, i64* flops, i64 pieces, i64 rounds) {
    parallel(pieces, [=](i64 piece) {
        const Vector factor = Vector{} + 0.5f, term = Vector{} + 1.0f;  // all numbers come to 2
        Vector running[kSums];
        for (int n = 0; n < kSums; n++) running[n] = Vector{} + float(n);
        for (i64 round = 0; round < rounds; round++) {
#pragma GCC unroll 32
            for (int n = 0; n < kSums; n++) running[n] = step(running[n], factor, term);
        }
        float total = 0;
        for (int n = 0; n < kSums; n++)
            for (int lane = 0; lane < kLanes; lane++) total += running[n][lane];
        sums[piece] = total;
        flops[piece] = 2 * rounds * kSums * kLanes;
    });
}
