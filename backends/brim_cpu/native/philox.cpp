// Philox4x64-10, many blocks at a time: the words of a draw, and uniform float32 numbers made of them.
#include "philox.hpp"

#include "simd.hpp"
#include "team.hpp"

namespace brim {
namespace {

using u128 = unsigned __int128;

constexpr int kRounds = 10;
constexpr u64 kFactor0 = 0xD2E7470EE14C6C93, kFactor2 = 0xCA5A826395121157;
constexpr u64 kStep0 = 0x9E3779B97F4A7C15, kStep1 = 0xBB67AE8584CAA73B;

// A round makes of the words (c0, c1, c2, c3)
//   c0' = high(kFactor2 c2) ^ c1 ^ key0, c1' = low(kFactor2 c2),
//   c2' = high(kFactor0 c0) ^ c3 ^ key1, c3' = low(kFactor0 c0).
// A block begins with (its number + 1, 0, counter, 0): NumPy counts before it draws. So the blocks of a draw share the
// second product of the first round and the first product of the second.
struct Draw {
    u64 key0[kRounds], key1[kRounds];
    u64 whole0, whole2, c3;  // what the second round combines its products with; c3 after it

    Draw(u64 seed, u64 counter) {
        for (int round = 0; round < kRounds; round++) key0[round] = seed + u64(round) * kStep0, key1[round] = u64(round) * kStep1;
        const u128 first = u128(counter) * kFactor2, second = u128(u64(first >> 64) ^ key0[0]) * kFactor0;
        whole0 = u64(first) ^ key0[1], whole2 = u64(second >> 64) ^ key1[1], c3 = u64(second);
    }
};

void one_block(u64 words[4], const Draw& draw, u64 block) {
    const u128 first = u128(block + 1) * kFactor0, second = u128(u64(first >> 64) ^ draw.key1[0]) * kFactor2;
    u64 c0 = u64(second >> 64) ^ draw.whole0, c1 = u64(second), c2 = u64(first) ^ draw.whole2, c3 = draw.c3;
    for (int round = 2; round < kRounds; round++) {
        const u128 p0 = u128(c0) * kFactor0, p2 = u128(c2) * kFactor2;
        c0 = u64(p2 >> 64) ^ c1 ^ draw.key0[round], c2 = u64(p0 >> 64) ^ c3 ^ draw.key1[round];
        c1 = u64(p2), c3 = u64(p0);
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

#if defined(__AVX512DQ__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header: a lane that no mask lets through
#endif

typedef u64 Words __attribute__((vector_size(64)));
constexpr int kVectors = kWordsAtOnce / kDrawsPerBlock / 8;  // so many side by side hide the latency of a product

inline Words spread(u64 value) { return Words(_mm512_set1_epi64(i64(value))); }

// The products of the lower halves of the lanes.
inline Words times(Words a, Words b) { return Words(_mm512_mul_epu32(__m512i(a), __m512i(b))); }

inline Words high_product(Words a, u64 factor) {
    const Words b0 = spread(factor), b1 = spread(factor >> 32), a1 = a >> 32;
    const Words middle = times(a1, b0) + (times(a, b0) >> 32);  // at most 2^64 - 1
    const Words rest = times(a, b1) + (middle & spread(0xffffffff));
    return times(a1, b1) + (middle >> 32) + (rest >> 32);
}

void many_blocks(u32* out, const Draw& draw, u64 block) {
    // Lanes 0, 2 and 4, 6 and 1, 3 and 5, 7 are written together.
    const Words order = {1, 5, 2, 6, 3, 7, 4, 8};
    Words c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
    for (int i = 0; i < kVectors; i++) {
        const Words number = order + spread(block + u64(8 * i)), second = high_product(number, kFactor0) ^ spread(draw.key1[0]);
        c0[i] = high_product(second, kFactor2) ^ spread(draw.whole0), c1[i] = second * kFactor2;
        c2[i] = number * kFactor0 ^ spread(draw.whole2), c3[i] = spread(draw.c3);
    }
#pragma GCC unroll 8
    for (int round = 2; round < kRounds; round++) {
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; i++) {
            const Words high0 = high_product(c0[i], kFactor0), low0 = c0[i] * kFactor0;
            const Words high2 = high_product(c2[i], kFactor2), low2 = c2[i] * kFactor2;
            c0[i] = high2 ^ c1[i] ^ spread(draw.key0[round]), c2[i] = high0 ^ c3[i] ^ spread(draw.key1[round]);
            c1[i] = low2, c3[i] = low0;
        }
    }
    const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int i = 0; i < kVectors; i++, out += 64) {
        const __m512i even01 = _mm512_unpacklo_epi64(__m512i(c0[i]), __m512i(c1[i]));
        const __m512i even23 = _mm512_unpacklo_epi64(__m512i(c2[i]), __m512i(c3[i]));
        const __m512i odd01 = _mm512_unpackhi_epi64(__m512i(c0[i]), __m512i(c1[i]));
        const __m512i odd23 = _mm512_unpackhi_epi64(__m512i(c2[i]), __m512i(c3[i]));
        _mm512_storeu_si512(out, _mm512_permutex2var_epi64(even01, front, even23));
        _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi64(even01, back, even23));
        _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi64(odd01, front, odd23));
        _mm512_storeu_si512(out + 48, _mm512_permutex2var_epi64(odd01, back, odd23));
    }
}

#else

// Processors multiply 64-bit words at about one a cycle: faster than eight or sixteen 32-bit products in a vector's place.
void many_blocks(u32* out, const Draw& draw, u64 block) {
    for (i64 at = 0; at < kWordsAtOnce; at += kDrawsPerBlock) {
        u64 words[4];
        one_block(words, draw, block + u64(at / kDrawsPerBlock));
        for (int i = 0; i < kDrawsPerBlock; i++) out[at + i] = u32(words[i / 2] >> (32 * (i % 2)));  // the low half first
    }
}

#endif

}  // namespace

void draw_words(u32* out, u64 seed, u64 counter, i64 first, i64 n) {
    const Draw draw(seed, counter);
    i64 at = 0;
    while (at < n) {
        const u64 block = u64(first + at) / kDrawsPerBlock;
        const i64 skip = (first + at) % kDrawsPerBlock;
        if (skip == 0 && n - at >= kWordsAtOnce) {
            many_blocks(out + at, draw, block);
            at += kWordsAtOnce;
            continue;
        }
        u64 words[4];
        one_block(words, draw, block);
        for (i64 i = skip; i < kDrawsPerBlock && at < n; i++, at++) out[at] = u32(words[i / 2] >> (32 * (i % 2)));
    }
}

void uniform_f32(float* out, u64 seed, u64 counter, i64 first, i64 n) {
    u32* const words = reinterpret_cast<u32*>(out);
    for (i64 at = 0; at < n; at += kWordsAtOnce) {
        const i64 count = n - at < kWordsAtOnce ? n - at : kWordsAtOnce;
        draw_words(words + at, seed, counter, first + at, count);
        for (i64 i = at; i < at + count; i++) out[i] = in_unit(words[i]);
    }
}

}  // namespace brim

// out[i] = number i of the draw (seed, counter); the counters are passed as signed words of the same bits.
BRIM_EXPORT void brim_uniform_f32(float* out, brim::i64 n, brim::i64 seed, brim::i64 counter) {
    brim::parallel_ranges(n, brim::kGrain, [=](brim::i64 begin, brim::i64 end) {
        brim::uniform_f32(out + begin, brim::u64(seed), brim::u64(counter), begin, end - begin);
    });
}
