// Activations in the order in which a kernel reads them.
//
// A step is what one unit of weights is multiplied by, of one token: 4 bytes, or the 8 bytes
// of which a 2:4 unit keeps half. Within a slab of steps and a group of tokens they lie so:
//
//   step 0: token 0 | token 1 | ... | token n-1
//   step 1: token 0 | ...
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace attnmask {

// Memory that a thread keeps for its next call.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  // Returns null if there is no memory.
  void* get(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_ = std::aligned_alloc(4096, size_);
      if (!memory_) size_ = 0;
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

// Write a slab of one group: `bytes` bytes of every token, padded to `steps` steps.
// `stride` is the number of bytes from one token to the next.
template <class Step>
void arrange(const char* x, int64_t stride, int64_t bytes, int64_t tokens, int64_t steps,
             Step flip, Step* out) {
  const int64_t whole = bytes / int64_t{sizeof(Step)};
  for (int64_t step = 0; step < steps; ++step, x += sizeof(Step))
    for (int64_t token = 0; token < tokens; ++token) {
      Step entry = 0;
      if (step < whole)
        std::memcpy(&entry, x + token * stride, sizeof(Step));
      else if (step == whole)
        std::memcpy(&entry, x + token * stride, bytes % sizeof(Step));
      *out++ = entry ^ flip;
    }
}

}  // namespace attnmask
