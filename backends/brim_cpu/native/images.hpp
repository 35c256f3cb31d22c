// Vectors of floats, and images: turned between the two orders in memory, and cut out with zeros around them.
#pragma once
#include <algorithm>
#include <cstring>

#include "turn.hpp"

namespace brim {

// As many floats as one register holds.
constexpr int kLanes = kVectorBytes / 4;

typedef float Floats __attribute__((vector_size(kLanes * 4)));

inline Floats load(const float* from) {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

inline Floats splat(float x) {
#if defined(__AVX512F__)
    return Floats(_mm512_set1_ps(x));
#elif defined(__AVX__)
    return Floats(_mm256_set1_ps(x));
#else
    return Floats{x, x, x, x};
#endif
}

// a * b + c, in one rounding where fma_ has one.
inline Floats fma_(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return Floats(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
    return Floats(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif defined(__aarch64__)
    return Floats(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
    return a * b + c;
#endif
}

// Stores the first `count` lanes.
inline void store_part(float* to, Floats v, i64 count) { std::memcpy(to, &v, size_t(count) * 4); }

// to[c][r] = from[r][c], rows by columns.
inline void turn(float* to, i64 to_step, const float* from, i64 from_step, i64 rows, i64 columns) {
    const i64 least = std::min(rows, columns);
    u32* const bits = reinterpret_cast<u32*>(to);
    const u32* const source = reinterpret_cast<const u32*>(from);
#if defined(__AVX512F__)
    if (least >= 16) return Square<u32, 16>::turn_all(bits, to_step, source, from_step, rows, columns);
#endif
#if defined(__AVX__)
    if (least >= 8) return Square<u32, 8>::turn_all(bits, to_step, source, from_step, rows, columns);
#endif
    if (least >= 4) return Square<u32, 4>::turn_all(bits, to_step, source, from_step, rows, columns);
    for (i64 c = 0; c < columns; c++)
        for (i64 r = 0; r < rows; r++) to[c * to_step + r] = from[r * from_step + c];
}

// A few floats; inline, because the C library's function costs more than the copy.
inline void copy_floats(float* to, const float* from, i64 count) {
    i64 i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    for (; i < count; i++) to[i] = from[i];
}

// Images in memory: row-major (N, C, H, W), or dense with channels side by side.
struct Images {
    i64 C, H, W;
    bool last;

    const float* at(const float* base, i64 n) const { return base + n * C * H * W; }
    float* at(float* base, i64 n) const { return base + n * C * H * W; }
};

// A window of an image, rows [y, y + h), columns [x, x + w), channels [c, c + many), with channels side by side
// (`step` floats from pixel to pixel); zeros outside the image.
inline void cut_out(float* to, i64 step, const float* image, const Images& of, i64 y, i64 h, i64 x, i64 w, i64 c,
                    i64 many) {
    const i64 first = std::min(std::max<i64>(0, -x), w), end = std::max(first, std::min(w, of.W - x));
    const auto clear = [&](float* pixel, i64 count) {
        if (step == many)
            std::memset(pixel, 0, size_t(count * step) * 4);
        else
            for (i64 i = 0; i < count; i++) std::memset(pixel + i * step, 0, size_t(many) * 4);
    };
    if (!of.last && x == 0 && w == of.W && y >= 0 && y + h <= of.H)  // its rows follow each other
        return turn(to, step, image + (c * of.H + y) * of.W, of.H * of.W, many, h * w);
    for (i64 row = 0; row < h; row++, to += w * step) {
        if (y + row < 0 || y + row >= of.H) {
            clear(to, w);
            continue;
        }
        clear(to, first);
        clear(to + end * step, w - end);
        if (first == end) continue;
        const i64 at = (y + row) * of.W + x + first;
        float* into = to + first * step;
        if (!of.last) {
            turn(into, step, image + c * of.H * of.W + at, of.H * of.W, many, end - first);
        } else if (many == of.C && step == many) {
            std::memcpy(into, image + at * of.C, size_t((end - first) * many) * 4);
        } else {
            for (i64 i = 0; i < end - first; i++) copy_floats(into + i * step, image + (at + i) * of.C + c, many);
        }
    }
}

// Rows [y, y + h) of an image from pixels with channels side by side.
inline void put_rows(float* image, const Images& of, i64 y, i64 h, const float* from) {
    if (of.last)
        std::memcpy(image + y * of.W * of.C, from, size_t(h * of.W * of.C) * 4);
    else
        turn(image + y * of.W, of.H * of.W, from, of.C, h * of.W, of.C);
}

}  // namespace brim
