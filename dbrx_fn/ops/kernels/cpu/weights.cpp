// Products with rows of a matrix, and these rows as floats.

#include "weights.h"

#include <vector>

#include "kernel.h"
#include "pool.h"

namespace dbrx {
namespace {

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

// Up to LANES short or long floats from `place` on, then zeros.
template <Kind KIND>
inline Floats floats_at(const char* from, int64_t place, int64_t count) {
  if constexpr (KIND == FLOAT32) return load_part(reinterpret_cast<const float*>(from) + place, count);
  const auto* halves = reinterpret_cast<const uint16_t*>(from) + place;
  uint16_t part[LANES] = {};
  if (count < LANES) {
    std::memcpy(part, halves, count * sizeof(uint16_t));
    halves = part;
  }
  return KIND == BFLOAT16 ? from_bfloat16(halves) : from_float16(halves);
}

template <Kind KIND, int ROWS>
inline void add_narrow(const Adapter& adapter, int64_t row, const Row* const* rows, Floats* total) {
  for (int64_t n = 0; n < adapter.rank; n += LANES) {
    const Floats b = floats_at<KIND>(adapter.b, row * adapter.rank + n, adapter.rank - n);
    for (int r = 0; r < ROWS; ++r) total[r] = fma(b, load(rows[r]->narrow + n), total[r]);
  }
}

// Sums that products are added to: those of the adapter. With lora_b of zeros they are zeros.
template <int ROWS>
inline void begin(const Matrix& m, int64_t row, const Row* const* rows, Floats* total) {
  for (int r = 0; r < ROWS; ++r) total[r] = splat(0);
  if (!m.adapter.rank) return;
  if (m.adapter.kind == FLOAT32) return add_narrow<FLOAT32, ROWS>(m.adapter, row, rows, total);
  if (m.adapter.kind == BFLOAT16) return add_narrow<BFLOAT16, ROWS>(m.adapter, row, rows, total);
  add_narrow<FLOAT16, ROWS>(m.adapter, row, rows, total);
}

// Products of one row of a matrix with ROWS rows of activations, added to `total`.

template <Kind KIND, int ROWS>
inline void dense_dots(const Matrix& m, const char* weight, const Row* const* rows, Floats* total, float* out) {
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
    for (int r = 0; r < ROWS; ++r) total[r] = fma(w, load_part(rows[r]->x + whole, m.inner - whole), total[r]);
  }
  for (int r = 0; r < ROWS; ++r) out[r] = sum(total[r]);
}

// What the biases of a row of the matrix add. `middle` is what was taken from each quantized number.
template <Kind SCALES, int ROWS>
inline void add_biases(
    const Matrix& m, const char* scales, const char* biases, float middle, const Row* const* rows, float* out) {
  Floats total[ROWS];
  for (auto& t : total) t = splat(0);
  for (int64_t g = 0, groups = m.groups(); g < groups; g += LANES) {
    const Floats scale = floats_at<SCALES>(scales, g, groups - g), bias = floats_at<SCALES>(biases, g, groups - g);
    const Floats low = fma(scale, splat(middle), bias);
    for (int r = 0; r < ROWS; ++r) total[r] = fma(low, load(rows[r]->sums + g), total[r]);
  }
  for (int r = 0; r < ROWS; ++r) out[r] += sum(total[r]);
}

// Bytes of weights between what is multiplied and what is fetched from memory meanwhile.
constexpr int64_t AHEAD = 3072;

// Has the scales and biases that belong to the weights `AHEAD` fetched.
inline void fetch_scales(const Matrix& m, const char* scales, const char* biases) {
  const int64_t size = m.groups() * m.scale_bytes(), ahead = size * AHEAD / m.row_bytes();
  for (int64_t n = 0; n < size; n += 64) {
    __builtin_prefetch(scales + ahead + n);
    if (biases) __builtin_prefetch(biases + ahead + n);
  }
}

template <Kind SCALES, int ROWS>
inline void byte_dots(
    const Matrix& m, const char* weight, const char* scales, const char* biases, const Row* const* rows, Floats* total,
    float* out) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(weight);
  fetch_scales(m, scales, biases);
  for (int64_t g = 0, n = 0, groups = m.groups(); g < groups; ++g) {
    __builtin_prefetch(bytes + n + AHEAD);
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
    const Matrix& m, const char* weight, const char* scales, const char* biases, const Row* const* rows, Floats* total,
    float* out) {
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
  fetch_scales(m, scales, biases);
  for (; word + LANES <= all; word += LANES) {
    __builtin_prefetch(weight + word * 4 + AHEAD);
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
  Floats total[ROWS];
  begin<ROWS>(m, row, rows, total);
  if (m.kind == FLOAT32) return dense_dots<FLOAT32, ROWS>(m, weight, rows, total, out);
  if (m.kind == BFLOAT16) return dense_dots<BFLOAT16, ROWS>(m, weight, rows, total, out);
  if (m.kind == FLOAT16) return dense_dots<FLOAT16, ROWS>(m, weight, rows, total, out);
  const int64_t start = row * m.groups() * m.scale_bytes();
  const char* scales = m.scales + start;
  if (m.kind == MXFP4) return nibble_dots<MXFP4, MXFP4, ROWS>(m, weight, scales, nullptr, rows, total, out);
  const char* biases = m.biases + start;
  if (m.kind == AFFINE8) {
    if (m.scale_kind == FLOAT32) return byte_dots<FLOAT32, ROWS>(m, weight, scales, biases, rows, total, out);
    if (m.scale_kind == BFLOAT16) return byte_dots<BFLOAT16, ROWS>(m, weight, scales, biases, rows, total, out);
    return byte_dots<FLOAT16, ROWS>(m, weight, scales, biases, rows, total, out);
  }
  if (m.scale_kind == FLOAT32) return nibble_dots<AFFINE4, FLOAT32, ROWS>(m, weight, scales, biases, rows, total, out);
  if (m.scale_kind == BFLOAT16) return nibble_dots<AFFINE4, BFLOAT16, ROWS>(m, weight, scales, biases, rows, total, out);
  return nibble_dots<AFFINE4, FLOAT16, ROWS>(m, weight, scales, biases, rows, total, out);
}

}  // namespace

Row arrange(const Matrix& m, const float* x, float* to, float* sums) {
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
    const int64_t groups = m.groups();
    for (int64_t g = groups; g % LANES; ++g) sums[g] = 0;
    for (int64_t g = 0; g < groups; ++g) {
      Floats total = splat(0);
      for (int64_t n = 0; n < m.group; n += LANES) total += load(x + g * m.group + n);
      sums[g] = sum(total);
    }
  }
  return {to, sums};
}

void dots(const Matrix& m, int64_t row, const Row* const* rows, int64_t count, float* out) {
  int64_t n = 0;
  for (; n + 4 <= count; n += 4) dots_of<4>(m, row, rows + n, out + n);
  for (; n + 2 <= count; n += 2) dots_of<2>(m, row, rows + n, out + n);
  for (; n < count; ++n) dots_of<1>(m, row, rows + n, out + n);
}

void narrow(const Matrix& m, const float* x, int64_t n, float* to) {
  const Matrix a = m.lora_a();
  const Row row{x, nullptr};
  const Row* rows = &row;
  for (int64_t k = 0; k < a.outer; ++k) {
    const float scale = m.adapter.scale(n, k);
    to[k] = 0;
    if (scale == 0) continue;
    dots(a, k, &rows, 1, to + k);
    to[k] *= scale;
  }
  for (int64_t k = a.outer; k % LANES; ++k) to[k] = 0;
}

void as_floats(const Matrix& m, int64_t row, float* to) {
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

void adapted_as_floats(const Matrix& m, int64_t row, int64_t n, float* to) {
  as_floats(m, row, to);
  if (!m.adapter.rank) return;
  const Matrix a = m.lora_a();
  std::vector<float> factors(a.outer), numbers(m.inner);
  as_floats(m.lora_b(), row, factors.data());
  for (int64_t k = 0; k < a.outer; ++k) {
    const float scale = m.adapter.scale(n, k);
    if (scale == 0) continue;
    as_floats(a, k, numbers.data());
    for (int64_t i = 0; i < m.inner; ++i) to[i] = std::fma(factors[k] * scale, numbers[i], to[i]);
  }
}

}  // namespace dbrx

// inputs: the matrix's leaves, x float32 `[rows inner]`. numbers: the matrix's, rows. output: float32 `[rows outer]`.
DBRX_KERNEL(linear) {
  using namespace dbrx;
  const int64_t* numbers = given.numbers;
  const void* const* inputs = given.inputs;
  const Matrix m = next_matrix(numbers, inputs);
  const int64_t count = numbers[0], size = arranged_size(m), groups = sums_size(m);
  const auto* x = static_cast<const float*>(inputs[0]);
  auto* out = static_cast<float*>(given.outputs[0]);
  std::vector<float> arranged(count * (size + groups));
  std::vector<Row> rows(count);
  std::vector<const Row*> places(count);
  Pool::get().run([&](Member& me) {
    me.spread(count, 1, [&](int64_t n, int64_t) {
      float* to = arranged.data() + n * (size + groups);
      rows[n] = arrange(m, x + n * m.inner, to, to + size);
      places[n] = &rows[n];
    });
    me.spread(m.outer, 16, [&](int64_t first, int64_t last) {
      std::vector<float> products(count);
      for (int64_t row = first; row < last; ++row) {
        dots(m, row, places.data(), count, products.data());
        for (int64_t n = 0; n < count; ++n) out[n * m.outer + row] = products[n];
      }
    });
  });
}
