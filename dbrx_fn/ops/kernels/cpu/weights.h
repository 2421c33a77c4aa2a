// Matrices as the tree stores them (`dbrx_fn/ops/formats.py`), multiplied by rows of floats and turned into floats.
//
// A matrix is `[outer inner]`, row-contiguous. A row's product has one order of additions, whatever rows stand beside
// it. Quantized numbers are multiplied as integers around zero, and by their group's scale at its end.
#pragma once

#include <cstdint>

#include "simd.h"

namespace dbrx {

// `matrix.py` has the same numbers.
enum Kind : int64_t { FLOAT32, BFLOAT16, FLOAT16, AFFINE8, AFFINE4, MXFP4 };

// Numbers by which a kernel's `numbers` describe a matrix: kind, the scales' kind, group size, outer, inner.
constexpr int MATRIX_NUMBERS = 5;

struct Matrix {
  Kind kind;
  Kind scale_kind;
  int64_t group;
  int64_t outer;
  int64_t inner;
  const char* weight;
  const char* scales;
  const char* biases;

  int64_t row_bytes() const {
    return inner * (kind == FLOAT32 ? 8 : kind <= FLOAT16 ? 4 : kind == AFFINE8 ? 2 : 1) / 2;
  }

  int64_t scale_bytes() const {
    return kind == MXFP4 ? 1 : scale_kind == FLOAT32 ? 4 : 2;
  }

  int64_t groups() const {
    return inner / group;
  }

  // The matrix of one expert, of `[expert outer inner]`.
  Matrix of(int64_t expert) const {
    Matrix one = *this;
    one.weight += expert * outer * row_bytes();
    if (scales) one.scales += expert * outer * groups() * scale_bytes();
    if (biases) one.biases += expert * outer * groups() * scale_bytes();
    return one;
  }
};

// Reads a matrix from a kernel's arguments: its numbers, then its leaves, and moves on behind them.
inline Matrix next_matrix(const int64_t*& numbers, const void* const*& inputs) {
  Matrix m{Kind(numbers[0]), Kind(numbers[1]), numbers[2], numbers[3], numbers[4], nullptr, nullptr, nullptr};
  numbers += MATRIX_NUMBERS;
  m.weight = static_cast<const char*>(*inputs++);
  if (m.kind >= AFFINE8) m.scales = static_cast<const char*>(*inputs++);
  if (m.kind == AFFINE8 || m.kind == AFFINE4) m.biases = static_cast<const char*>(*inputs++);
  return m;
}

inline float e8m0_as_float(uint8_t scale) {
  return scale == 255 ? bits_as<float>(0x7fc00000u) : scale ? bits_as<float>(uint32_t(scale) << 23) : 0x1p-127f;
}

template <Kind SCALES>
inline float scale_at(const char* scales, int64_t place) {
  if constexpr (SCALES == FLOAT32) return reinterpret_cast<const float*>(scales)[place];
  if constexpr (SCALES == BFLOAT16) return bfloat16_as_float(reinterpret_cast<const uint16_t*>(scales)[place]);
  if constexpr (SCALES == FLOAT16) return float16_as_float(reinterpret_cast<const uint16_t*>(scales)[place]);
  if constexpr (SCALES == MXFP4) return e8m0_as_float(reinterpret_cast<const uint8_t*>(scales)[place]);
}

// Activations in the order in which products with one kind of matrix read them, padded with zeros.
struct Row {
  const float* x;
  // The sum of each group of an affine matrix.
  const float* sums;
};

// Matrices of 4 bits are read in words of 8 numbers, one word per lane.
constexpr int WORD = 8;
constexpr int BLOCK = WORD * LANES;

inline bool in_words(Kind kind) {
  return kind == AFFINE4 || kind == MXFP4;
}

// How many floats an arranged row takes.
inline int64_t arranged_size(const Matrix& m) {
  const int64_t step = in_words(m.kind) ? BLOCK : LANES;
  return (m.inner + step - 1) / step * step;
}

inline int64_t sums_size(const Matrix& m) {
  return m.biases ? m.groups() : 0;
}

// Arranges a row `x` `[inner]`. `to` has room for `arranged_size` floats, `sums` for `sums_size`.
inline Row arrange(const Matrix& m, const float* x, float* to, float* sums) {
  const int64_t size = arranged_size(m);
  if (in_words(m.kind)) {
    for (int64_t block = 0; block < size; block += BLOCK) {
      for (int n = 0; n < WORD; ++n) {
        for (int lane = 0; lane < LANES; ++lane) {
          const int64_t place = block + lane * WORD + n;
          to[block + n * LANES + lane] = place < m.inner ? x[place] : 0;
        }
      }
    }
  } else {
    std::memcpy(to, x, m.inner * sizeof(float));
    for (int64_t n = m.inner; n < size; ++n) to[n] = 0;
  }
  if (m.biases) {
    for (int64_t g = 0; g < m.groups(); ++g) {
      Floats total = splat(0);
      for (int64_t n = 0; n < m.group; n += LANES) total += load(x + g * m.group + n);
      sums[g] = sum(total);
    }
  }
  return {to, sums};
}

// e2m1 numbers, and those of 4 bits around zero.
alignas(64) constexpr float E2M1[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.f, -.5, -1, -1.5, -2, -3, -4, -6};
alignas(64) constexpr float AROUND_ZERO[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

template <Kind KIND>
inline Floats nibbles(Ints words, int n) {
  const Ints shifted = words >> (4 * n);
#if defined(__AVX512F__)
  // The instruction reads the last four bits of each lane only.
  return (Floats)_mm512_permutexvar_ps((__m512i)shifted, _mm512_load_ps(KIND == MXFP4 ? E2M1 : AROUND_ZERO));
#else
  const Ints four = shifted & 15;
  if constexpr (KIND == AFFINE4) return to_floats(four - 8);
#if defined(DBRX_AVX2)
  const __m256 size = _mm256_permutevar8x32_ps(_mm256_load_ps(E2M1), (__m256i)four);
  return bits_as<Floats>((Ints)size | (four >> 3 << 31));
#else
  Floats v;
  for (int lane = 0; lane < LANES; ++lane) v[lane] = E2M1[four[lane]];
  return v;
#endif
#endif
}

// The scales of a block's lanes, from scale `place` on. A group has `words` words.
template <Kind SCALES>
inline Floats spread_scales(const char* scales, int64_t place, int64_t groups, int64_t words) {
  const float first = scale_at<SCALES>(scales, place);
  if (words >= LANES) return splat(first);
#if defined(__AVX512F__)
  __m512 v = _mm512_set1_ps(first);
  for (int64_t n = 1; n < LANES / words && place + n < groups; ++n) {
    v = _mm512_mask_mov_ps(v, __mmask16(0xffffu << (n * words)), _mm512_set1_ps(scale_at<SCALES>(scales, place + n)));
  }
  return (Floats)v;
#else
  Floats v = splat(first);
  for (int lane = int(words); lane < LANES; ++lane) {
    const int64_t n = place + lane / words;
    v[lane] = n < groups ? scale_at<SCALES>(scales, n) : 0;
  }
  return v;
#endif
}

// Products of one row of a matrix with ROWS rows of activations.

template <Kind KIND, int ROWS>
inline void dense_dots(const Matrix& m, const char* weight, const Row* const* rows, float* out) {
  Floats total[ROWS];
  for (auto& t : total) t = splat(0);
  const int64_t whole = m.inner / LANES * LANES;
  const auto at = [weight](int64_t n) {
    if constexpr (KIND == FLOAT32) return load(reinterpret_cast<const float*>(weight) + n);
    if constexpr (KIND == BFLOAT16) return from_bfloat16(reinterpret_cast<const uint16_t*>(weight) + n);
    if constexpr (KIND == FLOAT16) return from_float16(reinterpret_cast<const uint16_t*>(weight) + n);
  };
  for (int64_t n = 0; n < whole; n += LANES) {
    const Floats w = at(n);
    for (int r = 0; r < ROWS; ++r) total[r] = fma(w, load(rows[r]->x + n), total[r]);
  }
  if (whole < m.inner) {
    constexpr int SIZE = KIND == FLOAT32 ? 4 : 2;
    char part[LANES * SIZE] = {};
    std::memcpy(part, weight + whole * SIZE, (m.inner - whole) * SIZE);
    Floats w;
    if constexpr (KIND == FLOAT32) w = load_as<Floats>(part);
    if constexpr (KIND == BFLOAT16) w = from_bfloat16(reinterpret_cast<const uint16_t*>(part));
    if constexpr (KIND == FLOAT16) w = from_float16(reinterpret_cast<const uint16_t*>(part));
    for (int r = 0; r < ROWS; ++r) total[r] = fma(w, load(rows[r]->x + whole), total[r]);
  }
  for (int r = 0; r < ROWS; ++r) out[r] = sum(total[r]);
}

// What the biases of a row of the matrix add. `middle` is what was taken from each quantized number.
template <Kind SCALES, int ROWS>
inline void add_biases(
    const Matrix& m, const char* scales, const char* biases, float middle, const Row* const* rows, float* out) {
  float total[ROWS] = {};
  for (int64_t g = 0; g < m.groups(); ++g) {
    const float bias = std::fma(scale_at<SCALES>(scales, g), middle, scale_at<SCALES>(biases, g));
    for (int r = 0; r < ROWS; ++r) total[r] = std::fma(bias, rows[r]->sums[g], total[r]);
  }
  for (int r = 0; r < ROWS; ++r) out[r] += total[r];
}

template <Kind SCALES, int ROWS>
inline void byte_dots(
    const Matrix& m, const char* weight, const char* scales, const char* biases, const Row* const* rows, float* out) {
  Floats total[ROWS];
  for (auto& t : total) t = splat(0);
  const auto* bytes = reinterpret_cast<const uint8_t*>(weight);
  for (int64_t g = 0, n = 0; g < m.groups(); ++g) {
    Floats inside[ROWS];
    for (auto& t : inside) t = splat(0);
    for (const int64_t last = n + m.group; n < last; n += LANES) {
      const Floats w = from_bytes(bytes + n);
      for (int r = 0; r < ROWS; ++r) inside[r] = fma(w, load(rows[r]->x + n), inside[r]);
    }
    const Floats scale = splat(scale_at<SCALES>(scales, g));
    for (int r = 0; r < ROWS; ++r) total[r] = fma(inside[r], scale, total[r]);
  }
  for (int r = 0; r < ROWS; ++r) out[r] = sum(total[r]);
  add_biases<SCALES, ROWS>(m, scales, biases, 128, rows, out);
}

template <Kind KIND, Kind SCALES, int ROWS>
inline void nibble_dots(
    const Matrix& m, const char* weight, const char* scales, const char* biases, const Row* const* rows, float* out) {
  Floats total[ROWS];
  for (auto& t : total) t = splat(0);
  const int64_t all = m.inner / WORD, words = m.group / WORD, groups = m.groups();
  const auto add = [&](Ints w, int64_t word, Floats scale) {
    Floats inside[ROWS];
    for (auto& t : inside) t = splat(0);
    for (int n = 0; n < WORD; ++n) {
      const Floats v = nibbles<KIND>(w, n);
      for (int r = 0; r < ROWS; ++r) inside[r] = fma(v, load(rows[r]->x + (word * WORD + n * LANES)), inside[r]);
    }
    for (int r = 0; r < ROWS; ++r) total[r] = fma(inside[r], scale, total[r]);
  };
  int64_t word = 0;
  for (; word + LANES <= all; word += LANES) {
    add(load_as<Ints>(weight + word * 4), word, spread_scales<SCALES>(scales, word / words, groups, words));
  }
  if (word < all) {
    char part[LANES * 4] = {};
    std::memcpy(part, weight + word * 4, (all - word) * 4);
    add(load_as<Ints>(part), word, spread_scales<SCALES>(scales, word / words, groups, words));
  }
  for (int r = 0; r < ROWS; ++r) out[r] = sum(total[r]);
  if constexpr (KIND == AFFINE4) add_biases<SCALES, ROWS>(m, scales, biases, 8, rows, out);
}

template <int ROWS>
inline void dots_of(const Matrix& m, int64_t row, const Row* const* rows, float* out) {
  const char* weight = m.weight + row * m.row_bytes();
  if (m.kind == FLOAT32) return dense_dots<FLOAT32, ROWS>(m, weight, rows, out);
  if (m.kind == BFLOAT16) return dense_dots<BFLOAT16, ROWS>(m, weight, rows, out);
  if (m.kind == FLOAT16) return dense_dots<FLOAT16, ROWS>(m, weight, rows, out);
  const int64_t start = row * m.groups() * m.scale_bytes();
  const char *scales = m.scales + start, *biases = m.biases + start;
  if (m.kind == MXFP4) return nibble_dots<MXFP4, MXFP4, ROWS>(m, weight, scales, nullptr, rows, out);
  if (m.kind == AFFINE8) {
    if (m.scale_kind == FLOAT32) return byte_dots<FLOAT32, ROWS>(m, weight, scales, biases, rows, out);
    if (m.scale_kind == BFLOAT16) return byte_dots<BFLOAT16, ROWS>(m, weight, scales, biases, rows, out);
    return byte_dots<FLOAT16, ROWS>(m, weight, scales, biases, rows, out);
  }
  if (m.scale_kind == FLOAT32) return nibble_dots<AFFINE4, FLOAT32, ROWS>(m, weight, scales, biases, rows, out);
  if (m.scale_kind == BFLOAT16) return nibble_dots<AFFINE4, BFLOAT16, ROWS>(m, weight, scales, biases, rows, out);
  return nibble_dots<AFFINE4, FLOAT16, ROWS>(m, weight, scales, biases, rows, out);
}

// Products of row `row` of the matrix with `count` arranged rows, into `out` `[count]`. The matrix's row is read once
// for every four of them.
inline void dots(const Matrix& m, int64_t row, const Row* const* rows, int64_t count, float* out) {
  int64_t n = 0;
  for (; n + 4 <= count; n += 4) dots_of<4>(m, row, rows + n, out + n);
  for (; n < count; ++n) dots_of<1>(m, row, rows + n, out + n);
}

// Row `row` of the matrix as floats `[inner]`.
inline void as_floats(const Matrix& m, int64_t row, float* to) {
  const char* weight = m.weight + row * m.row_bytes();
  const auto* halves = reinterpret_cast<const uint16_t*>(weight);
  const auto* bytes = reinterpret_cast<const uint8_t*>(weight);
  const auto scale = [&m, row](const char* from, int64_t n) {
    const int64_t place = row * m.groups() + n / m.group;
    if (m.kind == MXFP4) return scale_at<MXFP4>(from, place);
    if (m.scale_kind == FLOAT32) return scale_at<FLOAT32>(from, place);
    return m.scale_kind == BFLOAT16 ? scale_at<BFLOAT16>(from, place) : scale_at<FLOAT16>(from, place);
  };
  if (m.kind == FLOAT32) std::memcpy(to, weight, m.inner * sizeof(float));
  for (int64_t n = 0; m.kind != FLOAT32 && n < m.inner; ++n) {
    const int four = m.kind >= AFFINE4 ? bytes[n / 2] >> (4 * (n & 1)) & 15 : 0;
    if (m.kind == BFLOAT16) to[n] = bfloat16_as_float(halves[n]);
    if (m.kind == FLOAT16) to[n] = float16_as_float(halves[n]);
    if (m.kind == AFFINE8) to[n] = std::fma(float(bytes[n]), scale(m.scales, n), scale(m.biases, n));
    if (m.kind == AFFINE4) to[n] = std::fma(float(four), scale(m.scales, n), scale(m.biases, n));
    if (m.kind == MXFP4) to[n] = E2M1[four] * scale(m.scales, n);
  }
}

}  // namespace dbrx
