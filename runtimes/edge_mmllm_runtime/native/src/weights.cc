#include "weights.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace edge {

namespace {

constexpr size_t kHugePage = size_t(2) << 20;

size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

// Eight nibbles, lowest first, to four bytes: nibble i low and nibble i + 4 high in byte i.
uint32_t interleave(uint32_t nibbles) {
  auto spread = [](uint32_t x) {
    x = (x | x << 8) & 0x00ff00ffu;
    return (x | x << 4) & 0x0f0f0f0fu;
  };
  return spread(nibbles & 0xffff) | spread(nibbles >> 16) << 4;
}

}  // namespace

Arena::Arena(size_t bytes) : size_(round_up(bytes + 64, kHugePage)) {
  base_ = static_cast<uint8_t*>(std::aligned_alloc(kHugePage, size_));
  if (base_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  madvise(base_, size_, MADV_HUGEPAGE);
#endif
}

Arena::~Arena() { std::free(base_); }

uint8_t* Arena::take(size_t bytes) {
  uint8_t* taken = base_ + used_;
  used_ += round_up(bytes, 64);
  if (used_ > size_) throw std::bad_alloc();
  return taken;
}

void lay_out(Matrix& m, const MatrixSource& source) {
  if (!m.quantized()) {
    m.group_bytes = size_t(m.k) * kLanes * (m.kind == Matrix::kFloat16 ? 2 : 4);
    return;
  }
  m.zeros = source.int_zeros != nullptr || source.float_zeros != nullptr;
  m.half_scales = source.float_zeros == nullptr;
  const int bits = m.kind == Matrix::kInt4 ? 4 : 8;
  m.block_bytes = size_t(kLanes) * ((m.half_scales ? 2 : 4) * (m.zeros ? 2 : 1) + m.block * bits / 8);
  m.group_bytes = m.block_bytes * m.blocks;
}

void pack(Matrix& m, const MatrixSource& source, uint8_t* to) {
  m.data = to;
  std::memset(to, 0, m.bytes());
  if (!m.quantized()) {
    for (int row = 0; row < m.n; row++) {
      uint8_t* group = to + row / kLanes * m.group_bytes;
      const int lane = row % kLanes;
      if (m.kind == Matrix::kFloat16) {
        const uint16_t* from = static_cast<const uint16_t*>(source.codes) + size_t(row) * m.k;
        for (int i = 0; i < m.k; i++) reinterpret_cast<uint16_t*>(group)[i * kLanes + lane] = from[i];
      } else {
        const float* from = static_cast<const float*>(source.codes) + size_t(row) * m.k;
        for (int i = 0; i < m.k; i++) reinterpret_cast<float*>(group)[i * kLanes + lane] = from[i];
      }
    }
    return;
  }
  const int bits = m.kind == Matrix::kInt4 ? 4 : 8;
  const size_t blob = size_t(m.block) * bits / 8;
  const size_t zero_row = (size_t(m.blocks) * bits + 7) / 8;
  const size_t scale_bytes = m.half_scales ? 2 : 4;
  const uint8_t* codes = static_cast<const uint8_t*>(source.codes);
  for (int row = 0; row < m.n; row++) {
    const int lane = row % kLanes;
    uint8_t* block = to + row / kLanes * m.group_bytes;
    for (int b = 0; b < m.blocks; b++, block += m.block_bytes) {
      const size_t at = size_t(row) * m.blocks + b;
      if (m.half_scales) {
        reinterpret_cast<uint16_t*>(block)[lane] = static_cast<const uint16_t*>(source.scales)[at];
      } else {
        reinterpret_cast<float*>(block)[lane] = static_cast<const float*>(source.scales)[at];
      }
      uint8_t* out = block + kLanes * scale_bytes;
      if (m.zeros) {
        float zero;
        if (source.float_zeros != nullptr) {
          zero = source.float_zeros[at];
        } else {
          const uint8_t* zeros = source.int_zeros + row * zero_row;
          zero = bits == 8 ? zeros[b] : zeros[b / 2] >> (b % 2 * 4) & 15;
        }
        if (m.half_scales) {  // whole numbers up to 255: exact
          reinterpret_cast<uint16_t*>(out)[lane] = float_to_half(zero);
        } else {
          reinterpret_cast<float*>(out)[lane] = zero;
        }
        out += kLanes * scale_bytes;
      }
      const uint8_t* from = codes + (size_t(row) * m.blocks + b) * blob;
      for (size_t i = 0; i < blob; i += 4) {  // 8 codes at 4 bits, 4 at 8 bits
        uint32_t word;
        std::memcpy(&word, from + i, 4);
        if (bits == 4) word = interleave(word);
        std::memcpy(out + i * kLanes + lane * 4, &word, 4);
      }
    }
  }
}

void let_go(const std::vector<std::pair<const void*, size_t>>& sources) {
#if defined(__linux__)
  std::vector<std::pair<uintptr_t, uintptr_t>> files;
  std::FILE* maps = std::fopen("/proc/self/maps", "r");
  if (maps == nullptr) return;
  char line[4352];  // a path has 4096 bytes at most
  while (std::fgets(line, sizeof line, maps) != nullptr) {
    unsigned long start, stop, inode;
    if (std::sscanf(line, "%lx-%lx %*s %*s %*s %lu", &start, &stop, &inode) == 3 && inode != 0) {
      files.emplace_back(start, stop);
    }
  }
  std::fclose(maps);
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  for (const auto& source : sources) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(source.first);
    const uintptr_t start = (address + page - 1) / page * page;
    const uintptr_t stop = (address + source.second) / page * page;
    for (const auto& file : files) {
      if (start < stop && start >= file.first && stop <= file.second) {
        madvise(reinterpret_cast<void*>(start), stop - start, MADV_DONTNEED);
      }
    }
  }
#else
  (void)sources;
#endif
}

void Quantized::resize(int rows) {
  const size_t size = size_t(rows);
  if (q.size() < size * stride()) {
    q.assign(size * stride(), 0);
    scale.assign(size * blocks, 0.0f);
    sum.assign(size * blocks, 0);
  }
}

void Quantized::set_row(int row, const float* x) {
  int8_t* out = q.data() + size_t(row) * stride();
  for (int b = 0; b < blocks; b++) {
    const int begin = b * block, end = begin + block < width ? begin + block : width;
    int i = begin;
    VecF top = splat(0.0f);
    for (; i + kLanes <= end; i += kLanes) {
      const VecF v = load(x + i);
      top = vmax(top, vmax(v, -v));
    }
    float size = largest(top);
    for (; i < end; i++) size = std::fabs(x[i]) > size ? std::fabs(x[i]) : size;
    const float inverse = size > 0 ? 127.0f / size : 0.0f;
    VecI totals = splat_int(0);
    for (i = begin; i + kLanes <= end; i += kLanes) {
      const VecF rounded = load(x + i) * inverse + 12582912.0f;
      const VecI code = to_int(rounded - 12582912.0f);
      totals += code;
      typedef int8_t Narrow __attribute__((vector_size(kLanes)));
      const Narrow narrow = __builtin_convertvector(code, Narrow);
      std::memcpy(out + i, &narrow, kLanes);
    }
    int32_t total = 0;
    for (int lane = 0; lane < kLanes; lane++) total += totals[lane];
    for (; i < end; i++) {
      out[i] = int8_t(std::lrint(x[i] * inverse));
      total += out[i];
    }
    scale[size_t(row) * blocks + b] = size / 127.0f;
    sum[size_t(row) * blocks + b] = total;
  }
}

}  // namespace edge
