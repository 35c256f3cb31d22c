// Copies between arrays of any strides, of elements of 1, 2, 4, 8 or 16 bytes: slices, transposed copies, fills.
//
// overlay/copies.py drops axes of size 1, makes neighbours one where they lie one behind the other in both arrays, and
// orders the axes by the target's strides, so that the last one is where the target's elements lie closest.
#include "team.hpp"
#include "turn.hpp"

using namespace brim;

namespace {

constexpr i64 kPieceBytes = 64 * 1024;   // what is worth another thread; a tile
constexpr i64 kChunkBytes = 256 * 1024;  // a longer axis is cut
constexpr i64 kTileRows = 128;           // rows of the source in a tile of a transposed copy
constexpr i64 kStreamedRun = 256;        // shorter runs are not written past the caches: their ends are no whole lines
constexpr i64 kAliasing = 1024;          // rows so far apart share few places in a cache: written whole, not by lines
constexpr i64 kLeastTurned = 4;          // sides of matrices that are worth blocks
constexpr i64 kThinRun = 32;             // bytes: lines along a shorter axis cost more than strides along a longer one
constexpr i64 kThinBytes = 16 * 1024;    // of a tile of such lines: stays in the first cache
constexpr int kMostAxes = 64;

struct Axis {
    i64 size, to, from;  // elements, bytes from one to the next
};

// Axes outside of the innermost one or two, walked in row-major order.
struct Outer {
    const Axis* axes[kMostAxes];
    i64 n = 0, count = 1;

    void add(const Axis& axis) {
        axes[n++] = &axis;
        count *= axis.size;
    }
};

struct Walk {
    const Outer& outer;
    char* to;
    const char* from;
    i64 at[kMostAxes];

    Walk(const Outer& o, char* t, const char* f, i64 start) : outer(o), to(t), from(f) {
        for (i64 k = o.n - 1; k >= 0; k--) {
            at[k] = start % o.axes[k]->size;
            start /= o.axes[k]->size;
            to += at[k] * o.axes[k]->to, from += at[k] * o.axes[k]->from;
        }
    }

    void next() {
        for (i64 k = outer.n - 1; k >= 0; k--) {
            const Axis& axis = *outer.axes[k];
            to += axis.to, from += axis.from;
            if (++at[k] < axis.size) return;
            at[k] = 0, to -= axis.size * axis.to, from -= axis.size * axis.from;
        }
    }
};

struct Pair {  // 16 bytes
    u64 first, second;
};

// One line of elements.
template <class T>
void line(char* to, i64 to_step, const char* from, i64 from_step, i64 count) {
    constexpr i64 kBytes = sizeof(T);
    const T* f = reinterpret_cast<const T*>(from);
    T* t = reinterpret_cast<T*>(to);
    const i64 from_items = from_step / kBytes, to_items = to_step / kBytes;
    if (to_step == kBytes && from_step == 0) {
        const T value = *f;
        for (i64 i = 0; i < count; i++) t[i] = value;
    } else if (to_step == kBytes) {
        for (i64 i = 0; i < count; i++) t[i] = f[i * from_items];
    } else if (from_step == kBytes) {
        for (i64 i = 0; i < count; i++) t[i * to_items] = f[i];
    } else {
        for (i64 i = 0; i < count; i++) t[i * to_items] = f[i * from_items];
    }
}

// to[c][r] = from[r][c]; steps in bytes.
template <class T>
void turn_tile(char* to, i64 to_step, const char* from, i64 from_step, i64 rows, i64 columns) {
    T* t = reinterpret_cast<T*>(to);
    const T* f = reinterpret_cast<const T*>(from);
    const i64 to_items = to_step / i64(sizeof(T)), from_items = from_step / i64(sizeof(T));
    if constexpr (sizeof(T) <= 8) {
        if (to_step % kAliasing != 0) return turn(t, to_items, f, from_items, rows, columns);
        alignas(64) T packed[kPieceBytes / sizeof(T)];
        turn(packed, rows, f, from_items, rows, columns);
        for (i64 c = 0; c < columns; c++) std::memcpy(to + c * to_step, packed + c * rows, size_t(rows) * sizeof(T));
    } else {
        for (i64 c = 0; c < columns; c++)
            for (i64 r = 0; r < rows; r++) t[c * to_items + r] = f[r * from_items + c];
    }
}

struct Functions {
    void (*line)(char*, i64, const char*, i64, i64);
    void (*turn)(char*, i64, const char*, i64, i64, i64);
};

template <class T>
Functions functions() {
    return {line<T>, turn_tile<T>};
}

Functions functions_of(i64 item) {
    switch (item) {
        case 1: return functions<std::uint8_t>();
        case 2: return functions<std::uint16_t>();
        case 4: return functions<u32>();
        case 8: return functions<u64>();
        default: return functions<Pair>();
    }
}

// A number again and again, past the caches.
void stream_fill(char* to, const char* value, i64 item, i64 bytes) {
    char block[4096];
    for (i64 i = 0; i < i64(sizeof block); i += item) std::memcpy(block + i, value, size_t(item));
    for (i64 at = 0; at < bytes; at += i64(sizeof block)) stream_copy(to + at, block, std::min<i64>(sizeof block, bytes - at));
}

// Lines along the last axis.
void copy_lines(char* to, const char* from, i64 item, const Outer& outer, const Axis& last) {
    const bool packed = last.to == item, run = packed && last.from == item, fill = packed && last.from == 0;
    const i64 bytes = last.size * item;
    const bool streamed = (run || fill) && outer.count * bytes >= kStreamBytes && bytes >= kStreamedRun;
    const i64 chunk = bytes > kChunkBytes ? kChunkBytes / item : last.size, chunks = ceil_div(last.size, chunk);
    const Functions of = functions_of(item);
    parallel_ranges(outer.count * chunks, ceil_div(kPieceBytes, chunk * item), [=, &outer](i64 begin, i64 end) {
        Walk walk(outer, to, from, begin / chunks);
        for (i64 k = begin; k < end; k++) {
            const Range part = piece_of(last.size, chunk, k % chunks);
            char* t = walk.to + part.begin * last.to;
            const char* f = walk.from + part.begin * last.from;
            const i64 count = part.end - part.begin;
            if (streamed && run)
                stream_copy(t, f, count * item);
            else if (streamed)
                stream_fill(t, f, item, count * item);
            else if (run)
                std::memcpy(t, f, size_t(count * item));
            else
                of.line(t, last.to, f, last.from, count);
            if (k % chunks == chunks - 1) walk.next();
        }
        if (streamed) stream_done();
    });
}

// Tiles of the last axis and another one. turned: the source's elements lie side by side along the other; else the last
// axis is short, and lines are taken along the other.
void copy_tiles(char* to, const char* from, i64 item, const Outer& outer, const Axis& last, const Axis& other,
                bool turned) {
    const auto even = [](i64 size, i64 most) {  // tiles of about the same size
        const i64 tiles = ceil_div(size, most);
        return tiles == 1 ? size : ceil_div(ceil_div(size, tiles), 16) * 16;
    };
    const i64 rows = even(last.size, kTileRows);
    const i64 columns = even(other.size, (turned ? kPieceBytes / kTileRows : kThinBytes / rows) / item);
    const i64 down = ceil_div(last.size, rows), across = ceil_div(other.size, columns), tiles = down * across;
    const Functions of = functions_of(item);
    parallel_ranges(outer.count * tiles, ceil_div(kPieceBytes, rows * columns * item), [=, &outer](i64 begin, i64 end) {
        Walk walk(outer, to, from, begin / tiles);
        for (i64 k = begin; k < end; k++) {
            const Range r = piece_of(last.size, rows, k % tiles / across);
            const Range c = piece_of(other.size, columns, k % tiles % across);
            char* t = walk.to + r.begin * last.to + c.begin * other.to;
            const char* f = walk.from + r.begin * last.from + c.begin * other.from;
            if (turned)
                of.turn(t, other.to, f, last.from, r.end - r.begin, c.end - c.begin);
            else
                for (i64 i = 0; i < r.end - r.begin; i++)
                    of.line(t + i * last.to, other.to, f + i * last.from, other.from, c.end - c.begin);
            if (k % tiles == tiles - 1) walk.next();
        }
    });
}

}  // namespace

// plan: bytes of an element, number of axes, then (size, bytes between elements of the target, of the source) each;
// strides are whole numbers of elements, those of the target positive, sizes at least 1.
BRIM_EXPORT void brim_copy(void* to, const void* from, const i64* plan) {
    const i64 item = plan[0], n = plan[1];
    const Axis* axes = reinterpret_cast<const Axis*>(plan + 2);
    const Axis& last = axes[n - 1];
    char* t = static_cast<char*>(to);
    const char* f = static_cast<const char*>(from);
    i64 side_by_side = -1, longest = 0;
    for (i64 k = 0; k < n - 1; k++) {
        if (axes[k].from == item) side_by_side = k;
        if (axes[k].size > axes[longest].size) longest = k;
    }
    const bool turned = side_by_side >= 0 && last.to == item && last.from > item &&
                        std::min(axes[side_by_side].size, last.size) >= kLeastTurned;
    const bool thin = !turned && n > 1 && last.size * item < kThinRun && axes[longest].size > last.size;
    const i64 other = turned ? side_by_side : thin ? longest : n;
    Outer outer;
    for (i64 k = 0; k < n - 1; k++)
        if (k != other) outer.add(axes[k]);
    if (other < n)
        copy_tiles(t, f, item, outer, last, axes[other], turned);
    else
        copy_lines(t, f, item, outer, last);
}
