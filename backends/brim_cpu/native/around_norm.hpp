// What stands next to batch norm in most networks, computed in the norm's own loops: a shortcut and ReLU after it, the
// mask of ReLU before its gradient. Elements are numbered as they lie in memory; `from(n)` has
// element n as its number 0. Loops want a copy of their own: members of what a lambda captured are read anew each time.
#pragma once
#include "rows.hpp"

namespace brim {

// The norm's result as it is.
struct AsItIs {
    template <class T>
    T operator()(T value, i64) const {
        return value;
    }
    AsItIs from(i64) const { return *this; }
    void ask(i64, i64) const {}
};

// max(value + shortcut, 0), or one of the two; NaN stays.
template <bool added, bool rectified>
struct Followed {
    const float* shortcut;
    float operator()(float value, i64 at) const {
        const float sum = added ? value + shortcut[at] : value;
        return !rectified || ((sum >= 0) | (sum != sum)) ? sum : 0.0f;
    }
    Followed from(i64 n) const { return {added ? shortcut + n : nullptr}; }
    void ask(i64 n, i64 count) const {
        if constexpr (added) prefetch(shortcut + n, count * i64(sizeof(float)), 0);
    }
};

// A gradient that lies in memory.
template <class T>
struct Given {
    static constexpr bool kMade = false;
    const T* at;
    const T& operator()(i64 i) const { return at[i]; }
    Given from(i64 n) const { return {at + n}; }
    void ask(i64 n, i64 count) const { prefetch(at + n, count * i64(sizeof(T)), 0); }
};

// The gradient of ReLU: a gradient where the ReLU's result is above 0. It is computed anew in each pass over it.
struct Masked {
    static constexpr bool kMade = true;
    const float *gradient, *result;
    float operator()(i64 i) const { return result[i] > 0 ? gradient[i] : 0.0f; }
    Masked from(i64 n) const { return {gradient + n, result + n}; }
    void ask(i64 n, i64 count) const {
        prefetch(gradient + n, count * i64(sizeof(float)), 0);
        prefetch(result + n, count * i64(sizeof(float)), 0);
    }
};

// run(what follows), as overlay/around_norm.py says in words: the shortcut's address or 0, whether there is a ReLU.
template <class F>
void with_followed(const i64* words, const F& run) {
    const float* shortcut = reinterpret_cast<const float*>(words[0]);
    if (!shortcut) return run(Followed<false, true>{nullptr});
    if (words[1]) return run(Followed<true, true>{shortcut});
    run(Followed<true, false>{shortcut});
}

}  // namespace brim
