// What a caller checks before it uses the library.
#include "simd.hpp"
#include "threads.hpp"

// The sources that the library was compiled from; see sources.py.
ATTNMASK_EXPORT const char* attnmask_sources() { return ATTNMASK_SOURCES; }

// The number of threads that kernels run on.
ATTNMASK_EXPORT int attnmask_threads() {
  int count = 0;
  attnmask::parallel(int64_t{1} << 20, [&](int64_t, int64_t) {
    __atomic_add_fetch(&count, 1, __ATOMIC_RELAXED);
  });
  return count;
}
