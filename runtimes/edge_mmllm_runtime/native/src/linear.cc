#include "linear.h"

namespace edge {

namespace {

// Rows of x worked on together: each unpacked weight serves them all.
constexpr int kTile = kLanes == 16 ? 8 : 4;

EDGE_INLINE void finish(const Matrix& m, int group, const float* bias, VecF value, float* y) {
  const int column = group * kLanes;
  y += column;
  if (column + kLanes <= m.n) {
    store(y, bias == nullptr ? value : value + load(bias + column));
  } else {
    for (int i = 0; column + i < m.n; i++) y[i] = value[i] + (bias == nullptr ? 0 : bias[column + i]);
  }
}

template <bool kHalf>
EDGE_INLINE VecF scales_at(const uint8_t* p) {
  return kHalf ? load_half(reinterpret_cast<const uint16_t*>(p)) : load(reinterpret_cast<const float*>(p));
}

// One group of rows of W against T rows of x.
template <int kBits, bool kHalf, bool kZeros, int T>
EDGE_INLINE void tile(const Matrix& m, int group, const Quantized& q, int row, const float* bias,
                      float* y, size_t y_stride) {
  const int stride = q.stride(), blocks = m.blocks;
  const int8_t* x = q.q.data() + size_t(row) * stride;
  const float* x_scale = q.scale.data() + size_t(row) * blocks;
  const int32_t* x_sum = q.sum.data() + size_t(row) * blocks;
  const uint8_t* w = m.data + group * m.group_bytes;
  constexpr int kMiddle = kZeros ? 0 : (kBits == 4 ? 8 : 128);
  constexpr int kScaleBytes = kLanes * (kHalf ? 2 : 4);
  // 32 weights of each row at 4 bits, 16 at 8 bits: what fits the registers beside the sums.
  constexpr int kVectors = 4, kStep = kVectors * 4 * (kBits == 4 ? 2 : 1);
  const VecB low = VecB{} + uint8_t(15);
  VecF total[T];
  for (int t = 0; t < T; t++) total[t] = splat(0.0f);
  for (int b = 0; b < blocks; b++) {
    const VecF scale = scales_at<kHalf>(w);
    const uint8_t* codes = w + kScaleBytes * (kZeros ? 2 : 1);
    VecI sums[T];
    for (int t = 0; t < T; t++) sums[t] = splat_int(-kMiddle * x_sum[t * blocks + b]);
    for (int at = 0; at < m.block; at += kStep) {
      const int8_t* xs = x + b * m.block + at;
      if (kBits == 4) {
        VecB part[2 * kVectors];
        const int vectors = m.block - at < kStep ? kVectors / 2 : kVectors;  // a block of 16
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; j++) {
          const VecB code = load_bytes(codes + (j < vectors ? j : 0) * kLanes * 4);
          part[2 * j] = code & low;
          part[2 * j + 1] = (VecB)((VecH)code >> 4) & low;
        }
        if (vectors == kVectors) {
#pragma GCC unroll 8
          for (int t = 0; t < T; t++) {
#pragma GCC unroll 8
            for (int j = 0; j < 2 * kVectors; j++) {
              sums[t] = dot4(sums[t], part[j], splat4(xs + t * stride + 4 * j));
            }
          }
        } else {
          for (int t = 0; t < T; t++) {
            for (int j = 0; j < kVectors; j++) {
              sums[t] = dot4(sums[t], part[j], splat4(xs + t * stride + 4 * j));
            }
          }
        }
        codes += vectors * kLanes * 4;
      } else {
        VecB part[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; j++) part[j] = load_bytes(codes + j * kLanes * 4);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; j++) {
            sums[t] = dot4(sums[t], part[j], splat4(xs + t * stride + 4 * j));
          }
        }
        codes += kVectors * kLanes * 4;
      }
    }
    if (kZeros) {
      const VecF zero = scales_at<kHalf>(w + kScaleBytes);
      for (int t = 0; t < T; t++) {
        const VecF block = to_float(sums[t]) - zero * float(x_sum[t * blocks + b]);
        total[t] += block * (scale * x_scale[t * blocks + b]);
      }
    } else {
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) total[t] += to_float(sums[t]) * (scale * x_scale[t * blocks + b]);
    }
    w += m.block_bytes;
  }
  for (int t = 0; t < T; t++) finish(m, group, bias, total[t], y + t * y_stride);
}

template <bool kHalf, int T>
EDGE_INLINE void float_tile(const Matrix& m, int group, const float* x, size_t x_stride,
                            const float* bias, float* y, size_t y_stride) {
  const uint8_t* w = m.data + group * m.group_bytes;
  constexpr int kSize = kLanes * (kHalf ? 2 : 4);
  // One row leaves the adders waiting for each other: four sums hide their latency.
  constexpr int kSums = T == 1 ? 4 : 1;
  VecF total[T][kSums];
  for (int t = 0; t < T; t++) {
    for (int s = 0; s < kSums; s++) total[t][s] = splat(0.0f);
  }
  int i = 0;
  for (; i + kSums <= m.k; i += kSums) {
#pragma GCC unroll 4
    for (int s = 0; s < kSums; s++) {
      const VecF weight = scales_at<kHalf>(w + size_t(i + s) * kSize);
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) total[t][s] += weight * x[t * x_stride + i + s];
    }
  }
  for (; i < m.k; i++) {
    const VecF weight = scales_at<kHalf>(w + size_t(i) * kSize);
    for (int t = 0; t < T; t++) total[t][0] += weight * x[t * x_stride + i];
  }
  for (int t = 0; t < T; t++) {
    VecF value = total[t][0];
    for (int s = 1; s < kSums; s++) value += total[t][s];
    finish(m, group, bias, value, y + t * y_stride);
  }
}

template <typename Kernel>
EDGE_INLINE void over_rows(int rows, int first, int last, Kernel kernel) {
  int row = 0;
  // Each tile of x stays in the first cache while the groups of W pass.
  for (; row + kTile <= rows; row += kTile) {
    for (int g = first; g < last; g++) kernel(std::integral_constant<int, kTile>(), row, g);
  }
  for (; row + 2 <= rows; row += 2) {
    for (int g = first; g < last; g++) kernel(std::integral_constant<int, 2>(), row, g);
  }
  for (; row < rows; row++) {
    for (int g = first; g < last; g++) kernel(std::integral_constant<int, 1>(), row, g);
  }
}

template <int kBits, bool kHalf, bool kZeros>
void quantized(const Matrix& m, const Quantized& q, int first_row, int rows, int first, int last,
               const float* bias, float* y, size_t y_stride) {
  over_rows(rows, first, last, [&](auto size, int row, int group) {
    tile<kBits, kHalf, kZeros, decltype(size)::value>(m, group, q, first_row + row, bias,
                                                       y + row * y_stride, y_stride);
  });
}

template <bool kHalf>
void floats(const Matrix& m, const float* x, size_t x_stride, int rows, int first, int last,
            const float* bias, float* y, size_t y_stride) {
  over_rows(rows, first, last, [&](auto size, int row, int group) {
    float_tile<kHalf, decltype(size)::value>(m, group, x + row * x_stride, x_stride, bias,
                                             y + row * y_stride, y_stride);
  });
}

}  // namespace

void linear(const Matrix& m, const float* x, size_t x_stride, const Quantized* q, int first_row,
            int rows, int first, int last, const float* bias, float* y, size_t y_stride) {
  if (m.kind == Matrix::kFloat32) {
    floats<false>(m, x, x_stride, rows, first, last, bias, y, y_stride);
  } else if (m.kind == Matrix::kFloat16) {
    floats<true>(m, x, x_stride, rows, first, last, bias, y, y_stride);
  } else {
    auto run = [&](auto kernel) { kernel(m, *q, first_row, rows, first, last, bias, y, y_stride); };
    if (m.kind == Matrix::kInt4) {
      if (m.zeros) {
        m.half_scales ? run(quantized<4, true, true>) : run(quantized<4, false, true>);
      } else {
        m.half_scales ? run(quantized<4, true, false>) : run(quantized<4, false, false>);
      }
    } else {
      if (m.zeros) {
        m.half_scales ? run(quantized<8, true, true>) : run(quantized<8, false, true>);
      } else {
        m.half_scales ? run(quantized<8, true, false>) : run(quantized<8, false, false>);
      }
    }
  }
}

}  // namespace edge
