// y = x W^T + bias for a bf16 weight with any mask.
//
// Needs AVX-512 F, BW, VL and DQ, and BF16 and VBMI2.
#include "any_mask.hpp"

namespace {
using namespace attnmask;
using Weight = AnyMask<Bf16>;
}  // namespace

ATTNMASK_EXPORT void any_mask_bf16_count(const void* weight, int64_t rows, int64_t columns,
                                         int64_t* counts) {
  Packer<Bf16>(weight, rows, columns).count(counts);
}

ATTNMASK_EXPORT void any_mask_bf16_pack(const void* weight, int64_t rows, int64_t columns,
                                        const int64_t* starts, uint32_t* masks,
                                        uint16_t* values) {
  Packer<Bf16>(weight, rows, columns).pack(starts, masks, values);
}

// x: bf16 [tokens, columns]; y: bf16 [tokens, rows]; bias: bf16 [rows] or null
ATTNMASK_EXPORT int any_mask_bf16(const uint32_t* masks, const uint16_t* values,
                                  const int64_t* starts, int64_t rows, int64_t columns,
                                  const void* x, int64_t tokens,
                                  const uint16_t* bias, uint16_t* y) {
  const Weight weight{masks, values, starts, rows, columns};
  return multiply(weight, x, tokens,
                  {y, bias, rows, nullptr, nullptr, nullptr, nullptr});
}
