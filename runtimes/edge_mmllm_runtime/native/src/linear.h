// y = x W' (+ bias) for some rows of x and some groups of W's rows.
#pragma once

#include <type_traits>

#include "weights.h"

namespace edge {

// Writes columns [first * kLanes, last * kLanes) of `rows` rows of y. x is read where the matrix
// holds floats, `q` where it is quantized.
void linear(const Matrix& m, const float* x, size_t x_stride, const Quantized* q, int first_row,
            int rows, int first, int last, const float* bias, float* y, size_t y_stride);

}  // namespace edge
