// One element's AdamW update, shared by every native path.
//
// Compiled without fast-math and without fused multiply-add, so that every instruction set, thread
// count and device that rounds as IEEE 754 says gives the same bits.
#pragma once

#include <cmath>

#include "dtypes.h"
#include "tensor_table.h"

namespace longact {

// What the elements of one row have in common at one step.
template <typename T>
struct AdamWCoefficients {
  T grad_factor;  // sign of `maximize` over the gradient scale
  T beta1, one_minus_beta1;
  T beta2, one_minus_beta2;
  T eps;
  T decay;           // 1 - lr * weight_decay
  T step_size;       // lr / (1 - beta1^age)
  T inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^age)
};

namespace {

// By repeated squaring: the same bits on every device, which pow() does not promise. Its error is below
// age * 2^-53 of the power, and of 1 - beta^age far below what a float resolves.
LONGACT_HOST_DEVICE double integer_power(double base, uint32_t exponent) {
  double power = 1.0;
  for (; exponent != 0; exponent >>= 1) {
    if (exponent & 1u) power *= base;
    base *= base;
  }
  return power;
}

// `age` counts this update too: 1 at a row's first one. Bias corrections are computed in double.
template <typename T>
LONGACT_HOST_DEVICE AdamWCoefficients<T> adamw_coefficients(const AdamWGroup& group, double lr,
                                                            double grad_scale, uint32_t age) {
  constexpr bool kIsDouble = sizeof(T) == sizeof(double);
  const double bias1 = 1.0 - (kIsDouble ? pow(group.beta1, double(age)) : integer_power(group.beta1, age));
  const double bias2 = 1.0 - (kIsDouble ? pow(group.beta2, double(age)) : integer_power(group.beta2, age));
  AdamWCoefficients<T> c;
  c.grad_factor = static_cast<T>((group.maximize ? -1.0 : 1.0) / grad_scale);
  c.beta1 = static_cast<T>(group.beta1);
  c.one_minus_beta1 = static_cast<T>(1.0 - group.beta1);
  c.beta2 = static_cast<T>(group.beta2);
  c.one_minus_beta2 = static_cast<T>(1.0 - group.beta2);
  c.eps = static_cast<T>(group.eps);
  c.decay = static_cast<T>(1.0 - lr * group.weight_decay);
  c.step_size = static_cast<T>(lr / bias1);
  c.inv_sqrt_bias2 = static_cast<T>(1.0 / sqrt(bias2));
  return c;
}

LONGACT_HOST_DEVICE float square_root(float x) { return sqrtf(x); }
LONGACT_HOST_DEVICE double square_root(double x) { return sqrt(x); }

// `g` is the gradient times grad_factor.
template <typename T>
LONGACT_HOST_DEVICE void update_moments(const AdamWCoefficients<T>& c, T g, T& m, T& v) {
  m = c.beta1 * m + c.one_minus_beta1 * g;
  v = c.beta2 * v + c.one_minus_beta2 * (g * g);
}

// With amsgrad this replaces v where it divides. A NaN in either wins, as torch.maximum has it.
template <typename T>
LONGACT_HOST_DEVICE T running_max(T vmax, T v) {
  return (v > vmax || v != v) ? v : vmax;
}

template <typename T>
LONGACT_HOST_DEVICE void update_param(const AdamWCoefficients<T>& c, T& p, T m, T v) {
  p = c.decay * p - c.step_size * m / (square_root(v) * c.inv_sqrt_bias2 + c.eps);
}

}  // namespace
}  // namespace longact
