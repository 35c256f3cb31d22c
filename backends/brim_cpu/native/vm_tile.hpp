// A formula of the elementwise interpreter on part of its elements, for kernels that go over arrays tile by tile: norms
// run what comes before and after them while a tile is in the first-level cache.
#pragma once
#include "common.hpp"

namespace brim {

// Each thread makes its own for a piece of the work; everything is written when it is gone.
class TileProgram {
public:
    // `words`, written by overlay/norm_groups.py: a task's addresses, and the slot of the operand that is the kernel's
    // tile instead of an array (-1: none is), and whether to ask early for the arrays of the tile that comes next. Null: no
    // formula.
    explicit TileProgram(const i64* words);
    ~TileProgram();
    TileProgram(const TileProgram&) = delete;
    TileProgram& operator=(const TileProgram&) = delete;

    // On elements [first, first + n), in the order of memory; `tile` has element `first` at its start.
    void run(i64 first, i64 n, void* tile);

    // Whether one of the operands is a tile.
    static bool tiled(const i64* words) { return words != nullptr && words[kTileWord] >= 0; }

private:
    static constexpr int kTileWord = 7, kAheadWord = 8, kSlots = 96;
    static constexpr i64 kBytes = 64 * 1024;  // of registers

    alignas(64) char memory[kBytes];
    char* slots[kSlots];
    const i64* words;
    i64 filled = 0;  // elements of the registers that are the same for every row
    bool streaming = false;
};

}  // namespace brim
