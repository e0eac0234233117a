// The primitives of serving/kernels/cuda as the PTX manual defines them, one thread at a
// time.
//
// The threads of a block are fibers. One runs until it meets a barrier or an
// instruction of its whole warp; the order in which they run is shuffled, so that a
// missing barrier shows. Asynchronous copies happen when they are awaited, not before,
// and shared memory starts as NaN. Blocks run one after another, in shuffled order.

#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __device__
#define __global__
#define __forceinline__ inline
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)

#include <types.cuh>

static const int LANES = 32, MAX_THREADS = 256, STACK = 1 << 17;
struct Three { unsigned x, y, z; };
static Three threadIdx, blockIdx, gridDim;
static unsigned char* shared_memory;
static size_t shared_bytes;
static const char* failure;                  // the first thing that a GPU would refuse
#define SHARED_MEMORY(name) unsigned char* const name = shared_memory

static inline void expect(bool right, const char* what) {
  if (!right && !failure) failure = what;
}

static inline bool in_shared(const void* pointer, size_t bytes) {
  const unsigned char* at = static_cast<const unsigned char*>(pointer);
  return at >= shared_memory && at + bytes <= shared_memory + shared_bytes;
}

// ---- fibers

struct Copy { void* to; const void* from; int group; bool inside; };
struct Fiber {
  ucontext_t context;
  unsigned char* stack;
  bool done;
  Copy copies[512];
  int pending, groups;                       // groups: how many were committed
};
static Fiber fibers[MAX_THREADS];
static ucontext_t scheduler;
static int current, threads;

static inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

struct Barrier { int arrived, phase; };
static Barrier block_barrier, warp_barriers[MAX_THREADS / LANES];

// The last of `count` threads to arrive runs `work` for all.
template <class Work>
static inline void meet(Barrier& barrier, int count, Work work) {
  const int phase = barrier.phase;
  if (++barrier.arrived == count) {
    work();
    barrier.arrived = 0;
    ++barrier.phase;
    return;
  }
  while (barrier.phase == phase) yield();
}

static inline void __syncthreads() { meet(block_barrier, threads, [] {}); }
static inline void __threadfence() {}

// ---- primitives, by the names of serving/kernels/cuda/primitives.cuh

static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }

static inline uint32 atomicInc(uint32* counter, uint32 limit) {
  const uint32 old = *counter;
  *counter = old >= limit ? 0 : old + 1;
  return old;
}

static inline void copy_async(void* to, const void* from, bool inside) {
  Fiber& fiber = fibers[current];
  expect(in_shared(to, 16), "a copy leaves shared memory");
  expect(reinterpret_cast<uintptr_t>(to) % 16 == 0, "a copy to no multiple of 16 bytes");
  expect(reinterpret_cast<uintptr_t>(from) % 16 == 0,
         "a copy from no multiple of 16 bytes");
  expect(fiber.pending < 512, "the emulator's queue of copies is full");
  if (fiber.pending < 512) fiber.copies[fiber.pending++] = {to, from, fiber.groups, inside};
}

static inline void commit_copies() { ++fibers[current].groups; }

template <int NEWEST>
static inline void await_copies() {
  Fiber& fiber = fibers[current];
  int left = 0;
  for (int i = 0; i < fiber.pending; ++i) {
    const Copy& copy = fiber.copies[i];
    if (copy.group >= fiber.groups - NEWEST) {
      fiber.copies[left++] = copy;
    } else if (copy.inside) {
      memcpy(copy.to, copy.from, 16);
    } else {
      memset(copy.to, 0, 16);
    }
  }
  fiber.pending = left;
}

template <class Word>
static Word load_fresh(const Word* pointer) { return *pointer; }

static inline Pack load_global(const void* pointer) {
  expect(reinterpret_cast<uintptr_t>(pointer) % 16 == 0,
         "a load from no multiple of 16 bytes");
  Pack pack;
  memcpy(&pack, pointer, 16);
  return pack;
}

struct Operands { void* d; const uint32 *a, *b; uint32 metadata; const void* row; };
static Operands operands[MAX_THREADS];

// 9.7.14.5.15 ldmatrix: lane i names row i % 8 of matrix i / 8; register j of lane i is
// the word i % 4 of row i / 4 of matrix j.
static inline void load_matrices(uint32 (&out)[4], const void* row) {
  const int warp = current / LANES, first = warp * LANES;
  expect(in_shared(row, 16), "ldmatrix leaves shared memory");
  expect(reinterpret_cast<uintptr_t>(row) % 16 == 0, "ldmatrix off a multiple of 16 bytes");
  operands[current].d = out;
  operands[current].row = row;
  meet(warp_barriers[warp], LANES, [first] {
    for (int lane = 0; lane < LANES; ++lane)
      for (int j = 0; j < 4; ++j) {
        const void* from = operands[first + 8 * j + lane / 4].row;
        memcpy(static_cast<uint32*>(operands[first + lane].d) + j,
               static_cast<const uint32*>(from) + lane % 4, 4);
      }
  });
}

static inline float from_bits(uint32 bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32 to_bits(float value) { uint32 b; memcpy(&b, &value, 4); return b; }
static inline float from_half(unsigned short bits) {
  _Float16 half;
  memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}
static inline unsigned short to_half(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  unsigned short bits;
  memcpy(&bits, &half, 2);
  return bits;
}

static inline unsigned short fp8_to_half(unsigned char bits) {  // e4m3: 448 at most, no infinity
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  float value = exponent ? (8 + mantissa) / 8.0f : mantissa / 4.0f;
  for (int e = exponent; e < 7; ++e) value /= 2;
  for (int e = 7; e < exponent; ++e) value *= 2;
  if (!exponent) value = mantissa / 512.0f;
  if ((bits & 127) == 127) return 0x7e00;
  return to_half(bits & 128 ? -value : value);
}

static inline uint32 even_bytes(uint32 low, uint32 high) {
  return (low & 0xff) | (low >> 8 & 0xff00) | (high & 0xff) << 16 | (high & 0xff0000) << 8;
}

static inline uint32 expand_fp8(uint32 two) {
  return fp8_to_half(two) | static_cast<uint32>(fp8_to_half(two >> 8)) << 16;
}

// One element of an operand's register, as one lane holds it.
static inline double element(const uint32* registers, int reg, int part, Kind kind) {
  const uint32 word = registers[reg];
  if (kind == INT8) return static_cast<signed char>(word >> 8 * part);
  const unsigned short bits = word >> 16 * part;
  return kind == BF16 ? from_bits(static_cast<uint32>(bits) << 16) : from_half(bits);
}

// 9.7.14.6: the product of a whole warp.
template <class Sum>
static inline void product(const Operands* lanes, Kind kind, int selector) {
  const int K = kind == INT8 ? 64 : 32, each = kind == INT8 ? 4 : 2;  // elements per register
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      Sum* d = static_cast<Sum*>(lanes[row % 8 * 4 + column / 2].d);
      double sum = 0;
      for (int group = 0; group < K / 4; ++group) {
        uint32 nibble;
        if (kind == INT8)                    // a word: 32 columns of one row
          nibble = lanes[row % 8 * 4 + row / 8 + group / 8 * 2].metadata >> group % 8 * 4;
        else                                 // 16 columns of two rows; a pair of lanes
          nibble = lanes[row % 8 * 4 + selector * 2 + group / 4].metadata >>
                   (row / 8 * 16 + group % 4 * 4);
        const int indices[2] = {static_cast<int>(nibble & 3),
                                static_cast<int>(nibble >> 2 & 3)};
        expect(indices[0] < indices[1], "metadata that is not ordered");
        for (int kept = 0; kept < 2; ++kept) {
          const int c = group * 2 + kept;    // column of the compressed operand
          const Operands& a = lanes[row % 8 * 4 + c / each % 4];
          const double weight =
              element(a.a, row / 8 + c / (4 * each) * 2, c % each, kind);
          const int k = group * 4 + indices[kept];
          const Operands& b = lanes[column * 4 + k / each % 4];
          sum += weight * element(b.b, k / (4 * each), k % each, kind);
        }
      }
      d[row / 8 * 2 + column % 2] += static_cast<Sum>(sum);
    }
}

template <Kind KIND, int SELECTOR, class Sum>
static inline void sparse_mma(Sum (&d)[4], const uint32 (&a)[4], const uint32 (&b)[4],
                       uint32 metadata) {
  const int warp = current / LANES, first = warp * LANES;
  operands[current] = {d, a, b, metadata, nullptr};
  meet(warp_barriers[warp], LANES, [first] {
    product<Sum>(operands + first, KIND, SELECTOR);
  });
}
