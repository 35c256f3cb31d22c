// The elementwise interpreter's instructions: each is a loop over one block, d[i] = f(a[i], b[i], c[i]).
//
// `d` may be one of the arguments, element for element, and pointers are aligned to their elements only.
#pragma once
#include "simd.hpp"

namespace brim {

using BlockFn = void (*)(void* d, const void* a, const void* b, const void* c, i64 n);

struct Instruction {
    const char* name;  // function, dot, dtype of the arguments: "add.f32"; conversions name both: "cast.f32.i64"
    BlockFn run;
};

// The tables of the vm_*.cpp files; each ends with a name of null.
extern const Instruction kFloatInstructions[];
extern const Instruction kWholeInstructions[];
extern const Instruction kCastInstructions[];
extern const Instruction kMathInstructions[];

// The instruction with a code: the number of its table above the 16 lowest bits, its place there in them.
inline BlockFn instruction_of(i64 code) {
    const Instruction* const tables[] = {kFloatInstructions, kWholeInstructions, kCastInstructions, kMathInstructions};
    return tables[code >> 16][code & 0xffff].run;
}

template <class F, class R, class T>
void unary(void* d_, const void* a_, const void*, const void*, i64 n) {
    R* d = static_cast<R*>(d_);
    const T* a = static_cast<const T*>(a_);
    BRIM_INDEPENDENT
    for (i64 i = 0; i < n; i++) d[i] = R(F::of(a[i]));
}

template <class F, class R, class T>
void binary(void* d_, const void* a_, const void* b_, const void*, i64 n) {
    R* d = static_cast<R*>(d_);
    const T* a = static_cast<const T*>(a_);
    const T* b = static_cast<const T*>(b_);
    BRIM_INDEPENDENT
    for (i64 i = 0; i < n; i++) d[i] = R(F::of(a[i], b[i]));
}

}  // namespace brim
