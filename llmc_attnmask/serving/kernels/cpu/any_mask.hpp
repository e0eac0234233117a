// A weight with any mask: one bit per entry and the kept values.
//
// A unit is 16 rows x 4 bytes, that is 2 bf16 or 4 int8 inputs:
//
//             inputs 0,1   2,3
//   row  0    [ a  b ]   [ .  c ]       unit 0: bits 1 1 1 0 ...  values a b d ...
//   row  1    [ d  . ]   [ e  f ]       unit 1: bits 0 1 1 1 ...  values c e f ...
//   ...
//   row 15
//
// The units of 16 rows follow one another along the inputs, their bits in one stream and
// their values in another. A unit's values begin where those of the one before end, so both
// streams are read once, in order, whatever the mask.
//
// A unit is expanded in a register, where it serves all tokens, or into the cache if they
// are many. It is dense then: a pruned entry is multiplied as +0.0, so Inf or NaN in its
// activation gives NaN, as in a dense kernel.
#pragma once

#include "drive.hpp"

namespace attnmask {

inline void expand_onto(__m512i& unit, uint32_t mask, __m512i bf16_values) {
  unit = _mm512_mask_expand_epi16(unit, mask, bf16_values);
}

inline void expand_onto(__m512i& unit, uint64_t mask, __m512i int8_values) {
  unit = _mm512_mask_expand_epi8(unit, mask, int8_values);
}

inline __m512i compress(uint32_t mask, __m512i bf16_unit) {
  return _mm512_maskz_compress_epi16(mask, bf16_unit);
}

inline __m512i compress(uint64_t mask, __m512i int8_unit) {
  return _mm512_maskz_compress_epi8(mask, int8_unit);
}

// Put the next values at the set bits of a unit, zeros elsewhere. Reads 64 bytes.
template <class Type>
inline __m512i expand(typename Type::Mask mask, const typename Type::Entry* values) {
  __m512i packed = _mm512_loadu_si512(values);
  // Not folded into the expansion: its form with memory is microcode, many times slower.
  asm("" : "+v"(packed));
  // Zen 5 waits for the old value of the destination even in the zeroing form, so every
  // expansion gets a register that was zeroed for it.
  __m512i unit = _mm512_setzero_si512();
  asm("" : "+v"(unit));
  expand_onto(unit, mask, packed);
  return unit;
}

// Pack a row-major weight [rows, columns]: everything but +0.0 is kept.
template <class Type>
class Packer {
 public:
  using Mask = typename Type::Mask;
  using Entry = typename Type::Entry;

  Packer(const void* weight, int64_t rows, int64_t columns)
      : weight_(static_cast<const char*>(weight)),
        rows_(rows),
        bytes_(columns * int64_t{sizeof(Entry)}) {}

  // Write the number of kept values of every row group.
  void count(int64_t* counts) const {
    parallel(up(rows_, kRows), [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        int64_t total = 0;
        for (int64_t step = 0; step < up(bytes_, 4); ++step)
          total += Type::count(Type::nonzero(unit(group, step)));
        counts[group] = total;
      }
    });
  }

  // Write masks [row groups, steps] and values, those of each group from its start on.
  void pack(const int64_t* starts, Mask* masks, Entry* values) const {
    const int64_t steps = up(bytes_, 4);
    parallel(up(rows_, kRows), [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        Entry* value = values + starts[group];
        for (int64_t step = 0; step < steps; ++step) {
          const __m512i entries = unit(group, step);
          const Mask mask = Type::nonzero(entries);
          alignas(64) Entry packed[kUnitBytes / sizeof(Entry)];
          _mm512_store_si512(packed, compress(mask, entries));
          std::memcpy(value, packed, Type::count(mask) * sizeof(Entry));
          masks[group * steps + step] = mask;
          value += Type::count(mask);
        }
      }
    });
  }

 private:
  // 4 bytes of 16 rows; zeros where the weight has none.
  __m512i unit(int64_t group, int64_t step) const {
    alignas(64) uint32_t words[kRows] = {};
    const int64_t size = bytes_ - 4 * step < 4 ? bytes_ - 4 * step : 4;
    for (int64_t i = 0; i < kRows && group * kRows + i < rows_; ++i) {
      const char* at = weight_ + (group * kRows + i) * bytes_ + 4 * step;
      std::memcpy(words + i, at, size == 4 ? 4 : size);
    }
    return _mm512_load_si512(words);
  }

  const char* weight_;
  int64_t rows_, bytes_;
};

template <class Type>
struct AnyMask {
  using Mask = typename Type::Mask;
  using Entry = typename Type::Entry;
  using Sum = typename Type::Sum;
  using Step = uint32_t;

  static constexpr Step kFlip = static_cast<Step>(Type::kFlip);
  static constexpr int kFew = 16;       // tokens of one pass
  static constexpr int kGroup = 12;     // tokens that share a tile in registers
  static constexpr int64_t kSlab = 128;
  static constexpr int64_t kLongSlab = 1024;
  static constexpr int64_t kTileBytesPerStep = 2 * kUnitBytes;  // two expanded units
  static constexpr int64_t kAhead = 8192;  // bytes of values; hides the memory's latency

  const Mask* masks;      // [row groups, steps]
  const Entry* values;    // of all row groups, then 64 bytes
  const int64_t* starts;  // [row groups], of their values
  int64_t rows, columns;

  int64_t token_bytes() const { return columns * int64_t{sizeof(Entry)}; }
  int64_t steps() const { return up(token_bytes(), sizeof(Step)); }
  int64_t row_groups() const { return up(rows, kRows); }
  int64_t parts() const { return row_groups(); }

  template <int T>
  __attribute__((noinline)) void pass(int64_t group, const Step* x, const Output& out) const {
    // Consecutive units add to different sums: a product need not wait for the last one.
    constexpr int kSets = T < 3 ? 4 : T < 9 ? 2 : 1;
    const int64_t count = steps();
    const Mask* mask = masks + group * count;
    const Entry* value = values + starts[group];
    Sum sums[kSets][T];
#pragma GCC unroll 4
    for (int set = 0; set < kSets; ++set)
#pragma GCC unroll 16
      for (int token = 0; token < T; ++token) sums[set][token] = Type::zero();
    const auto step = [&](int64_t unit, int set) __attribute__((always_inline)) {
      const __m512i entries = expand<Type>(mask[unit], value);
      prefetch(reinterpret_cast<const char*>(value) + kAhead);
      value += Type::count(mask[unit]);
#pragma GCC unroll 16
      for (int token = 0; token < T; ++token)
        Type::dot(sums[set][token], entries, _mm512_set1_epi32(x[unit * T + token]));
    };
    int64_t unit = 0;
    for (; unit + kSets <= count; unit += kSets) {
#pragma GCC unroll 4
      for (int set = 0; set < kSets; ++set) step(unit + set, set);
      prefetch(reinterpret_cast<const char*>(mask + unit) + kAhead / 4);
    }
    for (; unit < count; ++unit) step(unit, 0);
#pragma GCC unroll 16
    for (int token = 0; token < T; ++token) {
#pragma GCC unroll 4
      for (int set = 1; set < kSets; ++set)
        sums[0][token] = Type::add(sums[0][token], sums[set][token]);
      out.store(token, group * kRows, sums[0][token]);
    }
  }

  class Reader {
   public:
    Reader(const AnyMask& weight, int64_t pair, char* memory)
        : tile_(reinterpret_cast<__m512i*>(memory)) {
      for (int64_t i = 0; i < 2; ++i) {  // an odd last group is read twice
        const int64_t last = weight.row_groups() - 1;
        const int64_t group = 2 * pair + i < last ? 2 * pair + i : last;
        mask_[i] = weight.masks + group * weight.steps();
        value_[i] = weight.values + weight.starts[group];
      }
    }

    void read(int64_t slab, int64_t depth) {
      for (int64_t i = 0; i < 2; ++i) {
        const Mask* mask = mask_[i] + slab;
        const Entry* value = value_[i];
        for (int64_t unit = 0; unit < depth; ++unit) {
          _mm512_store_si512(tile_ + 2 * unit + i, expand<Type>(mask[unit], value));
          prefetch(reinterpret_cast<const char*>(value) + kAhead / 4);
          value += Type::count(mask[unit]);
        }
        value_[i] = value;
      }
    }

    template <int T>
    __attribute__((noinline)) void add(const Step* x, int64_t depth, int64_t group,
                                       bool first, Sum* out) const {
      // While the first tokens are multiplied, the next slab's values are fetched.
      const char* next = group < 2 ? reinterpret_cast<const char*>(value_[group])
                                   : reinterpret_cast<const char*>(x + depth * T);
      const int64_t stride = group < 2 ? kUnitBytes : T * sizeof(Step);
      Sum sums[T][2];
#pragma GCC unroll 12
      for (int token = 0; token < T; ++token)
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i)
          sums[token][i] = first ? Type::zero() : out[2 * token + i];
      for (int64_t unit = 0; unit < depth; ++unit) {
        const __m512i w0 = tile_[2 * unit], w1 = tile_[2 * unit + 1];
        prefetch(next + unit * stride);
#pragma GCC unroll 12
        for (int token = 0; token < T; ++token) {
          const __m512i step = _mm512_set1_epi32(x[unit * T + token]);
          Type::dot(sums[token][0], w0, step);
          Type::dot(sums[token][1], w1, step);
        }
      }
#pragma GCC unroll 12
      for (int token = 0; token < T; ++token)
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) out[2 * token + i] = sums[token][i];
    }

   private:
    const Mask* mask_[2];
    const Entry* value_[2];
    __m512i* tile_;
  };
};

}  // namespace attnmask
