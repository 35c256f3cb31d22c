// The gradients of attention on tensor cores: of queries by a block a tile of queries, of keys and values by one a tile
// of keys. Weights are made again from the logarithms of the sums, 16 x 16 at a time; see attention_mma.cuh.

// A warp's 16 rows: held in registers, or read from shared memory each time where registers would not do.
template <bool HOLD, class X, int W> struct Own {
    Held<X, W> held;
    BRIM_FN void load(const unsigned char* tile, int row) { held.load(tile, row); }
    BRIM_FN void get(u32 (&a)[4], int part) const {
#pragma unroll
        for (int n = 0; n < 4; ++n) a[n] = held.words[part][n];
    }
};
template <class X, int W> struct Own<false, X, W> {
    const unsigned char* tile;
    int row;
    BRIM_FN void load(const unsigned char* tile_, int row_) { tile = tile_, row = row_; }
    BRIM_FN void get(u32 (&a)[4], int part) const { load_left<X, PITCH_OF<X, W>>(a, tile, row, part * 32); }
};

// (16, 16): products of a warp's rows with 16 rows of a tile from `row` on.
template <class X, int W, class Rows>
BRIM_FN void products_16(float (&found)[2][4], const Rows& own, const unsigned char* tile, int row) {
    set_to_zero(found);
#pragma unroll
    for (int part = 0; part < Held<X, W>::PARTS; ++part) {
        u32 a[4], b[4];
        own.get(a, part);
        load_columns<X, PITCH_OF<X, W>>(b, tile, row, part * 32);
        WARP_PRODUCT(X, found[0], a, b[0], b[1]);
        WARP_PRODUCT(X, found[1], a, b[2], b[3]);
    }
}

// g, q, k, v -> the gradient of q.
template <bool CAUSAL, int W, int TILE, class X, class Kept, class I, int DIM>
BRIM_FN void attention_grad_queries_mma(
    const X* g, const X* q, const X* k, const X* v, const float* logs, const float* sums, X* dq, I matrices,
    float scale, const Attended<I, 5>& m, const Walk<I, 5, DIM>& batch, const Kept& how) {
    constexpr int PITCH = PITCH_OF<X, W>, BYTES = TILE * PITCH;
    static_assert(TILE >= 32, "the block's own rows are read by way of the tiles");
    DYN_SHARED(unsigned char, tiles);
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, mine = warp * WARP_ROWS;
    unsigned char* const kept = tiles + 4 * BYTES + warp * WARP_ROWS * (TILE / 8);
    const float factor = s::mul(scale, LOG2_E);
    const I across = (m.queries + ROWS - 1) / ROWS;
    for (I number = (I)blockIdx.x; number < matrices * across; number += (I)gridDim.x) {
        const I matrix = number / across, from_end = number - matrix * across;
        const I t0 = (CAUSAL ? across - 1 - from_end : from_end) * ROWS;
        const Starts<I, 5, DIM> start(batch, matrix);
        const I stop = CAUSAL && t0 + ROWS < m.keys ? t0 + ROWS : m.keys, count = (stop + TILE - 1) / TILE;
        const auto fetch = [&](I n) {
            unsigned char* const to = tiles + (int)(n % 2) * 2 * BYTES;
            copy_rows<TILE, W>(to, k + start.at[2], n * TILE, m.keys, m.depth, m.down[2], m.right[2]);
            copy_rows<TILE, W>(to + BYTES, v + start.at[3], n * TILE, m.keys, m.width, m.down[3], m.right[3]);
        };
        Own<true, X, W> queries, given;
        copy_rows<ROWS, W>(tiles, q + start.at[1], t0, m.queries, m.depth, m.down[1], m.right[1]);
        copy_rows<ROWS, W>(tiles + ROWS * PITCH, g + start.at[0], t0, m.queries, m.width, m.down[0], m.right[0]);
        close_copies();
        float log_sum[2], row_sum[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const I t = t0 + mine + lane / 4 + half * 8;
            log_sum[half] = t < m.queries ? s::mul(logs[matrix * m.queries + t], LOG2_E) : infinity<float>();
            row_sum[half] = t < m.queries ? sums[matrix * m.queries + t] : 0.0f;
        }
        await_copies<0>();
        __syncthreads();
        queries.load(tiles, mine);
        given.load(tiles + ROWS * PITCH, mine);
        __syncthreads();
        fetch(0);
        close_copies();
        float total[W / 8][4];
        set_to_zero(total);
        for (I n = 0; n < count; ++n) {
            const I s0 = n * TILE;
            if (n + 1 < count) fetch(n + 1);
            close_copies();
            await_copies<1>();
            __syncthreads();
            const unsigned char* const keys = tiles + (int)(n % 2) * 2 * BYTES;
            draw_by_query<TILE>(kept, how, (u64)matrix * (u64)m.queries + (u64)(t0 + mine), m.keys, s0);
            int seen[2];
#pragma unroll
            for (int half = 0; half < 2; ++half)
                seen[half] = columns_seen<CAUSAL>(t0 + mine + lane / 4 + half * 8, s0, m.keys, TILE);
#pragma unroll 1  // more would spill registers
            for (int c = 0; c < TILE / 16; ++c) {
                float found[2][4], slope[2][4];
                products_16<X, W>(found, queries, keys, c * 16);
                products_16<X, W>(slope, given, keys + BYTES, c * 16);
#pragma unroll
                for (int i = 0; i < 2; ++i)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int half = e / 2, column = c * 16 + i * 8 + lane % 4 * 2 + e % 2;
                        const float weight = power_of_two(fmaf(found[i][e], factor, -log_sum[half]));
                        float back = slope[i][e];
                        if constexpr (Kept::ACTIVE) {
                            const u32 bits = kept[(lane / 4 + half * 8) * (TILE / 8) + c * 2 + i];
                            back = bits >> column % 8 & 1u ? s::mul(back, how.factor) : 0.0f;
                        }
                        slope[i][e] = column < seen[half] ? s::mul(weight, s::sub(back, row_sum[half])) : 0.0f;
                    }
                add_16_rows<X, W>(total, slope, 0, keys, c * 16);
            }
            __syncthreads();
        }
        write_results<W>(tiles + mine * PITCH, dq + start.at[4], total, {scale, scale}, t0 + mine, m.queries, m.depth,
                         m.down[4], m.right[4]);
        __syncthreads();
    }
}

// For a warp's 16 keys and a tile of queries: kept[column * 2 + part], the bits of eight keys each.
template <int TILE, class I>
BRIM_FN void draw_by_key(unsigned char* kept, const Dropout& how, u64 first_row, I keys, I s0) {
    __syncwarp();
    for (int n = (int)threadIdx.x % 32; n < 2 * TILE; n += 32)
        kept[n] = (unsigned char)kept_of_eight(how, (first_row + (u64)(n / 2)) * (u64)keys + (u64)s0 + (u64)(n % 2 * 8));
    __syncwarp();
}
template <int TILE, class I>
BRIM_FN void draw_by_key(unsigned char*, const AllKept&, u64, I, I) {}

// g, q, k, v -> the gradients of k and v. Rows are keys, columns are queries.
template <bool CAUSAL, int W, int TILE, int STAGES, bool HOLD, class X, class Kept, class I, int DIM>
BRIM_FN void attention_grad_keys_mma(
    const X* g, const X* q, const X* k, const X* v, const float* logs, const float* sums, X* dk, X* dv, I matrices,
    float scale, const Attended<I, 6>& m, const Walk<I, 6, DIM>& batch, const Kept& how) {
    constexpr int PITCH = PITCH_OF<X, W>, BYTES = TILE * PITCH;
    static_assert(!HOLD || STAGES * TILE >= ROWS, "the block's own rows are read by way of the tiles");
    DYN_SHARED(unsigned char, owned);
    unsigned char* const tiles = owned + (HOLD ? 0 : 2 * ROWS * PITCH);
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, mine = warp * WARP_ROWS;
    unsigned char* const kept = tiles + STAGES * 2 * BYTES + warp * 2 * TILE;
    const float factor = s::mul(scale, LOG2_E);
    const I across = (m.keys + ROWS - 1) / ROWS;
    for (I number = (I)blockIdx.x; number < matrices * across; number += (I)gridDim.x) {
        const I matrix = number / across, s0 = (number - matrix * across) * ROWS;
        const Starts<I, 6, DIM> start(batch, matrix);
        const I first = CAUSAL ? s0 / TILE : I(0), end = (m.queries + TILE - 1) / TILE;
        const auto fetch = [&](I n) {
            unsigned char* const to = tiles + (int)((n - first) % STAGES) * 2 * BYTES;
            copy_rows<TILE, W>(to, q + start.at[1], n * TILE, m.queries, m.depth, m.down[1], m.right[1]);
            copy_rows<TILE, W>(to + BYTES, g + start.at[0], n * TILE, m.queries, m.width, m.down[0], m.right[0]);
        };
        Own<HOLD, X, W> keys, values;
        copy_rows<ROWS, W>(owned, k + start.at[2], s0, m.keys, m.depth, m.down[2], m.right[2]);
        copy_rows<ROWS, W>(owned + ROWS * PITCH, v + start.at[3], s0, m.keys, m.width, m.down[3], m.right[3]);
        close_copies();
        await_copies<0>();
        __syncthreads();
        keys.load(owned, mine);
        values.load(owned + ROWS * PITCH, mine);
        __syncthreads();
        float keys_total[W / 8][4], values_total[W / 8][4];
        set_to_zero(keys_total);
        set_to_zero(values_total);
        if (first < end) fetch(first);
        close_copies();
        for (I n = first; n < end; ++n) {
            const I t0 = n * TILE;
            if constexpr (STAGES == 2) {
                if (n + 1 < end) fetch(n + 1);
                close_copies();
            }
            await_copies<STAGES - 1>();
            __syncthreads();
            const unsigned char* const queries = tiles + (int)((n - first) % STAGES) * 2 * BYTES;
            draw_by_key<TILE>(kept, how, (u64)matrix * (u64)m.queries + (u64)t0, m.keys, s0 + mine);
            const I between = t0 - s0 - mine;
            const int ahead = !CAUSAL ? 0 : between > WARP_ROWS ? WARP_ROWS : (int)between;
            const int left = t0 + TILE > m.queries ? (int)(m.queries - t0) : TILE;
#pragma unroll 1  // more would spill registers
            for (int c = 0; c < TILE / 16; ++c) {
                float log_sum[2][2], row_sum[2][2];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const I t = t0 + c * 16 + i / 2 * 8 + lane % 4 * 2 + i % 2;
                    const bool inside = t < m.queries;  // beside: the weight 0
                    log_sum[i / 2][i % 2] = inside ? s::mul(logs[matrix * m.queries + t], LOG2_E) : infinity<float>();
                    row_sum[i / 2][i % 2] = inside ? sums[matrix * m.queries + t] : 0.0f;
                }
                float weight[2][4], slope[2][4];
                products_16<X, W>(weight, keys, queries, c * 16);
                products_16<X, W>(slope, values, queries + BYTES, c * 16);
#pragma unroll
                for (int i = 0; i < 2; ++i)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int row = lane / 4 + e / 2 * 8, column = c * 16 + i * 8 + lane % 4 * 2 + e % 2;
                        const bool seen = column < left && (!CAUSAL || row <= column + ahead);
                        const float own = seen ? power_of_two(fmaf(weight[i][e], factor, -log_sum[i][e % 2])) : 0.0f;
                        float back = slope[i][e];
                        weight[i][e] = own;
                        if constexpr (Kept::ACTIVE) {
                            const bool stays = (u32)kept[column * 2 + e / 2] >> lane / 4 & 1u;
                            back = stays ? s::mul(back, how.factor) : 0.0f;
                            if (!stays) weight[i][e] = 0.0f;
                        }
                        slope[i][e] = seen ? s::mul(own, s::sub(back, row_sum[i][e % 2])) : 0.0f;
                    }
                add_16_rows<X, W>(values_total, weight, 0, queries + BYTES, c * 16);
                add_16_rows<X, W>(keys_total, slope, 0, queries, c * 16);
            }
            __syncthreads();
            if constexpr (STAGES == 1) {
                if (n + 1 < end) fetch(n + 1);
                close_copies();
            }
        }
        unsigned char* const part = owned + mine * PITCH;
        write_results<W>(part, dk + start.at[4], keys_total, {scale, scale}, s0 + mine, m.keys, m.depth, m.down[4],
                         m.right[4]);
        write_results<W>(part, dv + start.at[5], values_total, {how.factor, how.factor}, s0 + mine, m.keys, m.width,
                         m.down[5], m.right[5]);
        __syncthreads();
    }
}
