// Softmax of one row and its gradient, for kernels that go on with them (softmax.cpp).
#pragma once
#include "common.hpp"

namespace brim {

// A row of `columns` numbers of which the first `seen` count; the others are not read, and results are 0 there.
struct Row {
    i64 seen, columns;
};

// What a row's powers are relative to, and their sum: its logsumexp is top + log(sum).
struct Powers {
    float top, sum;
};

// softmax(x * scale); `out` may be `x`.
Powers softmax_row(float* out, const float* x, Row row, float scale);

// out = y (g - sum(g y)) scale; `out` may be `g`.
void softmax_grad_row(float* out, const float* g, const float* y, Row row, float scale);

}  // namespace brim
