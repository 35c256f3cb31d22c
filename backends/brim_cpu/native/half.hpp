// float16 and bfloat16 as storage: their 16 bits to float32 and back, in integer arithmetic that vectorises.
#pragma once
#include "simd.hpp"

namespace brim {

struct BFloat16 {
    static float widen(std::uint16_t x) { return bits_as<float>(u32(x) << 16); }
    static std::uint16_t narrow(float x) {
        const u32 bits = bits_as<u32>(x);
        const u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const u32 nan = ((bits >> 16) & 0x8000) | 0x7fc0;
        return std::uint16_t((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
    }
};

struct Float16 {
    static float widen(std::uint16_t x) {
        const u32 sign = u32(x & 0x8000) << 16;
        const u32 rest = u32(x & 0x7fff) << 13;
        // Exponents are offset by 127 - 15: a product with a power of two adds that, also to denormals.
        const float scaled = bits_as<float>(rest) * bits_as<float>(u32(254 - 15) << 23);
        const u32 special = rest | 0x7f800000;  // infinity and NaN keep their fraction
        return bits_as<float>(sign | ((x & 0x7c00) == 0x7c00 ? special : bits_as<u32>(scaled)));
    }
    static std::uint16_t narrow(float x) {
        const u32 bits = bits_as<u32>(x);
        const u32 sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
        // Below 2^-14: the last place of a sum with 0.5 is 2^-24, that of the denormals of float16, so it is rounded there.
        const u32 tiny = bits_as<u32>(bits_as<float>(size) + 0.5f) - 0x3f000000;
        const u32 normal = (size + 0xfff + ((size >> 13) & 1) - (u32(127 - 15) << 23)) >> 13;
        const u32 finite = size < (u32(127 - 14) << 23) ? tiny : normal;
        const u32 large = size > 0x7f800000 ? 0x7e00 | ((size >> 13) & 0x1ff) : 0x7c00;
        return std::uint16_t(sign | (size >= (u32(127 + 16) << 23) ? large : finite));
    }
};

// An element of an array of Kind, which loops read and write as float.
template <class Kind>
struct Half {
    std::uint16_t bits;
    Half() = default;
    explicit Half(float x) : bits(Kind::narrow(x)) {}
    explicit operator float() const { return Kind::widen(bits); }
};

}  // namespace brim
