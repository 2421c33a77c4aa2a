// The dispatch plan (dbrx_fn/ops/dispatch.py) in one block: counts, offsets and slots.
//
// A warp takes a stretch of the pairs, 32 at a time. First it counts each expert's pairs. Then it places them behind
// those of the warps before it, so an expert's pairs keep their order.
//
// Macros: EXPERTS, at most 32.
//   PACKED: 0 if all segments have `rows` slots. 1 if an expert's last one has only as many as it needs, a multiple of
//     `unit`.
#include "common.cuh"

constexpr int WARPS = 32;

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    dispatch(const u32 *top_experts, int *segment_experts, int *pair_slots,
#if PACKED
             int *pair_segments, int *first_slots,
#else
             int *slot_pairs,
#endif
             int pairs, int segments, int rows, int unit) {
  // For each warp and expert: the number of pairs in the warp's stretch, then the slot of the warp's next one.
  __shared__ int places[WARPS][EXPERTS];
  // Where each expert's segments and slots end.
  __shared__ int last_segments[EXPERTS], last_slots[EXPERTS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int stretch = (pairs + 32 * WARPS - 1) / (32 * WARPS) * 32;
  const int begin = warp * stretch, end = min(begin + stretch, pairs);

  if (lane < EXPERTS) places[warp][lane] = 0;
  __syncwarp();
  for (int first = begin; first < end; first += 32) {
    const u32 expert = first + lane < end ? top_experts[first + lane] : ~0u;
    const u32 same = __match_any_sync(~0u, expert);
    if (expert != ~0u && lane == __ffs(same) - 1) places[warp][expert] += __popc(same);
    __syncwarp();
  }
#if !PACKED
  for (int slot = threadIdx.x; slot < segments * rows; slot += 32 * WARPS) slot_pairs[slot] = pairs;
#endif
  __syncthreads();

  // Warp w now has expert w, and its lanes have the stretches.
  int before = 0;
  if (warp < EXPERTS) {
    const int count = places[lane][warp];
    before = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int earlier = __shfl_up_sync(~0u, before, step);
      if (lane >= step) before += earlier;
    }
    if (lane == 31) {
      last_segments[warp] = (before + rows - 1) / rows;
      last_slots[warp] = (before + unit - 1) / unit * unit;
    }
    before -= count;
  }
  __syncthreads();
  if (warp == 0) {
    int sum = lane < EXPERTS ? last_segments[lane] : 0, slot_sum = lane < EXPERTS ? last_slots[lane] : 0;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int earlier = __shfl_up_sync(~0u, sum, step), earlier_slots = __shfl_up_sync(~0u, slot_sum, step);
      if (lane >= step) sum += earlier, slot_sum += earlier_slots;
    }
    if (lane < EXPERTS) last_segments[lane] = sum, last_slots[lane] = slot_sum;
  }
  __syncthreads();
  const auto first_slot = [&](int expert) { return expert ? last_slots[expert - 1] : 0; };
  const auto first_segment = [&](int expert) { return expert ? last_segments[expert - 1] : 0; };
  if (warp < EXPERTS) places[lane][warp] = first_slot(warp) + before;
  for (int segment = threadIdx.x; segment < segments + PACKED; segment += 32 * WARPS) {
    int expert = 0;
    while (expert < EXPERTS - 1 && last_segments[expert] <= segment) expert++;
    if (segment < segments) segment_experts[segment] = expert;
#if PACKED
    // Unused segments at the end begin where the last one ends.
    first_slots[segment] = min(first_slot(expert) + (segment - first_segment(expert)) * rows, last_slots[expert]);
#endif
  }
  __syncthreads();

  for (int first = begin; first < end; first += 32) {
    const int pair = first + lane;
    const u32 expert = pair < end ? top_experts[pair] : ~0u;
    const u32 same = __match_any_sync(~0u, expert);
    int slot = 0;
    if (expert != ~0u) slot = places[warp][expert] + __popc(same & ((1u << lane) - 1));
    __syncwarp();
    if (expert != ~0u) {
      if (lane == __ffs(same) - 1) places[warp][expert] += __popc(same);
      pair_slots[pair] = slot;
#if PACKED
      pair_segments[pair] = first_segment(expert) + (slot - first_slot(expert)) / rows;
#else
      slot_pairs[slot] = pair;
#endif
    }
    __syncwarp();
  }
}
