// What the kernels of attention have in common: where their matrices lie, and which weights dropout keeps.

// Of N arrays (..., rows, numbers): elements from row to row and from number to number.
template <class I, int N> struct Attended {
    I queries, keys, depth, width;  // q and k have `depth` numbers a row, v and y have `width`
    I down[N], right[N];
};

template <class I, int N, int DIM> struct Starts {
    I at[N];
    BRIM_FN Starts(const Walk<I, N, DIM>& batch, I number) {
        for (int n = 0; n < N; ++n) at[n] = 0;
#pragma unroll
        for (int d = DIM - 1; d >= 0; --d) {
            const I next = number / batch.shape[d], place = number - next * batch.shape[d];
            for (int n = 0; n < N; ++n) at[n] += place * batch.stride[n][d];
            number = next;
        }
    }
};

// Which weights are dropped: none.
struct AllKept {
    static constexpr bool ACTIVE = false;
    float factor;
};

// Those for which the uniform number of their place among all scores (row-major) is below p; the others are multiplied
// by `factor`. The numbers are those that brim's dropout draws for an array of that shape.
struct Dropout {
    static constexpr bool ACTIVE = true;
    float factor, p;
    u64 seed, draw;
};
BRIM_FN u32 kept_of_block(const Dropout& how, u64 block) {
    const Words words = philox(how.seed, how.draw, block);
    u32 bits = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) bits |= (u32)(uniform_in(words, k) >= how.p) << k;
    return bits;
}
// Bit j: whether score number `first` + j is kept, j < 8. One block of random words where rows start at multiples of 8.
BRIM_FN u32 kept_of_eight(const Dropout& how, u64 first) {
    u32 bits = kept_of_block(how, first >> 3);
    if (first & 7) bits = (bits | kept_of_block(how, (first >> 3) + 1) << 8) >> (first & 7);
    return bits & 255u;
}
