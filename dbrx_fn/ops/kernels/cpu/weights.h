// Matrices as the tree stores them (`dbrx_fn/ops/formats.py`), multiplied by rows of floats and turned into floats.
//
// A matrix is `[outer inner]`, row-contiguous. A row's product has one order of additions, whatever rows stand beside
// it. Quantized numbers are multiplied as integers around zero, and by their group's scale at its end.
//
// An adapter adds lora_b (scale lora_a x) to the product with x. What is in brackets is called narrow here, and stands
// beside the arranged x.
#pragma once

#include <cstdint>

#include "simd.h"

namespace dbrx {

// `matrix.py` has the same numbers.
enum Kind : int64_t { FLOAT32, BFLOAT16, FLOAT16, AFFINE8, AFFINE4, MXFP4 };

// Numbers by which a kernel's `numbers` describe a matrix: kind, the scales' kind, group size, outer, inner.
constexpr int MATRIX_NUMBERS = 5;

// The leaves beside a matrix. Without an adapter the rank is 0.
struct Adapter {
  int64_t rank = 0;
  // lora_a's and lora_b's.
  Kind kind = FLOAT32;
  const char* a = nullptr;
  const char* b = nullptr;
  // One scale, or if they differ between the batch's rows, `[batch rank]`.
  const float* scales = nullptr;
  bool of_rows = false;

  // The scale of column `k` for row `n` of the batch.
  float scale(int64_t n, int64_t k) const {
    return of_rows ? scales[n * rank + k] : *scales;
  }
};

struct Matrix {
  Kind kind;
  Kind scale_kind;
  int64_t group;
  int64_t outer;
  int64_t inner;
  const char* weight;
  const char* scales;
  const char* biases;
  Adapter adapter = {};

  int64_t row_bytes() const {
    return inner * (kind == FLOAT32 ? 8 : kind <= FLOAT16 ? 4 : kind == AFFINE8 ? 2 : 1) / 2;
  }

  int64_t scale_bytes() const {
    return kind == MXFP4 ? 1 : scale_kind == FLOAT32 ? 4 : 2;
  }

  int64_t groups() const {
    return inner / group;
  }

  Matrix lora_a() const {
    return {adapter.kind, FLOAT32, 1, adapter.rank, inner, adapter.a, nullptr, nullptr};
  }

  Matrix lora_b() const {
    return {adapter.kind, FLOAT32, 1, outer, adapter.rank, adapter.b, nullptr, nullptr};
  }

  // The matrix of one expert, of `[expert outer inner]`.
  Matrix of(int64_t expert) const {
    Matrix one = *this;
    one.weight += expert * outer * row_bytes();
    if (scales) one.scales += expert * outer * groups() * scale_bytes();
    if (biases) one.biases += expert * outer * groups() * scale_bytes();
    const int64_t column_bytes = adapter.rank * (adapter.kind == FLOAT32 ? 4 : 2);
    if (adapter.a) one.adapter.a += expert * inner * column_bytes;
    if (adapter.b) one.adapter.b += expert * outer * column_bytes;
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

// As `next_matrix`, then two numbers, the rank and whether scales differ between rows, and an adapter's leaves of this
// kind, if the rank isn't 0.
inline Matrix next_adapted(const int64_t*& numbers, const void* const*& inputs, Kind kind) {
  Matrix m = next_matrix(numbers, inputs);
  m.adapter.rank = *numbers++, m.adapter.of_rows = *numbers++, m.adapter.kind = kind;
  if (m.adapter.rank) {
    m.adapter.a = static_cast<const char*>(*inputs++);
    m.adapter.b = static_cast<const char*>(*inputs++);
    m.adapter.scales = static_cast<const float*>(*inputs++);
  }
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
  // The sum of each group of an affine matrix, padded with zeros.
  const float* sums;
  // What `narrow` made, if the matrix has an adapter.
  const float* narrow = nullptr;
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
  return m.biases ? (m.groups() + LANES - 1) / LANES * LANES : 0;
}

// How many floats `narrow` writes.
inline int64_t narrow_size(const Matrix& m) {
  return (m.adapter.rank + LANES - 1) / LANES * LANES;
}

// lora_a times `x` `[inner]`, and times the scales of row `n` of the batch, padded with zeros.
void narrow(const Matrix& m, const float* x, int64_t n, float* to);

// Arranges a row `x` `[inner]`. `to` has room for `arranged_size` floats, `sums` for `sums_size`.
Row arrange(const Matrix& m, const float* x, float* to, float* sums);

// Products of row `row` of the matrix, and of its adapter, with `count` arranged rows, into `out` `[count]`. The
// matrix's row is read once for every four of them.
void dots(const Matrix& m, int64_t row, const Row* const* rows, int64_t count, float* out);

// Row `row` of the matrix as floats `[inner]`, without its adapter.
void as_floats(const Matrix& m, int64_t row, float* to);

// Row `row` of the matrix with its adapter, as floats `[inner]`. The scales are those of row `n` of the batch.
void adapted_as_floats(const Matrix& m, int64_t row, int64_t n, float* to);

// e2m1 numbers, and those of 4 bits around zero.
alignas(64) constexpr float E2M1[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.f, -.5, -1, -1.5, -2, -3, -4, -6};
alignas(64) constexpr float AROUND_ZERO[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

}  // namespace dbrx
