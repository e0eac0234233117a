// Calls the kernels with buffers of exactly the sizes that they may use, so that a
// sanitizer sees every byte beyond. Exits with 1 if a result is wrong.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>

extern "C" {
int two_of_four_bf16_pack(const uint16_t*, int64_t, int64_t, char*);
int two_of_four_int8_pack(const int8_t*, int64_t, int64_t, char*);
void any_mask_bf16_count(const void*, int64_t, int64_t, int64_t*);
void any_mask_int8_count(const void*, int64_t, int64_t, int64_t*);
void any_mask_bf16_pack(const void*, int64_t, int64_t, const int64_t*, uint32_t*, uint16_t*);
void any_mask_int8_pack(const void*, int64_t, int64_t, const int64_t*, uint64_t*, int8_t*);
int two_of_four_bf16(const char*, int64_t, int64_t, const void*, int64_t, const uint16_t*,
                     uint16_t*);
int two_of_four_int8(const char*, int64_t, int64_t, const void*, int64_t, const float*,
                     const int32_t*, const float*, const int32_t*, const uint16_t*,
                     uint16_t*);
int any_mask_bf16(const uint32_t*, const uint16_t*, const int64_t*, int64_t, int64_t,
                  const void*, int64_t, const uint16_t*, uint16_t*);
int any_mask_int8(const uint64_t*, const int8_t*, const int64_t*, int64_t, int64_t,
                  const void*, int64_t, const float*, const int32_t*, const float*,
                  const int32_t*, const uint16_t*, uint16_t*);
}

namespace {

std::mt19937 random_bits(1);

int64_t up(int64_t count, int64_t size) { return (count + size - 1) / size; }

double value(int8_t entry) { return entry; }

double value(uint16_t entry) {
  const uint32_t bits = uint32_t{entry} << 16;
  float found;
  std::memcpy(&found, &bits, 4);
  return found;
}

void draw(int8_t& entry) { entry = static_cast<int8_t>(random_bits()); }

void draw(uint16_t& entry) {
  const float drawn = std::normal_distribution<float>()(random_bits);
  uint32_t bits;
  std::memcpy(&bits, &drawn, 4);
  entry = static_cast<uint16_t>(bits >> 16);
}

template <class Entry>
bool right(int64_t rows, int64_t columns, int64_t tokens, double density, bool two_of_four) {
  constexpr bool kInt8 = sizeof(Entry) == 1;
  std::unique_ptr<Entry[]> weight(new Entry[rows * columns]());
  std::unique_ptr<Entry[]> x(new Entry[tokens * columns]);
  std::unique_ptr<uint16_t[]> bias(new uint16_t[rows]), y(new uint16_t[tokens * rows]);
  std::unique_ptr<float[]> channel(new float[rows]), token(new float[tokens]);
  std::unique_ptr<int32_t[]> sums(new int32_t[rows]()), zeros(new int32_t[tokens]);
  for (int64_t i = 0; i < rows * columns; ++i)
    if (two_of_four ? i % 4 == (i / 4) % 4 || i % 4 == (i / 4 + 1) % 4
                    : std::bernoulli_distribution(density)(random_bits))
      draw(weight[i]);
  for (int64_t i = 0; i < tokens * columns; ++i) draw(x[i]);
  for (int64_t r = 0; r < rows; ++r) {
    draw(bias[r]);
    channel[r] = 0.5;
    for (int64_t c = 0; c < columns; ++c) sums[r] += static_cast<int32_t>(value(weight[r * columns + c]));
  }
  for (int64_t t = 0; t < tokens; ++t) token[t] = 0.25, zeros[t] = static_cast<int32_t>(t % 7);

  int status = 0;
  if (two_of_four) {
    const int64_t bytes = 64 + 256 * sizeof(Entry);
    std::unique_ptr<char[]> tiles(new char[up(rows, 32) * up(columns, 32) * 2 * bytes]());
    if constexpr (kInt8) {
      status |= two_of_four_int8_pack(weight.get(), rows, columns, tiles.get());
      status |= two_of_four_int8(tiles.get(), rows, columns, x.get(), tokens, channel.get(),
                                 sums.get(), token.get(), zeros.get(), bias.get(), y.get());
    } else {
      status |= two_of_four_bf16_pack(weight.get(), rows, columns, tiles.get());
      status |= two_of_four_bf16(tiles.get(), rows, columns, x.get(), tokens, bias.get(),
                                 y.get());
    }
  } else {
    const int64_t groups = up(rows, 16), units = up(columns * sizeof(Entry), 4);
    std::unique_ptr<int64_t[]> starts(new int64_t[groups]);
    if constexpr (kInt8)
      any_mask_int8_count(weight.get(), rows, columns, starts.get());
    else
      any_mask_bf16_count(weight.get(), rows, columns, starts.get());
    int64_t total = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t count = starts[g];
      starts[g] = total;
      total += count;
    }
    std::unique_ptr<Entry[]> values(new Entry[total + 64 / sizeof(Entry)]());
    if constexpr (kInt8) {
      std::unique_ptr<uint64_t[]> masks(new uint64_t[groups * units]);
      any_mask_int8_pack(weight.get(), rows, columns, starts.get(), masks.get(), values.get());
      status |= any_mask_int8(masks.get(), values.get(), starts.get(), rows, columns, x.get(),
                              tokens, channel.get(), sums.get(), token.get(), zeros.get(),
                              bias.get(), y.get());
    } else {
      std::unique_ptr<uint32_t[]> masks(new uint32_t[groups * units]);
      any_mask_bf16_pack(weight.get(), rows, columns, starts.get(), masks.get(), values.get());
      status |= any_mask_bf16(masks.get(), values.get(), starts.get(), rows, columns, x.get(),
                              tokens, bias.get(), y.get());
    }
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0, largest = 0;
      for (int64_t c = 0; c < columns; ++c) {
        const double input = value(x[t * columns + c]) - (kInt8 ? zeros[t] : 0);
        const double product = value(weight[r * columns + c]) * input;
        sum += product;
        largest += std::abs(product);
      }
      const double scale = kInt8 ? 0.125 : 1, b = value(bias[r]);
      const double expected = sum * scale + b;
      const double error = std::abs(value(y[t * rows + r]) - expected);
      if (error > std::abs(expected) / 256 + (largest * scale + std::abs(b)) * 1e-6 + 1e-30) {
        std::printf("%ld x %ld, %ld tokens, %zu bytes, density %g, 2:4 %d: %g, expected %g\n",
                    long(rows), long(columns), long(tokens), sizeof(Entry), density,
                    two_of_four, value(y[t * rows + r]), expected);
        return false;
      }
    }
  return !status;
}

}  // namespace

extern "C" int omp_get_max_threads();

int main() {
  if (omp_get_max_threads() != 3) return 2;
  for (const int64_t tokens : {1, 2, 7, 16, 17, 30, 515})
    for (const int64_t rows : {1, 15, 33, 48})
      for (const int64_t columns : {1, 3, 4, 36, 100, 545}) {
        for (const double density : {0.0, 0.4, 1.0})
          if (!right<uint16_t>(rows, columns, tokens, density, false) ||
              !right<int8_t>(rows, columns, tokens, density, false))
            return 1;
        if (columns % 4 == 0 && (!right<uint16_t>(rows, columns, tokens, 0, true) ||
                                 !right<int8_t>(rows, columns, tokens, 0, true)))
          return 1;
      }
  return 0;
}
