// Threads of the OpenMP runtime that the process has already loaded.
//
// torch brings libgomp (or a user preloads libiomp5, which has the same entry points), and
// vLLM sets its number of threads and binds them to cores. A second runtime would compete
// for these cores, so the symbols are looked up when the first kernel runs.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <type_traits>

namespace attnmask {

struct OpenMP {
  using Body = void (*)(void*);
  void (*parallel)(Body, void*, unsigned, unsigned);
  int (*thread)();
  int (*threads)();

  static const OpenMP& loaded() {
    static const OpenMP found = [] {
      OpenMP omp;
      omp.parallel = symbol<decltype(omp.parallel)>("GOMP_parallel");
      omp.thread = symbol<decltype(omp.thread)>("omp_get_thread_num");
      omp.threads = symbol<decltype(omp.threads)>("omp_get_num_threads");
      return omp;
    }();
    return found;
  }

 private:
  template <class F>
  static F symbol(const char* name) {
    return reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
  }
};

// Call body(begin, end) on every thread, with its part of [0, pieces).
template <class Body>
void parallel(int64_t pieces, const Body& body) {
  const OpenMP& omp = OpenMP::loaded();
  if (!omp.parallel || !omp.thread || !omp.threads || pieces < 2) {
    body(int64_t{0}, pieces);
    return;
  }
  struct Task {
    const Body& body;
    int64_t pieces;
    const OpenMP& omp;
  } task{body, pieces, omp};
  omp.parallel(
      [](void* given) {
        const Task& task = *static_cast<Task*>(given);
        const int64_t thread = task.omp.thread(), threads = task.omp.threads();
        const int64_t begin = task.pieces * thread / threads;
        const int64_t end = task.pieces * (thread + 1) / threads;
        if (begin < end) task.body(begin, end);
      },
      &task, 0, 0);
}

}  // namespace attnmask
