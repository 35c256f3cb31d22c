// What follows a matrix product element by element, computed on each tile of the result while it is in the caches: the
// instructions of the elementwise interpreter (vm.hpp), so that the bits are those of a group that runs by itself.
#pragma once
#include "gemm.hpp"

namespace brim {

// Written by overlay/matmul_epilogue.py as arrays of int64; sizes and strides are in bytes.
struct Epilogue {
    struct Operand {
        i64 down, across;  // from row to row; from column to column: an element's size, nothing else
        i64 batch_step[kMaxBatchDims];
    };
    struct Constant {
        i64 slot, itemsize;
        u64 bits;  // the value, in its first bytes
    };
    struct Line {
        i64 code, d, a, b, c;  // slots: operands first, then registers
    };
    struct Counts {
        i64 operands, registers, constants, lines;
        i64 block;  // columns at a time
        i64 register_bytes;
    };

    // Each is an address in Python's array of five.
    const Counts* counts;
    const Operand* operands;
    const Line* lines;
    const Constant* constants;
    char* const* bases;  // of the operands; the product is one of them

    // On rows and columns of the product whose number along each batch axis is `at`.
    void run(const i64* at, Range rows, Range columns) const;
};

}  // namespace brim
