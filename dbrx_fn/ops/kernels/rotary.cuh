// The clamp and the rotary embedding of queries and keys.
#pragma once
#include "common.cuh"

// Keeps NaN, which fminf and fmaxf would replace by a number.
__device__ __forceinline__ float clamp(float x, float clip) { return x > clip ? clip : x < -clip ? -clip : x; }

// The angle modulo 2 pi, with 2 pi in three parts. From -pi to pi the fast sine and cosine are exact to 5e-7. sincosf
// handles every angle, but is four times as long and has branches. Up to angles of 1e5 this remainder is exact to 2e-7.
__device__ __forceinline__ float within_turn(float angle) {
  const float turns = rintf(angle * 0.15915494f);
  angle = fmaf(turns, -6.2831850051879884f, angle);
  angle = fmaf(turns, -3.0199157663446386e-7f, angle);
  return fmaf(turns, -2.1561211813896954e-14f, angle);
}

// Cosine (x) and sine (y) of a position's angle. The product is rounded to float32, as in layers/rotary.py. At position
// 30,000 the rounding changes the angle by up to 1e-3.
__device__ __forceinline__ float2 turn_of(float position, float frequency) {
  const float angle = within_turn(__fmul_rn(position, frequency));
  return make_float2(__cosf(angle), __sinf(angle));
}
