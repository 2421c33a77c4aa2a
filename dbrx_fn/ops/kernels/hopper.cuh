// Hopper's tensor cores and bulk copies under readable names (PTX: wgmma, mbarrier, cp.async.bulk).
#pragma once
#include "common.cuh"

#define SUMS4(s, i) "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3])
#define SUMS(s, i) SUMS4(s, i), SUMS4(s, i + 4), SUMS4(s, i + 8), SUMS4(s, i + 12)

// Adds to sums `[64, COLUMNS]` the product of `a` `[64, 16]`, in the registers of four warps, and `b` `[COLUMNS, 16]`,
// in shared memory. Warp w has the 16 rows from 16w on. A lane's sums 4i and 4i + 1 are in the warp's row lane / 4, at
// columns 8i + 2 (lane % 4) and the next. Its sums 4i + 2 and 4i + 3 are 8 rows below.
template <int COLUMNS>
__device__ __forceinline__ void multiply_accumulate(float *sums, const u32 *a, u64 b);

// The registers of 16 (k + 1) columns' sums, as text and as operands.
#define NAMES_0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define OPERANDS_0(s) SUMS4(s, 0), SUMS4(s, 4)
#define NAMES_1 NAMES_0 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define OPERANDS_1(s) OPERANDS_0(s), SUMS4(s, 8), SUMS4(s, 12)
#define NAMES_2 NAMES_1 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define OPERANDS_2(s) OPERANDS_1(s), SUMS4(s, 16), SUMS4(s, 20)
#define NAMES_3 NAMES_2 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define OPERANDS_3(s) OPERANDS_2(s), SUMS4(s, 24), SUMS4(s, 28)
#define NAMES_4 NAMES_3 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define OPERANDS_4(s) OPERANDS_3(s), SUMS4(s, 32), SUMS4(s, 36)
#define NAMES_5 NAMES_4 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define OPERANDS_5(s) OPERANDS_4(s), SUMS4(s, 40), SUMS4(s, 44)
#define NAMES_6 NAMES_5 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define OPERANDS_6(s) OPERANDS_5(s), SUMS4(s, 48), SUMS4(s, 52)
#define NAMES_7 NAMES_6 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define OPERANDS_7(s) OPERANDS_6(s), SUMS4(s, 56), SUMS4(s, 60)
#define NAMES_8 NAMES_7 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define OPERANDS_8(s) OPERANDS_7(s), SUMS4(s, 64), SUMS4(s, 68)
#define NAMES_9 NAMES_8 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define OPERANDS_9(s) OPERANDS_8(s), SUMS4(s, 72), SUMS4(s, 76)
#define NAMES_10 NAMES_9 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define OPERANDS_10(s) OPERANDS_9(s), SUMS4(s, 80), SUMS4(s, 84)
#define NAMES_11 NAMES_10 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define OPERANDS_11(s) OPERANDS_10(s), SUMS4(s, 88), SUMS4(s, 92)
#define NAMES_12 NAMES_11 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define OPERANDS_12(s) OPERANDS_11(s), SUMS4(s, 96), SUMS4(s, 100)
#define NAMES_13 NAMES_12 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define OPERANDS_13(s) OPERANDS_12(s), SUMS4(s, 104), SUMS4(s, 108)
#define NAMES_14 NAMES_13 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define OPERANDS_14(s) OPERANDS_13(s), SUMS4(s, 112), SUMS4(s, 116)
#define NAMES_15 NAMES_14 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define OPERANDS_15(s) OPERANDS_14(s), SUMS4(s, 120), SUMS4(s, 124)

// Defines `multiply_accumulate<COLUMNS>`. REST names the five operands behind the sums.
#define DEFINE_PRODUCT(COLUMNS, K, REST)                                                                 \
  template <>                                                                                            \
  __device__ __forceinline__ void multiply_accumulate<COLUMNS>(float *sums, const u32 *a, u64 b) {       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.bf16.bf16 {" NAMES_##K "}, " REST \
                 ", 1, 1, 1, 0;"                                                                         \
                 : OPERANDS_##K(sums)                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                  \
  }
DEFINE_PRODUCT(64, 3, "{%32, %33, %34, %35}, %36")
DEFINE_PRODUCT(96, 5, "{%48, %49, %50, %51}, %52")
DEFINE_PRODUCT(128, 7, "{%64, %65, %66, %67}, %68")
DEFINE_PRODUCT(160, 9, "{%80, %81, %82, %83}, %84")
DEFINE_PRODUCT(208, 12, "{%104, %105, %106, %107}, %108")
DEFINE_PRODUCT(256, 15, "{%128, %129, %130, %131}, %132")

// Starts a group of products. Operands of earlier products may be changed only after a `wait_for_products`.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `pending` groups of products are unfinished.
template <int pending>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps the compiler from moving accesses to these registers across this point.
template <int count, typename T>
__device__ __forceinline__ void hold(T *registers) {
#pragma unroll
  for (int i = 0; i < count; i++) {
    if constexpr (sizeof(T) == 4 && T(0.5f) != T(0)) asm volatile("" : "+f"(registers[i])::"memory");
    else asm volatile("" : "+r"(registers[i])::"memory");
  }
}

__device__ __forceinline__ u32 shared_address(const void *p) { return u32(__cvta_generic_to_shared(p)); }

// The descriptor of a matrix with rows of 128 bytes. Its 16-byte chunks are swizzled within 8 rows (chunk ^ row % 8),
// and it is aligned to 1024 bytes.
__device__ __forceinline__ u64 swizzled_matrix(u32 address) {
  return u64((address & 0x3ffff) >> 4) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

__device__ __forceinline__ void init_barrier(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive_expecting(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(u32 barrier, u32 phase) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni ready;\nbra.uni again;\nready:\n}" ::"r"(barrier), "r"(phase)
      : "memory");
}
__device__ __forceinline__ void copy_to_shared(u32 to, const void *from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
// Copies shared memory that ordinary stores have written. Returns when the copy is complete.
__device__ __forceinline__ void copy_to_global(void *to, u32 from, u32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
}
__device__ __forceinline__ void publish_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Transposes an 8 x 8 matrix of 16-bit numbers held by a warp. A lane's pair is row lane / 4, columns 2 (lane % 4) and
// the next.
__device__ __forceinline__ u32 transposed(u32 pair) {
  u32 result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}
