// Stochastic rounding to bf16 with random bits that depend on nothing but what is rounded: the same on
// every device, thread count, launch shape and data-parallel rank.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace longact {

// Eight elements share the 128 bits of one counter.
constexpr int kRandomGroup = 8;

// Names the random bits of one parameter at one step.
struct RandomKey {
  uint64_t seed;
  uint32_t parameter;
  uint32_t step;
};

struct RandomBits {
  uint32_t words[4];
};

namespace {

// Philox4x32-10 (Salmon et al., SC 2011) at counter (group low, group high, parameter, step).
LONGACT_HOST_DEVICE RandomBits random_bits(const RandomKey& key, uint64_t group) {
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32);
  uint32_t c2 = key.parameter, c3 = key.step;
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The 16 bits of element `lane` of its group.
LONGACT_HOST_DEVICE uint32_t bits_of_lane(const RandomBits& bits, int lane) {
  // Not indexed: a GPU would put the words into memory for that.
  const uint32_t low = lane < 2 ? bits.words[0] : bits.words[1];
  const uint32_t high = lane < 6 ? bits.words[2] : bits.words[3];
  return ((lane < 4 ? low : high) >> (lane % 2 * 16)) & 0xffffu;
}

// Up with the probability of the part that is cut off; inf stays, every NaN becomes torch's.
LONGACT_HOST_DEVICE uint16_t round_to_bfloat16(float value, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(is_nan ? 0x7fc0u : (bits + random) >> 16);
}

}  // namespace
}  // namespace longact
