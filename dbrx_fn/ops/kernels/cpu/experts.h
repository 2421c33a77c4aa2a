// The chosen experts of a few rows: down(silu(gate x) * up x), weighted and added to each row.
#pragma once

#include "arranged.h"
#include "pool.h"
#include "router.h"

namespace dbrx {

// Rows that kernels of few rows take at most.
constexpr int64_t MOST_ROWS = 64;

inline Floats silu(Floats x) {
  return x / (exp(-x) + 1.0f);
}

// gate[n] = silu(gate[n]) * up[n]
inline void gate_up(float* gate, const float* up, int64_t count) {
  int64_t n = 0;
  for (; n + LANES <= count; n += LANES) store(gate + n, silu(load(gate + n)) * load(up + n));
  if (n == count) return;
  float rest[LANES];
  store(rest, silu(load_part(gate + n, count - n)) * load_part(up + n, count - n));
  std::memcpy(gate + n, rest, (count - n) * sizeof(float));
}

// `gate` `[pairs ffn]` gets the hidden activations of each pair (row, choice). `up` is room of that size. Both matrices
// have a row for each pair. An expert's weights are read once for all its rows.
inline void hidden_of(
    Member& me, const Matrix& w1, const Matrix& v1, const Chosen& chosen, const Row* const* gate_rows,
    const Row* const* up_rows, float* gate, float* up) {
  const int64_t ffn = w1.outer, distinct = int64_t(chosen.experts.size());
  const int64_t piece = grain(w1, distinct * ffn, me.count), pieces = (ffn + piece - 1) / piece;
  me.spread(distinct * pieces, 1, [&](int64_t unit, int64_t) {
    const int64_t place = unit / pieces, first = unit % pieces * piece, last = std::min(first + piece, ffn);
    const int64_t begin = chosen.starts[place], count = chosen.starts[place + 1] - begin;
    const Matrix gates = w1.of(chosen.experts[place]), ups = v1.of(chosen.experts[place]);
    const Row* own[MOST_ROWS];
    float out[MOST_ROWS];
    const auto multiply = [&](const Matrix& m, const Row* const* rows, float* to) {
      for (int64_t n = 0; n < count; ++n) own[n] = rows[chosen.pairs[begin + n]];
      for (int64_t j = first; j < last; ++j) {
        dots(m, j, own, count, out);
        for (int64_t n = 0; n < count; ++n) to[chosen.pairs[begin + n] * ffn + j] = out[n];
      }
    };
    multiply(gates, gate_rows, gate);
    multiply(ups, up_rows, up);
    for (int64_t n = 0; n < count; ++n) {
      const int64_t start = chosen.pairs[begin + n] * ffn + first;
      gate_up(gate + start, up + start, last - first);
    }
  });
}

// Adds the experts' outputs to the rows `x` `[rows d_model]`, in the order of the experts. `hidden` is arranged, one row
// for each pair, and `weights` has each pair's weight.
inline void add_outputs(
    Member& me, const Matrix& w2, const Chosen& chosen, const Row* const* hidden, const float* weights, int64_t top_k,
    float* x) {
  me.spread(w2.outer, grain(w2, w2.outer, me.count), [&](int64_t first, int64_t last) {
    for (size_t place = 0; place < chosen.experts.size(); ++place) {
      const int64_t begin = chosen.starts[place], count = chosen.starts[place + 1] - begin;
      const Matrix down = w2.of(chosen.experts[place]);
      const Row* own[MOST_ROWS];
      float out[MOST_ROWS];
      for (int64_t n = 0; n < count; ++n) own[n] = hidden[chosen.pairs[begin + n]];
      for (int64_t j = first; j < last; ++j) {
        dots(down, j, own, count, out);
        for (int64_t n = 0; n < count; ++n) {
          const int64_t pair = chosen.pairs[begin + n];
          float& sum = x[pair / top_k * w2.outer + j];
          sum = std::fma(weights[pair], out[n], sum);
        }
      }
    }
  });
}

}  // namespace dbrx
