// Attention of one token per row over its cached keys and values, in chunks of positions.
//
// Chunks have fixed bounds, so a row's sums don't depend on threads or on other rows.
#pragma once

#include <algorithm>
#include <cmath>

#include "floats.h"

namespace dbrx {

constexpr int64_t CHUNK = 256;

// A chunk's part of one query's result: the weighted sum of values `[head_dim]`, then the largest score and the sum of
// weights.
constexpr int64_t PART_EXTRA = 2;

template <Kind KIND>
inline void scores_of(const float* q, const void* keys, int64_t first, int64_t count, int64_t width, float* to) {
  const int64_t whole = width / LANES * LANES;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t place = (first + t) * width;
    Floats total = splat(0);
    for (int64_t n = 0; n < whole; n += LANES) total = fma(load(q + n), load_at<KIND>(keys, place + n), total);
    float score = sum(total);
    for (int64_t n = whole; n < width; ++n) score += q[n] * float_at(KIND, keys, place + n);
    to[t] = score;
  }
}

template <Kind KIND>
inline void mix_values(
    const float* weights, const void* values, int64_t first, int64_t count, int64_t width, float* to) {
  constexpr int64_t WIDE = 4 * LANES;
  int64_t n = 0;
  for (; n + WIDE <= width; n += WIDE) {
    Floats total[4] = {};
    for (int64_t t = 0; t < count; ++t) {
      const Floats weight = splat(weights[t]);
      const int64_t place = (first + t) * width + n;
      for (int k = 0; k < 4; ++k) total[k] = fma(weight, load_at<KIND>(values, place + k * LANES), total[k]);
    }
    for (int k = 0; k < 4; ++k) store(to + n + k * LANES, total[k]);
  }
  for (; n + LANES <= width; n += LANES) {
    Floats total = splat(0);
    for (int64_t t = 0; t < count; ++t) {
      total = fma(splat(weights[t]), load_at<KIND>(values, (first + t) * width + n), total);
    }
    store(to + n, total);
  }
  for (; n < width; ++n) {
    float total = 0;
    for (int64_t t = 0; t < count; ++t) total += weights[t] * float_at(KIND, values, (first + t) * width + n);
    to[n] = total;
  }
}

// One query's part of the `count` positions from `first` on. `q` is scaled. `keys` and `values` are `[capacity width]`.
template <Kind KIND>
inline void attend_as(
    const float* q, const void* keys, const void* values, int64_t first, int64_t count, int64_t width, float* part) {
  float weights[CHUNK + LANES];
  scores_of<KIND>(q, keys, first, count, width, weights);
  // Behind the chunk's end weights are zero.
  for (int64_t t = count; t % LANES; ++t) weights[t] = -HUGE_VALF;
  Floats most = load(weights);
  for (int64_t t = LANES; t < count; t += LANES) most = max(most, load(weights + t));
  const float top = largest(most);
  Floats total = splat(0);
  for (int64_t t = 0; t < count; t += LANES) {
    const Floats weight = exp(load(weights + t) - top);
    store(weights + t, weight);
    total += weight;
  }
  mix_values<KIND>(weights, values, first, count, width, part);
  part[width] = top;
  part[width + 1] = sum(total);
}

inline void attend(
    Kind kind, const float* q, const void* keys, const void* values, int64_t first, int64_t count, int64_t width,
    float* part) {
  if (kind == FLOAT32) return attend_as<FLOAT32>(q, keys, values, first, count, width, part);
  if (kind == BFLOAT16) return attend_as<BFLOAT16>(q, keys, values, first, count, width, part);
  return attend_as<FLOAT16>(q, keys, values, first, count, width, part);
}

// One query's result from its parts, of which the next begins `stride` floats behind.
inline void merge(const float* parts, int64_t count, int64_t stride, int64_t width, float* to) {
  float top = parts[width];
  for (int64_t c = 1; c < count; ++c) top = std::max(top, parts[c * stride + width]);
  std::fill(to, to + width, 0.0f);
  float total = 0;
  for (int64_t c = 0; c < count; ++c) {
    const float* part = parts + c * stride;
    const float factor = std::exp(part[width] - top);
    total += factor * part[width + 1];
    for (int64_t n = 0; n < width; ++n) to[n] += factor * part[n];
  }
  for (int64_t n = 0; n < width; ++n) to[n] /= total;
}

// Rotates a head's pairs (n, n + width / 2). `turns` has the cosines, then the sines.
inline void rotate(const float* head, const float* turns, int64_t width, float scale, float* to) {
  const int64_t half = width / 2;
  for (int64_t n = 0; n < half; ++n) {
    const float a = head[n], b = head[n + half], cosine = turns[n], sine = turns[half + n];
    to[n] = (a * cosine - b * sine) * scale;
    to[n + half] = (b * cosine + a * sine) * scale;
  }
}

}  // namespace dbrx
