// Many rows times a matrix, one tile of the matrix at a time.
//
// A tile is a part of a few of the matrix's rows as floats, side by side. It stays in the first caches while all rows of
// activations pass by. A product adds numbers along the inner axis in one order, so its bits don't depend on the other
// rows, on their number, or on the thread.
#pragma once

#include <new>

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

// Products of packed rows with the matrix's rows from `first` on: `out` `[row TILE]`, with rows up to a multiple of
// `FEWEST_ROWS`. `tile` has room for `TILE_SIZE` floats.
void multiply(const Packed& x, const Matrix& m, int64_t first, float* tile, float* out);

}  // namespace dbrx
