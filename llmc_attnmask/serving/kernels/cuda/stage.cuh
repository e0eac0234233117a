// A stage of K of one block: how it is copied to shared memory, and its product.
#pragma once

#include <primitives.cuh>

#ifndef BLOCK_ROWS
#define BLOCK_ROWS 64
#define RING_STAGES 4
#endif
constexpr int ROWS = BLOCK_ROWS;             // of W, for one block
constexpr int STAGES = RING_STAGES;          // of the ring
constexpr int ROW_WARPS = ROWS / 32;
constexpr int THREADS = 2 * 32 * ROW_WARPS;
constexpr int LINE = 128;                    // bytes of a row's kept values in a stage
constexpr int CHUNK = 16;                    // bytes of one copy
constexpr int STEPS = LINE / 32;             // matrix products along a stage

template <Kind KIND>
struct Sizes {
  static constexpr int ITEM = KIND == BF16 || KIND == FP16 ? 2 : 1;
  static constexpr int COLUMNS = 2 * LINE / ITEM;        // of W, in a stage
  static constexpr int TOKEN = COLUMNS * (KIND == FP8 ? 2 : ITEM);  // bytes of a token
  static constexpr int TILE = 32 * COLUMNS / 8;          // bytes of 32 rows' metadata
  static constexpr bool EXPANDED = KIND == FP8;
  using Sum = float;
};
template <>
struct Sizes<INT8> {
  static constexpr int ITEM = 1;
  static constexpr int COLUMNS = 2 * LINE;
  static constexpr int TOKEN = COLUMNS;
  static constexpr int TILE = 32 * COLUMNS / 8;
  static constexpr bool EXPANDED = false;
  using Sum = int;
};

// The offset of a row's 16-byte chunk in shared memory: rows that are read together
// (eight neighbors, the same chunk) are in different banks.
template <int BYTES>
__device__ __forceinline__ int offset(int row, int chunk) {
  return row * BYTES + CHUNK * (chunk ^ (row & 7));
}

// A thread's share of a tile of COUNT rows that starts at row `first` of a matrix
// [rows, bytes]; each stage has BYTES of every row. The thread has the same chunk of every
// PASS-th row, so that its addresses are one base plus constants.
template <int BYTES, int COUNT>
struct Share {
  static constexpr int CHUNKS = BYTES / CHUNK, PASS = THREADS / CHUNKS;
  static constexpr int EACH = COUNT / PASS;
  static_assert(PASS % 8 == 0 && COUNT % PASS == 0, "the swizzle must be the same");
  const uint8 *matrix, *from;                // all of it; this thread's, of stage 0
  int64 stride;                              // from one row of this thread to its next
  int rows, left;                            // of this thread; bytes from its chunk on
  int to;

  __device__ __forceinline__ Share(const uint8* whole, int first, int count, int64 bytes) {
    const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    matrix = whole;
    from = matrix + (first + row) * bytes + chunk * CHUNK;
    stride = PASS * bytes;
    rows = max(0, (count - first - row + PASS - 1) / PASS);
    left = static_cast<int>(bytes) - chunk * CHUNK;
    to = offset<BYTES>(row, chunk);
  }

  __device__ __forceinline__ bool inside(int stage, int i) const {
    return i < rows && stage * BYTES < left;
  }
  __device__ __forceinline__ const uint8* source(int stage, int i) const {
    return from + (stage * BYTES + i * stride);
  }
  __device__ __forceinline__ void copy(int stage, uint8* slot) const {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const bool is = inside(stage, i);
      copy_async(slot + to + i * PASS * BYTES, is ? source(stage, i) : matrix, is);
    }
  }
};

// Tokens of fp8 on their way to shared memory, where they are fp16: of every 64 columns,
// first the even groups of four, then the odd ones, as the two products need them.
template <int TOKENS>
struct ExpandedTokens {
  using Tokens = Share<Sizes<FP8>::COLUMNS, TOKENS>;
  Pack held[Tokens::EACH];

  __device__ __forceinline__ void fetch(const Tokens& tokens, int stage) {
#pragma unroll
    for (int i = 0; i < Tokens::EACH; ++i) {
      held[i] = Pack{0, 0, 0, 0};
      if (tokens.inside(stage, i)) held[i] = load_global(tokens.source(stage, i));
    }
  }

  __device__ __forceinline__ void store(uint8* slot) const {
    const int token = threadIdx.x / Tokens::CHUNKS, chunk = threadIdx.x % Tokens::CHUNKS;
    const int even = chunk / 4 * 8 + chunk % 4;
#pragma unroll
    for (int i = 0; i < Tokens::EACH; ++i) {
      constexpr int BYTES = Sizes<FP8>::TOKEN;
      uint8* const row = slot + i * Tokens::PASS * BYTES;
      const Pack& p = held[i];
      *reinterpret_cast<Pack*>(row + offset<BYTES>(token, even)) =
          Pack{expand_fp8(p.a), expand_fp8(p.a >> 16), expand_fp8(p.c),
               expand_fp8(p.c >> 16)};
      *reinterpret_cast<Pack*>(row + offset<BYTES>(token, even + 4)) =
          Pack{expand_fp8(p.b), expand_fp8(p.b >> 16), expand_fp8(p.d),
               expand_fp8(p.d >> 16)};
    }
  }
};

// Where a lane finds its words of a stage's metadata, in words from the stage's start.
template <Kind KIND>
struct Words {
  int first[STEPS / 2];                      // by step of this warp's half
  int eight_rows;                            // the words of eight rows, in 8 bits

  __device__ __forceinline__ explicit Words(int span) {
    using S = Sizes<KIND>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int rows = warp % ROW_WARPS, k_half = warp / ROW_WARPS;
    constexpr int EACH = S::TILE / 4 / STEPS;            // of a step
    int own;
    if (S::EXPANDED)                         // of row g, a half of the step
      own = lane / 4 * 2 * span + lane % 2;
    else if (S::ITEM == 1)                   // of row g or g + 8, a half of the step
      own = (lane / 4 + lane % 2 * 8) * 2 * span + lane % 4 / 2;
    else                                     // of rows g and g + 8, half of the groups
      own = (lane / 4 + lane % 2 * 8 + lane % 4 / 2 * 16) * span;
    eight_rows = 8 * 2 * span;
#pragma unroll
    for (int i = 0; i < STEPS / 2; ++i) {
      const int step = k_half * (STEPS / 2) + i;
      first[i] = rows * (S::TILE / 4) + step / span * (span * EACH) +
                 step % span * (EACH / 32) + own;
    }
  }

  // Words for the products of rows 0 to 15 and 16 to 31. In 16 bits one word serves both,
  // in lanes 0 and 1 of four, and in lanes 2 and 3.
  __device__ __forceinline__ void load(uint32 (&word)[2], const uint32* stage, int i) const {
    using S = Sizes<KIND>;
    const uint32* const own = stage + first[i];
    if constexpr (S::EXPANDED) {
      const int odd = threadIdx.x % 4 / 2 * 4;           // groups for these lanes
#pragma unroll
      for (int m = 0; m < 2; ++m)
        word[m] = even_bytes(every_other(own[2 * m * eight_rows] >> odd),
                             every_other(own[(2 * m + 1) * eight_rows] >> odd));
    } else {
      word[0] = own[0];
      word[1] = S::ITEM == 1 ? own[2 * eight_rows] : word[0];
    }
  }

  // The lower nibbles of all bytes, in pairs in bytes 0 and 2.
  static __device__ __forceinline__ uint32 every_other(uint32 word) {
    const uint32 four = word & 0x0f0f0f0f;
    return four | four >> 4;
  }
};

// A warp's half of the products of a stage.
template <Kind KIND, int NB, class Sum>
__device__ __forceinline__ void multiply_stage(
    Sum (&sums)[2][NB][4], const Words<KIND>& words, const uint8* values,
    const uint8* metadata, const uint8* x) {
  using S = Sizes<KIND>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int rows = warp % ROW_WARPS, k_half = warp / ROW_WARPS;
#pragma unroll
  for (int i = 0; i < STEPS / 2; ++i) {
    const int step = k_half * (STEPS / 2) + i;
    uint32 a[2][4], word[2];
#pragma unroll
    for (int m = 0; m < 2; ++m)
      load_matrices(a[m], values + offset<LINE>(rows * 32 + m * 16 + lane % 16,
                                               2 * step + lane / 16));
    words.load(word, reinterpret_cast<const uint32*>(metadata), i);
    if constexpr (S::EXPANDED) {
      uint32 even[2][4], odd[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          even[m][j] = expand_fp8(a[m][j]);
          odd[m][j] = expand_fp8(a[m][j] >> 16);
        }
#pragma unroll
      for (int n = 0; n < NB; ++n) {
        uint32 b[4];
        load_matrices(b, x + offset<S::TOKEN>(n * 8 + lane % 8, 8 * step + lane / 8));
        sparse_mma<FP16, 0>(sums[0][n], even[0], b, word[0]);
        sparse_mma<FP16, 0>(sums[1][n], even[1], b, word[1]);
        load_matrices(b, x + offset<S::TOKEN>(n * 8 + lane % 8, 8 * step + 4 + lane / 8));
        sparse_mma<FP16, 1>(sums[0][n], odd[0], b, word[0]);
        sparse_mma<FP16, 1>(sums[1][n], odd[1], b, word[1]);
      }
    } else {
#pragma unroll
      for (int n = 0; n < NB; ++n) {
        uint32 b[4];
        load_matrices(b, x + offset<S::TOKEN>(n * 8 + lane % 8, 4 * step + lane / 8));
        sparse_mma<KIND, 0>(sums[0][n], a[0], b, word[0]);
        sparse_mma<KIND, S::ITEM == 1 ? 0 : 1>(sums[1][n], a[1], b, word[1]);
      }
    }
  }
}
