// A model's forward pass as a list of phases, read from the node's `program` attribute.
//
// Words are int64; floats are the bits of a float32. Nothing in them is trusted: every index,
// width and tensor size is checked when the kernel is made, so that running needs no checks.
//
//   program   version, source (0: token ids, 1: embeddings), hidden, position (0 | 1), states,
//             vocab, buffers [width, kind]..., quantized [width, block, kind]...,
//             matrices [kind, n, k, block, codes, scales, zeros, zero kind]...,
//             phases [class, kind, ops [opcode, words, ...]...]...
//   lists     start with their length; `kind` of rows is 0 (every token) or 1 (those with logits)
//   view      buffer, offset, width: a part of a buffer's rows
//   tensors   are given by their place among the node's inputs, -1 for none
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "team.h"
#include "weights.h"

namespace edge {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A constant input of the node.
struct Tensor {
  const void* data = nullptr;
  int type = 0;  // ONNX element type
  std::vector<int64_t> shape;
  int64_t size() const;
};

// Floats that grow and are never copied.
class Scratch {
 public:
  void reserve_floats(size_t count) {
    if (count <= size_) return;
    memory_.reset();  // the old ones first: both together would be the peak
    memory_ = std::make_unique<Arena>(count * sizeof(float));
    data_ = reinterpret_cast<float*>(memory_->take(count * sizeof(float)));
    size_ = count;
  }
  float* data() const { return data_; }

 private:
  std::unique_ptr<Arena> memory_;
  float* data_ = nullptr;
  size_t size_ = 0;
};

// What a forward works on. Valid while it runs.
struct Context {
  int rows[2] = {0, 0};
  int64_t position = 0, capacity = 0;
  const int64_t* ids = nullptr;
  const float* embeds = nullptr;
  const int64_t* logit_rows = nullptr;
  std::vector<float*> buffers, states;
  std::vector<Quantized> quantized;
  Scratch scratch;
};

struct View {
  int buffer = 0, offset = 0, width = 0, stride = 0;
  float* row(const Context& c, int t) const { return c.buffers[buffer] + size_t(t) * stride + offset; }
};

class Reader;

// An op that treats each row by itself; several run one after another on a few rows.
struct RowOp {
  virtual ~RowOp() = default;
  virtual void run(Context& c, int first, int last) const = 0;
};

// An op over the sequence, cut into independent chunks (channels, heads).
struct MixOp {
  virtual ~MixOp() = default;
  virtual int chunks(const Context& c) const = 0;
  virtual void run(Context& c, int chunk) const = 0;
};

struct LinearOp {
  View out, in;
  int quantized, matrix;
  const float* bias;
};

struct Phase {
  enum Class { kRows, kLinear, kMix };
  Class cls;
  int kind;
  int opcode;  // of its first op
  std::vector<std::unique_ptr<RowOp>> rows;
  std::vector<LinearOp> linears;
  std::vector<std::unique_ptr<MixOp>> mixes;
};

// Seconds and runs of phases, by the opcode of their first op (row phases count as 0).
struct Profile {
  double seconds[100];
  int64_t runs[100];
};
extern Profile g_profile;

class Program {
 public:
  // `inputs`: the node's inputs; those that are not constant have no data.
  Program(const std::vector<int64_t>& words, const std::vector<Tensor>& inputs);

  int source, hidden, states, vocab;
  bool has_position;
  int first_state() const { return 2 + has_position; }
  const std::vector<int64_t>& state_shape(int i) const { return state_shapes_[i]; }
  View logits;
  // Positions that the tables of the program know; a forward may not go beyond.
  void limit(int64_t positions) { positions_ = positions < positions_ ? positions : positions_; }
  int64_t positions() const { return positions_; }

  // Makes room for a forward of these rows. Not to be called while one runs.
  void prepare(Context& c) const;
  // Does its share of a forward; every thread of the team calls it with the same context.
  void run(Context& c, Team& team, int threads) const;
  // Counts the time of each op while on (see `Profile`).
  static void profile(bool on);
  int phases() const { return int(phases_.size()); }
  int64_t weight_bytes() const { return int64_t(packed_bytes_); }

 private:
  friend class Reader;
  struct Buffer {
    int width, kind;
  };
  struct QuantizedBuffer {
    int width, block, kind;
  };
  void run_phase(const Phase& phase, int number, Context& c, Team& team, int threads) const;
  void pack_matrices(const std::vector<MatrixSource>& sources);

  std::vector<Buffer> buffers_;
  std::vector<QuantizedBuffer> quantized_;
  std::vector<Matrix> matrices_;
  std::vector<Phase> phases_;
  std::vector<std::vector<int64_t>> state_shapes_;
  std::unique_ptr<Arena> arena_;
  size_t packed_bytes_ = 0;
  int64_t positions_ = INT64_MAX;
};

// Reads words in order, and turns what they name into checked pointers.
class Reader {
 public:
  Reader(const std::vector<int64_t>& words, const std::vector<Tensor>& inputs, Program& program)
      : words_(words), inputs_(inputs), program_(program) {}

  int64_t word();
  int integer(int64_t least, int64_t most);
  float real();
  View view(int kind);
  View view(int kind, int width);  // of just this width
  // A float32 constant of `size` values; null where the word is -1 and it may be missing.
  const float* floats(int64_t size, bool optional = false);
  const Tensor* tensor(bool optional = false);
  int state(const std::vector<int64_t>& shape);  // -1 in `shape`: the capacity
  int quantized(int kind, int width);
  void require(bool condition, const char* what) const;
  size_t at() const { return at_; }
  bool done() const { return at_ == words_.size(); }
  int kind = 0;  // of the phase being read
  Program& program() { return program_; }

 private:
  const std::vector<int64_t>& words_;
  const std::vector<Tensor>& inputs_;
  Program& program_;
  size_t at_ = 0;
};

std::unique_ptr<RowOp> read_row_op(int opcode, Reader& r);
std::unique_ptr<MixOp> read_mix_op(int opcode, Reader& r);
std::unique_ptr<MixOp> read_attention(Reader& r);

EDGE_INLINE VecF load_some(const float* p, int count) {
  if (count >= kLanes) return load(p);
  VecF v = splat(0.0f);
  for (int i = 0; i < count; i++) v[i] = p[i];
  return v;
}

EDGE_INLINE void store_some(float* p, VecF v, int count) {
  if (count >= kLanes) return store(p, v);
  for (int i = 0; i < count; i++) p[i] = v[i];
}

// Calls task(i, count) for every vector's worth of 0..n.
template <typename Task>
EDGE_INLINE void each(int n, Task task) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) task(i, kLanes);
  if (i < n) task(i, n - i);
}

}  // namespace edge
