// Queries, keys and values out of one projection: clamped, the first two turned to their positions, heads apart.
//
// A thread turns 8 pairs, entries i and i + HEAD_DIM / 2 of a head, of several heads of one token: their angles, which
// cost more than the rest, are the same. The grid is time, batch and a split of the heads. Macros: HEAD_DIM, THREADS.
#include "common.cuh"

constexpr int HALF = HEAD_DIM / 2, LANES = HALF / 8, HEADS = THREADS / LANES;

// Not fminf and fmaxf, which would make a number of what is none.
__device__ __forceinline__ float clamp(float x, float clip) { return x > clip ? clip : x < -clip ? -clip : x; }

// Less full turns, whose length is taken in three parts. From -pi to pi the fast sine and cosine are right to 5e-7.
// sincosf, which is ready for any angle, would make the kernel four times as long, with branches; up to angles of 1e5
// the remainder here is as good as there.
__device__ __forceinline__ float within_turn(float angle) {
  const float turns = rintf(angle * 0.15915494f);
  angle = fmaf(turns, -6.2831850051879884f, angle);
  angle = fmaf(turns, -3.0199157663446386e-7f, angle);
  return fmaf(turns, -2.1561211813896954e-14f, angle);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rotate_qkv(const u16 *qkv, const int *offsets, u16 *q, u16 *k, u16 *v, int n_heads, int kv_n_heads, float clip,
               float log2_theta) {
  const int token = blockIdx.x, time = gridDim.x, row = blockIdx.y;
  const int lane = threadIdx.x % LANES, step = gridDim.z * HEADS, all_heads = n_heads + 2 * kv_n_heads;
  int head = blockIdx.z * HEADS + threadIdx.x / LANES;
  const u16 *source = qkv + (u64(row) * time + token) * all_heads * HEAD_DIM + 8 * lane;

  uint4 first, second;
  if (head < all_heads) {
    first = load16(source + head * HEAD_DIM);
    second = load16(source + head * HEAD_DIM + HALF);
  }

  // As MLX has it, in float32 and in this order: at a position of 30,000 half a bit of the frequency turns by 2e-3.
  const float position = offsets[row] + token;
  float cosines[8], sines[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float angle = within_turn(position * exp2f(-(float(8 * lane + i) / HALF) * log2_theta));
    cosines[i] = __cosf(angle), sines[i] = __sinf(angle);
  }

  while (head < all_heads) {
    u32 a[4] = {first.x, first.y, first.z, first.w}, b[4] = {second.x, second.y, second.z, second.w};
    const int now = head;
    head += step;
    if (head < all_heads) {
      first = load16(source + head * HEAD_DIM);
      second = load16(source + head * HEAD_DIM + HALF);
    }

    const bool turned = now < n_heads + kv_n_heads;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float x0 = clamp(low_to_float(a[i]), clip), x1 = clamp(high_to_float(a[i]), clip);
      const float y0 = clamp(low_to_float(b[i]), clip), y1 = clamp(high_to_float(b[i]), clip);
      const float c0 = cosines[2 * i], c1 = cosines[2 * i + 1], s0 = sines[2 * i], s1 = sines[2 * i + 1];
      a[i] = turned ? pack_bf16(x0 * c0 - y0 * s0, x1 * c1 - y1 * s1) : pack_bf16(x0, x1);
      b[i] = turned ? pack_bf16(x0 * s0 + y0 * c0, x1 * s1 + y1 * c1) : pack_bf16(y0, y1);
    }

    u16 *target = now < n_heads ? q : turned ? k : v;
    const int heads = now < n_heads ? n_heads : kv_n_heads;
    const int within = now < n_heads ? now : turned ? now - n_heads : now - n_heads - kv_n_heads;
    target += ((u64(row) * heads + within) * time + token) * HEAD_DIM + 8 * lane;
    *(uint4 *)target = make_uint4(a[0], a[1], a[2], a[3]);
    *(uint4 *)(target + HALF) = make_uint4(b[0], b[1], b[2], b[3]);
  }
}
