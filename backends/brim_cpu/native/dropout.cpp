// Dropout from the counter stream: element i is kept where number i of the draw is at least p.
#include "philox.hpp"
#include "rows.hpp"
#include "team.hpp"

using namespace brim;

namespace {

// Between one batch of words and the next the processor's own look-ahead forgets what was read.
constexpr i64 kAheadBytes = 4096;

// out = scale x where the word is at least `least`, else 0
template <class T>
void write_kept(T* out, const T* x, const u32* words, u32 least, T scale, i64 n) {
    BRIM_INDEPENDENT
    for (i64 i = 0; i < n; i++) {
        const T scaled = x[i] * scale;
        out[i] = words[i] < least ? T(0) : scaled;
    }
}

template <class T>
void dropout(T* out, const T* x, i64 n, i64 seed, i64 counter, double p) {
    // A number is (word >> 8) / 2^24: less than p where the word is less than 2^8 ceil(2^24 p), p rounded to float32.
    const u64 limit = u64(std::ceil(double(float(p)) * 0x1p24)) << 8;
    const bool nothing_kept = limit > 0xffffffff;
    const u32 least = u32(limit);
    const T scale = T(p < 1.0 ? 1.0 / (1.0 - p) : 0.0);
    const bool streamed = is_streamed<T>(n, kGrain) && reinterpret_cast<std::uintptr_t>(out) % 64 == 0;
    parallel_ranges(n, kGrain, [=](i64 begin, i64 end) {
        u32 words[kWordsAtOnce];
        T block[kWordsAtOnce];
        if (nothing_kept) return std::memset(out + begin, 0, size_t(end - begin) * sizeof(T)), void();
        for (i64 at = begin; at < end; at += kWordsAtOnce) {
            const i64 count = end - at < kWordsAtOnce ? end - at : kWordsAtOnce;
            draw_words(words, u64(seed), u64(counter), at, count);
            if (streamed) prefetch(x + at, count * i64(sizeof(T)), kAheadBytes);
            write_kept(streamed ? block : out + at, x + at, words, least, scale, count);
            if (streamed) stream_copy(out + at, block, count * i64(sizeof(T)));
        }
        if (streamed) stream_done();
    });
}

}  // namespace

BRIM_EXPORT void brim_dropout_f32(float* out, const float* x, i64 n, i64 seed, i64 counter, double p) {
    dropout(out, x, n, seed, counter, p);
}

BRIM_EXPORT void brim_dropout_f64(double* out, const double* x, i64 n, i64 seed, i64 counter, double p) {
    dropout(out, x, n, seed, counter, p);
}
