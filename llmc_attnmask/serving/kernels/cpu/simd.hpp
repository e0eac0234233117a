// What all kernels share. A unit is 64 bytes of weights: 16 rows with 4 bytes each, that is
// 2 bf16 or 4 int8 entries; a dot product adds one unit to the sums of 16 rows.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define ATTNMASK_EXPORT extern "C" __attribute__((visibility("default")))

namespace attnmask {

constexpr int64_t kRows = 16;  // of a unit
constexpr int64_t kUnitBytes = 64;

inline int64_t up(int64_t count, int64_t size) { return (count + size - 1) / size; }

// GCC takes a function that only calls _mm_prefetch for one without effects and drops it.
inline void prefetch(const void* address) {
  asm volatile("prefetcht0 (%0)" : : "r"(address));
}

struct Bf16 {
  using Entry = uint16_t;
  using Mask = uint32_t;  // of a unit, one bit per entry
  using Sum = __m512;
  static constexpr uint64_t kFlip = 0;

  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  // Pairs of products, summed in float32; denormals count as zero. In assembly, because
  // GCC copies the sums of the intrinsics.
  static void dot(Sum& sum, __m512i weights, __m512i x) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
  }
  static int count(Mask mask) { return __builtin_popcount(mask); }
  static Mask nonzero(__m512i unit) { return _mm512_test_epi16_mask(unit, unit); }
};

struct Int8 {
  using Entry = int8_t;
  using Mask = uint64_t;
  using Sum = __m512i;
  // vpdpbusd multiplies unsigned by signed bytes, so activations are shifted by 128, and
  // 128 times the sum of a row's weights is subtracted at the end.
  static constexpr uint64_t kFlip = 0x8080808080808080;

  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static void dot(Sum& sum, __m512i weights, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weights));
  }
  static int count(Mask mask) { return __builtin_popcountll(mask); }
  static Mask nonzero(__m512i unit) { return _mm512_test_epi8_mask(unit, unit); }
};

// A layer's result and what leads from the sums to it.
struct Output {
  uint16_t* y;                  // bf16 [tokens, rows]
  const uint16_t* bias;         // bf16 [rows], or null
  int64_t rows;
  const float* channel_scales;  // [rows], of an int8 weight
  const int32_t* row_sums;      // [rows], of an int8 weight
  const float* token_scales;    // [tokens], of int8 activations
  const int32_t* zero_points;   // [tokens], of int8 activations; null if symmetric

  void store(int64_t token, int64_t row, __m512 sums) const {
    const __mmask16 valid = lanes(row);
    if (bias) {
      const __m256i b = _mm256_maskz_loadu_epi16(valid, bias + row);
      const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16);
      sums = _mm512_add_ps(sums, _mm512_castsi512_ps(wide));
    }
    _mm256_mask_storeu_epi16(y + token * rows + row, valid,
                             (__m256i)_mm512_cvtneps_pbh(sums));
  }

  void store(int64_t token, int64_t row, __m512i sums) const {
    const __mmask16 valid = lanes(row);
    const __m512i of_rows = _mm512_maskz_loadu_epi32(valid, row_sums + row);
    const __m512i shift = _mm512_set1_epi32(128);
    sums = _mm512_sub_epi32(sums, _mm512_mullo_epi32(shift, of_rows));
    __m512 found = _mm512_cvtepi32_ps(sums);
    if (zero_points) {
      // Activations far from zero have zero points of any size: their products with the
      // rows' sums need more than 32 bits, and are exact in float64.
      const __m512d zero = _mm512_set1_pd(zero_points[token]);
      const auto half = [&](__m256i sum, __m256i of_row) {
        return _mm512_cvtpd_ps(_mm512_sub_pd(
            _mm512_cvtepi32_pd(sum), _mm512_mul_pd(zero, _mm512_cvtepi32_pd(of_row))));
      };
      const __m256 low = half(_mm512_castsi512_si256(sums), _mm512_castsi512_si256(of_rows));
      const __m256 high = half(_mm512_extracti64x4_epi64(sums, 1),
                               _mm512_extracti64x4_epi64(of_rows, 1));
      found = _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
    }
    const __m512 scales =
        _mm512_mul_ps(_mm512_maskz_loadu_ps(valid, channel_scales + row),
                      _mm512_set1_ps(token_scales[token]));
    store(token, row, _mm512_mul_ps(found, scales));
  }

 private:
  __mmask16 lanes(int64_t row) const {
    return rows - row >= kRows ? 0xffff : (1u << (rows - row)) - 1;
  }
};

}  // namespace attnmask
