// The operations of decode.cu that only a GPU has. The tests replace this file with one of
// the same name, to run the rest on a CPU: tests/support/kernels/emulation.
#pragma once

#include <types.cuh>

#define SHARED_MEMORY(name) extern __shared__ __align__(128) uint8 name[]

__device__ __forceinline__ uint32 shared_address(const void* pointer) {
  return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes, or writes zeros if the source is not inside.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(to)), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int NEWEST>                        // all but the newest groups have arrived
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" :: "n"(NEWEST) : "memory");
}

__device__ __forceinline__ Pack load_global(const void* pointer) {
  Pack p;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(p.a), "=r"(p.b), "=r"(p.c), "=r"(p.d) : "l"(pointer));
  return p;
}

// Reads what another block wrote, past this multiprocessor's cache.
template <class Word>
__device__ __forceinline__ Word load_fresh(const Word* pointer) {
  return __ldcg(pointer);
}

// Four matrices of 8 x 16 bytes: each lane names one row, and gets one register of each.
__device__ __forceinline__ void load_matrices(uint32 (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row)) : "memory");
}

#define SPARSE_MMA(SHAPE_AND_TYPES, CONSTRAINT)                                      \
  asm volatile("mma.sp::ordered_metadata.sync.aligned." SHAPE_AND_TYPES              \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11},"            \
               " {%0, %1, %2, %3}, %12, %13;"                                        \
               : CONSTRAINT(d[0]), CONSTRAINT(d[1]), CONSTRAINT(d[2]), CONSTRAINT(d[3]) \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]),   \
                 "r"(b[2]), "r"(b[3]), "r"(metadata), "n"(SELECTOR))

template <Kind KIND, int SELECTOR>           // the pair of lanes that has the metadata
__device__ __forceinline__ void sparse_mma(
    float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[4], uint32 metadata) {
  if constexpr (KIND == BF16) {
    SPARSE_MMA("m16n8k32.row.col.f32.bf16.bf16.f32", "+f");
  } else {
    SPARSE_MMA("m16n8k32.row.col.f32.f16.f16.f32", "+f");
  }
}

template <Kind KIND, int SELECTOR>
__device__ __forceinline__ void sparse_mma(
    int (&d)[4], const uint32 (&a)[4], const uint32 (&b)[4], uint32 metadata) {
  SPARSE_MMA("m16n8k64.row.col.s32.s8.s8.s32", "+r");
}

// Bytes 0 and 2 of one word, then of another.
__device__ __forceinline__ uint32 even_bytes(uint32 low, uint32 high) {
  return __byte_perm(low, high, 0x6420);
}

__device__ __forceinline__ uint32 expand_fp8(uint32 two) {  // to two of fp16
  uint32 out;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(out) : "h"(static_cast<uint16>(two)));
  return out;
}

__device__ __forceinline__ float from_half(uint16 bits) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
  return out;
}

__device__ __forceinline__ uint16 to_half(float value) {
  uint16 out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
  return out;
}

__device__ __forceinline__ float from_bits(uint32 bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32 to_bits(float value) { return __float_as_uint(value); }
