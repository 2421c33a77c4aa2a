// Vectors of floats: 16 with AVX-512, 8 with AVX2, 4 with NEON and elsewhere.
//
// Arithmetic is GCC's and clang's vector extension. Only what that lacks is written for each instruction set. Nothing
// is contracted or reordered by the compiler, so a result's bits depend on its own operands only.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace dbrx {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define DBRX_AVX2
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class Vector>
inline Vector load_as(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Floats load(const float* from) {
  return load_as<Floats>(from);
}

// The first `count` floats, then zeros. Nothing behind them is read.
inline Floats load_part(const float* from, int64_t count) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_loadu_ps(count >= LANES ? __mmask16(0xffff) : __mmask16((1u << count) - 1), from);
#else
  if (count >= LANES) return load(from);
  float part[LANES] = {};
  std::memcpy(part, from, count * sizeof(float));
  return load(part);
#endif
}

inline void store(float* to, Floats v) {
  std::memcpy(to, &v, sizeof v);
}

inline Floats splat(float x) {
  // Adding zero would be an instruction, since -0 + 0 is 0.
  return x - Floats{};
}

inline Ints splat_int(int32_t x) {
  return Ints{} + x;
}

inline Floats to_floats(Ints v) {
  return __builtin_convertvector(v, Floats);
}

// a * b + c, rounded once where the machine can.
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(DBRX_AVX2)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

inline Floats max(Floats a, Floats b) {
  return a > b ? a : b;
}

// The sum and the largest of all lanes: half of them with the other half, then half of these, and so on.
template <class Combine>
inline float reduce(Floats v, const Combine& combine) {
#if defined(__AVX512F__)
  v = combine(v, (Floats)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0x4e));
  v = combine(v, (Floats)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xb1));
  v = combine(v, (Floats)_mm512_permute_ps((__m512)v, 0x4e));
  v = combine(v, (Floats)_mm512_permute_ps((__m512)v, 0xb1));
#elif defined(DBRX_AVX2)
  v = combine(v, (Floats)_mm256_permute2f128_ps((__m256)v, (__m256)v, 1));
  v = combine(v, (Floats)_mm256_permute_ps((__m256)v, 0x4e));
  v = combine(v, (Floats)_mm256_permute_ps((__m256)v, 0xb1));
#else
  v = combine(v, Floats{v[2], v[3], v[0], v[1]});
  v = combine(v, Floats{v[1], v[0], v[3], v[2]});
#endif
  return v[0];
}

inline float sum(Floats v) {
  return reduce(v, [](Floats a, Floats b) { return a + b; });
}

inline float largest(Floats v) {
  return reduce(v, [](Floats a, Floats b) { return max(a, b); });
}

inline float bfloat16_as_float(uint16_t half) {
  return bits_as<float>(uint32_t(half) << 16);
}

inline float float16_as_float(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return bits_as<__fp16>(half);
#else
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return bits_as<float>(sign | 0x7f800000 | rest << 13);
  if (rest >= 0x0400) return bits_as<float>(sign | ((rest << 13) + (112u << 23)));
  const float small = rest * 0x1p-24f;
  return sign ? -small : small;
#endif
}

// Rounded to nearest, ties to even.
inline uint16_t float_as_bfloat16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t float_as_float16(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, 0);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return bits_as<uint16_t>(__fp16(x));
#else
  const uint32_t bits = bits_as<uint32_t>(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);
  // Adding this number shifts the bits that stay to the end, and rounds.
  if (rest < 0x38800000) return uint16_t(sign | (bits_as<uint32_t>(bits_as<float>(rest) + 0.5f) - 0x3f000000));
  return uint16_t(sign | ((rest + 0xfff + (rest >> 13 & 1) - (112u << 23)) >> 13));
#endif
}

inline Floats from_bfloat16(const uint16_t* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_as<__m256i>(from)), 16);
#elif defined(DBRX_AVX2)
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_as<__m128i>(from)), 16);
#else
  Floats v;
  for (int n = 0; n < LANES; ++n) v[n] = bfloat16_as_float(from[n]);
  return v;
#endif
}

inline Floats from_float16(const uint16_t* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(load_as<__m256i>(from));
#elif defined(DBRX_AVX2)
  return (Floats)_mm256_cvtph_ps(load_as<__m128i>(from));
#else
  Floats v;
  for (int n = 0; n < LANES; ++n) v[n] = float16_as_float(from[n]);
  return v;
#endif
}

// Unsigned bytes less 128.
inline Floats from_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  const __m128i flipped = _mm_xor_si128(load_as<__m128i>(from), _mm_set1_epi8(char(0x80)));
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(flipped));
#elif defined(DBRX_AVX2)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_xor_si128(bytes, _mm_set1_epi8(char(0x80)))));
#else
  Ints v;
  for (int n = 0; n < LANES; ++n) v[n] = int(from[n]) - 128;
  return to_floats(v);
#endif
}

// e^x, within 2 units in the last place. Below -87 it is 0; above 88 it is infinite.
inline Floats exp(Floats x) {
  const Floats low = splat(-87.3f), high = splat(88.72f);
  Floats inside = x < low ? low : x;
  inside = inside > high ? high : inside;
  const Floats scaled = inside * 1.44269504f + 12582912.0f;
  const Floats n = scaled - 12582912.0f;
  Floats r = fma(n, splat(-0.693145752f), inside);
  r = fma(n, splat(-1.42860677e-6f), r);
  Floats p = splat(1.9875691e-4f);
  p = fma(p, r, splat(1.3981999e-3f));
  p = fma(p, r, splat(8.3334519e-3f));
  p = fma(p, r, splat(4.1665796e-2f));
  p = fma(p, r, splat(1.6666666e-1f));
  p = fma(p, r, splat(5.0000001e-1f));
  p = fma(p, r * r, r) + 1.0f;
  // 2^n in two steps, since n can be 128.
  const Ints whole = __builtin_convertvector(n, Ints), half = whole >> 1;
  const Floats first = bits_as<Floats>((half + 127) << 23), second = bits_as<Floats>((whole - half + 127) << 23);
  Floats y = p * first * second;
  y = x < low ? splat(0) : y;
  y = x > high ? splat(HUGE_VALF) : y;
  return x == x ? y : x;
}

}  // namespace dbrx
