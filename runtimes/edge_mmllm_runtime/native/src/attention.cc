// Causal grouped-query attention over the key and value states.
#include <atomic>
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
    group = heads / kv_heads;
    partial.resize(size_t(heads) * kMaxParts * (d + 2));
    finished = std::make_unique<std::atomic<int>[]>(kv_heads);
    for (int h = 0; h < kv_heads; h++) finished[h].store(0);
  }

  // One row: a chunk is a part of the keys for all heads that share them, so that each key is read
  // once; whoever finishes last puts the parts together.
  static constexpr int kMaxParts = 8, kPartKeys = 48, kMaxGroup = 16;
  int group;
  mutable std::vector<float> partial;  // (heads, part): top, weight, total
  mutable std::unique_ptr<std::atomic<int>[]> finished;

  int parts(const Context& c) const {
    const int64_t keys = c.position + 1 < window ? c.position + 1 : window;
    const int64_t count = keys / kPartKeys;
    return count < 1 ? 1 : count > kMaxParts ? kMaxParts : int(count);
  }
  bool grouped(const Context& c) const { return c.rows[0] == 1 && group <= kMaxGroup; }

  // Many rows: lanes are rows of q, so that no sum runs across lanes.
  static constexpr int kVectors = 2, kTile = kVectors * kLanes;

  int chunks(const Context& c) const override {
    if (grouped(c)) return kv_heads * parts(c);
    return c.rows[0] < 4 ? heads : heads * ((c.rows[0] + kTile - 1) / kTile);
  }

  void run(Context& c, int chunk) const override {
    if (grouped(c)) {
      const int count = parts(c), kv = chunk / count, part = chunk % count;
      switch (group) {
        case 1: return part_of<1>(c, kv, part, count);
        case 2: return part_of<2>(c, kv, part, count);
        case 3: return part_of<3>(c, kv, part, count);
        case 4: return part_of<4>(c, kv, part, count);
        case 8: return part_of<8>(c, kv, part, count);
        default: return part_of<0>(c, kv, part, count);
      }
    }
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

  template <int kGroup>
  void part_of(const Context& c, int kv, int part, int count) const {
    constexpr int kSize = kGroup ? kGroup : kMaxGroup, kKeys = 64;
    const int size = kGroup ? kGroup : group, vectors = (d + kLanes - 1) / kLanes;
    const float* k = c.states[k_state] + size_t(kv) * c.capacity * d;
    const float* v = c.states[v_state] + size_t(kv) * c.capacity * d;
    const float* x = q.row(c, 0) + size_t(kv) * size * d;
    const int64_t last = c.position, first = last - window + 1 > 0 ? last - window + 1 : 0;
    const int64_t all = last - first + 1, start = first + all * part / count;
    const int64_t stop = first + all * (part + 1) / count;
    float scores[kSize][kKeys], top[kSize], weight[kSize];
    VecF total[kSize][kMaxHead / kLanes], old[kSize];
    for (int g = 0; g < size; g++) {
      top[g] = kHidden;
      weight[g] = 0;
      for (int i = 0; i < vectors; i++) total[g][i] = splat(0.0f);
    }
    for (int64_t key = start; key < stop; key += kKeys) {
      const int keys = stop - key < kKeys ? int(stop - key) : kKeys;
      for (int j = 0; j < keys; j++) {
        const float* row = k + (key + j) * d;
        VecF products[kSize];
        for (int g = 0; g < size; g++) products[g] = splat(0.0f);
        for (int i = 0; i < d; i += kLanes) {
          const VecF value = load_some(row + i, d - i);
          for (int g = 0; g < size; g++) products[g] += value * load_some(x + g * d + i, d - i);
        }
        for (int g = 0; g < size; g++) scores[g][j] = sum(products[g]) * scale;
      }
      for (int g = 0; g < size; g++) {
        float best = top[g];
        for (int j = 0; j < keys; j++) {
          scores[g][j] = cap(scores[g][j]);
          best = scores[g][j] > best ? scores[g][j] : best;
        }
        for (int j = keys; j % kLanes; j++) scores[g][j] = kHidden;
        old[g] = vexp(splat(top[g] - best));
        top[g] = best;
        VecF sums = splat(0.0f);
        for (int j = 0; j < keys; j += kLanes) {
          const VecF p = vexp(load(scores[g] + j) - best);
          store(scores[g] + j, p);
          sums += p;
        }
        weight[g] = weight[g] * old[g][0] + sum(sums);
      }
      for (int i = 0; i < vectors; i++) {
        const int at = i * kLanes;
        VecF now[kSize];
        for (int g = 0; g < size; g++) now[g] = total[g][i] * old[g];
        for (int j = 0; j < keys; j++) {
          const VecF value = load_some(v + (key + j) * d + at, d - at);
          for (int g = 0; g < size; g++) now[g] += value * scores[g][j];
        }
        for (int g = 0; g < size; g++) total[g][i] = now[g];
      }
    }
    const size_t stride = size_t(d) + 2;
    for (int g = 0; g < size; g++) {
      const int head = kv * size + g;
      float* to = count == 1 ? out.row(c, 0) + head * d : partial.data() + (size_t(head) * kMaxParts + part) * stride + 2;
      const float scaled = count == 1 ? 1.0f / weight[g] : 1.0f;
      for (int i = 0; i < vectors; i++) store_some(to + i * kLanes, total[g][i] * scaled, d - i * kLanes);
      if (count > 1) {
        to[-2] = top[g];
        to[-1] = weight[g];
      }
    }
    if (count == 1 || finished[kv].fetch_add(1, std::memory_order_acq_rel) != count - 1) return;
    finished[kv].store(0, std::memory_order_relaxed);
    for (int g = 0; g < size; g++) {
      const int head = kv * size + g;
      const float* from = partial.data() + size_t(head) * kMaxParts * stride;
      float best = from[0], share[kMaxParts], whole = 0;
      for (int p = 1; p < count; p++) best = from[p * stride] > best ? from[p * stride] : best;
      for (int p = 0; p < count; p++) {
        share[p] = std::exp(from[p * stride] - best);
        whole += share[p] * from[p * stride + 1];
      }
      for (int p = 0; p < count; p++) share[p] /= whole;
      float* y = out.row(c, 0) + head * d;
      each(d, [&](int i, int n) {
        VecF mixed = splat(0.0f);
        for (int p = 0; p < count; p++) mixed += load_some(from + p * stride + 2 + i, n) * share[p];
        store_some(y + i, mixed, n);
      });
    }
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
