// y = x W^T + bias for a bf16 2:4 weight.
//
// Needs AVX-512 F, BW, VL and DQ, and BF16.
#include "two_of_four.hpp"

namespace {
using namespace attnmask;
using Weight = TwoOfFour<Bf16, Bf16Shuffle>;
}  // namespace

ATTNMASK_EXPORT int two_of_four_bf16_pack(const uint16_t* weight, int64_t rows, int64_t columns,
                                          char* tiles) {
  return Weight::pack(weight, rows, columns, tiles);
}

// x: bf16 [tokens, columns]; y: bf16 [tokens, rows]; bias: bf16 [rows] or null
ATTNMASK_EXPORT int two_of_four_bf16(const char* tiles, int64_t rows, int64_t columns,
                                     const void* x, int64_t tokens,
                                     const uint16_t* bias, uint16_t* y) {
  const Weight weight{tiles, rows, columns};
  return multiply(weight, x, tokens,
                  {y, bias, rows, nullptr, nullptr, nullptr, nullptr});
}
