// Attention on tensor cores, forward and backward: float16, bfloat16, and float32 rounded to TF32.
//
// A block of four warps owns 64 rows (of queries, or of keys for their gradients), each warp 16 of them, and goes over
// tiles of the other side, which are copied to shared memory while the tile before is computed. Scores, weights and sums
// stay in registers, where a result of one product is an operand of the next. Sums are float32; weights and slopes are
// rounded to the operands' dtype, as operands. No two blocks add to one result, and each adds in a fixed order.
//
// In a warp's 16 rows, lane 4g + t has the rows g and g + 8 (half 0 and 1), and in each eight columns 2t and 2t + 1.
// W: numbers of a row, padded to a multiple of 16. A query gives a key that it does not see the weight 0.
// Source: T. Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", ICLR 2024.

constexpr int ROWS = 64, WARP_ROWS = 16, MMA_THREADS = 128;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

template <class X, int W> constexpr int PITCH_OF = W * (int)sizeof(X) + 16;

// Whether the rows of a matrix can be read and written in pieces of 16 bytes.
template <class X, class I> BRIM_FN bool in_pieces(const X* x, I down, I right) {
    return right == I(1) && down % I(16 / sizeof(X)) == I(0) && ((u64)x & 15u) == 0;
}

// COUNT rows from `first` on, zeros beside the matrix: asynchronously where pieces of 16 bytes can be read.
template <int COUNT, int W, class X, class I>
BRIM_FN void copy_rows(unsigned char* tile, const X* x, I first, I rows, I numbers, I down, I right) {
    constexpr int PITCH = PITCH_OF<X, W>, EACH = 16 / (int)sizeof(X), PIECES = W / EACH;
    if (in_pieces(x, down, right)) {
#pragma unroll 2
        for (int n = (int)threadIdx.x; n < COUNT * PIECES; n += MMA_THREADS) {
            const int i = n / PIECES, d = n % PIECES * EACH;
            const int left = first + i < rows ? (int)numbers - d : 0;
            const int bytes = left <= 0 ? 0 : (left < EACH ? left : EACH) * (int)sizeof(X);
            copy_later(tile + i * PITCH + d * (int)sizeof(X), bytes ? x + (first + i) * down + d : x, bytes);
        }
    } else {
#pragma unroll 2
        for (int n = (int)threadIdx.x; n < COUNT * W; n += MMA_THREADS) {
            const int i = n / W, d = n % W;
            const bool inside = first + i < rows && (I)d < numbers;
            *(X*)(tile + i * PITCH + d * (int)sizeof(X)) = inside ? x[(first + i) * down + (I)d * right] : cast<X>(0.0f);
        }
    }
}

// A warp's 16 rows of results times `factor[half]`, by way of its part of shared memory, so that whole rows are written.
template <int W, class X, class I>
BRIM_FN void write_results(
    unsigned char* part, X* y, const float (&found)[W / 8][4], const float (&factor)[2], I first, I rows, I numbers,
    I down, I right) {
    constexpr int PITCH = PITCH_OF<X, W>, EACH = 16 / (int)sizeof(X), PIECES = W / EACH;
    const int lane = (int)threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < W / 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Pack<X, 2> two;
            two.v[0] = cast<X>(s::mul(found[n][2 * half], factor[half]));
            two.v[1] = cast<X>(s::mul(found[n][2 * half + 1], factor[half]));
            const int row = lane / 4 + half * 8, column = n * 8 + lane % 4 * 2;
            *(Pack<X, 2>*)(part + row * PITCH + column * (int)sizeof(X)) = two;
        }
    __syncwarp();
    const bool pieces = in_pieces(y, down, right);
    for (int n = lane; n < WARP_ROWS * PIECES; n += 32) {
        const int i = n / PIECES, d = n % PIECES * EACH;
        if (first + i >= rows) continue;
        const X* const from = (const X*)(part + i * PITCH + d * (int)sizeof(X));
        X* const to = y + (first + i) * down + (I)d * right;
        if (pieces && d + EACH <= numbers) *(Pack<X, EACH>*)to = *(const Pack<X, EACH>*)from;
        else
            for (int e = 0; e < EACH; ++e)
                if ((I)(d + e) < numbers) to[(I)e * right] = from[e];
    }
}

// A warp's 16 rows as left matrices.
template <class X, int W> struct Held {
    static constexpr int PARTS = W / PER_PRODUCT<X>;
    u32 words[PARTS][4];
    BRIM_FN void load(const unsigned char* tile, int row) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) load_left<X, PITCH_OF<X, W>>(words[part], tile, row, part * 32);
    }
};

// total += (the results found[n] and found[n + 1], as left matrices) @ 16 rows of a tile from `row` on.
template <class X, int W, int N>
BRIM_FN void add_16_rows(
    float (&total)[W / 8][4], const float (&found)[N][4], int n, const unsigned char* tile, int row) {
    constexpr int DEEP = PER_PRODUCT<X>;
#pragma unroll
    for (int part = 0; part < 16 / DEEP; ++part) {
        u32 a[4], b[4];
        as_left<X>(a, found, n + part);
#pragma unroll
        for (int d = 0; d < W / 16; ++d) {
            load_across<X, PITCH_OF<X, W>>(b, tile, row + part * DEEP, d * 16);
            WARP_PRODUCT(X, total[2 * d], a, b[0], b[1]);
            WARP_PRODUCT(X, total[2 * d + 1], a, b[2], b[3]);
        }
    }
}

template <int N> BRIM_FN void set_to_zero(float (&found)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) found[n][e] = 0.0f;
}

// The sum of what the four lanes of a row have, and the largest, which NaN never is.
BRIM_FN float added_in_quad(float x) {
    x = s::add(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return s::add(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
BRIM_FN float largest_in_quad(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// How many of a tile's columns a row sees: all those up to the end, CAUSAL: those up to its own number.
template <bool CAUSAL, class I> BRIM_FN int columns_seen(I row, I first, I columns, int tile) {
    I seen = columns - first;
    if (CAUSAL && row + 1 - first < seen) seen = row + 1 - first;
    return seen > I(tile) ? tile : seen < I(0) ? 0 : (int)seen;
}

// For a warp's 16 queries and a tile of keys: kept[row * TILE / 8 + part], the bits of eight keys each.
template <int TILE, class I>
BRIM_FN void draw_by_query(unsigned char* kept, const Dropout& how, u64 first_row, I keys, I s0) {
    __syncwarp();
    for (int n = (int)threadIdx.x % 32; n < WARP_ROWS * (TILE / 8); n += 32) {
        const u64 row = first_row + (u64)(n / (TILE / 8));
        kept[n] = (unsigned char)kept_of_eight(how, row * (u64)keys + (u64)s0 + (u64)(n % (TILE / 8) * 8));
    }
    __syncwarp();
}
template <int TILE, class I>
BRIM_FN void draw_by_query(unsigned char*, const AllKept&, u64, I, I) {}

template <bool CAUSAL, int W, int TILE, class X, class Kept, class I, int DIM>
BRIM_FN void attention_mma(
    const X* q, const X* k, const X* v, X* y, float* logs, I matrices, float scale, const Attended<I, 4>& m,
    const Walk<I, 4, DIM>& batch, const Kept& how) {
    constexpr int PITCH = PITCH_OF<X, W>, BYTES = TILE * PITCH, PARTS = Held<X, W>::PARTS;
    DYN_SHARED(unsigned char, tiles);
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, mine = warp * WARP_ROWS;
    unsigned char* const kept = tiles + 4 * BYTES + warp * WARP_ROWS * (TILE / 8);
    const float factor = s::mul(scale, LOG2_E);
    const I across = (m.queries + ROWS - 1) / ROWS;
    for (I number = (I)blockIdx.x; number < matrices * across; number += (I)gridDim.x) {
        const I matrix = number / across, from_end = number - matrix * across;
        const I t0 = (CAUSAL ? across - 1 - from_end : from_end) * ROWS;  // those with most to do first
        const Starts<I, 4, DIM> start(batch, matrix);
        const I stop = CAUSAL && t0 + ROWS < m.keys ? t0 + ROWS : m.keys, count = (stop + TILE - 1) / TILE;
        const auto fetch = [&](I n) {
            unsigned char* const to = tiles + (int)(n % 2) * 2 * BYTES;
            copy_rows<TILE, W>(to, k + start.at[1], n * TILE, m.keys, m.depth, m.down[1], m.right[1]);
            copy_rows<TILE, W>(to + BYTES, v + start.at[2], n * TILE, m.keys, m.width, m.down[2], m.right[2]);
        };
        Held<X, W> own;
        copy_rows<ROWS, W>(tiles, q + start.at[0], t0, m.queries, m.depth, m.down[0], m.right[0]);
        close_copies();
        await_copies<0>();
        __syncthreads();
        own.load(tiles, mine);
        __syncthreads();
        fetch(0);
        close_copies();
        float total[W / 8][4], top[2] = {-infinity<float>(), -infinity<float>()}, sum[2] = {0.0f, 0.0f};
        set_to_zero(total);
        for (I n = 0; n < count; ++n) {
            const I s0 = n * TILE;
            if (n + 1 < count) fetch(n + 1);
            close_copies();
            await_copies<1>();
            __syncthreads();
            const unsigned char* const keys = tiles + (int)(n % 2) * 2 * BYTES;
            float found[TILE / 8][4];
            set_to_zero(found);
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
#pragma unroll
                for (int c = 0; c < TILE / 16; ++c) {
                    u32 b[4];
                    load_columns<X, PITCH>(b, keys, c * 16, part * 32);
                    WARP_PRODUCT(X, found[2 * c], own.words[part], b[0], b[1]);
                    WARP_PRODUCT(X, found[2 * c + 1], own.words[part], b[2], b[3]);
                }
            draw_by_query<TILE>(kept, how, (u64)matrix * (u64)m.queries + (u64)(t0 + mine), m.keys, s0);
            const bool edge = s0 + TILE > m.keys || (CAUSAL && s0 + TILE > t0 + mine + 1);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = lane / 4 + half * 8;
                if (edge) {
                    const int seen = columns_seen<CAUSAL>(t0 + mine + row, s0, m.keys, TILE);
#pragma unroll
                    for (int c = 0; c < TILE / 8; ++c)
#pragma unroll
                        for (int e = 0; e < 2; ++e)
                            if (c * 8 + lane % 4 * 2 + e >= seen) found[c][2 * half + e] = -infinity<float>();
                }
                float largest = top[half], added = 0.0f;
#pragma unroll
                for (int c = 0; c < TILE / 8; ++c)
#pragma unroll
                    for (int e = 0; e < 2; ++e) largest = fmaxf(largest, found[c][2 * half + e]);
                largest = largest_in_quad(largest);
                const float base = largest == -infinity<float>() ? 0.0f : s::mul(largest, factor);  // -inf - -inf: NaN
                const float shrunk = power_of_two(fmaf(top[half], factor, -base));
#pragma unroll
                for (int c = 0; c < TILE / 8; ++c) {
                    u32 bits = 0;
                    if constexpr (Kept::ACTIVE) bits = (u32)kept[row * (TILE / 8) + c] >> (lane % 4 * 2);
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const float weight = power_of_two(fmaf(found[c][2 * half + e], factor, -base));
                        added = s::add(added, weight);
                        found[c][2 * half + e] = !Kept::ACTIVE || (bits >> e & 1u) ? weight : 0.0f;
                    }
                }
                sum[half] = fmaf(sum[half], shrunk, added);  // each lane's own columns, added up at the end
                top[half] = largest;
#pragma unroll
                for (int d = 0; d < W / 8; ++d)
#pragma unroll
                    for (int e = 0; e < 2; ++e) total[d][2 * half + e] = s::mul(total[d][2 * half + e], shrunk);
            }
#pragma unroll
            for (int c = 0; c < TILE / 16; ++c) add_16_rows<X, W>(total, found, 2 * c, keys + BYTES, c * 16);
            __syncthreads();
        }
        float share[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const I t = t0 + mine + lane / 4 + half * 8;
            float all = added_in_quad(sum[half]);
            if (!s::isfinite(top[half])) all = not_a_number<float>();
            if (t < m.queries && lane % 4 == 0)
                logs[matrix * m.queries + t] = fmaf(top[half], scale, s::log(all));
            share[half] = s::div(how.factor, all);
        }
        write_results<W>(tiles + mine * PITCH, y + start.at[3], total, share, t0 + mine, m.queries, m.width, m.down[3],
                         m.right[3]);
        __syncthreads();
    }
}
