// y = x W^T + bias for a W8A8 weight with any mask.
//
// Needs AVX-512 F, BW, VL and DQ, and BF16, VNNI and VBMI2.
#include "any_mask.hpp"

namespace {
using namespace attnmask;
using Weight = AnyMask<Int8>;
}  // namespace

ATTNMASK_EXPORT void any_mask_int8_count(const void* weight, int64_t rows, int64_t columns,
                                         int64_t* counts) {
  Packer<Int8>(weight, rows, columns).count(counts);
}

ATTNMASK_EXPORT void any_mask_int8_pack(const void* weight, int64_t rows, int64_t columns,
                                        const int64_t* starts, uint64_t* masks,
                                        int8_t* values) {
  Packer<Int8>(weight, rows, columns).pack(starts, masks, values);
}

// x: int8 [tokens, columns]; y: bf16 [tokens, rows]; bias: bf16 [rows] or null
// scales and sums: see Output
ATTNMASK_EXPORT int any_mask_int8(const uint64_t* masks, const int8_t* values,
                                  const int64_t* starts, int64_t rows, int64_t columns,
                                  const void* x, int64_t tokens,
                                  const float* channel_scales, const int32_t* row_sums,
                                  const float* token_scales, const int32_t* zero_points,
                                  const uint16_t* bias, uint16_t* y) {
  const Weight weight{masks, values, starts, rows, columns};
  return multiply(weight, x, tokens,
                  {y, bias, rows, channel_scales, row_sums, token_scales,
                   zero_points});
}
