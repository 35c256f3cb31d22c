// Attention, forward and backward, tile by tile: the matrix of scores exists only as a tile in shared memory.
//
// A block of 128 threads owns OWN rows (of queries, or of keys for their gradients) and goes over tiles of TILE rows of
// the other side. The threads form 8 x 16: thread (r, c) has the rows r, r + 8, ... of what is owned and the columns c,
// c + 16, ... of the other side, or of the numbers of a row; W is the numbers of a row, padded to a multiple of 16. All
// sums are float32, one fused multiply-add after another in a fixed order, and no two blocks add to one result.
//
// Skewed rows fall on all banks. A query that does not see a key is untouched by it, NaN or not.

constexpr int OWN = 32, DOWN = 8, ACROSS = 16, EACH_ROW = OWN / DOWN, ATTENTION_THREADS = DOWN * ACROSS;

BRIM_FN int own_row(int i) { return (int)threadIdx.x / ACROSS + i * DOWN; }
BRIM_FN int own_column(int j) { return (int)threadIdx.x % ACROSS + j * ACROSS; }

// Sum and largest over the 16 threads of a row, which all get it. NaN is never the largest.
BRIM_FN float added_in_row(float x) {
    for (int step = ACROSS / 2; step > 0; step /= 2) x = s::add(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}
BRIM_FN float largest_in_row(float x) {
    for (int step = ACROSS / 2; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, x, step);
        x = other > x ? other : x;
    }
    return x;
}

// ROWS rows from `first` on as float32, 0 beside the matrix; neighbouring threads read neighbouring numbers.
template <int ROWS, int W, class X, class I>
BRIM_FN void read_rows(const X* x, float* tile, I first, I rows, I numbers, I down, I right) {
    for (int n = (int)threadIdx.x; n < ROWS * W; n += ATTENTION_THREADS) {
        const int i = n / W, d = n % W;
        const bool inside = first + i < rows && (I)d < numbers;
        tile[i * (W + 1) + d] = inside ? cast<float>(x[(first + i) * down + (I)d * right]) : 0.0f;
    }
}

// Products of every owned row with every row of a tile.
template <int W, int TILE>
BRIM_FN void row_products(const float* own, const float* tile, float (&found)[EACH_ROW][TILE / ACROSS]) {
    for (int i = 0; i < EACH_ROW; ++i)
        for (int j = 0; j < TILE / ACROSS; ++j) found[i][j] = 0.0f;
#pragma unroll 4
    for (int d = 0; d < W; ++d) {
        float left[EACH_ROW];
#pragma unroll
        for (int i = 0; i < EACH_ROW; ++i) left[i] = own[own_row(i) * (W + 1) + d];
#pragma unroll
        for (int j = 0; j < TILE / ACROSS; ++j) {
            const float right = tile[own_column(j) * (W + 1) + d];
#pragma unroll
            for (int i = 0; i < EACH_ROW; ++i) found[i][j] = fmaf(left[i], right, found[i][j]);
        }
    }
}

// How many rows a tile is ahead of the owned ones; far behind is as good as a few tiles behind.
template <class I> BRIM_FN int close_by(I rows) { return rows < I(-4 * OWN) ? -4 * OWN : (int)rows; }

// total += factors @ tile. ASKED: of the rows k of the tile, owned row i takes only those for which take(i, k).
template <bool ASKED, int W, int TILE, class Take>
BRIM_FN void add_rows(float (&total)[EACH_ROW][W / ACROSS], const float* factors, const float* tile, const Take& take) {
#pragma unroll 1  // more would spill registers
    for (int k = 0; k < TILE; ++k) {
        float left[EACH_ROW];
        bool taken[EACH_ROW];
#pragma unroll
        for (int i = 0; i < EACH_ROW; ++i) {
            left[i] = factors[own_row(i) * (TILE + 1) + k];
            taken[i] = !ASKED || take(own_row(i), k);
        }
#pragma unroll
        for (int j = 0; j < W / ACROSS; ++j) {
            const float right = tile[k * (W + 1) + own_column(j)];
#pragma unroll
            for (int i = 0; i < EACH_ROW; ++i)
                if (taken[i]) total[i][j] = fmaf(left[i], right, total[i][j]);
        }
    }
}

template <int W, class Y, class I>
BRIM_FN void write_rows(const float (&total)[EACH_ROW][W / ACROSS], Y* y, I first, I rows, I numbers, I down, I right) {
#pragma unroll
    for (int i = 0; i < EACH_ROW; ++i)
#pragma unroll
        for (int j = 0; j < W / ACROSS; ++j) {
            const I row = first + own_row(i), d = (I)own_column(j);
            if (row < rows && d < numbers) y[row * down + d * right] = cast<Y>(total[i][j]);
        }
}

// For the owned queries and a tile of keys: bit number row * TILE + column says whether the weight is kept.
template <int TILE, class I> BRIM_FN void draw_rows(unsigned char* kept, const Dropout& how, u64 first_row, I keys, I s0) {
    for (int n = (int)threadIdx.x; n < OWN * TILE / 8; n += ATTENTION_THREADS) {
        const u64 row = first_row + (u64)(n / (TILE / 8));
        kept[n] = (unsigned char)kept_of_eight(how, row * (u64)keys + (u64)s0 + (u64)(n % (TILE / 8) * 8));
    }
}
// For the owned keys and a tile of queries: bit number column * OWN + row.
template <int TILE, class I>
BRIM_FN void draw_columns(unsigned char* kept, const Dropout& how, u64 first_row, I keys, I s0) {
    for (int n = (int)threadIdx.x; n < TILE * OWN / 8; n += ATTENTION_THREADS) {
        const u64 row = first_row + (u64)(n / (OWN / 8));
        kept[n] = (unsigned char)kept_of_eight(how, row * (u64)keys + (u64)s0 + (u64)(n % (OWN / 8) * 8));
    }
}
template <int TILE, class I> BRIM_FN void draw_rows(unsigned char*, const AllKept&, u64, I, I) {}
template <int TILE, class I> BRIM_FN void draw_columns(unsigned char*, const AllKept&, u64, I, I) {}
template <class Kept> BRIM_FN bool stays(const unsigned char* kept, int bit) {
    return !Kept::ACTIVE || (kept[bit / 8] >> bit % 8 & 1);
}

template <int W> BRIM_FN void clear(float (&total)[EACH_ROW][W / ACROSS]) {
    for (int i = 0; i < EACH_ROW; ++i)
        for (int j = 0; j < W / ACROSS; ++j) total[i][j] = 0.0f;
}

// q, k, v -> y and, of each query, the logarithm of the sum of e^score (NaN if the largest score is infinite).
template <bool CAUSAL, int W, int TILE, class X, class Kept, class I, int DIM>
BRIM_FN void attention(
    const X* q, const X* k, const X* v, X* y, float* logs, I tiles, float scale, const Attended<I, 4>& m,
    const Walk<I, 4, DIM>& batch, const Kept& how) {
    DYN_SHARED(float, own);
    float* const tile = own + OWN * (W + 1);
    float* const weights = tile + TILE * (W + 1);
    unsigned char* const kept = (unsigned char*)(weights + OWN * (TILE + 1));
    const I across = (m.queries + OWN - 1) / OWN;
    for (I number = (I)blockIdx.x; number < tiles; number += (I)gridDim.x) {
        const I matrix = number / across, t0 = (number - matrix * across) * OWN;
        const Starts<I, 4, DIM> start(batch, matrix);
        const I stop = CAUSAL && t0 + OWN < m.keys ? t0 + OWN : m.keys;
        float total[EACH_ROW][W / ACROSS], top[EACH_ROW], sum[EACH_ROW];
        clear<W>(total);
        for (int i = 0; i < EACH_ROW; ++i) top[i] = -infinity<float>(), sum[i] = 0.0f;
        read_rows<OWN, W>(q + start.at[0], own, t0, m.queries, m.depth, m.down[0], m.right[0]);
        for (I s0 = 0; s0 < stop; s0 += TILE) {
            const auto seen = [&](int i, int j) { return s0 + j < m.keys && (!CAUSAL || s0 + j <= t0 + i); };
            float found[EACH_ROW][TILE / ACROSS];
            read_rows<TILE, W>(k + start.at[1], tile, s0, m.keys, m.depth, m.down[1], m.right[1]);
            draw_rows<TILE>(kept, how, (u64)matrix * (u64)m.queries + (u64)t0, m.keys, s0);
            __syncthreads();
            row_products<W, TILE>(own, tile, found);
#pragma unroll
            for (int i = 0; i < EACH_ROW; ++i) {
                const int row = own_row(i);
                float largest = top[i], added = 0.0f;
#pragma unroll
                for (int j = 0; j < TILE / ACROSS; ++j) {
                    found[i][j] = s::mul(found[i][j], scale);
                    if (seen(row, own_column(j)) && found[i][j] > largest) largest = found[i][j];
                }
                largest = largest_in_row(largest);
                const float base = largest == -infinity<float>() ? 0.0f : largest;  // -inf - -inf is no number
#pragma unroll
                for (int j = 0; j < TILE / ACROSS; ++j) {
                    const int column = own_column(j);
                    const float weight = seen(row, column) ? s::exp(s::sub(found[i][j], base)) : 0.0f;
                    weights[row * (TILE + 1) + column] = stays<Kept>(kept, row * TILE + column) ? weight : 0.0f;
                    added = s::add(added, weight);
                }
                const float shrunk = s::exp(s::sub(top[i], base));
                sum[i] = s::add(s::mul(sum[i], shrunk), added_in_row(added));
                top[i] = largest;
#pragma unroll
                for (int j = 0; j < W / ACROSS; ++j) total[i][j] = s::mul(total[i][j], shrunk);
            }
            __syncthreads();  // the keys are done with, the weights are there
            read_rows<TILE, W>(v + start.at[2], tile, s0, m.keys, m.width, m.down[2], m.right[2]);
            __syncthreads();
            const int ahead = close_by(s0 - t0);
            const auto take = [&](int i, int j) { return ahead + j <= i; };
            if (CAUSAL && ahead + TILE > 0) add_rows<true, W, TILE>(total, weights, tile, take);
            else add_rows<false, W, TILE>(total, weights, tile, take);
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < EACH_ROW; ++i) {
            const I t = t0 + own_row(i);
            if (!s::isfinite(top[i])) sum[i] = not_a_number<float>();
            if (t < m.queries && own_column(0) == 0) logs[matrix * m.queries + t] = s::add(top[i], s::log(sum[i]));
#pragma unroll
            for (int j = 0; j < W / ACROSS; ++j) {
                total[i][j] = s::div(total[i][j], sum[i]);
                if constexpr (Kept::ACTIVE) total[i][j] = s::mul(total[i][j], how.factor);
            }
        }
        write_rows<W>(total, y + start.at[3], t0, m.queries, m.width, m.down[3], m.right[3]);
        __syncthreads();
    }
}

// The sum of g * y of each row, by a warp: what the gradient of softmax subtracts.
template <class X, class I, int DIM>
BRIM_FN void attention_row_sums(
    const X* g, const X* y, float* sums, I rows, const Attended<I, 2>& m, const Walk<I, 2, DIM>& batch) {
    const int lane = (int)threadIdx.x % 32, warps = ATTENTION_THREADS / 32;
    for (I row = (I)blockIdx.x * warps + (int)threadIdx.x / 32; row < rows; row += (I)gridDim.x * warps) {
        const I matrix = row / m.queries, t = row - matrix * m.queries;
        const Starts<I, 2, DIM> start(batch, matrix);
        const X* const given = g + start.at[0] + t * m.down[0];
        const X* const made = y + start.at[1] + t * m.down[1];
        float sum = 0.0f;
        for (I d = (I)lane; d < m.width; d += 32)
            sum = fmaf(cast<float>(given[d * m.right[0]]), cast<float>(made[d * m.right[1]]), sum);
        for (int step = 16; step > 0; step /= 2) sum = s::add(sum, __shfl_xor_sync(0xffffffffu, sum, step));
        if (lane == 0) sums[row] = sum;
    }
}

// g, q, k, v -> the gradient of q.
template <bool CAUSAL, int W, int TILE, class X, class Kept, class I, int DIM>
BRIM_FN void attention_grad_queries(
    const X* g, const X* q, const X* k, const X* v, const float* logs, const float* sums, X* dq, I tiles, float scale,
    const Attended<I, 5>& m, const Walk<I, 5, DIM>& batch, const Kept& how) {
    DYN_SHARED(float, own);
    float* const given = own + OWN * (W + 1);
    float* const tile = given + OWN * (W + 1);
    float* const slopes = tile + TILE * (W + 1);
    unsigned char* const kept = (unsigned char*)(slopes + OWN * (TILE + 1));
    const I across = (m.queries + OWN - 1) / OWN;
    for (I number = (I)blockIdx.x; number < tiles; number += (I)gridDim.x) {
        const I matrix = number / across, t0 = (number - matrix * across) * OWN;
        const Starts<I, 5, DIM> start(batch, matrix);
        const I stop = CAUSAL && t0 + OWN < m.keys ? t0 + OWN : m.keys;
        float total[EACH_ROW][W / ACROSS], log_sum[EACH_ROW], row_sum[EACH_ROW];
        clear<W>(total);
        for (int i = 0; i < EACH_ROW; ++i) {
            const I t = t0 + own_row(i);
            log_sum[i] = t < m.queries ? logs[matrix * m.queries + t] : 0.0f;
            row_sum[i] = t < m.queries ? sums[matrix * m.queries + t] : 0.0f;
        }
        read_rows<OWN, W>(g + start.at[0], given, t0, m.queries, m.width, m.down[0], m.right[0]);
        read_rows<OWN, W>(q + start.at[1], own, t0, m.queries, m.depth, m.down[1], m.right[1]);
        for (I s0 = 0; s0 < stop; s0 += TILE) {
            const auto seen = [&](int i, int j) { return s0 + j < m.keys && (!CAUSAL || s0 + j <= t0 + i); };
            float slope[EACH_ROW][TILE / ACROSS], found[EACH_ROW][TILE / ACROSS];
            read_rows<TILE, W>(v + start.at[3], tile, s0, m.keys, m.width, m.down[3], m.right[3]);
            draw_rows<TILE>(kept, how, (u64)matrix * (u64)m.queries + (u64)t0, m.keys, s0);
            __syncthreads();
            row_products<W, TILE>(given, tile, slope);
            __syncthreads();
            read_rows<TILE, W>(k + start.at[2], tile, s0, m.keys, m.depth, m.down[2], m.right[2]);
            __syncthreads();
            row_products<W, TILE>(own, tile, found);
#pragma unroll
            for (int i = 0; i < EACH_ROW; ++i)
#pragma unroll
                for (int j = 0; j < TILE / ACROSS; ++j) {
                    const int row = own_row(i), column = own_column(j);
                    const float weight = s::exp(s::sub(s::mul(found[i][j], scale), log_sum[i]));
                    float back = slope[i][j];
                    if constexpr (Kept::ACTIVE)
                        back = stays<Kept>(kept, row * TILE + column) ? s::mul(back, how.factor) : 0.0f;
                    back = s::mul(s::mul(weight, s::sub(back, row_sum[i])), scale);
                    slopes[row * (TILE + 1) + column] = seen(row, column) ? back : 0.0f;
                }
            __syncthreads();
            const int ahead = close_by(s0 - t0);
            const auto take = [&](int i, int j) { return ahead + j <= i; };
            if (CAUSAL && ahead + TILE > 0) add_rows<true, W, TILE>(total, slopes, tile, take);
            else add_rows<false, W, TILE>(total, slopes, tile, take);
            __syncthreads();
        }
        write_rows<W>(total, dq + start.at[4], t0, m.queries, m.depth, m.down[4], m.right[4]);
        __syncthreads();
    }
}

// g, q, k, v -> the gradients of k and v. A tile of queries is read twice: three tiles would not fit in shared memory,
// nor would two copies of the loops, asked and not asked, in registers.
template <bool CAUSAL, int W, int TILE, class X, class Kept, class I, int DIM>
BRIM_FN void attention_grad_keys(
    const X* g, const X* q, const X* k, const X* v, const float* logs, const float* sums, X* dk, X* dv, I tiles,
    float scale, const Attended<I, 6>& m, const Walk<I, 6, DIM>& batch, const Kept& how) {
    DYN_SHARED(float, own);
    float* const values = own + OWN * (W + 1);
    float* const tile = values + OWN * (W + 1);
    float* const weights = tile + TILE * (W + 1);
    float* const slopes = weights + OWN * (TILE + 1);
    unsigned char* const kept = (unsigned char*)(slopes + OWN * (TILE + 1));
    const I across = (m.keys + OWN - 1) / OWN;
    for (I number = (I)blockIdx.x; number < tiles; number += (I)gridDim.x) {
        const I matrix = number / across, s0 = (number - matrix * across) * OWN;
        const Starts<I, 6, DIM> start(batch, matrix);
        const float* const own_logs = logs + matrix * m.queries;
        const float* const own_sums = sums + matrix * m.queries;
        float keys_total[EACH_ROW][W / ACROSS], values_total[EACH_ROW][W / ACROSS];
        clear<W>(keys_total);
        clear<W>(values_total);
        read_rows<OWN, W>(k + start.at[2], own, s0, m.keys, m.depth, m.down[2], m.right[2]);
        read_rows<OWN, W>(v + start.at[3], values, s0, m.keys, m.width, m.down[3], m.right[3]);
        for (I t0 = CAUSAL ? s0 / TILE * TILE : I(0); t0 < m.queries; t0 += TILE) {  // row: a key; column: a query
            const auto seen = [&](int i, int j) { return t0 + j < m.queries && (!CAUSAL || s0 + i <= t0 + j); };
            const int ahead = close_by(s0 - t0);
            const auto take = [&](int i, int j) { return ahead + i <= j; };
            float found[EACH_ROW][TILE / ACROSS];
            read_rows<TILE, W>(q + start.at[1], tile, t0, m.queries, m.depth, m.down[1], m.right[1]);
            draw_columns<TILE>(kept, how, (u64)matrix * (u64)m.queries + (u64)t0, m.keys, s0);
            __syncthreads();
            row_products<W, TILE>(own, tile, found);
#pragma unroll
            for (int j = 0; j < TILE / ACROSS; ++j) {
                const int column = own_column(j);
                const float log_sum = t0 + column < m.queries ? own_logs[t0 + column] : 0.0f;
#pragma unroll
                for (int i = 0; i < EACH_ROW; ++i) {
                    const int row = own_row(i);
                    const float weight = s::exp(s::sub(s::mul(found[i][j], scale), log_sum));
                    weights[row * (TILE + 1) + column] = seen(row, column) ? weight : 0.0f;
                }
            }
            __syncthreads();
            read_rows<TILE, W>(g + start.at[0], tile, t0, m.queries, m.width, m.down[0], m.right[0]);
            __syncthreads();
            row_products<W, TILE>(values, tile, found);
#pragma unroll
            for (int j = 0; j < TILE / ACROSS; ++j) {
                const int column = own_column(j);
                const float row_sum = t0 + column < m.queries ? own_sums[t0 + column] : 0.0f;
#pragma unroll
                for (int i = 0; i < EACH_ROW; ++i) {
                    const int row = own_row(i);
                    const float weight = weights[row * (TILE + 1) + column];  // this thread's own
                    float back = found[i][j];
                    if constexpr (Kept::ACTIVE) {
                        const bool kept_here = stays<Kept>(kept, column * OWN + row);
                        back = kept_here ? s::mul(back, how.factor) : 0.0f;
                        weights[row * (TILE + 1) + column] = kept_here ? s::mul(weight, how.factor) : 0.0f;
                    }
                    back = s::mul(s::mul(weight, s::sub(back, row_sum)), scale);
                    slopes[row * (TILE + 1) + column] = seen(row, column) ? back : 0.0f;
                }
            }
            if constexpr (Kept::ACTIVE) __syncthreads();  // the weights were changed
            add_rows<CAUSAL, W, TILE>(values_total, weights, tile, take);
            __syncthreads();
            read_rows<TILE, W>(q + start.at[1], tile, t0, m.queries, m.depth, m.down[1], m.right[1]);
            __syncthreads();
            add_rows<CAUSAL, W, TILE>(keys_total, slopes, tile, take);
            __syncthreads();
        }
        write_rows<W>(keys_total, dk + start.at[4], s0, m.keys, m.depth, m.down[4], m.right[4]);
        write_rows<W>(values_total, dv + start.at[5], s0, m.keys, m.width, m.down[5], m.right[5]);
        __syncthreads();
    }
}
