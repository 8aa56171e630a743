#include "channel_magnitude_cpu.h"

#include <algorithm>

namespace longact {

void channel_magnitude_cpu(Metric metric, DType dtype, const void* y, int64_t stride,
                           const uint8_t* mask, int64_t tokens, int64_t channels, float* total,
                           int threads, const std::string& isa) {
  const CpuKernels& kernels = cpu_kernels(isa);
  constexpr int64_t kCacheLine = 16;          // floats: two threads never write the same line of `total`
  constexpr int64_t kElementsPerThread = 32768;
  const int64_t lines = (channels + kCacheLine - 1) / kCacheLine;
  const int64_t parts = std::min<int64_t>({threads, lines, 1 + tokens * channels / kElementsPerThread});
  const int64_t width = (lines + parts - 1) / std::max<int64_t>(1, parts) * kCacheLine;
  // Split by channel, so that each channel is summed in the order of its tokens.
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(parts)) if (parts > 1)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = part * width;
    const int64_t count = std::min(width, channels - first);
    if (count <= 0) continue;
    kernels.magnitude(metric, dtype, static_cast<const char*>(y) + first * dtype_size(dtype), stride, mask,
                      tokens, count, total + first);
  }
}

}  // namespace longact
