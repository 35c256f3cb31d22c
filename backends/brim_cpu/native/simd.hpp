// Small helpers for loops that the compiler vectorises.
#pragma once
#include <cmath>
#include <cstring>

#include "common.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// A loop whose iterations are independent, although the compiler cannot know it.
#if defined(__clang__)
#pragma clang diagnostic ignored "-Wpass-failed"  // it warns of a loop it does not vectorise, around a call for example
#define BRIM_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define BRIM_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace brim {

// The widest vectors that the compiler may use.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// a * b + c, in one rounding where the processor has it: never a call of the C library.
inline float fma_(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

inline double fma_(double a, double b, double c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

// The same bits read as another type of that size.
template <class To, class From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// Results of at least so many bytes are larger than what the caches keep: they are written past them.
constexpr i64 kStreamBytes = 8 * 1024 * 1024;

// Copies past the caches where the processor can; call stream_done() in the same thread before another thread reads.
inline void stream_copy(void* to, const void* from, i64 nbytes) {
#if defined(__x86_64__)
    char* d = static_cast<char*>(to);
    const char* s = static_cast<const char*>(from);
    const i64 head = std::intptr_t(-reinterpret_cast<std::intptr_t>(d)) & 63;
    if (nbytes < head + 64) {
        std::memcpy(d, s, size_t(nbytes));
        return;
    }
    std::memcpy(d, s, size_t(head));
    d += head, s += head, nbytes -= head;
    for (; nbytes >= 64; nbytes -= 64, d += 64, s += 64) {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(d), _mm512_loadu_si512(s));
#else
        for (int i = 0; i < 64; i += 16)
            _mm_stream_si128(reinterpret_cast<__m128i*>(d + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i)));
#endif
    }
    std::memcpy(d, s, size_t(nbytes));
#else
    std::memcpy(to, from, size_t(nbytes));
#endif
}

inline void stream_done() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace brim
