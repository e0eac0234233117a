// Runs decode.cu on a CPU: a launch, one block after another.

#include <decode.cu>

static void (*kernel)(Arguments);
static Arguments arguments;

static void run_fiber() {
  kernel(arguments);
  expect(fibers[current].pending == 0, "a copy that nobody awaits");
  fibers[current].done = true;
  yield();
}

static void shuffle(int* order, int count) {
  for (int i = 0; i < count; ++i) order[i] = i;
  for (int i = count - 1; i > 0; --i) {
    const int j = rand() % (i + 1), swapped = order[i];
    order[i] = order[j];
    order[j] = swapped;
  }
}

static void run_block() {
  memset(shared_memory, 0xff, shared_bytes);
  block_barrier = {};
  memset(warp_barriers, 0, sizeof warp_barriers);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.done = false;
    fiber.pending = fiber.groups = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  int order[MAX_THREADS];
  for (int left = threads, rounds = 0; left; ++rounds) {
    shuffle(order, threads);
    left = 0;
    for (int i = 0; i < threads; ++i) {
      current = order[i];
      if (fibers[current].done) continue;
      threadIdx.x = current;
      swapcontext(&scheduler, &fibers[current].context);
      left += !fibers[current].done;
    }
    if (rounds > 100000) {
      expect(false, "threads wait for each other for ever");
      return;
    }
  }
}

#ifdef ONE_KERNEL                            // compiles in a tenth of the time
static void (*choose(int, int))(Arguments) { return sparse_linear<BF16, 2>; }
#else
template <Kind KIND>
static void (*choose(int blocks))(Arguments) {
#if BLOCK_ROWS == 64
  if (blocks == 1) return sparse_linear<KIND, 1>;
#endif
  if (blocks == 2) return sparse_linear<KIND, 2>;
  if (blocks == 4) return sparse_linear<KIND, 4>;
  return sparse_linear<KIND, 8>;
}

static void (*choose(int kind, int blocks))(Arguments) {
  return kind == BF16   ? choose<BF16>(blocks)
         : kind == FP16 ? choose<FP16>(blocks)
         : kind == INT8 ? choose<INT8>(blocks)
                        : choose<FP8>(blocks);
}
#endif

// Launch the kernel; returns what a GPU would have refused, or null.
extern "C" const char* emulate(int kind, int token_blocks, const Arguments* given,
                               const unsigned* grid, size_t bytes, int seed) {
  srand(seed);
  failure = nullptr;
  kernel = choose(kind, token_blocks);
  arguments = *given;
  // what the kernel does not write shows as NaN
  const size_t results = static_cast<size_t>(given->tokens) * given->rows;
  memset(given->out, 0xff, results * (given->out_type == FLOAT ? 4 : 2));
  if (given->partial) memset(given->partial, 0xff, results * 4 * grid[1]);
  threads = THREADS;
  gridDim = {grid[0], grid[1], grid[2]};
  shared_bytes = bytes;
  shared_memory = static_cast<unsigned char*>(aligned_alloc(128, (bytes + 127) & ~127ull));
  for (int i = 0; i < threads; ++i)
    fibers[i].stack = static_cast<unsigned char*>(malloc(STACK));
  const unsigned blocks = grid[0] * grid[1] * grid[2];
  int* order = static_cast<int*>(malloc(blocks * sizeof(int)));
  shuffle(order, blocks);
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned block = order[i];
    blockIdx = {block % grid[0], block / grid[0] % grid[1], block / grid[0] / grid[1]};
    run_block();
  }
  free(order);
  for (int i = 0; i < threads; ++i) free(fibers[i].stack);
  free(shared_memory);
  return failure;
}
