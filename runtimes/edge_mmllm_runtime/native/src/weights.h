// Matrices as the kernels read them: kLanes rows side by side, so that one load feeds one lane
// of every row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "simd.h"

namespace edge {

// Memory for packed weights: large pages where the system gives them, freed with the kernel.
class Arena {
 public:
  explicit Arena(size_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  uint8_t* take(size_t bytes);

 private:
  uint8_t* base_;
  size_t size_, used_ = 0;
};

// A matrix (n, k). Quantized: for each group of kLanes rows and each block along k, kLanes
// scales, kLanes zeros where these are not the middle, then the codes: 4 along k for each
// lane; at 4 bits the high nibbles are the 4 after those. Floats: kLanes values for each k.
struct Matrix {
  enum Kind { kFloat32, kFloat16, kInt4, kInt8 };
  Kind kind = kFloat32;
  int n = 0, k = 0, block = 0, blocks = 0;
  bool half_scales = false, zeros = false;
  size_t block_bytes = 0, group_bytes = 0;
  const uint8_t* data = nullptr;

  bool quantized() const { return kind == kInt4 || kind == kInt8; }
  int groups() const { return (n + kLanes - 1) / kLanes; }
  size_t bytes() const { return group_bytes * groups(); }
};

// What a matrix is made of: MatMulNBits's tensors, or the rows of a float one.
struct MatrixSource {
  const void* codes;           // uint8 (n, blocks, block * bits / 8); or float32 / float16 (n, k)
  const void* scales;          // (n, blocks): float16, or float32 with float zeros
  const uint8_t* int_zeros;    // (n, ceil(blocks * bits / 8)), or null
  const float* float_zeros;    // (n, blocks), or null
};

// Fills in the sizes; `pack` then needs `bytes()` of an arena.
void lay_out(Matrix& m, const MatrixSource& source);
void pack(Matrix& m, const MatrixSource& source, uint8_t* to);

// Lets go of the pages of packed sources that are mapped from a file: they are not read again, or
// come back from the file when they are. Memory of any other kind stays as it is.
void let_go(const std::vector<std::pair<const void*, size_t>>& sources);

// Activations quantized in blocks along k: x ~ q * scale. Rows are padded with zeros to whole
// blocks. `sum` holds the sum of each block's q.
struct Quantized {
  int width = 0, block = 0, blocks = 0;
  std::vector<int8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> sum;

  int stride() const { return blocks * block; }
  void resize(int rows);
  void set_row(int row, const float* x);
};

}  // namespace edge
