// The random numbers of brim.random: NumPy's Philox4x64-10, number i of a draw as a function of (seed, counter, i).
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once
#include "common.hpp"

namespace brim {

// A block of the generator: four 64-bit words, eight 32-bit ones, of which each gives a float32 number.
constexpr i64 kDrawsPerBlock = 8;

// 32-bit words `first` ... `first + n - 1` of the draw (seed, counter). Fastest for multiples of kWordsAtOnce.
constexpr i64 kWordsAtOnce = 256;
void draw_words(u32* out, u64 seed, u64 counter, i64 first, i64 n);

// A word as a number in [0, 1): its upper 24 bits.
inline float in_unit(u32 word) { return float(i32(word >> 8)) * 0x1p-24f; }

// Numbers `first` ... `first + n - 1` of the draw, float32 in [0, 1).
void uniform_f32(float* out, u64 seed, u64 counter, i64 first, i64 n);

}  // namespace brim
