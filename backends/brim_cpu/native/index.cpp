// Rows by index: reading them (take, batches of samples), adding to them (index_add) and writing them (put).
//
// An array is seen as (outer, size, run): `size` entries of the indexed axis, each `run_bytes` long, one after another.
// Indices are checked before anything is read or written: where one lies outside of [-size, size), nothing is done, the
// caller finds the smallest and the largest in found[0] and found[1], and no call that follows is made.
#include <algorithm>

#include "half.hpp"
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
    const bool fit = all.begin >= -size && all.end < size;
    if (!fit) stop_calls();
    return fit;
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

// ----------------------------------------------------------------------------------------------- adding and writing

// out = x, or a number in every place where x_step is 0; nothing where they are one array.
template <class T>
void start(T* out, const T* x, i64 x_step, i64 n) {
    if (out == x) return;
    const bool streamed = n * i64(sizeof(T)) >= kStreamBytes;
    parallel_ranges(n, kPieceBytes / i64(sizeof(T)), [=](i64 begin, i64 end) {
        const i64 bytes = (end - begin) * i64(sizeof(T));
        if (x_step != 0) {
            if (streamed)
                stream_copy(out + begin, x + begin, bytes);
            else
                std::memcpy(out + begin, x + begin, size_t(bytes));
        } else if (!streamed) {
            std::fill(out + begin, out + end, *x);
        } else {
            constexpr i64 kBlock = 4096 / i64(sizeof(T));
            T block[kBlock];
            std::fill(block, block + kBlock, *x);
            for (i64 at = begin; at < end; at += kBlock)
                stream_copy(out + at, block, std::min(kBlock, end - at) * i64(sizeof(T)));
        }
        if (streamed) stream_done();
    });
}

template <class T>
struct Sum {
    using Type = T;
    static void run(T* to, const T* from, i64 n) {
        BRIM_INDEPENDENT
        for (i64 j = 0; j < n; j++) to[j] = T(to[j] + from[j]);
    }
};

template <class H>
struct HalfSum {  // rounded at each addition
    using Type = std::uint16_t;
    static void run(Type* to, const Type* from, i64 n) {
        BRIM_INDEPENDENT
        for (i64 j = 0; j < n; j++) to[j] = H::narrow(H::widen(to[j]) + H::widen(from[j]));
    }
};

template <class T>
struct Write {
    using Type = T;
    static void run(T* to, const T* from, i64 n) { std::memcpy(to, from, size_t(n) * sizeof(T)); }
};

template <class T>
struct WriteNumber {  // the same one everywhere
    using Type = T;
    static void run(T* to, const T* from, i64 n) { std::fill(to, to + n, *from); }
};

struct Scatter {
    const i64* indices;
    i64 count, size, inner;
    i64 values_step;  // 0: every value is the first

    // Columns [columns.begin, columns.end) of all rows whose index is in `rows`, in the order of the indices.
    template <class Op, class T = typename Op::Type>
    void run(T* out, const T* values, Range columns, Range rows) const {
        const i64 width = columns.end - columns.begin;
        const bool all = rows.begin == 0 && rows.end == size;
        for (i64 i = 0; i < count; i++) {
            const i64 row = from_start(indices[i], size);
            if (!all && (row < rows.begin || row >= rows.end)) continue;
            T* to = out + row * inner + columns.begin;
            const T* from = values + (i * inner + columns.begin) * values_step;
            if (width == 1)
                Op::run(to, from, 1);
            else
                Op::run(to, from, width);
        }
    }
};

// Every element is one thread's, which takes the indices in their order: however the work is cut, the sums are the
// same. Columns are cut where they are wide enough, else the rows, among as many threads as there are.
template <class Op, class T = typename Op::Type>
void scatter(T* out, const T* values, i64 outer, const Scatter& s) {
    constexpr i64 kLine = 64 / i64(sizeof(T));  // a cache line is one thread's
    const i64 work = s.count * s.inner * i64(sizeof(T));
    const i64 cuts = outer * work < kPieceBytes ? 1 : ceil_div(threads(), outer);
    const i64 width = ceil_div(ceil_div(s.inner, cuts), kLine) * kLine, across = ceil_div(s.inner, width);
    const i64 height = ceil_div(s.size, ceil_div(cuts, across)), down = ceil_div(s.size, height);
    const i64 together = work < kPieceBytes ? ceil_div(kPieceBytes, work) : 1, cells = across * down;
    parallel_ranges(outer * cells, cells == 1 ? together : 1, [=](i64 begin, i64 end) {
        for (i64 k = begin; k < end; k++) {
            const i64 o = k / cells;
            s.run<Op>(out + o * s.size * s.inner, values + o * s.count * s.inner * s.values_step,
                      piece_of(s.inner, width, k % across), piece_of(s.size, height, k % cells / across));
        }
    });
}

template <class Op>
void checked_scatter(void* out, i64* found, const void* x, const void* values, i64 x_step, i64 outer,
                     const Scatter& s) {
    using T = typename Op::Type;
    if (!check(found, s.indices, s.count, s.size)) return;
    start(static_cast<T*>(out), static_cast<const T*>(x), x_step, outer * s.size * s.inner);
    if (outer * s.count * s.inner > 0) scatter<Op>(static_cast<T*>(out), static_cast<const T*>(values), outer, s);
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

// out = x (a number where x_step is 0) with out[o, indices[i]] += values[o, i]: out (outer, size, inner), values (outer,
// count, inner).
#define BRIM_INDEX_ADD(Op, name) \
    BRIM_EXPORT void brim_index_add_##name(void* out, i64* found, const void* x, const i64* indices, \
                                           const void* values, i64 x_step, i64 outer, i64 count, i64 size, \
                                           i64 inner) { \
        checked_scatter<Op>(out, found, x, values, x_step, outer, {indices, count, size, inner, 1}); \
    }

// The same with = in place of +=, the last one stays; values may be one number.
#define BRIM_PUT(T, name) \
    BRIM_EXPORT void brim_put_##name(void* out, i64* found, const void* x, const i64* indices, const void* values, \
                                     i64 x_step, i64 values_step, i64 outer, i64 count, i64 size, i64 inner) { \
        const Scatter s = {indices, count, size, inner, values_step}; \
        if (values_step != 0) \
            checked_scatter<Write<T>>(out, found, x, values, x_step, outer, s); \
        else \
            checked_scatter<WriteNumber<T>>(out, found, x, values, x_step, outer, s); \
    }

BRIM_INDEX_ADD(Sum<float>, f32)
BRIM_INDEX_ADD(Sum<double>, f64)
BRIM_INDEX_ADD(HalfSum<Float16>, f16)
BRIM_INDEX_ADD(HalfSum<BFloat16>, bf16)
BRIM_INDEX_ADD(Sum<std::uint8_t>, u8)
BRIM_INDEX_ADD(Sum<std::uint16_t>, u16)
BRIM_INDEX_ADD(Sum<u32>, u32)
BRIM_INDEX_ADD(Sum<u64>, u64)
BRIM_PUT(std::uint8_t, u8)
BRIM_PUT(std::uint16_t, u16)
BRIM_PUT(u32, u32)
BRIM_PUT(u64, u64)
