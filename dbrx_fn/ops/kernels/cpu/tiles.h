// Many rows times a matrix, one tile of the matrix at a time.
//
// A tile is a part of a few of the matrix's rows as floats, side by side. It stays in the first caches while all rows of
// activations pass by. A product adds numbers along the inner axis in one order, so its bits don't depend on the other
// rows, on their number, or on the thread.
#pragma once

#include <new>
#include <utility>

#include "weights.h"

namespace dbrx {

// Rows of activations whose products with a tile are summed side by side: as many as registers hold.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MOST_ROWS = 12;
#else
constexpr int MOST_ROWS = 4;
#endif
constexpr int FEWEST_ROWS = 4;

// Rows of the matrix in a tile, and numbers of each.
constexpr int TILE = 2 * LANES;
constexpr int64_t DEPTH = 256;
// The last numbers may be written in whole words and vectors.
constexpr int64_t TILE_SIZE = (DEPTH + 8 * LANES) * TILE;

// Numbers that are added one after the other. Sums of sums are more exact.
constexpr int64_t CHAIN = 32;

// Bytes of activations that pass by one tile. They stay in the second cache for the next tile.
constexpr int64_t PASSING_BYTES = 1 << 20;

// How many rows of activations pass by at once.
inline int64_t passing_rows(int64_t inner) {
  const int64_t rows = PASSING_BYTES / (inner * int64_t(sizeof(float))) / MOST_ROWS * MOST_ROWS;
  return rows < MOST_ROWS ? MOST_ROWS : rows > 240 ? 240 : rows;
}

// Floats that start at a line of the cache, so that no vector lies in two.
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(new (std::align_val_t(64)) float[size]) {}
  ~Buffer() {
    operator delete[](data_, std::align_val_t(64));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* at(int64_t place) const {
    return data_ + place;
  }

 private:
  float* data_;
};

// Rows of activations in blocks of `MOST_ROWS`, whose numbers stand side by side: `[block inner row]`. The last block
// has as many rows as are left, filled up with zeros to a multiple of `FEWEST_ROWS`.
struct Packed {
  float* data;
  int64_t inner;
  int64_t count;

  static int64_t size(int64_t count, int64_t inner) {
    return (count + FEWEST_ROWS - 1) / FEWEST_ROWS * FEWEST_ROWS * inner;
  }

  // The first row's block of `width` rows.
  int64_t width(int64_t first) const {
    const int64_t left = (count - first + FEWEST_ROWS - 1) / FEWEST_ROWS * FEWEST_ROWS;
    return left < MOST_ROWS ? left : MOST_ROWS;
  }

  // Where number `n` of a row stands.
  float* at(int64_t row, int64_t n) const {
    const int64_t first = row / MOST_ROWS * MOST_ROWS;
    return data + first * inner + n * width(first) + row - first;
  }

  // Packs the block that starts with row `first`. `row_at(n)` is row n.
  template <class RowAt>
  void pack(int64_t first, const RowAt& row_at) const {
    const int64_t wide = width(first);
    float* to = data + first * inner;
    for (int64_t r = 0; r < wide; ++r) {
      const float* from = first + r < count ? row_at(first + r) : nullptr;
      for (int64_t n = 0; n < inner; ++n) to[n * wide + r] = from ? from[n] : 0;
    }
  }
};

template <int DISTANCE, bool LATER, int... LANE>
inline Ints exchanged(Ints a, Ints b, std::integer_sequence<int, LANE...>) {
  constexpr int MOVE = LATER ? DISTANCE : 0;
  return __builtin_shufflevector(a, b, (LANE & DISTANCE ? LANES + LANE - DISTANCE + MOVE : LANE + MOVE)...);
}

template <int DISTANCE>
inline void transpose_from(Ints* v) {
  if constexpr (DISTANCE < LANES) {
    const auto lanes = std::make_integer_sequence<int, LANES>();
#pragma GCC unroll 16
    for (int n = 0; n < LANES; ++n) {
      if (n & DISTANCE) continue;
      const Ints a = v[n], b = v[n + DISTANCE];
      v[n] = exchanged<DISTANCE, false>(a, b, lanes);
      v[n + DISTANCE] = exchanged<DISTANCE, true>(a, b, lanes);
    }
    transpose_from<2 * DISTANCE>(v);
  }
}

// Transposes a square of words. Inlined it would be compiled for each kind of matrix.
[[gnu::noinline]] inline void transpose(Ints* v) {
  transpose_from<1>(v);
}

alignas(64) constexpr float COUNTED[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline Floats halves_as_floats(Ints halves) {
  const Ints size = halves & 0x7fff;
  const Ints bits = bits_as<Ints>(bits_as<Floats>(size << 13) * 0x1p112f);
  return bits_as<Floats>(bits | ((size > 0x7bff) & 0x7f800000) | (halves & 0x8000) << 16);
}

// Number `n` of each word, before scaling.
template <Kind KIND>
inline Floats number_of(Ints words, int n) {
  if constexpr (KIND == FLOAT32) return bits_as<Floats>(words);
  if constexpr (KIND == BFLOAT16) return bits_as<Floats>(n ? words & int32_t(0xffff0000) : words << 16);
  if constexpr (KIND == FLOAT16) return halves_as_floats(n ? words >> 16 : words);
  if constexpr (KIND == AFFINE8) return to_floats((words >> 8 * n) & 255);
  const float* table = KIND == MXFP4 ? E2M1 : COUNTED;
#if defined(__AVX512F__)
  // The instruction reads the last four bits of each lane only.
  return (Floats)_mm512_permutexvar_ps((__m512i)(words >> 4 * n), _mm512_load_ps(table));
#else
  const Ints four = (words >> 4 * n) & 15;
  if constexpr (KIND == AFFINE4) return to_floats(four);
#if defined(DBRX_AVX2)
  const __m256 size = _mm256_permutevar8x32_ps(_mm256_load_ps(table), (__m256i)four);
  return bits_as<Floats>((Ints)size | (four >> 3 << 31));
#else
  Floats v;
  for (int lane = 0; lane < LANES; ++lane) v[lane] = table[four[lane]];
  return v;
#endif
#endif
}

inline float any_scale(const Matrix& m, const char* scales, int64_t place) {
  if (m.kind == MXFP4) return scale_at<MXFP4>(scales, place);
  if (m.scale_kind == FLOAT32) return scale_at<FLOAT32>(scales, place);
  return m.scale_kind == BFLOAT16 ? scale_at<BFLOAT16>(scales, place) : scale_at<FLOAT16>(scales, place);
}

// Numbers `start` to `start + depth` of the matrix's rows from `first` on, one row for each lane: `[depth TILE]`, of
// which `tile` is the first lane. Rows past the last are zeros.
template <Kind KIND>
inline void fill_lanes(const Matrix& m, int64_t first, int64_t start, int64_t depth, float* tile) {
  constexpr int IN_WORD = KIND == FLOAT32 ? 1 : KIND <= FLOAT16 ? 2 : KIND == AFFINE8 ? 4 : 8;
  constexpr int64_t GROUPS = DEPTH / 32;
  const int64_t rows = m.outer - first < LANES ? m.outer - first : LANES;
  alignas(64) float scales[GROUPS][LANES] = {}, biases[GROUPS][LANES] = {};
  if constexpr (KIND >= AFFINE8) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t place = (first + r) * m.groups() + start / m.group;
      for (int64_t g = 0; g < depth / m.group; ++g) {
        scales[g][r] = any_scale(m, m.scales, place + g);
        if (KIND != MXFP4) biases[g][r] = any_scale(m, m.biases, place + g);
      }
    }
  }
  const int64_t bytes = (depth * 4 + IN_WORD - 1) / IN_WORD, group = KIND >= AFFINE8 ? m.group / IN_WORD : 1;
  const char* from = m.weight + first * m.row_bytes() + start * 4 / IN_WORD;
  for (int64_t word = 0; word * 4 < bytes; word += LANES) {
    Ints words[LANES] = {};
    const int64_t left = depth * 4 / IN_WORD - word * 4;
    for (int64_t r = 0; r < rows; ++r) {
      const char* row = from + r * m.row_bytes() + word * 4;
      if (left >= LANES * 4) words[r] = load_as<Ints>(row);
      if (left < LANES * 4) std::memcpy(&words[r], row, left);
    }
    transpose(words);
    for (int64_t n = 0; n < LANES && (word + n) * 4 < bytes; ++n) {
      const int64_t g = KIND >= AFFINE8 ? (word + n) / group : 0;
      const Floats scale = load(scales[g]), bias = load(biases[g]);
#pragma GCC unroll 8
      for (int i = 0; i < IN_WORD; ++i) {
        Floats v = number_of<KIND>(words[n], i);
        if constexpr (KIND == MXFP4) v = v * scale;
        if constexpr (KIND == AFFINE8 || KIND == AFFINE4) v = fma(v, scale, bias);
        store(tile + ((word + n) * IN_WORD + i) * TILE, v);
      }
    }
  }
}

inline void fill_tile(const Matrix& m, int64_t first, int64_t start, int64_t depth, float* tile) {
  const auto fill = m.kind == FLOAT32    ? fill_lanes<FLOAT32>
                    : m.kind == BFLOAT16 ? fill_lanes<BFLOAT16>
                    : m.kind == FLOAT16  ? fill_lanes<FLOAT16>
                    : m.kind == AFFINE8  ? fill_lanes<AFFINE8>
                    : m.kind == AFFINE4  ? fill_lanes<AFFINE4>
                                         : fill_lanes<MXFP4>;
  fill(m, first, start, depth, tile);
  fill(m, first + LANES, start, depth, tile + LANES);
}

// Adds the products of a block's ROWS rows, from where `x` points, with a tile to `out` `[row TILE]`. The first part
// of the inner axis overwrites it.
template <int ROWS>
inline void add_products(const float* x, const float* tile, int64_t depth, bool overwrites, float* out) {
  Floats sums[ROWS][2] = {};
  for (int64_t start = 0; start < depth; start += CHAIN) {
    Floats total[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) total[r][0] = total[r][1] = splat(0);
    const int64_t end = start + CHAIN < depth ? start + CHAIN : depth;
    for (int64_t n = start; n < end; ++n) {
      const Floats low = load(tile + n * TILE), high = load(tile + n * TILE + LANES);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const Floats one = splat(x[n * ROWS + r]);
        total[r][0] = fma(one, low, total[r][0]);
        total[r][1] = fma(one, high, total[r][1]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      sums[r][0] += total[r][0];
      sums[r][1] += total[r][1];
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    float* to = out + r * TILE;
    store(to, overwrites ? sums[r][0] : load(to) + sums[r][0]);
    store(to + LANES, overwrites ? sums[r][1] : load(to + LANES) + sums[r][1]);
  }
}

// Products of packed rows with the matrix's rows from `first` on: `out` `[row TILE]`, with rows up to a multiple of
// `FEWEST_ROWS`. `tile` has room for `TILE_SIZE` floats.
inline void multiply(const Packed& x, const Matrix& m, int64_t first, float* tile, float* out) {
  for (int64_t start = 0; start < m.inner; start += DEPTH) {
    const int64_t depth = m.inner - start < DEPTH ? m.inner - start : DEPTH;
    fill_tile(m, first, start, depth, tile);
    for (int64_t row = 0; row < x.count; row += MOST_ROWS) {
      const int64_t wide = x.width(row);
      const float* from = x.data + row * x.inner + start * wide;
      float* to = out + row * TILE;
      if (wide == 4) add_products<4>(from, tile, depth, !start, to);
      if constexpr (MOST_ROWS == 12) {
        if (wide == 8) add_products<8>(from, tile, depth, !start, to);
        if (wide == 12) add_products<12>(from, tile, depth, !start, to);
      }
    }
  }
}

}  // namespace dbrx
