// Runs an epilogue's instructions on a tile, row by row: a row's numbers stay in the first-level cache from one
// instruction to the next.
#include "gemm_epilogue.hpp"

#include <cstring>

#include "vm.hpp"

namespace brim {
namespace {

constexpr int kMaxSlots = 64, kMaxLines = 64;
constexpr i64 kRegisterBytes = 32 * 1024;  // of each thread's stack

template <class U>
void fill(char* to, u64 bits, i64 n) {
    U value;
    std::memcpy(&value, &bits, sizeof value);
    for (i64 i = 0; i < n; i++) reinterpret_cast<U*>(to)[i] = value;
}

void fill(char* to, u64 bits, i64 itemsize, i64 n) {
    switch (itemsize) {
        case 1: return fill<std::uint8_t>(to, bits, n);
        case 2: return fill<std::uint16_t>(to, bits, n);
        case 4: return fill<u32>(to, bits, n);
        default: return fill<u64>(to, bits, n);
    }
}

}  // namespace

void Epilogue::run(const i64* at, Range rows, Range columns) const {
    alignas(64) char memory[kRegisterBytes];
    char* slots[kMaxSlots];
    char* starts[kMaxSlots];
    BlockFn functions[kMaxLines];
    for (i64 l = 0; l < counts->lines; l++) functions[l] = instruction_of(lines[l].code);
    for (i64 r = 0; r < counts->registers; r++) slots[counts->operands + r] = memory + r * counts->register_bytes;
    const i64 width = columns.end - columns.begin < counts->block ? columns.end - columns.begin : counts->block;
    for (i64 c = 0; c < counts->constants; c++)
        fill(slots[constants[c].slot], constants[c].bits, constants[c].itemsize, width);
    for (i64 o = 0; o < counts->operands; o++) {
        starts[o] = bases[o];
        for (int axis = 0; axis < kMaxBatchDims; axis++) starts[o] += at[axis] * operands[o].batch_step[axis];
    }
    for (i64 row = rows.begin; row < rows.end; row++)
        for (i64 column = columns.begin; column < columns.end; column += width) {
            const i64 n = columns.end - column < width ? columns.end - column : width;
            for (i64 o = 0; o < counts->operands; o++)
                slots[o] = starts[o] + row * operands[o].down + column * operands[o].across;
            for (i64 l = 0; l < counts->lines; l++) {
                const Line& line = lines[l];
                functions[l](slots[line.d], slots[line.a], slots[line.b], slots[line.c], n);
            }
        }
}

}  // namespace brim
