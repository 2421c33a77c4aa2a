// Arrays of the model's dtype, read and written as float32.
#pragma once

#include "simd.h"
#include "weights.h"

namespace dbrx {

inline float float_at(Kind kind, const void* from, int64_t place) {
  if (kind == FLOAT32) return static_cast<const float*>(from)[place];
  const uint16_t half = static_cast<const uint16_t*>(from)[place];
  return kind == BFLOAT16 ? bfloat16_as_float(half) : float16_as_float(half);
}

template <Kind KIND>
inline Floats load_at(const void* from, int64_t place) {
  if constexpr (KIND == FLOAT32) return load(static_cast<const float*>(from) + place);
  if constexpr (KIND == BFLOAT16) return from_bfloat16(static_cast<const uint16_t*>(from) + place);
  if constexpr (KIND == FLOAT16) return from_float16(static_cast<const uint16_t*>(from) + place);
}

inline void put(Kind kind, void* to, int64_t place, float x) {
  if (kind == FLOAT32) {
    static_cast<float*>(to)[place] = x;
  } else {
    static_cast<uint16_t*>(to)[place] = kind == BFLOAT16 ? float_as_bfloat16(x) : float_as_float16(x);
  }
}

inline void put_all(Kind kind, void* to, int64_t place, const float* from, int64_t count) {
  if (kind == FLOAT32) {
    std::memcpy(static_cast<float*>(to) + place, from, count * sizeof(float));
  } else {
    for (int64_t n = 0; n < count; ++n) put(kind, to, place + n, from[n]);
  }
}

// The array itself if it is float32; else its floats, in `room`.
inline const float* floats_of(Kind kind, const void* from, int64_t count, float* room) {
  if (kind == FLOAT32) return static_cast<const float*>(from);
  for (int64_t n = 0; n < count; ++n) room[n] = float_at(kind, from, n);
  return room;
}

}  // namespace dbrx
