#include "channel_magnitude_cpu.h"

#include <algorithm>
#include <vector>

namespace longact {
namespace {

// Where the partial sums begin, and the end. Each is of as many counted tokens, at most 256: fp32 sums over
// 100 k tokens stay accurate. How many depends on how many count alone: the order of the sum is the same
// wherever padding stands, and for any number of threads.
std::vector<int64_t> begins_of_blocks(const uint8_t* mask, int64_t tokens, int64_t counted) {
  constexpr int64_t kGroup = 4;  // as cpu_kernels.cpp takes them
  const int64_t size = std::clamp((counted / 16 + kGroup - 1) / kGroup * kGroup, int64_t{16}, int64_t{256});
  std::vector<int64_t> begins;
  for (int64_t t = 0, i = 0; t < tokens; ++t) {
    if ((mask == nullptr || mask[t] != 0) && i++ % size == 0) begins.push_back(t);
  }
  begins.push_back(tokens);
  return begins;
}

void merge(Metric metric, const float* from, int64_t channels, float* to) {
  for (int64_t c = 0; c < channels; ++c) {
    const float a = to[c], b = from[c];
    // A NaN in either wins.
    to[c] = metric != Metric::kMaxAbs ? a + b : (b > a || b != b) ? b : a;
  }
}

}  // namespace

int64_t channel_magnitude_cpu(Metric metric, DType dtype, const void* y, int64_t stride,
                              const uint8_t* mask, int64_t tokens, int64_t channels, float* total,
                              int threads, const std::string& isa) {
  const CpuKernels& kernels = cpu_kernels(isa);
  constexpr int64_t kElementsPerThread = 32768;
  const int64_t counted = mask == nullptr ? tokens : tokens - std::count(mask, mask + tokens, uint8_t{0});
  if (counted == 0) return 0;
  const std::vector<int64_t> begins = begins_of_blocks(mask, tokens, counted);
  const int64_t blocks = static_cast<int64_t>(begins.size()) - 1;
  const int64_t most = std::min<int64_t>(blocks, 1 + tokens * channels / kElementsPerThread);
  std::vector<float> sums(blocks * channels);
  // Split by token, as the matmul that wrote y most likely was: a thread finds its part in its cache.
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(std::min<int64_t>(threads, most))) if (most > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = begins[block], count = begins[block + 1] - first;
    kernels.magnitude(metric, dtype, static_cast<const char*>(y) + first * stride * dtype_size(dtype), stride,
                      mask == nullptr ? nullptr : mask + first, count, channels,
                      sums.data() + block * channels);
  }
  for (int64_t block = 1; block < blocks; ++block) {
    merge(metric, sums.data() + block * channels, channels, sums.data());
  }
  merge(metric, sums.data(), channels, total);
  return counted;
}

}  // namespace longact
