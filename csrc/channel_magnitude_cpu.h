#pragma once

#include <string>

#include "cpu_kernels.h"

namespace longact {

// Adds (max_abs: maxes) the magnitudes of `y[tokens, channels]` into `total[channels]`; the arguments
// are those of CpuKernels::magnitude. Returns how many tokens counted. The result does not depend on
// `threads`.
int64_t channel_magnitude_cpu(Metric metric, DType dtype, const void* y, int64_t stride,
                              const uint8_t* mask, int64_t tokens, int64_t channels, float* total,
                              int threads, const std::string& isa);

}  // namespace longact
