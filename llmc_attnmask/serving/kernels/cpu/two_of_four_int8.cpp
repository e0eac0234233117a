// y = x W^T + bias for a W8A8 2:4 weight.
//
// Needs AVX-512 F, BW, VL and DQ, and BF16 and VNNI.
#include "two_of_four.hpp"

namespace {
using namespace attnmask;
using Weight = TwoOfFour<Int8, Int8Shuffle>;
}  // namespace

ATTNMASK_EXPORT int two_of_four_int8_pack(const int8_t* weight, int64_t rows, int64_t columns,
                                          char* tiles) {
  return Weight::pack(weight, rows, columns, tiles);
}

// x: int8 [tokens, columns]; y: bf16 [tokens, rows]; bias: bf16 [rows] or null
// scales and sums: see Output
ATTNMASK_EXPORT int two_of_four_int8(const char* tiles, int64_t rows, int64_t columns,
                                     const void* x, int64_t tokens,
                                     const float* channel_scales, const int32_t* row_sums,
                                     const float* token_scales, const int32_t* zero_points,
                                     const uint16_t* bias, uint16_t* y) {
  const Weight weight{tiles, rows, columns};
  return multiply(weight, x, tokens,
                  {y, bias, rows, channel_scales, row_sums, token_scales,
                   zero_points});
}
