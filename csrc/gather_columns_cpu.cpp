#include "gather_columns_cpu.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace longact {
namespace {

// Tokens at a time: their rows stay in L1 while the columns are read.
constexpr int64_t kTokens = 8;
constexpr int64_t kElementsPerThread = 16384;

template <typename T>
void gather(const T* from, int64_t stride, int64_t tokens, const int32_t* columns, int64_t num_columns, T* to,
            int threads) {
  constexpr int64_t kLine = 64 / sizeof(T);
  threads = static_cast<int>(std::min<int64_t>(threads, 1 + tokens * num_columns / kElementsPerThread));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t first = 0; first < tokens; first += kTokens) {
    const T* block = from + first * stride;
    const int64_t count = std::min(kTokens, tokens - first);
    int64_t line = -1;
    for (int64_t i = 0; i < num_columns; ++i) {
      // So many streams at once defeat the processor's prefetcher: the next tokens' lines, once each.
      if (columns[i] / kLine != line) {
        line = columns[i] / kLine;
        const int64_t next = std::min(kTokens, tokens - first - count);
        for (int64_t t = 0; t < next; ++t) __builtin_prefetch(block + (kTokens + t) * stride + columns[i], 0, 2);
      }
      const T* column = block + columns[i];
      T* out = to + i * tokens + first;
      if (count == kTokens) {  // a constant, which the compiler unrolls
        for (int64_t t = 0; t < kTokens; ++t) out[t] = column[t * stride];
      } else {
        for (int64_t t = 0; t < count; ++t) out[t] = column[t * stride];
      }
    }
  }
}

}  // namespace

void gather_columns_cpu(int64_t element_size, const void* from, int64_t stride, int64_t tokens, int64_t channels,
                        const int32_t* columns, int64_t num_columns, void* to, int threads) {
  for (int64_t i = 0; i < num_columns; ++i) {
    if (columns[i] < 0 || columns[i] >= channels) {
      throw std::out_of_range("rows: " + std::to_string(columns[i]) + " is outside of the " +
                              std::to_string(channels) + " output channels");
    }
  }
  const auto run = [&](auto element) {
    using T = decltype(element);
    gather(static_cast<const T*>(from), stride, tokens, columns, num_columns, static_cast<T*>(to), threads);
  };
  switch (element_size) {
    case 2:
      return run(uint16_t{});
    case 4:
      return run(uint32_t{});
    case 8:
      return run(uint64_t{});
    default:
      throw std::invalid_argument("elements of " + std::to_string(element_size) + " bytes");
  }
}

}  // namespace longact
