// Causal attention of many new tokens per row to the cached positions up to their own. Arithmetic is the bound.
//
// A task is one head of 128 neighbouring tokens. There is a block for each multiprocessor, which takes one task after
// the other. Two groups of four warps take 64 tokens each. Four more warps copy keys and values to shared memory, in
// tiles of 128 positions, two tiles ahead, and go on with the next task's. Tiles that no token sees are left out, and
// only tiles that cross the diagonal are masked. The kernel reads the lengths, so no length needs a trace.
//
// Scores are the product of queries and keys, both in shared memory. They are exponentiated in registers, which have
// the layout of operand A of the product with the values. That product runs while the next tile's scores are computed
// and exponentiated.
//
// SPLIT: few tokens have too few tasks for all multiprocessors. Then up to `splits` tasks share a head's tiles, and
// chunk_attention_combine.cu merges their parts.
//
// Macros: HEAD_DIM, 64 or 128; GROUP, the number of query heads that share a key head; SPLIT, 0 or 1.
#include "chunk_tasks.cuh"
#include "hopper.cuh"

constexpr int STAGES = 2, HALVES = HEAD_DIM / 64;
// Shared memory holds rows in halves of 64 entries, swizzled as tensor cores read them.
constexpr int QUERY_HALF = 64 * 128, QUERY_BYTES = HALVES * QUERY_HALF;
constexpr int TILE_HALF = KEYS * 128, TILE_BYTES = HALVES * TILE_HALF;
constexpr int OUT = HEAD_DIM / 2;

// Operands of 128 columns in registers.
#define SCORES(s) SUMS(s, 0), SUMS(s, 16), SUMS(s, 32), SUMS(s, 48)

// Adds to scores `[64, 128]` the product of 16 entries of queries and keys, both in shared memory.
__device__ __forceinline__ void add_scores(float *scores, u64 queries, u64 keys) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
      "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,"
      "%57,%58,%59,%60,%61,%62,%63}, "
      "%64, %65, 1, 1, 1, 0, 0;"
      : SCORES(scores)
      : "l"(queries), "l"(keys));
}

// Adds to sums `[64, HEAD_DIM]` the product of 16 positions' weights, in registers, and values `[16, HEAD_DIM]`.
__device__ __forceinline__ void add_values(float *sums, const u32 *weights, u64 values) {
#if HEAD_DIM == 128
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
      "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,"
      "%57,%58,%59,%60,%61,%62,%63}, "
      "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
      : SCORES(sums)
      : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values));
#else
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
      "%30,%31}, "
      "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
      : SUMS(sums, 0), SUMS(sums, 16)
      : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values));
#endif
}

// The descriptor of values: rows are positions, and the columns of the product lie along them. Rows have 64 entries.
// The next 64 lie in the next half.
__device__ __forceinline__ u64 values_matrix(u32 address) {
  return u64((address & 0x3ffff) >> 4) | u64(TILE_HALF >> 4) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

// Copies 16 bytes without waiting.
__device__ __forceinline__ void copy16(u32 to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Begins to copy a tile of keys or values. Rows past the last position repeat that position's: they are masked, but must
// be finite.
__device__ __forceinline__ void copy_tile(u32 to, const u16 *from, int tile, int n) {
  constexpr int CHUNKS = HEAD_DIM / 8, TOGETHER = 128 / CHUNKS;
  const int thread = threadIdx.x % 128, chunk = thread % CHUNKS;
#pragma unroll 4
  for (int row = thread / CHUNKS; row < KEYS; row += TOGETHER)
    copy16(to + chunk / 8 * TILE_HALF + row * 128 + ((chunk ^ row) % 8) * 16,
           from + u64(min(KEYS * tile + row, n - 1)) * HEAD_DIM + 8 * chunk);
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but `pending` of a thread's tiles are copied.
template <int pending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
  publish_to_copies();
}

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000); }
// Below every score. A token may see no position of a part's first tile.
constexpr float LOWEST = -3e38f;

struct Softmax {
  float maximum[2], total[2];  // of the lane's two tokens

  // Exponentiates scores in place, with base 2. Returns the factors by which earlier sums fade.
  __device__ __forceinline__ float2 of(float *scores, float scale) {
    float fade[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float highest = maximum[half];
#pragma unroll
      for (int i = 0; i < KEYS / 8; i++)
        highest = fmaxf(highest, fmaxf(scores[4 * i + 2 * half], scores[4 * i + 2 * half + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
      const float shift = highest * scale;
      // The difference first: that of two products isn't 0 for equal maxima.
      fade[half] = exp2_of((maximum[half] - highest) * scale);
      maximum[half] = highest;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float &score = scores[4 * i + 2 * half + j];
          score = exp2_of(score * scale - shift);
          sum += score;
        }
      total[half] = total[half] * fade[half] + sum;
    }
    return make_float2(fade[0], fade[1]);
  }
};

extern "C" __global__ void __launch_bounds__(384, 1)
    chunk_attention(const u16 *q, const u16 *keys, const u16 *values, const int *offsets,
#if SPLIT
                    float *parts, float2 *stats,
#else
                    u16 *out,
#endif
                    int capacity, int batch, int time, int n_heads, int splits, float scale) {
  extern __shared__ __align__(1024) u8 shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quarter = lane % 4;

  const u32 queries = shared_address(shared), key_tiles = queries + 2 * QUERY_BYTES;
  const u32 value_tiles = key_tiles + STAGES * TILE_BYTES, full_keys = value_tiles + STAGES * TILE_BYTES;
  const u32 empty_keys = full_keys + 8 * STAGES, full_values = empty_keys + 8 * STAGES;
  const u32 empty_values = full_values + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      init_barrier(full_keys + 8 * stage, 128);
      init_barrier(full_values + 8 * stage, 128);
      init_barrier(empty_keys + 8 * stage, 8);
      init_barrier(empty_values + 8 * stage, 8);
    }
    publish_to_copies();
  }
  __syncthreads();

  const Tasks tasks = {offsets, capacity, batch, time, n_heads, splits};
  // Tiles of all tasks are counted together.
  int count = 0;
  if (warp >= 8) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    for (int round = 0; tasks.has(round); round++) {
      const Task task = tasks.of(round);
      const u64 first = (u64(task.row) * n_heads + task.head) / GROUP * capacity * HEAD_DIM;
      for (int tile = task.begin; tile < task.end; tile++, count++) {
        const int stage = count % STAGES, before = (count + STAGES - 1) % STAGES;
        if (count >= STAGES) wait(empty_keys + 8 * stage, (count / STAGES - 1) & 1);
        copy_tile(key_tiles + stage * TILE_BYTES, keys + first, tile, task.n);
        // Two tiles may still be on their way: these keys, and the values before them. The keys before are there.
        wait_for_copies<2>();
        if (count) arrive(full_keys + 8 * before);
        if (count >= STAGES) wait(empty_values + 8 * stage, (count / STAGES - 1) & 1);
        copy_tile(value_tiles + stage * TILE_BYTES, values + first, tile, task.n);
        wait_for_copies<2>();
        if (count) arrive(full_values + 8 * before);
      }
    }
    if (count == 0) return;
    const int last = (count - 1) % STAGES;
    wait_for_copies<1>();
    arrive(full_keys + 8 * last);
    wait_for_copies<0>();
    arrive(full_values + 8 * last);
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");

  const int thread = threadIdx.x % 128, of_group = warp / 4 * 64;
  const u32 own = queries + warp / 4 * QUERY_BYTES;
  float scores[64], sums[OUT];
  u32 weights[32];

  // The groups take turns: one's products run while the other exponentiates.
  const auto wait_for_turn = [&]() {
    if (warp < 4) asm volatile("bar.sync 3, 256;" ::: "memory");
    else asm volatile("bar.sync 4, 256;" ::: "memory");
  };
  const auto end_turn = [&]() {
    if (warp < 4) asm volatile("bar.arrive 4, 256;" ::: "memory");
    else asm volatile("bar.arrive 3, 256;" ::: "memory");
  };
  const auto begin_scores = [&](int at) {
    wait(full_keys + 8 * (at % STAGES), at / STAGES & 1);
#pragma unroll
    for (int i = 0; i < 64; i++) scores[i] = 0;
    hold<64>(scores);
    begin_products();
    const u64 a = swizzled_matrix(own), b = swizzled_matrix(key_tiles + at % STAGES * TILE_BYTES);
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; step++)
      add_scores(scores, a + step / 4 * (QUERY_HALF >> 4) + 2 * (step % 4),
                 b + step / 4 * (TILE_HALF >> 4) + 2 * (step % 4));
    end_products();
  };
  const auto begin_values = [&](int at) {
    wait(full_values + 8 * (at % STAGES), at / STAGES & 1);
    hold<32>(weights);
    hold<OUT>(sums);
    begin_products();
    const u64 b = values_matrix(value_tiles + at % STAGES * TILE_BYTES);
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) add_values(sums, weights + 4 * step, b + step * (16 * 128 >> 4));
    end_products();
  };
  const auto pack_weights = [&]() {
#pragma unroll
    for (int i = 0; i < 32; i++) weights[i] = pack_bf16(scores[2 * i], scores[2 * i + 1]);
  };

  constexpr int CHUNKS = HEAD_DIM / 8, PARTS = 64 * CHUNKS / 128;
  uint4 query[PARTS];
  const auto load_queries = [&](int round) {
    if (!tasks.has(round)) return;
    const Task task = tasks.of(round);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      const int token = (128 * part + thread) / CHUNKS, at = min(task.first + of_group + token, time - 1);
      query[part] = load16(q + ((u64(task.row) * time + at) * n_heads + task.head) * HEAD_DIM + 8 * (thread % CHUNKS));
    }
  };

  load_queries(0);
  for (int round = 0; tasks.has(round); round++) {
    const Task task = tasks.of(round);
    if (task.begin >= task.end) {
      load_queries(round + 1);
      continue;
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      const int token = (128 * part + thread) / CHUNKS, chunk = thread % CHUNKS;
      const u32 to = own + chunk / 8 * QUERY_HALF + token * 128 + ((chunk ^ token) % 8) * 16;
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(query[part].x), "r"(query[part].y),
                   "r"(query[part].z), "r"(query[part].w)
                   : "memory");
    }
    publish_to_copies();
    if (warp < 4) asm volatile("bar.sync 1, 128;" ::: "memory");
    else asm volatile("bar.sync 2, 128;" ::: "memory");

    // A token sees its own position and those before it.
    const int token = task.first + of_group + 16 * (warp % 4) + group;
    const int seen[2] = {min(task.start + token + 1, task.n), min(task.start + token + 9, task.n)};
    const auto mask = [&](int tile) {
      if (KEYS * (tile + 1) <= task.start + task.first + of_group + 1) return;
#pragma unroll
      for (int i = 0; i < 64; i++)
        if (KEYS * tile + 8 * (i / 4) + 2 * quarter + i % 2 >= seen[i / 2 % 2]) scores[i] = -infinity();
    };
    Softmax softmax = {{LOWEST, LOWEST}, {0, 0}};
#pragma unroll
    for (int i = 0; i < OUT; i++) sums[i] = 0;

    if (warp >= 4 && task.begin + 1 < task.end) end_turn();
    begin_scores(count);
    wait_for_products<0>();
    hold<64>(scores);
    if (lane == 0) arrive(empty_keys + 8 * (count % STAGES));
    mask(task.begin);
    softmax.of(scores, scale);
    pack_weights();
    for (int tile = task.begin + 1; tile < task.end; tile++) {
      count++;
      wait_for_turn();
      begin_scores(count);
      begin_values(count - 1);
      if (warp < 4 || tile + 1 < task.end) end_turn();
      wait_for_products<1>();
      hold<64>(scores);
      if (lane == 0) arrive(empty_keys + 8 * (count % STAGES));
      mask(tile);
      const float2 fade = softmax.of(scores, scale);
      hold<64>(scores);
      wait_for_products<0>();
      hold<OUT>(sums);
      hold<32>(weights);
      if (lane == 0) arrive(empty_values + 8 * ((count - 1) % STAGES));
#pragma unroll
      for (int i = 0; i < OUT; i++) sums[i] *= i / 2 % 2 ? fade.y : fade.x;
      pack_weights();
    }
    begin_values(count);
    load_queries(round + 1);
    wait_for_products<0>();
    hold<OUT>(sums);
    if (lane == 0) arrive(empty_values + 8 * (count % STAGES));
    count++;

#pragma unroll
    for (int half = 0; half < 2; half++) {
      float total = softmax.total[half];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const int at = token + 8 * half;
      if (at >= time) continue;
      const u64 of = (u64(task.row) * time + at) * n_heads + task.head;
#if SPLIT
      const u64 part = of * splits + task.split;
      if (quarter == 0) stats[part] = make_float2(softmax.maximum[half] * scale, total);
      float *to = parts + part * HEAD_DIM + 2 * quarter;
#pragma unroll
      for (int i = 0; i < OUT / 4; i++)
        *(float2 *)(to + 8 * i) = make_float2(sums[4 * i + 2 * half], sums[4 * i + 2 * half + 1]);
#else
      u16 *to = out + of * HEAD_DIM + 2 * quarter;
#pragma unroll
      for (int i = 0; i < OUT / 4; i++)
        *(u32 *)(to + 8 * i) = pack_bf16(sums[4 * i + 2 * half] / total, sums[4 * i + 2 * half + 1] / total);
#endif
    }
  }
}
