// Merges the parts of decode_attention.cu, at most 64 for each head of a new token. A part's weight is its share of the
// exponentials.
//
// A thread takes 4 entries of each of its parts. All loads are issued before the first result is needed.
//
// Macros: HEAD_DIM, 64 or 128; WARPS per block of decode_attention.cu.
#include "common.cuh"

constexpr int THREADS = 256, LANES = HEAD_DIM / 4, SIDE_BY_SIDE = THREADS / LANES, ROUNDS = 64 / SIDE_BY_SIDE;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    decode_attention_combine(const float4 *parts, const float2 *stats, const int *offsets, u16 *out, int splits,
                             int capacity) {
  __shared__ __align__(16) float sums[SIDE_BY_SIDE][HEAD_DIM];
  const int lane = threadIdx.x % 32, side = threadIdx.x / LANES, four = threadIdx.x % LANES;
  // The heads of all rows' tokens are numbered together.
  const int row = blockIdx.z, time = gridDim.y;
  const u64 head = (u64(row) * time + blockIdx.y) * gridDim.x + blockIdx.x;
  const float2 nothing = make_float2(-__uint_as_float(0x7f800000), 0);
  stats += head * splits;
  parts += head * splits * LANES;

  const int tiles = (min(offsets[row] + time, capacity) + 15) / 16;
  const int written = min((tiles + WARPS - 1) / WARPS, splits);
  float4 part[ROUNDS];
  float largest[ROUNDS];
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
    const int split = round * SIDE_BY_SIDE + side;
    part[round] = split < written ? parts[split * LANES + four] : make_float4(0, 0, 0, 0);
    largest[round] = split < written ? stats[split].x : nothing.x;
  }
  const float2 one = lane < written ? stats[lane] : nothing, other = lane + 32 < written ? stats[lane + 32] : nothing;
  const float maximum = warp_max(fmaxf(one.x, other.x));
  const float total = warp_sum(exp2_of(one.x - maximum) * one.y + exp2_of(other.x - maximum) * other.y);

  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
    const float factor = exp2_of(largest[round] - maximum);
    sum.x += factor * part[round].x, sum.y += factor * part[round].y;
    sum.z += factor * part[round].z, sum.w += factor * part[round].w;
  }
  *(float4 *)&sums[side][4 * four] = sum;
  __syncthreads();
  if (threadIdx.x < HEAD_DIM) {
    float all = 0;
#pragma unroll
    for (int s = 0; s < SIDE_BY_SIDE; s++) all += sums[s][threadIdx.x];
    out[head * HEAD_DIM + threadIdx.x] = float_to_bf16(all / total);
  }
}
