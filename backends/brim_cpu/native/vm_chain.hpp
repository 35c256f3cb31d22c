// Chains of the elementwise interpreter: a run of float32 lines whose result stays in processor registers from line to
// line, for a tile of eight vectors at a time. Each link of a chain is a function that ends with a call of the next
// one; compilers make a jump of it, and the eight vectors are passed in registers, so that a link costs little more
// than its arithmetic. Every result is rounded as the line by itself would round it.
#pragma once
#include "simd.hpp"

namespace brim {

typedef float Vector __attribute__((vector_size(kVectorBytes)));

constexpr i64 kTileBytes = 8 * kVectorBytes;
constexpr i64 kTile = kTileBytes / i64(sizeof(float));  // elements

struct Link;

// `acc0` ... `acc7`: the result of the link before; `at`: bytes from the start of the block to the tile.
using LinkFn = void (*)(Vector acc0, Vector acc1, Vector acc2, Vector acc3, Vector acc4, Vector acc5, Vector acc6,
                        Vector acc7, const Link* link, i64 at);

struct Link {
    LinkFn run;
    const char *x, *y;  // operands: the block's first element, or a constant
};

// Names say the function and where its operands come from: a the link before (accumulator), m memory, c a constant;
// "add.am". "add.amm" is a + m * m, "add.mma" is m * m + a, each product rounded before the sum. A comparison leaves a
// mask, which only "where.mm" ... reads, the choice between its two operands.
struct LinkInstruction {
    const char* name;
    LinkFn run;
};

extern const LinkInstruction kLinkInstructions[];  // ends with a name of null

// The tiles of a block; the last link is "end".
void run_chain(const Link* links, i64 tiles);

}  // namespace brim
