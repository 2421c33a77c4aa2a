// Reads memory repeatedly and does nothing else, to measure the rate that a GPU reaches at best.
//
// Macros: THREADS per block; AHEAD, the number of a thread's loads in flight.
#include "common.cuh"

// Loads past L1, which would serve repeated reads here but keeps nothing from one kernel to the next.
__device__ __forceinline__ uint4 load_past_first_cache(const void *address) {
  uint4 v;
  asm volatile("ld.global.cg.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    read_memory(const uint4 *data, u32 *out, int loads, int times) {
  const int first = blockIdx.x * THREADS + threadIdx.x, stride = gridDim.x * THREADS;
  u32 all = 0;
  for (int time = 0; time < times; time++)
    for (int start = first; start < loads; start += AHEAD * stride) {
      uint4 words[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; i++) words[i] = load_past_first_cache(data + start + i * stride);
#pragma unroll
      for (int i = 0; i < AHEAD; i++) all ^= words[i].x ^ words[i].y ^ words[i].z ^ words[i].w;
    }
  out[first] = all;
}
