// A CUDA driver with the five functions that a launch needs, on whose GPU the emulator
// runs. It checks that cubins are cubins, and does not run their code.

#include <stdio.h>

#include "launch.cc"

typedef int Result;
static const Result SUCCESS = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, NOT_FOUND = 500,
                    LAUNCH_FAILED = 719;

struct Function { int kind, tile; unsigned shared; };
static Function functions[64];
static int function_count;

static Result module_load_data(void** module, const void* image) {
  if (memcmp(image, "\x7f" "ELF", 4)) return INVALID_IMAGE;
  *module = functions;
  return SUCCESS;
}

// The mangled name of sparse_linear<KIND, NB> ends in "L4Kind0ELi1EEv9Arguments".
static Result module_get_function(void** found, void* module, const char* name) {
  const char* kind = strstr(name, "L4Kind");
  const char* tile = kind ? strstr(kind, "ELi") : nullptr;
  if (module != functions || !tile || function_count == 64) return NOT_FOUND;
  functions[function_count] = {atoi(kind + 6), atoi(tile + 3), 48 * 1024};
  *found = &functions[function_count++];
  return SUCCESS;
}

static Result set_attribute(void* function, int attribute, int value) {
  if (attribute == 9) return SUCCESS;         // PREFERRED_SHARED_MEMORY_CARVEOUT
  if (attribute != 8) return INVALID_VALUE;  // MAX_DYNAMIC_SHARED_SIZE_BYTES
  static_cast<Function*>(function)->shared = value;
  return SUCCESS;
}

static Result launch(void* function, unsigned x, unsigned y, unsigned z, unsigned threads_x,
                     unsigned threads_y, unsigned threads_z, unsigned shared, void* stream,
                     void** parameters, void** extra) {
  const Function& f = *static_cast<Function*>(function);
  if (threads_x != THREADS || threads_y != 1 || threads_z != 1) return INVALID_VALUE;
  if (shared > f.shared || stream != reinterpret_cast<void*>(77) || extra)
    return INVALID_VALUE;
  const unsigned grid[3] = {x, y, z};
  const char* wrong = emulate(f.kind, f.tile, static_cast<Arguments*>(parameters[0]), grid,
                              shared, 0);
  if (wrong) fprintf(stderr, "the emulator says: %s\n", wrong);
  return wrong ? LAUNCH_FAILED : SUCCESS;
}

extern "C" Result cuGetProcAddress_v2(const char* symbol, void** found, int, uint64_t,
                                      int*) {
  static const struct { const char* name; void* function; } table[] = {
      {"cuModuleLoadData", reinterpret_cast<void*>(module_load_data)},
      {"cuModuleGetFunction", reinterpret_cast<void*>(module_get_function)},
      {"cuFuncSetAttribute", reinterpret_cast<void*>(set_attribute)},
      {"cuLaunchKernel", reinterpret_cast<void*>(launch)},
      {"cuGetProcAddress", reinterpret_cast<void*>(cuGetProcAddress_v2)},
  };
  for (const auto& entry : table)
    if (!strcmp(symbol, entry.name)) {
      *found = entry.function;
      return SUCCESS;
    }
  *found = nullptr;
  return NOT_FOUND;
}
