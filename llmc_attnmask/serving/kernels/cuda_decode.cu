// A 2:4 linear layer for few tokens: out[n, r] = sum_k x[n, k] W[r, k].
//
// At decode a linear layer waits for its weight to arrive from memory, and a 2:4 weight
// has little more than half of the bytes. They go straight to the sparse tensor cores:
// nothing is expanded, so that almost no integer work stands between two loads.
//
// A block computes ROWS rows of W for 8 * NB tokens. Its K is cut into stages of 128
// bytes of kept values a row, copied asynchronously into a ring in shared memory; its
// warps share a stage by rows, 32 each, and by K, half each, and add up at the end.
// Blocks that share a tile's K (gridDim.y of them) leave partial sums; the last one adds
// them, in the order of K, so that no second launch is needed and results do not vary.
//
// Fragments are those of the PTX manual for mma.sp.m16n8k32 (16 bits) and m16n8k64
// (8 bits); fragments.py says how their metadata are stored. Hopper has no mma of fp8
// outside wgmma, and PTX's would be translated to conversions of both operands for
// every token: fp8 is expanded to fp16 here, exactly, tokens once and weights once.
//
// Everything that only a GPU can do stands behind the primitives below, which
// tests/serving/kernels/emulator.h defines, too: the tests run this file on a CPU.

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using int64 = long long;

enum Kind { BF16, FP16, INT8, FP8 };         // of weights and tokens
enum Type { FLOAT, HALF, BFLOAT, NONE };     // of what a pointer shows

struct __align__(16) Pack { uint32 a, b, c, d; };

#ifdef EMULATED
#include "emulator.h"
#else

#define SHARED_MEMORY(name) extern __shared__ __align__(128) uint8 name[]

__device__ __forceinline__ uint32 shared_address(const void* pointer) {
  return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

// 16 bytes; zeros instead if not inside
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

// What another block wrote: not from this multiprocessor's cache.
template <class Word>
__device__ __forceinline__ Word load_fresh(const Word* pointer) {
  return __ldcg(pointer);
}

// Each lane names a row of 8 x 16 bytes; four such matrices, one register of each.
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

template <Kind KIND, int SELECTOR>           // which pair of lanes has the metadata
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

#endif

#ifndef BLOCK_ROWS
#define BLOCK_ROWS 64
#define RING_STAGES 4
#endif
constexpr int ROWS = BLOCK_ROWS;             // of W, for one block
constexpr int STAGES = RING_STAGES;          // of the ring
constexpr int ROW_WARPS = ROWS / 32;
constexpr int THREADS = 2 * 32 * ROW_WARPS;
constexpr int LINE = 128;                    // bytes of a row's kept values in a stage
constexpr int CHUNK = 16;                    // bytes that are copied at once
constexpr int STEPS = LINE / 32;             // matrix products along a stage
constexpr int PAD = 4;                       // words: eight rows of sums in other banks

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

struct Arguments {
  const uint8* x;                            // [tokens, columns]
  const uint8* values;                       // [rows, columns / 2]
  const uint8* metadata;                     // of fragments.py, rows filled up to ROWS
  const float* channel_scale;                // [rows], or null
  const float* token_scale;                  // [tokens], or null
  const void* bias;                          // [rows] of bias_type
  void* out;                                 // [tokens, rows] of out_type
  uint32* partial;                           // [gridDim.y, tokens, rows], if shared
  uint32* arrived;                           // [row blocks], zeros before and after
  int tokens, rows, columns, stages_each;
  int row_tiles, span;                       // of the metadata: tiles, steps of a span
  int bias_type, out_type;
};

// Where a 16-byte chunk of a row lies in shared memory: rows that are read together
// (eight neighbours, the same chunk) are in other banks.
template <int BYTES>
__device__ __forceinline__ int place(int row, int chunk) {
  return row * BYTES + CHUNK * (chunk ^ (row & 7));
}

// A thread's share of a tile of COUNT rows, of which every stage has BYTES, and which
// starts at `first` of a matrix [rows, bytes]. The thread has the same chunk of every
// PASS-th row, so that all its addresses are one and constants.
template <int BYTES, int COUNT>
struct Share {
  static constexpr int CHUNKS = BYTES / CHUNK, PASS = THREADS / CHUNKS;
  static constexpr int EACH = COUNT / PASS;
  static_assert(PASS % 8 == 0 && COUNT % PASS == 0, "the swizzle has to be the same");
  const uint8 *matrix, *from;                // all of it; this thread's, of stage 0
  int64 stride;                              // from a row to the next of this thread
  int rows, left;                            // of this thread; bytes from here on
  int to;

  __device__ __forceinline__ Share(const uint8* whole, int first, int count, int64 bytes) {
    const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    matrix = whole;
    from = matrix + (first + row) * bytes + chunk * CHUNK;
    stride = PASS * bytes;
    rows = max(0, (count - first - row + PASS - 1) / PASS);
    left = static_cast<int>(bytes) - chunk * CHUNK;
    to = place<BYTES>(row, chunk);
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

// Tokens of fp8 on their way to shared memory, where they are fp16: in every 64 columns
// first the even groups of four, then the odd ones, as the two products want them.
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
      *reinterpret_cast<Pack*>(row + place<BYTES>(token, even)) =
          Pack{expand_fp8(p.a), expand_fp8(p.a >> 16), expand_fp8(p.c),
               expand_fp8(p.c >> 16)};
      *reinterpret_cast<Pack*>(row + place<BYTES>(token, even + 4)) =
          Pack{expand_fp8(p.b), expand_fp8(p.b >> 16), expand_fp8(p.d),
               expand_fp8(p.d >> 16)};
    }
  }
};

// Where a lane finds its words of the metadata in a stage, in words from its start.
template <Kind KIND>
struct Words {
  int first[STEPS / 2];                      // by step of this warp's half
  int eight_rows;                            // further on, in 8 bits

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

  // For the products of rows 0 to 15 and 16 to 31. One word serves both in 16 bits,
  // in lanes 0 and 1, and in 2 and 3, of four.
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
      load_matrices(a[m], values + place<LINE>(rows * 32 + m * 16 + lane % 16,
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
        load_matrices(b, x + place<S::TOKEN>(n * 8 + lane % 8, 8 * step + lane / 8));
        sparse_mma<FP16, 0>(sums[0][n], even[0], b, word[0]);
        sparse_mma<FP16, 0>(sums[1][n], even[1], b, word[1]);
        load_matrices(b, x + place<S::TOKEN>(n * 8 + lane % 8, 8 * step + 4 + lane / 8));
        sparse_mma<FP16, 1>(sums[0][n], odd[0], b, word[0]);
        sparse_mma<FP16, 1>(sums[1][n], odd[1], b, word[1]);
      }
    } else {
#pragma unroll
      for (int n = 0; n < NB; ++n) {
        uint32 b[4];
        load_matrices(b, x + place<S::TOKEN>(n * 8 + lane % 8, 4 * step + lane / 8));
        sparse_mma<KIND, 0>(sums[0][n], a[0], b, word[0]);
        sparse_mma<KIND, S::ITEM == 1 ? 0 : 1>(sums[1][n], a[1], b, word[1]);
      }
    }
  }
}

__device__ __forceinline__ float read(const void* pointer, int at, int type) {
  if (type == FLOAT) return static_cast<const float*>(pointer)[at];
  const uint16 bits = static_cast<const uint16*>(pointer)[at];
  return type == HALF ? from_half(bits) : from_bits(static_cast<uint32>(bits) << 16);
}

__device__ __forceinline__ void write(void* pointer, int64 at, int type, float value) {
  if (type == FLOAT) {
    static_cast<float*>(pointer)[at] = value;
    return;
  }
  uint16 bits;
  if (type == HALF) {
    bits = to_half(value);
  } else {                                   // to nearest even; NaN stays one
    const uint32 whole = to_bits(value);
    bits = value != value ? 0x7fff : (whole + 0x7fff + (whole >> 16 & 1)) >> 16;
  }
  static_cast<uint16*>(pointer)[at] = bits;
}

template <class Sum>
__device__ __forceinline__ void finish(const Arguments& g, int token, int row, Sum sum) {
  float value = static_cast<float>(sum);
  if (g.channel_scale) value *= g.channel_scale[row];
  if (g.token_scale) value *= g.token_scale[token];
  if (g.bias_type != NONE) value += read(g.bias, row, g.bias_type);
  write(g.out, static_cast<int64>(token) * g.rows + row, g.out_type, value);
}

// As many as shared memory lets run at once.
__device__ constexpr int max_blocks(int tile) {
  const int blocks = (tile <= 2 ? 4 : tile == 4 ? 3 : 2) * 64 / ROWS;
  return blocks ? blocks : 1;
}

template <Kind KIND, int NB>
__global__ void __launch_bounds__(THREADS, max_blocks(NB)) sparse_linear(Arguments g) {
  using S = Sizes<KIND>;
  using Sum = typename S::Sum;
  constexpr int TOKENS = 8 * NB, METADATA = ROW_WARPS * S::TILE;
  constexpr int X_SLOTS = S::EXPANDED ? 2 : STAGES, X_BYTES = TOKENS * S::TOKEN;
  SHARED_MEMORY(shared);
  uint8* const all_values = shared;
  uint8* const all_metadata = all_values + STAGES * ROWS * LINE;
  uint8* const all_x = all_metadata + STAGES * METADATA;
  const int first_row = blockIdx.x * ROWS, first_token = blockIdx.z * TOKENS;
  const int stages = (g.columns + S::COLUMNS - 1) / S::COLUMNS;
  const int begin = blockIdx.y * g.stages_each;
  const int end = min(begin + g.stages_each, stages);
  Sum sums[2][NB][4] = {};

  const Share<LINE, ROWS> values(g.values, first_row, g.rows, g.columns / 2 * S::ITEM);
  const Share<S::COLUMNS * S::ITEM, TOKENS> tokens(g.x, first_token, g.tokens,
                                                   static_cast<int64>(g.columns) * S::ITEM);
  // a span of a tile of 32 rows is in one piece; then come those of the other tiles
  const int piece = g.span * (S::TILE / STEPS), spans = STEPS / g.span;
  const int at = threadIdx.x % (S::TILE / CHUNK) * CHUNK;
  const int64 tile = first_row / 32 + threadIdx.x / (S::TILE / CHUNK);
  const int64 next_span = static_cast<int64>(g.row_tiles) * piece;
  const uint8* const metadata =
      g.metadata + tile * piece + at / piece * next_span + at % piece;
  const int64 next_stage = spans * next_span;

  const Words<KIND> words(g.span);

  auto copy = [&](int stage) {
    const int slot = stage % STAGES;
    if (stage < end) {
      values.copy(stage, all_values + slot * ROWS * LINE);
      if (threadIdx.x < METADATA / CHUNK)
        copy_async(all_metadata + slot * METADATA + threadIdx.x * CHUNK,
                   metadata + stage * next_stage, true);
      if constexpr (!S::EXPANDED) tokens.copy(stage, all_x + slot * X_BYTES);
    }
    commit_copies();                         // an empty group keeps the count
  };
  ExpandedTokens<TOKENS> expanded;
  if constexpr (S::EXPANDED) {
    expanded.fetch(tokens, begin);
    expanded.store(all_x + begin % X_SLOTS * X_BYTES);
  }
  for (int stage = begin; stage < begin + STAGES - 1; ++stage) copy(stage);
  for (int stage = begin; stage < end; ++stage) {
    await_copies<STAGES - 2>();
    __syncthreads();                         // and the slot before this one is free
    copy(stage + STAGES - 1);
    if constexpr (S::EXPANDED)
      if (stage + 1 < end) expanded.fetch(tokens, stage + 1);
    multiply_stage<KIND, NB>(sums, words, all_values + stage % STAGES * ROWS * LINE,
                             all_metadata + stage % STAGES * METADATA,
                             all_x + stage % X_SLOTS * X_BYTES);
    if constexpr (S::EXPANDED)
      if (stage + 1 < end) expanded.store(all_x + (stage + 1) % X_SLOTS * X_BYTES);
  }
  await_copies<0>();
  __syncthreads();

  // Both halves of K meet in shared memory, which also turns rows into neighbours.
  Sum* const together = reinterpret_cast<Sum*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto there = [&](int i) -> Sum& {          // of sums[m][n][k], in one number
    const int m = i / (4 * NB), n = i / 4 % NB, k = i % 4;
    const int row = warp % ROW_WARPS * 32 + m * 16 + lane / 4 + k / 2 * 8;
    return together[(n * 8 + lane % 4 * 2 + k % 2) * (ROWS + PAD) + row];
  };
  auto own = [&](int i) -> Sum& { return sums[i / (4 * NB)][i / 4 % NB][i % 4]; };
  const bool second = warp / ROW_WARPS;
  if (second)
#pragma unroll
    for (int i = 0; i < 8 * NB; ++i) there(i) = own(i);
  __syncthreads();
  if (!second) {                             // all loads before the first store
#pragma unroll
    for (int i = 0; i < 8 * NB; ++i) own(i) += there(i);
#pragma unroll
    for (int i = 0; i < 8 * NB; ++i) there(i) = own(i);
  }
  __syncthreads();

  const uint32 splits = gridDim.y;
  bool last = true;
  if (splits > 1) {
    for (int at = threadIdx.x; at < TOKENS * ROWS; at += THREADS) {
      const int token = first_token + at / ROWS, row = first_row + at % ROWS;
      if (token < g.tokens && row < g.rows)
        reinterpret_cast<Sum*>(g.partial)
            [(static_cast<int64>(blockIdx.y) * g.tokens + token) * g.rows + row] =
                together[at / ROWS * (ROWS + PAD) + at % ROWS];
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)                    // back to zero with the last one
      *reinterpret_cast<uint32*>(shared) = atomicInc(g.arrived + blockIdx.x, splits - 1);
    __syncthreads();
    last = *reinterpret_cast<uint32*>(shared) == splits - 1;
  }
  if (!last) return;
  if (splits > 1) {
    __threadfence();                         // the others' sums are there
    __syncthreads();                         // everyone knows, so ours may come back
    constexpr int EACH = TOKENS * ROWS / THREADS, BATCH = EACH < 8 ? EACH : 8;
#pragma unroll 1
    for (int from = 0; from < EACH; from += BATCH) {
      Sum total[BATCH] = {};
#pragma unroll 1
      for (uint32 split = 0; split < splits; ++split)
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {    // loads that do not wait for each other
          const int at = threadIdx.x + (from + i) * THREADS;
          const int token = first_token + at / ROWS, row = first_row + at % ROWS;
          if (token < g.tokens && row < g.rows)
            total[i] += load_fresh(reinterpret_cast<const Sum*>(g.partial) +
                                   (static_cast<int64>(split) * g.tokens + token) *
                                       g.rows + row);
        }
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int at = threadIdx.x + (from + i) * THREADS;
        together[at / ROWS * (ROWS + PAD) + at % ROWS] = total[i];
      }
    }
  }
#pragma unroll 1
  for (int at = threadIdx.x; at < TOKENS * ROWS; at += THREADS) {
    const int token = first_token + at / ROWS, row = first_row + at % ROWS;
    if (token < g.tokens && row < g.rows)
      finish(g, token, row, together[at / ROWS * (ROWS + PAD) + at % ROWS]);
  }
}
