// LayerNorm with a weight and no bias.
#pragma once

#include "simd.h"

namespace dbrx {

// `to` may be `x`.
inline void layer_norm(const float* x, const float* weight, int64_t width, float eps, float* to) {
  const int64_t whole = width / LANES * LANES, rest = width - whole;
  Floats total = splat(0);
  for (int64_t n = 0; n < whole; n += LANES) total += load(x + n);
  total += load_part(x + whole, rest);
  const float mean = sum(total) / width;
  total = splat(0);
  for (int64_t n = 0; n < whole; n += LANES) {
    const Floats centered = load(x + n) - mean;
    total = fma(centered, centered, total);
  }
  float variance = sum(total);
  for (int64_t n = whole; n < width; ++n) variance += (x[n] - mean) * (x[n] - mean);
  const float factor = 1 / std::sqrt(variance / width + eps);
  for (int64_t n = 0; n < whole; n += LANES) store(to + n, (load(x + n) - mean) * factor * load(weight + n));
  for (int64_t n = whole; n < width; ++n) to[n] = (x[n] - mean) * factor * weight[n];
}

}  // namespace dbrx
