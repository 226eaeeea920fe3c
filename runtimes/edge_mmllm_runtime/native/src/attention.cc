// Causal grouped-query attention over the key and value states.
#include <cmath>

#include "program.h"

namespace edge {

namespace {

constexpr int kMaxHead = 256;
constexpr float kHidden = -1e30f;  // exp of it is as good as 0

struct Attention : MixOp {
  View out, q;
  int k_state, v_state, heads, kv_heads, d;
  float scale, softcap;
  int64_t window;

  explicit Attention(Reader& r) : out(r.view(0)), q(r.view(0, out.width)) {
    heads = r.integer(1, out.width);
    kv_heads = r.integer(1, heads);
    d = r.integer(1, kMaxHead);
    r.require(heads % kv_heads == 0 && heads * d == out.width, "heads that do not fit together");
    const std::vector<int64_t> shape = {1, kv_heads, -1, d};
    k_state = r.state(shape);
    v_state = r.state(shape);
    scale = r.real();
    softcap = r.real();
    window = r.word();
    if (window <= 0) window = INT64_MAX / 2;
  }

  // Many rows: lanes are rows of q, so that no sum runs across lanes.
  static constexpr int kVectors = 2, kTile = kVectors * kLanes;

  int chunks(const Context& c) const override {
    return c.rows[0] < 4 ? heads : heads * ((c.rows[0] + kTile - 1) / kTile);
  }

  void run(Context& c, int chunk) const override {
    const int head = chunk % heads;
    const size_t base = size_t(head / (heads / kv_heads)) * c.capacity * d;
    const float *k = c.states[k_state] + base, *v = c.states[v_state] + base;
    if (c.rows[0] < 4) {
      for (int t = 0; t < c.rows[0]; t++) one_row(c, head, t, k, v);
    } else {
      tile(c, head, chunk / heads * kTile, k, v);
    }
  }

  EDGE_INLINE float cap(float score) const {
    return softcap > 0 ? softcap * std::tanh(score / softcap) : score;
  }

  void one_row(const Context& c, int head, int t, const float* k, const float* v) const {
    const float* x = q.row(c, t) + head * d;
    const int64_t last = c.position + t, first = last - window + 1 > 0 ? last - window + 1 : 0;
    constexpr int kKeys = 64;
    float scores[kKeys];
    VecF total[kMaxHead / kLanes];
    const int vectors = (d + kLanes - 1) / kLanes;
    for (int i = 0; i < vectors; i++) total[i] = splat(0.0f);
    float top = kHidden, weight = 0;
    for (int64_t key = first; key <= last; key += kKeys) {
      const int keys = last + 1 - key < kKeys ? int(last + 1 - key) : kKeys;
      float best = top;
      for (int j = 0; j < keys; j++) {
        const float* row = k + (key + j) * d;
        VecF products = splat(0.0f);
        int i = 0;
        for (; i + kLanes <= d; i += kLanes) products += load(x + i) * load(row + i);
        float score = sum(products);
        for (; i < d; i++) score += x[i] * row[i];
        scores[j] = cap(score * scale);
        best = scores[j] > best ? scores[j] : best;
      }
      for (int j = keys; j % kLanes; j++) scores[j] = kHidden;
      const VecF old = vexp(splat(top - best));
      top = best;
      VecF sums = splat(0.0f);
      for (int j = 0; j < keys; j += kLanes) {
        const VecF p = vexp(load(scores + j) - top);
        store(scores + j, p);
        sums += p;
      }
      weight = weight * old[0] + sum(sums);
      for (int i = 0; i < vectors; i++) {
        const int at = i * kLanes, count = d - at;
        VecF even = total[i] * old, odd = splat(0.0f);
        int j = 0;
        if (count >= kLanes) {
          for (; j + 2 <= keys; j += 2) {
            even += load(v + (key + j) * d + at) * scores[j];
            odd += load(v + (key + j + 1) * d + at) * scores[j + 1];
          }
        }
        for (; j < keys; j++) even += load_some(v + (key + j) * d + at, count) * scores[j];
        total[i] = even + odd;
      }
    }
    float* y = out.row(c, t) + head * d;
    for (int i = 0; i < vectors; i++) store_some(y + i * kLanes, total[i] / weight, d - i * kLanes);
  }

  void tile(const Context& c, int head, int first_row, const float* k, const float* v) const {
    const int rows = c.rows[0] - first_row < kTile ? c.rows[0] - first_row : kTile;
    constexpr int kKeys = 32;
    VecF x[kMaxHead][kVectors], total[kMaxHead][kVectors], p[kKeys][kVectors];
    VecF top[kVectors], weight[kVectors];
    VecI at[kVectors];  // each row's position, counted from the tile's first
    for (int i = 0; i < d; i++) {
      float column[kTile] = {};
      for (int t = 0; t < rows; t++) column[t] = (q.row(c, first_row + t) + head * d)[i] * scale;
      for (int u = 0; u < kVectors; u++) {
        x[i][u] = load(column + u * kLanes);
        total[i][u] = splat(0.0f);
      }
    }
    for (int u = 0; u < kVectors; u++) {
      top[u] = splat(kHidden);
      weight[u] = splat(0.0f);
    }
    for (int t = 0; t < kTile; t++) at[t / kLanes][t % kLanes] = t < rows ? t : rows - 1;
    const int64_t start = c.position + first_row, last = start + rows - 1;
    const int64_t first = start - window + 1 > 0 ? start - window + 1 : 0;
    for (int64_t key = first; key <= last; key += kKeys) {
      const int keys = last + 1 - key < kKeys ? int(last + 1 - key) : kKeys;
      int j = 0;
      for (; j + 4 <= keys; j += 4) {
        const float* row = k + (key + j) * d;
        VecF s[4][kVectors];
        for (int a = 0; a < 4; a++) {
          for (int u = 0; u < kVectors; u++) s[a][u] = splat(0.0f);
        }
        for (int i = 0; i < d; i++) {
#pragma GCC unroll 4
          for (int a = 0; a < 4; a++) {
#pragma GCC unroll 2
            for (int u = 0; u < kVectors; u++) s[a][u] += x[i][u] * row[a * d + i];
          }
        }
        for (int a = 0; a < 4; a++) {
          for (int u = 0; u < kVectors; u++) p[j + a][u] = s[a][u];
        }
      }
      for (; j < keys; j++) {
        const float* row = k + (key + j) * d;
        for (int u = 0; u < kVectors; u++) {
          VecF s = splat(0.0f);
          for (int i = 0; i < d; i++) s += x[i][u] * row[i];
          p[j][u] = s;
        }
      }
      if (softcap > 0) {
        for (j = 0; j < keys; j++) {
          for (int u = 0; u < kVectors; u++) p[j][u] = softcap * vtanh(p[j][u] / softcap);
        }
      }
      if (key + keys - 1 > start || key <= last - window) {  // some row must not see some key
        const VecF hidden = splat(kHidden);
        for (j = 0; j < keys; j++) {
          const int64_t behind = key + j - start, gone = behind + window;
          const VecI newest = splat_int(int(behind)), oldest = splat_int(gone < kTile ? int(gone) : kTile);
          for (int u = 0; u < kVectors; u++) {
            p[j][u] = (newest > at[u]) | (oldest <= at[u]) ? hidden : p[j][u];
          }
        }
      }
      for (int u = 0; u < kVectors; u++) {
        VecF best = top[u];
        for (j = 0; j < keys; j++) best = vmax(best, p[j][u]);
        const VecF old = vexp(top[u] - best);
        VecF sums = splat(0.0f);
        for (j = 0; j < keys; j++) {
          // A row that has seen no key yet has `best` hidden too: nothing may count then.
          p[j][u] = p[j][u] <= kHidden ? splat(0.0f) : vexp(p[j][u] - best);
          sums += p[j][u];
        }
        weight[u] = weight[u] * old + sums;
        top[u] = best;
        for (int i = 0; i < d; i++) total[i][u] *= old;
      }
      int i = 0;
      for (; i + 4 <= d; i += 4) {
        VecF s[4][kVectors];
        for (int a = 0; a < 4; a++) {
          for (int u = 0; u < kVectors; u++) s[a][u] = total[i + a][u];
        }
        for (j = 0; j < keys; j++) {
          const float* row = v + (key + j) * d + i;
#pragma GCC unroll 4
          for (int a = 0; a < 4; a++) {
#pragma GCC unroll 2
            for (int u = 0; u < kVectors; u++) s[a][u] += p[j][u] * row[a];
          }
        }
        for (int a = 0; a < 4; a++) {
          for (int u = 0; u < kVectors; u++) total[i + a][u] = s[a][u];
        }
      }
      for (; i < d; i++) {
        for (j = 0; j < keys; j++) {
          for (int u = 0; u < kVectors; u++) total[i][u] += p[j][u] * v[(key + j) * d + i];
        }
      }
    }
    for (int u = 0; u < kVectors; u++) weight[u] = 1.0f / weight[u];
    for (int i = 0; i < d; i++) {
      float column[kTile];
      for (int u = 0; u < kVectors; u++) store(column + u * kLanes, total[i][u] * weight[u]);
      for (int t = 0; t < rows; t++) (out.row(c, first_row + t) + head * d)[i] = column[t];
    }
  }
};

}  // namespace

std::unique_ptr<MixOp> read_attention(Reader& r) { return std::make_unique<Attention>(r); }

}  // namespace edge
