// A 2:4 weight: of every four inputs of a row, the two kept values, and four bits.
//
// A unit is 64 bytes: 16 rows x the 2 bf16 values kept of 4 inputs, or the 4 int8 values
// kept of 8. A tile is 16 rows x 32 inputs: the bits, 32 of each row, and its units.
//
//            | 16 x 4 bytes | 64 bytes  | 64 bytes  | ...
//            | bits of rows | unit 0    | unit 1    |       8 units of bf16, 4 of int8
//
// The tiles of two groups of 16 rows alternate along the inputs, so that a kernel reads one
// stream and uses every activation for 32 rows.
//
// Weights are not expanded: the activations are shuffled instead. Every row has a copy of
// the same 8 bytes of activations; its bits, looked up in a table, say which half of them
// its values are for. A pruned entry never meets its activation, so Inf or NaN there does
// not reach the result.
#pragma once

#include "drive.hpp"

namespace attnmask {

// The bytes that a row's shuffle selects, by the four bits of four inputs. Only codes with
// two bits are valid.
template <class Type>
inline __m512i selections(int first_byte) {
  alignas(64) uint32_t table[16] = {};
  constexpr int kSize = sizeof(typename Type::Entry);
  for (int code = 0; code < 16; ++code) {
    int place = first_byte;
    for (int input = 0; input < 4; ++input)
      if (code >> input & 1)
        for (int byte = 0; byte < kSize && place < 4; ++byte, ++place) {
          const uint32_t source = (first_byte ? 4 : 0) + input * kSize + byte;
          table[code] |= source << 8 * place;
        }
  }
  return _mm512_load_si512(table);
}

struct Bf16Shuffle {
  __m512i table = selections<Bf16>(0);
  static constexpr int kBits = 4;  // of a row in a unit
  __m512i operator()(__m512i bits, int unit) const {
    return _mm512_permutexvar_epi32(_mm512_srli_epi32(bits, kBits * unit), table);
  }
};

struct Int8Shuffle {
  __m512i low = selections<Int8>(0), high = selections<Int8>(2);
  static constexpr int kBits = 8;
  __m512i operator()(__m512i bits, int unit) const {
    const __m512i second = _mm512_srli_epi32(bits, kBits * unit + 4);
    return _mm512_or_si512(
        _mm512_permutexvar_epi32(_mm512_srli_epi32(bits, kBits * unit), low),
        _mm512_permutexvar_epi32(second, high));
  }
};

// A group's bits with exactly two set, or 0 if more are: fewer are filled up like those of
// the sparse-24-bitmask storage (llmc_attnmask/checkpoint/layouts/sparse_24_bitmask.py).
constexpr uint8_t kFilled[16] = {12, 5, 10, 3, 12, 5, 6, 0, 12, 9, 10, 0, 12, 0, 0, 0};

template <class Type, class Shuffle>
struct TwoOfFour {
  using Sum = typename Type::Sum;
  using Step = uint64_t;

  static constexpr Step kFlip = Type::kFlip;
  static constexpr int kFew = 8;
  static constexpr int kGroup = 8;
  static constexpr int64_t kUnits = 32 / Shuffle::kBits;            // of a tile
  static constexpr int64_t kTileBytes = (1 + kUnits) * kUnitBytes;  // of 16 rows
  static constexpr int64_t kSlab = 16 * kUnits;
  static constexpr int64_t kLongSlab = 128 * kUnits;
  static constexpr int64_t kTileBytesPerStep = 0;  // slabs are used where they lie
  static constexpr int64_t kAhead = 4096;  // bytes; hides the memory's latency

  const char* tiles;  // [pairs of row groups, tiles, 2, kTileBytes]
  int64_t rows, columns;

  int64_t token_bytes() const { return columns * int64_t{sizeof(typename Type::Entry)}; }
  int64_t count() const { return up(columns, 32); }
  int64_t steps() const { return count() * kUnits; }
  int64_t row_groups() const { return up(rows, kRows); }
  int64_t parts() const { return up(row_groups(), 2); }

  // Add `depth` tiles of both groups for T tokens.
  template <int T, int kSets, bool kPrefetch>
  static inline __attribute__((always_inline)) void add(const char* tile, int64_t depth,
                                                        const Step* x,
                                                        Sum (&sums)[kSets][T][2]) {
    const Shuffle shuffle;
    for (int64_t t = 0; t < depth; ++t, tile += 2 * kTileBytes, x += kUnits * T) {
      const __m512i bits[2] = {_mm512_loadu_si512(tile),
                               _mm512_loadu_si512(tile + kTileBytes)};
      if (kPrefetch) {
        prefetch(tile + kAhead);
        prefetch(tile + kTileBytes + kAhead);
      }
#pragma GCC unroll 8
      for (int unit = 0; unit < kUnits; ++unit) {
        __m512i control[2], values[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const char* at = tile + i * kTileBytes + (1 + unit) * kUnitBytes;
          values[i] = _mm512_loadu_si512(at);
          control[i] = shuffle(bits[i], unit);
          if (kPrefetch) prefetch(at + kAhead);
        }
#pragma GCC unroll 8
        for (int token = 0; token < T; ++token) {
          const __m512i step = _mm512_set1_epi64(x[unit * T + token]);
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i)
            Type::dot(sums[unit % kSets][token][i], values[i],
                      _mm512_shuffle_epi8(step, control[i]));
        }
      }
    }
  }

  template <int T>
  __attribute__((noinline)) void pass(int64_t pair, const Step* x, const Output& out) const {
    constexpr int kSets = T < 3 ? 2 : 1;
    Sum sums[kSets][T][2];
#pragma GCC unroll 4
    for (int set = 0; set < kSets; ++set)
#pragma GCC unroll 8
      for (int token = 0; token < T; ++token)
        sums[set][token][0] = sums[set][token][1] = Type::zero();
    add<T, kSets, true>(tiles + pair * count() * 2 * kTileBytes, count(), x, sums);
#pragma GCC unroll 8
    for (int token = 0; token < T; ++token)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 4
        for (int set = 1; set < kSets; ++set)
          sums[0][token][i] = Type::add(sums[0][token][i], sums[set][token][i]);
        if (2 * pair + i < row_groups())
          out.store(token, (2 * pair + i) * kRows, sums[0][token][i]);
      }
  }

  // Pack a row-major weight [rows, columns] into zeroed tiles; columns are a multiple of 4.
  // Returns 0, or 1 if a group of four has more than two entries that are not +0.0.
  static int pack(const typename Type::Entry* weight, int64_t rows, int64_t columns,
                  char* tiles) {
    using Entry = typename Type::Entry;
    const TwoOfFour shape{tiles, rows, columns};
    int crowded = 0;
    parallel(shape.parts(), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * 2 * kRows; row < end * 2 * kRows; ++row) {
        const int64_t group = row / kRows, lane = row % kRows;
        char* tile = tiles + (group / 2 * shape.count() * 2 + group % 2) * kTileBytes;
        for (int64_t column = 0; column < shape.count() * 32; column += 4) {
          char* here = tile + column / 32 * 2 * kTileBytes;
          Entry entries[4] = {};
          if (row < rows && column < columns)
            std::memcpy(entries, weight + row * columns + column, sizeof(entries));
          int code = 0;
          for (int i = 0; i < 4; ++i) code |= (entries[i] != 0) << i;
          const uint32_t filled = kFilled[code];
          if (!filled) {
            __atomic_store_n(&crowded, 1, __ATOMIC_RELAXED);
            return;
          }
          const int place = column % 32 / 4;
          reinterpret_cast<uint32_t*>(here)[lane] |= filled << 4 * place;
          // 2 values of every group of four, 4 bytes of every unit
          const int64_t at = place * 2 * sizeof(Entry);
          char* out = here + (1 + at / 4) * kUnitBytes + lane * 4 + at % 4;
          const Entry kept[2] = {entries[__builtin_ctz(filled)],
                                 entries[31 - __builtin_clz(filled)]};
          std::memcpy(out, kept, sizeof(kept));
        }
      }
    });
    return crowded;
  }

  class Reader {
   public:
    Reader(const TwoOfFour& weight, int64_t pair, char*)
        : tiles_(weight.tiles + pair * weight.count() * 2 * kTileBytes) {}

    void read(int64_t slab, int64_t) { slab_ = tiles_ + slab / kUnits * 2 * kTileBytes; }

    template <int T>
    __attribute__((noinline)) void add(const Step* x, int64_t depth, int64_t group,
                                       bool first, Sum* out) const {
      Sum sums[1][T][2];
#pragma GCC unroll 8
      for (int token = 0; token < T; ++token)
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i)
          sums[0][token][i] = first ? Type::zero() : out[2 * token + i];
      if (group == 0)
        TwoOfFour::add<T, 1, true>(slab_, depth / kUnits, x, sums);
      else
        TwoOfFour::add<T, 1, false>(slab_, depth / kUnits, x, sums);
#pragma GCC unroll 8
      for (int token = 0; token < T; ++token)
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) out[2 * token + i] = sums[0][token][i];
    }

   private:
    const char* tiles_;
    const char* slab_ = nullptr;
  };
};

}  // namespace attnmask
