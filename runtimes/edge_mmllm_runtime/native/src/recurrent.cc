// Ops that carry a constant state along the sequence. Each chunk owns its channels or heads of
// the state, which is updated in place.
#include <cmath>
#include <cstring>

#include "program.h"

namespace edge {

namespace {

constexpr int kMaxHead = 256, kMaxVectors = kMaxHead / kLanes;

int parts(int total, int size) { return (total + size - 1) / size; }

// The row before each row.
struct Shift : MixOp {
  View out, in;
  int state;
  explicit Shift(Reader& r) : out(r.view(0)), in(r.view(0, out.width)), state(r.state({1, 1, out.width})) {}
  int chunks(const Context&) const override { return parts(out.width, 2048); }
  void run(Context& c, int chunk) const override {
    const int first = chunk * 2048, count = out.width - first < 2048 ? out.width - first : 2048;
    float* last = c.states[state] + first;
    for (int t = 0; t < c.rows[0]; t++) {
      const float* from = t == 0 ? last : in.row(c, t - 1) + first;
      std::memcpy(out.row(c, t) + first, from, count * sizeof(float));
    }
    std::memcpy(last, in.row(c, c.rows[0] - 1) + first, count * sizeof(float));
  }
};

// Depthwise causal convolution, with the last inputs as state.
struct Conv : MixOp {
  static constexpr int kMaxTaps = 64, kChannels = 16 * kLanes;
  View out, in;
  int taps, state;
  const float *w, *bias;  // (taps, channels) and (channels,)
  bool silu;
  explicit Conv(Reader& r) : out(r.view(0)), in(r.view(0, out.width)) {
    taps = r.integer(2, kMaxTaps);
    w = r.floats(int64_t(out.width) * taps);
    bias = r.floats(out.width, true);
    silu = r.integer(0, 1);
    state = r.state({1, taps - 1, out.width});
  }
  int chunks(const Context&) const override { return parts(out.width, kChannels); }
  // The usual width, in registers.
  EDGE_INLINE void four_taps(Context& c, float* past, int at) const {
    const int width = out.width;
    VecF a = load(past + at), b = load(past + width + at), d = load(past + 2 * width + at);
    const VecF w0 = load(w + at), w1 = load(w + width + at), w2 = load(w + 2 * width + at);
    const VecF w3 = load(w + 3 * width + at), start = bias == nullptr ? splat(0.0f) : load(bias + at);
    for (int t = 0; t < c.rows[0]; t++) {
      const VecF x = load(in.row(c, t) + at);
      const VecF y = start + a * w0 + b * w1 + d * w2 + x * w3;
      store(out.row(c, t) + at, silu ? y * vsigmoid(y) : y);
      a = b;
      b = d;
      d = x;
    }
    store(past + at, a);
    store(past + width + at, b);
    store(past + 2 * width + at, d);
  }
  void run(Context& c, int chunk) const override {
    const int first = chunk * kChannels, width = out.width;
    const int count = width - first < kChannels ? width - first : kChannels;
    float* past = c.states[state];
    int at = first;
    if (taps == 4) {
      for (; at + kLanes <= first + count; at += kLanes) four_taps(c, past, at);
    }
    for (; at < first + count; at += kLanes) {
      const int n = first + count - at;
      VecF ring[kMaxTaps];
      for (int k = 0; k + 1 < taps; k++) ring[k] = load_some(past + size_t(k) * width + at, n);
      const VecF start = bias == nullptr ? splat(0.0f) : load_some(bias + at, n);
      int oldest = 0;  // ring[oldest] is the oldest of the last `taps` inputs
      for (int t = 0; t < c.rows[0]; t++) {
        int newest = oldest + taps - 1;
        if (newest >= taps) newest -= taps;
        ring[newest] = load_some(in.row(c, t) + at, n);
        VecF y = start;
        for (int k = 0, i = oldest; k < taps; k++) {
          y += ring[i] * load_some(w + size_t(k) * width + at, n);
          if (++i == taps) i = 0;
        }
        store_some(out.row(c, t) + at, silu ? y * vsigmoid(y) : y, n);
        if (++oldest == taps) oldest = 0;
      }
      for (int k = 0, i = oldest; k + 1 < taps; k++) {
        store_some(past + size_t(k) * width + at, ring[i], n);
        if (++i == taps) i = 0;
      }
    }
  }
};

// Mamba's scan. Source: arXiv 2312.00752, algorithm 2. State (d_state, d_inner).
struct SelectiveScan : MixOp {
  static constexpr int kMaxState = 256, kChannels = 8 * kLanes;
  View out, x, dt, b, c_;
  int n;
  std::vector<float> decay;  // (d_state, d_inner)
  const float* skip;         // (d_inner,)
  int state;
  explicit SelectiveScan(Reader& r)
      : out(r.view(0)), x(r.view(0, out.width)), dt(r.view(0, out.width)), b(r.view(0)), c_(r.view(0, b.width)) {
    n = b.width;
    r.require(n <= kMaxState, "a state of more than 256 channels");
    const Tensor* rates = r.tensor();
    r.require((rates->type == 1 || rates->type == 10) && rates->size() == int64_t(out.width) * n,
              "decays of another type or size");
    for (int64_t i = 0; i < rates->size(); i++) {
      decay.push_back(rates->type == 1 ? static_cast<const float*>(rates->data)[i]
                                       : half_to_float(static_cast<const uint16_t*>(rates->data)[i]));
    }
    skip = r.floats(out.width);
    state = r.state({1, n, out.width});
  }
  int chunks(const Context&) const override { return parts(out.width, kChannels); }
  template <int kState>
  EDGE_INLINE void channels(Context& c, int at) const {
    const int size = kState ? kState : n, width = out.width, count = width - at;
    VecF s[kState ? kState : kMaxState], rate[kState ? kState : kMaxState];
    float* kept = c.states[state];
    for (int i = 0; i < size; i++) {
      s[i] = load_some(kept + size_t(i) * width + at, count);
      rate[i] = load_some(decay.data() + size_t(i) * width + at, count);
    }
    const VecF d = load_some(skip + at, count);
    for (int t = 0; t < c.rows[0]; t++) {
      const VecF step = load_some(dt.row(c, t) + at, count), value = load_some(x.row(c, t) + at, count);
      const VecF input = step * value;
      const float *in = b.row(c, t), *read = c_.row(c, t);
      VecF y = d * value;
#pragma GCC unroll 16
      for (int i = 0; i < size; i++) {
        s[i] = s[i] * vexp(step * rate[i]) + input * in[i];
        y += s[i] * read[i];
      }
      store_some(out.row(c, t) + at, y, count);
    }
    for (int i = 0; i < size; i++) store_some(kept + size_t(i) * width + at, s[i], count);
  }
  void run(Context& c, int chunk) const override {
    for (int at = chunk * kChannels; at < out.width && at < (chunk + 1) * kChannels; at += kLanes) {
      n == 16 ? channels<16>(c, at) : channels<0>(c, at);
    }
  }
};

// Mamba-2's scan, one head a chunk. Source: arXiv 2405.21060, eq. 16. State (d_k, d_v).
struct GatedLinear : MixOp {
  View out, q, k, v, dt;
  int heads, groups, d_k, d_v, state;
  const float* decay;
  explicit GatedLinear(Reader& r) : out(r.view(0)), q(r.view(0)), k(r.view(0, q.width)), v(r.view(0, out.width)), dt(r.view(0)) {
    heads = dt.width;
    decay = r.floats(heads);
    groups = r.integer(1, heads);
    r.require(heads % groups == 0 && out.width % heads == 0 && q.width % groups == 0,
              "heads that do not fit together");
    d_k = q.width / groups;
    d_v = out.width / heads;
    r.require(d_v <= kMaxHead, "heads of more than 256");
    state = r.state({1, heads, d_k, d_v});
  }
  // Heads of 64 are cut in two: two vectors of values for four tokens fill the registers. One
  // token reads the state straight through.
  bool halved(const Context& c) const { return d_v == 64 && 64 / kLanes % 2 == 0 && c.rows[0] >= 4; }
  int chunks(const Context& c) const override { return halved(c) ? 2 * heads : heads; }
  // kVectors: of d_v from column `at` on; 0: all of them, with a rest. Each part of the state is
  // read once for kTokens tokens.
  template <int kVectors, int kTokens>
  EDGE_INLINE void tokens(Context& c, int h, int at, int first) const {
    constexpr int kSize = kVectors ? kVectors : kMaxVectors;
    const int group = h / (heads / groups), vectors = kVectors ? kVectors : parts(d_v, kLanes);
    float* s = c.states[state] + size_t(h) * d_k * d_v + at;
    const float *read[kTokens], *key[kTokens];
    float gate[kTokens];
    VecF in[kTokens][kSize], y[kTokens][kSize];
    for (int t = 0; t < kTokens; t++) {
      const float step = dt.row(c, first + t)[h];
      gate[t] = std::exp(step * decay[h]);
      read[t] = q.row(c, first + t) + group * d_k;
      key[t] = k.row(c, first + t) + group * d_k;
      const float* value = v.row(c, first + t) + h * d_v + at;
      for (int j = 0; j < vectors; j++) {
        in[t][j] = load_some(value + j * kLanes, kVectors ? kLanes : d_v - j * kLanes) * step;
        y[t][j] = splat(0.0f);
      }
    }
    for (int i = 0; i < d_k; i++) {
      float* row = s + size_t(i) * d_v;
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) {
        const int count = kVectors ? kLanes : d_v - j * kLanes;
        VecF now = load_some(row + j * kLanes, count);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; t++) {
          now = now * gate[t] + in[t][j] * key[t][i];
          y[t][j] += now * read[t][i];
        }
        store_some(row + j * kLanes, now, count);
      }
    }
    for (int t = 0; t < kTokens; t++) {
      float* to = out.row(c, first + t) + h * d_v + at;
      for (int j = 0; j < vectors; j++) {
        store_some(to + j * kLanes, y[t][j], kVectors ? kLanes : d_v - j * kLanes);
      }
    }
  }
  template <int kVectors>
  EDGE_INLINE void head(Context& c, int h, int at) const {
    int t = 0;
    if (kVectors && halved(c)) {
      for (; t + 4 <= c.rows[0]; t += 4) tokens<kVectors, 4>(c, h, at, t);
    }
    for (; t < c.rows[0]; t++) tokens<kVectors, 1>(c, h, at, t);
  }
  void run(Context& c, int chunk) const override {
    if (halved(c)) {
      head<32 / kLanes>(c, chunk / 2, chunk % 2 * 32);
    } else {
      d_v == 64 ? head<64 / kLanes>(c, chunk, 0) : head<0>(c, chunk, 0);
    }
  }
};

// RWKV-4. Source: arXiv 2305.13048, appendix D. State (3, C): a, b, m.
struct Wkv4 : MixOp {
  static constexpr int kChannels = 4 * kLanes;
  View out, k, v;
  const float *decay, *bonus;
  int state;
  explicit Wkv4(Reader& r) : out(r.view(0)), k(r.view(0, out.width)), v(r.view(0, out.width)) {
    decay = r.floats(out.width);
    bonus = r.floats(out.width);
    state = r.state({1, 3, out.width});
  }
  int chunks(const Context&) const override { return parts(out.width, kChannels); }
  void run(Context& c, int chunk) const override {
    const int width = out.width;
    float* s = c.states[state];
    for (int at = chunk * kChannels; at < width && at < (chunk + 1) * kChannels; at += kLanes) {
      const int n = width - at;
      VecF a = load_some(s + at, n), b = load_some(s + width + at, n), m = load_some(s + 2 * width + at, n);
      m = b > 0.0f ? m : splat(-1e30f);
      const VecF w = load_some(decay + at, n), u = load_some(bonus + at, n);
      for (int t = 0; t < c.rows[0]; t++) {
        const VecF key = load_some(k.row(c, t) + at, n), value = load_some(v.row(c, t) + at, n);
        const VecF now = u + key;
        VecF top = vmax(m, now), old = vexp(m - top), fresh = vexp(now - top);
        // Lanes past the width have no weight at all; nobody stores what they give.
        store_some(out.row(c, t) + at, (old * a + fresh * value) / (old * b + fresh), n);
        top = vmax(m + w, key);
        old = vexp(m + w - top);
        fresh = vexp(key - top);
        a = old * a + fresh * value;
        b = old * b + fresh;
        m = top;
      }
      store_some(s + at, a, n);
      store_some(s + width + at, b, n);
      store_some(s + 2 * width + at, m, n);
    }
  }
};

// RWKV-5 and 6, one head a chunk. Source: arXiv 2404.05892, eq. 16 to 19. State (d, d), keys first.
struct Wkv6 : MixOp {
  View out, r_, k, v, log_decay;
  const float *fixed = nullptr, *bonus;
  int heads, d, state;
  explicit Wkv6(Reader& r) : out(r.view(0)), r_(r.view(0, out.width)), k(r.view(0, out.width)), v(r.view(0, out.width)) {
    heads = r.integer(1, out.width);
    r.require(out.width % heads == 0 && out.width / heads <= kMaxHead, "heads that do not fit together");
    d = out.width / heads;
    if (r.integer(0, 1)) {
      fixed = r.floats(out.width);
    } else {
      log_decay = r.view(0, out.width);
    }
    bonus = r.floats(out.width);
    state = r.state({1, heads, d, d});
  }
  // See GatedLinear.
  bool halved(const Context& c) const { return d == 64 && 64 / kLanes % 2 == 0 && c.rows[0] >= 4; }
  int chunks(const Context& c) const override { return halved(c) ? 2 * heads : heads; }
  template <int kVectors, int kTokens>
  EDGE_INLINE void tokens(Context& c, int h, int at, int first) const {
    constexpr int kSize = kVectors ? kVectors : kMaxVectors;
    const int vectors = kVectors ? kVectors : parts(d, kLanes), base = h * d;
    float* s = c.states[state] + size_t(h) * d * d + at;
    const float *read[kTokens], *key[kTokens];
    float kept[kTokens][kMaxHead];
    VecF in[kTokens][kSize], y[kTokens][kSize];
    for (int t = 0; t < kTokens; t++) {
      read[t] = r_.row(c, first + t) + base;
      key[t] = k.row(c, first + t) + base;
      const float* value = v.row(c, first + t) + base + at;
      const float *gone = (fixed ? fixed : log_decay.row(c, first + t)) + base, *extra = bonus + base;
      VecF shared = splat(0.0f);  // r . (u * k): what this token's value counts at once
      each(d, [&](int i, int n) {
        store_some(kept[t] + i, vexp(load_some(gone + i, n)), n);
        shared += load_some(read[t] + i, n) * load_some(extra + i, n) * load_some(key[t] + i, n);
      });
      const float now = sum(shared);
      for (int j = 0; j < vectors; j++) {
        in[t][j] = load_some(value + j * kLanes, kVectors ? kLanes : d - j * kLanes);
        y[t][j] = in[t][j] * now;
      }
    }
    for (int i = 0; i < d; i++) {
      float* row = s + size_t(i) * d;
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) {
        const int count = kVectors ? kLanes : d - j * kLanes;
        VecF now = load_some(row + j * kLanes, count);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; t++) {
          y[t][j] += now * read[t][i];
          now = now * kept[t][i] + in[t][j] * key[t][i];
        }
        store_some(row + j * kLanes, now, count);
      }
    }
    for (int t = 0; t < kTokens; t++) {
      float* to = out.row(c, first + t) + base + at;
      for (int j = 0; j < vectors; j++) {
        store_some(to + j * kLanes, y[t][j], kVectors ? kLanes : d - j * kLanes);
      }
    }
  }
  template <int kVectors>
  EDGE_INLINE void head(Context& c, int h, int at) const {
    int t = 0;
    if (kVectors && halved(c)) {
      for (; t + 4 <= c.rows[0]; t += 4) tokens<kVectors, 4>(c, h, at, t);
    }
    for (; t < c.rows[0]; t++) tokens<kVectors, 1>(c, h, at, t);
  }
  void run(Context& c, int chunk) const override {
    if (halved(c)) {
      head<32 / kLanes>(c, chunk / 2, chunk % 2 * 32);
    } else {
      d == 64 ? head<64 / kLanes>(c, chunk, 0) : head<0>(c, chunk, 0);
    }
  }
};

// RWKV-7, one head a chunk. Source: arXiv 2503.14456, eq. 13 to 19. State (d, d), keys first.
struct Wkv7 : MixOp {
  View out, bonus, r_, gate, k, v, rate;
  const float *k_k, *k_a, *r_k;
  int heads, d, state;
  explicit Wkv7(Reader& r) : out(r.view(0)), bonus(r.view(0, out.width)), r_(r.view(0, out.width)), gate(r.view(0, out.width)), k(r.view(0, out.width)), v(r.view(0, out.width)), rate(r.view(0, out.width)) {
    heads = r.integer(1, out.width);
    r.require(out.width % heads == 0 && out.width / heads <= kMaxHead, "heads that do not fit together");
    d = out.width / heads;
    k_k = r.floats(out.width);
    k_a = r.floats(out.width);
    r_k = r.floats(out.width);
    state = r.state({1, heads, d, d});
  }
  int chunks(const Context&) const override { return heads; }
  template <int kVectors>
  EDGE_INLINE void head(Context& c, int h) const {
    constexpr int kSize = kVectors ? kVectors : kMaxVectors;
    const int vectors = kVectors ? kVectors : parts(d, kLanes), base = h * d;
    float* s = c.states[state] + size_t(h) * d * d;
    float kept[kMaxHead], removed[kMaxHead], written[kMaxHead], key[kMaxHead];
    for (int t = 0; t < c.rows[0]; t++) {
      const float *read = r_.row(c, t) + base, *value = v.row(c, t) + base, *x = k.row(c, t) + base;
      const float *g = gate.row(c, t) + base, *a = rate.row(c, t) + base;
      VecF square = splat(0.0f), shared = splat(0.0f);
      each(d, [&](int i, int n) {
        const VecF from = load_some(x + i, n), speed = load_some(a + i, n);
        store_some(kept + i, vexp(load_some(g + i, n) * -0.60653065971263342f), n);
        const VecF direction = from * load_some(k_k + base + i, n);
        store_some(removed + i, direction, n);
        square += direction * direction;
        const VecF own = from * (1.0f + (speed - 1.0f) * load_some(k_a + base + i, n));
        store_some(key + i, own, n);
        shared += load_some(read + i, n) * own * load_some(r_k + base + i, n);
      });
      const float length = std::sqrt(sum(square)), unit = 1.0f / (length > 1e-12f ? length : 1e-12f);
      each(d, [&](int i, int n) {
        const VecF direction = load_some(removed + i, n) * unit;
        store_some(removed + i, direction, n);
        store_some(written + i, direction * load_some(a + i, n), n);
      });
      const float extra = sum(shared);
      VecF old[kSize], in[kSize], y[kSize];
      for (int j = 0; j < vectors; j++) {
        old[j] = y[j] = splat(0.0f);
        in[j] = load_some(value + j * kLanes, kVectors ? kLanes : d - j * kLanes);
      }
      for (int i = 0; i < d; i++) {
        const float* row = s + size_t(i) * d;
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++) {
          old[j] += load_some(row + j * kLanes, kVectors ? kLanes : d - j * kLanes) * removed[i];
        }
      }
      for (int i = 0; i < d; i++) {
        float* row = s + size_t(i) * d;
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++) {
          const int count = kVectors ? kLanes : d - j * kLanes;
          VecF now = load_some(row + j * kLanes, count) * kept[i] - old[j] * written[i];
          now += in[j] * key[i];
          store_some(row + j * kLanes, now, count);
          y[j] += now * read[i];
        }
      }
      float *to = out.row(c, t) + base, *more = bonus.row(c, t) + base;
      for (int j = 0; j < vectors; j++) {
        const int count = kVectors ? kLanes : d - j * kLanes;
        store_some(to + j * kLanes, y[j], count);
        store_some(more + j * kLanes, in[j] * extra, count);
      }
    }
  }
  void run(Context& c, int chunk) const override {
    d == 64 ? head<64 / kLanes>(c, chunk) : head<0>(c, chunk);
  }
};

}  // namespace

std::unique_ptr<MixOp> read_mix_op(int opcode, Reader& r) {
  switch (opcode) {
    case 30: return std::make_unique<Shift>(r);
    case 31: return std::make_unique<Conv>(r);
    case 32: return std::make_unique<SelectiveScan>(r);
    case 33: return std::make_unique<GatedLinear>(r);
    case 34: return std::make_unique<Wkv4>(r);
    case 35: return std::make_unique<Wkv6>(r);
    case 36: return std::make_unique<Wkv7>(r);
    case 37: return read_attention(r);
    default: r.require(false, "an unknown op");
  }
  return nullptr;
}

}  // namespace edge
