// Transposed copies of matrices in registers: to[c][r] = from[r][c], elements of 1, 2, 4 or 8 bytes.
#pragma once
#include <algorithm>
#include <cstring>

#include "simd.hpp"

namespace brim {

// A block of B by B elements T (unsigned integers), a row of it to a vector.
template <class T, int B>
struct Square {
    typedef T Row __attribute__((vector_size(B * sizeof(T))));

    // Rows a distance d apart are interleaved, for d = B/2, B/4, ... 1.
    static void turn(T* to, i64 to_step, const T* from, i64 from_step) {
        Row rows[B], next[B], low, high;
#pragma GCC unroll 16
        for (int r = 0; r < B; r++) std::memcpy(&rows[r], from + r * from_step, sizeof(Row));
        for (int i = 0; i < B; i++) {
            low[i] = T(i / 2 + (i % 2) * B);
            high[i] = T(B / 2 + i / 2 + (i % 2) * B);
        }
#pragma GCC unroll 4
        for (int level = 1; level < B; level *= 2) {
#pragma GCC unroll 8
            for (int r = 0; r < B / 2; r++) {
#if defined(__clang__)
                for (int i = 0; i < B; i++) {
                    next[2 * r][i] = rows[r + i % 2 * (B / 2)][i / 2];
                    next[2 * r + 1][i] = rows[r + i % 2 * (B / 2)][B / 2 + i / 2];
                }
#else
                next[2 * r] = __builtin_shuffle(rows[r], rows[r + B / 2], low);
                next[2 * r + 1] = __builtin_shuffle(rows[r], rows[r + B / 2], high);
#endif
            }
#pragma GCC unroll 16
            for (int r = 0; r < B; r++) rows[r] = next[r];
        }
#pragma GCC unroll 16
        for (int r = 0; r < B; r++) std::memcpy(to + r * to_step, &rows[r], sizeof(Row));
    }

    // A matrix of at least B by B: the last block of an axis overlaps the one before it.
    static void turn_all(T* to, i64 to_step, const T* from, i64 from_step, i64 rows, i64 columns) {
        for (i64 r = 0; r < rows; r += B) {
            const i64 row = std::min(r, rows - B);
            for (i64 c = 0; c < columns; c += B) {
                const i64 column = std::min(c, columns - B);
                turn(to + column * to_step + row, to_step, from + row * from_step + column, from_step);
            }
        }
    }
};

// Sides of blocks, largest first: a cache line a row where registers are that wide.
template <class T>
struct Sides;
template <>
struct Sides<std::uint8_t> {
    static constexpr int large = 16, small = 16;
};
template <>
struct Sides<std::uint16_t> {
    static constexpr int large = 8, small = 8;
};
template <>
struct Sides<u32> {
#if defined(__AVX512F__)
    static constexpr int large = 16, small = 4;
#elif defined(__AVX__)
    static constexpr int large = 8, small = 4;
#else
    static constexpr int large = 4, small = 4;
#endif
};
template <>
struct Sides<u64> {
#if defined(__AVX512F__)
    static constexpr int large = 8, small = 2;
#elif defined(__AVX__)
    static constexpr int large = 4, small = 2;
#else
    static constexpr int large = 2, small = 2;
#endif
};

// to[c * to_step + r] = from[r * from_step + c], rows by columns.
template <class T>
void turn(T* to, i64 to_step, const T* from, i64 from_step, i64 rows, i64 columns) {
    using Side = Sides<T>;
    const i64 least = std::min(rows, columns);
    if (least >= Side::large) return Square<T, Side::large>::turn_all(to, to_step, from, from_step, rows, columns);
    if (least >= Side::small) return Square<T, Side::small>::turn_all(to, to_step, from, from_step, rows, columns);
    for (i64 c = 0; c < columns; c++)
        for (i64 r = 0; r < rows; r++) to[c * to_step + r] = from[r * from_step + c];
}

}  // namespace brim
