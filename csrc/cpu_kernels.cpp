// Compiled once for each instruction set with LONGACT_ISA naming it (CMakeLists.txt). Plain loops for
// the compiler to vectorise, and nothing from the standard library: a function template that two
// instruction sets both instantiate would be merged into one by the linker.
#include "cpu_kernels.h"

#define LONGACT_CONCAT_(a, b) a##b
#define LONGACT_CONCAT(a, b) LONGACT_CONCAT_(a, b)
#define LONGACT_STRING_(a) #a
#define LONGACT_STRING(a) LONGACT_STRING_(a)

namespace longact {
namespace {

// Each stream is asked for this much ahead, across the gap to the next row: measured best of 0.5 to
// 4 KB, and faster than the processor's own prefetching even on one long run (docs/architecture.md).
constexpr int64_t kPrefetchBytes = 1536;
constexpr int64_t kLineBytes = 64;

// Past the end of a buffer this is harmless. Into every cache: with non-temporal hints, which data used
// once would suit, a step took 2.4 times as long on an Intel Xeon (docs/architecture.md).
template <typename T>
inline void prefetch(const T* base, int64_t offset) {
  const auto address = reinterpret_cast<uintptr_t>(base) + offset * static_cast<int64_t>(sizeof(T));
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 3);
}

// How much further to ask while at element i of n: further on in this run, and at its end in the next
// run, whose first element lies `ahead` of this one's (0: there is none).
template <typename T>
struct Ahead {
  static constexpr int64_t kWidth = kLineBytes / static_cast<int64_t>(sizeof(T));
  static constexpr int64_t kDistance = kPrefetchBytes / static_cast<int64_t>(sizeof(T));
  const int64_t distance, tail, tail_shift;

  Ahead(int64_t n, int64_t ahead)
      : distance(n < kDistance ? n : kDistance),
        tail(n - distance),
        tail_shift(ahead == 0 ? 0 : ahead - tail) {}
  int64_t operator()(int64_t i) const { return i < tail ? distance : tail_shift; }
};

template <typename T, bool kZeroGrad, bool kAmsgrad>
void adamw_loop(const AdamWCoefficients<T>& coefficients, T* __restrict p, const T* __restrict g,
                T* __restrict m, T* __restrict v, T* __restrict vmax, int64_t n, int64_t ahead,
                int64_t state_ahead) {
  const AdamWCoefficients<T> c = coefficients;  // a copy that the stores below cannot alias
  const auto update = [&](int64_t i) {
    update_moments(c, kZeroGrad ? T(0) : g[i] * c.grad_factor, m[i], v[i]);
    if (kAmsgrad) vmax[i] = running_max(vmax[i], v[i]);
    update_param(c, p[i], m[i], kAmsgrad ? vmax[i] : v[i]);
  };
  constexpr int64_t kWidth = Ahead<T>::kWidth;
  const Ahead<T> shift(n, ahead), state_shift(n, state_ahead);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    prefetch(p, i + shift(i));
    if (!kZeroGrad) prefetch(g, i + shift(i));
    prefetch(m, i + state_shift(i));
    prefetch(v, i + state_shift(i));
    if (kAmsgrad) prefetch(vmax, i + state_shift(i));
    for (int64_t j = i; j < i + kWidth; ++j) update(j);
  }
  for (; i < n; ++i) update(i);
}

template <typename T>
void adamw(const AdamWCoefficients<T>& c, T* p, const T* g, T* m, T* v, T* vmax, int64_t n,
           int64_t ahead, int64_t state_ahead) {
  const auto loop = g != nullptr ? (vmax != nullptr ? adamw_loop<T, false, true> : adamw_loop<T, false, false>)
                                 : (vmax != nullptr ? adamw_loop<T, true, true> : adamw_loop<T, true, false>);
  loop(c, p, g, m, v, vmax, n, ahead, state_ahead);
}

void load(DType dtype, const void* from, float* __restrict to, int64_t n, int64_t ahead) {
  const uint16_t* __restrict bits = static_cast<const uint16_t*>(from);
  const Ahead<uint16_t> shift(n, ahead);
  for (int64_t i = 0; i < n; i += Ahead<uint16_t>::kWidth) prefetch(bits, i + shift(i));
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) to[i] = bfloat16_to_float(bits[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = float16_to_float(bits[i]);
  }
}

void store(DType dtype, const float* __restrict from, void* to, int64_t n) {
  uint16_t* __restrict bits = static_cast<uint16_t*>(to);
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) bits[i] = float_to_bfloat16(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) bits[i] = float_to_float16(from[i]);
  }
}

void store_stochastic(const RandomKey& key, int64_t first, const float* __restrict from, void* to,
                      int64_t n) {
  uint16_t* __restrict bits = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < n;) {
    const RandomBits random = random_bits(key, static_cast<uint64_t>(first + i) / kRandomGroup);
    for (int lane = static_cast<int>((first + i) % kRandomGroup); lane < kRandomGroup && i < n; ++lane, ++i) {
      bits[i] = round_to_bfloat16(from[i], bits_of_lane(random, lane));
    }
  }
}

template <DType kDType>
struct Element;
template <>
struct Element<DType::kFloat32> {
  using type = float;
  static float get(const float* y, int64_t i) { return y[i]; }
};
template <>
struct Element<DType::kFloat64> {
  using type = double;
  static float get(const double* y, int64_t i) { return static_cast<float>(y[i]); }
};
template <>
struct Element<DType::kBFloat16> {
  using type = uint16_t;
  static float get(const uint16_t* y, int64_t i) { return bfloat16_to_float(y[i]); }
};
template <>
struct Element<DType::kFloat16> {
  using type = uint16_t;
  static float get(const uint16_t* y, int64_t i) { return float16_to_float(y[i]); }
};

template <Metric kMetric>
inline float measure(float y) {
  return kMetric == Metric::kRms ? y * y : fabsf(y);
}

// A NaN in either wins: a non-finite activation must show in the magnitude.
template <Metric kMetric>
inline float combine(float a, float b) {
  if (kMetric == Metric::kMaxAbs) return (b > a || b != b) ? b : a;
  return a + b;
}

// Tokens go into the total four at a time; of as many channels at a time as L1 holds.
constexpr int kGroup = 4;
constexpr int64_t kColumns = 1024;

template <Metric kMetric, DType kDType>
void magnitude_loop(const void* data, int64_t stride, const uint8_t* mask, int64_t tokens,
                    int64_t channels, float* total) {
  using E = Element<kDType>;
  const auto* y = static_cast<const typename E::type*>(data);
  for (int64_t first = 0; first < channels; first += kColumns) {
    const int64_t width = channels - first < kColumns ? channels - first : kColumns;
    float* __restrict out = total + first;
    for (int64_t t = 0; t < tokens;) {
      const typename E::type* group[kGroup];
      int size = 0;
      for (; t < tokens && size < kGroup; ++t) {
        if (mask == nullptr || mask[t] != 0) group[size++] = y + t * stride + first;
      }
      if (size == kGroup) {
        const auto *a = group[0], *b = group[1], *d = group[2], *e = group[3];
        for (int64_t c = 0; c < width; ++c) {
          const float ab = combine<kMetric>(measure<kMetric>(E::get(a, c)), measure<kMetric>(E::get(b, c)));
          const float de = combine<kMetric>(measure<kMetric>(E::get(d, c)), measure<kMetric>(E::get(e, c)));
          out[c] = combine<kMetric>(out[c], combine<kMetric>(ab, de));
        }
      } else {
        for (int i = 0; i < size; ++i) {
          const auto* a = group[i];
          for (int64_t c = 0; c < width; ++c) {
            out[c] = combine<kMetric>(out[c], measure<kMetric>(E::get(a, c)));
          }
        }
      }
    }
  }
}

template <Metric kMetric>
void magnitude_of_metric(DType dtype, const void* y, int64_t stride, const uint8_t* mask, int64_t tokens,
                         int64_t channels, float* total) {
  switch (dtype) {
    case DType::kFloat32:
      return magnitude_loop<kMetric, DType::kFloat32>(y, stride, mask, tokens, channels, total);
    case DType::kFloat64:
      return magnitude_loop<kMetric, DType::kFloat64>(y, stride, mask, tokens, channels, total);
    case DType::kBFloat16:
      return magnitude_loop<kMetric, DType::kBFloat16>(y, stride, mask, tokens, channels, total);
    case DType::kFloat16:
      return magnitude_loop<kMetric, DType::kFloat16>(y, stride, mask, tokens, channels, total);
  }
}

void magnitude(Metric metric, DType dtype, const void* y, int64_t stride, const uint8_t* mask,
               int64_t tokens, int64_t channels, float* total) {
  switch (metric) {
    case Metric::kMeanAbs:
      return magnitude_of_metric<Metric::kMeanAbs>(dtype, y, stride, mask, tokens, channels, total);
    case Metric::kRms:
      return magnitude_of_metric<Metric::kRms>(dtype, y, stride, mask, tokens, channels, total);
    case Metric::kMaxAbs:
      return magnitude_of_metric<Metric::kMaxAbs>(dtype, y, stride, mask, tokens, channels, total);
  }
}

}  // namespace

extern const CpuKernels LONGACT_CONCAT(kCpuKernels_, LONGACT_ISA);
const CpuKernels LONGACT_CONCAT(kCpuKernels_, LONGACT_ISA) = {
    LONGACT_STRING(LONGACT_ISA), adamw<float>, adamw<double>, load, store, store_stochastic,
    magnitude,
};

}  // namespace longact
