// A 2:4 linear layer for few tokens: out[n, r] = sum_k x[n, k] W[r, k].
//
// During decoding, a linear layer is memory-bound: it waits for its weight, and a 2:4
// weight has little more than half of the bytes. They go straight to the sparse tensor
// cores: nothing is expanded, so there is almost no integer work between two loads.
//
// A block computes ROWS rows of W for 8 * NB tokens. Its K is cut into stages of 128
// bytes of kept values per row, copied asynchronously into a ring in shared memory. Its
// warps divide a stage by rows, 32 each, and by K, half each, and add up at the end.
// Blocks that share a tile's K (gridDim.y of them) write partial sums; the last one adds
// them in the order of K, so that no second launch is needed and results do not vary.
//
// Fragments are those of the PTX manual for mma.sp.m16n8k32 (16 bits) and m16n8k64
// (8 bits); fragments.py describes how their metadata are stored. Hopper has no mma of
// fp8 outside wgmma, and PTX's instruction would convert both operands for every token.
// Here fp8 is expanded to fp16, which is exact: the tokens once, and the weights once.
//
// What only a GPU can do is in primitives.cuh. The tests replace that file with their own,
// so that they can run this one on a CPU.

#include <stage.cuh>

constexpr int PAD = 4;                       // words: eight rows of sums in different banks

struct Arguments {
  const uint8* x;                            // [tokens, columns]
  const uint8* values;                       // [rows, columns / 2]
  const uint8* metadata;                     // of fragments.py, rows padded to ROWS
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
  } else {                                   // to nearest even; NaN stays NaN
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

// Blocks that a multiprocessor runs at once: as many as shared memory allows.
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
  // a span of a 32-row tile is one piece, followed by those of the other tiles
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

  // Both halves of K are added up in shared memory, which also makes rows contiguous.
  Sum* const together = reinterpret_cast<Sum*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto there = [&](int i) -> Sum& {          // of sums[m][n][k], by one index
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
    __syncthreads();                         // all threads know, so sums may come back
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
