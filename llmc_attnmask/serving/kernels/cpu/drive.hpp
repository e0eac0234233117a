// How a kernel goes over its weight and over the tokens.
//
// Few tokens: every thread goes once over its rows, with all tokens in registers.
//
// Many tokens: in blocks whose sums stay in the cache. Of two groups of 16 rows, a slab of
// units at a time is brought into the cache, where it serves one group of tokens after
// another.
//
// Rows are divided among threads and no sum is, so the result is the same, bit for bit,
// for any number of threads.
#pragma once

#include <utility>

#include "activations.hpp"
#include "simd.hpp"
#include "threads.hpp"

namespace attnmask {

constexpr int64_t kBlock = 512;  // tokens
// From this many on, slabs are long: sums are loaded and stored less often. Before that they
// are short, as the next one's values are fetched while this one is multiplied.
constexpr int64_t kManyTokens = 128;

// Call f with the constant of the same value as n, from 1 to Largest.
template <int Largest, class F>
inline void with_constant(int64_t n, const F& f) {
  if constexpr (Largest > 0) {
    if (n == Largest) return f(std::integral_constant<int, Largest>{});
    with_constant<Largest - 1>(n, f);
  }
}

// Returns 0, or 1 if there is no memory for the activations.
template <class Weight>
int few_tokens(const Weight& weight, const char* x, int64_t tokens, const Output& out) {
  using Step = typename Weight::Step;
  int failed = 0;
  parallel(weight.parts(), [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    const int64_t steps = weight.steps();
    auto* steps_of = static_cast<Step*>(scratch.get(steps * tokens * sizeof(Step)));
    if (!steps_of) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    arrange<Step>(x, weight.token_bytes(), weight.token_bytes(), tokens, steps,
                  Weight::kFlip, steps_of);
    with_constant<Weight::kFew>(tokens, [&](auto count) {
      for (int64_t part = begin; part < end; ++part)
        weight.template pass<count>(part, steps_of, out);
    });
  });
  return failed;
}

template <class Weight>
int many_tokens(const Weight& weight, const char* x, int64_t tokens, const Output& out) {
  using Step = typename Weight::Step;
  using Sum = typename Weight::Sum;
  thread_local Scratch shared;
  const int64_t steps = weight.steps(), bytes = weight.token_bytes();
  const int64_t largest = tokens < kBlock ? tokens : kBlock;
  auto* arranged = static_cast<Step*>(shared.get(steps * largest * sizeof(Step)));
  int failed = !arranged;
  for (int64_t first = 0; first < tokens && !failed; first += kBlock) {
    const int64_t here = tokens - first < kBlock ? tokens - first : kBlock;
    const int64_t groups = up(here, Weight::kGroup);  // of sizes that differ by at most 1
    const auto start = [=](int64_t group) { return here * group / groups; };
    const int64_t full = here < kManyTokens ? Weight::kSlab : Weight::kLongSlab;
    const auto depth = [=](int64_t slab) {
      return steps - slab < full ? steps - slab : full;
    };
    parallel(groups, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        const int64_t token = start(group), count = start(group + 1) - token;
        for (int64_t slab = 0; slab < steps; slab += full) {
          const int64_t from = slab * int64_t{sizeof(Step)};
          const int64_t size = depth(slab) * int64_t{sizeof(Step)};
          arrange<Step>(x + (first + token) * bytes + from, bytes,
                        bytes - from < size ? bytes - from : size, count, depth(slab),
                        Weight::kFlip, arranged + slab * here + token * depth(slab));
        }
      }
    });
    parallel(up(weight.row_groups(), 2), [&](int64_t begin, int64_t end) {
      thread_local Scratch scratch;
      const int64_t tile = full * Weight::kTileBytesPerStep;
      auto* memory = static_cast<char*>(scratch.get(tile + here * 2 * sizeof(Sum)));
      if (!memory) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      auto* sums = reinterpret_cast<Sum*>(memory + tile);
      for (int64_t pair = begin; pair < end; ++pair) {
        typename Weight::Reader reader(weight, pair, memory);
        for (int64_t slab = 0; slab < steps; slab += full) {
          reader.read(slab, depth(slab));
          for (int64_t group = 0; group < groups; ++group) {
            const int64_t token = start(group);
            with_constant<Weight::kGroup>(start(group + 1) - token, [&](auto count) {
              reader.template add<count>(
                  arranged + slab * here + token * depth(slab), depth(slab), group,
                  slab == 0, sums + 2 * token);
            });
          }
        }
        for (int64_t token = 0; token < here; ++token)
          for (int64_t i = 0; i < 2 && 2 * pair + i < weight.row_groups(); ++i)
            out.store(first + token, (2 * pair + i) * kRows, sums[2 * token + i]);
      }
    });
  }
  return failed;
}

template <class Weight>
int multiply(const Weight& weight, const void* x, int64_t tokens, const Output& out) {
  const char* bytes = static_cast<const char*>(x);
  return tokens <= Weight::kFew ? few_tokens(weight, bytes, tokens, out)
                                : many_tokens(weight, bytes, tokens, out);
}

}  // namespace attnmask
