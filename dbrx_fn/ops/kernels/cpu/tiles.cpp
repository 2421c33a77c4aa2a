// Many rows times a matrix, and times their experts' matrices.

#include <vector>

#include "kernel.h"
#include "pool.h"
#include "tiles.h"

using namespace dbrx;

namespace {

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
