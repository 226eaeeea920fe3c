#include "program.h"

#include <chrono>
#include <cstring>
#include <new>

#include "linear.h"

namespace edge {

namespace {

constexpr int kVersion = 1;
constexpr int kMaxWidth = 1 << 24;
constexpr int kMaxCount = 1 << 20;
constexpr size_t kMaxFloats = size_t(1) << (sizeof(size_t) > 4 ? 40 : 28);
constexpr int kFloat = 1, kUint8 = 2, kFloat16 = 10;  // ONNX element types

}  // namespace

int64_t Tensor::size() const {
  int64_t total = 1;
  for (int64_t d : shape) total *= d;
  return total;
}

// -- reading -------------------------------------------------------------------------------------

void Reader::require(bool condition, const char* what) const {
  if (!condition) throw Error(std::string("program: ") + what + " at word " + std::to_string(at_));
}

int64_t Reader::word() {
  require(at_ < words_.size(), "it ends early");
  return words_[at_++];
}

int Reader::integer(int64_t least, int64_t most) {
  const int64_t value = word();
  require(value >= least && value <= most, "a number out of range");
  return int(value);
}

float Reader::real() {
  const uint32_t bits = uint32_t(word());
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

View Reader::view(int rows_kind) {
  View v;
  v.buffer = integer(0, int64_t(program_.buffers_.size()) - 1);
  const auto& buffer = program_.buffers_[v.buffer];
  require(buffer.kind == rows_kind, "a buffer with other rows");
  v.stride = buffer.width;
  v.offset = integer(0, buffer.width - 1);
  v.width = integer(1, buffer.width - v.offset);
  return v;
}

View Reader::view(int rows_kind, int width) {
  const View v = view(rows_kind);
  require(v.width == width, "a value of another width");
  return v;
}

const Tensor* Reader::tensor(bool optional) {
  const int index = integer(optional ? -1 : 0, int64_t(inputs_.size()) - 1);
  if (index < 0) return nullptr;
  require(inputs_[index].data != nullptr, "a weight that is not constant");
  return &inputs_[index];
}

const float* Reader::floats(int64_t size, bool optional) {
  const Tensor* t = tensor(optional);
  if (t == nullptr) return nullptr;
  require(t->type == kFloat && t->size() == size, "a weight of another type or size");
  return static_cast<const float*>(t->data);
}

int Reader::state(const std::vector<int64_t>& shape) {
  const int index = integer(0, program_.states - 1);
  auto& known = program_.state_shapes_[index];
  require(known.empty() || known == shape, "a state of another shape");
  known = shape;
  return index;
}

int Reader::quantized(int rows_kind, int width) {
  const int index = integer(0, int64_t(program_.quantized_.size()) - 1);
  const auto& q = program_.quantized_[index];
  require(q.kind == rows_kind && q.width == width, "activations of another width");
  return index;
}

// -- building ------------------------------------------------------------------------------------

Program::Program(const std::vector<int64_t>& words, const std::vector<Tensor>& inputs) {
  Reader r(words, inputs, *this);
  if (r.word() != kVersion) throw Error("program: made for another version of the kernels");
  source = r.integer(0, 1);
  hidden = r.integer(1, kMaxWidth);
  has_position = r.integer(0, 1);
  states = r.integer(0, kMaxCount);
  vocab = r.integer(1, kMaxWidth);
  r.require(inputs.size() >= size_t(first_state()) + states, "more states than inputs");
  state_shapes_.resize(states);

  buffers_.resize(r.integer(1, kMaxCount));
  for (auto& b : buffers_) {
    b.width = r.integer(1, kMaxWidth);
    b.kind = r.integer(0, 1);
  }
  quantized_.resize(r.integer(0, kMaxCount));
  for (auto& q : quantized_) {
    q.width = r.integer(1, kMaxWidth);
    q.block = r.integer(16, 256);
    r.require((q.block & (q.block - 1)) == 0, "a block that is no power of two");
    q.kind = r.integer(0, 1);
  }

  matrices_.resize(r.integer(0, kMaxCount));
  std::vector<MatrixSource> sources(matrices_.size());
  for (size_t i = 0; i < matrices_.size(); i++) {
    Matrix& m = matrices_[i];
    MatrixSource& s = sources[i];
    m.kind = Matrix::Kind(r.integer(0, 3));
    m.n = r.integer(1, kMaxWidth);
    m.k = r.integer(1, kMaxWidth);
    m.block = r.integer(0, 256);
    const Tensor* codes = r.tensor();
    s.codes = codes->data;
    if (!m.quantized()) {
      r.require(codes->type == (m.kind == Matrix::kFloat16 ? kFloat16 : kFloat) &&
                    codes->size() == int64_t(m.n) * m.k && m.block == 0,
                "a matrix of another type or size");
      r.require(r.word() == -1 && r.word() == -1 && r.word() == 0, "scales of a float matrix");
      continue;
    }
    r.require(m.block >= 16 && (m.block & (m.block - 1)) == 0, "a block that is no power of two");
    m.blocks = (m.k + m.block - 1) / m.block;
    const int bits = m.kind == Matrix::kInt4 ? 4 : 8;
    const int64_t per_row = m.blocks;
    r.require(codes->type == kUint8 && codes->size() == m.n * per_row * m.block * bits / 8,
              "a matrix of another type or size");
    const Tensor* scales = r.tensor();
    const Tensor* zeros = r.tensor(true);
    const int zero_kind = r.integer(0, 2);
    r.require(scales->type == (zero_kind == 2 ? kFloat : kFloat16) && scales->size() == m.n * per_row,
              "scales of another type or size");
    s.scales = scales->data;
    r.require((zeros != nullptr) == (zero_kind != 0), "zero points");
    if (zero_kind == 1) {
      r.require(zeros->type == kUint8 && zeros->size() == m.n * ((per_row * bits + 7) / 8),
                "zero points of another type or size");
      s.int_zeros = static_cast<const uint8_t*>(zeros->data);
    } else if (zero_kind == 2) {
      r.require(zeros->type == kFloat && zeros->size() == m.n * per_row,
                "zero points of another type or size");
      s.float_zeros = static_cast<const float*>(zeros->data);
    }
  }

  const int count = r.integer(1, kMaxCount);
  for (int i = 0; i < count; i++) {
    Phase phase;
    phase.cls = Phase::Class(r.integer(0, 2));
    phase.kind = r.kind = r.integer(0, 1);
    const int ops = r.integer(1, kMaxCount);
    for (int j = 0; j < ops; j++) {
      const int opcode = r.integer(1, 99);
      if (j == 0) phase.opcode = phase.cls == Phase::kRows ? 0 : opcode;
      const int64_t length = r.word();
      const size_t start = r.at();
      if (phase.cls == Phase::kRows) {
        phase.rows.push_back(read_row_op(opcode, r));
      } else if (phase.cls == Phase::kMix) {
        r.require(phase.kind == 0, "a state over chosen rows");
        phase.mixes.push_back(read_mix_op(opcode, r));
      } else {
        r.require(opcode == 20, "an op of another class");
        LinearOp op;
        op.out = r.view(phase.kind);
        op.in = r.view(phase.kind);
        op.quantized = r.integer(-1, int64_t(quantized_.size()) - 1);
        op.matrix = r.integer(0, int64_t(matrices_.size()) - 1);
        const Matrix& m = matrices_[op.matrix];
        r.require(op.out.width == m.n && op.in.width == m.k, "a matrix of another size");
        r.require(m.quantized() == (op.quantized >= 0), "activations for another matrix");
        if (op.quantized >= 0) {
          const auto& q = quantized_[op.quantized];
          r.require(q.width == m.k && q.block == m.block && q.kind == phase.kind,
                    "activations for another matrix");
        }
        op.bias = r.floats(m.n, true);
        phase.linears.push_back(op);
      }
      r.require(int64_t(r.at() - start) == length, "an op of another length");
    }
    phases_.push_back(std::move(phase));
  }
  r.kind = 1;
  logits = r.view(1, vocab);
  r.require(r.done(), "it goes on after its end");
  for (const auto& shape : state_shapes_) r.require(!shape.empty(), "a state that nothing uses");
  pack_matrices(sources);
}

void Program::pack_matrices(const std::vector<MatrixSource>& sources) {
  for (size_t i = 0; i < matrices_.size(); i++) {
    lay_out(matrices_[i], sources[i]);
    packed_bytes_ += matrices_[i].bytes() + 64;
  }
  arena_ = std::make_unique<Arena>(packed_bytes_);
  std::vector<std::pair<const void*, size_t>> packed;
  for (size_t i = 0; i < matrices_.size(); i++) {
    const Matrix& m = matrices_[i];
    pack(matrices_[i], sources[i], arena_->take(m.bytes()));
    const size_t bits = m.kind == Matrix::kInt4 ? 4 : m.kind == Matrix::kInt8 ? 8 : m.kind == Matrix::kFloat16 ? 16 : 32;
    packed.emplace_back(sources[i].codes, size_t(m.n) * (m.quantized() ? m.blocks * m.block : m.k) * bits / 8);
  }
  let_go(packed);
}

// -- running -------------------------------------------------------------------------------------

namespace {

constexpr int kRowsAtOnce = 8;    // of row ops, so that what one writes the next finds in cache
constexpr int kLinearRows = 64;   // of a matrix product's chunk
constexpr int kLinearGroups = 8;  // groups of kLanes columns in it, for many rows
constexpr size_t kLinearBytes = 16 << 10;  // weights of a chunk, for few rows

int parts(int total, int size) { return (total + size - 1) / size; }

typedef std::chrono::steady_clock Clock;
std::atomic<bool> g_profiling{false};

// How one matrix product is cut.
struct Cut {
  int rows, groups, across, down;
  Cut(const Matrix& m, int all_rows, int threads) {
    rows = all_rows < 2 * kLinearRows ? all_rows : kLinearRows;
    if (all_rows >= 8) {
      groups = kLinearGroups;
    } else {
      const int least = int(kLinearBytes / m.group_bytes) + 1;
      const int even = parts(m.groups(), 4 * threads);
      groups = even > least ? even : least;
    }
    across = parts(m.groups(), groups);
    down = parts(all_rows, rows);
  }
  int chunks() const { return across * down; }
};

}  // namespace

void Program::prepare(Context& c) const {
  c.quantized.resize(quantized_.size());
  for (size_t i = 0; i < quantized_.size(); i++) {
    Quantized& q = c.quantized[i];
    q.width = quantized_[i].width;
    q.block = quantized_[i].block;
    q.blocks = parts(q.width, q.block);
    q.resize(c.rows[quantized_[i].kind]);
  }
  size_t total = 0;
  auto floats = [&](const Buffer& b) {
    return (size_t(b.width) * c.rows[b.kind] + kLanes + 15) / 16 * 16;
  };
  for (const auto& b : buffers_) {
    total += floats(b);
    if (total > kMaxFloats) throw std::bad_alloc();  // long before the sum could wrap
  }
  c.scratch.reserve_floats(total);
  c.buffers.resize(buffers_.size());
  float* at = c.scratch.data();
  for (size_t i = 0; i < buffers_.size(); i++) {
    c.buffers[i] = at;
    at += floats(buffers_[i]);
  }
}

Profile g_profile;

void Program::profile(bool on) {
  g_profile = Profile{};
  g_profiling = on;
}

void Program::run(Context& c, Team& team, int threads) const {
  // Only one thread keeps the time: whichever comes first.
  const bool timed = g_profiling && team.first();
  auto before = timed ? Clock::now() : Clock::time_point();
  for (int p = 0; p < int(phases_.size()); p++) {
    const Phase& phase = phases_[p];
    run_phase(phase, p, c, team, threads);
    if (timed) {
      const auto now = Clock::now();
      g_profile.seconds[phase.opcode] += std::chrono::duration<double>(now - before).count();
      g_profile.runs[phase.opcode]++;
      before = now;
    }
  }
}

void Program::run_phase(const Phase& phase, int p, Context& c, Team& team, int threads) const {
  const int rows = c.rows[phase.kind];
  if (phase.cls == Phase::kRows) {
    team.work(p, parts(rows, kRowsAtOnce), [&](int chunk) {
      const int first = chunk * kRowsAtOnce;
      const int last = first + kRowsAtOnce < rows ? first + kRowsAtOnce : rows;
      for (const auto& op : phase.rows) op->run(c, first, last);
    });
  } else if (phase.cls == Phase::kMix) {
    int total = 0;
    for (const auto& op : phase.mixes) total += op->chunks(c);
    team.work(p, total, [&](int chunk) {
      for (const auto& op : phase.mixes) {
        const int own = op->chunks(c);
        if (chunk < own) return op->run(c, chunk);
        chunk -= own;
      }
    });
  } else {
    int total = 0;
    if (rows > 0) {
      for (const auto& op : phase.linears) total += Cut(matrices_[op.matrix], rows, threads).chunks();
    }
    team.work(p, total, [&](int chunk) {
      for (const auto& op : phase.linears) {
        const Matrix& m = matrices_[op.matrix];
        const Cut cut(m, rows, threads);
        if (chunk >= cut.chunks()) {
          chunk -= cut.chunks();
          continue;
        }
        const int row = chunk / cut.across * cut.rows, first = chunk % cut.across * cut.groups;
        const int count = row + cut.rows < rows ? cut.rows : rows - row;
        const int last = first + cut.groups < m.groups() ? first + cut.groups : m.groups();
        linear(m, op.in.row(c, row), op.in.stride,
               op.quantized < 0 ? nullptr : &c.quantized[op.quantized], row, count, first, last,
               op.bias, op.out.row(c, row), op.out.stride);
        return;
      }
    });
  }
}

}  // namespace edge
