// What every kernel file includes: the export macro, integer names, and how a range is cut into pieces.
#pragma once
#include <cstddef>
#include <cstdint>

// A function that Python calls. C linkage, no exceptions, no return value: results go through pointers.
#define BRIM_EXPORT extern "C" __attribute__((visibility("default")))

namespace brim {

using i64 = std::int64_t;
using u64 = std::uint64_t;
using i32 = std::int32_t;
using u32 = std::uint32_t;

// Work below this many elements is not worth waking another thread for.
constexpr i64 kGrain = 16 * 1024;

struct Range {
    i64 begin, end;
};

// For a function that finds its inputs wrong, on the thread that called it: no call bound after it is made (calls.cpp).
void stop_calls();

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// Piece number `which` of [0, n) cut into pieces of `step`.
inline Range piece_of(i64 n, i64 step, i64 which) {
    const i64 begin = which * step;
    return {begin, begin + step < n ? begin + step : n};
}

}  // namespace brim
