// The tiles of tiles.h, and the kernels of many rows times a matrix and times their experts' matrices.

#include <utility>
#include <vector>

#include "kernel.h"
#include "pool.h"
#include "tiles.h"

using namespace dbrx;

namespace {

// Numbers that are added one after the other. Sums of sums are more exact.
constexpr int64_t CHAIN = 32;

template <int DISTANCE, bool LATER, int... LANE>
Ints exchanged(Ints a, Ints b, std::integer_sequence<int, LANE...>) {
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
[[gnu::noinline]] void transpose(Ints* v) {
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

// Pairs of a token and one of its choices, sorted by expert: `pairs[starts[e]]` is expert e's first.
struct Sorted {
  std::vector<int64_t> starts;
  std::vector<int64_t> pairs;

  Sorted(const int32_t* chosen, int64_t count, int64_t experts) : starts(experts + 1), pairs(count) {
    // Memory behind the experts' is never read, whatever was chosen.
    const auto expert = [&](int64_t n) { return std::min<int64_t>(uint32_t(chosen[n]), experts - 1); };
    for (int64_t n = 0; n < count; ++n) ++starts[expert(n) + 1];
    for (int64_t e = 0; e < experts; ++e) starts[e + 1] += starts[e];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t n = 0; n < count; ++n) pairs[next[expert(n)]++] = n;
  }
};

// Sorted rows `start` to `start + count` - 1, all of one expert, packed from row `packed` on.
struct Piece {
  int64_t expert, start, count, packed;
};

// Pieces that pass by at once, and their blocks: a piece's number and the block's within it.
struct Pass {
  std::vector<Piece> pieces;
  std::vector<std::pair<int64_t, int64_t>> blocks;
};

// All experts' rows, `each` to a pair, with at most `most` packed rows in a pass. So few rows need few passes, between
// which threads wait for each other.
std::vector<Pass> passes_of(const Sorted& sorted, int64_t each, int64_t most) {
  std::vector<Pass> passes;
  int64_t used = most;
  for (int64_t expert = 0; expert + 1 < int64_t(sorted.starts.size()); ++expert) {
    const int64_t end = sorted.starts[expert + 1] * each;
    for (int64_t start = sorted.starts[expert] * each; start < end; start += most) {
      const int64_t count = std::min(most, end - start), size = Packed::size(count, 1);
      if (used + size > most) {
        passes.emplace_back();
        used = 0;
      }
      Pass& pass = passes.back();
      const int64_t number = pass.pieces.size();
      for (int64_t row = 0; row < count; row += MOST_ROWS) pass.blocks.emplace_back(number, row / MOST_ROWS);
      pass.pieces.push_back({expert, start, count, used});
      used += size;
    }
  }
  return passes;
}

// gates = silu(gates) * ups, of `count` numbers in whole vectors.
void swiglu(float* gates, const float* ups, int64_t count) {
  for (int64_t n = 0; n < count; n += LANES) {
    const Floats gate = load(gates + n);
    store(gates + n, gate / (1 + exp(-gate)) * load(ups + n));
  }
}

int64_t tiles_of(const Matrix& m) {
  return (m.outer + TILE - 1) / TILE;
}

int64_t blocks_of(const Packed& x) {
  return (x.count + MOST_ROWS - 1) / MOST_ROWS;
}

}  // namespace

void dbrx::multiply(const Packed& x, const Matrix& m, int64_t first, float* tile, float* out) {
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

// inputs: the matrix's leaves, x float32 `[rows inner]`. numbers: the matrix's, rows. output: float32 `[rows outer]`.
DBRX_KERNEL(tiled_linear) {
  const int64_t* numbers = given.numbers;
  const void* const* inputs = given.inputs;
  const Matrix m = next_matrix(numbers, inputs);
  const int64_t count = numbers[0], passing = std::min(count, passing_rows(m.inner));
  const auto* x = static_cast<const float*>(inputs[0]);
  auto* out = static_cast<float*>(given.outputs[0]);
  const Buffer packed(Packed::size(passing, m.inner));
  Pool::get().run([&](Member& me) {
    const Buffer tile(TILE_SIZE), products(Packed::size(passing, TILE));
    for (int64_t start = 0; start < count; start += passing) {
      const Packed rows{packed.at(0), m.inner, std::min(passing, count - start)};
      me.spread(blocks_of(rows), 1, [&](int64_t block, int64_t) {
        rows.pack(block * MOST_ROWS, [&](int64_t n) { return x + (start + n) * m.inner; });
      });
      me.spread(tiles_of(m), 1, [&](int64_t t, int64_t) {
        multiply(rows, m, t * TILE, tile.at(0), products.at(0));
        const int64_t width = std::min<int64_t>(TILE, m.outer - t * TILE);
        for (int64_t n = 0; n < rows.count; ++n) {
          std::memcpy(out + (start + n) * m.outer + t * TILE, products.at(n * TILE), width * sizeof(float));
        }
      });
    }
  });
}

// Segments of rows, each times its expert's matrix.
// inputs: the matrices' leaves, x float32 `[segments rows inner]`, experts int32 `[segments]`. numbers: the matrices',
// segments, rows, experts. output: float32 `[segments rows outer]`.
DBRX_KERNEL(tiled_expert_linear) {
  const int64_t* numbers = given.numbers;
  const void* const* inputs = given.inputs;
  const Matrix matrices = next_matrix(numbers, inputs);
  const int64_t each = numbers[1], inner = matrices.inner, outer = matrices.outer;
  const auto* x = static_cast<const float*>(inputs[0]);
  const Sorted sorted(static_cast<const int32_t*>(inputs[1]), numbers[0], numbers[2]);
  auto* out = static_cast<float*>(given.outputs[0]);
  const auto place = [&](int64_t row) { return sorted.pairs[row / each] * each + row % each; };
  const auto passes = passes_of(sorted, each, passing_rows(inner));
  const Buffer packed(passing_rows(inner) * inner);
  Pool::get().run([&](Member& me) {
    const Buffer tile(TILE_SIZE), products(passing_rows(inner) * TILE);
    for (const Pass& pass : passes) {
      const auto rows_of = [&](const Piece& one) { return Packed{packed.at(one.packed * inner), inner, one.count}; };
      me.spread(pass.blocks.size(), 1, [&](int64_t n, int64_t) {
        const auto [number, block] = pass.blocks[n];
        const Piece& piece = pass.pieces[number];
        rows_of(piece).pack(block * MOST_ROWS, [&](int64_t row) { return x + place(piece.start + row) * inner; });
      });
      me.spread(pass.pieces.size() * tiles_of(matrices), 1, [&](int64_t n, int64_t) {
        const Piece& piece = pass.pieces[n / tiles_of(matrices)];
        const int64_t first = n % tiles_of(matrices) * TILE, width = std::min<int64_t>(TILE, outer - first);
        multiply(rows_of(piece), matrices.of(piece.expert), first, tile.at(0), products.at(0));
        for (int64_t row = 0; row < piece.count; ++row) {
          std::memcpy(out + place(piece.start + row) * outer + first, products.at(row * TILE), width * sizeof(float));
        }
      });
    }
  });
}

// The experts' outputs, weighted and summed in the order of the experts.
// inputs: the leaves of gate, up and down, x float32 `[tokens d_model]`, weights float32 `[tokens top_k]`, experts int32
// `[tokens top_k]`. numbers: the matrices', tokens, top_k, experts. output: float32 `[tokens d_model]`.
DBRX_KERNEL(mix_experts) {
  const int64_t* numbers = given.numbers;
  const void* const* inputs = given.inputs;
  const Matrix gates = next_matrix(numbers, inputs), ups = next_matrix(numbers, inputs);
  const Matrix downs = next_matrix(numbers, inputs);
  const auto* x = static_cast<const float*>(inputs[0]);
  const auto* weights = static_cast<const float*>(inputs[1]);
  auto* out = static_cast<float*>(given.outputs[0]);
  const int64_t tokens = numbers[0], top_k = numbers[1], width = gates.inner, hidden = gates.outer;
  const Sorted sorted(static_cast<const int32_t*>(inputs[2]), tokens * top_k, numbers[2]);
  const int64_t passing = std::min(passing_rows(std::max(width, hidden)), tokens * top_k);
  const Buffer packed(Packed::size(passing, width)), packed_hidden(Packed::size(passing, hidden));
  std::memset(out, 0, tokens * width * sizeof(float));
  Pool::get().run([&](Member& me) {
    const Buffer tile(TILE_SIZE), products(Packed::size(passing, TILE)), others(Packed::size(passing, TILE));
    for (int64_t expert = 0; expert < numbers[2]; ++expert) {
      const Matrix gate = gates.of(expert), up = ups.of(expert), down = downs.of(expert);
      for (int64_t start = sorted.starts[expert]; start < sorted.starts[expert + 1]; start += passing) {
        const int64_t* pairs = sorted.pairs.data() + start;
        const int64_t count = std::min(passing, sorted.starts[expert + 1] - start);
        const Packed rows{packed.at(0), width, count}, middle{packed_hidden.at(0), hidden, count};
        me.spread(blocks_of(rows), 1, [&](int64_t block, int64_t) {
          rows.pack(block * MOST_ROWS, [&](int64_t n) { return x + pairs[n] / top_k * width; });
        });
        me.spread(tiles_of(gate), 1, [&](int64_t t, int64_t) {
          multiply(rows, gate, t * TILE, tile.at(0), products.at(0));
          multiply(rows, up, t * TILE, tile.at(0), others.at(0));
          swiglu(products.at(0), others.at(0), count * TILE);
          const int64_t end = std::min<int64_t>(TILE, hidden - t * TILE);
          for (int64_t n = 0; n < Packed::size(count, 1); ++n) {
            for (int64_t i = 0; i < end; ++i) {
              *middle.at(n, t * TILE + i) = n < count ? products.at(n * TILE)[i] : 0;
            }
          }
        });
        me.spread(tiles_of(down), 1, [&](int64_t t, int64_t) {
          multiply(middle, down, t * TILE, tile.at(0), products.at(0));
          const int64_t end = std::min<int64_t>(TILE, width - t * TILE);
          for (int64_t n = 0; n < count; ++n) {
            float* to = out + pairs[n] / top_k * width + t * TILE;
            for (int64_t i = 0; i < end; ++i) to[i] = std::fma(weights[pairs[n]], products.at(n * TILE)[i], to[i]);
          }
        });
      }
    }
  });
}
