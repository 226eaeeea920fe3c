// Ops that treat each row by itself.
#include <cmath>
#include <cstring>

#include "program.h"

namespace edge {

namespace {

enum Activation { kSilu, kGelu, kGeluTanh, kQuickGelu, kRelu, kRelu2, kSigmoid, kTanh, kMinusExp };

EDGE_INLINE VecF activate(int kind, VecF x) {
  switch (kind) {
    case kSilu: return x * vsigmoid(x);
    case kGelu: return 0.5f * x * (1.0f + verf(x * 0.70710678118654752f));
    case kGeluTanh: return 0.5f * x * (1.0f + vtanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case kQuickGelu: return x * vsigmoid(1.702f * x);
    case kRelu: return vmax(x, splat(0.0f));
    case kRelu2: {
      const VecF positive = vmax(x, splat(0.0f));
      return positive * positive;
    }
    case kSigmoid: return vsigmoid(x);
    case kTanh: return vtanh(x);
    default: return -vexp(x);
  }
}

// The op's task for one row is a lambda over (context, row): what is left is the loop.
template <typename Task>
struct PerRow : RowOp {
  explicit PerRow(Task task) : task(std::move(task)) {}
  void run(Context& c, int first, int last) const override {
    for (int t = first; t < last; t++) task(c, t);
  }
  Task task;
};

template <typename Task>
std::unique_ptr<RowOp> per_row(Task task) {
  return std::make_unique<PerRow<Task>>(std::move(task));
}

// (x - mean) / sqrt(var + eps), or x / sqrt(mean(x^2) + eps) where there is no bias.
EDGE_INLINE void normalize(const float* x, int n, const float* w, const float* b, float eps, float* y) {
  float mean = 0;
  VecF total = splat(0.0f);
  if (b != nullptr) {
    each(n, [&](int i, int count) { total += load_some(x + i, count); });
    mean = sum(total) / n;
    total = splat(0.0f);
  }
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VecF v = load(x + i) - mean;
    total += v * v;
  }
  float square = sum(total);
  for (; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / std::sqrt(square / n + eps);
  each(n, [&](int at, int count) {
    VecF v = (load_some(x + at, count) - mean) * scale;
    if (w != nullptr) v *= load_some(w + at, count);
    if (b != nullptr) v += load_some(b + at, count);
    store_some(y + at, v, count);
  });
}

// Rotates one head: halves apart. Source: RoFormer eq. 15 in GPT-NeoX's order.
EDGE_INLINE void rotate(const float* x, int d, const float* cos, const float* sin, float* y) {
  const int half = d / 2;
  each(half, [&](int i, int count) {
    const VecF a = load_some(x + i, count), b = load_some(x + half + i, count);
    const VecF c = load_some(cos + i, count), s = load_some(sin + i, count);
    store_some(y + i, a * c - b * s, count);
    store_some(y + half + i, b * c + a * s, count);
  });
}

// How q and k of a head become what attention reads.
struct HeadPrep {
  int heads, d;
  const float* norm;
  float eps;
  const float *cos, *sin;
  int64_t length;

  HeadPrep(Reader& r, int heads_) : heads(heads_), d(r.integer(1, 1024)) {
    norm = r.floats(d, true);
    eps = r.real();
    const Tensor* c = r.tensor(true);
    const Tensor* s = r.tensor(true);
    r.require((c == nullptr) == (s == nullptr), "rope tables");
    cos = sin = nullptr;
    length = INT64_MAX;
    if (c != nullptr) {
      r.require(d % 2 == 0 && c->type == 1 && s->type == 1 && c->shape.size() == 2 &&
                    c->shape[1] == d / 2 && c->shape == s->shape,
                "rope tables of another size");
      cos = static_cast<const float*>(c->data);
      sin = static_cast<const float*>(s->data);
      length = c->shape[0];
    }
  }

  EDGE_INLINE void head(const float* x, int64_t position, float* y) const {
    if (norm != nullptr) {
      normalize(x, d, norm, nullptr, eps, y);
      x = y;
    }
    if (cos != nullptr) {
      float whole[1024];
      const float* from = x;
      if (x == y) {
        std::memcpy(whole, x, d * sizeof(float));
        from = whole;
      }
      // Positions beyond the table are refused before a forward starts.
      rotate(from, d, cos + position * (d / 2), sin + position * (d / 2), y);
    } else if (x != y) {
      std::memcpy(y, x, d * sizeof(float));
    }
  }
};

// Rows of a table: those of the token ids, or those of the tokens' positions.
std::unique_ptr<RowOp> read_table(Reader& r, bool by_position) {
  const View out = r.view(r.kind);
  const int kind = r.integer(0, 3), vocab = r.integer(1, 1 << 24), block = r.integer(0, 256);
  const int width = out.width;
  const int offset = by_position ? r.integer(0, vocab - 1) : 0;
  if (by_position) {
    r.require(r.kind == 0 && r.program().has_position, "positions that nobody gives");
    r.program().limit(vocab - offset);
  } else {
    r.require(r.kind == 0 && r.program().source == 0, "an embedding of no token ids");
    r.require(vocab == r.program().vocab, "an embedding of another vocabulary");
  }
  const auto index = [=](const Context& c, int t) {
    return size_t(by_position ? c.position + offset + t : c.ids[t]);
  };
  const Tensor* table = r.tensor();
  if (kind < 2) {
    r.require(table->type == (kind == 1 ? 10 : 1) && table->size() == int64_t(vocab) * width && block == 0,
              "an embedding of another type or size");
    r.require(r.word() == -1 && r.word() == -1, "scales of a float embedding");
    const void* values = table->data;
    return per_row([=](Context& c, int t) {
      const size_t row = index(c, t) * width;
      float* y = out.row(c, t);
      if (kind == 0) {
        std::memcpy(y, static_cast<const float*>(values) + row, width * sizeof(float));
      } else {
        const uint16_t* from = static_cast<const uint16_t*>(values) + row;
        for (int i = 0; i < width; i++) y[i] = half_to_float(from[i]);
      }
    });
  }
  const int bits = kind == 2 ? 4 : 8;
  r.require(block >= 16 && width % block == 0, "an embedding in other blocks");
  const int blocks = width / block;
  r.require(table->type == 2 && table->size() == int64_t(vocab) * width * bits / 8,
            "an embedding of another type or size");
  const Tensor* all_scales = r.tensor();
  r.require(all_scales->type == 10 && all_scales->size() == int64_t(vocab) * blocks,
            "scales of another type or size");
  const uint16_t* scales = static_cast<const uint16_t*>(all_scales->data);
  const Tensor* zeros = r.tensor(true);
  const int64_t zero_row = (int64_t(blocks) * bits + 7) / 8;
  r.require(zeros == nullptr || (zeros->type == 2 && zeros->size() == vocab * zero_row),
            "zero points of another type or size");
  const uint8_t* all_codes = static_cast<const uint8_t*>(table->data);
  const uint8_t* all_zeros = zeros == nullptr ? nullptr : static_cast<const uint8_t*>(zeros->data);
  return per_row([=](Context& c, int t) {
    const size_t id = index(c, t);
    const uint8_t* codes = all_codes + id * width * bits / 8;
    float* y = out.row(c, t);
    for (int b = 0; b < blocks; b++) {
      const float scale = half_to_float(scales[id * blocks + b]);
      int zero = bits == 4 ? 8 : 128;
      if (all_zeros != nullptr) {
        const uint8_t* z = all_zeros + id * zero_row;
        zero = bits == 8 ? z[b] : z[b / 2] >> (b % 2 * 4) & 15;
      }
      for (int i = b * block; i < (b + 1) * block; i++) {
        const int code = bits == 8 ? codes[i] : codes[i / 2] >> (i % 2 * 4) & 15;
        y[i] = float(code - zero) * scale;
      }
    }
  });
}

}  // namespace

std::unique_ptr<RowOp> read_row_op(int opcode, Reader& r) {
  const int kind = r.kind;
  switch (opcode) {
    case 1: return read_table(r, false);
    case 16: return read_table(r, true);
    case 2: {
      const View out = r.view(kind, r.program().hidden);
      r.require(kind == 0 && r.program().source == 1, "embeddings that nobody gives");
      return per_row([=](Context& c, int t) {
        std::memcpy(out.row(c, t), c.embeds + size_t(t) * out.width, out.width * sizeof(float));
      });
    }
    case 3: {  // the rows that get logits
      const View out = r.view(1);
      const View in = r.view(0, out.width);
      r.require(kind == 1, "rows of rows");
      return per_row([=](Context& c, int t) {
        std::memcpy(out.row(c, t), in.row(c, int(c.logit_rows[t])), out.width * sizeof(float));
      });
    }
    case 4: {
      const View out = r.view(kind);
      const View in = r.view(kind, out.width);
      const int groups = r.integer(1, out.width);
      r.require(out.width % groups == 0, "groups that do not divide the width");
      const float* w = r.floats(out.width, true);
      const float* b = r.floats(out.width, true);
      const float eps = r.real();
      const int n = out.width / groups;
      return per_row([=](Context& c, int t) {
        for (int g = 0; g < groups; g++) {
          normalize(in.row(c, t) + g * n, n, w == nullptr ? w : w + g * n, b == nullptr ? b : b + g * n,
                    eps, out.row(c, t) + g * n);
        }
      });
    }
    case 5:
    case 6: {
      const View out = r.view(kind);
      const View a = r.view(kind, out.width), b = r.view(kind, out.width);
      const bool add = opcode == 5;
      return per_row([=](Context& c, int t) {
        const float *p = a.row(c, t), *q = b.row(c, t);
        float* y = out.row(c, t);
        each(out.width, [&](int i, int n) {
          const VecF u = load_some(p + i, n), v = load_some(q + i, n);
          store_some(y + i, add ? u + v : u * v, n);
        });
      });
    }
    case 7: {
      const View out = r.view(kind);
      const View in = r.view(kind, out.width);
      const int function = r.integer(0, kMinusExp);
      return per_row([=](Context& c, int t) {
        const float* x = in.row(c, t);
        float* y = out.row(c, t);
        each(out.width, [&](int i, int n) { store_some(y + i, activate(function, load_some(x + i, n)), n); });
      });
    }
    case 8: {
      const View out = r.view(kind);
      const View gate = r.view(kind, out.width), up = r.view(kind, out.width);
      const int function = r.integer(0, kMinusExp);
      return per_row([=](Context& c, int t) {
        const float *g = gate.row(c, t), *u = up.row(c, t);
        float* y = out.row(c, t);
        each(out.width, [&](int i, int n) {
          store_some(y + i, activate(function, load_some(g + i, n)) * load_some(u + i, n), n);
        });
      });
    }
    case 9: {  // x + (previous - x) * mu
      const View out = r.view(kind);
      const View x = r.view(kind, out.width), previous = r.view(kind, out.width);
      const float* mu = r.floats(out.width);
      return per_row([=](Context& c, int t) {
        const float *a = x.row(c, t), *b = previous.row(c, t);
        float* y = out.row(c, t);
        each(out.width, [&](int i, int n) {
          const VecF u = load_some(a + i, n);
          store_some(y + i, u + (load_some(b + i, n) - u) * load_some(mu + i, n), n);
        });
      });
    }
    case 10: {  // x + (y - x) * amount
      const View out = r.view(kind);
      const View x = r.view(kind, out.width), other = r.view(kind, out.width);
      const View amount = r.view(kind, out.width);
      return per_row([=](Context& c, int t) {
        const float *a = x.row(c, t), *b = other.row(c, t), *m = amount.row(c, t);
        float* y = out.row(c, t);
        each(out.width, [&](int i, int n) {
          const VecF u = load_some(a + i, n);
          store_some(y + i, u + (load_some(b + i, n) - u) * load_some(m + i, n), n);
        });
      });
    }
    case 11: {
      const View out = r.view(kind);
      const View in = r.view(kind, out.width);
      const int heads = r.integer(1, out.width);
      r.require(out.width % heads == 0, "heads that do not divide the width");
      const float* w = r.floats(heads);
      const int d = out.width / heads;
      return per_row([=](Context& c, int t) {
        for (int h = 0; h < heads; h++) {
          const float* x = in.row(c, t) + h * d;
          float* y = out.row(c, t) + h * d;
          each(d, [&](int i, int n) { store_some(y + i, load_some(x + i, n) * w[h], n); });
        }
      });
    }
    case 12: {
      const View out = r.view(kind);
      const View in = r.view(kind, out.width);
      const float* bias = r.floats(out.width, true);
      const float low = r.real(), high = r.real();
      return per_row([=](Context& c, int t) {
        const float* x = in.row(c, t);
        float* y = out.row(c, t);
        each(out.width, [&](int i, int n) {
          VecF v = load_some(x + i, n);
          if (bias != nullptr) v += load_some(bias + i, n);
          store_some(y + i, vmin(vmax(vsoftplus(v), splat(low)), splat(high)), n);
        });
      });
    }
    case 13: {
      const View in = r.view(kind);
      const int q = r.quantized(kind, in.width);
      return per_row([=](Context& c, int t) { c.quantized[q].set_row(t, in.row(c, t)); });
    }
    case 14: {  // q of every head: norm, then rope
      const View out = r.view(kind);
      const View in = r.view(kind, out.width);
      const int heads = r.integer(1, out.width);
      const HeadPrep prep(r, heads);
      r.require(kind == 0 && out.width == heads * prep.d, "heads that do not fill the width");
      r.program().limit(prep.length);
      return per_row([=](Context& c, int t) {
        for (int h = 0; h < heads; h++) {
          prep.head(in.row(c, t) + h * prep.d, c.position + t, out.row(c, t) + h * prep.d);
        }
      });
    }
    case 15: {  // k of every head likewise, and v, into their states
      const View k = r.view(kind);
      const View v = r.view(kind, k.width);
      const int heads = r.integer(1, k.width);
      const HeadPrep prep(r, heads);
      r.require(kind == 0 && k.width == heads * prep.d, "heads that do not fill the width");
      r.program().limit(prep.length);
      const std::vector<int64_t> shape = {1, heads, -1, prep.d};
      const int k_state = r.state(shape), v_state = r.state(shape);
      return per_row([=](Context& c, int t) {
        const int64_t position = c.position + t;
        for (int h = 0; h < heads; h++) {
          const size_t at = (size_t(h) * c.capacity + position) * prep.d;
          prep.head(k.row(c, t) + h * prep.d, position, c.states[k_state] + at);
          std::memcpy(c.states[v_state] + at, v.row(c, t) + h * prep.d, prep.d * sizeof(float));
        }
      });
    }
    default: r.require(false, "an unknown op");
  }
  return nullptr;
}

}  // namespace edge
