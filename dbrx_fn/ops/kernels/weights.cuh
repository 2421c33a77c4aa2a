// Rows of a weight matrix as operands of tensor cores: bfloat16, or 4 or 8 bits that are converted to it in registers.
//
// Tensor cores multiply 16 entries of the inner axis per step. The lane with `quarter` = lane % 4 holds the entries
// {2 quarter, 2 quarter + 1} and {8 + 2 quarter, 8 + 2 quarter + 1}. A sum may take its terms in any order. So a lane
// reads 32 neighbouring entries of a block of 128 at once (16 bytes, for 4 bits), and the block's 8 steps use them in
// stored order. The activations are permuted to match. Step j has the lane's entries
//     FORMAT 4 bits:  o, o + 4 and o + 1, o + 5 with o = 8 (j / 2) + 2 (j % 2), which lie 16 bits apart in a word,
//     else:           4j, 4j + 1 and 4j + 2, 4j + 3.
//
// Macros: FORMAT; GROUP, the number of entries that share a scale; WIDE_SCALES, if defined, to hold scales as u32, which
// takes an instruction less for each than u16.
#pragma once
#include "common.cuh"

#ifdef WIDE_SCALES
using Scale = u32;
#define LOADED_SCALE "=r"
#define RELOADED_SCALE "+r"
#else
using Scale = u16;
#define LOADED_SCALE "=h"
#define RELOADED_SCALE "+h"
#endif

#define BFLOAT16 0
#define AFFINE4 1
#define AFFINE8 2
#define MXFP4 3

#define NIBBLES (FORMAT == AFFINE4 || FORMAT == MXFP4)
#define BYTES_OF_BLOCK (FORMAT == BFLOAT16 ? 256 : NIBBLES ? 64 : 128)

#if FORMAT == BFLOAT16
#define MATRIX(name) const u8 *name
#define ROW(name, index, inner, quarter) Row(name, index, inner, quarter)
#elif FORMAT == MXFP4
#define MATRIX(name) const u8 *name, const u8 *name##_scales
#define ROW(name, index, inner, quarter) Row(name, name##_scales, index, inner, quarter)
#else
#define MATRIX(name) const u8 *name, const u16 *name##_scales, const u16 *name##_biases
#define ROW(name, index, inner, quarter) Row(name, name##_scales, name##_biases, index, inner, quarter)
#endif

__device__ __forceinline__ u32 multiply_add(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// Before Hopper, bfloat16 pairs have no products and differences. `multiply_add` with -0 or -1 rounds in the same way.
__device__ __forceinline__ u32 multiply(u32 a, u32 b) {
#if __CUDA_ARCH__ < 900
  return multiply_add(a, b, 0x80008000);
#else
  u32 d;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#endif
}
__device__ __forceinline__ u32 subtract(u32 a, u32 b) {
#if __CUDA_ARCH__ < 900
  return multiply_add(b, 0xbf80bf80, a);
#else
  u32 d;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#endif
}
__device__ __forceinline__ u32 twice(u16 x) { return u32(x) * 0x10001u; }
__device__ __forceinline__ u32 twice(u32 x) { return __byte_perm(x, 0, 0x1010); }
// (word & mask) | bits, in one instruction.
template <u32 mask, u32 bits>
__device__ __forceinline__ u32 and_or(u32 word) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(word), "n"(mask), "n"(bits));
  return d;
}

// A lane's 32 entries of a block, as stored.
struct Stored {
  uint4 words[BYTES_OF_BLOCK / 64];
#if FORMAT != BFLOAT16
  Scale scale;
#endif
#if FORMAT == AFFINE4 || FORMAT == AFFINE8
  Scale bias;
#endif
};

// Loads a scale. The next blocks' scales are near, so 256 bytes are fetched.
__device__ __forceinline__ Scale load_scale(const u16 *address) {
  Scale scale;
  asm volatile("ld.global.nc.L2::256B.u16 %0, [%1];" : LOADED_SCALE(scale) : "l"(address));
  return scale;
}
__device__ __forceinline__ Scale load_scale(const u8 *address) {
  Scale scale;
  asm volatile("ld.global.nc.L2::256B.u8 %0, [%1];" : LOADED_SCALE(scale) : "l"(address));
  return scale;
}

// Loads into registers if `wanted`, else leaves them as they are. There is no branch, which tensor cores would have to
// wait for.
__device__ __forceinline__ void reload16(uint4 &v, const void *address, bool wanted) {
  asm volatile("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %5, 0;\n"
               "@wanted ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
               : "l"(address), "r"(u32(wanted)));
}
__device__ __forceinline__ void reload_scale(Scale &scale, const u16 *address, bool wanted) {
  asm volatile("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %2, 0;\n@wanted ld.global.nc.L2::256B.u16 %0, [%1];\n}"
               : RELOADED_SCALE(scale)
               : "l"(address), "r"(u32(wanted)));
}
__device__ __forceinline__ void reload_scale(Scale &scale, const u8 *address, bool wanted) {
  asm volatile("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %2, 0;\n@wanted ld.global.nc.L2::256B.u8 %0, [%1];\n}"
               : RELOADED_SCALE(scale)
               : "l"(address), "r"(u32(wanted)));
}

// The address at which a lane reads one row of the matrix.
struct Row {
  const u8 *weight;
#if FORMAT == BFLOAT16
  __device__ Row(const u8 *matrix, u64 row, int inner, int quarter)
      : weight(matrix + (row * inner + 32 * quarter) * 2) {}
#elif FORMAT == MXFP4
  const u8 *scales;
  __device__ Row(const u8 *matrix, const u8 *scales, u64 row, int inner, int quarter)
      : weight(matrix + row * (inner / 2) + 16 * quarter),
        scales(scales + row * (inner / GROUP) + 32 * quarter / GROUP) {}
#else
  const u16 *scales, *biases;
  __device__ Row(const u8 *matrix, const u16 *scales, const u16 *biases, u64 row, int inner, int quarter)
      : weight(matrix + row * inner * (NIBBLES ? 1 : 2) / 2 + (NIBBLES ? 16 : 32) * quarter),
        scales(scales + row * (inner / GROUP) + 32 * quarter / GROUP),
        biases(biases + row * (inner / GROUP) + 32 * quarter / GROUP) {}
#endif

  // Moves forward by `blocks` blocks.
  __device__ __forceinline__ void advance(int blocks) {
    weight += blocks * BYTES_OF_BLOCK;
#if FORMAT != BFLOAT16
    scales += blocks * (128 / GROUP);
#endif
#if FORMAT == AFFINE4 || FORMAT == AFFINE8
    biases += blocks * (128 / GROUP);
#endif
  }

  // Loads a block of this row, or of the row `below` rows further down.
  __device__ __forceinline__ Stored load(int block, int below = 0, int inner = 0) const {
    Stored stored;
    const u32 at = (block + below * (inner / 128)) * BYTES_OF_BLOCK;
#pragma unroll
    for (int i = 0; i < BYTES_OF_BLOCK / 64; i++) stored.words[i] = stream16(weight + at + 16 * i);
#if FORMAT != BFLOAT16
    // A group of up to 128 entries divides a block, and a lane's 32 entries divide a group.
    const u32 group = block * (128 / GROUP) + below * (inner / GROUP);
    stored.scale = load_scale(scales + group);
#endif
#if FORMAT == AFFINE4 || FORMAT == AFFINE8
    stored.bias = load_scale(biases + group);
#endif
    return stored;
  }

  // Replaces `stored` by a block of this row, if `wanted`.
  __device__ __forceinline__ void reload(Stored &stored, int block, bool wanted) const {
#pragma unroll
    for (int i = 0; i < BYTES_OF_BLOCK / 64; i++)
      reload16(stored.words[i], weight + block * BYTES_OF_BLOCK + 16 * i, wanted);
#if FORMAT != BFLOAT16
    reload_scale(stored.scale, scales + block * (128 / GROUP), wanted);
#endif
#if FORMAT == AFFINE4 || FORMAT == AFFINE8
    reload_scale(stored.bias, biases + block * (128 / GROUP), wanted);
#endif
  }
};

__device__ __forceinline__ u32 word_of(const uint4 *words, int i) {
  const uint4 &four = words[i / 4];
  return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
}

// Two bfloat16 entries of a step: the first two of its four (`half` 0), or the last two (1). `step` and `half` must be
// constants.
__device__ __forceinline__ u32 weights_of(const Stored &stored, int step, int half) {
#if FORMAT == BFLOAT16
  return word_of(stored.words, 2 * step + half);
#elif FORMAT == AFFINE4
  // 0x4300 is 128 in bfloat16, where the lowest bit is worth 1. With a nibble in its low bits, it is 128 + nibble.
  u32 integers = and_or<0x000f000f, 0x43004300>(word_of(stored.words, step / 2) >> (4 * (2 * (step % 2) + half)));
  return multiply_add(subtract(integers, 0x43004300), twice(stored.scale), twice(stored.bias));
#elif FORMAT == AFFINE8
  // 0x4b000000 is 2^23 in float32, where the lowest bit is worth 1. bfloat16 represents every byte exactly.
  u32 word = word_of(stored.words, step);
  float low = __uint_as_float(__byte_perm(word, 0x4b000000, half ? 0x7442 : 0x7440)) - 8388608.f;
  float high = __uint_as_float(__byte_perm(word, 0x4b000000, half ? 0x7443 : 0x7441)) - 8388608.f;
  return multiply_add(pack_bf16(low, high), twice(stored.scale), twice(stored.bias));
#elif FORMAT == MXFP4
  // Sign, two exponent bits and one mantissa bit, moved to bfloat16's places, give the number times 2^-126.
  int place = 4 * (2 * (step % 2) + half);
  u32 word = word_of(stored.words, step / 2);
  u32 magnitude = (place <= 6 ? word << (6 - place) : word >> (place - 6)) & 0x01c001c0;
  u32 number = magnitude | ((word << (12 - place)) & 0x80008000);
  // A scale is an exponent. 2^-127 needs a case of its own, since it is below bfloat16's normal numbers.
  Scale scale = stored.scale ? stored.scale << 7 : 0x0040;
  return multiply(multiply(number, 0x7e807e80), twice(scale));
#endif
}

#if FORMAT == AFFINE4
// 2^-64 times `weights_of`, exactly, in fewer instructions: a bfloat16 below 2^-125 is its stored bits times 2^-133. So a
// nibble in the lowest bits is itself times 2^-133, and in the next four itself times 2^-129. No integer must be
// subtracted, and half of the shifts fall away. The factors don't depend on `step` and `half`.
__device__ __forceinline__ u32 scaled_weights_of(const Stored &stored, int step, int half) {
  constexpr u32 two_to_69 = 0x62006200, two_to_65 = 0x60006000, two_to_minus_64 = 0x1f801f80;
  const u32 scale = multiply(twice(stored.scale), half ? two_to_65 : two_to_69);
  const u32 bias = multiply(twice(stored.bias), two_to_minus_64);
  const u32 word = word_of(stored.words, step / 2) >> (step % 2 ? 8 : 0);
  return multiply_add(word & (half ? 0x00f000f0 : 0x000f000f), scale, bias);
}
#endif

// `weights_of`, or with SCALED 2^-64 times them, where FORMAT allows it.
template <bool SCALED>
__device__ __forceinline__ u32 operand(const Stored &stored, int step, int half) {
#if FORMAT == AFFINE4
  if (SCALED) return scaled_weights_of(stored, step, half);
#endif
  return weights_of(stored, step, half);
}

// The two activations that multiply `weights_of(stored, step, half)`, from a lane's 32 entries of a row.
__device__ __forceinline__ u32 activations_of(const uint4 *entries, int step, int half) {
#if NIBBLES
  const uint4 &eight = entries[step / 2];
  u32 low = step % 2 ? eight.y : eight.x, high = step % 2 ? eight.w : eight.z;
  return __byte_perm(low, high, half ? 0x7632 : 0x5410);
#else
  return word_of(entries, 2 * step + half);
#endif
}
