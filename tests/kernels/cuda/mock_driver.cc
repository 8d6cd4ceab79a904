// A CUDA driver that computes nothing and prints what it is asked for, a line of JSON each.

#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <string>

namespace {

std::set<std::string> names;
const std::map<std::string, int> kPointers = {
    {"norm_forward", 9}, {"norm_backward", 11}, {"norm_sum_parts", 3}};

}  // namespace

extern "C" {

int cuGetErrorString(int, const char** text) {
  *text = "what the mock says";
  return 0;
}
int cuStreamGetCtx(void*, void** context) {
  *context = &names;
  return 0;
}
int cuCtxPushCurrent_v2(void*) { return 0; }
int cuCtxPopCurrent_v2(void**) { return 0; }

int cuLibraryLoadData(void** library, const void* image, int*, void**, unsigned, int*,
                      void**, unsigned) {
  const char* text = static_cast<const char*>(image);
  if (std::strcmp(text, "bad") == 0) return 200;  // CUDA_ERROR_INVALID_IMAGE
  std::printf("{\"call\": \"load\", \"image\": \"%s\"}\n", text);
  *library = &names;
  return 0;
}
int cuLibraryGetKernel(void** kernel, void*, const char* name) {
  if (kPointers.count(name) == 0) return 500;  // CUDA_ERROR_NOT_FOUND
  *kernel = const_cast<char*>(names.insert(name).first->c_str());
  return 0;
}
int cuKernelGetFunction(void** function, void* kernel) {
  *function = kernel;
  return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute != 8) return 1;
  std::printf("{\"call\": \"attribute\", \"kernel\": \"%s\", \"value\": %d}\n",
              static_cast<const char*>(function), value);
  return 0;
}

int cuLaunchKernel(void* function, unsigned grid, unsigned, unsigned, unsigned block,
                   unsigned, unsigned, unsigned shared, void*, void** parameters, void**) {
  const char* name = static_cast<const char*>(function);
  const int count = kPointers.at(name);
  std::printf("{\"call\": \"launch\", \"kernel\": \"%s\", \"grid\": %u, \"block\": %u, "
              "\"shared\": %u, \"pointers\": [",
              name, grid, block, shared);
  for (int i = 0; i < count; ++i) {
    std::printf("%s%llu", i ? ", " : "", *static_cast<unsigned long long*>(parameters[i]));
  }
  std::printf("], \"number\": %lld}\n", *static_cast<long long*>(parameters[count]));
  std::fflush(stdout);
  return 0;
}

}  // extern "C"
