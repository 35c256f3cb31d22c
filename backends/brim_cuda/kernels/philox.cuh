// The stream of one draw: NumPy's Philox4x64-10 under key (seed, 0), counter words (block, 0, draw, 0).
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
// NumPy counts before it draws, so that its first block of four words is number 1.

struct Words {
    u64 w[4];
};

BRIM_FN Words philox(u64 seed, u64 draw, u64 block) {
    u64 a = block + 1, b = 0, c = draw, d = 0, key0 = seed, key1 = 0;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u64 high0 = __umul64hi(0xD2E7470EE14C6C93ull, a), low0 = 0xD2E7470EE14C6C93ull * a;
        const u64 high1 = __umul64hi(0xCA5A826395121157ull, c), low1 = 0xCA5A826395121157ull * c;
        a = high1 ^ b ^ key0, b = low1, c = high0 ^ d ^ key1, d = low0;
        key0 += 0x9E3779B97F4A7C15ull, key1 += 0xBB67AE8584CAA73Bull;
    }
    return Words{{a, b, c, d}};
}

// float32 in [0, 1): the upper 24 bits of each half of a word, low half first. A block gives eight.
BRIM_FN float unit_float(u32 bits) { return (float)(bits >> 8) * (1.0f / 16777216.0f); }
BRIM_FN float uniform_in(const Words& words, int k) {
    return unit_float((u32)(words.w[k >> 1] >> ((k & 1) * 32)));
}
BRIM_FN float uniform(u64 seed, u64 draw, u64 element) {
    return uniform_in(philox(seed, draw, element >> 3), (int)(element & 7));
}
