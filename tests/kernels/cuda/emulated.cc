// One kernel of norm.cu on the CPU, as launch.cc would launch it: for cuda_emulation.py.

#include "norm.cu"

#ifdef JLN_SUM_PARTS
constexpr int kCluster = 1, kBlock = 256, kSharedBytes = 8 * 32 * 4;
#endif

// `parameters`: the kernel's, in its order, the last one a number.
extern "C" const char* launch(const emulated::Launch* launch, void** parameters) {
  if (launch->threads != kBlock || launch->shared_bytes < kSharedBytes ||
      launch->cluster != kCluster) {
    return "the launch does not fit the kernel";
  }
  const auto kernel = [](void* parameters) {
    void** p = static_cast<void**>(parameters);
    const auto f = [&](int i) { return static_cast<float*>(p[i]); };
#if defined(JLN_FORWARD)
    norm_forward(static_cast<X*>(p[0]), static_cast<Residual*>(p[1]),
                 static_cast<Scale*>(p[2]), static_cast<Bias*>(p[3]),
                 static_cast<Y*>(p[4]), static_cast<ResidualOut*>(p[5]), f(6), f(7), f(8),
                 *static_cast<long long*>(p[9]));
#elif defined(JLN_BACKWARD)
    norm_backward(static_cast<X*>(p[0]), static_cast<Scale*>(p[1]), f(2), f(3), f(4),
                  static_cast<Dy*>(p[5]), static_cast<X*>(p[6]), f(7), f(8),
                  static_cast<X*>(p[9]), f(10), *static_cast<long long*>(p[11]));
#else
    norm_sum_parts(f(0), f(1), f(2), *static_cast<long long*>(p[3]));
#endif
  };
  return emulated::run(*launch, kernel, parameters);
}
