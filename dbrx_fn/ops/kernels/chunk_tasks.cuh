// The tasks of chunk_attention.cu: one head of 128 neighbouring tokens, and tiles of 128 positions that they see.
#pragma once
#include "common.cuh"

constexpr int TOKENS = 128, KEYS = 128;
// A part has at least this many tiles, unless the tokens see fewer.
constexpr int FEWEST_TILES = 4;

struct Task {
  int row, head, first, split;
  int start, n;    // the position of the row's first new token; the number of positions that the last token sees
  int begin, end;  // tiles
};

struct Tasks {
  const int *offsets;
  int capacity, batch, time, n_heads, splits;

  // Blocks take tasks in turn, longest first. Every other round goes backwards, so that sums of lengths are about equal.
  __device__ __forceinline__ int index(int round) const {
    return round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  }
  __device__ __forceinline__ int total() const { return (time + TOKENS - 1) / TOKENS * batch * n_heads * splits; }
  __device__ __forceinline__ bool has(int round) const { return round * int(gridDim.x) < total(); }

  // A block's task of a round. Its tiles may be none.
  __device__ __forceinline__ Task of(int round) const {
    Task task;
    int rest = index(round);
    const bool there = rest < total();
    if (!there) rest = 0;
    // Heads that share keys run side by side, so that L2 serves them.
    task.head = rest % n_heads, rest /= n_heads;
    task.split = rest % splits, rest /= splits;
    task.row = rest % batch, rest /= batch;
    task.first = ((time + TOKENS - 1) / TOKENS - 1 - rest) * TOKENS;
    task.start = offsets[task.row];
    task.n = min(task.start + min(task.first + TOKENS, time), capacity);
    const int tiles = (task.n + KEYS - 1) / KEYS, each = tiles_of_part(tiles, splits);
    task.begin = min(task.split * each, tiles), task.end = there ? min(task.begin + each, tiles) : task.begin;
    return task;
  }
  static __device__ __forceinline__ int tiles_of_part(int tiles, int splits) {
    return splits == 1 ? tiles : max(FEWEST_TILES, (tiles + splits - 1) / splits);
  }
};
