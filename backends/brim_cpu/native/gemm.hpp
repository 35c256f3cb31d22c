// A matrix product as overlay/matmul.py describes it, and brim's own kernels for a tile of it.
#pragma once
#include "common.hpp"

namespace brim {

constexpr int kMaxBatchDims = 4;

// Written by overlay/matmul.py as an array of int64; strides and leading dimensions are in elements.
struct Product {
    i64 a_transposed, b_transposed, m, n, k, lda, ldb, ldc;
    i64 tile_m, tile_n;  // of one piece; a piece is several whole products where those are small
    i64 per_piece;
    i64 batch, batch_shape[kMaxBatchDims], a_step[kMaxBatchDims], b_step[kMaxBatchDims], c_step[kMaxBatchDims];
};

// Products of so few rows read B where it lies (gemm_few.cpp), whatever k; with long dot products up to kDotRows do.
constexpr i64 kFewRows = 4, kDotRows = 64;

// c[m, n] = a[m, k] b[k, n] for a tile of m rows and n columns; the operands may be stored transposed. Every element is
// summed in the same order, whatever the tile.
void gemm_tile(const Product& p, i64 m, i64 n, const float* a, const float* b, float* c);
void gemm_tile(const Product& p, i64 m, i64 n, const double* a, const double* b, double* c);

// The same for products of few rows. With B stored transposed, A must not be.
void gemm_few(const Product& p, i64 m, i64 n, const float* a, const float* b, float* c);
void gemm_few(const Product& p, i64 m, i64 n, const double* a, const double* b, double* c);

}  // namespace brim
