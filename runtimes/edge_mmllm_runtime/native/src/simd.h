// Vectors of the machine's own width, and the few operations that need its instructions.
//
// Everything else is written with the compiler's vector types, so a new instruction set needs
// `dot4`, the conversion of halves, and nothing more.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace edge {

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint8_t VecB __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 4)));

#define EDGE_INLINE inline __attribute__((always_inline))

EDGE_INLINE VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

EDGE_INLINE void store(float* p, VecF v) { std::memcpy(p, &v, sizeof v); }

EDGE_INLINE VecB load_bytes(const void* p) {
  VecB v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

EDGE_INLINE VecF splat(float x) { return x - VecF{}; }
EDGE_INLINE VecI splat_int(int32_t x) { return x - VecI{}; }
EDGE_INLINE VecF to_float(VecI v) { return __builtin_convertvector(v, VecF); }
EDGE_INLINE VecI to_int(VecF v) { return __builtin_convertvector(v, VecI); }
EDGE_INLINE VecF vmax(VecF a, VecF b) { return a > b ? a : b; }
EDGE_INLINE VecF vmin(VecF a, VecF b) { return a < b ? a : b; }

EDGE_INLINE float sum(VecF v) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += v[i];
  return total;
#endif
}

EDGE_INLINE float largest(VecF v) {
  float top = v[0];
  for (int i = 1; i < kLanes; i++) top = v[i] > top ? v[i] : top;
  return top;
}

// Four consecutive int8 activations, repeated for every lane.
EDGE_INLINE VecB splat4(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return (VecB)splat_int(four);
}

// sums[lane] += sum over 4 bytes of weight (unsigned) times activation (signed).
EDGE_INLINE VecI dot4(VecI sums, VecB weights, VecB activations) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  return (VecI)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, (__m512i)activations);
#elif defined(__AVXVNNI__) && defined(__AVX2__) && !defined(__AVX512BW__)
  return (VecI)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)weights, (__m256i)activations);
#elif defined(__AVX512BW__)
  const __m512i w = (__m512i)weights, a = (__m512i)activations;
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(w, _mm512_set1_epi16(255)),
                                         _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(a, 8));
  return sums + (VecI)even + (VecI)odd;
#elif defined(__AVX2__)
  const __m256i w = (__m256i)weights, a = (__m256i)activations;
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(a, 8));
  return sums + (VecI)even + (VecI)odd;
#elif defined(__ARM_FEATURE_MATMUL_INT8)
  return (VecI)vusdotq_s32((int32x4_t)sums, (uint8x16_t)weights, (int8x16_t)activations);
#elif defined(__ARM_FEATURE_DOTPROD)
  // Signed only: w = (w - 128) + 128, and 128 is 2 * 64.
  const int8x16_t a = (int8x16_t)activations;
  const int8x16_t low = vreinterpretq_s8_u8(veorq_u8((uint8x16_t)weights, vdupq_n_u8(128)));
  int32x4_t total = vdotq_s32((int32x4_t)sums, low, a);
  total = vdotq_s32(total, vdupq_n_s8(64), a);
  return (VecI)vdotq_s32(total, vdupq_n_s8(64), a);
#elif defined(__ARM_NEON)
  // Without dot products: 16-bit factors, 32-bit products, the four of a lane added up in pairs.
  const uint8x16_t w = (uint8x16_t)weights;
  const int8x16_t a = (int8x16_t)activations;
  const int16x8_t wl = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(w)));
  const int16x8_t wh = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(w)));
  const int16x8_t al = vmovl_s8(vget_low_s8(a)), ah = vmovl_s8(vget_high_s8(a));
  const int32x4_t p0 = vmull_s16(vget_low_s16(wl), vget_low_s16(al));
  const int32x4_t p1 = vmull_s16(vget_high_s16(wl), vget_high_s16(al));
  const int32x4_t p2 = vmull_s16(vget_low_s16(wh), vget_low_s16(ah));
  const int32x4_t p3 = vmull_s16(vget_high_s16(wh), vget_high_s16(ah));
#if defined(__aarch64__)
  return sums + (VecI)vpaddq_s32(vpaddq_s32(p0, p1), vpaddq_s32(p2, p3));
#else
  const int32x2_t s0 = vadd_s32(vget_low_s32(p0), vget_high_s32(p0));
  const int32x2_t s1 = vadd_s32(vget_low_s32(p1), vget_high_s32(p1));
  const int32x2_t s2 = vadd_s32(vget_low_s32(p2), vget_high_s32(p2));
  const int32x2_t s3 = vadd_s32(vget_low_s32(p3), vget_high_s32(p3));
  return sums + (VecI)vcombine_s32(vpadd_s32(s0, s1), vpadd_s32(s2, s3));
#endif
#else
  const int8_t* a = (const int8_t*)&activations;
  for (int lane = 0; lane < kLanes; lane++) {
    int32_t total = 0;
    for (int i = 0; i < 4; i++) total += int32_t(weights[4 * lane + i]) * a[4 * lane + i];
    sums[lane] += total;
  }
  return sums;
#endif
}

EDGE_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, body = h & 0x7fff;
  float value;
  if (body >= 0x7c00) {  // infinity or not a number
    const uint32_t bits = sign | 0x7f800000u | (body & 0x3ff) << 13;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  // Shift the exponent into place and let a multiplication move its bias; subnormals come right.
  const uint32_t bits = body << 13;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  return sign ? -value : value;
}

EDGE_INLINE uint16_t float_to_half(float value) {
#if defined(__F16C__)
  return _cvtss_sh(value, 0);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  float size = std::fabs(value);
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | uint16_t(std::lrint(size * 0x1p24f));
  std::memcpy(&bits, &size, 4);
  bits += 0xfff + (bits >> 13 & 1);  // to nearest, ties to even
  return sign | uint16_t((bits - (112u << 23)) >> 13);
#endif
}

// kLanes halves.
EDGE_INLINE VecF load_half(const uint16_t* p) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__) && defined(__F16C__)
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  return (VecF)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
  VecF v;
  for (int i = 0; i < kLanes; i++) v[i] = half_to_float(p[i]);
  return v;
#endif
}

// -- elementary functions, float32, a few units in the last place ------------------------------

EDGE_INLINE VecF vexp(VecF x) {
  x = vmin(vmax(x, splat(-87.0f)), splat(88.0f));
  const VecF shifted = x * 1.44269504088896341f + 12582912.0f;  // rounds to nearest
  const VecF n = shifted - 12582912.0f;
  VecF r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  VecF p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const VecI power = (to_int(n) + 127) << 23;
  return p * (VecF)power;
}

// The natural logarithm of x in [2^-126, infinity).
EDGE_INLINE VecF vlog(VecF x) {
  const VecI bits = (VecI)x;
  VecI exponent = ((bits >> 23) & 255) - 126;
  VecF m = (VecF)((bits & 0x007fffff) | 0x3f000000);  // [0.5, 1)
  const VecI small = m < 0.707106781186547524f;
  exponent = exponent + small;  // a true lane is -1
  m = small ? m + m : m;
  const VecF f = m - 1.0f, z = f * f, e = to_float(exponent);
  VecF p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f * z + e * -2.12194440e-4f - 0.5f * z;
  return f + p + e * 0.693359375f;
}

EDGE_INLINE VecF vsigmoid(VecF x) { return 1.0f / (1.0f + vexp(-x)); }

EDGE_INLINE VecF vtanh(VecF x) {
  const VecF size = vmax(x, -x);
  const VecF square = x * x;  // small ones by a series: 1 - 2 / (e + 1) would cancel
  const VecF series = x + x * square * (-0.333333333f + square * (0.133333333f - square * 0.053968254f));
  const VecF large = 1.0f - 2.0f / (vexp(2.0f * size) + 1.0f);
  return size < 0.08f ? series : (x < 0.0f ? -large : large);
}

EDGE_INLINE VecF vsoftplus(VecF x) {
  const VecF u = vexp(-vmax(x, -x));
  const VecF w = 1.0f + u;
  const VecF one = splat(1.0f);
  const VecF gap = w - one;
  const VecF log1p = gap == 0.0f ? u : vlog(w) * (u / (gap == 0.0f ? one : gap));
  return vmax(x, splat(0.0f)) + log1p;
}

// Source: Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
EDGE_INLINE VecF verf(VecF x) {
  const VecF size = vmax(x, -x);
  const VecF t = 1.0f / (1.0f + 0.3275911f * size);
  VecF p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const VecF y = 1.0f - p * t * vexp(-size * size);
  return x < 0.0f ? -y : y;
}

}  // namespace edge
