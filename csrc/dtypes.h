// Storage types of the buffers that the kernels read and write, and their exact conversions.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define LONGACT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LONGACT_HOST_DEVICE inline
#endif

namespace longact {

// The codes are part of the Python interface (longact/backends.py: DTYPE_CODES).
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

LONGACT_HOST_DEVICE constexpr int64_t dtype_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// On a GPU its own instructions do the same, NaN aside where torch's differs.
//
// Internal linkage everywhere below: the same header is compiled for several instruction sets, and
// the linker must never replace one's code by another's.
namespace {

template <typename To, typename From>
LONGACT_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

LONGACT_HOST_DEVICE float bfloat16_to_float(uint16_t bits) {
  return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Round to nearest even; every NaN becomes the quiet NaN that torch writes.
LONGACT_HOST_DEVICE uint16_t float_to_bfloat16(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t converted;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(converted) : "f"(value));
  return value == value ? converted : uint16_t{0x7fc0u};
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
#endif
}

LONGACT_HOST_DEVICE float float16_to_float(uint16_t half) {
#if defined(__CUDA_ARCH__)
  float converted;
  asm("cvt.f32.f16 %0, %1;" : "=f"(converted) : "h"(half));
  return converted;
#else
  const uint32_t sign = (static_cast<uint32_t>(half) & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half) & 0x7fffu;
  // Normal numbers move the exponent bias from 15 to 127, inf and NaN to 255.
  const uint32_t rebias = magnitude >= 0x7c00u ? (255u - 31u) << 23 : (127u - 15u) << 23;
  const uint32_t normal = (magnitude << 13) + rebias;
  // Subnormal numbers are integer multiples of 2^-24.
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  return bit_cast<float>(sign | (magnitude < 0x400u ? bit_cast<uint32_t>(subnormal) : normal));
#endif
}

// Round to nearest even, overflow to inf.
LONGACT_HOST_DEVICE uint16_t float_to_float16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
#if defined(__CUDA_ARCH__)
  uint16_t converted;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(converted) : "f"(value));
  return value == value ? converted : static_cast<uint16_t>(sign | 0x7e00u);
#else
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns the last bit to 2^-24, the step of subnormal halves: the FPU does the rounding.
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return static_cast<uint16_t>(sign | half);
#endif
}

}  // namespace
}  // namespace longact
