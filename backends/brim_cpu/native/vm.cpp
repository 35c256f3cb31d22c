// The elementwise interpreter: a formula's instructions run on one block after the other, so that what lies between
// inputs and outputs stays in the first-level cache. Operands are arrays of any strides, or registers on the stack.
#include "vm.hpp"

#include "philox.hpp"
#include "team.hpp"
#include "vm_chain.hpp"
#include "vm_tile.hpp"

namespace brim {
namespace {

constexpr int kMaxDims = 8, kMaxSlots = 96, kMaxLinks = 512;
constexpr i64 kRegisterBytes = 64 * 1024;  // of each thread's stack

enum class Mode : i64 { dense, along_row, once, gathered };

// overlay/program.py writes these as arrays of int64; brim_vm_prepare completes them.
struct Header {
    i64 dims, arrays, registers, constants, instructions, links, block;
    i64 shape[kMaxDims];  // the arrays' common shape; axes that all of them allow are merged
    // completed:
    i64 inner, rows, per_chunk, chunks;
    i64 whole_rows;  // a chunk is so many whole rows; else a part of one row
    i64 tails;       // a chunk may have elements that make no whole tile
    i64 seamless;    // one chain on dense arrays that keeps nothing in registers: many chunks are run as one
};

struct Array {
    i64 itemsize, is_output;
    i64 stand_in;           // slot of the register that stands in where a block is not contiguous in memory, or -1
    i64 late;               // an output that is written when the block is done, because it may lie where an input lies
    i64 streamed;           // an output that is written past the caches
    i64 strides[kMaxDims];  // in bytes; 0 along axes that the array lacks
    // completed:
    Mode mode;
    i64 buffered;  // an output that is dense, but collected in a register first
};

struct Register {
    i64 offset, itemsize;
};

struct Constant {
    i64 slot;         // of the register that is filled with it; -1: a seed or counter
    i64 chained;      // only chains read it
    const u64* value;  // in its first bytes
};

struct Line {
    i64 code, d, a, b, c;  // slots: arrays first, then registers
    i64 chain, link;       // so many lines from here on are a chain, whose first link this is; 0: a line by itself
    BlockFn run;           // completed
};

struct ChainLink {
    i64 code, x, y;  // slots; a constant's number as -1 - number; y of a prefetch: bytes ahead
    LinkFn run;      // completed
};

enum { kUniform = -1 };  // d = numbers drawn for (a, b), which are constants' numbers
enum { kEnd = 0, kStore = 1, kPrefetch = 2 };  // codes of links

const Instruction* const kTables[] = {kFloatInstructions, kWholeInstructions, kCastInstructions, kMathInstructions};

// A program and the arrays that it runs on.
struct Task {
    const Header* header;
    const Array* arrays;
    const Register* registers;
    const Constant* constants;
    const Line* lines;
    const ChainLink* links;
    char* const* bases;
};

// Chunks of a task.
struct Span {
    i64 task, begin, end;
};

template <class T>
void strided_copy(char* to, i64 to_step, const char* from, i64 from_step, i64 n) {
    if (to_step == i64(sizeof(T)) && from_step == 0) {
        T value;
        std::memcpy(&value, from, sizeof value);
        T* out = reinterpret_cast<T*>(to);
        for (i64 i = 0; i < n; i++) out[i] = value;
        return;
    }
    for (i64 i = 0; i < n; i++) std::memcpy(to + i * to_step, from + i * from_step, sizeof(T));
}

void copy_line(i64 itemsize, char* to, i64 to_step, const char* from, i64 from_step, i64 n) {
    if (to_step == itemsize && from_step == itemsize) {
        std::memcpy(to, from, size_t(n * itemsize));
        return;
    }
    switch (itemsize) {
        case 1: return strided_copy<std::uint8_t>(to, to_step, from, from_step, n);
        case 2: return strided_copy<std::uint16_t>(to, to_step, from, from_step, n);
        case 4: return strided_copy<u32>(to, to_step, from, from_step, n);
        default: return strided_copy<u64>(to, to_step, from, from_step, n);
    }
}

// Byte offset of a row's first element.
i64 row_offset(const Header& header, const Array& array, i64 row) {
    i64 offset = 0;
    for (i64 axis = header.dims - 2; axis >= 0; axis--) {
        const i64 dim = header.shape[axis];
        offset += row % dim * array.strides[axis];
        row /= dim;
    }
    return offset;
}

struct Chunk {
    i64 row, column, rows, columns, first, n;  // `first`: number of its first element in row-major order
};

Chunk chunk_of(const Header& header, i64 which) {
    if (header.whole_rows) {
        const i64 row = which * header.per_chunk, left = header.rows - row;
        const i64 rows = left < header.per_chunk ? left : header.per_chunk;
        return {row, 0, rows, header.inner, row * header.inner, rows * header.inner};
    }
    const i64 across = ceil_div(header.inner, header.per_chunk);
    const i64 row = which / across, column = which % across * header.per_chunk, left = header.inner - column;
    const i64 columns = left < header.per_chunk ? left : header.per_chunk;
    return {row, column, 1, columns, row * header.inner + column, columns};
}

// Copies between a chunk of an array and a register.
void transfer(const Header& header, const Array& array, char* base, char* block, const Chunk& chunk, bool out) {
    const i64 step = array.strides[header.dims - 1], itemsize = array.itemsize;
    for (i64 r = 0; r < chunk.rows; r++) {
        char* at = base + row_offset(header, array, chunk.row + r) + chunk.column * step;
        char* here = block + r * chunk.columns * itemsize;
        if (out)
            copy_line(itemsize, at, step, here, itemsize, chunk.columns);
        else
            copy_line(itemsize, here, itemsize, at, step, chunk.columns);
    }
}

// Puts an array's block, or the register that stands in for it, into its slot.
char* reach(const Header& header, const Array& array, char* base, char* own, const Chunk& chunk, bool first) {
    const i64 step = array.strides[header.dims - 1];
    if (array.buffered) return own;
    switch (array.mode) {
        case Mode::dense: return base + chunk.first * array.itemsize;
        case Mode::along_row: return base + row_offset(header, array, chunk.row) + chunk.column * step;
        case Mode::once:
            if (first && step == 0)
                copy_line(array.itemsize, own, array.itemsize, base, 0, header.block);
            else if (first)
                transfer(header, array, base, own, chunk, false);
            return own;
        case Mode::gathered:
            if (!array.is_output) transfer(header, array, base, own, chunk, false);
    }
    return own;
}

// The chain that starts at a line: whole tiles by its links, the rest by the lines themselves.
void run_chain_at(const Task& task, const Line* line, char* const* slots, i64 n) {
    const i64 tiles = n / kTile, done = tiles * kTile;
    if (tiles > 0) {
        Link links[kMaxLinks];
        Link* to = links;
        for (const ChainLink* link = task.links + line->link;; link++, to++) {
            to->run = link->run;
            to->x = link->x < 0 ? reinterpret_cast<const char*>(task.constants[-1 - link->x].value) : slots[link->x];
            if (link->code == kEnd) break;
            if (link->code == kPrefetch)
                to->x += link->y;
            else
                to->y = link->y < 0 ? reinterpret_cast<const char*>(task.constants[-1 - link->y].value) : slots[link->y];
        }
        run_chain(links, tiles);
    }
    if (done == n) return;
    auto rest = [&](i64 slot) {
        const i64 which = slot - task.header->arrays;
        if (which < 0) return slots[slot] + done * i64(sizeof(float));
        return slots[slot] + (task.header->seamless ? 0 : done * task.registers[which].itemsize);
    };
    for (i64 l = 0; l < line->chain; l++) {
        const Line& each = line[l];
        each.run(rest(each.d), rest(each.a), rest(each.b), rest(each.c), n - done);
    }
}

void run_lines(const Task& task, char* const* slots, const Chunk& chunk) {
    const Line *line = task.lines, *end = line + task.header->instructions;
    while (line < end) {
        if (line->chain > 0) {
            run_chain_at(task, line, slots, chunk.n);
            line += line->chain;
            continue;
        }
        if (line->code == kUniform)
            uniform_f32(reinterpret_cast<float*>(slots[line->d]), *task.constants[line->a].value,
                        *task.constants[line->b].value, chunk.first, chunk.n);
        else
            line->run(slots[line->d], slots[line->a], slots[line->b], slots[line->c], chunk.n);
        line++;
    }
}

// Puts registers into their slots, and numbers into theirs.
void fill_registers(const Task& task, char* memory, char** slots) {
    const Header& header = *task.header;
    for (i64 r = 0; r < header.registers; r++) slots[header.arrays + r] = memory + task.registers[r].offset;
    for (i64 c = 0; c < header.constants; c++) {
        const Constant& constant = task.constants[c];
        if (constant.slot < 0 || (constant.chained && !header.tails)) continue;
        const i64 itemsize = task.registers[constant.slot - header.arrays].itemsize;
        const i64 n = header.seamless ? kTile : header.block;  // what makes no whole tile is shorter than one
        copy_line(itemsize, slots[constant.slot], itemsize, reinterpret_cast<const char*>(constant.value), 0, n);
    }
}

// Outputs that were collected in registers go where they belong. True where one went past the caches.
bool write_back(const Task& task, char* const* slots, const Chunk& chunk) {
    bool streaming = false;
    for (i64 a = 0; a < task.header->arrays; a++) {
        const Array& array = task.arrays[a];
        if (!array.is_output) continue;
        if (array.buffered) {
            char* to = task.bases[a] + chunk.first * array.itemsize;
            if (array.streamed)
                stream_copy(to, slots[a], chunk.n * array.itemsize);
            else
                std::memcpy(to, slots[a], size_t(chunk.n * array.itemsize));
            streaming |= array.streamed != 0;
        } else if (array.mode == Mode::gathered) {
            transfer(*task.header, array, task.bases[a], slots[a], chunk, true);
        }
    }
    return streaming;
}

char* stand_in(const Array& array, char* const* slots) {
    return array.stand_in < 0 ? nullptr : slots[array.stand_in];
}

void run_span(const Task& task, i64 begin, i64 end) {
    alignas(64) char memory[kRegisterBytes];
    const Header& header = *task.header;
    char* slots[kMaxSlots];
    fill_registers(task, memory, slots);
    bool streaming = false;
    for (i64 which = begin; which < end; which++) {
        Chunk chunk = chunk_of(header, which);
        if (header.seamless) {
            which = end - 1;
            chunk.n = (end < header.chunks ? end * header.per_chunk : header.inner) - chunk.first;
        }
        for (i64 a = 0; a < header.arrays; a++)
            slots[a] = reach(header, task.arrays[a], task.bases[a], stand_in(task.arrays[a], slots), chunk, which == begin);
        run_lines(task, slots, chunk);
        streaming |= write_back(task, slots, chunk);
    }
    if (streaming) stream_done();
}

// The chunk that starts at an element, up to `end` at most: some whole rows, or a part of one.
Chunk chunk_from(const Header& header, i64 first, i64 end) {
    const i64 row = first / header.inner, column = first % header.inner, left = end - first;
    if (header.whole_rows && column == 0 && left >= header.inner) {
        const i64 most = left / header.inner, rows = most < header.per_chunk ? most : header.per_chunk;
        return {row, 0, rows, header.inner, first, rows * header.inner};
    }
    i64 columns = header.inner - column < left ? header.inner - column : left;
    columns = columns < header.block ? columns : header.block;
    return {row, column, 1, columns, first, columns};
}

// How a block of an array is reached.
Mode mode_of(const Header& header, const Array& array) {
    i64 expected = array.itemsize;
    bool dense = true, rows_alike = true;
    for (i64 axis = header.dims - 1; axis >= 0; axis--) {
        if (header.shape[axis] != 1 && array.strides[axis] != expected) dense = false;
        if (axis < header.dims - 1 && header.shape[axis] != 1 && array.strides[axis] != 0) rows_alike = false;
        expected *= header.shape[axis];
    }
    const i64 step = array.strides[header.dims - 1];
    if (dense) return Mode::dense;
    if (array.is_output && array.late) return Mode::gathered;
    if (!header.whole_rows && step == array.itemsize) return Mode::along_row;
    if (array.is_output) return Mode::gathered;
    if (rows_alike && (header.whole_rows || step == 0)) return Mode::once;  // the same for every chunk
    return Mode::gathered;
}

// Writes "code name" lines; `size` bytes of room.
struct Names {
    char* out;
    i64 size, at = 0;

    void put(char letter) {
        if (at < size - 1) out[at++] = letter;
    }
    void put(i64 code, const char* name) {
        char digits[24];
        int count = 0;
        for (; code > 0 || count == 0; code /= 10) digits[count++] = char('0' + code % 10);
        while (count > 0) put(digits[--count]);
        put(' ');
        for (; *name; name++) put(*name);
        put('\n');
    }
};

}  // namespace

TileProgram::TileProgram(const i64* words) : words(words) {
    static_assert(kSlots == kMaxSlots && kBytes == kRegisterBytes && kTileWord * sizeof(i64) == sizeof(Task), "vm_tile.hpp");
    if (words) fill_registers(*reinterpret_cast<const Task*>(words), memory, slots);
}

static void ask_for(const char* from, i64 nbytes) {
    for (i64 at = 0; at < nbytes; at += 64) __builtin_prefetch(from + at);
}

TileProgram::~TileProgram() {
    if (streaming) stream_done();
}

void TileProgram::run(i64 first, i64 n, void* tile) {
    const Task& task = *reinterpret_cast<const Task*>(words);
    const Header& header = *task.header;
    for (i64 at = first; at < first + n;) {
        const Chunk chunk = chunk_from(header, at, first + n);
        // A register that is the same for every row has been filled for the longest chunk that started with a row.
        const bool fill = chunk.column != 0 || chunk.n > filled;
        if (fill) filled = chunk.column != 0 ? 0 : chunk.n;
        for (i64 a = 0; a < header.arrays; a++) {
            const Array& array = task.arrays[a];
            if (a == words[kTileWord])
                slots[a] = static_cast<char*>(tile) + (at - first) * array.itemsize;
            else
                slots[a] = reach(header, array, task.bases[a], stand_in(array, slots), chunk, fill);
            if (words[kAheadWord] && array.mode == Mode::dense && !array.is_output && a != words[kTileWord])
                ask_for(slots[a] + n * array.itemsize, chunk.n * array.itemsize);
        }
        run_lines(task, slots, chunk);
        streaming |= write_back(task, slots, chunk);
        at += chunk.n;
    }
}

}  // namespace brim

using namespace brim;

// The instructions' names, one a line, as "code name"; `size` bytes of room.
BRIM_EXPORT void brim_vm_names(char* out, i64 size) {
    Names names{out, size};
    for (i64 table = 0; table < i64(sizeof kTables / sizeof kTables[0]); table++)
        for (i64 n = 0; kTables[table][n].name != nullptr; n++) names.put(table << 16 | n, kTables[table][n].name);
    if (size > 0) out[names.at] = 0;
}

// The names of chains' links, likewise.
BRIM_EXPORT void brim_vm_link_names(char* out, i64 size) {
    Names names{out, size};
    for (i64 n = 0; kLinkInstructions[n].name != nullptr; n++) names.put(n, kLinkInstructions[n].name);
    if (size > 0) out[names.at] = 0;
}

// Completes a program, in place; `header.chunks` says afterwards how many chunks there are.
BRIM_EXPORT void brim_vm_prepare(i64* header, i64* arrays, i64* lines, i64* links) {
    Header& head = *reinterpret_cast<Header*>(header);
    head.inner = head.shape[head.dims - 1];
    head.rows = 1;
    for (i64 axis = 0; axis < head.dims - 1; axis++) head.rows *= head.shape[axis];
    head.whole_rows = head.inner > 0 && head.inner * 2 <= head.block && head.rows > 1;
    head.per_chunk = head.whole_rows ? head.block / head.inner : head.block;
    head.chunks = head.whole_rows ? ceil_div(head.rows, head.per_chunk) : head.rows * ceil_div(head.inner, head.per_chunk);
    head.tails = head.rows > 1 || head.inner % kTile != 0 || head.block % kTile != 0;
    head.seamless = head.rows == 1 && reinterpret_cast<Line*>(lines)[0].chain == head.instructions;
    for (i64 a = 0; a < head.arrays; a++) {
        Array& array = reinterpret_cast<Array*>(arrays)[a];
        array.mode = mode_of(head, array);
        array.buffered = array.is_output && array.mode == Mode::dense && array.stand_in >= 0;
        if (array.mode != Mode::dense || array.buffered) head.seamless = 0;
    }
    for (i64 l = 0; l < head.instructions; l++) {
        Line& line = reinterpret_cast<Line*>(lines)[l];
        line.run = line.code == kUniform ? nullptr : kTables[line.code >> 16][line.code & 0xffff].run;
    }
    for (i64 n = 0; n < head.links; n++) {
        ChainLink& link = reinterpret_cast<ChainLink*>(links)[n];
        link.run = kLinkInstructions[link.code].run;
        if (link.code == kStore && link.x >= head.arrays) head.seamless = 0;  // a register holds one chunk
    }
}

// Runs tasks: piece number n is the spans from starts[n] up to starts[n + 1].
BRIM_EXPORT void brim_vm_run(const i64* tasks, const i64* spans, const i64* starts, i64 pieces) {
    parallel(pieces, [=](i64 piece) {
        for (i64 s = starts[piece]; s < starts[piece + 1]; s++) {
            const Span& span = reinterpret_cast<const Span*>(spans)[s];
            run_span(reinterpret_cast<const Task*>(tasks)[span.task], span.begin, span.end);
        }
    });
}
