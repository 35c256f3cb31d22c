// Rows by index: reading them (take, batches of samples).
//
// An array is seen as (outer, size, run): `size` entries of the indexed axis, each `run_bytes` long, one after another.
// Indices are checked before anything is read or written: where one lies outside of [-size, size), nothing is done, and
// the caller finds the smallest and the largest in found[0] and found[1].
#include "simd.hpp"
#include "team.hpp"

using namespace brim;

namespace {

constexpr i64 kPieceBytes = 64 * 1024;  // what is worth another thread
constexpr i64 kAhead = 4;               // rows that are asked for before they are copied

Range range_of(const i64* indices, i64 n) {
    i64 low = indices[0], high = indices[0];
    for (i64 i = 1; i < n; i++) {
        low = indices[i] < low ? indices[i] : low;
        high = indices[i] > high ? indices[i] : high;
    }
    return {low, high};
}

// Whether all indices lie in [-size, size); found: the smallest and the largest (0 and -1 where there are none).
bool check(i64* found, const i64* indices, i64 n, i64 size) {
    constexpr i64 kParts = 64;
    Range parts[kParts];
    const i64 step = ceil_div(n, kParts) < kGrain ? kGrain : ceil_div(n, kParts);
    parallel_ranges(n, step, [&](i64 begin, i64 end) { parts[begin / step] = range_of(indices + begin, end - begin); });
    Range all = n > 0 ? parts[0] : Range{0, -1};
    for (i64 k = 1; k < ceil_div(n, step); k++) {
        all.begin = parts[k].begin < all.begin ? parts[k].begin : all.begin;
        all.end = parts[k].end > all.end ? parts[k].end : all.end;
    }
    found[0] = all.begin, found[1] = all.end;
    return all.begin >= -size && all.end < size;
}

inline i64 from_start(i64 index, i64 size) { return index < 0 ? index + size : index; }

// Runs of a length that the compiler knows: single elements.
template <i64 kBytes>
void take_elements(char* to, const char* from, const i64* indices, i64 count, i64 size, i64) {
    for (i64 i = 0; i < count; i++)
        std::memcpy(to + i * kBytes, from + from_start(indices[i], size) * kBytes, size_t(kBytes));
}

void take_runs(char* to, const char* from, const i64* indices, i64 count, i64 size, i64 run_bytes) {
    for (i64 i = 0; i < count; i++) {
        const i64 later = i + kAhead < count ? i + kAhead : count - 1;
        __builtin_prefetch(from + from_start(indices[later], size) * run_bytes);
        std::memcpy(to + i * run_bytes, from + from_start(indices[i], size) * run_bytes, size_t(run_bytes));
    }
}

using TakeFn = void (*)(char*, const char*, const i64*, i64, i64, i64);

TakeFn take_of(i64 run_bytes) {
    switch (run_bytes) {
        case 1: return take_elements<1>;
        case 2: return take_elements<2>;
        case 4: return take_elements<4>;
        case 8: return take_elements<8>;
        case 16: return take_elements<16>;
        default: return take_runs;
    }
}

}  // namespace

// to[o, i] = from[o, indices[i]], from (outer, size, run), to (outer, count, run).
BRIM_EXPORT void brim_take(void* to, i64* found, const void* from, const i64* indices, i64 outer, i64 count, i64 size,
                           i64 run_bytes) {
    if (!check(found, indices, count, size) || outer * count * run_bytes == 0) return;
    const TakeFn take = take_of(run_bytes);
    char* d = static_cast<char*>(to);
    const char* s = static_cast<const char*>(from);
    const i64 step = ceil_div(kPieceBytes, run_bytes), pieces = ceil_div(count, step);
    parallel(outer * pieces, [=](i64 which) {
        const i64 o = which / pieces;
        const Range r = piece_of(count, step, which % pieces);
        take(d + (o * count + r.begin) * run_bytes, s + o * size * run_bytes, indices + r.begin, r.end - r.begin, size,
             run_bytes);
    });
}

// to[i] = from[indices[i]], rows of a data set into a batch. on_team 0: by the calling thread alone.
BRIM_EXPORT void brim_gather_rows(void* to, i64* found, const void* from, const i64* indices, i64 count, i64 row_bytes,
                                  i64 rows_in_source, i64 on_team) {
    if (on_team) return brim_take(to, found, from, indices, 1, count, rows_in_source, row_bytes);
    const Range all = count > 0 ? range_of(indices, count) : Range{0, -1};
    found[0] = all.begin, found[1] = all.end;
    if (all.begin < -rows_in_source || all.end >= rows_in_source || count * row_bytes == 0) return;
    take_of(row_bytes)(static_cast<char*>(to), static_cast<const char*>(from), indices, count, rows_in_source,
                       row_bytes);
}
