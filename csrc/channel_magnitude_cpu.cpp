#include "channel_magnitude_cpu.h"

#include <algorithm>
#include <vector>

namespace longact {

void channel_magnitude_cpu(Metric metric, DType dtype, const void* y, int64_t stride,
                           const uint8_t* mask, int64_t tokens, int64_t channels, float* total,
                           int threads, const std::string& isa) {
  const CpuKernels& kernels = cpu_kernels(isa);
  constexpr int64_t kElementsPerThread = 32768;
  // Threads take tokens, as the matmul that left y in their caches did. Each block has its own sums, and
  // these are added in the order of the blocks: the same bits for any number of threads.
  constexpr int64_t kTokens = 128;
  const int64_t blocks = (tokens + kTokens - 1) / kTokens;
  std::vector<float> sums(blocks * channels);
  threads = static_cast<int>(std::min<int64_t>({threads, blocks, 1 + tokens * channels / kElementsPerThread}));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * kTokens;
    kernels.magnitude(metric, dtype, static_cast<const char*>(y) + first * stride * dtype_size(dtype), stride,
                      mask == nullptr ? nullptr : mask + first, std::min(kTokens, tokens - first), channels,
                      sums.data() + block * channels);
  }
  const Metric of_sums = metric == Metric::kMaxAbs ? Metric::kMaxAbs : Metric::kMeanAbs;
  kernels.magnitude(of_sums, DType::kFloat32, sums.data(), channels, nullptr, blocks, channels, total);
}

}  // namespace longact
