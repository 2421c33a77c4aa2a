// Shared by the kernels: number types, their packed forms, and PTX under readable names.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned;
using u64 = unsigned long long;

// A bfloat16 is the upper half of a float32.
__device__ __forceinline__ float bf16_to_float(u16 x) { return __uint_as_float(u32(x) << 16); }
__device__ __forceinline__ float low_to_float(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_to_float(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Two floats rounded to bfloat16; `low` goes to the lower address.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ u16 float_to_bf16(float x) { return u16(pack_bf16(x, 0.f)); }

// Loads 16 bytes through the read-only path.
__device__ __forceinline__ uint4 load16(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// Loads 16 bytes that are read only once, so they aren't kept in L1.
__device__ __forceinline__ uint4 stream16(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
  for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// The sum over a block of `warps` warps. `parts` has 32 entries, which must not be in use.
template <int warps>
__device__ __forceinline__ float block_sum(float x, float *parts) {
  x = warp_sum(x);
  const int lane = threadIdx.x % 32;
  if (lane == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_sum(lane < warps ? parts[lane] : 0);
}

// 2^x by the special function unit.
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Adds to sums `[16, 8]` the product of a `[16, 16]` and b `[8, 16]`. A warp holds them in PTX's layout for m16n8k16. A
// lane has rows lane / 4 and lane / 4 + 8 of a, and row lane / 4 of b. In each row it has the entries 2 (lane % 4) and
// 2 (lane % 4) + 8, each with the next one.
__device__ __forceinline__ void multiply_accumulate(float *sums, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
