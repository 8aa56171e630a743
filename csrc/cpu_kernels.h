// The inner loops of the CPU path, compiled once for each instruction set and chosen at run time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "adamw_math.h"
#include "dtypes.h"
#include "rounding.h"

namespace longact {

// The codes are part of the Python interface (longact/kernels/channel_magnitude.py: METRICS).
enum class Metric : int32_t { kMeanAbs = 0, kRms = 1, kMaxAbs = 2 };

struct CpuKernels {
  const char* name;

  // Updates n consecutive elements; grad null: a gradient of zero; vmax null: no amsgrad. The elements
  // that come next lie `ahead` elements further in p and g and `state_ahead` further in the moments
  // (0: nothing comes next): rows picked from a matrix defeat the processor's own prefetching.
  void (*adamw_f32)(const AdamWCoefficients<float>&, float* p, const float* g, float* m, float* v,
                    float* vmax, int64_t n, int64_t ahead, int64_t state_ahead);
  void (*adamw_f64)(const AdamWCoefficients<double>&, double* p, const double* g, double* m, double* v,
                    double* vmax, int64_t n, int64_t ahead, int64_t state_ahead);

  // bf16 and fp16 to fp32 and back; `ahead` as above.
  void (*load)(DType dtype, const void* from, float* to, int64_t n, int64_t ahead);
  void (*store)(DType dtype, const float* from, void* to, int64_t n);
  // fp32 to bf16, rounded stochastically; `first` is the first one's index in its parameter.
  void (*store_stochastic)(const RandomKey& key, int64_t first, const float* from, void* to, int64_t n);

  // total[c] (op)= |y[t, c]| or y^2, over the tokens whose mask byte is not 0 (mask null: all).
  // `stride`: elements between two tokens. Some hundreds of tokens at most keep fp32 sums exact enough.
  void (*magnitude)(Metric metric, DType dtype, const void* y, int64_t stride, const uint8_t* mask,
                    int64_t tokens, int64_t channels, float* total);
};

// The instruction sets of this build that this processor has, fastest first.
const std::vector<const CpuKernels*>& available_cpu_kernels();

// By name; an empty name means the fastest. Throws std::invalid_argument for an unknown one.
const CpuKernels& cpu_kernels(const std::string& isa);

}  // namespace longact
